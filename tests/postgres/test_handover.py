"""A worker that stops hands over what it runs, without losing or repeating any."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg

import stent
from stent import Stent, durable

POLL_SECONDS = 0.005


class Gate:
    """Holds an activity until a test lets it go on."""

    def __init__(self) -> None:
        self.starts = 0
        self.open = asyncio.Event()


gate = Gate()


@durable
async def held_up() -> str:
    gate.starts += 1
    await gate.open.wait()
    return "done"


@durable
async def waits_for_it() -> str:
    return await held_up()


async def test_result_before_its_row_is_kept(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """An attempt that ends before the handover of its execution is written counts.

    The row of its task is inserted by that handover, which a lock on the execution
    holds up here.
    """
    global gate  # noqa: PLW0603 - of the loop of this test
    gate = Gate()
    async with Stent.bootstrap(database_url, serve=True) as app:
        (worker,) = app._workers
        execution_id = await app.dispatch(waits_for_it)
        await wait_until(lambda: gate.starts == 1)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("select from stent.executions for update")
        drain = asyncio.ensure_future(app.drain())
        await wait_until(lambda: bool(worker.claimer.held))
        # That its row is not there yet does not mean that it was dropped.
        await worker.duties.run_once()
        gate.open.set()
        await wait_until(lambda: worker.activities.pace.completed == 1)
        flushes = worker.writer.flushes
        await wait_until(lambda: worker.writer.flushes > flushes + 2)
        await transaction.rollback()
        await drain
    async with Stent.bootstrap(database_url, serve=True) as successor:
        outcome = await successor.wait_for(execution_id)
    assert outcome.unwrap() == "done"
    assert gate.starts == 1


async def test_what_is_resident_is_not_begun_again(database_url: str) -> None:
    """Looking for what a lost answer brought finds it, too: a child, for instance."""
    global gate  # noqa: PLW0603 - of the loop of this test
    gate = Gate()
    async with Stent.bootstrap(database_url, serve=True) as app:
        (worker,) = app._workers
        execution_id = await app.dispatch(waits_for_it)
        await wait_until(lambda: gate.starts == 1)
        rows = await worker.claimer._store.held_executions(
            worker.identity.worker_id, worker.identity.incarnation
        )
        await worker.claimer._adopt(rows)
        gate.open.set()
        assert (await app.wait_for(execution_id)).unwrap() == "done"
    assert len(rows) == 1
    assert gate.starts == 1


async def wait_until(condition: Callable[[], bool]) -> None:
    """The test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - the worker has no events for tests
        await asyncio.sleep(POLL_SECONDS)


@durable(kind="workflow")
async def runs_it_itself() -> str:
    found = await stent.run(held_up.function)
    return f"{found} {gate.starts}"


async def test_what_stent_run_has_begun_ends_here(database_url: str) -> None:
    """Only this process knows the function: its execution is handed over after it."""
    global gate  # noqa: PLW0603 - of the loop of this test
    gate = Gate()
    async with Stent.bootstrap(database_url, serve=True) as app:
        (worker,) = app._workers
        execution_id = await app.dispatch(runs_it_itself)
        await wait_until(lambda: gate.starts == 1)
        drain = asyncio.ensure_future(app.drain())
        await wait_until(lambda: not worker.executions.accepting)
        gate.open.set()
        await drain
    async with Stent.bootstrap(database_url, serve=True) as successor:
        outcome = await successor.wait_for(execution_id)
    assert outcome.unwrap() == "done 1"
