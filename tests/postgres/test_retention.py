"""What finished long ago is deleted: whole trees, in batches, and never half."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

import stent
from stent import ExecutionNotFoundError, Settings, Stent, durable
from stent.clock import new_execution_id
from stent.services.retention import Pruned, prune
from stent.store.session import Session
from stent.store.store import NIL, Store

NOW = timedelta(0)
TABLES = (
    *("executions", "payloads", "results", "journal", "segments", "attempts", "tells"),
    *("tasks", "inbox", "erasures", "losses"),
)


class OddError(Exception):
    """Raised by an activity at its first attempt."""


@durable(retry=2)
async def fails_once(value: int) -> int:
    if stent.current().attempt == 1:
        raise OddError(value)
    stent.tell({"value": value})
    return value


@durable
async def child(value: int) -> int:
    return await fails_once(value)


@durable
async def square(value: int) -> int:
    return value * value


@durable
async def parent(count: int) -> int:
    children = await asyncio.gather(*[child(n) for n in range(count)])
    squares = await square.map(range(count))
    stent.tell("done")
    await stent.sleep("10ms")
    return sum(children) + sum(squares)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    session = Session(database_url, "test", command_timeout=10.0)
    yield Store(session)
    await session.close()


async def rows_left(connection: asyncpg.Connection) -> dict[str, int]:
    """Numbers of rows of tables that are not empty."""
    found = {
        table: await connection.fetchval(f"select count(*) from stent.{table}")
        for table in TABLES
    }
    return {table: count for table, count in found.items() if count}


async def insert(
    connection: asyncpg.Connection,
    *,
    parent_id: UUID | None = None,
    finished: bool = True,
    detached: bool = False,
    at: datetime | None = None,
) -> UUID:
    """An execution with arguments that began, and perhaps ended, at an instant."""
    at = at or datetime.now(UTC) - timedelta(hours=1)
    execution_id = new_execution_id(at.timestamp())
    await connection.execute(
        "insert into stent.executions (execution_id, function, kind, status, queue,"
        " seed, key_seed, root_id, parent_id, detached, created_at, finished_at)"
        " values ($1, 'f', 'workflow', $2, 'default', '', $1, $1, $3, $4, $5, $6)",
        execution_id,
        "completed" if finished else "running",
        parent_id,
        detached,
        at,
        at if finished else None,
    )
    await connection.execute(
        "insert into stent.payloads (execution_id, call_id, payload)"
        " values ($1, $2, 'x')",
        execution_id,
        NIL,
    )
    return execution_id


async def remaining(connection: asyncpg.Connection) -> set[UUID]:
    rows = await connection.fetch("select execution_id from stent.executions")
    return {row["execution_id"] for row in rows}


async def test_everything_of_it_goes(
    database_url: str, connection: asyncpg.Connection, store: Store
) -> None:
    """No table keeps a row, its dispatch key stays, readers find nothing."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(parent, 5, dispatch_key="once")
        assert (await app.wait_for(execution_id)).unwrap() == 40
        await connection.execute(
            "insert into stent.losses (execution_id, call_id, epoch, worker_id)"
            " select $1, gen_random_uuid(), 1, $2 from generate_series(1, 2500)",
            execution_id,
            NIL,
        )
        before = await rows_left(connection)
        assert (await prune(store, timedelta(hours=1))) == Pruned(0, 0, 0)
        assert await rows_left(connection) == before
        pruned = await prune(store, NOW)
        assert pruned.executions == before["executions"] == 6
        assert pruned.rows == sum(before.values()) - before["executions"]
        assert await rows_left(connection) == {}
    async with Stent(database_url) as app:
        assert await app.dispatch(parent, 5, dispatch_key="once") == execution_id
        with pytest.raises(ExecutionNotFoundError):
            await app.wait_for(execution_id)
        with pytest.raises(ExecutionNotFoundError):
            await app.history(execution_id)
        with pytest.raises(ExecutionNotFoundError):
            await app.state_of(execution_id)


async def test_only_whole_trees_go(
    connection: asyncpg.Connection, store: Store
) -> None:
    """What a live execution may ask for stays, and its ended children with it."""
    live = await insert(connection, finished=False)
    of_live = await insert(connection, parent_id=live)
    detached_of_live = await insert(connection, parent_id=live, detached=True)
    ended = await insert(connection)
    alive_below = await insert(
        connection, parent_id=await insert(connection, parent_id=ended), finished=False
    )
    over = await insert(connection)
    await insert(connection, parent_id=over)
    own_tree = await insert(connection, parent_id=over, detached=True, finished=False)
    await insert(connection, parent_id=over, detached=True)
    assert (await prune(store, NOW)).executions == 3
    left = await remaining(connection)
    assert {live, of_live, detached_of_live, ended, alive_below, own_tree} <= left
    assert len(left) == 7
    await connection.execute(
        "update stent.executions set status = 'completed',"
        " finished_at = clock_timestamp() where finished_at is null"
    )
    await prune(store, NOW)
    assert await rows_left(connection) == {}


