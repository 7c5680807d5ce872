"""A worker with threads, processes and heartbeats is killed for real."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import asyncpg
import pytest

from stent import Stent
from stent.codec import decode
from tests.e2e.harness import workload
from tests.e2e.harness.fleet import Fleet, wait_until
from tests.pools import exists

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("form", ["beat_inline", "beat_as_task", "beat_in_process"])
async def test_next_attempt_sees_what_a_killed_worker_wrote(
    database_url: str, tmp_path: Path, form: str
) -> None:
    """Details that were in the database at the kill, or later ones, are seen."""
    function = getattr(workload, form)
    async with Stent(database_url) as app, Fleet(tmp_path) as fleet:
        first = await fleet.start(url=database_url)
        execution_id = await app.dispatch(function, str(tmp_path / "over"))
        written = await wait_for_heartbeat(database_url)
        await first.kill()
        said = max(r.number for r in fleet.ledger.records("beat"))
        (tmp_path / "over").touch()
        await fleet.start(url=database_url)
        seen = (await app.wait_for(execution_id)).unwrap()
    assert written <= seen <= said


async def wait_for_heartbeat(url: str) -> int:
    """Until one of some age is in the database; what it says."""
    connection = await asyncpg.connect(url)
    try:
        while True:
            payload = await connection.fetchval("select payload from stent.heartbeats")
            if payload is not None and decode(payload) > 0:
                return int(decode(payload))
            await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def test_processes_end_with_a_killed_worker(
    database_url: str, tmp_path: Path
) -> None:
    """Busy and idle ones, and what they started; the work is done elsewhere."""
    async with Stent(database_url) as app, Fleet(tmp_path) as fleet:
        first = await fleet.start(url=database_url)
        execution_id = await app.dispatch(workload.compute, str(tmp_path / "over"))
        await wait_until(lambda: bool(fleet.ledger.records("computes")))
        (record,) = fleet.ledger.records("computes")
        assert record.parent == first.pid
        await first.kill()
        (tmp_path / "over").touch()
        await wait_until(lambda: not exists(record.pid))
        await fleet.start(url=database_url)
        assert (await app.wait_for(execution_id)).unwrap() == "computed"


async def test_stopped_worker_leaves_no_process(
    database_url: str, tmp_path: Path
) -> None:
    """SIGTERM reaches all of a service at once: the call is finished first."""
    async with Stent(database_url) as app, Fleet(tmp_path) as fleet:
        worker = await fleet.start(url=database_url)
        execution_id = await app.dispatch(workload.compute, str(tmp_path / "over"))
        await wait_until(lambda: bool(fleet.ledger.records("computes")))
        (record,) = fleet.ledger.records("computes")
        os.kill(record.pid, signal.SIGTERM)
        worker.signal(signal.SIGTERM)
        await wait_until(lambda: bool(worker.lines("worker.drain_started")))
        (tmp_path / "over").touch()
        assert await worker.wait() == 0
        assert not exists(record.pid)
        await fleet.start(url=database_url)
        assert (await app.wait_for(execution_id)).unwrap() == "computed"
        assert len(fleet.ledger.records("computes")) == 1
