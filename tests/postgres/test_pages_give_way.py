"""Between two items a page lets what is more urgent pass, and stops for a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import pytest

import stent
from stent import Stent, durable
from stent.worker import Worker

COUNT = 8


class Gate:
    """Items begin, and wait until they are let go."""

    open: asyncio.Semaphore
    begun: list[int]
    steps: list[asyncio.Event]


@pytest.fixture(autouse=True)
def gate() -> None:
    Gate.open, Gate.begun = asyncio.Semaphore(0), []
    Gate.steps = [asyncio.Event() for _ in range(COUNT)]


@durable(priority=-10)
async def item(number: int) -> int:
    Gate.begun.append(number)
    await Gate.open.acquire()
    return number


@durable
async def batch() -> int:
    return sum(await stent.map(item, range(COUNT), chunk=COUNT))


@durable(priority=-10)
async def step(number: int) -> int:
    Gate.begun.append(number)
    await Gate.steps[number].wait()
    return number


@durable
async def steps() -> int:
    return sum(await stent.map(step, range(COUNT), chunk=COUNT))


@durable
async def batch_in(where: str) -> int:
    there = item.options(queue=where)
    return sum(await there.map(range(COUNT), chunk=COUNT))


@durable
async def quick(number: int) -> int:
    Gate.begun.append(number)
    return number


@durable
async def urgent() -> int:
    return await quick.options(priority=10)(1000)


@durable
async def urgent_in(where: str) -> int:
    return await quick.options(priority=10, queue=where)(1000)


@durable
async def lasting() -> int:
    return await item.options(priority=10)(2000)


def worker_of(app: Stent) -> Worker:
    (worker,) = app._workers
    return worker


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - the state of a worker
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("slots", [1, 2, 5])
async def test_the_more_urgent_gets_the_next_slot(
    database_url: str, slots: int
) -> None:
    """Neither the page nor those who help it begin another item before."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=slots) as app:
        low = await app.dispatch(batch)
        await until(lambda: len(Gate.begun) == slots)
        high = await app.dispatch(urgent)
        await until(lambda: worker_of(app).activities.waiting > 0)
        Gate.open.release()
        assert (await app.wait_for(high, "20s")).unwrap() == 1000
        assert Gate.begun[slots] == 1000
        for _ in range(COUNT):
            Gate.open.release()
        assert (await app.wait_for(low, "20s")).unwrap() == sum(range(COUNT))
        await until(lambda: worker_of(app).activities.used == 0)
    assert sorted(Gate.begun) == [*range(COUNT), 1000]


async def test_a_page_that_gave_way_can_be_cancelled(database_url: str) -> None:
    """Its slot is given back once, not twice."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=1) as app:
        low = await app.dispatch(batch)
        await until(lambda: len(Gate.begun) == 1)
        high = await app.dispatch(lasting)
        await until(lambda: worker_of(app).activities.waiting > 0)
        Gate.open.release()
        await until(lambda: 2000 in Gate.begun)
        await app.cancel(low)
        outcome = await app.wait_for(low, "20s")
        assert isinstance(outcome.error, stent.ExecutionCancelledError)
        Gate.open.release()
        assert (await app.wait_for(high, "20s")).unwrap() == 2000
        await until(lambda: worker_of(app).activities.used == 0)
        assert (await app.wait_for(await app.dispatch(urgent), "20s")).is_ok()


async def test_a_page_that_gave_way_is_drained(database_url: str) -> None:
    """A worker that stops leaves the rest of its pages to others."""
    async with Stent(database_url) as client:
        app = await Stent.bootstrap(database_url, serve=True, max_concurrency=1)
        low = await client.dispatch(batch)
        await until(lambda: len(Gate.begun) == 1)
        high = await client.dispatch(lasting)
        await until(lambda: worker_of(app).activities.waiting > 0)
        Gate.open.release()
        await until(lambda: 2000 in Gate.begun)
        worker, closing = worker_of(app), asyncio.create_task(app.close())
        await until(lambda: worker.activities.handing_over)
        for _ in range(COUNT + 1):
            Gate.open.release()
        await closing
        assert Gate.begun == [0, 2000]
        async with Stent.bootstrap(database_url, serve=True):
            outcomes = [await client.wait_for(i, "20s") for i in (low, high)]
    assert [outcome.unwrap() for outcome in outcomes] == [sum(range(COUNT)), 2000]
    assert sorted(Gate.begun) == [*range(COUNT), 2000]


async def test_nobody_waits_for_a_slot_to_do_nothing(database_url: str) -> None:
    """A page ends although its helper has given way and finds no slot any more."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=2) as app:
        low = await app.dispatch(steps)
        await until(lambda: Gate.begun == [0, 1])
        high = await app.dispatch(lasting)
        await until(lambda: worker_of(app).activities.waiting > 0)
        Gate.steps[1].set()
        await until(lambda: 2000 in Gate.begun)
        for step in Gate.steps:
            step.set()
        assert (await app.wait_for(low, "20s")).unwrap() == sum(range(COUNT))
        await until(lambda: worker_of(app).activities.used == 1)
        Gate.open.release()
        assert (await app.wait_for(high, "20s")).unwrap() == 2000
        await until(lambda: worker_of(app).activities.used == 0)


