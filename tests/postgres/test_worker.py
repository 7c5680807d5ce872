"""Several workers on one database: hints, hand-over, unknown names, other code."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

import stent
from stent import Result, Stent, durable
from stent.registry import catalogue

if TYPE_CHECKING:
    from asyncpg import Connection

ran: list[Any] = []


class Gate:
    """Lets a test hold activities of this module."""

    reached: asyncio.Event
    let_go: asyncio.Event


@pytest.fixture(autouse=True)
async def _fresh() -> None:
    ran.clear()
    Gate.reached, Gate.let_go = asyncio.Event(), asyncio.Event()


@durable
async def step(x: int) -> int:
    ran.append(x)
    await asyncio.sleep(0)
    return x


@durable
async def special(x: int) -> int:
    return x * 10


@durable
async def hold(x: int) -> int:
    ran.append(x)
    Gate.reached.set()
    await Gate.let_go.wait()
    return x


@durable
async def fan(count: int) -> int:
    return sum(await asyncio.gather(*[step(n) for n in range(count)]))


@durable
async def nested(depth: int) -> int:
    return await step(0) if depth == 0 else await nested(depth - 1) + await step(depth)


@durable
async def remote(x: int) -> int:
    return await special.options(queue="special")(x)


@durable
async def hold_then_step() -> int:
    first = await hold(1)
    return first + await step(2)


@durable
async def napping(pause: str) -> int:
    before = await step(1)
    await stent.sleep(pause)
    return before + await step(2)


@durable
async def bad_name() -> int:
    async def inner() -> int:
        return await step(1)

    return await asyncio.create_task(inner(), name="a\ud800\0b")


async def test_results_come_from_other_workers(
    database_url: str, connection: Connection
) -> None:
    """A call in a queue served elsewhere comes back through the inbox."""
    async with (
        Stent.bootstrap(database_url, serve=True) as app,
        Stent.bootstrap(database_url, serve=True, queues=["special"]),
    ):
        ids = await app.dispatch_many(remote, range(20))
        outcomes = [await app.wait_for(i, "10s") for i in ids]
    assert [o.unwrap() for o in outcomes] == [10 * n for n in range(20)]
    assert await connection.fetchval("select count(*) from stent.inbox") == 0


async def test_two_workers_share_a_fan_out(
    database_url: str, connection: Connection
) -> None:
    """Every call runs once, wherever it runs."""
    async with (
        Stent.bootstrap(database_url, serve=True, max_concurrency=3) as app,
        Stent.bootstrap(database_url, serve=True, max_concurrency=3),
    ):
        outcome = await app.wait_for(await app.dispatch(fan, 300), "15s")
    assert outcome == Result.Ok(sum(range(300)))
    assert sorted(ran) == list(range(300))
    assert await connection.fetchval("select count(*) from stent.tasks") == 0


async def test_one_slot_is_enough_for_nesting(database_url: str) -> None:
    """What waits holds no slot."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=1) as app:
        outcome = await app.wait_for(await app.dispatch(nested, 6), "15s")
        assert outcome == Result.Ok(21)
        fans = [await app.dispatch(fan, 5) for _ in range(5)]
        for identifier in fans:
            assert await app.wait_for(identifier, "15s") == Result.Ok(10)


async def test_lost_hints_only_cost_time(
    database_url: str, connection: Connection
) -> None:
    """With every listening connection gone, polling finds the work."""
    async with (
        Stent.bootstrap(database_url, serve=True, queues=["special"]),
        Stent.bootstrap(database_url, serve=True) as app,
    ):
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like '%listener%'"
        )
        assert await app.wait_for(await app.dispatch(remote, 4), "10s") == Result.Ok(40)


@pytest.mark.parametrize("which", ["writer", "claimer", "lease", "client"])
async def test_lost_connections_come_back(
    database_url: str, connection: Connection, which: str
) -> None:
    """No work is lost and none runs twice when one of them is cut."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(hold_then_step)
        await Gate.reached.wait()
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database()"
            f" and application_name = 'stent {which}'"
        )
        Gate.let_go.set()
        assert await app.wait_for(identifier, "10s") == Result.Ok(3)
    assert ran == [1, 2]


async def test_unknown_name_waits_for_a_worker_that_knows_it(
    database_url: str, connection: Connection
) -> None:
    """It stays queued, as does an unknown name in general."""
    known = catalogue._functions.pop(step.name)
    try:
        async with Stent.bootstrap(database_url, serve=True) as app:
            identifier = await app.dispatch(known, 7)
            assert await special(1) == 10
            assert await _status(connection, identifier) == "pending"
            catalogue._functions[known.name] = known
            assert await app.wait_for(identifier, "10s") == Result.Ok(7)
    finally:
        catalogue._functions[known.name] = known


async def test_stored_path_is_not_a_function(
    database_url: str, connection: Connection
) -> None:
    """A row that names something importable runs nothing."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(step, 1, delay="1h")
        await connection.execute(
            "update stent.executions set function = 'os.system', wake_at = now()"
        )
        assert await special(1) == 10
        assert await _status(connection, identifier) == "pending"