async def test_a_large_tree_goes_in_parts(
    connection: asyncpg.Connection, store: Store
) -> None:
    """Children before their parent, no batch above its bound."""
    root = await insert(connection)
    await connection.execute(
        "insert into stent.executions (execution_id, function, kind, status, queue,"
        " seed, key_seed, root_id, parent_id, created_at, finished_at)"
        " select overlay(execution_id::text placing lpad(to_hex(n), 12, '0') from 25"
        "   for 12)::uuid, function, kind, status, queue, seed, key_seed, root_id,"
        "   execution_id, created_at, finished_at"
        "  from stent.executions, generate_series(1, 6000) n"
    )
    batches = []
    after: UUID | None = NIL
    while after is not None:
        forgotten, after = await store.forget(NOW, after, 100)
        if forgotten:
            batches.append(forgotten)
            left = await remaining(connection)
            assert root in left or not left
    assert batches == [5000, 1001]


async def test_what_somebody_reads_is_never_half(
    database_url: str, connection: asyncpg.Connection, store: Store
) -> None:
    """Histories that are read meanwhile are entire, or there is no such execution."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        ids = [await app.dispatch(parent, 2) for _ in range(12)]
        for execution_id in ids:
            await app.wait_for(execution_id)
        entire = {len(await app.history(execution_id)) for execution_id in ids}
        pruning = asyncio.ensure_future(prune(store, NOW))
        seen = set()
        while not pruning.done() or ids:
            for execution_id in list(ids):
                try:
                    seen.add(len(await app.history(execution_id)))
                except ExecutionNotFoundError:
                    ids.remove(execution_id)
    assert len(entire) == 1
    assert seen <= entire
    assert (await pruning).executions == 36


@pytest.mark.timeout(60)
async def test_retention_under_load_loses_nothing(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Executions run, with children, while those that have just ended are deleted."""
    settings = Settings(
        database_url=database_url, retention=timedelta(milliseconds=200)
    )
    async with Stent.bootstrap(settings=settings, serve=True) as app:
        (worker,) = app._workers
        pruned = 0
        waiting = []
        for _ in range(8):
            ids = await app.dispatch_many(parent, [3] * 10)
            waiting += [asyncio.ensure_future(app.wait_for(i)) for i in ids]
            outcome = await waiting[-1]
            assert outcome.unwrap() == 8
            await connection.execute("delete from stent.duties")
            run = await worker.retention.run_once()
            assert run is not None
            pruned += run.executions
        values = {(await one).unwrap() for one in waiting}
    assert values == {8}
    assert pruned > 0
    assert await connection.fetchval("select count(*) from stent.tasks") == 0


async def test_one_worker_at_a_time(store: Store) -> None:
    """Of many that ask, one is told to do it."""
    sessions = [store] * 10
    answers = [await one.take_duty("retention", timedelta(hours=1)) for one in sessions]
    assert answers.count(True) == 1


async def test_nothing_is_deleted_without_retention(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """None means for ever."""
    settings = Settings(database_url=database_url, retention=None)
    async with Stent.bootstrap(settings=settings, serve=True) as app:
        await insert(connection, at=datetime.now(UTC) - timedelta(hours=1))
        (worker,) = app._workers
        assert await worker.retention.run_once() is None
    assert len(await remaining(connection)) == 1


async def test_a_week_without_executions_is_dropped(
    connection: asyncpg.Connection, store: Store
) -> None:
    """Its tables go; a week with a live execution stays; so does one that is read."""
    then = datetime.now(UTC) - timedelta(days=60)
    await store.ensure_partitions([then, then + timedelta(days=14)])
    await insert(connection, at=then)
    live = await insert(connection, at=then + timedelta(days=14), finished=False)
    before = await partitions(connection)
    async with connection.transaction():
        await connection.execute("select from stent.tells")
        pruned = await prune(store, timedelta(days=30))
        assert (pruned.executions, pruned.partitions) == (1, 0)
    pruned = await prune(store, timedelta(days=30))
    assert (pruned.executions, pruned.partitions) == (0, 6)
    assert len(before) - len(await partitions(connection)) == 6
    assert await remaining(connection) == {live}
    assert await connection.fetchval("select count(*) from stent.payloads") == 1
    assert (await prune(store, timedelta(days=30))).partitions == 0
    # A week that was dropped comes back when somebody needs it.
    await store.ensure_partitions([then])
    assert len(await partitions(connection)) == len(before)


async def partitions(connection: asyncpg.Connection) -> set[str]:
    rows = await connection.fetch(
        "select inhrelid::regclass::text as name from pg_inherits"
        " join pg_class on oid = inhrelid where relkind = 'r'"
    )
    return {row["name"] for row in rows}
