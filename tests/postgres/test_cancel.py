"""Cancellation: who hears of it, when, and what becomes of what was started."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

import stent
from stent import Result, Settings, Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

happened: list[str] = []
SHORT = replace(Settings(), cancel_grace=timedelta(milliseconds=300))


class Gate:
    """Lets a test hold activities of this module."""

    reached: asyncio.Event
    let_go: asyncio.Event


@pytest.fixture(autouse=True)
async def _fresh() -> None:
    happened.clear()
    Gate.reached, Gate.let_go = asyncio.Event(), asyncio.Event()


@durable
async def quick(x: int) -> int:
    return x


@durable
async def hold(name: str) -> str:
    Gate.reached.set()
    try:
        await Gate.let_go.wait()
    except asyncio.CancelledError:
        happened.append(f"{name} stopped")
        raise
    return name


@durable
async def wait_on(name: str) -> str:
    return await hold(name)


@durable
async def sleepy() -> None:
    await stent.sleep("1h")


@durable
async def parent_of_all() -> None:
    await sleepy.start()
    await sleepy.options(queue="nobody").start()
    await asyncio.gather(wait_on("child"), hold("activity"), sleepy())


@durable
async def record_start(name: str) -> None:
    happened.append(f"{name} started")


@durable
async def late_child() -> None:
    await record_start("child")


@durable
async def parent_of_late_child() -> None:
    await late_child.options(queue="later").start()
    await stent.sleep("1h")


@durable
async def stubborn() -> str:
    try:
        await stent.sleep("1h")
    except asyncio.CancelledError:
        happened.append("heard")
    return "anyway"


@durable
async def cleans_for_ever() -> None:
    try:
        await stent.sleep("1h")
    finally:
        await stent.sleep("1h")


@durable
async def detaching() -> str:
    handle = await sleepy.options(detached=True).start()
    identifier: str = handle.id
    return identifier


@durable
async def cancels_its_child() -> str:
    handle = await wait_on.start("child")
    await stent.sleep("50ms")
    handle.cancel()
    try:
        await handle.result()
    except asyncio.CancelledError:
        return "cancelled the child"
    return "?"


async def status(connection: Connection, execution_id: str) -> str:
    sql = "select status from stent.executions where execution_id = $1"
    found: str = await connection.fetchval(sql, UUID(execution_id))
    return found


async def until_status(connection: Connection, execution_id: str, wanted: str) -> None:
    while await status(connection, execution_id) != wanted:  # noqa: ASYNC110 - the state of others
        await asyncio.sleep(0.01)


async def test_pending_execution_ends_at_once(
    database_url: str, connection: Connection
) -> None:
    """Nothing has to run for it."""
    async with Stent(database_url) as app:
        identifier = await app.dispatch(quick, 1, delay="1h")
        assert await app.cancel(identifier)
        assert await status(connection, identifier) == "cancelled"
        outcome = await app.wait_for(identifier, "10s")
        assert isinstance(outcome.error, stent.ExecutionCancelledError)
        assert not await app.cancel(identifier)


async def test_running_activity_stops(database_url: str) -> None:
    """A dispatched activity's code is cancelled."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(hold, "a")
        await Gate.reached.wait()
        assert await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "10s")
        assert isinstance(outcome.error, stent.ExecutionCancelledError)
        while happened != ["a stopped"]:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)


async def test_finished_execution_is_left_alone(
    database_url: str, connection: Connection
) -> None:
    """Cancelling it is answered with False and changes nothing."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(quick, 5)
        assert await app.wait_for(identifier, "10s") == Result.Ok(5)
        assert not await app.cancel(identifier)
        assert await app.wait_for(identifier, "10s") == Result.Ok(5)
    assert await status(connection, identifier) == "completed"


async def test_what_it_started_follows(
    database_url: str, connection: Connection
) -> None:
    """Children wherever they are, and activities, inline or not."""
    async with (
        Stent.bootstrap(database_url, serve=True, max_concurrency=2) as app,
        Stent.bootstrap(database_url, serve=True, max_concurrency=2),
    ):
        identifier = await app.dispatch(parent_of_all)
        await Gate.reached.wait()
        assert await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "10s")
        assert isinstance(outcome.error, stent.ExecutionCancelledError)
        sql = "select count(*) from stent.executions where status <> 'cancelled'"
        while await connection.fetchval(sql):  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.02)
        while "activity stopped" not in happened:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.02)


async def test_no_child_starts_after_its_parent_has_ended(
    database_url: str, connection: Connection
) -> None:
    """A child nobody has claimed ends with its parent, in the same transaction."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(parent_of_late_child)
        sql = "select count(*) from stent.executions"
        while await connection.fetchval(sql) < 2:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
        assert await app.cancel(identifier)
        await app.wait_for(identifier, "10s")
        rows = await connection.fetch("select status from stent.executions")
        assert [row["status"] for row in rows] == ["cancelled", "cancelled"]
        async with Stent.bootstrap(database_url, serve=True, queues=["later"]) as later:
            await later.wait_for(await later.dispatch(quick, 1, queue="later"), "10s")
    assert happened == []


