"""Children, activities that start executions, and what activities may not do."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

import stent
from stent import Result, Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

calls: list[Any] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    calls.clear()


@durable
async def leaf(x: int) -> int:
    return x + 1


@durable
async def middle(x: int) -> int:
    return await leaf(x) + await leaf(x)


@durable
async def top(x: int) -> int:
    first, second = await asyncio.gather(middle(x), middle(x + 1))
    return first + second


@durable
async def with_handles() -> list[int]:
    handles = [await middle.start(n) for n in range(3)]
    activity = await leaf.start(10)
    return [*[await h.result() for h in handles], await activity.result()]


@durable(retry=1)
async def explode() -> None:
    raise LookupError("inside")


@durable
async def failing_child() -> None:
    await explode()


@durable
async def catches_child() -> str:
    try:
        await failing_child()
    except LookupError as error:
        return f"caught {error}"
    return "?"


@durable
async def recurse(depth: int) -> int:
    return depth if depth == 0 else await recurse(depth - 1)


@durable(kind="activity", retry=stent.RetryPolicy(max_attempts=2, initial_delay="1ms"))
async def starts_others() -> list[str]:
    handles = [await leaf.start(n) for n in range(2)]
    calls.append([handle.id for handle in handles])
    if len(calls) == 1:
        raise ConnectionError("after starting")
    return [handle.id for handle in handles]


@durable
async def asks_for_others() -> list[str]:
    return await starts_others()


@durable(kind="activity")
async def calls_durable() -> int:
    calls.append(1)
    return await leaf(1)


@durable(kind="activity")
async def sleeps_durably() -> None:
    calls.append(1)
    await stent.sleep("1ms")


@durable
async def key_in_workflow() -> str:
    await leaf(1)
    return stent.idempotency_key()


def read_file(name: str) -> str:
    calls.append(name)
    return f"contents of {name}"


async def fetch_page(name: str) -> str:
    calls.append(name)
    await asyncio.sleep(0)
    return f"page {name}"


@durable
async def runs_functions() -> list[Any]:
    return [
        await stent.run(read_file, "a"),
        await stent.run(fetch_page, "b"),
        await stent.run(leaf, 1),
    ]


@durable
async def tells(name: str) -> int:
    stent.tell({"item": name})
    stent.tell({"item": name})
    return await tells_too(name)


@durable
async def tells_too(name: str) -> int:
    stent.tell(f"activity {name}")
    return 1


@durable
async def looks_around() -> dict[str, Any]:
    first = (stent.now(), stent.random().random(), stent.uuid())
    await stent.sleep("1ms")
    second = (stent.now(), stent.random().random(), stent.uuid())
    here = stent.current()
    return {
        "ordered": first[0] < second[0],
        "different": first[1] != second[1] and first[2] != second[2],
        "kind": here.kind.value,
        "root": here.root_id == here.execution_id,
    }


@durable
def in_thread(x: int) -> tuple[int, bool]:
    return x, threading.current_thread() is threading.main_thread()


@durable
async def uses_thread() -> tuple[int, bool]:
    return await in_thread(3)


class Catalog:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    @durable
    async def lookup(self, name: str) -> str:
        return f"{self.prefix}{name}"

    @staticmethod
    @durable
    async def upper(name: str) -> str:
        return name.upper()

    @durable
    @classmethod
    async def describe(cls, name: str) -> str:
        return f"{cls.__name__}.{name}"


@durable
async def uses_methods() -> list[str]:
    return [
        await shop.lookup("x"),
        await Catalog.upper("y"),
        await Catalog.describe("z"),  # type: ignore[call-arg, arg-type]
    ]


shop = Catalog("shop/")
durable.register("shop", shop)


async def run(database_url: str, function: Any, *args: Any) -> Any:
    async with Stent.bootstrap(database_url, serve=True) as app:
        return await app.wait_for(await app.dispatch(function, *args), "15s")


@pytest.mark.parametrize(
    ("function", "args", "value"),
    [
        (top, (1,), 10),
        (with_handles, (), [2, 4, 6, 11]),
        (catches_child, (), "caught inside"),
        (recurse, (20,), 0),
        (uses_thread, (), (3, False)),
        (uses_methods, (), ["shop/x", "Y", "Catalog.z"]),
        (runs_functions, (), ["contents of a", "page b", 2]),
        (
            looks_around,
            (),
            {"ordered": True, "different": True, "kind": "workflow", "root": True},
        ),
    ],
)
async def test_programs(
    database_url: str, function: Any, args: tuple[Any, ...], value: Any
) -> None:
    """Nested children, handles, failures, recursion, threads, methods, stent.run."""
    assert await run(database_url, function, *args) == Result.Ok(value)


async def test_recursion_has_a_limit(database_url: str, connection: Connection) -> None:
    """The 65th level is the caller's mistake."""
    outcome = await run(database_url, recurse, 100)
    assert isinstance(outcome.error, stent.UsageError)
    assert "64" in str(outcome.error)
    assert await connection.fetchval("select max(depth) from stent.executions") == 64


@pytest.mark.parametrize("function", [starts_others, asks_for_others])
async def test_executions_started_by_an_activity_are_the_same_on_every_attempt(
    database_url: str, connection: Connection, function: Any
) -> None:
    """Their ids derive from the idempotency key."""
    outcome = await run(database_url, function)
    assert calls[0] == calls[1] == outcome.unwrap()
    found = await connection.fetchval(
        "select count(*) from stent.executions where function like '%leaf'"
    )
    assert found == 2


@pytest.mark.parametrize("function", [calls_durable, sleeps_durably])
async def test_durable_call_in_an_activity(database_url: str, function: Any) -> None:
    """A UsageError that names the fix, not retried."""
    outcome = await run(database_url, function)
    assert isinstance(outcome.error, stent.UsageError)
    assert "workflow" in str(outcome.error)
    assert calls == [1]


async def test_idempotency_key_belongs_to_activities(database_url: str) -> None:
    """In a workflow it is a UsageError."""
    outcome = await run(database_url, key_in_workflow)
    assert isinstance(outcome.error, stent.UsageError)


async def test_told_values_are_kept_in_order(
    database_url: str, connection: Connection
) -> None:
    """Each once, from workflow and activity."""
    await run(database_url, tells, "a")
    rows = await connection.fetch(
        "select stent.plain(payload) as value from stent.tells"
    )
    assert sorted(row["value"] for row in rows) == [
        '"activity a"',
        '{"item":"a"}',
        '{"item":"a"}',
    ]
