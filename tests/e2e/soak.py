"""Random work under random faults, for as long as wanted; ``make soak TIME=600``.

Workers run a mix of all workflows while faults of every kind hit them and Postgres, one
after the other, chosen by a seed. At the end the faults stop, everything must finish,
and the evidence outside of the database is compared with what is in it. A soak in which
a kind of fault never happened, or in which nothing had to be recovered, has failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from stent import Stent
from tests.e2e.harness.checks import (
    Committed,
    check_calls,
    check_effects,
    check_nothing_left,
    check_pasts,
    prepare_effects,
    read_committed,
)
from tests.e2e.harness.fleet import Fleet, Process, say, wait_until
from tests.e2e.harness.mix import Mix

WORKERS = 3
LEASE_SECONDS = 3.0
DRAIN_SECONDS = 5.0
MIXES_AT_ONCE = 2
HEAL_SECONDS = 90


@dataclass
class Soak:
    """One run.

    Attributes:
        chance: Seeded; chooses faults, victims and pauses.
        faults: How many of each kind have hit.
        lost: Process ids of workers whose work may have been taken over, a loss each.
        committed: What the database had after each fault.
    """

    app: Stent
    fleet: Fleet
    home: Path
    chance: random.Random
    workers: list[Process] = field(default_factory=list)
    mixes: list[Mix] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    committed: list[Committed] = field(default_factory=list)
    resumed: list[tuple[int, float]] = field(default_factory=list)
    slowest_return: float = 0.0

    async def run(self, seconds: float) -> None:
        """Disturb for so long, then let everything finish."""
        until = time.monotonic() + seconds
        faults = self._faults()
        for _ in range(WORKERS):
            self.workers.append(await self._start())
        while time.monotonic() < until or len(self.faults) < len(faults):
            while sum(not mix.done for mix in self.mixes) < MIXES_AT_ONCE:
                mix = Mix(self.app)
                await mix.dispatch()
                self.mixes.append(mix)
            await self.fleet.wait_for_more(
                "start", self.chance.randrange(1, 60), self._some_done
            )
            # Each kind once before any a second time.
            rare = [name for name in faults if not self.faults[name]]
            name = self.chance.choice(rare or list(faults))
            say(f"  {time.monotonic() - until + seconds:5.1f} s  {name}")
            await faults[name]()
            self.faults[name] += 1
            await self._look()
        await self._heal()

    def _faults(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "worker killed": self._kill,
            "worker frozen for less than its lease": self._freeze_shortly,
            "worker frozen for longer than its lease": self._freeze,
            "worker stopped": self._stop,
            "connections ended": self._end_connections,
            "backend killed": self._kill_backend,
            "postmaster killed": self._kill_postmaster,
            "server shut down at once": self._shut_down,
        }

    def _some_done(self) -> bool:
        return sum(not mix.done for mix in self.mixes) < MIXES_AT_ONCE

    async def _start(self) -> Process:
        return await self.fleet.start(
            home=str(self.home), lease=LEASE_SECONDS, drain=DRAIN_SECONDS, slots=10
        )

    async def _replace(self, victim: Process) -> None:
        self.workers[self.workers.index(victim)] = await self._start()

    def _victim(self) -> Process:
        return self.chance.choice(self.workers)

    async def _kill(self) -> None:
        victim = self._victim()
        await victim.kill()
        self.lost.append(victim.pid)
        await self._look()
        await self._replace(victim)

    async def _freeze_shortly(self) -> None:
        victim = self._victim()
        victim.suspend()
        # Whether that is shorter is for the machine to say: a loss is no error.
        self.lost.append(victim.pid)
        await self.fleet.wait_for_more("start", 3, self._some_done)
        self.resumed.append((victim.pid, time.monotonic()))
        victim.resume()

    async def _freeze(self) -> None:
        victim = self._victim()
        seen = self._count_taken_over()
        victim.suspend()
        self.lost.append(victim.pid)
        await wait_until(lambda: self._count_taken_over() > seen)
        await self._look()
        self.resumed.append((victim.pid, time.monotonic()))
        victim.resume()
        await self._wait_until_back(victim)

    async def _wait_until_back(self, victim: Process) -> None:
        """Until a worker that was taken over works under its next incarnation."""
        back = "select true from stent.leases where pid = $1 and state = 'running'"
        connection = await asyncpg.connect(self.app.url)
        try:
            while not await connection.fetchval(back, victim.pid):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        finally:
            await connection.close()

    def _count_taken_over(self) -> int:
        return len(self._taken_over())

    def _taken_over(self) -> list[str]:
        """Ids of the workers that were taken over, one per time."""
        return [
            str(line["lost_worker_id"])
            for process in self.fleet.processes.values()
            for line in process.lines("worker.taken_over")
        ]

    def _check_taken_over(self) -> int:
        """Nobody is taken over but for a fault of its own."""
        ready = self.fleet.ledger.records("ready")
        process_of = {record.worker: record.pid for record in ready}
        left = list(self.lost)
        taken_over = self._taken_over()
        for worker_id in taken_over:
            pid = process_of[worker_id]
            assert pid in left, f"worker {worker_id} of process {pid} was well"
            left.remove(pid)
        return len(taken_over)

    async def _stop(self) -> None:
        victim = self._victim()
        # What still runs after the drain's time is given back, to run again.
        self.lost.append(victim.pid)
        assert await victim.stop() == 0, f"{victim.log} did not stop in order"
        await self._replace(victim)

    async def _backends(self) -> list[int]:
        connection = await asyncpg.connect(self.app.url)
        try:
            rows = await connection.fetch(
                "select pid from pg_stat_activity where pid <> pg_backend_pid()"
                " and application_name like 'stent %'"
            )
        finally:
            await connection.close()
        return [row["pid"] for row in rows]

    async def _end_connections(self) -> None:
        backends = await self._backends()
        count = self.chance.randrange(1, len(backends) + 1)
        for pid in self.chance.sample(backends, count):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def _kill_backend(self) -> None:
        await self._hit_server(self.chance.choice(await self._backends()), 9)

    async def _kill_postmaster(self) -> None:
        await self._hit_server(self._postmaster(), signal.SIGKILL)

    async def _shut_down(self) -> None:
        await self._hit_server(self._postmaster(), signal.SIGQUIT)

    def _postmaster(self) -> int:
        assert self.app._server is not None
        pid = self.app._server.cluster.running_pid()
        assert pid is not None
        return pid

    async def _hit_server(self, pid: int, number: int) -> None:
        """Progress has to come back without anybody's help."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        began = time.monotonic()
        writes = len(self.fleet.ledger.records("saw"))
        await wait_until(
            lambda: self._some_done() or len(self.fleet.ledger.records("saw")) > writes
        )
        self.slowest_return = max(self.slowest_return, time.monotonic() - began)

    async def _look(self) -> None:
        """Read what is committed; the server may be on its way back."""
        while True:
            try:
                self.committed.append(await read_committed(self.app.url))
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self.fleet.wait_for_more("start", 1, lambda: True)
                await asyncio.sleep(0)
            else:
                return

    async def _heal(self) -> None:
        async with asyncio.timeout(HEAL_SECONDS):
            for mix in self.mixes:
                assert await mix.results() == mix.expected
        for worker in self.workers:
            assert await worker.stop() == 0
        self.committed.append(await read_committed(self.app.url))

    async def check(self) -> None:
        """Compare the evidence; print it."""
        records = self.fleet.ledger.records()
        repeated = check_calls(
            records,
            committed=self.committed,
            lost=self.lost,
            resumed=self.resumed,
        )
        lives = check_pasts(records)
        await check_nothing_left(self.app.url)
        executions = 0
        for mix in self.mixes:
            executions += len(mix.expected)
            for execution_id, rows in mix.inserted.items():
                await check_effects(self.app.url, execution_id, rows)
        starts = sum(record.event == "start" for record in records)
        taken_over = self._check_taken_over()
        for name, count in sorted(self.faults.items()):
            say(f"  {count:5}  {name}")
        say(f"  {executions:5}  root executions, all with the right result")
        say(f"  {lives:5}  lives of workflows, none with a past of its own")
        say(f"  {starts:5}  attempts, {repeated} of them because of a fault")
        say(f"  {taken_over:5}  workers taken over")
        say(f"  {self.slowest_return:5.1f}  s at most from a hit server to progress")
        say("      0  committed calls that ran again")
        assert taken_over > 0, "nobody was taken over"
        assert repeated > 0, "nothing was in flight when a fault hit"


async def soak(seconds: float, seed: int) -> None:
    """Run and check; raises when a promise is broken."""
    with tempfile.TemporaryDirectory(prefix="stent-soak-") as name:
        home = Path(name)
        logs = home / "logs"
        logs.mkdir()
        async with Stent(home=home / "server") as app, Fleet(logs) as fleet:
            await prepare_effects(app.url)
            run = Soak(app, fleet, home / "server", random.Random(seed))
            await run.run(seconds)
            await run.check()


def main() -> int:
    """Read the arguments; 0 when everything held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=float, default=60, help="seconds of faults")
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed
    if seed is None:
        seed = secrets.randbelow(1_000_000)
    say(f"soak: {arguments.time:.0f} s, seed {seed}")
    asyncio.run(soak(arguments.time, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
