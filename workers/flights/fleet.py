"""Worker processes of the flights job on this machine: start, kill, stop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Modules are found from here, wherever the caller's working directory is.
ROOT = Path(__file__).parents[2]
JOB = "workers.flights.job"
# Most of an attempt is computing, which more of them at a time do not speed up; a few
# keep the processor busy while others wait for Postgres.
CONCURRENCY = 8
COMMAND = (sys.executable, "-m", "stent", "worker", JOB, f"--concurrency={CONCURRENCY}")
STOP_SECONDS_MAX = 10.0
LOG_LINES_SHOWN = 20


class WorkerDiedError(RuntimeError):
    """A worker ended that nobody told to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProcess:
    """One worker, in a session of its own: Ctrl-C at the terminal does not reach it."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def kill(self) -> None:
        """End it as kill -9 does: it gets no chance to clean up."""
        self.process.kill()
        self.process.wait()

    def check_alive(self) -> None:
        """Make sure that it runs.

        Raises:
            WorkerDiedError: It has ended; the message has the end of its log.
        """
        status = self.process.poll()
        if status is not None:
            lines = self.log.read_text(errors="replace").splitlines()
            end = "\n".join(lines[-LOG_LINES_SHOWN:])
            raise WorkerDiedError(f"{self.name} ended with status {status}:\n{end}")


def start_worker(
    name: str, directory: Path, environment: Mapping[str, str]
) -> WorkerProcess:
    """Start a worker.

    Args:
        name: For people, and for its log.
        directory: Where its log goes; it must exist.
        environment: Added to that of this process; names the database.
    """
    log = directory / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            COMMAND,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return WorkerProcess(name=name, process=process, log=log)


def stop_workers(workers: Sequence[WorkerProcess]) -> None:
    """Let them finish what runs and end; blocks, and kills those that do not end."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        try:
            worker.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            worker.kill()
