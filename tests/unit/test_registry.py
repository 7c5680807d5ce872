"""Durable functions: names, options, methods, plain calls."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import stent.registry
from stent import context
from stent.codec import decode
from stent.errors import (
    ConfigurationError,
    DuplicateNameError,
    DurationError,
    UsageError,
)
from stent.model import Kind
from stent.registry import (
    NOT_YET,
    DurableFunction,
    Options,
    catalogue,
    durable,
    durable_name,
)
from stent.retry import RetryPolicy
from tests.factories import outcome_of

ROOT = Path(stent.registry.__file__).parent.parent


@durable(name="registry.twice")
async def twice(value: int) -> int:
    return value * 2


@durable(name="registry.half")
def half(value: int) -> float:
    return value / 2


@durable(name="registry.fails")
async def fails(value: int) -> int:
    raise LookupError(value)


def run_script(path: Path, *arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, *arguments],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()


def test_names_are_module_and_qualname() -> None:
    """Unless one is given."""

    @durable
    async def local() -> None: ...

    assert local.name == f"{__name__}.{local.function.__qualname__}"
    assert catalogue.find(local.name) is local
    assert twice.name == "registry.twice"
    assert local.name in catalogue.names()


def test_main_has_the_name_that_importers_use(tmp_path: Path) -> None:
    """A script, ``python -m`` and an import agree."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = (
        "from stent.registry import durable\n"
        "@durable\nasync def order(): ...\n"
        "print(order.name)\n"
    )
    (package / "flow.py").write_text(code)
    (tmp_path / "script.py").write_text(code)
    assert run_script(tmp_path, "script.py") == "script.order"
    assert run_script(tmp_path, "-c", "import script") == "script.order"
    assert run_script(tmp_path, "-m", "shop.flow") == "shop.flow.order"
    assert run_script(tmp_path, "-c", "import shop.flow") == "shop.flow.order"


def test_a_script_may_import_itself(tmp_path: Path) -> None:
    """The same file under two module names is the same place."""
    (tmp_path / "script.py").write_text(
        "from stent.registry import catalogue, durable\n"
        "@durable\nasync def order(): ...\n"
        "if __name__ == '__main__':\n"
        "    import script\n"
        "    print(catalogue.names())\n"
    )
    assert run_script(tmp_path, "script.py") == "['script.order']"


def test_another_place_may_not_take_a_name() -> None:
    """The message names both places and the fix."""

    async def other(value: int) -> int:
        return value

    with pytest.raises(DuplicateNameError, match=r"registry\.twice.*name="):
        durable(name="registry.twice")(other)
    assert catalogue.find("registry.twice") is twice


def test_the_same_place_replaces() -> None:
    """A module that is reloaded gives the new code."""

    def define(value: int) -> DurableFunction[[], Any]:
        @durable(name="registry.reloaded")
        async def flow() -> int:
            return value

        return flow

    first, second = define(1), define(2)
    assert catalogue.find("registry.reloaded") is second is not first


@pytest.mark.parametrize("name", ["", "with space", "x" * 201, "tab\t", "new\nline"])
def test_odd_names_are_refused(name: str) -> None:
    """Names are stored, logged and typed on command lines."""
    with pytest.raises(ConfigurationError):
        durable(name=name or " ")(lambda: None)


@pytest.mark.parametrize("option", sorted(NOT_YET))
def test_options_of_later_releases_are_refused(option: str) -> None:
    """Nothing is accepted and ignored."""
    with pytest.raises(ConfigurationError, match=f"{option}= is not available"):
        durable(**_options(option))
    with pytest.raises(ConfigurationError, match=f"{option}= is not available"):
        twice.options(**_options(option))


def _options(name: str) -> dict[str, Any]:
    return {name: 1}


def test_a_pool_is_for_plain_functions_of_modules() -> None:
    """Where it would be ignored, or could not work, it is refused."""

    async def waits() -> None:
        """On the loop."""

    def local() -> None:
        """No process finds it."""

    with pytest.raises(ConfigurationError, match="waits is async def"):
        durable(pool="process")(waits)
    with pytest.raises(ConfigurationError, match="waits is async def"):
        durable(pool="thread")(waits)
    with pytest.raises(ConfigurationError, match="inside a function"):
        durable(pool="process")(local)
    with pytest.raises(ConfigurationError, match="belongs to activities"):
        durable(pool="thread", kind="workflow")(local)
    with pytest.raises(ConfigurationError, match="transactional"):
        durable(pool="process", effects="transactional")(local)
    with pytest.raises(ConfigurationError, match="one of: thread, process"):
        durable(pool="gpu")
    with pytest.raises(ConfigurationError, match="unknown option 'pool'"):
        twice.options(pool="process")
    assert not durable(pool="thread")(local).in_process


