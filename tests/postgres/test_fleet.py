"""Workers tell about themselves, and do what an operator asks of them from afar."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

import stent
from stent import Settings, Stent, WorkerNotFoundError, durable

POLL_SECONDS = 0.01


class Gate:
    """Holds activities until a test lets them go on."""

    def __init__(self) -> None:
        self.starts = 0
        self.open = asyncio.Event()


gate = Gate()


@pytest.fixture(autouse=True)
def _closed_gate() -> None:
    global gate  # noqa: PLW0603 - of the loop of one test
    gate = Gate()


@durable
async def held_up() -> str:
    gate.starts += 1
    await gate.open.wait()
    return "done"


@durable
async def waits_for_it() -> str:
    return await held_up()


@durable(kind="workflow")
async def sleeps() -> None:
    await stent.sleep("1h")


def quick(url: str, **changes: object) -> Settings:
    """A lease that is renewed ten times a second."""
    return Settings(
        database_url=url,
        lease=timedelta(seconds=5),
        lease_renew_every=timedelta(seconds=0.1),
        **changes,  # type: ignore[arg-type]
    )


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """The test's own timeout bounds it."""
    while not await condition():  # noqa: ASYNC110 - the database has no events
        await asyncio.sleep(POLL_SECONDS)


async def test_a_worker_tells_about_itself(database_url: str) -> None:
    """Where it is, what it is, what it serves, and what it does right now."""
    settings = quick(database_url, app_version="2026.11")
    async with Stent.bootstrap(
        settings=settings, serve=True, max_concurrency=7, queues=("a", "default")
    ) as app:
        execution_id = await app.dispatch(waits_for_it)

        async def busy() -> bool:
            (worker,) = await app.list_workers()
            return (worker.running, worker.residents) == (1, 1)

        await wait_until(busy)
        (worker,) = await app.list_workers(host=socket.gethostname())
        assert worker.alive
        assert (worker.state, worker.pid, worker.slots) == ("running", os.getpid(), 7)
        assert worker.version == stent.__version__
        assert worker.app_version == "2026.11"
        assert worker.queues == ("a", "default")
        assert worker.functions is not None
        assert {held_up.name, waits_for_it.name} <= set(worker.functions)
        assert timedelta(0) < worker.lease_left <= settings.lease
        assert worker.renewed_at >= worker.started_at
        assert await app.list_workers(host="elsewhere") == []
        gate.open.set()
        assert (await app.wait_for(execution_id)).ok
    async with Stent(database_url) as looker:
        assert await looker.list_workers() == []
        (worker,) = await looker.list_workers(ended=True)
        assert (worker.state, worker.alive) == ("stopped", False)


async def test_functions_defined_later_are_told(database_url: str) -> None:
    """A name that a worker learns while it runs reaches the database."""
    async with Stent.bootstrap(settings=quick(database_url), serve=True) as app:

        @durable(name=f"tests.later_{uuid4().hex}")
        async def later() -> int:
            return 1

        async def told() -> bool:
            (worker,) = await app.list_workers()
            return later.name in (worker.functions or ())

        await wait_until(told)


async def test_lag_of_the_loop_is_told(database_url: str) -> None:
    """Code that blocks the loop for a while is seen in the next figures."""
    async with Stent.bootstrap(settings=quick(database_url), serve=True) as app:
        (worker,) = app._workers
        loop = asyncio.get_running_loop()
        late: list[timedelta] = []

        async def seen() -> bool:
            (found,) = await app.list_workers()
            late.append(found.lag)
            return found.lag >= timedelta(seconds=0.2)

        until = loop.time() + 0.6
        while loop.time() < until:
            pass  # The loop is blocked; the thread that renews the lease is not.
        assert worker.health().lag > timedelta(seconds=0.2)
        assert worker.health().live
        await wait_until(seen)


async def test_draining_from_elsewhere(database_url: str) -> None:
    """Another process asks: what runs is finished, what waits is handed over."""
    async with (
        Stent.bootstrap(settings=quick(database_url), serve=True) as app,
        Stent(database_url) as operator,
    ):
        (task,) = app._workers.values()
        execution_id = await operator.dispatch(waits_for_it)
        parked = await operator.dispatch(sleeps)

        async def begun() -> bool:
            state = await operator.state_of(parked)
            return gate.starts == 1 and state.worker_id is not None

        await wait_until(begun)
        (worker,) = await operator.list_workers()
        assert await operator.drain_worker(worker.id)

        async def handed_over() -> bool:
            return (await operator.state_of(parked)).worker_id is None

        await wait_until(handed_over)
        (worker,) = await operator.list_workers()
        assert (worker.state, worker.asked) == ("draining", "drain")
        health = app.health()
        assert (health.live, health.ready) == (True, False)
        assert health.workers[0].state == "draining"
        # Asked again, it does not hurry.
        assert await operator.drain_worker(worker.id)
        assert not task.done()
        gate.open.set()
        await asyncio.wait([task])
        assert not await operator.drain_worker(worker.id)
        assert not await operator.stop_worker(worker.id)
        async with Stent.bootstrap(database_url, serve=True) as successor:
            outcome = await successor.wait_for(execution_id)
        assert (outcome.unwrap(), gate.starts) == ("done", 1)


