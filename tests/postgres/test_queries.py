"""Every named query prepares; hot statements keep to their indexes."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from stent import Stent, durable
from stent.clock import new_execution_id
from stent.store.queries import load
from stent.store.session import Session
from stent.store.store import Store

if TYPE_CHECKING:
    from asyncpg import Connection

ROWS = 50_000
CALL = uuid4()


@durable
async def step(x: int) -> int:
    return x


@durable
async def fan(count: int) -> int:
    return sum(await asyncio.gather(*[step(n) for n in range(count)]))


@pytest.mark.parametrize("name", sorted(load()))
async def test_query_prepares(connection: Connection, name: str) -> None:
    """It fits the schema."""
    await connection.prepare(load()[name].sql)


async def scans(connection: Connection, table: str) -> tuple[int, int]:
    """Sequential scans of a table, and rows read by them."""
    await connection.execute("select pg_stat_force_next_flush()")
    row = await connection.fetchrow(
        "select seq_scan, seq_tup_read from pg_stat_user_tables"
        " where schemaname = 'stent' and relname = $1",
        table,
    )
    return row["seq_scan"], row["seq_tup_read"]


async def register(connection: Connection) -> str:
    return str(
        await connection.fetchval(
            "with w as (insert into stent.workers (worker_id)"
            " values (gen_random_uuid()) returning worker_id)"
            " insert into stent.worker_claims (worker_id) select worker_id from w"
            " returning worker_id"
        )
    )


async def test_claim_of_tasks_probes_its_index(connection: Connection) -> None:
    """Behind many rows of another function nothing is scanned."""
    await connection.execute(
        "insert into stent.tasks"
        " (execution_id, call_id, address, function, queue, available_at)"
        " select gen_random_uuid(), gen_random_uuid(), 'a',"
        "        case when n % 1000 = 0 then 'rare' else 'common' end, 'default',"
        "        now() - interval '1 hour'"
        f" from generate_series(1, {ROWS}) n"
    )
    worker = await register(connection)
    before = await scans(connection, "tasks")
    low = dt.datetime(1, 1, 2, tzinfo=dt.UTC)
    rows = await connection.fetch(
        load()["claim_tasks"].sql,
        *[worker, 1, 1, ["default"], ["rare"], [], 10, low, -32769, 0.0],
    )
    assert rows == []  # of executions that do not exist
    assert await scans(connection, "tasks") == before


async def test_claim_of_executions_probes_its_indexes(connection: Connection) -> None:
    """Behind many rows that are not due, or belong to others."""
    await connection.execute(
        "insert into stent.executions"
        " (execution_id, function, kind, queue, wake_at, seed, key_seed, root_id)"
        " select id, case when n % 1000 = 0 then 'rare' else 'common' end, 'workflow',"
        "        'default', now(), '\\x00', id, id"
        f" from (select n, gen_random_uuid() as id from generate_series(1, {ROWS}) n) g"
    )
    worker = await register(connection)
    before = await scans(connection, "executions")
    await connection.fetch(
        load()["claim_executions"].sql,
        *[worker, 1, 1, ["default"], ["rare"], ["digest"], 10, True],
    )
    assert await scans(connection, "executions") == before


async def test_claims_and_settles_of_tasks_touch_no_index(
    database_url: str, connection: Connection
) -> None:
    """Updates of tasks are HOT."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=5) as app:
        assert (await app.wait_for(await app.dispatch(fan, 1500), "15s")).is_ok()
    await asyncio.sleep(0)
    row = await _updates(connection)
    while row["n_tup_upd"] == 0:
        row = await _updates(connection)
    # Old snapshots of neighbours may keep a page from being pruned now and then.
    assert row["n_tup_hot_upd"] >= 0.9 * row["n_tup_upd"]


async def _updates(connection: Connection) -> dict[str, int]:
    await connection.execute("select pg_stat_force_next_flush()")
    return dict(
        await connection.fetchrow(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables"
            " where schemaname = 'stent' and relname = 'tasks'"
        )
    )


