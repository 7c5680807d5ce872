"""Worker processes, as a test sees them: start, stop, suspend, kill, wait."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self
from uuid import uuid4

from tests.e2e.harness.ledger import Ledger
from tests.e2e.harness.member import Plan

ROOT = Path(__file__).parents[3]
POLL_SECONDS = 0.01


class Process:
    """One worker process."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def signal(self, number: int) -> None:
        """Send a signal; nothing if it has ended."""
        if not self._status.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def suspend(self) -> None:
        """Freeze it."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._status.done()

    def end(self, status: int) -> None:
        """It is gone."""
        self._status.set_result(status)

    async def wait(self) -> int:
        """Until it is gone; its exit code, negative for a signal."""
        return await asyncio.shield(self._status)

    async def kill(self) -> None:
        """End it without warning, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        await self.wait()

    async def stop(self) -> int:
        """Ask it to stop, and wait; its exit code."""
        self.signal(signal.SIGTERM)
        return await self.wait()

    def lines(self, event: str) -> list[dict[str, object]]:
        """Its log lines of an event, by now."""
        if not self.log.exists():
            return []
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                fields = json.loads(line)
                if isinstance(fields, dict) and fields.get("event") == event:
                    found.append(fields)
        return found


class Fleet:
    """All worker processes of a test; killed at its end."""

    def __init__(self, directory: Path) -> None:
        """Create it; enter it to start processes.

        Args:
            directory: Gets the ledger and the logs.
        """
        self.directory = directory
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.processes: dict[int, Process] = {}
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._logs: dict[int, Path] = {}
        self._forker: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        self._forker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.e2e.harness.forker",
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.signal(signal.SIGKILL)
        assert self._forker is not None
        assert self._forker.stdin is not None
        self._forker.stdin.close()
        await self._forker.wait()
        assert self._reader is not None
        await self._reader
        self.ledger.close()

    async def _read(self) -> None:
        assert self._forker is not None
        assert self._forker.stdout is not None
        async for line in self._forker.stdout:
            match json.loads(line):
                case ["started", number, pid]:
                    self.processes[pid] = Process(pid, self._logs[number])
                    self._waiting.pop(number).set_result(pid)
                case ["ended", pid, status]:
                    self.processes[pid].end(status)

    async def start(self, *, ready: bool = True, **plan: object) -> Process:
        """Start a worker process.

        Args:
            ready: Wait until it works, or has ended.
            plan: Fields of ``Plan``; ``ledger`` and ``log`` are given.
        """
        assert self._forker is not None
        assert self._forker.stdin is not None
        number = next(self._numbers)
        log = self.directory / f"worker-{number}.log"
        self._logs[number] = log
        defaults = {"ledger": str(self.ledger.path), "log": str(log)}
        values = Plan(**defaults | plan).as_json()  # type: ignore[arg-type]
        started = asyncio.get_running_loop().create_future()
        self._waiting[number] = started
        self._forker.stdin.write(json.dumps([number, values]).encode() + b"\n")
        process = self.processes[await started]
        if ready:
            await wait_until(lambda: process.ended or self.is_ready(process))
        return process

    async def wait_for_more(
        self, event: str, count: int, unless: Callable[[], bool]
    ) -> None:
        """Until the ledger has so many more records of an event, or ``unless``."""
        enough = len(self.ledger.records(event)) + count
        await wait_until(lambda: unless() or len(self.ledger.records(event)) >= enough)

    def is_ready(self, process: Process) -> bool:
        """Whether it works."""
        return any(r.pid == process.pid for r in self.ledger.records("ready"))

    def with_ledger(self) -> Fleet:
        """The same processes with a fresh ledger of their own."""
        other = object.__new__(Fleet)
        other.__dict__.update(self.__dict__)
        other.ledger = Ledger(self.directory / f"ledger-{uuid4().hex[:8]}.jsonl")
        return other


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - files and processes have no events
        await asyncio.sleep(POLL_SECONDS)


def say(text: str) -> None:
    """Print evidence; shown by ``pytest -s`` and when a test fails."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
