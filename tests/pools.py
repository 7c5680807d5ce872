"""Activities in threads and processes, and hooks; processes import this module.

What they do is seen in files: a child shares no memory with its test.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stent
from stent import RetryPolicy, durable

AGAIN = RetryPolicy(max_attempts=3, initial_delay="1ms")
log = logging.getLogger("tests.pools")


class Colour(enum.Enum):
    """A class that results carry."""

    RED = "red"


@dataclass(frozen=True)
class Point:
    """Another one."""

    x: int
    colour: Colour


class PoolError(Exception):
    """With attributes of its own."""

    def __init__(self, code: int, *, path: Path) -> None:
        super().__init__(f"code {code} at {path}")
        self.code = code
        self.path = path


def write(path: str, *words: object) -> None:
    """Append a line, in one piece."""
    line = " ".join(str(word) for word in words) + "\n"
    descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def lines(path: Path | str) -> list[list[str]]:
    """The words of every line that is there."""
    file = Path(path)
    return (
        [line.split() for line in file.read_text().splitlines()]
        if (file.exists())
        else []
    )


def exists(pid: int) -> bool:
    """Whether it runs; a zombie whose parent was killed does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").exists():
            return status.read_text().rpartition(")")[2].split()[0] != "Z"
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def _until_exists(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)


# Threads.


@durable(retry=1)
def listen(path: str) -> str:
    """Goes on until it is asked to stop."""
    write(path, "begun", stent.current().cancelled)
    try:
        while True:
            stent.raise_if_cancelled(wait="10ms")
    except asyncio.CancelledError:
        write(path, "ended", stent.current().cancelled)
        raise


timed_listen = listen.options(timeout="50ms")


@durable
async def listen_in_workflow(path: str, timeout: str | None) -> str:
    """Asks it to stop after a time, or is cancelled itself."""
    return await listen.options(timeout=timeout)(path)


@durable(retry=AGAIN)
def where(path: str) -> dict[str, Any]:
    """Fails once; says where it runs."""
    current = stent.current()
    log.info("here %s", current.attempt)
    write(path, current.attempt, stent.idempotency_key(), current.execution_id)
    if current.attempt == 1:
        message = "once more"
        raise ConnectionError(message)
    return {
        "function": current.function,
        "thread": threading.current_thread().name,
        "key": stent.idempotency_key(),
    }


@durable(retry=1)
def deaf(path: str, until: str) -> None:
    """Does not listen; ends when a file is there."""
    write(path, "begun", stent.current().address, stent.idempotency_key())
    _until_exists(until)
    write(path, "ended", stent.current().address, stent.idempotency_key())


@durable
async def quick(path: str) -> None:
    """On the loop."""
    write(path, "quick")
    await asyncio.sleep(0)


@durable
async def deaf_then_quick(path: str, until: str) -> str:
    """The first one is given up, the second needs its slot."""
    try:
        await deaf.options(timeout="50ms")(path, until)
    except stent.ActivityTimeoutError:
        write(path, "given-up")
    await quick(path)
    return "done"


@durable(retry=2, timeout="100ms")
def deaf_first_time(item: int, path: str, until: str) -> int:
    """An item of a map that is tried again while its first attempt goes on."""
    key, attempt = stent.idempotency_key(), stent.current().attempt
    write(path, "begun", item, attempt, key)
    if item == 0 and attempt == 1:
        _until_exists(until)
    write(path, "ended", item, attempt, stent.idempotency_key())
    return item


@durable
async def map_deaf(path: str, until: str) -> list[int]:
    """One page."""
    items = [(n, path, until) for n in range(3)]
    return await stent.starmap(deaf_first_time, items, chunk=3)


# Processes.


@durable(pool="process")
def pid_of(value: int) -> tuple[int, int]:
    """Where it runs."""
    return value, os.getpid()


@durable(pool="process")
def echo(value: Any) -> Any:
    """What it was given."""
    return value


@durable
def echo_in_thread(value: Any) -> Any:
    """The same next door."""
    return value


def _fail(kind: str) -> None:
    match kind:
        case "own":
            raise PoolError(7, path=Path("/tmp/x"))
        case "cause":
            raise ValueError(kind) from KeyError("inner")
        case "group":
            message = "several"
            raise ExceptionGroup(message, [ValueError(1), PoolError(2, path=Path())])
        case "exit":
            raise SystemExit(3)
        case "stop":
            raise StopIteration(4)
        case "result":
            error = ValueError("with a note")
            error.add_note("the note")
            raise error


@durable(pool="process", retry=1)
def fail(kind: str) -> None:
    """Raises."""
    _fail(kind)


@durable(retry=1)
async def fail_here(kind: str) -> None:
    """Raises the same."""
    _fail(kind)


@durable(pool="process", retry=1)
def unstorable() -> object:
    """No payload."""
    return sys.stdout


@durable(pool="process", retry=AGAIN)
def die(how: str, path: str) -> int:
    """Ends its process, the first time."""
    attempt = stent.current().attempt
    write(path, attempt, os.getpid(), stent.idempotency_key())
    if attempt == 1:
        match how:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "abort":
                os.abort()
    return attempt


@durable(pool="process", retry=1)
def die_always() -> None:
    """Never comes back."""
    os._exit(9)


