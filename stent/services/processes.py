"""Child processes for functions that compute: ``pool="process"``.

A child is a fresh interpreter, never a fork of the worker, with its threads, locks and
connections. It is used for one call at a time and kept for the next one; cancelled or
out of time it is killed, with everything it started. What each line here is for, and
the figures, are in docs/decisions/0018-process-pool.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec
import structlog
from msgspec.structs import replace

from stent import hooks
from stent.codec import import_name
from stent.errors import ProcessLostError
from stent.log import PROCESS_LOST, PROCESS_STARTED, get_logger
from stent.services.process_frames import (
    LENGTH,
    Beat,
    Call,
    Ended,
    FromChild,
    Logged,
    Main,
    Setup,
    Started,
    Stop,
    Told,
    framed,
    from_child,
)

log = get_logger(__name__)

START_SECONDS_MAX = 60.0
"""How long a child may take to start and to import the function's module."""
STOP_SECONDS_MAX = 3.0
"""How long idle children have for their stop hooks, all at the same time."""
KILL_SECONDS_MAX = 5.0
"""How long the end of a killed child is waited for."""
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from stent.services.process_child import main; main(int(sys.argv[1]))"
)


@dataclass(frozen=True, slots=True)
class Events:
    """What somebody wants to hear while a call runs; called on the loop."""

    started: Callable[[], None]
    told: Callable[[bytes], None]
    beat: Callable[[bytes], None]


class _Gone(Exception):  # noqa: N818 - private, and not always an error
    """The child ended in the middle; ``started``: the function was already running."""

    def __init__(self, *, started: bool) -> None:
        super().__init__(started)
        self.started = started


class ProcessPool:
    """The children of one worker."""

    def __init__(self, size: int, payload_bytes_max: int) -> None:
        """Create it; the first call starts the first child.

        Args:
            size: Children at the same time.
            payload_bytes_max: Limit of a result.
        """
        self.size = size
        self.used = 0
        """Slots whose work needs a child, counted from when it was begun."""
        self._payload_bytes_max = payload_bytes_max
        self._free = anyio.Semaphore(size)
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._closed = False

    @property
    def room(self) -> int:
        """How many more of them would have one at once."""
        return self.size - self.used

    @property
    def process_ids(self) -> list[int]:
        """Of the children that run."""
        return [child.pid for child in self._children if child.pid is not None]

    async def run(self, call: Call, events: Events) -> Ended:
        """Run a call in a child; cancelling it kills the child.

        Args:
            call: The function and its encoded arguments.
            events: What to hear in the meantime.

        Raises:
            ProcessLostError: The child ended before the call did.
        """
        async with self._free:
            return await self._run(call, events)

    async def _run(self, call: Call, events: Events) -> Ended:
        while True:
            if self._closed:
                message = f"the worker stopped before {call.function} began"
                raise ProcessLostError(message)
            child = await self._take_idle()
            idle = child is not None
            child = child or self._start()
            try:
                ended = await child.run(call, events)
            except _Gone as gone:
                await self._discard(child)
                if idle and not gone.started:
                    # It ended in this moment, before it had heard of the call.
                    continue
                raise self._lost(child, call, gone) from None
            except BaseException:
                await self._discard(child)
                raise
            self._idle.append(child)
            return ended

    async def _take_idle(self) -> _Child | None:
        while self._idle:
            child = self._idle.pop()
            if not child.ended:
                return child
            # Killed by somebody while it was idle.
            await self._discard(child)
        return None

    def _lost(self, child: _Child, call: Call, gone: _Gone) -> ProcessLostError:
        how = child.ending()
        log.warning(PROCESS_LOST, pid=child.pid, activity=call.function, reason=how)
        when = "" if gone.started else " before the function began"
        return ProcessLostError(f"the process of {call.function} {how}{when}")

    def _start(self) -> _Child:
        setup = Setup(
            _program(),
            tuple(sorted(hooks.of_children.modules())),
            _lowest_level(),
            structlog.is_configured(),
            self._payload_bytes_max,
        )
        child = _Child(setup)
        self._children.add(child)
        log.debug(PROCESS_STARTED, count=len(self._children))
        return child

    async def _discard(self, child: _Child) -> None:
        """It is killed and gone before another one takes its place."""
        child.kill()
        with anyio.move_on_after(KILL_SECONDS_MAX, shield=True):
            await child.wait_until_gone()
        self._children.discard(child)

    async def close(self) -> None:
        """Stop idle children in an orderly way, kill the others; leave none."""
        self._closed = True
        idle, self._idle = self._idle, []
        for child in self._children:
            if child in idle:
                child.ask_to_stop()
            else:
                child.kill()
        with anyio.move_on_after(STOP_SECONDS_MAX, shield=True):
            for child in list(self._children):
                await child.wait_until_gone()
        for child in list(self._children):
            await self._discard(child)


