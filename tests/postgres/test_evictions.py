"""Executions that wait are let go of, and come back when they have something to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

import stent
from stent import Settings, Stent, durable
from stent.log import get_logger
from stent.services import evictions
from stent.worker import Worker

log = get_logger("tests.evictions")
HOUR = timedelta(hours=1)
lives: list[str] = []


@durable
async def answer(value: int) -> int:
    return value


@durable(queue="elsewhere")
async def remote(value: int) -> int:
    return value + 1


@durable
async def sleeper(duration: str) -> int:
    await stent.sleep(duration)
    return await answer(7)


@durable
async def waits_for_remote(value: int) -> int:
    return await remote(value)


@durable
async def chain(count: int) -> int:
    total = 0
    for _ in range(count):
        first, second = await asyncio.gather(remote(total), remote(0))
        total = first + second - 1
    return total


@durable
async def cleans_up_with_calls() -> int:
    try:
        return await remote(1)
    finally:
        lives.append("finally")
        log.warning("cleaning.up")
        try:
            stent.tell("from the finally of what was let go of")
        except Exception:  # noqa: BLE001 - what must not catch it
            lives.append("caught")
        await answer(1)


@durable
async def parent_of_remote(value: int) -> int:
    return await waits_for_remote.options(queue="children")(value)


def settings(url: str, **others: object) -> Settings:
    """Nothing is found by polling, and nothing is let go of by itself."""
    return Settings(database_url=url, poll_every=HOUR, evict_after=HOUR, **others)  # type: ignore[arg-type]


def worker_of(app: Stent) -> Worker:
    (worker,) = app._workers
    return worker


async def evict_all(
    connection: asyncpg.Connection, worker: Worker, ids: list[str]
) -> None:
    """Let go of these as soon as they wait, as if they had waited for long."""
    wanted = [UUID(i) for i in ids]
    query = (
        "select count(*) from stent.executions"
        " where execution_id = any($1) and worker_id is null"
        " and started_at is not null and finished_at is null"
    )
    while await connection.fetchval(query, wanted) < len(wanted):
        evict_now(worker)
        await asyncio.sleep(0)


def evict_now(worker: Worker, resident_max: int = 10_000) -> int:
    """Let go as if the settings said: of everything, or of what is too much."""
    identity = worker.executions._identity
    own, identity.settings = (
        identity.settings,
        Settings(
            database_url=identity.settings.database_url,
            evict_after=timedelta(microseconds=1),
            resident_max=resident_max,
        ),
    )
    try:
        return worker.executions.evict()
    finally:
        identity.settings = own


async def test_what_sleeps_for_long_is_let_go_of_and_wakes(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """It has no owner while it sleeps; then it is claimed, replayed and ends."""
    configured = Settings(database_url=database_url, evict_after=timedelta(seconds=0.3))
    async with Stent.bootstrap(settings=configured, serve=True) as app:
        execution_id = await app.dispatch(sleeper, "3s")
        await wait_until_unowned(connection, execution_id)
        assert UUID(execution_id) not in worker_of(app).executions.residents
        assert (await app.wait_for(execution_id)).unwrap() == 7
        epoch = await connection.fetchval(
            "select epoch from stent.executions where execution_id = $1",
            UUID(execution_id),
        )
    # Claimed, let go of, claimed, ended.
    assert epoch == 4


async def test_a_result_wakes_it_at_once(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """The worker that settles a call of an unowned execution has it claimed."""
    async with Stent.bootstrap(settings=settings(database_url), serve=True) as app:
        ids = [await app.dispatch(waits_for_remote, n) for n in range(3)]
        await evict_all(connection, worker_of(app), ids)
        async with (
            Stent(settings=settings(database_url)) as other,
            serving(other, "elsewhere"),
        ):
            values = [(await app.wait_for(i)).unwrap() for i in ids]
    assert values == [1, 2, 3]


async def test_a_child_wakes_its_parent_at_once(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """So does the end of a child elsewhere."""
    async with Stent.bootstrap(settings=settings(database_url), serve=True) as app:
        execution_id = await app.dispatch(parent_of_remote, 4)
        await evict_all(connection, worker_of(app), [execution_id])
        async with (
            Stent(settings=settings(database_url)) as other,
            serving(other, "elsewhere", "children"),
        ):
            assert (await app.wait_for(execution_id)).unwrap() == 5


async def test_cancelling_wakes_it_at_once(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """A cancellation reaches what nobody owns."""
    async with Stent.bootstrap(settings=settings(database_url), serve=True) as app:
        execution_id = await app.dispatch(sleeper, "1h")
        await evict_all(connection, worker_of(app), [execution_id])
        assert await app.cancel(execution_id)
        outcome = await app.wait_for(execution_id)
    assert isinstance(outcome.error, stent.ExecutionCancelledError)


async def test_closing_has_no_durable_effect(
    database_url: str,
    connection: asyncpg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Synchronous code of a finally runs; calls, tells and logs do nothing."""
    lives.clear()
    caplog.set_level(logging.DEBUG)
    async with Stent.bootstrap(settings=settings(database_url), serve=True) as app:
        execution_id = await app.dispatch(cleans_up_with_calls)
        await wait_for_task(connection, execution_id)
        worker = worker_of(app)
        await wait_until_idle(worker)
        # It is let go of for want of room only.
        assert evict_now(worker) == 0
        while UUID(execution_id) in worker.executions.residents:
            evict_now(worker, resident_max=1)
            await asyncio.sleep(0)
        assert lives == ["finally"]
        assert "cleaning.up" not in caplog.text
        written = await connection.fetchval("select count(*) from stent.tells")
        assert written == 0
        async with (
            Stent(settings=settings(database_url)) as other,
            serving(other, "elsewhere"),
        ):
            assert (await app.wait_for(execution_id)).unwrap() == 2
    assert lives == ["finally", "finally"]
    assert await connection.fetchval("select count(*) from stent.tells") == 1