async def test_no_index_of_tasks_names_what_changes(connection: Connection) -> None:
    """Neither its columns nor its predicate."""
    rows = await connection.fetch(
        "select indexdef from pg_indexes where schemaname = 'stent'"
        " and tablename = 'tasks'"
    )
    for row in rows:
        for column in ("worker_id", "incarnation", "epoch", "attempt"):
            assert column not in row["indexdef"]


async def test_no_identifier_is_narrow(connection: Connection) -> None:
    """Sequences are bigint."""
    found = await connection.fetch(
        "select sequencename from pg_sequences"
        " where schemaname = 'stent' and data_type <> 'bigint'::regtype"
    )
    assert not found


async def test_crowd_of_everything_meets_no_deadlock(
    database_url: str, connection: Connection
) -> None:
    """Workers, cancels and dispatches on the same rows: one lock order."""
    async with (
        Stent.bootstrap(database_url, serve=True, max_concurrency=3) as app,
        Stent.bootstrap(database_url, serve=True, max_concurrency=3) as other,
    ):

        async def one(number: int) -> bool:
            identifier = await app.dispatch(parent, number)
            if number % 2:
                await asyncio.gather(app.cancel(identifier), other.cancel(identifier))
            outcome = await other.wait_for(identifier, "15s")
            return outcome.is_ok()

        answers = await asyncio.gather(*[one(n) for n in range(60)])
    assert all(answers[::2])
    deadlocks = await connection.fetchval(
        "select deadlocks from pg_stat_database where datname = current_database()"
    )
    assert deadlocks == 0


@durable
async def parent(number: int) -> int:
    return await fan(3) + await step(number)


@pytest.mark.parametrize("name", ["outcomes", "undelivered", "load_stored"])
async def test_what_was_planned_while_all_was_small_stays_right(
    database_url: str, connection: Connection, name: str
) -> None:
    """A plan lives as long as its connection; the tables grow meanwhile."""
    now = time.time()
    ids = [new_execution_id(now) for _ in range(ROWS // 10)]
    worker = await register(connection)
    session = Session(database_url, "test")
    store = Store(session)
    try:
        await _insert_executions(connection, worker, ids[:5])
        await connection.execute("vacuum analyze")
        for _ in range(10):
            await _look(store, name, worker, ids[:5])
        await _insert_executions(connection, worker, ids[5:])
        before = await _rows_scanned(connection)
        assert await _look(store, name, worker, ids[5:10])
        await session.close()
        assert await _rows_scanned(connection) == before
    finally:
        await session.close()


async def _look(store: Store, name: str, worker: str, ids: list[UUID]) -> object:
    match name:
        case "outcomes":
            return await store.outcomes(ids)
        case "undelivered":
            return await store.undelivered(UUID(worker), [], 5)
        case _:
            return await store.load_stored(ids)


async def _insert_executions(
    connection: Connection, worker: str, ids: list[UUID]
) -> None:
    """Executions of a worker with two results, one of them in the inbox."""
    await connection.execute(
        "insert into stent.executions (execution_id, function, kind, status, queue,"
        " worker_id, seed, key_seed, root_id)"
        " select id, 'f', 'workflow', 'running', 'default', $2, '\\x00', id, id"
        " from unnest($1::uuid[]) id",
        ids,
        worker,
    )
    await connection.execute(
        "insert into stent.results (execution_id, call_id, address, ok, payload)"
        " select id, call, 'a', true, '\\x00' from unnest($1::uuid[]) id,"
        " unnest(array['00000000-0000-0000-0000-000000000000', $2]::uuid[]) call",
        ids,
        CALL,
    )
    await connection.execute(
        "insert into stent.inbox (execution_id, kind, call_id)"
        " select id, 'result', $2 from unnest($1::uuid[]) id",
        ids,
        CALL,
    )


async def _rows_scanned(connection: Connection) -> dict[str, int]:
    """Rows read by sequential scans, by table; the small ones left out."""
    await connection.execute("select pg_stat_force_next_flush()")
    rows = await connection.fetch(
        "select relname, seq_tup_read from pg_stat_user_tables"
        " where schemaname = 'stent'"
        " and relname ~ '^(executions|results|inbox|journal)'"
    )
    return {row["relname"]: row["seq_tup_read"] for row in rows}
