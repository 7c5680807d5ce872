"""Who is next when a worker has a slot: turns, what went back, drains."""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from stent import Settings, Stent, durable
from stent.services.lanes import function_limit
from stent.services.limits import ASK_SECONDS_MIN

if TYPE_CHECKING:
    from asyncpg import Connection

    from stent.worker import Worker

POLL_SECONDS = 0.005
STEP_SECONDS = 0.02
order: list[str] = []


class Gate:
    """Holds those that are told to wait for it."""

    open: asyncio.Event
    running: int


@pytest.fixture(autouse=True)
async def _fresh() -> None:
    order.clear()
    Gate.open, Gate.running = asyncio.Event(), 0


async def wait_a_while(name: str) -> None:
    order.append(name)
    await asyncio.sleep(STEP_SECONDS)


async def wait_at_gate(name: str) -> None:
    order.append(name)
    Gate.running += 1
    await Gate.open.wait()
    Gate.running -= 1


@durable(max_concurrent_per_worker=1, kind="activity")
async def one_here(name: str) -> None:
    await wait_a_while(name)


@durable(max_concurrent=1, kind="activity")
async def one_anywhere(name: str, *, held: bool) -> None:
    await (wait_at_gate(name) if held else wait_a_while(name))


@durable(rate_limit="10000/s", kind="activity")
async def rated(name: str) -> None:
    await wait_a_while(name)


@durable(rate_limit="100/s burst 100", kind="activity")
async def rated_and_held(name: str) -> None:
    await wait_at_gate(name)


@durable(kind="activity")
async def unlimited(name: str) -> None:
    await wait_a_while(name)


@durable(kind="activity")
async def item(number: int) -> int:
    await wait_at_gate(str(number))
    return number


@durable
async def all_items(count: int) -> int:
    return sum(await item.map(range(count), chunk=count))


async def until(condition: Any) -> None:
    """The test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - activities have no events for tests
        await asyncio.sleep(POLL_SECONDS)


def worker_of(app: Stent) -> Worker:
    (worker,) = app._workers
    return worker


def rarely_polling() -> Settings:
    """What no hint tells it a worker learns too late for a test."""
    return replace(Settings.from_env(), poll_every=dt.timedelta(seconds=50))


async def test_queues_take_turns_at_the_slots_of_a_worker(database_url: str) -> None:
    """A call in one queue does not wait for all that came earlier in another."""
    async with Stent.bootstrap(database_url, serve=True, queues=["a", "b"]) as app:
        many = [await app.dispatch(one_here.options(queue="a"), "a") for _ in range(60)]
        await until(lambda: len(order) >= 5)
        last = await app.dispatch(one_here.options(queue="b"), "b")
        for execution_id in (last, *many):
            await app.wait_for(execution_id)
    assert order.index("b") < 40


async def test_what_went_back_is_looked_for_when_a_slot_is_free(
    database_url: str, connection: Connection
) -> None:
    """It waited for a slot for so long that others were to have it."""
    given_back = (
        "select count(*) from stent.tasks"
        " where queue = 'b' and epoch > 0 and worker_id is null"
    )
    async with Stent.bootstrap(
        database_url, serve=True, settings=rarely_polling(), queues=["a", "b"]
    ) as app:
        first = await app.dispatch(one_anywhere.options(queue="a"), "a", held=True)
        await until(lambda: Gate.running == 1)
        last = await app.dispatch(one_anywhere.options(queue="b"), "b", held=False)
        while not await connection.fetchval(given_back):  # noqa: ASYNC110 - in the database
            await asyncio.sleep(POLL_SECONDS)
        Gate.open.set()
        await app.wait_for(first)
        assert (await app.wait_for(last, "20s")).ok


async def test_unlimited_work_takes_turns_with_limited(database_url: str) -> None:
    """The limit allows more than the worker has slots."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=2) as app:
        many = await asyncio.gather(*[app.dispatch(rated, "r") for _ in range(200)])
        await until(lambda: len(order) >= 20)
        begun = len(order)
        await app.wait_for(await app.dispatch(unlimited, "unlimited"))
        # By then it has been claimed, and each has had a turn or two.
        assert order.index("unlimited") - begun < 60
        for execution_id in many:
            await app.wait_for(execution_id)


async def test_who_waits_for_nothing_does_not_look_all_the_time(
    database_url: str,
) -> None:
    """A call with a rate that runs leaves nothing to be asked."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(rated_and_held, "rated")
        await until(lambda: Gate.running == 1)
        limits = worker_of(app).limits
        await until(lambda: limits._pause() > 10 * ASK_SECONDS_MIN)
        Gate.open.set()
        await app.wait_for(execution_id)


async def test_a_longer_retry_after_is_kept_while_another_is_written(
    database_url: str, connection: Connection
) -> None:
    name = function_limit(rated.name)
    closed = (
        "select coalesce(closed_until > now() + interval '9 minutes', false)"
        " from stent.limits where name = $1"
    )
    waits = "select exists (select from pg_catalog.pg_locks where not granted)"
    async with Stent.bootstrap(database_url, serve=True) as app:
        limits = worker_of(app).limits
        async with connection.transaction():
            await connection.execute(
                "select from stent.limits where name = $1 for update", name
            )
            limits.close("default", rated.name, dt.timedelta(seconds=1))
            while not await connection.fetchval(waits):  # noqa: ASYNC110 - in the database
                await asyncio.sleep(POLL_SECONDS)
            limits.close("default", rated.name, dt.timedelta(minutes=10))
        while not await connection.fetchval(closed, name):  # noqa: ASYNC110 - in the database
            await asyncio.sleep(POLL_SECONDS)


async def test_a_draining_worker_leaves_the_items_of_a_page_to_others(
    database_url: str,
) -> None:
    """Those that run end; nothing runs twice."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=3) as app:
        execution_id = await app.dispatch(all_items, 20)
        await until(lambda: Gate.running == 3)
        worker, drained = worker_of(app), asyncio.create_task(app.drain())
        await until(lambda: worker.activities.handing_over)
        Gate.open.set()
        await drained
    assert len(order) == 3
    async with Stent.bootstrap(database_url, serve=True) as app:
        assert (await app.wait_for(execution_id)).unwrap() == sum(range(20))
    assert len(order) == 20


async def test_a_draining_worker_tells_who_waits_for_its_slots(
    database_url: str,
) -> None:
    """The other one looks rarely, and has asked in vain."""
    async with (
        Stent.bootstrap(database_url, serve=True, queues=["a"]) as app,
        Stent.bootstrap(
            database_url, serve=True, settings=rarely_polling(), queues=["b"]
        ) as other,
    ):
        await app.dispatch(one_anywhere.options(queue="a"), "a", held=True)
        await until(lambda: Gate.running == 1)
        last = await other.dispatch(one_anywhere.options(queue="b"), "b", held=False)
        asked = worker_of(other).limits
        await until(lambda: any(limit.asked for limit in asked._limits.values()))
        worker, drained = worker_of(app), asyncio.create_task(app.drain())
        await until(lambda: worker.activities.handing_over)
        Gate.open.set()
        await drained
        assert (await other.wait_for(last, "15s")).ok
