"""Tasks of executions that have ended: nobody keeps them, or waits behind them."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from stent import Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

POLL_SECONDS = 0.005
LEFT = 1500
SOON_SECONDS = 15


class Gate:
    """Of one test."""

    running: set[str]
    open: asyncio.Event


@pytest.fixture(autouse=True)
def gate() -> None:
    Gate.running, Gate.open = set(), asyncio.Event()


@durable(queue="elsewhere")
async def held_up(name: str) -> str:
    Gate.running.add(name)
    try:
        await Gate.open.wait()
    finally:
        Gate.running.discard(name)
    return name


@durable(queue="elsewhere", max_concurrent=1, concurrency_key="name", kind="activity")
async def one_at_a_time(name: str, *, wait: bool) -> str:
    return await held_up.function(name) if wait else name


@durable(kind="workflow")
async def returns_early(name: str, *, keyed: bool) -> str:
    """Its activity runs on; nobody wants the result."""
    call = one_at_a_time(name, wait=True) if keyed else held_up(name)
    left = asyncio.ensure_future(call)
    await until_it_runs()
    assert not left.done()
    return name


@durable(kind="activity")
async def until_it_runs() -> None:
    while not Gate.running:  # noqa: ASYNC110 - of either kind
        await asyncio.sleep(POLL_SECONDS)


@durable(kind="workflow")
async def leaves_many() -> None:
    await asyncio.gather(*[held_up(str(number)) for number in range(LEFT)])


@durable(kind="workflow")
async def calls_it_once_more(name: str) -> str:
    return await one_at_a_time(name, wait=False)


@durable(queue="elsewhere", kind="activity")
async def itself(number: int) -> int:
    return number


@durable(kind="workflow")
async def calls_more_than_begin_at_once() -> int:
    return sum(await asyncio.gather(*[itself(number) for number in range(300)]))


async def tasks(connection: Connection) -> int:
    count: int = await connection.fetchval("select count(*) from stent.tasks")
    return count


@pytest.mark.parametrize("keyed", [False, True])
async def test_an_execution_takes_its_tasks_with_it(
    database_url: str, connection: Connection, *, keyed: bool
) -> None:
    """Those that run, too: their attempts are stopped, the slots of keys are free."""
    async with (
        Stent.bootstrap(database_url, serve=True) as app,
        Stent.bootstrap(database_url, serve=True, queues=["elsewhere"]),
    ):
        ended = await app.dispatch(returns_early, "a", keyed=keyed)
        assert (await app.wait_for(ended)).unwrap() == "a"
        assert await tasks(connection) == 0
        while Gate.running:  # noqa: ASYNC110 - stopped within a second
            await asyncio.sleep(POLL_SECONDS)
        again = await app.dispatch(calls_it_once_more, "a")
        assert (await app.wait_for(again)).unwrap() == "a"


async def test_a_cancelled_activity_takes_its_task_with_it(
    database_url: str, connection: Connection
) -> None:
    """With its end, not when somebody comes across it: nobody claims what is paused."""
    queues = ["default", "elsewhere"]
    async with Stent.bootstrap(database_url, serve=True, queues=queues) as app:
        await app.pause(function=itself)
        (worker,) = app._workers
        while not worker.limits.paused(itself):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_SECONDS)
        executions = [await app.dispatch(itself, number) for number in range(3)]
        while await tasks(connection) < len(executions):  # noqa: ASYNC110 - in the database
            await asyncio.sleep(POLL_SECONDS)
        for execution_id in executions:
            await app.cancel(execution_id)
            await app.wait_for(execution_id)
        assert await tasks(connection) == 0


async def test_who_holds_a_task_of_an_ended_execution_deletes_it(
    database_url: str, connection: Connection
) -> None:
    """When the execution ended without its owner, whose turn would have done it."""
    async with Stent.bootstrap(
        database_url, serve=True, queues=["elsewhere", "default"]
    ) as app:
        await app.dispatch(held_up.options(queue="elsewhere"), "a")
        (worker,) = app._workers
        while not Gate.running:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        execution_id = await unowned_with_task(connection, worker.identity.worker_id)
        await end(connection, execution_id)
        await worker.claimer._recover_claim()
        while await tasks(connection):
            await worker.duties.run_once()
        Gate.open.set()


async def unowned_with_task(connection: Connection, worker_id: UUID) -> UUID:
    """An execution of nobody, whose task a worker holds."""
    execution_id: UUID = await connection.fetchval(
        "insert into stent.executions (execution_id, function, kind, status, queue,"
        "  priority, epoch, seed, key_seed, root_id, depth, tags)"
        " select gen_random_uuid(), function, kind, 'running', 'nobody', 0, 1, seed,"
        "  key_seed, root_id, 0, '{}' from stent.executions limit 1"
        " returning execution_id"
    )
    await connection.execute(
        "insert into stent.tasks (execution_id, call_id, address, function, queue,"
        "  priority, available_at, attempt, epoch, is_page, arguments, worker_id,"
        "  incarnation)"
        " select $1, gen_random_uuid(), ':x#0.0', $3, 'elsewhere', 0, now(), 1, 1,"
        "  false, decode('015b5b2262225d2c7b7d5d', 'hex'), $2, incarnation"
        "   from stent.workers where worker_id = $2",
        execution_id,
        worker_id,
        held_up.name,
    )
    return execution_id


async def end(connection: Connection, execution_id: UUID) -> None:
    await connection.execute(
        "update stent.executions set status = 'failed', finished_at = now(),"
        " wake_at = null where execution_id = $1",
        execution_id,
    )


async def test_nobody_waits_behind_what_was_left(
    database_url: str, connection: Connection
) -> None:
    """A claim that finds nothing but leftovers looks again, at once."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(leaves_many)
        while await tasks(connection) < LEFT:  # noqa: ASYNC110 - rows
            await asyncio.sleep(POLL_SECONDS)
        await app.drain()
        await end(connection, UUID(execution_id))
    served = Stent.bootstrap(
        database_url, serve=True, queues=["default", "elsewhere"], max_concurrency=2
    )
    async with served as app, asyncio.timeout(SOON_SECONDS):
        calls = await app.dispatch(calls_more_than_begin_at_once)
        assert (await app.wait_for(calls)).unwrap() == sum(range(300))


async def test_what_is_swept_takes_its_tasks_with_it(
    database_url: str, connection: Connection
) -> None:
    """They would count as ready, and nobody may serve their queue."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(leaves_many)
        while await tasks(connection) < LEFT:  # noqa: ASYNC110 - rows
            await asyncio.sleep(POLL_SECONDS)
        await app.drain()
    async with Stent.bootstrap(database_url, serve=True, queues=["other"]) as app:
        await connection.execute(
            "update stent.executions set status = 'cancelling',"
            " cancel_reason = 'cancel', cancel_by = $2 where execution_id = $1",
            UUID(execution_id),
            dt.datetime.now(tz=dt.UTC) - dt.timedelta(minutes=1),
        )
        (worker,) = app._workers
        await worker.duties.run_once()
        assert await tasks(connection) == 0
        assert (await app.wait_for(execution_id)).is_err()
