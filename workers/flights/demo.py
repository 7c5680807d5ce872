"""`make demo`: the flights job on two workers, one of them killed, every row counted.

Runs on a Postgres of its own in a temporary directory and leaves nothing behind.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import anyio
import asyncpg
from anyio import to_thread
from rich.console import Console

from stent import Settings, Stent, StentError
from workers.flights.display import Display, show_proof
from workers.flights.fleet import (
    WorkerDiedError,
    WorkerProcess,
    start_worker,
    stop_workers,
)
from workers.flights.job import flights_etl
from workers.flights.report import PLAIN_WIDTH, Report, print_report
from workers.flights.source import ARCHIVE
from workers.flights.watch import (
    Done,
    Expected,
    Holding,
    copying_backends,
    live_backends,
    prove,
    read_done,
    read_expected,
    read_holdings,
    registered,
)

KILL_AT = 0.4
# A kill in the middle of nothing would prove nothing.
IN_FLIGHT_MIN = 3
WORKERS = ("worker 1", "worker 2")
LOOK_SECONDS = 0.1
TAKEOVER_LOOK_SECONDS = 0.02
START_SECONDS_MAX = 30.0
JOB_SECONDS_MAX = 120
INTERRUPTED = 130


class DemoError(RuntimeError):
    """The demonstration did not show what it is there to show."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One execution under observation; who is killed leaves `workers`."""

    execution_id: str
    connection: asyncpg.Connection
    workers: list[WorkerProcess]
    expected: Expected
    display: Display
    ended: bool = False

    async def look(self) -> Done:
        """Read and show what is committed.

        Raises:
            DemoError: It cannot go on.
            WorkerDiedError: A worker ended that nobody had killed.
        """
        for worker in self.workers:
            worker.check_alive()
        done = await read_done(self.connection, self.execution_id)
        self.display.update(done)
        if done.blocked is not None:
            raise DemoError(f"the job is blocked: {done.blocked}")
        return done

    async def holdings(self) -> list[tuple[WorkerProcess, Holding]]:
        """What each worker that lives has of the execution."""
        pids = {worker.pid for worker in self.workers}
        found = await read_holdings(self.connection, self.execution_id, pids)
        return [(worker, found[worker.pid]) for worker in self.workers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A worker that was killed.

    Attributes:
        victim: The worker.
        at: When, on the monotonic clock.
        held: What it had at that moment.
        copying: Backends in a transaction of its that had not been committed.
    """

    victim: WorkerProcess
    at: float
    held: Holding
    copying: AbstractSet[int]


async def demonstrate(
    stream: TextIO, archive: Path = ARCHIVE, kill_at: float = KILL_AT
) -> bool:
    """Run the job, kill a worker in the middle, count.

    Args:
        stream: Where to tell about it.
        archive: A zip file with the flights CSV.
        kill_at: Share of the rows after which a worker is killed, 0 to 1.
    Returns:
        Whether every figure is right.
    Raises:
        DemoError: The job failed, or was over before it could be interrupted.
        WorkerDiedError: A worker ended that nobody had killed.
    """
    began = time.monotonic()
    console = make_console(stream)
    with temporary_home() as home:
        settings = Settings(home=home / "postgres")
        async with Stent(settings=settings) as app, connected(app.url) as connection:
            seconds = time.monotonic() - began
            console.print(f"Postgres started for this demonstration ({seconds:.1f} s).")
            with fleet(home, app.url) as workers:
                expected = await to_thread.run_sync(read_expected, archive)
                await wait_until_ready(connection, workers)
                names = " and ".join(f"{one.name} (pid {one.pid})" for one in workers)
                console.print(f"Ready: {names}.")
                with Display(console, expected) as display:
                    execution_id = await app.dispatch(
                        flights_etl,
                        home / "work",
                        archive,
                        max_duration=JOB_SECONDS_MAX,
                    )
                    run = Run(
                        execution_id=execution_id,
                        connection=connection,
                        workers=workers,
                        expected=expected,
                        display=display,
                    )
                    report = await observe(app, run, kill_at)
                await to_thread.run_sync(stop_workers, workers)
            proof = await prove(connection, execution_id, expected)
    console.print()
    print_report(report, stream)
    show_proof(console, proof, time.monotonic() - began)
    return proof.holds


async def observe(app: Stent, run: Run, kill_at: float) -> Report:
    """Follow the job to its end, killing a worker on the way.

    Raises:
        DemoError: The job failed, or was over before it could be interrupted.
        WorkerDiedError: A worker ended that nobody had killed.
    """
    killed, taken_over = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(interrupt, run, kill_at, killed, taken_over)
        outcome = await app.wait_for(run.execution_id)
        run.ended = True
        if killed.is_set():
            # Perhaps little was left to do: it may not have been seen yet by whom.
            await taken_over.wait()
        group.cancel_scope.cancel()
    await run.look()
    if outcome.error is not None:
        raise DemoError(f"the job failed: {outcome.error!r}")
    if not taken_over.is_set():
        raise DemoError("the job ended before a worker was killed and replaced")
    report: Report = outcome.unwrap()
    return report


async def interrupt(
    run: Run, kill_at: float, killed: anyio.Event, taken_over: anyio.Event
) -> None:
    """Look all the time; kill the owner of the workflow in the middle."""
    wanted = kill_at * run.expected.rows
    while True:
        done = await run.look()
        if done.counts.read >= wanted:
            break
        await anyio.sleep(LOOK_SECONDS)
    kill = await kill_owner(run)
    killed.set()
    run.display.say(
        f"[bold red]kill -9[/] {kill.victim.name}: it ran the workflow and"
        f" {kill.held.attempts} chunks, {len(kill.copying)} in open transactions."
    )
    await wait_for_successor(run, kill)
    taken_over.set()
    while True:
        await run.look()
        await anyio.sleep(LOOK_SECONDS)


async def kill_owner(run: Run) -> Kill:
    """Kill the worker that advances the workflow while much of its work is open."""
    while True:
        await run.look()
        for worker, held in await run.holdings():
            if not held.owns_execution:
                continue
            copying = await copying_backends(run.connection, worker.pid)
            if len(copying) >= IN_FLIGHT_MIN:
                run.workers.remove(worker)
                worker.kill()
                at = time.monotonic()
                return Kill(victim=worker, at=at, held=held, copying=copying)


async def wait_for_successor(run: Run, kill: Kill) -> None:
    """Wait until another has the workflow, and the dead worker's chunks are free.

    Only those that live can have ended it: nobody else was left to.
    """
    pid = kill.victim.pid
    while True:
        await run.look()
        left = await read_holdings(run.connection, run.execution_id, {pid})
        owners = [
            one
            for one, held in await run.holdings()
            if held.owns_execution or run.ended
        ]
        if left[pid].nothing and owners:
            break
        await anyio.sleep(TAKEOVER_LOOK_SECONDS)
    seconds = time.monotonic() - kill.at
    undone = len(kill.copying - await live_backends(run.connection))
    run.display.say(
        f"[bold green]{seconds:.1f} s later[/] {owners[0].name} has taken over;"
        f" Postgres has rolled back {undone} transactions."
    )


@contextmanager
def temporary_home() -> Iterator[Path]:
    """A directory for everything; afterwards it is gone, and what it links to."""
    home = Path(tempfile.mkdtemp(prefix="stent-demo-"))
    try:
        yield home
    finally:
        # As root, the files of the server are elsewhere: it runs as another user.
        for path in (home / "postgres" / "server", home):
            shutil.rmtree(path.resolve(), ignore_errors=True)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to look with."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


@contextmanager
def fleet(home: Path, url: str) -> Iterator[list[WorkerProcess]]:
    """Worker processes; those that are still in the list at the end are killed."""
    workers: list[WorkerProcess] = []
    try:
        environment = {"STENT_DATABASE_URL": url}
        workers += [start_worker(name, home, environment) for name in WORKERS]
        yield workers
    finally:
        for worker in workers:
            worker.kill()


async def wait_until_ready(
    connection: asyncpg.Connection, workers: list[WorkerProcess]
) -> None:
    """Wait until all workers serve.

    Raises:
        TimeoutError: They do not within `START_SECONDS_MAX`.
        WorkerDiedError: One ended.
    """
    pids = {worker.pid for worker in workers}
    with anyio.fail_after(START_SECONDS_MAX):
        while not await registered(connection, pids):
            for worker in workers:
                worker.check_alive()
            await anyio.sleep(LOOK_SECONDS)


def make_console(stream: TextIO) -> Console:
    """A console as wide as the terminal, or of a fixed width where there is none."""
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False)


async def run_until_signal(stream: TextIO) -> int:
    """Demonstrate; a signal ends it at once, and still nothing is left behind.

    Returns:
        The exit status: 0 right, 1 wrong or failed, 130 interrupted.
    """
    status = INTERRUPTED
    console = make_console(stream)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with anyio.open_signal_receiver(*numbers) as signals:
        async with anyio.create_task_group() as group:

            async def stop_on_signal() -> None:
                async for _ in signals:
                    group.cancel_scope.cancel()
                    # The terminal itself may be gone, that may be the reason.
                    with suppress(OSError):
                        console.print("Stopping.")

            group.start_soon(stop_on_signal)
            try:
                status = 0 if await demonstrate(stream) else 1
            except (DemoError, WorkerDiedError, TimeoutError, StentError) as error:
                console.print(f"[bold red]The demonstration failed:[/] {error}")
                status = 1
            group.cancel_scope.cancel()
    return status


def main() -> None:
    """Run the demonstration as a program."""
    sys.exit(anyio.run(run_until_signal, sys.stdout))


if __name__ == "__main__":
    main()