async def test_what_waits_in_memory_is_paused(database_url: str) -> None:
    """Though it was claimed before: a free slot does not begin it."""
    async with Stent.bootstrap(
        database_url, serve=True, max_concurrency=1, queues=["default", "q"]
    ) as app:
        low = await app.dispatch(batch)
        await until(lambda: len(Gate.begun) == 1)
        high = await app.dispatch(urgent_in, "q")
        await until(lambda: worker_of(app).activities.waiting > 0)
        await app.pause(queue="q")
        await until(lambda: worker_of(app).limits.queue_paused("q"))
        for _ in range(COUNT):
            Gate.open.release()
        assert (await app.wait_for(low, "20s")).unwrap() == sum(range(COUNT))
        assert 1000 not in Gate.begun
        await app.resume(queue="q")
        assert (await app.wait_for(high, "20s")).unwrap() == 1000


async def test_a_pause_elsewhere_changes_nothing(database_url: str) -> None:
    """The more urgent passes also while another queue of the worker is paused."""
    async with Stent.bootstrap(
        database_url, serve=True, max_concurrency=1, queues=["default", "q"]
    ) as app:
        await app.pause(queue="q")
        await until(lambda: worker_of(app).limits.queue_paused("q"))
        low = await app.dispatch(batch)
        await until(lambda: len(Gate.begun) == 1)
        high = await app.dispatch(urgent)
        await until(lambda: worker_of(app).activities.waiting > 0)
        Gate.open.release()
        assert (await app.wait_for(high, "20s")).unwrap() == 1000
        assert Gate.begun[:2] == [0, 1000]
        for _ in range(COUNT):
            Gate.open.release()
        assert (await app.wait_for(low, "20s")).unwrap() == sum(range(COUNT))


@pytest.mark.parametrize("queues", [["default"], ["q", "other"]])
async def test_a_paused_queue_begins_no_item(
    database_url: str, queues: list[str]
) -> None:
    """Of a page that runs already, in a queue that nothing had limited."""
    queue = queues[0]
    async with Stent.bootstrap(
        database_url, serve=True, max_concurrency=2, queues=queues
    ) as app:
        low = await app.dispatch(batch_in, queue, queue=queue)
        await until(lambda: len(Gate.begun) == 2)
        await app.pause(queue=queue)
        await until(lambda: worker_of(app).limits.queue_paused(queue))
        for _ in range(COUNT):
            Gate.open.release()
        await until(lambda: worker_of(app).activities.used == 0)
        assert len(Gate.begun) == 2
        await app.resume(queue=queue)
        assert (await app.wait_for(low, "20s")).unwrap() == sum(range(COUNT))
