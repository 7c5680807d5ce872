"""While an old transaction keeps removed rows, claims do not walk over them."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from uuid import UUID, uuid4

import asyncpg
import pytest
from asyncpg import Connection

from stent import Stent, durable
from stent.store.queries import load
from stent.store.store import BELOW_ALL

GONE = 60_000
PAGES_MAX = 300


@durable
async def step(x: int) -> int:
    return x


@durable(max_concurrent=6)
async def limited_step(x: int) -> int:
    return x


@durable
async def fan(count: int, limited: bool) -> int:
    function = limited_step if limited else step
    return sum(await asyncio.gather(*[function(n) for n in range(count)]))


async def claimer_of_an_execution(connection: Connection) -> tuple[UUID, UUID]:
    """A worker that can claim, and an execution that tasks can belong to."""
    worker = uuid4()
    await connection.execute(
        "insert into stent.workers (worker_id) values ($1)", worker
    )
    await connection.execute(
        "insert into stent.worker_claims (worker_id) values ($1)", worker
    )
    execution = uuid4()
    await connection.execute(
        "insert into stent.executions"
        " (execution_id, function, kind, queue, seed, key_seed, root_id)"
        " values ($1, 'x', 'workflow', 'default', '', $1, $1)",
        execution,
    )
    return worker, execution


async def insert(
    connection: Connection, execution: UUID, count: int, priority: int = 0
) -> None:
    await connection.execute(
        "insert into stent.tasks"
        " (execution_id, call_id, address, function, queue, available_at, priority)"
        " select $1, gen_random_uuid(), 'a', 'f', 'default', clock_timestamp(), $3"
        " from generate_series(1, $2::int)",
        execution,
        count,
        priority,
    )


async def pages_of(
    connection: Connection, name: str, **binds: object
) -> tuple[int, int]:
    """Rows of a claim, and pages that it looked at."""
    query = load()[name]
    text = query.sql
    plan = await connection.fetchval(
        f"explain (analyze, buffers, format json) {text}", *query.arguments(binds)
    )
    top = json.loads(plan)[0]["Plan"]
    return top["Actual Rows"], top["Shared Hit Blocks"] + top["Shared Read Blocks"]


@pytest.mark.timeout(60)
async def test_claims_skip_what_cannot_be_removed(
    database_url: str, connection: Connection
) -> None:
    """Above the mark a claim reads a few pages; from the beginning all of them."""
    worker, execution = await claimer_of_an_execution(connection)
    old = await asyncpg.connect(database_url)
    async with old.transaction(isolation="repeatable_read"):
        await old.fetchval("select count(*) from stent.tasks")
        await insert(connection, execution, GONE)
        await connection.execute("delete from stent.tasks")
        low = await connection.fetchval("select clock_timestamp()")
        claim = {
            "worker_id": worker,
            "incarnation": 1,
            "queues": ["default"],
            "functions": ["f"],
            "count": 10,
            "above": BELOW_ALL,
            "waited": 0.0,
        }
        above = claim | {"low": low, "priorities": [0, 5]}
        # The first one also reads the catalogue, to plan.
        await pages_of(connection, "claim_tasks", **above, claim=1)
        await insert(connection, execution, 10)
        rows, pages = await pages_of(connection, "claim_tasks", **above, claim=2)
        assert rows == 10
        assert pages < PAGES_MAX
        await insert(connection, execution, 10)
        always = dt.datetime(1, 1, 2, tzinfo=dt.UTC)
        all_of_them = claim | {"low": always, "priorities": []}
        rows, all_pages = await pages_of(
            connection, "claim_tasks", **all_of_them, claim=3
        )
        assert rows == 10
        assert all_pages > 5 * PAGES_MAX
    await old.close()


@pytest.mark.timeout(60)
async def test_questions_for_limited_work_skip_what_cannot_be_removed(
    database_url: str, connection: Connection
) -> None:
    """Whether a limited function has ready tasks is seen above a mark."""
    _, execution = await claimer_of_an_execution(connection)
    old = await asyncpg.connect(database_url)
    async with old.transaction(isolation="repeatable_read"):
        await old.fetchval("select count(*) from stent.tasks")
        await insert(connection, execution, GONE)
        await connection.execute("delete from stent.tasks")
        low = await connection.fetchval("select clock_timestamp()")
        lane = {"queues": ["default"], "functions": ["f"]}
        above = lane | {"lows": [low], "priorities": [0, 5]}
        await pages_of(connection, "ready_lanes", **above)
        rows, pages = await pages_of(connection, "ready_lanes", **above)
        assert rows == 0
        assert pages < PAGES_MAX
        await insert(connection, execution, 1, priority=-1)
        rows, pages = await pages_of(connection, "ready_lanes", **above)
        assert rows == 1
        assert pages < PAGES_MAX
        always = dt.datetime(1, 1, 2, tzinfo=dt.UTC)
        all_of_them = lane | {"lows": [always], "priorities": []}
        rows, all_pages = await pages_of(connection, "ready_lanes", **all_of_them)
        assert rows == 1
        assert all_pages > 5 * PAGES_MAX
    await old.close()


async def test_a_priority_that_was_never_met_is_found(connection: Connection) -> None:
    """Claims above a mark take the highest priority first, whatever they name."""
    worker, execution = await claimer_of_an_execution(connection)
    low = await connection.fetchval("select clock_timestamp()")
    for priority in (0, 32767, -32768, 3, 5, -2, 4, 1):
        await insert(connection, execution, 2, priority)
    await connection.execute(
        "update stent.tasks set available_at = now() + interval '1 hour'"
        " where call_id in (select call_id from stent.tasks where priority = 5)"
    )
    query = load()["claim_tasks"]
    found = []
    for claim in range(1, 8):
        binds = {
            "worker_id": worker,
            "incarnation": 1,
            "claim": claim,
            "queues": ["default"],
            "functions": ["f"],
            "priorities": [0, 3],
            "count": 2,
            "low": low,
            "above": -3 if claim < 7 else BELOW_ALL,
            "waited": 0.0,
        }
        rows = await connection.fetch(query.sql, *query.arguments(binds))
        found.append([row["priority"] for row in rows])
    assert found == [[p, p] for p in (32767, 4, 3, 1, 0, -2, -32768)]


@pytest.mark.parametrize("named", [[], [0, 3], [-7, 0, 5]])
async def test_only_the_more_urgent_are_asked_for(
    connection: Connection, named: list[int]
) -> None:
    """Whichever priorities are named."""
    worker, execution = await claimer_of_an_execution(connection)
    low = await connection.fetchval("select clock_timestamp()")
    for priority in (-7, 0, 3, 4, 5):
        await insert(connection, execution, 2, priority)
    query = load()["claim_tasks"]
    binds = {
        "worker_id": worker,
        "incarnation": 1,
        "claim": 1,
        "queues": ["default", "other"],
        "functions": ["f", "g"],
        "priorities": named,
        "count": 20,
        "low": low,
        "above": 3,
        "waited": 0.0,
    }
    later = binds | {"waited": 3600.0}
    assert not await connection.fetch(query.sql, *query.arguments(later))
    binds["claim"] = 2
    rows = await connection.fetch(query.sql, *query.arguments(binds))
    assert {(row["priority"], row["queue"]) for row in rows} == {
        (4, "default"),
        (5, "default"),
    }
    assert len(rows) == 4


@pytest.mark.timeout(60)
@pytest.mark.parametrize("limited", [False, True])
async def test_work_goes_on_behind_an_old_transaction(
    database_url: str, limited: bool
) -> None:
    """Marks lose nothing: every task of every fan-out is run."""
    old = await asyncpg.connect(database_url)
    async with (
        Stent.bootstrap(database_url, serve=True, max_concurrency=8) as app,
        old.transaction(isolation="repeatable_read"),
    ):
        await old.fetchval("select count(*) from stent.tasks")
        for _ in range(4):
            ids = [await app.dispatch(fan, 400, limited) for _ in range(5)]
            for execution_id in ids:
                outcome = await app.wait_for(execution_id, "40s")
                assert outcome.unwrap() == sum(range(400))
    await old.close()
