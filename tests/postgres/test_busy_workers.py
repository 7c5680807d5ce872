"""Workers that are busy: they look for more, and keep nothing from others."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING

import asyncpg
import pytest

import stent
from stent import Settings, Stent, durable
from stent.store.listen import queue_channel

if TYPE_CHECKING:
    from asyncpg import Connection

POLL_SECONDS = 0.005
MANY = 20_000
"""So many that no test waits for them."""


class Gate:
    """Of one test."""

    open: asyncio.Event
    running = 0
    """Calls of ``held_up``."""
    cleaned = False


@pytest.fixture(autouse=True)
def gate() -> None:
    Gate.open, Gate.running, Gate.cleaned = asyncio.Event(), 0, False


@durable
async def brief(number: int) -> int:
    await asyncio.sleep(0.01)
    return number


@durable
async def busy_for_long() -> None:
    await asyncio.gather(*[brief(number) for number in range(MANY)])


@durable(kind="workflow")
async def another() -> str:
    await stent.sleep("1ms")
    return "done"


@durable(kind="activity")
async def held_up() -> None:
    Gate.running += 1
    await Gate.open.wait()


@durable(kind="activity")
async def clean_up() -> None:
    Gate.cleaned = True


@durable(kind="workflow")
async def cleans_up_behind_others(quick: int) -> None:
    """Its cleanup has to wait for a slot, in a worker that may have been quick."""
    try:
        await asyncio.gather(*[brief(number) for number in range(quick)])
        await never()
    finally:
        await asyncio.gather(*[brief(-number) for number in range(1, quick)])
        await asyncio.gather(*[held_up() for _ in range(4)], clean_up())


@durable(queue="nobody")
async def never() -> None:
    raise AssertionError


@durable(kind="workflow")
async def quick_then_slow() -> None:
    await asyncio.gather(*[brief(number) for number in range(200)])
    await asyncio.gather(*[held_up() for _ in range(40)])


async def test_executions_are_found_without_a_hint(database_url: str) -> None:
    """However many tasks wait, and whoever wakes the worker meanwhile."""
    settings = Settings(
        database_url=database_url, poll_every=dt.timedelta(milliseconds=50)
    )
    served = Stent.bootstrap(
        database_url, serve=True, max_concurrency=2, settings=settings
    )
    async with served as app, Stent(database_url) as client:
        client._hinter = None  # a hint that is lost, or a pooler between
        busy = await app.dispatch(busy_for_long)
        identifier = await client.dispatch(another)
        assert (await client.wait_for(identifier)).unwrap() == "done"
        await app.cancel(busy)
        assert (await app.wait_for(busy)).is_err()


async def test_closing_sends_the_last_hints(
    database_url: str, connection: Connection
) -> None:
    """A program that only dispatches ends at once: workers hear of it all the same."""
    heard = asyncio.Event()
    async with Stent(database_url):
        pass  # the schema is there
    listener = await asyncpg.connect(database_url)
    await listener.add_listener(queue_channel("default"), lambda *_: heard.set())
    async with Stent(database_url) as app:
        await app.dispatch(another)
    await heard.wait()
    await listener.close()


async def test_what_waits_for_long_goes_back(
    database_url: str, connection: Connection
) -> None:
    """Tasks that were fetched ahead, when it turned out that they take their time."""
    held = "select count(*) from stent.tasks where worker_id is not null"
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=4) as app:
        execution_id = await app.dispatch(quick_then_slow)
        (worker,) = app._workers
        while Gate.running < 4 or worker.activities.waiting:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        while await connection.fetchval(held) > 4:  # noqa: ASYNC110 - rows
            await asyncio.sleep(POLL_SECONDS)
        Gate.open.set()
        assert (await app.wait_for(execution_id)).ok


async def test_what_is_paused_goes_back(
    database_url: str, connection: Connection
) -> None:
    """Who waits until nothing runs must not wait for what has not begun."""
    held = "select count(*) from stent.tasks where worker_id is not null"
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=4) as app:
        busy = await app.dispatch(busy_for_long)
        while not await connection.fetchval(held):  # noqa: ASYNC110 - rows
            await asyncio.sleep(POLL_SECONDS)
        await app.pause(function=brief)
        while await connection.fetchval(held):  # noqa: ASYNC110 - rows
            await asyncio.sleep(POLL_SECONDS)
        await app.cancel(busy)
        assert (await app.wait_for(busy)).is_err()


async def test_a_limited_task_does_not_wait_behind_a_long_one(
    database_url: str, connection: Connection
) -> None:
    """What has a slot, and nothing more, is held."""
    held = "select count(*) from stent.tasks where worker_id is not null"
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.set_limit(held_up, max_concurrent=2)
        execution_id = await app.dispatch(quick_then_slow)
        while Gate.running < 2:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        while await connection.fetchval(held) > 2:  # noqa: ASYNC110 - rows
            await asyncio.sleep(POLL_SECONDS)
        (limit,) = [one for one in await app.limits() if one.name.endswith("held_up")]
        assert limit.held == 2
        Gate.open.set()
        assert (await app.wait_for(execution_id)).ok


async def test_what_goes_back_keeps_its_place(
    database_url: str, connection: Connection
) -> None:
    """It has waited longer than what came after it."""
    rows = "select count(*) from stent.tasks where function = $1"
    held = f"{rows} and worker_id is not null"
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=4) as app:
        execution_id = await app.dispatch(quick_then_slow)
        while await connection.fetchval(rows, held_up.name) < 30:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        (worker,) = app._workers
        while Gate.running < 4 or worker.activities.waiting:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        since = await connection.fetchval("select clock_timestamp()")
        await app.pause(function=held_up)
        while await connection.fetchval(held, held_up.name) > 4:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        later = f"{rows} and available_at > $2"
        assert await connection.fetchval(later, held_up.name, since) == 0
        await app.resume(function=held_up)
        Gate.open.set()
        assert (await app.wait_for(execution_id)).ok


@pytest.mark.parametrize("quick", [0, 200])
async def test_cleanup_despite_a_pause_is_not_given_back(
    database_url: str, quick: int
) -> None:
    """Nobody would run it: its function is paused for all but what was cancelled."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=4) as app:
        (worker,) = app._workers
        execution_id = await app.dispatch(cleans_up_behind_others, quick)
        while not await pending_of(app, execution_id, "never"):  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        await app.pause(function=clean_up)
        await app.cancel(execution_id)
        while Gate.running < 4:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        worker.activities.take_overdue(0)
        Gate.open.set()
        assert (await app.wait_for(execution_id)).is_err()
        assert Gate.cleaned


async def pending_of(app: Stent, execution_id: str, name: str) -> bool:
    state = await app.state_of(execution_id)
    return any(name in waits for waits in state.waiting_for)
