"""Transactional activities: the user's SQL and the result commit together, once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

import stent
from stent import Result, Settings, Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

ran: list[str] = []


class Held:
    """Lets a test hold activities of this module."""

    reached: asyncio.Event
    let_go: asyncio.Event


@pytest.fixture(autouse=True)
async def _fresh(connection: Connection) -> None:
    ran.clear()
    Held.reached, Held.let_go = asyncio.Event(), asyncio.Event()
    await connection.execute(
        "create table book (item text);"
        "create table author (name text primary key);"
        "create table line (author text references author (name)"
        " deferrable initially deferred)"
    )


async def count(connection: Connection) -> int:
    found: int = await connection.fetchval("select count(*) from book")
    return found


@durable(retry=3, effects="transactional")
async def write(item: str, fail_first: bool = False) -> str:
    async with stent.transaction() as connection:
        await connection.execute("insert into book values ($1)", item)
    ran.append(item)
    if fail_first and len(ran) == 1:
        raise ConnectionError("after the insert")
    return f"wrote {item}"


@durable(retry=1)
async def write_detected(item: str) -> None:
    async with stent.transaction() as connection:
        await connection.execute("insert into book values ($1)", item)


async def insert_item(item: str) -> None:
    async with stent.transaction() as connection:
        await connection.execute("insert into book values ($1)", item)


@durable(retry=1)
async def write_by_helper(item: str) -> None:
    await insert_item(item)


@durable(retry=1, effects="transactional")
async def write_twice(item: str) -> bool:
    async with stent.transaction() as first:
        await first.execute("insert into book values ($1)", item)
    async with stent.transaction() as second:
        await second.execute("insert into book values ($1)", item)
    return first is second


@durable(retry=1, effects="transactional")
async def write_at_once(item: str) -> bool:
    async def enter() -> object:
        async with stent.transaction() as connection:
            return connection

    first, second = await asyncio.gather(enter(), enter())
    return first is second


@durable(retry=1, effects="transactional")
async def write_and_hold(item: str) -> str:
    async with stent.transaction() as connection:
        await connection.execute("insert into book values ($1)", item)
    Held.reached.set()
    await Held.let_go.wait()
    return item


@durable(retry=1, timeout="100ms", effects="transactional")
async def write_too_slowly(item: str) -> str:
    async with stent.transaction() as connection:
        await connection.execute("insert into book values ($1)", item)
    await asyncio.sleep(60)
    return item


@durable(retry=1, effects="transactional")
async def break_a_constraint(item: str) -> str:
    async with stent.transaction() as connection:
        await connection.execute("insert into line values ($1)", item)
    return item


@durable(retry=3, effects="transactional")
async def lose_the_connection(item: str) -> str:
    async with stent.transaction() as connection:
        await connection.execute("insert into book values ($1)", item)
        ran.append(item)
        if len(ran) == 1:
            pid = await connection.fetchval("select pg_backend_pid()")
            Held.reached.pid = pid  # type: ignore[attr-defined]
            Held.reached.set()
            await Held.let_go.wait()
    return item


@durable
async def write_in_workflow(item: str, fail_first: bool = False) -> str:
    return await write(item, fail_first)


@durable
async def give_up_waiting(item: str) -> str:
    try:
        async with asyncio.timeout(0.1):
            return await write_and_hold(item)
    except TimeoutError:
        return "gave up"


@durable
async def map_writes(items: list[str]) -> list[object]:
    found: list[Any] = await write.map(items, return_exceptions=True)
    return found


@pytest.mark.parametrize("function", [write, write_in_workflow])
async def test_commits_with_the_result(
    database_url: str, connection: Connection, function: object
) -> None:
    """Dispatched or called, the effect and the result are there together, once."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(function, "a"), "10s")  # type: ignore[arg-type]
    assert outcome == Result.Ok("wrote a")
    assert await count(connection) == 1


async def test_exception_rolls_back_and_the_retry_writes_once(
    database_url: str, connection: Connection
) -> None:
    """What a failed attempt wrote is gone."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(
            await app.dispatch(write_in_workflow, "a", True), "10s"
        )
    assert outcome == Result.Ok("wrote a")
    assert ran == ["a", "a"]
    assert await count(connection) == 1


@pytest.mark.parametrize("function", [write_detected, write_by_helper])
async def test_transactions_are_found_without_being_declared(
    database_url: str, connection: Connection, function: object
) -> None:
    """In the activity itself and in a helper that it calls."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(function, "a"), "10s")  # type: ignore[arg-type]
    assert outcome.is_ok(), outcome
    assert await count(connection) == 1


