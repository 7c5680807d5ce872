"""What was lost with its worker is marked when it begins, and holds nobody up."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest
from asyncpg import Connection

from stent import Stent, durable
from stent.services.suspects import HARMLESS_SECONDS, Suspects
from stent.store.session import Session
from stent.store.store import Store
from tests.postgres.test_queries import register

STARTED = (
    "select started_epoch from stent.suspects where execution_id = $1 and call_id = $2"
)
LONG_AGO = dt.datetime(1, 1, 2, tzinfo=dt.UTC)
WAITS = "select exists (select from pg_catalog.pg_locks where not granted)"
SET_WAKE_AT = "update stent.executions set wake_at = $2 where execution_id = $1"
INSERT_TASK = (
    "insert into stent.tasks"
    " (execution_id, call_id, address, function, queue, available_at)"
    " values ($1, $2, 'a', $3, 'default', now())"
)


class Gate:
    """Holds activities, which then look at the epochs of all tasks."""

    open: asyncio.Event
    pool: asyncpg.Pool[asyncpg.Record]
    running: int
    epochs: list[int]


@durable
async def gated(number: int) -> int:
    Gate.running += 1
    try:
        await Gate.open.wait()
        query = "select coalesce(max(epoch), 0) from stent.tasks"
        Gate.epochs.append(await Gate.pool.fetchval(query))
    finally:
        Gate.running -= 1
    return number


@durable
async def fan(count: int) -> int:
    return sum(await asyncio.gather(*[gated(number) for number in range(count)]))


@durable(kind="workflow")
async def fan_in_shared(count: int) -> int:
    there = gated.options(queue="shared")
    return sum(await asyncio.gather(*[there(number) for number in range(count)]))


@durable(queue="shared")
async def quick() -> int:
    return 1


@durable(kind="workflow")
async def calls_quick() -> int:
    return await quick()


@durable(kind="workflow")
async def holds_the_slot() -> int:
    return await gated.options(queue="shared")(1)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    session = Session(database_url, "test", command_timeout=10.0)
    yield Store(session)
    await session.close()


async def test_marks_are_written_before_anything_begins(
    database_url: str, connection: Connection, store: Store
) -> None:
    """Each under its own epoch; an older claim that comes late changes nothing."""
    suspected = [(uuid4(), uuid4()) for _ in range(20)]
    await connection.executemany(
        "insert into stent.suspects (execution_id, call_id, lost) values ($1, $2, 1)",
        suspected,
    )
    suspects = Suspects(store)

    async def begin(number: int) -> int:
        await suspects.mark(suspected[number], number + 1, 1)
        other = await asyncpg.connect(database_url)
        try:
            epoch: int = await other.fetchval(STARTED, *suspected[number])
            return epoch
        finally:
            await other.close()

    seen = await asyncio.gather(*[begin(number) for number in range(20)])
    assert seen == list(range(1, 21))
    await suspects.mark(suspected[9], 3, 1)
    assert await connection.fetchval(STARTED, *suspected[9]) == 10


@pytest.mark.parametrize("kind", ["executions", "tasks"])
async def test_a_claim_knows_of_a_loss_that_came_before_its_rows(
    database_url: str, connection: Connection, store: Store, kind: str
) -> None:
    """It has begun before a takeover is committed, and gets what that has freed."""
    worker = await register(connection)
    async with Stent(database_url) as app:
        execution = UUID(await app.dispatch(calls_quick))
    await connection.execute(SET_WAKE_AT, execution, None)
    suspected = execution, uuid4() if kind == "tasks" else UUID(int=0)
    async with connection.transaction():
        await connection.execute("select from stent.worker_claims for update")
        claim = asyncio.ensure_future(claim_one(store, worker, kind))
        while not await connection.fetchval(WAITS):  # noqa: ASYNC110 - in the database
            await asyncio.sleep(0.005)
        if kind == "tasks":
            await connection.execute(INSERT_TASK, *suspected, quick.name)
        else:
            await connection.execute(SET_WAKE_AT, execution, LONG_AGO)
        await connection.execute(
            "insert into stent.suspects (execution_id, call_id, lost)"
            " values ($1, $2, 1)",
            *suspected,
        )
    (row,) = await claim
    assert row["execution_id"] == execution
    assert await Suspects(store).losses([row], [suspected]) == {suspected: 1}


async def claim_one(store: Store, worker: str, kind: str) -> list[asyncpg.Record]:
    """The first claim of a worker."""
    claim = {"worker_id": worker, "incarnation": 1, "claim": 1, "count": 1}
    claim |= {"queues": ["default"], "functions": [calls_quick.name, quick.name]}
    if kind == "executions":
        return await store.claim_executions(**claim, digests=["", ""], thorough=True)
    return await store.claim_tasks(**claim, priorities=[], low=LONG_AGO)


async def test_a_lost_answer_does_not_hide_that_a_killer_is_to_stop(
    database_url: str, connection: Connection, store: Store
) -> None:
    """Cancelled by its parent it was claimed to be ended, not to be run once more."""
    worker = UUID(await register(connection))
    async with Stent(database_url) as app:
        execution = UUID(await app.dispatch(calls_quick))
    await connection.execute(
        "update stent.executions set worker_id = $2, incarnation = 1,"
        " status = 'blocked' where execution_id = $1",
        *(execution, worker),
    )
    await connection.execute(
        "insert into stent.inbox (execution_id, kind, reason)"
        " values ($1, 'cancel', 'parent')",
        execution,
    )
    (row,) = await store.held_executions(worker, 1)
    assert (row["execution_id"], row["cancel_reason"]) == (execution, "parent")


async def test_what_runs_for_long_is_not_waited_for(
    connection: Connection, store: Store
) -> None:
    """It may wait for the other; and is not blamed for what that does."""
    first, second = (uuid4(), uuid4()), (uuid4(), uuid4())
    await connection.executemany(
        "insert into stent.suspects (execution_id, call_id, lost) values ($1, $2, 2)",
        [first, second],
    )
    now = 100.0
    suspects = Suspects(store, lambda: now)
    suspects.begin(first, 3, 2)
    await suspects.write_marks()
    assert await connection.fetchval(STARTED, *first) == 3
    assert not suspects.may_begin(2)
    now += HARMLESS_SECONDS + 1
    assert suspects.may_begin(2)
    suspects.begin(second, 5, 2)
    await suspects.write_marks()
    assert await connection.fetchval(STARTED, *first) is None
    assert await connection.fetchval(STARTED, *second) == 5
    assert not suspects.may_begin(2)
    assert suspects.end(second, cleared=True)
    assert not suspects.end(first, cleared=True)


async def test_two_that_count_run_on_two_workers(
    database_url: str, connection: Connection
) -> None:
    """Who may not begin the second one leaves it to the other, who is idle."""
    Gate.open, Gate.running, Gate.epochs = asyncio.Event(), 0, []
    async with (
        asyncpg.create_pool(database_url, min_size=2, max_size=2) as Gate.pool,
        Stent.bootstrap(database_url, serve=True) as app,
    ):
        execution_id = await app.dispatch(fan_in_shared, 2)
        found = 0
        while found < 2:
            found = await connection.fetchval("select count(*) from stent.tasks")
            await asyncio.sleep(0.005)
        await connection.execute(
            "insert into stent.suspects (execution_id, call_id, lost)"
            " select execution_id, call_id, 2 from stent.tasks"
        )
        async with (
            Stent.bootstrap(database_url, serve=True, queues=["shared"]),
            Stent.bootstrap(database_url, serve=True, queues=["shared"]),
        ):
            while Gate.running < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            Gate.open.set()
            assert (await app.wait_for(execution_id)).ok


async def test_what_was_lost_runs_as_soon_as_there_are_slots(
    database_url: str, connection: Connection
) -> None:
    """Fetched ahead it waits like other work: it is not given back and delayed."""
    Gate.open, Gate.running, Gate.epochs = asyncio.Event(), 0, []
    async with (
        asyncpg.create_pool(database_url, min_size=2, max_size=2) as Gate.pool,
        Stent.bootstrap(database_url, serve=True, max_concurrency=2) as app,
    ):
        execution_id = await app.dispatch(fan, 400)
        await wait_for_tasks(connection)
        await connection.execute(
            "insert into stent.suspects (execution_id, call_id, lost)"
            " select execution_id, call_id, 1 from stent.tasks"
        )
        Gate.open.set()
        outcome = await app.wait_for(execution_id, "15s")
    assert outcome.unwrap() == sum(range(400))
    # Claimed once; giving back and claiming again would each count one more.
    assert max(Gate.epochs) == 1


async def test_what_is_counted_is_not_given_back(
    database_url: str, connection: Connection
) -> None:
    """However long it waits: its worker has said that it begins here."""
    Gate.open, Gate.running, Gate.epochs = asyncio.Event(), 0, []
    served = Stent.bootstrap(database_url, serve=True, queues=["default", "shared"])
    async with (
        asyncpg.create_pool(database_url, min_size=2, max_size=2) as Gate.pool,
        served as app,
    ):
        (worker,) = app._workers
        await app.set_limit(queue="shared", max_concurrent=1)
        await app.pause(function=quick)
        while not worker.limits.paused(quick):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
        executions = [await app.dispatch(holds_the_slot)]
        while not Gate.running:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
        executions.append(await app.dispatch(calls_quick))
        insert = (
            "insert into stent.suspects (execution_id, call_id, lost)"
            " select execution_id, call_id, 2 from stent.tasks where function = $1"
            " returning 1"
        )
        while not await connection.fetch(insert, quick.name):  # noqa: ASYNC110 - a row
            await asyncio.sleep(0.005)
        await app.resume(function=quick)
        while len(worker.claimer.held) < 2:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
        given_back = worker.activities.take_overdue(0)
        Gate.open.set()
        assert given_back == []
        for execution_id in executions:
            assert (await app.wait_for(execution_id)).unwrap() == 1


async def wait_for_tasks(connection: Connection) -> None:
    """Until activities run, and others wait in the database."""
    query = "select count(*) from stent.tasks"
    while Gate.running < 2 or not await connection.fetchval(query):  # noqa: ASYNC110 - asks the database
        await asyncio.sleep(0.005)
