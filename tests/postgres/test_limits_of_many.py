"""Limits of workflows that wait out of memory, of many keys, and of versions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from asyncpg import Connection

import stent
from stent import Settings, Stent, durable
from stent.services.lanes import function_limit
from stent.store.session import Session
from stent.store.store import DeclaredLimit, Store

SOON = timedelta(milliseconds=50)
cleaned: list[int] = []


class Gate:
    """Lets a test hold activities of this module."""

    open: asyncio.Event
    begun: int


@pytest.fixture(autouse=True)
async def _fresh() -> None:
    cleaned.clear()
    Gate.open, Gate.begun = asyncio.Event(), 0


@durable
async def held(number: int) -> int:
    Gate.begun += 1
    await Gate.open.wait()
    return number


@durable(queue="elsewhere")
async def far(number: int) -> int:
    return number


@durable
async def waits_for_far(number: int) -> int:
    return await far(number)


@durable
async def refund(number: int) -> int:
    cleaned.append(number)
    return number


@durable
async def order(number: int) -> None:
    try:
        await stent.sleep("1h")
    except asyncio.CancelledError:
        await refund(number)
        raise


@durable(max_concurrent=1, concurrency_key="key")
async def keyed(key: str) -> str:
    if key != "z":
        await stent.sleep("1h")
    return key


@durable(rate_limit="50/s burst 1", kind="workflow")
async def rated_flow(number: int) -> int:
    return number


@durable(
    rate_limit="50/s burst 1",
    max_concurrent=1,
    concurrency_key="key",
    kind="workflow",
)
async def rated_by_key(key: str) -> str:
    return key


@durable
async def map_held(count: int) -> int:
    return len(await held.map(range(count), chunk=count, concurrency=1))


def evicting(database_url: str) -> Stent:
    settings = replace(Settings.from_env(), evict_after=SOON)
    return Stent.bootstrap(database_url, serve=True, settings=settings)


async def wait_until_parked(connection: Connection, count: int) -> None:
    while count != await connection.fetchval(  # noqa: ASYNC110 - a row
        "select count(*) from stent.executions"
        " where worker_id is null and started_at is not null and finished_at is null"
    ):
        await asyncio.sleep(0.02)


async def test_limit_that_came_later_holds_up_nothing_that_has_begun(
    database_url: str, connection: Connection
) -> None:
    """What waits out of memory is woken by its inbox, without any slot."""
    async with evicting(database_url) as app:
        waiting = await app.dispatch(waits_for_far, 3)
        await wait_until_parked(connection, 1)
        await app.set_limit(waits_for_far, max_concurrent=5)
        async with Stent.bootstrap(database_url, serve=True, queues=["elsewhere"]):
            assert (await app.wait_for(waiting, "15s")).unwrap() == 3
        asleep = await app.dispatch(order, 1)
        await wait_until_parked(connection, 1)
        await app.set_limit(order, max_concurrent=5)
        await app.cancel(asleep)
        assert (await app.wait_for(asleep, "15s")).is_err()
    assert cleaned == [1]


@pytest.mark.parametrize("pause", [{"queue": "default"}, {"function": order}])
async def test_what_is_paused_cleans_up_when_it_is_cancelled(
    database_url: str, connection: Connection, pause: dict[str, Any]
) -> None:
    """Also what left its worker's memory before."""
    async with evicting(database_url) as app:
        asleep = await app.dispatch(order, 7)
        await wait_until_parked(connection, 1)
        await app.pause(**pause)
        await app.cancel(asleep)
        assert (await app.wait_for(asleep, "15s")).is_err()
    assert cleaned == [7]


@pytest.mark.timeout(60)
async def test_a_thousand_full_keys_hide_no_other(
    database_url: str, connection: Connection
) -> None:
    """Those behind them are looked at next."""
    async with evicting(database_url) as app:
        full = [f"a{number:05}" for number in range(1100)]
        await app.dispatch_many(keyed, full)
        await wait_until_parked(connection, len(full))
        assert (await app.wait_for(await app.dispatch(keyed, "z"), "20s")).is_ok()


async def test_rated_workflows_start_as_their_tokens_come(database_url: str) -> None:
    """Not one a second, with the poll."""
    settings = replace(Settings.from_env(), poll_every=timedelta(hours=1))
    app = Stent.bootstrap(database_url, serve=True, settings=settings)
    async with app:
        ids = await app.dispatch_many(rated_flow, range(10))
        for execution_id in ids:
            assert (await app.wait_for(execution_id, "15s")).is_ok()
        keys = [f"k{number}" for number in range(10)]
        for execution_id in await app.dispatch_many(rated_by_key, keys):
            assert (await app.wait_for(execution_id, "15s")).is_ok()


@pytest.mark.parametrize("how", ["pause", "limit"])
async def test_limits_reach_pages_that_have_begun(database_url: str, how: str) -> None:
    """The next item waits."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        (worker,) = app._workers
        running = await app.dispatch(map_held, 5)
        while not Gate.begun:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
        if how == "pause":
            await app.pause(function=held)
        else:
            await app.set_limit(held, rate_limit="1/h")
        while worker.limits.lane("default", held.name) is None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        Gate.open.set()
        lane = worker.limits.lane("default", held.name)
        assert lane is not None
        while not lane.items:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert Gate.begun <= 2
        await app.cancel(running)


async def test_strictest_of_the_living_versions_holds(
    database_url: str, connection: Connection
) -> None:
    """A worker with old code lifts nothing; when its kind is gone, nothing is left."""
    name = function_limit("shop.f")
    session = Session(database_url, "test")
    store = Store(session)
    workers = [uuid4() for _ in range(3)]
    for worker in workers:
        await connection.execute(
            "insert into stent.leases (worker_id, expires_at, liveness_key, host, pid,"
            " version, slots, queues)"
            " values ($1, now() + interval '1 hour', 1, 'h', 1, 'v', 1, '{}')",
            worker,
        )
        await connection.execute(
            "insert into stent.worker_functions values ($1, array['shop.f'])", worker
        )

    async def holds() -> list[int | None]:
        await store.settle_declared_limits()
        return [limit.max_concurrent for limit in await store.load_limits()]

    try:
        await store.declare_limits(
            workers[0], [DeclaredLimit(name, 5, None, None, keyed=False)]
        )
        await store.declare_limits(
            workers[1], [DeclaredLimit(name, 2, None, None, keyed=False)]
        )
        await store.declare_limits(workers[2], [])
        assert await holds() == [2]
        end = "update stent.leases set state = 'stopped' where worker_id = $1"
        await connection.execute(end, workers[1])
        assert await holds() == [5]
        await connection.execute(end, workers[0])
        assert await holds() == []
    finally:
        await session.close()