def test_at_most_once_is_refused() -> None:
    """It needs an engine part that is not there."""
    with pytest.raises(ConfigurationError, match="at_most_once"):
        durable(effects="at_most_once")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": 3}, "queue"),
        ({"queue": "a b"}, "queue"),
        ({"queue": "nul\0"}, "queue"),
        ({"priority": "high"}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 40_000}, "priority"),
        ({"tags": "one"}, "tags"),
        ({"tags": [1]}, "tags"),
        ({"tags": [None]}, "tags"),
        ({"tags": [str(i) for i in range(33)]}, "tags"),
        ({"retry": "often"}, "retry"),
        ({"retry": 0}, "attempts"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": []}, "timeout"),
        ({"max_duration": -1}, "max_duration"),
        ({"effects": "sometimes"}, "effects"),
        ({"delay": "1s"}, "unknown option 'delay'"),
        ({"colour": "red"}, "unknown option 'colour'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """With the option's name, whatever the type of its value."""
    with pytest.raises((ConfigurationError, DurationError), match=message):
        durable(**options)(_nothing)


async def _nothing() -> None: ...


def test_options_are_read_as_users_write_them() -> None:
    """Durations as texts, attempts as numbers, tags as any list."""
    made = durable(
        name="registry.options",
        queue="fast",
        priority=7,
        tags=["a", "b"],
        retry=5,
        timeout="1m30s",
        max_duration=timedelta(hours=1),
        effects="transactional",
    )(_nothing)
    settings = made.settings
    assert settings.queue == "fast"
    assert settings.priority == 7
    assert settings.tags == ("a", "b")
    assert settings.retry.max_attempts == 5
    assert settings.timeout == timedelta(seconds=90)
    assert settings.max_duration == timedelta(hours=1)
    assert durable(name="registry.no_timeout", timeout=None)(_nothing).settings == (
        Options()
    )


def test_overrides_change_the_view_only() -> None:
    """``options`` leaves the function as it was."""
    view = twice.options(queue="slow", retry=RetryPolicy(max_attempts=9))
    assert view.settings.queue == "slow"
    assert twice.settings.queue == "default"
    assert view.name == twice.name
    with pytest.raises(ConfigurationError, match="unknown option 'effects'"):
        twice.options(effects="transactional")


@pytest.mark.parametrize("option", stent.registry.DISPATCH_OPTIONS)
def test_parameters_named_like_options_are_refused(option: str) -> None:
    """``dispatch(f, queue=...)`` could not tell which is meant."""
    found: dict[str, Any] = {}
    exec(f"async def flow(*, {option}=None): ...", found)
    with pytest.raises(UsageError, match=f"'{option}' is named like an option"):
        durable(found["flow"])


def test_only_functions_are_durable() -> None:
    """Classes, instances, builtins, partials, generators and durables are not."""

    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    for wrong in (int, len, object(), functools.partial(_nothing)):
        with pytest.raises(UsageError, match="takes a function"):
            durable(wrong)  # type: ignore[call-overload]
    for endless in (generator, async_generator):
        with pytest.raises(UsageError, match="is a generator"):
            durable(endless)
    with pytest.raises(UsageError, match="already durable"):
        durable(twice)
    with pytest.raises(UsageError, match="already durable"):
        durable(staticmethod(twice))


async def test_without_an_app_calls_are_plain() -> None:
    """Units are tested without anything."""
    assert await twice(2) == 4
    assert await half(3) == 1.5
    assert await twice.map([1, 2]) == [2, 4]
    assert await twice.starmap([(1,), (2,)]) == [2, 4]
    assert await context.map(twice, [1]) == [2]
    assert await context.starmap(twice, [(1,)]) == [2]
    found: list[Any] = await fails.map([1], return_exceptions=True)
    assert isinstance(found[0], LookupError)
    with pytest.raises(LookupError):
        await fails.map([1])
    with pytest.raises(UsageError, match="needs an app"):
        await twice.start(1)
    assert await context.run(len, "abc") == 3
    await context.run(_nothing)
    await context.sleep(0)
    context.tell("nobody")
    with pytest.raises(UsageError, match="inside a durable function"):
        context.current()


def test_maps_need_durable_functions_and_sizes() -> None:
    """Mistakes are named where they are made."""
    wrong: Any = len
    with pytest.raises(UsageError, match="decorate it"):
        _ = context.map(wrong, [1])
    for chunk in (0, -1, True, "some", 1.5):
        with pytest.raises(ConfigurationError, match="chunk"):
            _ = twice.map([1], chunk=chunk)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="concurrency"):
        _ = context.map(twice, [1], concurrency=0)


def wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def async_wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args)

    return wrapper