async def test_the_least_recently_used_goes_first(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Those that clean up go after those that do not, however long they wait."""
    async with Stent.bootstrap(settings=settings(database_url), serve=True) as app:
        cleaning = await app.dispatch(cleans_up_with_calls)
        await wait_for_task(connection, cleaning)
        older = await app.dispatch(waits_for_remote, 1)
        await wait_for_task(connection, older)
        newer = await app.dispatch(waits_for_remote, 2)
        await wait_for_task(connection, newer)
        residents = worker_of(app).executions.residents
        await wait_until_idle(worker_of(app))
        moment = evictions.Moment(
            monotonic=asyncio.get_running_loop().time() + 10,
            now_us=0,
            evict_after=HOUR,
            surplus=2,
        )
        chosen = evictions.choose(residents.values(), moment)
        everybody = evictions.choose(
            residents.values(),
            evictions.Moment(
                monotonic=moment.monotonic, now_us=0, evict_after=HOUR, surplus=9
            ),
        )
    assert [str(r.execution_id) for r in chosen] == [older, newer]
    assert [str(r.execution_id) for r in everybody] == [older, newer, cleaning]


async def test_waiting_executions_obey_the_limit(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """A hundred sleepers pass through a worker that keeps ten."""
    configured = Settings(database_url=database_url, resident_max=10)
    most = 0
    async with Stent.bootstrap(settings=configured, serve=True) as app:
        residents = worker_of(app).executions.residents
        await app.dispatch_many(sleeper, ["1h"] * 40)
        query = (
            "select count(*) from stent.executions"
            " where started_at is not null and worker_id is null"
        )
        while await connection.fetchval(query) < 30:
            most = max(most, len(residents))
    assert 0 < most <= 10


@pytest.mark.timeout(60)
async def test_letting_go_races_with_results(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Whatever is let go of while its results come: nothing is lost or repeated."""
    async with Stent.bootstrap(settings=settings(database_url), serve=True) as app:
        async with (
            Stent(settings=settings(database_url)) as other,
            serving(other, "elsewhere"),
        ):
            ids = [await app.dispatch(chain, 5) for _ in range(60)]
            evicting = asyncio.ensure_future(evict_for_ever(worker_of(app)))
            values = [(await app.wait_for(i)).unwrap() for i in ids]
            evicting.cancel()
        epochs = await connection.fetchval("select sum(epoch) from stent.executions")
        left = await connection.fetchval("select count(*) from stent.inbox")
    assert values == [5] * 60
    # Two changes of owner are the least: many were let go of again and again.
    assert epochs > 3 * 60
    assert left == 0


@asynccontextmanager
async def serving(app: Stent, *queues: str) -> AsyncIterator[None]:
    """A worker for these queues beside the body."""
    serving = asyncio.ensure_future(app.serve(queues=queues))
    try:
        yield
    finally:
        await app.drain()
        await serving


async def wait_until_idle(worker: Worker) -> None:
    residents = worker.executions.residents
    while not all(r.idle_since and not r.flushing for r in residents.values()):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)


async def wait_until_unowned(connection: asyncpg.Connection, execution_id: str) -> None:
    query = (
        "select started_at is not null and worker_id is null"
        " from stent.executions where execution_id = $1"
    )
    while not await connection.fetchval(query, UUID(execution_id)):  # noqa: ASYNC110 - in the database
        await asyncio.sleep(0.01)


async def wait_for_task(connection: asyncpg.Connection, execution_id: str) -> None:
    query = "select count(*) from stent.tasks where execution_id = $1"
    while not await connection.fetchval(query, UUID(execution_id)):  # noqa: ASYNC110 - in the database
        await asyncio.sleep(0.01)


async def evict_for_ever(worker: Worker) -> None:
    while True:
        evict_now(worker)
        await asyncio.sleep(0)
