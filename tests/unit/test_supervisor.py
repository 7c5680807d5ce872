"""The supervisor of worker processes, with small programs in their place."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from stent.cli import supervisor as module
from stent.cli.supervisor import Supervisor, _pause_after
from stent.model import Order
from tests.e2e.harness.commands import clean_environment
from tests.e2e.harness.fleet import wait_until

READY = """
import socket, sys, time
line = socket.socket(fileno=int(sys.argv[1]))
worker = b'{"live": true, "ready": true}'
line.sendall(b'{"live": true, "ready": true, "workers": [' + worker + b"]}\\n")
"""
ORPHAN = """
import sys, threading, time
from datetime import timedelta
from stent.cli import leash
from stent.cli.watch import Watch
leash.ORPHAN_GRACE = timedelta(milliseconds=100)
facts = {"live": False, "ready": False, "workers": []}
one = leash.Leash(int(sys.argv[1]), lambda: facts, print, timedelta(milliseconds=100))
with Watch([one.run]):
    time.sleep(60)  # Blocked: it obeys nobody.
"""


def supervisor(program: str, count: int = 1) -> Supervisor:
    command = [sys.executable, "-c", program]
    return Supervisor(command, clean_environment(), count, timedelta(seconds=1))


async def test_wrong_usage_is_not_repeated() -> None:
    """Exit code 2 before anything has worked ends all of it, with that code."""
    assert await supervisor("raise SystemExit(2)", 2).run() == 2


async def test_what_never_worked_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a few attempts, with the exit code of the last one."""
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)
    program = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); raise SystemExit(3)"
    assert await supervisor(program).run() == 3
    starts = (tmp_path / "starts").read_text()
    assert len(starts) == module.START_FAILURES_MAX


async def test_what_has_worked_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However often it dies, and however; until it ends with 0."""
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(module, "BACKOFF_SECONDS_MAX", 0.05)
    starts = tmp_path / "starts"
    program = READY + (
        f"path = {str(starts)!r}; open(path, 'a').write('x')\n"
        "number = len(open(path).read())\n"
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGKILL) if number == 1 else None\n"
        "raise SystemExit(0 if number == 8 else 2)\n"
    )
    assert await supervisor(program).run() == 0
    assert len(starts.read_text()) == 8


async def test_who_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that obeys nobody does not keep the supervisor for ever."""
    monkeypatch.setattr(module, "ORPHAN_GRACE", timedelta(milliseconds=50))
    stubborn = supervisor(READY + "time.sleep(60)")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(stubborn.run())
        await wait_until(lambda: bool(stubborn.health()["ready"]))
        stubborn.tell(Order.DRAIN)
        assert not stubborn.health()["ready"]
        stubborn.tell(Order.STOP)
    assert running.result() == 1


async def test_who_says_nothing_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen process cannot say that it is frozen: its silence does."""
    frozen = supervisor(READY + "time.sleep(60)")
    async with asyncio.TaskGroup() as group:
        group.create_task(frozen.run())
        await wait_until(lambda: bool(frozen.health()["ready"]))
        monkeypatch.setattr(module, "LATE_SECONDS", -1.0)
        health = frozen.health()
        assert (health["live"], health["ready"]) == (True, False)
        monkeypatch.setattr(module, "SILENT_SECONDS", -1.0)
        health = frozen.health()
        assert (health["live"], health["ready"]) == (False, False)
        (child,) = frozen._children.values()
        os.kill(child.process.pid, signal.SIGKILL)
        frozen.tell(Order.DRAIN)


async def test_an_orphan_that_is_blocked_is_ended() -> None:
    """It cannot drain: after its time the thread beside its loop ends the process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            ORPHAN,
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            env=clean_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    assert (
        await reader.readline() == b'{"live": false, "ready": false, "workers": []}\n'
    )
    writer.close()
    await writer.wait_closed()
    await process.communicate()
    assert process.returncode == 1


def test_pauses_grow_up_to_a_bound() -> None:
    """Doubling, within half and whole."""
    for failures, longest in ((1, 0.5), (2, 1.0), (3, 2.0), (7, 30.0), (99, 30.0)):
        assert longest / 2 <= _pause_after(failures) <= longest
