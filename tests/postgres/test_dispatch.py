"""Dispatch: its options, its keys, its limits, and who gets the work."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

import stent
from stent import Result, Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

order: list[int] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    order.clear()


@durable
async def double(x: int) -> int:
    return 2 * x


@durable
async def add(x: int, y: int = 1) -> int:
    return x + y


@durable
async def in_order(number: int) -> int:
    order.append(number)
    return number


@durable
async def where() -> dict[str, Any]:
    now = stent.current()
    return {"id": now.execution_id, "tags": list(now.tags), "attempt": now.attempt}


@durable(effects="transactional")
async def where_in_transaction() -> dict[str, Any]:
    async with stent.transaction() as connection:
        sql = "select queue, priority from stent.tasks where execution_id = $1"
        row = await connection.fetchrow(sql, UUID(stent.current().execution_id))
    return dict(row)


@durable(retry=1, effects="transactional")
async def fails_twice() -> int:
    order.append(1)
    async with stent.transaction() as connection:
        await connection.execute("select 1")
    if len(order) < 3:
        raise ConnectionError("not yet")
    return len(order)


@durable
async def forever() -> None:
    await stent.sleep("10h")


def plain(x: int) -> int:
    return x


async def test_options_go_to_dispatch_and_the_rest_to_the_function(
    database_url: str, connection: Connection
) -> None:
    """The six options are stored with the execution; other keywords are arguments."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(
            add, 1, y=5, tags=["a", "b"], priority=7, max_duration="2h", queue="default"
        )
        assert await app.wait_for(identifier, "10s") == Result.Ok(6)
    row = await connection.fetchrow("select * from stent.executions")
    assert (row["tags"], row["priority"], row["queue"]) == (["a", "b"], 7, "default")
    assert row["deadline_at"] - row["created_at"] >= timedelta(hours=1.9)


async def test_delay_is_database_time(
    database_url: str, connection: Connection
) -> None:
    """It does not start before its delay is over."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(double, 2, delay="300ms")
        assert await app.wait_for(identifier, "10s") == Result.Ok(4)
    row = await connection.fetchrow("select * from stent.executions")
    assert row["started_at"] - row["created_at"] >= timedelta(milliseconds=290)


async def test_same_key_and_arguments_give_the_same_id(database_url: str) -> None:
    """Whoever dispatches again gets the first execution, finished or not."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        first = await app.dispatch(double, 1, dispatch_key="k")
        await app.wait_for(first, "10s")
        assert await app.dispatch(double, 1, dispatch_key="k") == first
        with pytest.raises(stent.IdempotencyConflictError, match="'k'"):
            await app.dispatch(double, 2, dispatch_key="k")
        with pytest.raises(stent.IdempotencyConflictError):
            await app.dispatch(in_order, 1, dispatch_key="k")


async def test_fifty_racers_of_one_key(
    database_url: str, connection: Connection
) -> None:
    """From several processes' worth of apps: one execution, one id."""
    async with Stent(database_url) as one, Stent(database_url) as two:
        ids = await asyncio.gather(
            *[
                app.dispatch(double, 1, dispatch_key="race")
                for _ in range(25)
                for app in (one, two)
            ]
        )
    assert len(set(ids)) == 1
    assert await connection.fetchval("select count(*) from stent.executions") == 1


async def test_refused_dispatch_fails_alone(database_url: str) -> None:
    """Those that share its transaction are not disturbed."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcomes = await asyncio.gather(
            app.dispatch(double, 1),
            app.dispatch(double, 2, dispatch_key="x" * 10_000_000),
            app.dispatch(double, 3, tags=["\ud800"]),
            app.dispatch(double, 4),
            return_exceptions=True,
        )
        assert [isinstance(o, Exception) for o in outcomes] == [
            False,
            True,
            True,
            False,
        ]
        for identifier in (outcomes[0], outcomes[3]):
            assert (await app.wait_for(str(identifier), "10s")).is_ok()


async def test_dispatch_many(database_url: str) -> None:
    """One execution per item, ids in the order of the items, in batches."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        ids = await app.dispatch_many(double, range(2500), tags=["many"])
        outcomes = [await app.wait_for(i, "15s") for i in ids]
        assert [o.unwrap() for o in outcomes] == [2 * n for n in range(2500)]
        starred = await app.dispatch_many(add, [(1, 2), (3, 4)], star=True)
        assert [(await app.wait_for(i, "10s")).unwrap() for i in starred] == [3, 7]