def _program() -> Main | None:
    """How a child imports the program that this process runs."""
    module = sys.modules["__main__"]
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return Main(spec.name, None)
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    return Main(import_name("__main__"), str(Path(file).absolute()))


def _lowest_level() -> int:
    """Below it no logger of this process handles anything."""
    levels = [
        logger.level
        for logger in list(logging.Logger.manager.loggerDict.values())
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
    ]
    return min([logging.getLogger().getEffectiveLevel(), *levels])


class _Child:
    """One process, its connection, and a thread that starts it and waits for its end.

    Starting takes milliseconds in which the loop would stand still, and no event loop
    has a way to wait for a process that works everywhere.
    """

    def __init__(self, setup: Setup) -> None:
        self._loop = asyncio.get_running_loop()
        self._ours, theirs = socket.socketpair()
        self._setup: Setup | None = setup
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unwanted = False
        self._ended = False
        self._failure: OSError | None = None
        self._gone = asyncio.Event()
        self._known: set[str] = set()
        """Functions whose module it has imported."""
        threading.Thread(
            target=self._live, args=(theirs,), name="stent-process", daemon=True
        ).start()

    @property
    def pid(self) -> int | None:
        """Of the process, once it runs."""
        return None if self._process is None else self._process.pid

    # In the thread.

    def _live(self, theirs: socket.socket) -> None:
        try:
            with theirs:
                process = _spawn(theirs.fileno())
        except OSError as error:
            self._failure = error
        else:
            with self._lock:
                self._process = process
                unwanted = self._unwanted
            if unwanted:
                self.kill()
            self._wait(process)
        with suppress(RuntimeError):
            # The loop may be closed: then nobody waits.
            self._loop.call_soon_threadsafe(self._gone.set)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        if hasattr(os, "waitid"):
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            # Not reaped yet, so its number still means it, and all that it started.
            self.kill()
            with self._lock:
                self._ended = True
        process.wait()
        self._ended = True

    # Anywhere.

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._ended

    def kill(self) -> None:
        """Kill it and whatever it has started."""
        with self._lock:
            self._unwanted = True
            if self._process is not None and not self._ended:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def ending(self) -> str:
        """How it ended, for a message."""
        if self._failure is not None:
            return f"could not be started: {self._failure}"
        code = None if self._process is None else self._process.returncode
        if code is None:
            return "was lost"
        if code < 0:
            with suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
            return f"was killed by signal {-code}"
        return f"ended by itself with exit code {code}"

    # On the loop.

    async def wait_until_gone(self) -> None:
        """Until the process has ended and was reaped."""
        await self._gone.wait()
        if self._writer is not None:
            self._writer.close()
        self._ours.close()

    def ask_to_stop(self) -> None:
        """Idle: let it call its hooks and end."""
        if self._writer is not None:
            self._writer.write(framed(Stop()))

    async def run(self, call: Call, events: Events) -> Ended:
        """See ``ProcessPool.run``.

        Raises:
            _Gone: The child ended.
        """
        started = call.function in self._known
        limit = asyncio.timeout(START_SECONDS_MAX)
        try:
            async with limit:
                reader = await self._send(replace(call, announce=not started))
                if started:
                    limit.reschedule(None)
                    events.started()
                while True:
                    frame = await _read(reader)
                    match frame:
                        case Started():
                            started = True
                            self._known.add(call.function)
                            limit.reschedule(None)
                            events.started()
                        case Told(payload=payload):
                            events.told(payload)
                        case Beat(payload=payload):
                            events.beat(payload)
                        case Logged(record=record):
                            _log_again(record)
                        case Ended():
                            return frame
        except (OSError, asyncio.IncompleteReadError, msgspec.MsgspecError) as error:
            if isinstance(error, TimeoutError) and not limit.expired():
                raise
            raise _Gone(started=started) from error

    async def _send(self, call: Call) -> asyncio.StreamReader:
        reader, writer = self._reader, self._writer
        if reader is None or writer is None:
            reader, writer = await asyncio.open_connection(sock=self._ours)
            self._reader, self._writer = reader, writer
        if self._setup is not None:
            writer.write(framed(self._setup))
            self._setup = None
        writer.write(framed(call))
        await writer.drain()
        return reader


def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", _PROGRAM, str(descriptor), json.dumps(sys.path)],
        stdin=subprocess.DEVNULL,
        pass_fds=[descriptor],
        # Of its own, so that a Ctrl-C reaches the worker only, which drains, and that
        # killing its group kills what it has started.
        start_new_session=True,
    )


async def _read(reader: asyncio.StreamReader) -> FromChild:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    frame: FromChild = from_child.decode(await reader.readexactly(length))
    return frame


def _log_again(record: dict[str, object]) -> None:
    """Handle a child's record as if it had been made here."""
    again = logging.makeLogRecord(record)
    logger = logging.getLogger(again.name)
    if logger.isEnabledFor(again.levelno):
        logger.handle(again)
