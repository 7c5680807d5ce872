"""Every write of a worker can be its last; the work goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from stent import DurableFunction, Stent
from tests.e2e.harness import workload
from tests.e2e.harness.checks import (
    Databases,
    check_calls,
    check_effects,
    check_ended,
    check_nothing_left,
    check_pasts,
    prepare_effects,
    read_committed,
)
from tests.e2e.harness.fleet import Fleet, Process, say
from tests.e2e.harness.killpoints import Position
from tests.e2e.harness.ledger import Ledger

FULL = os.environ.get("STENT_KILL_POINTS") == "all"
"""Whether to try every point; otherwise a bounded, evenly spread set of them."""
POINTS_MAX = 6
EACH_MAX = 30
"""So many writes and attempts are enough of a case that has hundreds."""
AT_ONCE = 4
RESULT_SECONDS = 40


@dataclass(frozen=True, slots=True)
class Case:
    """A workflow that is disturbed.

    Attributes:
        queues: Of the process that is hit.
        helper: Queues of a second process that lives on.
        rows: Rows that its transactions insert.
    """

    function: DurableFunction[Any, Any]
    args: tuple[object, ...]
    queues: tuple[str, ...] = ("default",)
    helper: tuple[str, ...] = ()
    rows: int = 0
    always: tuple[int, ...] = ()
    """Writes that are always tried, at the moment before they are sent."""


CASES = {
    "sequence": Case(workload.sequence, (4,)),
    "fan-out": Case(workload.fan_out, (7,)),
    "remote results": Case(workload.remote_fan_out, (5,), helper=(workload.REMOTE,)),
    "remote work": Case(
        workload.remote_fan_out,
        (5,),
        queues=(workload.REMOTE,),
        helper=("default",),
    ),
    # More calls than are inserted together.
    "wide fan-out": Case(workload.remote_fan_out, (1600,), helper=(workload.REMOTE,)),
    # The same, of which the process that is hit runs most itself.
    "wide fan-out here": Case(workload.wide, (1600,), always=(4, 5, 6)),
    "race": Case(workload.race, (2,)),
    "sleep": Case(workload.sleeper, (2,)),
    "children": Case(workload.family, (3,)),
    "map": Case(workload.mapped, (30,)),
    "map of a stream": Case(workload.mapped_stream, (6,)),
    "retries": Case(workload.retried, (3,)),
    "transactions": Case(workload.transactional, (3,), rows=3),
}


@dataclass
class Run:
    """One disturbed run of a case.

    Attributes:
        reached: The process was hit at the point.
        repeated: Attempts made once more because of it.
        lives: Of all executions.
    """

    ledger: Ledger
    result: object = None
    reached: bool = False
    repeated: int = 0
    lives: int = 0


@dataclass
class Bench:
    """Where the runs of a case happen: processes and a database each."""

    fleet: Fleet
    free: asyncio.Queue[Stent] = field(default_factory=asyncio.Queue)

    async def measure(self, case: Case) -> tuple[object, int, int]:
        """Run undisturbed: the result, the number of writes, of attempts."""
        app = await self.free.get()
        fleet = self.fleet.with_ledger()
        run = Run(fleet.ledger)
        processes = await self._start(fleet, app, case)
        run.result = await self._finish(app, case, processes)
        records = fleet.ledger.records()
        assert check_calls(records) == 0
        check_pasts(records)
        victim = processes[0].pid
        counts = [
            sum(r.event == event and r.pid == victim for r in records)
            for event in ("write", "effect")
        ]
        self.free.put_nowait(app)
        return run.result, counts[0], counts[1]

    async def disturb(self, case: Case, number: int, position: Position) -> Run:
        """Run, killed at one point, and resumed by a fresh process."""
        app = await self.free.get()
        fleet = self.fleet.with_ledger()
        run = Run(fleet.ledger)
        processes = await self._start(fleet, app, case, number, position)
        execution_id = await app.dispatch(case.function, *case.args)
        victim = processes[0]
        outcome = asyncio.ensure_future(app.wait_for(execution_id))
        dead = asyncio.ensure_future(victim.wait())
        await asyncio.wait([outcome, dead], return_when=asyncio.FIRST_COMPLETED)
        committed = []
        run.reached = victim.ended
        if run.reached:
            committed.append(await read_committed(app.url))
            processes += await self._start(fleet, app, case, helper=False)
        async with asyncio.timeout(RESULT_SECONDS):
            run.result = (await outcome).unwrap()
        dead.cancel()
        await self._stop(processes)
        records = fleet.ledger.records()
        committed.append(await read_committed(app.url))
        lost = [victim.pid] if run.reached else []
        run.repeated = check_calls(records, committed=committed, lost=lost)
        run.lives = check_pasts(records)
        check_ended(records, committed[-1])
        await check_nothing_left(app.url)
        if case.rows:
            await check_effects(app.url, execution_id, case.rows)
        self.free.put_nowait(app)
        return run

    async def _start(
        self,
        fleet: Fleet,
        app: Stent,
        case: Case,
        number: int = 0,
        position: Position = Position.SENT,
        *,
        helper: bool = True,
    ) -> list[Process]:
        started = [
            fleet.start(
                url=app.url,
                queues=case.queues,
                number=number,
                position=position,
                ready=False,
            )
        ]
        if helper and case.helper:
            started.append(fleet.start(url=app.url, queues=case.helper, ready=False))
        return list(await asyncio.gather(*started))

    async def _finish(self, app: Stent, case: Case, processes: list[Process]) -> object:
        execution_id = await app.dispatch(case.function, *case.args)
        async with asyncio.timeout(RESULT_SECONDS):
            outcome = await app.wait_for(execution_id)
        await self._stop(processes)
        await check_nothing_left(app.url)
        return outcome.unwrap()

    async def _stop(self, processes: list[Process]) -> None:
        for status in await asyncio.gather(*[process.stop() for process in processes]):
            assert status in {0, -9}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(
    tmp_path_factory: pytest.TempPathFactory, server_url: str, migrated_template: str
) -> AsyncIterator[Bench]:
    async with (
        Fleet(tmp_path_factory.mktemp("kill-points")) as fleet,
        Databases(server_url, migrated_template) as databases,
    ):
        bench = Bench(fleet)
        apps = []
        for _ in range(AT_ONCE):
            app = await Stent(await databases.clone())
            apps.append(app)
            bench.free.put_nowait(app)
        yield bench
        for app in apps:
            await app.close()


def chosen_points(writes: int, attempts: int) -> list[tuple[int, Position]]:
    """All points, or as many as ``POINTS_MAX``, evenly spread over all of them."""
    points: list[tuple[int, Position]] = [
        (number, position)
        for number in _spread(writes)
        for position in Position
        if position is not Position.AFTER_EFFECT
    ]
    points += [(number, Position.AFTER_EFFECT) for number in _spread(attempts)]
    if FULL or len(points) <= POINTS_MAX:
        return points
    # A step without a common divisor with the number of positions meets all of them.
    step = len(points) / POINTS_MAX
    return [points[int(index * step)] for index in range(POINTS_MAX)]


def _spread(count: int) -> Iterable[int]:
    """From 1 to ``count``, with gaps when they are many."""
    return range(1, count + 1, max(1, count // EACH_MAX))


@pytest.mark.timeout(1800 if FULL else 120)
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", CASES)
async def test_any_write_can_be_the_last(bench: Bench, name: str) -> None:
    """Killed at any point and resumed: the result of an undisturbed run.

    No committed call runs again, one in flight once more with the same key, and every
    life of a workflow sees the same past.
    """
    case = CASES[name]
    result, writes, attempts = await bench.measure(case)
    # How writes are grouped depends on timing: those of the shorter run come about.
    again, fewer, _ = await bench.measure(case)
    assert again == result
    writes = min(writes, fewer)
    points = chosen_points(writes, attempts)
    points += [(number, Position.BEFORE_SEND) for number in case.always]
    runs = await asyncio.gather(*[bench.disturb(case, *point) for point in points])
    for point, run in zip(points, runs, strict=True):
        assert run.result == result, point
    reached = sum(run.reached for run in runs)
    say(f"{name}: {writes} writes, {attempts} attempts, {len(points)} points,")
    say(f"  {reached} kills, {sum(run.repeated for run in runs)} attempts repeated")
    assert reached >= len(points) * 2 // 3


POSTGRES_CASES = ("fan-out", "transactions")
POSTGRES_POINTS = (
    (1, Position.UNACKNOWLEDGED),
    (2, Position.BEFORE_SEND),
    (2, Position.SENT),
    (3, Position.UNSYNCED),
    (3, Position.UNACKNOWLEDGED),
    (4, Position.SENT),
)


@pytest.mark.timeout(600 if FULL else 120)
@pytest.mark.parametrize("victim", ["kill", "immediate"])
async def test_postgres_can_die_at_any_write(
    tmp_path: Path, server_home: Path, victim: str
) -> None:
    """The server dies at a write and comes back: the same worker goes on.

    It is not restarted and nobody takes its work over, so nothing at all runs twice,
    but for transactions that were not committed.
    """
    reached = 0
    async with Fleet(tmp_path) as fleet, Stent(home=server_home) as app:
        await prepare_effects(app.url)
        for name in POSTGRES_CASES:
            case = CASES[name]
            undisturbed = None
            for number, position in ((0, Position.SENT), *points_of_server(victim)):
                process = await fleet.start(
                    home=str(server_home),
                    number=number,
                    position=position,
                    victim=victim,
                )
                execution_id = await app.dispatch(case.function, *case.args)
                outcome = await app.wait_for(execution_id, timeout=RESULT_SECONDS)
                undisturbed = undisturbed or outcome.unwrap()
                assert outcome.unwrap() == undisturbed, (name, number, position)
                assert await process.stop() == 0
                assert not process.lines("lease.lost")
                if case.rows:
                    await check_effects(app.url, execution_id, case.rows)
        await check_nothing_left(app.url)
        records = fleet.ledger.records()
        assert check_calls(records, committed=[await read_committed(app.url)]) == 0
        check_pasts(records)
        reached = len(fleet.ledger.records("hit"))
    assert reached >= len(POSTGRES_CASES) * len(points_of_server(victim)) * 2 // 3


def points_of_server(victim: str) -> list[tuple[int, Position]]:
    """Every other one for each way to die, unless all are wanted."""
    if FULL:
        return [(n, p) for n in range(1, 9) for p in Position]
    return list(POSTGRES_POINTS[victim == "kill" :: 2])