async def test_one_after_the_other_is_waited_for(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hint comes for what has ended long ago: then it is looked at at once."""
    async with Stent(database_url) as app:
        ids = await app.dispatch_many(double, range(5))
        async with Stent.bootstrap(database_url, serve=True) as other:
            for identifier in ids:
                await other.wait_for(identifier, "10s")
        await app.wait_for(ids[0], "10s")
        monkeypatch.setattr("stent.outcomes.FIRST_LOOK_SECONDS", 3600)
        monkeypatch.setattr("stent.outcomes.HINTED_POLL_SECONDS", 3600)
        outcomes = [await app.wait_for(i, "10s") for i in ids]
        assert [outcome.unwrap() for outcome in outcomes] == [0, 2, 4, 6, 8]


async def test_higher_priority_runs_first(database_url: str) -> None:
    """Of what waits; one that finds a free slot may overtake its equals."""
    priorities = [0, 5, -5, 5, 0]
    async with Stent(database_url) as app:
        ids = [
            await app.dispatch(in_order, n, priority=p)
            for n, p in enumerate(priorities)
        ]
        async with Stent.bootstrap(database_url, serve=True, max_concurrency=1):
            for identifier in ids:
                await app.wait_for(identifier, "10s")
    assert [priorities[number] for number in order] == [5, 5, 0, 0, -5]


async def test_free_slot_goes_to_the_most_urgent(database_url: str) -> None:
    """A call that finds it free does not overtake those that are on their way."""
    priorities = list(range(150))
    async with Stent(database_url) as app:
        ids = [await app.dispatch(in_order, n, priority=n) for n in priorities]
        async with Stent.bootstrap(database_url, serve=True, max_concurrency=1):
            for identifier in ids:
                await app.wait_for(identifier, "10s")
    assert order == priorities[::-1]


async def test_queue_that_nobody_serves_waits(database_url: str) -> None:
    """A worker takes only from its queues; what it takes stays in that queue."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        waiting = await app.dispatch(where_in_transaction, queue="special", priority=3)
        await app.wait_for(await app.dispatch(double, 1), "10s")
        with pytest.raises(stent.ExecutionNotFinishedError):
            await app.result_of(waiting)
        async with Stent.bootstrap(database_url, serve=True, queues=["special"]):
            outcome = await app.wait_for(waiting, "10s")
    assert outcome == Result.Ok({"queue": "special", "priority": 3})


async def test_options_of_a_dispatched_activity_hold(database_url: str) -> None:
    """They reach its task, not only attempts beside its execution."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        handle = await fails_twice.options(
            retry=stent.RetryPolicy(max_attempts=5, initial_delay="1ms")
        ).start()
        assert (await app.wait_for(handle.id, "10s")) == Result.Ok(3)


async def test_current_knows_the_execution(database_url: str) -> None:
    """Id and tags are those of the dispatch."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(where, tags=["t"])
        outcome = await app.wait_for(identifier, "10s")
    assert outcome.unwrap() == {"id": identifier, "tags": ["t"], "attempt": 1}


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error"),
    [
        (plain, (1,), {}, stent.UsageError),
        (double, (), {}, TypeError),
        (double, (1, 2), {}, TypeError),
        (double, (1,), {"z": 1}, TypeError),
        (double, (1,), {"queue": "no spaces"}, stent.ConfigurationError),
        (double, (1,), {"queue": "a'; drop table stent.tasks"}, stent.StentError),
        (double, (1,), {"priority": 100_000}, stent.ConfigurationError),
        (double, (1,), {"priority": "high"}, stent.ConfigurationError),
        (double, (1,), {"tags": "one"}, stent.ConfigurationError),
        (double, (1,), {"tags": ["a\0b"]}, stent.ConfigurationError),
        (double, (1,), {"dispatch_key": ""}, stent.ConfigurationError),
        (double, (1,), {"max_duration": "soon"}, stent.DurationError),
        (double, (1,), {"delay": -1}, stent.DurationError),
        (double, ("x" * 3_000_000,), {}, stent.PayloadError),
    ],
)
async def test_wrong_dispatches_are_refused(
    database_url: str,
    connection: Connection,
    function: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
) -> None:
    """With an error of the caller's, before any row."""
    async with Stent(database_url) as app:
        with pytest.raises(error):
            await app.dispatch(function, *arguments, **options)
    assert await connection.fetchval("select count(*) from stent.executions") == 0


async def test_pending_longer_than_max_duration_times_out(database_url: str) -> None:
    """Also what no worker takes ends."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(double, 1, queue="nobody", max_duration="100ms")
        outcome = await app.wait_for(identifier, "10s")
    assert isinstance(outcome.error, stent.ExecutionTimedOutError)


async def test_running_longer_than_max_duration_times_out(database_url: str) -> None:
    """A workflow that sleeps is woken for it."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(forever, max_duration="200ms")
        outcome = await app.wait_for(identifier, "10s")
        other = await forever.options(max_duration=0.2).start()
        same = await app.wait_for(other.id, "10s")
    assert isinstance(outcome.error, stent.ExecutionTimedOutError)
    assert isinstance(same.error, stent.ExecutionTimedOutError)


async def test_dispatch_before_opening_is_a_usage_error() -> None:
    """It says how to open the app."""
    app = Stent("postgresql://nobody@localhost/none")
    with pytest.raises(stent.UsageError, match="async with"):
        await app.dispatch(double, 1)
