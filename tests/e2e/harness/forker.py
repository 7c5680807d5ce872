"""Starts worker processes fast: imports everything once, then forks.

It reads lines of JSON: ``[number, plan]`` starts a process. It writes lines of JSON:
``["started", number, pid]`` and ``["ended", pid, status]``, the status negative for a
signal. When its input ends it kills what it has started and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import traceback
from typing import Any

from tests.e2e.harness import member


def main() -> None:
    """Serve until the input ends."""
    # A process unblocks it once it can stop in an orderly way.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    children: set[int] = set()
    pending = b""
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                data = os.read(0, 65536)
                if not data:
                    _end(children)
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    children.add(_start(*json.loads(line)))
            else:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
                _reap(children)


def _start(number: int, plan: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            member.run(member.Plan.of_json(plan))
            status = 0
        except BaseException:  # noqa: BLE001 - the child must not become a forker
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _say("started", number, pid)
    return pid


def _reap(children: set[int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        children.discard(pid)
        _say("ended", pid, os.waitstatus_to_exitcode(status))


def _end(children: set[int]) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _say(*words: object) -> None:
    # Whoever listened may be gone; then the input ends as well.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(words).encode() + b"\n")


if __name__ == "__main__":
    main()