def test_decorated_functions_keep_their_nature() -> None:
    """A coroutine function on either side of a wrapper runs on the loop."""

    async def inner() -> None: ...

    def plain() -> None: ...

    assert durable(name="registry.wrapped_1")(wrapping(inner)).is_async
    assert durable(name="registry.wrapped_2")(async_wrapping(plain)).is_async
    assert not durable(name="registry.wrapped_3")(wrapping(plain)).is_async


class Shop:
    borrowed = twice

    @durable(name="registry.Shop.static")
    @staticmethod
    async def static(value: int) -> int:
        return value + 1

    @staticmethod
    @durable(name="registry.Shop.static_outside")
    async def static_outside(value: int) -> int:
        return value + 2

    @durable(name="registry.Shop.of_class")
    @classmethod
    async def of_class(cls, value: int) -> str:
        return f"{cls.__name__} {value}"

    @durable(name="registry.Shop.method")
    async def method(self, value: int) -> int:
        return value + self.offset

    @durable(name="registry.Shop.flow")
    async def flow(self, value: int) -> list[int]:
        return [await self.method(value), await self.static(value)]

    def __init__(self, offset: int) -> None:
        self.offset = offset


async def test_methods_are_called_as_methods() -> None:
    """Static, class and instance methods, through class and instance."""
    shop = Shop(10)
    assert await Shop.static(1) == await shop.static(1) == 2
    assert await Shop.static_outside(1) == await shop.static_outside(1) == 3
    of_class: Any = Shop.of_class
    assert await of_class(1) == await shop.of_class(1) == "Shop 1"
    assert await shop.method(1) == 11
    assert Shop.flow.kind is Kind.WORKFLOW
    assert Shop.method.kind is Kind.ACTIVITY


async def test_a_function_kept_in_a_class_is_no_method() -> None:
    """It is called without the instance, and stays usable elsewhere."""
    assert await Shop(0).borrowed(2) == 4
    assert twice.needs_instance is False


def test_methods_run_once_their_instance_is_registered() -> None:
    """The instance is never encoded; its name stands for it."""
    shop = Shop(100)
    flow: Any = shop.flow

    @durable(name="registry.unbound")
    async def unbound() -> int:
        return await shop.method(1)

    failed = outcome_of(unbound).recorded
    assert b"register its instance" in failed.payload
    assert Shop.method.positional == (2, 2)
    durable.register("main", shop)
    assert "registry.Shop.method@main" in catalogue.names()
    assert "registry.Shop.method" not in catalogue.names()
    assert shop.method.positional == (1, 1)
    flow = catalogue.find("registry.Shop.flow@main")
    assert flow is not None
    assert decode(outcome_of(flow, 1).recorded.payload) == [101, 2]
    assert shop.method.options(queue="x").name == "registry.Shop.method@main"


def test_the_name_of_a_function_is_computed_alike() -> None:
    """``durable_name`` is what undecorated functions would get."""
    assert durable_name(run_script) == f"{__name__}.run_script"


def test_return_annotations_are_resolved_late() -> None:
    """Names that do not resolve mean no annotation, not a failure."""

    async def odd() -> Missing:  # type: ignore[name-defined]  # noqa: F821
        ...

    assert twice.return_annotation is int
    assert durable(name="registry.odd")(odd).return_annotation is Any


def test_the_code_digest_follows_the_file(tmp_path: Path) -> None:
    """Equal sources have equal digests, edited ones do not."""
    code = (
        "from stent.registry import durable\n"
        "@durable\nasync def order(): ...\n"
        "print(order.code_digest)\n"
    )
    digests = []
    for extra in ("", "", "# edited\n"):
        (tmp_path / "script.py").write_text(code + extra)
        digests.append(run_script(tmp_path, "script.py"))
    assert digests[0] == digests[1] != digests[2]