async def test_root_that_returns_anyway_is_cancelled(
    database_url: str, connection: Connection
) -> None:
    """Its value is kept in the history."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(stubborn)
        await until_status(connection, identifier, "running")
        assert await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "10s")
    assert isinstance(outcome.error, stent.ExecutionCancelledError)
    assert happened == ["heard"]
    kept = await connection.fetchval(
        "select stent.plain(payload) from stent.results where address = '#returned'"
    )
    assert kept == '"anyway"'


async def test_clean_up_longer_than_the_grace_is_ended(
    database_url: str, connection: Connection
) -> None:
    """By whoever looks first; a second cancellation changes nothing."""
    async with Stent.bootstrap(database_url, serve=True, settings=SHORT) as app:
        identifier = await app.dispatch(cleans_for_ever)
        await until_status(connection, identifier, "running")
        assert await app.cancel(identifier)
        assert await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "10s")
    assert isinstance(outcome.error, stent.ExecutionCancelledError)
    assert await connection.fetchval("select count(*) from stent.inbox") == 0


async def test_detached_child_survives(
    database_url: str, connection: Connection
) -> None:
    """It does not end with its parent."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        child = (await app.wait_for(await app.dispatch(detaching), "10s")).unwrap()
        await until_status(connection, child, "running")
        await app.wait_for(await app.dispatch(quick, 1), "10s")
        assert await status(connection, child) == "running"


async def test_handle_cancels_a_child(database_url: str) -> None:
    """From inside the parent, which goes on."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(cancels_its_child), "10s")
        assert outcome == Result.Ok("cancelled the child")
        while happened != ["child stopped"]:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)


async def test_one_winner_of_cancel_and_completion(
    database_url: str, connection: Connection
) -> None:
    """True means cancelled, False means completed, at whatever moment it comes."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        answers = {}
        for number in range(80):
            identifier = await app.dispatch(wait_or_not, number)
            for _ in range(number % 20):
                await asyncio.sleep(0)
            answers[identifier] = await app.cancel(identifier)
        for identifier, cancelled in answers.items():
            outcome = await app.wait_for(identifier, "10s")
            if cancelled:
                assert isinstance(outcome.error, stent.ExecutionCancelledError)
                assert await status(connection, identifier) == "cancelled"
            else:
                assert outcome.is_ok()
                assert await status(connection, identifier) == "completed"
        (worker,) = app._workers
        while worker.activities.used:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)


@durable
async def wait_or_not(number: int) -> int:
    for _ in range(number % 3):
        await quick(number)
    return number


async def test_cancel_of_another_process_is_heard(
    database_url: str, connection: Connection
) -> None:
    """Any client may cancel."""
    async with (
        Stent.bootstrap(database_url, serve=True) as app,
        Stent(database_url) as client,
    ):
        identifier = await app.dispatch(sleepy)
        await until_status(connection, identifier, "running")
        assert await client.cancel(identifier)
        outcome = await client.wait_for(identifier, "10s")
    assert isinstance(outcome.error, stent.ExecutionCancelledError)


async def test_nothing_is_left_behind(
    database_url: str, connection: Connection
) -> None:
    """No task, no inbox row, no slot outlives a cancelled execution."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=2) as app:
        ids = [await app.dispatch(parent_of_all) for _ in range(5)]
        await Gate.reached.wait()
        for identifier in ids:
            await app.cancel(identifier)
        for identifier in ids:
            await app.wait_for(identifier, "10s")
        (worker,) = app._workers
        left = (
            "select (select count(*) from stent.inbox)"
            " + (select count(*) from stent.tasks)"
        )
        while worker.activities.used or worker.claimer.held:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.02)
        while await connection.fetchval(left):
            await worker.duties.tidy()
        assert worker.executions._calls._inline == 0
