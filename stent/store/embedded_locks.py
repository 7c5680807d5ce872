"""Advisory file locks that die with their process and do not cross a fork."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
from typing import TYPE_CHECKING, Final

from stent.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta
    from pathlib import Path

POLL_SECONDS: Final = 0.01


@contextlib.contextmanager
def exclusive(path: Path, timeout: timedelta) -> Iterator[None]:
    """Hold the exclusive lock of a file that is created when it is missing.

    Unlocked explicitly, not by closing alone: a process forked in the meantime has
    a copy of the descriptor, which would keep the lock.

    Raises:
        StoreError: Others held the lock for the whole ``timeout``; retryable.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    descriptor = _open(path)
    try:
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                message = f"{path} is still locked by another process after {timeout}"
                raise StoreError(message, retryable=True)
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


class SharedLock:
    """A shared lock, held from construction until ``release`` or the process's end.

    Everyone who takes or tests it holds one and the same exclusive lock meanwhile.
    That makes up for the kernel's conversion of a lock, which is not atomic: a
    failed attempt at the exclusive form has given up the shared one.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = _open(path)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        forget = weakref.WeakMethod(self._forget_in_child)

        def after_fork() -> None:
            method = forget()
            if method is not None:
                method()

        os.register_at_fork(after_in_child=after_fork)

    @property
    def held(self) -> bool:
        """False once released, and in a forked child."""
        return self._descriptor is not None

    def is_only(self) -> bool:
        """Whether nobody else holds the lock; it is held again afterwards."""
        if self._descriptor is None:
            return False
        only = _try_lock(self._descriptor, fcntl.LOCK_EX)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        return only

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None

    def _forget_in_child(self) -> None:
        # Closing is enough: the lock belongs to the parent's copy as well.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock, in either form; takes it for an instant."""
    if not path.exists():
        return False
    descriptor = _open(path)
    try:
        return not _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
