"""Workflow or activity, found from byte code on every supported Python."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import stent.context
from stent import context
from stent.context import sleep as pause
from stent.errors import ConfigurationError
from stent.model import Effects, Kind
from stent.registry import durable

ROOT = Path(stent.context.__file__).parent.parent


class Facade:
    """Offers the primitives as static methods, as an application object does."""

    sleep = staticmethod(context.sleep)
    map = staticmethod(context.map)

    def dispatch(self, function: object) -> object:
        return function


app = Facade()


@durable(name="kinds.fetch")
async def fetch(value: int) -> int:
    return value


def undecided(function: Callable[..., Any]) -> Kind:
    return durable(name=f"kinds.{function.__qualname__}")(function).kind


async def helper(value: int) -> int:
    return await later_helper(value)


async def later_helper(value: int) -> int:
    return await defined_later(value)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        return await function(*args)

    return wrapper


@decorated
async def decorated_helper() -> int:
    return await fetch(1)


@contextlib.asynccontextmanager
async def managed() -> AsyncIterator[int]:
    yield await fetch(1)


async def plain_helper(value: int) -> int:
    await asyncio.sleep(0)
    return value


class Service:
    fetch = fetch

    async def helping(self) -> int:
        return await fetch(1)

    @staticmethod
    async def static_helping() -> int:
        return await fetch(1)

    async def by_helper(self) -> int:
        return await self.helping()

    async def by_static(self) -> int:
        return await self.static_helping()

    async def by_attribute(self) -> int:
        return await self.fetch(1)

    async def by_closure(self) -> list[int]:
        async def inner() -> int:
            return await self.helping()

        return [await inner()]

    async def as_second_argument(self, other: int) -> list[int]:
        return [other, max(other, await self.helping())]

    async def nothing(self, value: Any) -> int:
        async def inner(fetched: Any) -> Any:
            return await fetched.helping()

        await inner(value)
        return await value.helping()  # type: ignore[no-any-return]


service = Service()


async def calls() -> None:
    await fetch(1)


async def starts() -> None:
    await fetch.start(1)


async def maps() -> None:
    await fetch.map([1])


async def starmaps() -> None:
    await fetch.starmap([(1,)])


async def with_options() -> None:
    fast = fetch.options(queue="fast")
    await fast(1)


async def sleeps() -> None:
    await stent.context.sleep(1)


async def sleeps_by_name() -> None:
    await pause(1)


async def sleeps_on_class() -> None:
    await Facade.sleep(1)


async def maps_on_instance() -> None:
    await app.map(fetch, [1])


async def gathers() -> None:
    await asyncio.gather(*[fetch(i) for i in range(3)])


async def generates() -> None:
    await asyncio.gather(*(fetch(i) for i in range(3)))


async def nests() -> None:
    async def inner() -> None:
        await fetch(1)

    await inner()


async def in_lambda() -> None:
    await (lambda: fetch(1))()  # noqa: PLC3002 - the case


async def conditional(value: int) -> int:
    return await fetch(1) if value else 0


async def in_keywords(value: int) -> Any:
    return dict(one=value, two=await fetch(value))  # noqa: C408 - the case


async def by_helper() -> None:
    await helper(1)


async def by_decorated_helper() -> None:
    await decorated_helper()


async def by_context_manager() -> None:
    async with managed():
        pass


async def by_alias() -> int:
    alias = fetch
    return await alias(1)


async def by_import() -> None:
    from stent.context import sleep as pause

    await pause(1)


async def by_module_import() -> None:
    from stent import context as imported

    await imported.sleep(1)


async def by_instance() -> None:
    await service.helping()


@decorated
async def by_decorator() -> None:
    await fetch(1)


def closing() -> Callable[[], Any]:
    captured = fetch

    async def closure() -> int:
        return await captured(1)

    return closure


async def runs() -> None:
    await context.run(os.getpid)


# fmt: off
NAMES = " ".join(f"name_{i} = os.name_{i} ;" for i in range(300))
# fmt: on
_module: dict[str, Any] = {"fetch": fetch, "os": os, "__name__": "kinds_long"}
exec(f"async def long_function():\n {NAMES}\n await fetch(1)\n", _module)

WORKFLOWS = [
    calls,
    starts,
    maps,
    starmaps,
    with_options,
    sleeps,
    sleeps_by_name,
    sleeps_on_class,
    maps_on_instance,
    gathers,
    generates,
    nests,
    in_lambda,
    conditional,
    in_keywords,
    by_helper,
    by_decorated_helper,
    by_context_manager,
    by_alias,
    by_import,
    by_module_import,
    by_instance,
    by_decorator,
    closing(),
    runs,
    _module["long_function"],
    Service.by_helper,
    Service.by_static,
    Service.by_attribute,
    Service.by_closure,
    Service.as_second_argument,
]


async def reads_time() -> None:
    context.now()
    context.random()
    context.uuid()
    context.tell(1)
    context.current()


async def sleeps_really() -> None:
    await asyncio.sleep(0)


async def passes_on() -> None:
    app.dispatch(fetch)


async def stores() -> list[object]:
    return [fetch, {"name": fetch}]


async def by_plain_helper() -> None:
    await plain_helper(1)


async def shadowed(fetch: Any) -> None:
    await fetch(1)


async def reassigned() -> None:
    alias: Any = fetch
    alias = plain_helper
    await alias(1)


async def reads_attribute() -> str:
    return fetch.name


async def passes_to_builtin() -> list[Any]:
    return sorted([fetch], key=id)


async def in_transaction() -> None:
    async with context.transaction():
        pass


def synchronous() -> int:
    return 1


ACTIVITIES = [
    reads_time,
    sleeps_really,
    passes_on,
    stores,
    by_plain_helper,
    shadowed,
    reassigned,
    reads_attribute,
    passes_to_builtin,
    in_transaction,
    synchronous,
    Service.nothing,
]


@durable(name="kinds.defined_later")
async def defined_later(value: int) -> int:
    return value


@pytest.mark.parametrize("function", WORKFLOWS, ids=lambda f: f.__qualname__)
def test_what_calls_durable_functions_is_a_workflow(
    function: Callable[..., Any],
) -> None:
    """Whatever the way of writing the call, it decides."""
    assert undecided(function) is Kind.WORKFLOW


@pytest.mark.parametrize("function", ACTIVITIES, ids=lambda f: f.__qualname__)
def test_what_calls_none_is_an_activity(function: Callable[..., Any]) -> None:
    """Mentioning a durable function, or reading time and chance, decides nothing."""
    assert undecided(function) is Kind.ACTIVITY


def test_kind_overrides_what_the_code_says() -> None:
    """The explicit kind wins in both directions."""
    assert durable(name="kinds.forced_a", kind="activity")(calls).kind is Kind.ACTIVITY
    forced = durable(name="kinds.forced_w", kind="workflow")(sleeps_really)
    assert forced.kind is Kind.WORKFLOW
    with pytest.raises(ConfigurationError, match='"workflow" or "activity"'):
        durable(name="kinds.forced_x", kind="task")


def test_a_transaction_makes_effects_transactional() -> None:
    """Opening stent.transaction() anywhere in the code declares the effects."""
    made = durable(name="kinds.transactional")(in_transaction)
    assert made.effects is Effects.TRANSACTIONAL
    assert fetch.effects is Effects.AT_LEAST_ONCE


def test_installed_packages_search_their_own_helpers(tmp_path: Path) -> None:
    """A workflow is the same kind when its package is installed."""
    package = tmp_path / "site-packages" / "shipped"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text(
        "from stent.registry import durable\n"
        "@durable\nasync def fetch(): ...\n"
        "async def helper(): await fetch()\n"
    )
    (package / "flow.py").write_text(
        "from stent.registry import durable\n"
        "from shipped.helpers import helper\n"
        "@durable\nasync def flow(): await helper()\n"
        "print(flow.kind)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", "import shipped.flow"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "workflow"
