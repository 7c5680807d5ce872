"""Workers are killed, frozen, blocked and stopped; the work is done all the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from stent import Stent
from tests.e2e.harness import workload
from tests.e2e.harness.checks import (
    check_calls,
    check_effects,
    check_nothing_left,
    check_pasts,
    prepare_effects,
    read_committed,
)
from tests.e2e.harness.fleet import Fleet, say, wait_until
from tests.e2e.harness.killpoints import Position
from tests.e2e.harness.mix import Mix, expected_results

LEASE_SECONDS = 2.0


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    await prepare_effects(database_url)
    async with Stent(database_url) as app:
        yield app


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", [1, 2])
async def test_random_kills(app: Stent, tmp_path: Path, seed: int) -> None:
    """Two workers, one of them killed again and again, at moments of chance."""
    chance = random.Random(seed)
    say(f"seed {seed}")
    committed, lost = [], []
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        for _ in range(6):
            more = chance.randrange(1, 25)
            await fleet.wait_for_more("start", more, lambda: mix.done)
            if mix.done:
                await mix.dispatch()
            victim = chance.randrange(2)
            await workers[victim].kill()
            lost.append(workers[victim].pid)
            committed.append(await read_committed(app.url))
            workers[victim] = await fleet.start(url=app.url)
        assert await mix.results() == mix.expected
        committed.append(await read_committed(app.url))
        records = fleet.ledger.records()
        repeated = check_calls(records, committed=committed, lost=lost)
        lives = check_pasts(records)
        await check_nothing_left(app.url)
        for execution_id, rows in mix.inserted.items():
            await check_effects(app.url, execution_id, rows)
        say(f"{len(lost)} kills, {repeated} attempts repeated, {lives} lives")
        assert repeated > 0
        assert any(process.lines("worker.taken_over") for process in workers)


@pytest.mark.timeout(60)
async def test_frozen_worker_is_replaced_and_comes_back(
    app: Stent, tmp_path: Path
) -> None:
    """Frozen for longer than its lease, a worker changes nothing and then rejoins."""
    async with Fleet(tmp_path) as fleet:
        # It stops itself at a known place, with attempts running, waiting and ended.
        frozen = await fleet.start(
            url=app.url,
            lease=LEASE_SECONDS,
            number=6,
            position=Position.AFTER_EFFECT,
            victim="frozen",
        )
        execution_id = await app.dispatch(workload.sequence, 12, 0.05)
        fan_id = await app.dispatch(workload.fan_out, 12, 0.05)
        await wait_until(lambda: bool(fleet.ledger.records("hit")))
        other = await fleet.start(url=app.url, lease=LEASE_SECONDS)
        results = [await app.wait_for(i) for i in (execution_id, fan_id)]
        committed = await read_committed(app.url)
        frozen.resume()
        await wait_until(lambda: bool(frozen.lines("lease.lost")))
        await wait_for_incarnation(app.url, 2)
        assert await other.stop() == 0
        again = await app.wait_for(await app.dispatch(workload.sequence, 3))
        assert [r.unwrap() for r in (*results, again)] == [
            sum(2 * n for n in range(12)),
            sum(2 * n + 2 * (1000 + n) for n in range(12)),
            6,
        ]
        assert [line["reason"] for line in other.lines("worker.taken_over")] == [
            "lease"
        ]
        records = fleet.ledger.records()
        check_calls(records, committed=[committed], lost=[frozen.pid])
        check_pasts(records)
        assert records[-1].pid == frozen.pid
        await check_nothing_left(app.url)
        assert await frozen.stop() == 0


@pytest.mark.timeout(60)
async def test_worker_frozen_before_its_commit_is_replaced(
    app: Stent, tmp_path: Path
) -> None:
    """Locks of a transaction that nobody commits hold up nobody for long."""
    async with Fleet(tmp_path) as fleet:
        frozen = await fleet.start(
            url=app.url,
            lease=LEASE_SECONDS,
            number=2,
            position=Position.UNSYNCED,
            victim="frozen",
        )
        execution_id = await app.dispatch(workload.transactional, 3)
        await wait_until(lambda: bool(fleet.ledger.records("hit")))
        assert fleet.ledger.records("write")[-1].kind == "transaction"
        await fleet.start(url=app.url, lease=LEASE_SECONDS)
        assert (await app.wait_for(execution_id)).unwrap() == 6
        frozen.resume()
        await wait_until(lambda: bool(frozen.lines("lease.lost")))
        await check_effects(app.url, execution_id, 3)
        assert check_calls(fleet.ledger.records(), lost=[frozen.pid]) == 1
        assert await frozen.stop() == 0


@pytest.mark.timeout(60)
async def test_short_freeze_costs_nothing(app: Stent, tmp_path: Path) -> None:
    """Frozen for less than its lease, a worker keeps its work."""
    async with Fleet(tmp_path) as fleet:
        frozen = await fleet.start(url=app.url)
        execution_id = await app.dispatch(workload.sequence, 10, 0.02)
        await wait_until(lambda: len(fleet.ledger.records("end")) >= 3)
        frozen.suspend()
        other = await fleet.start(url=app.url)
        meanwhile = await app.wait_for(await app.dispatch(workload.fan_out, 20, 0.02))
        assert meanwhile.ok
        frozen.resume()
        assert (await app.wait_for(execution_id)).unwrap() == 90
        assert not other.lines("worker.taken_over")
        assert check_calls(fleet.ledger.records()) == 0
        check_pasts(fleet.ledger.records())


@pytest.mark.timeout(60)
async def test_blocked_loop_keeps_its_lease(app: Stent, tmp_path: Path) -> None:
    """An activity that blocks the loop for longer than the lease runs once."""
    async with Fleet(tmp_path) as fleet:
        blocked = await fleet.start(url=app.url, lease=LEASE_SECONDS)
        execution_id = await app.dispatch(workload.block_loop, LEASE_SECONDS + 1)
        await wait_until(lambda: bool(fleet.ledger.records("start")))
        other = await fleet.start(url=app.url, lease=LEASE_SECONDS)
        assert (await app.wait_for(execution_id)).unwrap() == "done"
        (warning,) = blocked.lines("loop.blocked")
        assert "in block_loop" in str(warning["blocked_at"])
        assert not other.lines("worker.taken_over")
        assert not blocked.lines("lease.lost")
        assert check_calls(fleet.ledger.records()) == 0


@pytest.mark.timeout(60)
async def test_activities_cannot_end_their_worker(app: Stent, tmp_path: Path) -> None:
    """SystemExit and KeyboardInterrupt are failures of the activity, no more."""
    async with Fleet(tmp_path) as fleet:
        worker = await fleet.start(url=app.url)
        result = await app.wait_for(await app.dispatch(workload.leaves))
        assert result.unwrap() == ["ActivityFailedError", "ActivityFailedError", "stay"]
        assert (await app.wait_for(await app.dispatch(workload.sequence, 2))).ok
        assert not worker.ended


@pytest.mark.timeout(60)
async def test_hard_exit_of_an_activity_is_survived(app: Stent, tmp_path: Path) -> None:
    """``os._exit`` takes the worker with it; the call runs again elsewhere."""
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url) for _ in range(2)]
        marker = str(tmp_path / "died")
        execution_id = await app.dispatch(workload.die_once, marker)
        assert (await app.wait_for(execution_id)).unwrap() == "survived"
        (dead,) = [process for process in workers if process.ended]
        assert await dead.wait() == 7
        assert check_calls(fleet.ledger.records(), lost=[dead.pid]) == 1


@pytest.mark.timeout(90)
async def test_stopping_under_load_hands_over(app: Stent, tmp_path: Path) -> None:
    """Workers that are stopped one after the other lose and repeat nothing."""
    async with Fleet(tmp_path) as fleet:
        worker = await fleet.start(url=app.url)
        mix = Mix(app)
        await mix.dispatch()
        for _ in range(4):
            await fleet.wait_for_more("end", 15, lambda: mix.done)
            successor = await fleet.start(url=app.url)
            assert await worker.stop() == 0
            assert worker.lines("worker.drained")
            assert not successor.lines("worker.taken_over")
            worker = successor
        assert await mix.results() == mix.expected
        records = fleet.ledger.records()
        assert check_calls(records, committed=[await read_committed(app.url)]) == 0
        check_pasts(records)
        await check_nothing_left(app.url)


@pytest.mark.timeout(60)
async def test_sleep_keeps_its_deadline(app: Stent, tmp_path: Path) -> None:
    """The deadline of a parked sleep is the same after its worker was killed."""
    async with Fleet(tmp_path) as fleet:
        first = await fleet.start(url=app.url)
        execution_id = await app.dispatch(workload.long_sleeper)
        deadline = await wait_for_deadline(app.url)
        await first.kill()
        second = await fleet.start(url=app.url)
        await wait_until(lambda: bool(second.lines("worker.taken_over")))
        assert await wait_for_deadline(app.url) == deadline
        assert await app.cancel(execution_id)
        assert not (await app.wait_for(execution_id)).ok
        assert check_pasts(fleet.ledger.records()) == 2


@pytest.mark.timeout(60)
async def test_serializable_by_default(
    app: Stent, tmp_path: Path, connection: asyncpg.Connection
) -> None:
    """A database whose transactions are serializable by default changes nothing."""
    name = await connection.fetchval("select current_database()")
    await connection.execute(
        f"alter database {name} set default_transaction_isolation = serializable"
    )
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        assert await mix.results() == mix.expected
        records = fleet.ledger.records()
        assert check_calls(records) == 0
        check_pasts(records)
        await check_nothing_left(app.url)
        assert not any(worker.lines("lease.lost") for worker in workers)


def test_expected_results_are_right() -> None:
    """The mix knows what its workflows return, so that a wrong result is noticed."""
    assert expected_results()["sequence"] == 0 + 2 + 4 + 6 + 8 + 10


async def wait_for_incarnation(url: str, number: int) -> None:
    """Until a worker works under that incarnation."""
    connection = await asyncpg.connect(url)
    try:
        found = (
            "select true from stent.workers join stent.leases using (worker_id)"
            " where incarnation = $1 and state = 'running'"
        )
        while not await connection.fetchval(found, number):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    finally:
        await connection.close()


async def wait_for_deadline(url: str) -> object:
    """Until the one execution is parked; when it is to be woken."""
    connection = await asyncpg.connect(url)
    try:
        query = "select wake_at from stent.executions where wake_at > now()"
        while (deadline := await connection.fetchval(query)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    finally:
        await connection.close()
    return deadline