@pytest.mark.parametrize("function", [write_twice, write_at_once])
async def test_blocks_share_one_transaction(
    database_url: str, function: object
) -> None:
    """One attempt has one transaction, however often and from where it is entered."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(function, "a"), "10s")  # type: ignore[arg-type]
        assert outcome == Result.Ok(value=True)
        assert _slots_used(app) == 0


async def test_cancelled_call_rolls_back(
    database_url: str, connection: Connection
) -> None:
    """Giving up on it undoes it and frees its slot and its connection."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(give_up_waiting, "a"), "10s")
        assert outcome == Result.Ok("gave up")
        await _until(lambda: _slots_used(app) == 0)
        assert await count(connection) == 0
        assert (await app.wait_for(await app.dispatch(write, "b"), "10s")).is_ok()
    assert await count(connection) == 1


async def test_cancelled_execution_rolls_back(
    database_url: str, connection: Connection
) -> None:
    """A dispatched transactional activity that is cancelled leaves nothing."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(write_and_hold, "a")
        await Held.reached.wait()
        assert await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "10s")
        assert isinstance(outcome.error, stent.ExecutionCancelledError)
        await _until(lambda: _slots_used(app) == 0)
    assert await count(connection) == 0


async def test_timeout_rolls_back(database_url: str, connection: Connection) -> None:
    """So does an attempt that takes too long."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(write_too_slowly, "a"), "10s")
        assert isinstance(outcome.error, stent.ActivityTimeoutError)
        assert _slots_used(app) == 0
    assert await count(connection) == 0


async def test_constraint_broken_at_commit_fails_the_activity(
    database_url: str, connection: Connection
) -> None:
    """A deferred constraint is the activity's failure; the slot is free again."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(
            await app.dispatch(break_a_constraint, "nobody"), "10s"
        )
        assert "ForeignKeyViolationError" in type(outcome.error).__name__
        assert _slots_used(app) == 0
        assert await app.wait_for(await app.dispatch(write, "a"), "10s")
    assert await count(connection) == 1


async def test_activity_whose_task_is_gone_commits_nothing(
    database_url: str, connection: Connection
) -> None:
    """The delete of the task is the fence; a stale attempt frees its slot."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.dispatch(write_and_hold, "a")
        await Held.reached.wait()
        await connection.execute("update stent.tasks set epoch = epoch + 1")
        Held.let_go.set()
        await _until(lambda: _slots_used(app) == 0)
        assert await count(connection) == 0


async def test_connection_lost_before_commit_is_tried_again(
    database_url: str, connection: Connection
) -> None:
    """The writer finds out that nothing was committed, and the next attempt does."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(lose_the_connection, "a")
        await Held.reached.wait()
        pid = Held.reached.pid  # type: ignore[attr-defined]
        await connection.execute("select pg_terminate_backend($1)", pid)
        await _until_gone(connection, pid)
        Held.let_go.set()
        assert await app.wait_for(identifier, "10s") == Result.Ok("a")
    assert ran == ["a", "a"]
    assert await count(connection) == 1


async def test_each_item_of_a_map_has_its_transaction(
    database_url: str, connection: Connection
) -> None:
    """It commits with the item's result, once."""
    items = [f"item {number}" for number in range(5)]
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(map_writes, items), "10s")
    assert outcome.unwrap() == [f"wrote {item}" for item in items]
    assert await count(connection) == 5


async def test_more_transactions_than_connections(
    database_url: str, connection: Connection
) -> None:
    """They wait for one another; none is lost."""
    settings = replace(Settings(), transaction_pool_size=2)
    async with Stent.bootstrap(database_url, serve=True, settings=settings) as app:
        ids = await app.dispatch_many(write, [str(n) for n in range(30)])
        for identifier in ids:
            assert (await app.wait_for(identifier, "15s")).is_ok()
    assert await count(connection) == 30


async def test_cancel_at_any_moment_commits_both_or_neither(
    database_url: str, connection: Connection
) -> None:
    """The outcome and the row agree, whenever the cancellation comes."""
    settings = replace(Settings(), cancel_grace=timedelta(seconds=5))
    async with Stent.bootstrap(database_url, serve=True, settings=settings) as app:
        ids = []
        for number in range(40):
            ids.append(await app.dispatch(write_in_workflow, str(number)))
            for _ in range(number % 8):
                await asyncio.sleep(0)
            if number % 3:
                await app.cancel(ids[-1])
        outcomes = [await app.wait_for(i, "15s") for i in ids]
        await _until(lambda: _slots_used(app) == 0)
        written = await connection.fetch("select item from book")
        items = [row["item"] for row in written]
        assert len(items) == len(set(items))
        for number, outcome in enumerate(outcomes):
            if outcome.is_ok():
                assert str(number) in items
        for number in range(0, 40, 3):
            assert outcomes[number].is_ok()


def _slots_used(app: Stent) -> int:
    (worker,) = app._workers
    return worker.activities.used


async def _until(condition: object) -> None:
    while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - the state of others
        await asyncio.sleep(0.01)


async def _until_gone(connection: Connection, pid: int) -> None:
    sql = "select count(*) from pg_stat_activity where pid = $1"
    while await connection.fetchval(sql, pid):  # noqa: ASYNC110 - the state of others
        await asyncio.sleep(0.01)