@durable(pool="process", retry=1)
def spin(path: str) -> None:
    """Computes for ever, and has started a program."""
    program = subprocess.Popen(["sleep", "1000"])
    write(path, os.getpid(), program.pid)
    while True:
        pass


@durable
async def spin_in_workflow(path: str, timeout: str | None) -> None:
    """Ends when it is made to."""
    await spin.options(timeout=timeout)(path)


@durable(pool="process")
def wait_for_file(path: str, until: str) -> int:
    """Holds its process until a file is there."""
    write(path, "begun", os.getpid())
    _until_exists(until)
    write(path, "ended", os.getpid())
    return os.getpid()


@durable
async def hold_processes(count: int, path: str, until: str) -> int:
    """As many as there may be, and more; meanwhile the loop is free."""
    calls = [wait_for_file.options(key=str(n))(path, until) for n in range(count)]
    gathered = asyncio.gather(*calls)
    await quick(path)
    return len(set(await gathered))


@durable(pool="process", max_concurrent=1)
def one_at_a_time(number: int, path: str, until: str) -> int:
    """An item that holds its process, and the slot of its function."""
    write(path, "begun", number)
    _until_exists(until)
    return number


@durable
async def map_one_at_a_time(count: int, path: str, until: str) -> list[int]:
    """Items of one page; all but one of them wait for the slot."""
    items = [(number, path, until) for number in range(count)]
    return await stent.starmap(one_at_a_time, items, chunk=count)


@durable(pool="process")
def square(value: int) -> int:
    """Cheap."""
    return value * value


@durable(pool="process", retry=AGAIN)
def die_at_seven(value: int) -> int:
    """An item whose process is lost once."""
    if value == 7 and stent.current().attempt == 1:
        os._exit(1)
    return value * value


@durable
async def map_squares(count: int) -> list[int]:
    """All items in processes."""
    return await stent.map(die_at_seven, range(count), chunk=5)


@durable(pool="process", retry=AGAIN)
def talk(path: str) -> dict[str, Any]:
    """Everything that an activity may say and ask."""
    current = stent.current()
    stent.tell({"attempt": current.attempt})
    log.warning("from a process", extra={"attempt_seen": current.attempt})
    write(path, stent.idempotency_key())
    stent.heartbeat({"attempt": current.attempt, "point": Point(1, Colour.RED)})
    if current.attempt == 1:
        message = "once more"
        raise ConnectionError(message)
    return {
        "heartbeat": current.heartbeat,
        "key": stent.idempotency_key(),
        "seconds": abs((stent.now() - stent.now()).total_seconds()),
        "tags": current.tags,
    }


@durable(pool="process", retry=1, kind="activity")
def overstep(what: str) -> None:
    """Asks for what a process cannot do."""
    match what:
        case "call":
            asyncio.run(square(2))
        case "start":
            asyncio.run(square.start(2))
        case "transaction":
            stent.transaction()


# Heartbeats.


@durable(retry=AGAIN)
async def beat_and_fail(count: int) -> list[Any]:
    """Says how far it has come, and fails twice."""
    current = stent.current()
    for number in range(count):
        stent.heartbeat([current.attempt, number])
    if current.attempt < 3:
        message = "again"
        raise ConnectionError(message)
    return [current.attempt, current.heartbeat]


@durable(retry=AGAIN)
def beat_in_thread(count: int) -> list[Any]:
    """The same in a thread."""
    current = stent.current()
    for number in range(count):
        stent.heartbeat([current.attempt, number])
    if current.attempt < 3:
        message = "again"
        raise ConnectionError(message)
    return [current.attempt, current.heartbeat]


@durable(retry=AGAIN)
async def beat_item(item: int) -> Any:
    """An item of a map."""
    current = stent.current()
    if current.attempt == 1:
        stent.heartbeat(["item", item])
        message = "again"
        raise ConnectionError(message)
    return current.heartbeat


@durable
async def beats(count: int) -> tuple[list[Any], list[Any]]:
    """Both."""
    return await asyncio.gather(beat_and_fail(count), beat_in_thread(count))


@durable
async def map_beats(count: int) -> list[Any]:
    """A page."""
    return await stent.map(beat_item, range(count), chunk=count)


@durable(retry=1)
def beat_and_wait(number: int, until: str) -> int:
    """Says something once, and waits for a file."""
    stent.heartbeat({"row": number})
    _until_exists(until)
    return number


@durable
async def beat_and_wait_in_workflow(until: str) -> int:
    """A call, and a page of a map."""
    called = beat_and_wait(1, until)
    mapped = stent.starmap(beat_and_wait, [(2, until)])
    one, more = await asyncio.gather(called, mapped)
    total: int = one + sum(more)
    return total


@durable(retry=1)
def beat_until_cancelled(path: str) -> None:
    """The heartbeat tells a thread that it was cancelled."""
    try:
        while True:
            stent.heartbeat("alive")
            time.sleep(0.005)
            write(path, "beat")
    except asyncio.CancelledError:
        write(path, "cancelled")
        raise


@durable
async def beat_in_workflow() -> None:
    """Not the place."""
    stent.heartbeat(1)
    await square(1)


@durable(retry=1)
async def beat_too_much() -> None:
    """More than a row should be."""
    stent.heartbeat("x" * 100_000)