async def test_stopping_from_elsewhere(database_url: str) -> None:
    """What runs is cut off and runs again elsewhere; draining first is no obstacle."""
    async with (
        Stent.bootstrap(settings=quick(database_url), serve=True) as app,
        Stent(database_url) as operator,
    ):
        (task,) = app._workers.values()
        execution_id = await operator.dispatch(waits_for_it)

        async def begun() -> bool:
            return gate.starts == 1

        await wait_until(begun)
        (worker,) = await operator.list_workers()
        assert await operator.drain_worker(worker.id)
        assert await operator.stop_worker(worker.id)
        # It stays asked for more, whatever is asked later.
        await operator.drain_worker(worker.id)
        await asyncio.wait([task])
        gate.open.set()
        async with Stent.bootstrap(database_url, serve=True) as successor:
            outcome = await successor.wait_for(execution_id)
        assert (outcome.unwrap(), gate.starts) == ("done", 2)


async def test_who_leaves_is_not_lost(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The lease notices that the work is gone, when the worker gave it back itself."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        (worker,) = app._workers
        take_over = worker._store.take_over

        async def then_notice(*args: Any) -> object:
            freed = await take_over(*args)
            worker._noticed_loss()
            for _ in range(50):  # Time enough to rejoin, if it were to.
                await worker._store.current_boot()
            return freed

        worker._store.take_over = then_notice  # type: ignore[assignment]
        await app.drain()
        (state,) = await app.list_workers(ended=True)
    assert state.state == "stopped"
    assert "lease.lost" not in caplog.text


async def test_an_order_without_hint_is_found(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Polling is the truth: nobody tells the worker, it looks."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        (task,) = app._workers.values()
        await connection.execute("update stent.leases set asked = 'drain'")
        await asyncio.wait([task])
        assert task.exception() is None


async def test_orders_to_nobody(database_url: str) -> None:
    """Who never was is an error; who was is told from it."""
    async with Stent(database_url) as app:
        for name in (str(uuid4()), "nobody"):
            with pytest.raises(WorkerNotFoundError, match="there is no worker"):
                await app.drain_worker(name)


async def test_a_function_that_nobody_has_is_named(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """``waiting_for`` says exactly what is missing, for an execution and for a call."""
    async with Stent.bootstrap(settings=quick(database_url), serve=True) as app:
        execution_id = await app.dispatch(held_up.options(queue="default"))
        await asyncio.wait_for(_started(), 10)
        unknown = await app.dispatch(sleeps, delay="1h")
        await connection.execute(
            "update stent.executions set function = 'reports.build', wake_at = now()"
            " where execution_id = $1",
            unknown,
        )
        state = await app.state_of(unknown)
        expected = "no running worker has the function reports.build"
        assert state.waiting_for == (expected,)
        gate.open.set()
        assert (await app.wait_for(execution_id)).ok


async def _started() -> None:
    while gate.starts == 0:  # noqa: ASYNC110 - it is started by a worker
        await asyncio.sleep(POLL_SECONDS)


async def test_health_of_an_app(database_url: str) -> None:
    """Without a worker nothing is ready; with one that claims everything is."""
    async with Stent(database_url) as app:
        health = app.health()
        assert (health.live, health.ready, health.workers) == (True, False, ())
    async with Stent.bootstrap(database_url, serve=True) as app:
        health = app.health()
        assert (health.live, health.ready) == (True, True)
        (worker,) = health.workers
        assert (worker.state, worker.pid) == ("running", os.getpid())
        await app.drain()
        assert not app.health().ready


async def test_names_of_gone_workers_are_deleted(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Also those that a version which knows no such row has left behind."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        await connection.execute(
            "insert into stent.worker_functions values (gen_random_uuid(), '{x}')"
        )
        (worker,) = app._workers
        await worker._store.forget_workers()
        kept = await connection.fetch("select worker_id from stent.worker_functions")
        assert [row["worker_id"] for row in kept] == [worker.worker_id]