async def test_drain_hands_over_and_runs_nothing_twice(database_url: str) -> None:
    """The inline activity ends where it is; the workflow goes on elsewhere."""
    first = await Stent.bootstrap(database_url, serve=True)
    identifier = await first.dispatch(hold_then_step)
    await Gate.reached.wait()
    async with Stent.bootstrap(database_url, serve=True) as second:
        draining = asyncio.ensure_future(first.close())
        for _ in range(20):
            await special(1)
        Gate.let_go.set()
        await draining
        assert await second.wait_for(identifier, "10s") == Result.Ok(3)
    assert ran == [1, 2]


async def test_drain_frees_what_sleeps(database_url: str) -> None:
    """Its timer is kept by whoever takes it."""
    async with Stent.bootstrap(database_url, serve=True) as first:
        identifier = await first.dispatch(napping, "600ms")
        while not ran:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
    async with Stent.bootstrap(database_url, serve=True) as second:
        assert await second.wait_for(identifier, "10s") == Result.Ok(3)
    assert ran == [1, 2]


async def test_other_code_blocks_and_is_released(
    database_url: str, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A diverging replay parks the execution; other code may try once; waiters wait."""
    async with Stent.bootstrap(database_url, serve=True) as first:
        identifier = await first.dispatch(napping, "300ms")
        while not ran:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
        # The journal knows the result; a turn makes the address certain.
        while not await connection.fetchval("select count(*) from stent.journal"):  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
    code = napping.function
    try:
        napping.function = _other_napping
        caplog.set_level(logging.WARNING)
        async with Stent.bootstrap(database_url, serve=True) as second:
            waiting = asyncio.ensure_future(second.wait_for(identifier))
            while await _status(connection, identifier) != "blocked":  # noqa: ASYNC110 - the state of others
                await asyncio.sleep(0.01)
            assert not waiting.done()
            epoch = await _epoch(connection, identifier)
            await special(1)
            second._workers.copy().popitem()[0].claimer.hint()
            await special(2)
            assert await _epoch(connection, identifier) == epoch
            reason = await connection.fetchval(
                "select blocked_reason from stent.executions where execution_id = $1",
                UUID(identifier),
            )
            assert "diverged" in reason
            napping.function, digest = code, napping.code_digest
            napping.code_digest = "repaired"
            try:
                assert await waiting == Result.Ok(3)
            finally:
                napping.code_digest = digest
    finally:
        napping.function = code
    assert ran == [1, 2]


async def _other_napping(pause: str) -> int:
    other = await special(1)
    await stent.sleep(pause)
    return other


async def test_blocked_execution_can_be_cancelled(
    database_url: str, connection: Connection
) -> None:
    """There is no code that could clean up, so it ends at once."""
    async with Stent.bootstrap(database_url, serve=True) as first:
        identifier = await first.dispatch(napping, "1h")
        while not await connection.fetchval("select count(*) from stent.journal"):  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
    code = napping.function
    try:
        napping.function = _other_napping
        async with Stent.bootstrap(database_url, serve=True) as second:
            while await _status(connection, identifier) != "blocked":  # noqa: ASYNC110 - the state of others
                await asyncio.sleep(0.01)
            assert await second.cancel(identifier)
            outcome = await second.wait_for(identifier, "10s")
            assert isinstance(outcome.error, stent.ExecutionCancelledError)
    finally:
        napping.function = code


async def test_name_that_the_database_refuses_harms_nobody_else(
    database_url: str, connection: Connection
) -> None:
    """A task name with a NUL or a lone surrogate is its execution's own problem."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(bad_name)
        outcomes = [await app.wait_for(await app.dispatch(step, n)) for n in range(5)]
        assert all(outcome.is_ok() for outcome in outcomes)
        while await _status(connection, identifier) == "running":  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
        assert await special(1) == 10


async def test_closing_leaves_no_connection(
    database_url: str, connection: Connection
) -> None:
    """Whatever was going on."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.dispatch(napping, "1h")
        await app.wait_for(await app.dispatch(fan, 20), "10s")
    sql = (
        "select count(*) from pg_stat_activity"
        " where datname = current_database() and application_name like 'stent%'"
    )
    while await connection.fetchval(sql):  # noqa: ASYNC110 - the state of others
        await asyncio.sleep(0.01)


async def test_a_worker_has_four_connections(
    database_url: str, connection: Connection
) -> None:
    """That of the app that serves is closed before."""
    sql = (
        "select application_name from pg_stat_activity"
        " where datname = current_database()"
    )
    async with Stent(database_url) as app, Stent(database_url) as server:
        serving = asyncio.create_task(server.serve())
        await app.wait_for(await app.dispatch(fan, 20), "10s")
        rows = await connection.fetch(sql)
        serving.cancel()
        await asyncio.wait([serving])
    names = [row[0] for row in rows if row[0].startswith("stent")]
    own = {"stent client", "stent client listener"}
    assert sorted(name for name in names if name in own) == sorted(own)
    assert len([name for name in names if name not in own]) == 4


async def _status(connection: Connection, execution_id: str) -> str:
    sql = "select status from stent.executions where execution_id = $1"
    status: str = await connection.fetchval(sql, UUID(execution_id))
    return status


async def _epoch(connection: Connection, execution_id: str) -> int:
    sql = "select epoch from stent.executions where execution_id = $1"
    epoch: int = await connection.fetchval(sql, UUID(execution_id))
    return epoch
