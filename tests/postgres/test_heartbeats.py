"""What an attempt said of its progress reaches the next one."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

import stent
from stent import Stent
from stent.codec import decode, encode
from tests import pools
from tests.pools import lines

if TYPE_CHECKING:
    from asyncpg import Connection

pytestmark = pytest.mark.timeout(60)


async def test_last_heartbeat_reaches_the_next_attempt(database_url: str) -> None:
    """From a coroutine and from a thread, the latest of many, of the attempt before."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(pools.beats, 50))
    assert list(outcome.unwrap()) == [[3, [2, 49]]] * 2


async def test_next_attempt_may_be_on_another_worker(
    database_url: str, connection: Connection
) -> None:
    """It was written before the next attempt could be claimed."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        first = await app.dispatch(pools.beat_and_fail, 5)
        await connection.execute("select 1")
        async with Stent.bootstrap(database_url, serve=True) as other:
            outcome = await other.wait_for(first)
    assert outcome.unwrap() == [3, [2, 4]]
    rows = await connection.fetch("select attempt, payload from stent.heartbeats")
    assert [(r["attempt"], decode(r["payload"])) for r in rows] == [(2, [2, 4])]


async def test_items_of_a_map_have_their_own(database_url: str) -> None:
    """Within one page as well."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(pools.map_beats, 4))
    assert outcome.unwrap() == [["item", n] for n in range(4)]


async def test_who_looks_sees_how_far_it_has_come(
    database_url: str, tmp_path: Path
) -> None:
    """Of a call, of a page of a map, and of an activity that was dispatched."""
    until = tmp_path / "until"
    async with Stent.bootstrap(database_url, serve=True) as app:
        flow = await app.dispatch(pools.beat_and_wait_in_workflow, str(until))
        own = await app.dispatch(pools.beat_and_wait, 3, str(until))

        async def said(execution_id: str) -> set[str]:
            state = await app.state_of(execution_id)
            found = [
                re.search(r"heartbeat .* ago: (.*)\)?$", s) for s in state.waiting_for
            ]
            return {match[1].rstrip(")") for match in found if match}

        while await said(flow) != {'{"row": 1}', '{"row": 2}'}:  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.01)
        while await said(own) != {'{"row": 3}'}:  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.01)
        until.touch()
        assert (await app.wait_for(flow)).unwrap() == 3
        assert (await app.wait_for(own)).unwrap() == 3
        assert await said(flow) == await said(own) == set()


async def test_heartbeat_of_a_cancelled_attempt_raises(
    database_url: str, tmp_path: Path
) -> None:
    """So a thread that only says how far it is ends as well."""
    path = tmp_path / "log"
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(pools.beat_until_cancelled, str(path))
        while not lines(path):  # noqa: ASYNC110 - a file has no events
            await asyncio.sleep(0.01)
        await app.cancel(execution_id)
        await app.wait_for(execution_id)
        while lines(path)[-1] != ["cancelled"]:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.01)


async def test_it_is_refused_where_it_has_no_meaning(database_url: str) -> None:
    """In a workflow; and details that are no details any more."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(pools.beat_in_workflow))
        too_much = await app.wait_for(await app.dispatch(pools.beat_too_much))
    assert isinstance(outcome.error, stent.UsageError)
    assert isinstance(too_much.error, stent.PayloadError)
    assert "heartbeat details" in str(too_much.error)


async def test_outside_of_an_execution_nothing_happens() -> None:
    """Activities can be tested as plain functions."""
    stent.heartbeat({"any": "thing"})
    stent.raise_if_cancelled()
    stent.raise_if_cancelled(wait="1ms")


async def test_heartbeats_that_nobody_will_read_are_deleted(
    database_url: str, connection: Connection
) -> None:
    """Those of calls with a result, and of executions that have ended or are gone."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.wait_for(await app.dispatch(pools.beat_and_fail, 1))
        await add_heartbeat(connection, uuid4())
        assert await connection.fetchval("select count(*) from stent.heartbeats") == 2
        (worker,) = app._workers
        await worker.duties.tidy()
    assert await connection.fetchval("select count(*) from stent.heartbeats") == 0


async def test_heartbeats_of_work_under_way_are_kept(
    database_url: str, connection: Connection
) -> None:
    """Of calls without a result, whether or not there is a task."""
    async with Stent.bootstrap(database_url, serve=True, queues=["other"]) as app:
        execution_id = await app.dispatch(pools.beat_and_fail, 1)
        await add_heartbeat(connection, UUID(execution_id))
        (worker,) = app._workers
        await worker.duties.tidy()
        assert await connection.fetchval("select count(*) from stent.heartbeats") == 1


async def test_stale_worker_writes_no_heartbeat(
    database_url: str, connection: Connection
) -> None:
    """Neither under an old incarnation, nor for a task of another epoch."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        (worker,) = app._workers
        execution_id, call_id = uuid4(), uuid4()
        await connection.execute(
            "insert into stent.tasks (execution_id, call_id, address, function, queue,"
            " worker_id, incarnation, epoch)"
            " values ($1, $2, '', 'nobody', 'nowhere', $3, 1, 4)",
            *(execution_id, call_id, worker.worker_id),
        )
        payload = encode("details")
        for incarnation, epoch in ((7, 4), (1, 3), (1, None)):
            await worker._store.write_heartbeats(
                worker.worker_id,
                incarnation,
                [(execution_id, call_id, call_id, epoch, 1, payload)],
            )
        count = "select count(*) from stent.heartbeats"
        assert await connection.fetchval(count) == 0
        await worker._store.write_heartbeats(
            worker.worker_id, 1, [(execution_id, call_id, call_id, 4, 1, payload)]
        )
        assert await connection.fetchval(count) == 1


async def add_heartbeat(connection: Connection, execution_id: UUID) -> None:
    await connection.execute(
        "insert into stent.heartbeats"
        " (execution_id, call_id, task_id, attempt, payload)"
        " values ($1, $2, $2, 1, '')",
        *(execution_id, uuid4()),
    )
