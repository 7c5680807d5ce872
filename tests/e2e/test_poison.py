"""What kills its worker each time is parked; what ran beside it is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from stent import ExecutionCancelledError, Status, Stent
from tests.e2e.harness import workload
from tests.e2e.harness.checks import prepare_effects
from tests.e2e.harness.fleet import Fleet, Process

KILLS = 4
"""The first loss does not count, three do."""


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    await prepare_effects(database_url)
    async with Stent(database_url) as app:
        yield app


async def keep_alive(
    fleet: Fleet, url: str, count: int, done: Awaitable[object]
) -> int:
    """Run ``count`` workers, a new one for each that ends; how many ended."""
    workers: list[Process] = [await fleet.start(url=url) for _ in range(count)]
    finished = asyncio.ensure_future(done)
    deaths = 0
    while True:
        ends = {asyncio.ensure_future(w.wait()): w for w in workers}
        await asyncio.wait([finished, *ends], return_when=asyncio.FIRST_COMPLETED)
        for end, worker in ends.items():
            if end.done() and not finished.done():
                deaths += 1
                workers.remove(worker)
                workers.append(await fleet.start(url=url, ready=False))
            end.cancel()
        if finished.done():
            await finished
            return deaths


@pytest.mark.timeout(90)
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_task_that_kills_is_parked_after_three(
    app: Stent, tmp_path: Path, workers: int
) -> None:
    """Its call fails and is a dead letter; calls and executions beside it complete."""
    async with Fleet(tmp_path) as fleet:
        execution_id = await app.dispatch(workload.poisoned, 6, 0.05)
        others = [await app.dispatch(workload.sequence, 8, 0.05) for _ in range(3)]

        async def results() -> list[object]:
            return [(await app.wait_for(i)).unwrap() for i in (execution_id, *others)]

        done = asyncio.ensure_future(results())
        deaths = await keep_alive(fleet, app.url, workers, done)
        outcome, *sums = await done
        attempts = [
            record
            for record in fleet.ledger.records("start")
            if "kills_its_worker" in str(record.facts["address"])
        ]
    assert outcome == ["WorkerLostError", *range(6)]
    assert sums == [56] * 3
    assert deaths == len(attempts) == KILLS
    connection = await asyncpg.connect(app.url)
    letters = await connection.fetch("select * from stent.dead_letters")
    await connection.close()
    assert [letter["function"] for letter in letters] == ["workload.kills_its_worker"]
    assert len(await workers_lost(app, execution_id)) == KILLS


async def workers_lost(app: Stent, execution_id: str) -> set[object]:
    """Those that the history names, while they ran the call inline or as a task."""
    lost = set()
    for entry in await app.history(execution_id):
        if entry.kind == "worker.lost":
            assert entry.address is None
            lost.add(entry.detail["worker"])
        elif entry.kind == "attempt.lost" and "kills_its" in str(entry.address):
            assert entry.detail["function"] == "workload.kills_its_worker"
            lost.add(entry.detail["worker"])
    return lost


@pytest.mark.timeout(90)
async def test_an_item_that_kills_fails_alone(app: Stent, tmp_path: Path) -> None:
    """Its page is taken apart when it was lost twice."""
    async with Fleet(tmp_path) as fleet:
        execution_id = await app.dispatch(workload.poisoned_map, 8)
        done = asyncio.ensure_future(app.wait_for(execution_id))
        deaths = await keep_alive(fleet, app.url, 1, done)
        results = (await done).unwrap()
    assert results == [0, 2, 4, "WorkerLostError", 8, 10, 12, 14]
    assert deaths == 2 + KILLS


@pytest.mark.timeout(90)
async def test_a_replay_that_kills_is_blocked_after_three(
    app: Stent, tmp_path: Path
) -> None:
    """It is blocked for other code; to cancel it costs no other worker."""
    connection = await asyncpg.connect(app.url)
    query = "select status from stent.executions where execution_id = $1"
    async with Fleet(tmp_path) as fleet:
        execution_id = await app.dispatch(workload.kills_in_replay)
        others = [await app.dispatch(workload.sequence, 8, 0.05) for _ in range(3)]

        async def wait_until_cancelled() -> list[object]:
            blocked, identifier = Status.BLOCKED, UUID(execution_id)
            while await connection.fetchval(query, identifier) != blocked:  # noqa: ASYNC110 - in the database
                await asyncio.sleep(0.02)
            state = await app.state_of(execution_id)
            assert "killed the worker" in " ".join(state.waiting_for)
            sums = [(await app.wait_for(i)).unwrap() for i in others]
            await app.cancel(execution_id)
            outcome = await app.wait_for(execution_id)
            assert isinstance(outcome.error, ExecutionCancelledError)
            return sums

        done = asyncio.ensure_future(wait_until_cancelled())
        deaths = await keep_alive(fleet, app.url, 2, done)
        sums = await done
    await connection.close()
    assert sums == [56] * 3
    assert deaths == KILLS
