"""Several worker processes under one: started, restarted when they die, ended together.

Processes are started afresh (no fork: nothing is shared with the supervisor, which
opens no database), each on a leash (see ``leash``). One that dies is started again,
later each time it dies soon; one that ends with exit code 0 was asked to, by
``stent drain`` for example, and stays away. What has never worked is not tried for
ever: wrong usage ends all at once, other failures after a few attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import anyio

from stent.cli.leash import LINE_BYTES_MAX, ORPHAN_GRACE
from stent.log import get_logger
from stent.model import Order

log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SILENT_SECONDS = 10.0
"""A process that reports nothing for this long is not live."""
LATE_SECONDS = 3.0
"""One that misses three reports is not ready."""
BACKOFF_SECONDS = 0.5
BACKOFF_SECONDS_MAX = 30.0
STEADY_SECONDS = 30.0
"""A process that worked for this long begins its backoff anew."""
START_FAILURES_MAX = 5
"""Failures in a row of one process after which all end, if none has ever worked."""
USAGE = 2
FAILURE = 1

_MISSING = {"pid": None, "state": "restarting", "live": True, "ready": False}


@dataclass(slots=True)
class _Child:
    """One process, and the last that it said."""

    number: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    started_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)
    facts: dict[str, object] | None = None
    has_worked: bool = False

    def tell(self, order: Order) -> None:
        """Send an order; one that has just ended needs none."""
        with contextlib.suppress(OSError):
            self.writer.write(f"{order.value}\n".encode())

    def workers(self) -> list[dict[str, object]]:
        """What probes see of it."""
        silence = time.monotonic() - self.heard_at
        starting = {"pid": self.process.pid, "state": "starting", "live": True}
        known = self.facts["workers"] if self.facts is not None else []
        found = [dict(one) for one in known or [starting]]  # type: ignore[attr-defined]
        for one in found:
            one["live"] = one["live"] and silence <= SILENT_SECONDS
            one["ready"] = bool(one.get("ready")) and silence <= LATE_SECONDS
        return found


class Supervisor:
    """Runs worker processes until all of them have ended."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        count: int,
        drain_timeout: timedelta,
    ) -> None:
        """Describe it.

        Args:
            command: Of one worker process; the number of its leash is appended.
            environment: Of the processes.
            count: How many.
            drain_timeout: Of the workers; who takes longer is killed in the end.
        """
        self._command = tuple(command)
        self._environment = dict(environment)
        self._count = count
        self._patience = (drain_timeout + ORPHAN_GRACE).total_seconds()
        self._children: dict[int, _Child] = {}
        self._away = 0
        self._worked = False
        self._order: Order | None = None
        self._stopping = anyio.Event()
        self._hurrying = anyio.Event()
        self._exit_code = 0

    def health(self) -> dict[str, object]:
        """Of all processes together: live if all are, ready if all are."""
        workers = [one for c in self._children.values() for one in c.workers()]
        missing = self._count - self._away - len(self._children)
        workers += [dict(_MISSING) for _ in range(missing)]
        return {
            "live": all(one["live"] for one in workers),
            "ready": bool(workers)
            and self._order is None
            and all(one["ready"] for one in workers),
            "workers": workers,
        }

    async def run(self) -> int:
        """Until all have ended; the exit code of the whole.

        Returns:
            0 if every process ended as it was asked to, else 1; 2 if they were used
            wrongly.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._obey_signals)
            group.start_soon(self._end_late_ones)
            async with anyio.create_task_group() as slots:
                for number in range(1, self._count + 1):
                    slots.start_soon(self._keep, number)
            group.cancel_scope.cancel()
        return self._exit_code

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(*SIGNALS) as signals:
            async for _ in signals:
                self.tell(Order.DRAIN if self._order is None else Order.STOP)

    def tell(self, order: Order) -> None:
        """Tell every process; nobody is started any more."""
        self._order = order
        self._stopping.set()
        for child in self._children.values():
            child.tell(order)
        if order is Order.STOP:
            self._hurrying.set()

    async def _end_late_ones(self) -> None:
        """Who does not end although it was told to is killed."""
        await self._stopping.wait()
        with anyio.move_on_after(self._patience):
            await self._hurrying.wait()
            await anyio.sleep(ORPHAN_GRACE.total_seconds())
        for child in list(self._children.values()):
            log.error("process.killed", pid=child.process.pid, number=child.number)
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()

    async def _keep(self, number: int) -> None:
        """One process after the other, until one ends as it was asked to."""
        failures = 0
        while not self._stopping.is_set():
            child = await self._start(number)
            exit_code = await self._accompany(child)
            pid = child.process.pid
            if exit_code == 0:
                self._away += 1
                log.info("process.ended", pid=pid, number=number)
                return
            lived = time.monotonic() - child.started_at
            steady = child.has_worked and lived >= STEADY_SECONDS
            failures = 1 if steady else failures + 1
            pause = _pause_after(failures)
            given_up = self._must_give_up(exit_code, failures)
            stopping = self._stopping.is_set() or given_up
            log.error(
                "process.died",
                pid=pid,
                number=number,
                exit_code=exit_code,
                restart_in_ms=None if stopping else round(pause * 1000),
            )
            if stopping:
                self._exit_code = max(self._exit_code, FAILURE)
                if given_up:
                    self._exit_code = exit_code
                    self.tell(Order.STOP)
                return
            with anyio.move_on_after(pause):
                await self._stopping.wait()

    def _must_give_up(self, exit_code: int, failures: int) -> bool:
        """What has worked once is tried again for ever; a signal is no refusal."""
        if self._worked or exit_code < 0:
            return False
        return exit_code == USAGE or failures >= START_FAILURES_MAX

    async def _start(self, number: int) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(theirs.fileno()),
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C reaches the supervisor alone, which tells the others.
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES_MAX)
        child = _Child(number, process, reader, writer)
        self._children[number] = child
        log.info("process.started", pid=process.pid, number=number)
        if self._order is not None:
            child.tell(self._order)
        return child

    async def _accompany(self, child: _Child) -> int:
        """Hear what it says until it ends; its exit code, negative for a signal."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._hear, child)
                exit_code = await child.process.wait()
                group.cancel_scope.cancel()
        finally:
            del self._children[child.number]
            child.writer.close()
        return exit_code

    async def _hear(self, child: _Child) -> None:
        try:
            while line := await child.reader.readline():
                child.facts = json.loads(line)
                child.heard_at = time.monotonic()
                if child.facts is not None and child.facts["ready"]:
                    child.has_worked = self._worked = True
        except OSError:
            return  # It has died: its end says the rest.


def _pause_after(failures: int) -> float:
    """Doubling, with jitter, so that processes that died together come apart."""
    longest = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10))
    return longest * (0.5 + random.random() / 2)  # noqa: S311
