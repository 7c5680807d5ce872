"""The operating system's side of the embedded server: accounts and processes."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

if TYPE_CHECKING:
    from datetime import timedelta

NOBODY_ID: Final = 65534
POLL_SECONDS: Final = 0.005
ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class AccountOptions(TypedDict, total=False):
    """What ``subprocess`` needs to run a program under another account."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The user that the server runs as and that owns its files."""

    user_id: int
    group_id: int
    switched: bool

    @classmethod
    def of_server(cls) -> Account:
        """``nobody`` for root, whom Postgres refuses; otherwise the current user."""
        if os.geteuid() != 0:
            user_id, group_id = os.geteuid(), os.getegid()
            return cls(user_id=user_id, group_id=group_id, switched=False)
        try:
            entry = pwd.getpwnam("nobody")
        except KeyError:
            return cls(user_id=NOBODY_ID, group_id=NOBODY_ID, switched=True)
        return cls(user_id=entry.pw_uid, group_id=entry.pw_gid, switched=True)

    def options(self) -> AccountOptions:
        """Keyword arguments for ``subprocess.Popen`` and ``subprocess.run``."""
        if not self.switched:
            return {}
        return {"user": self.user_id, "group": self.group_id, "extra_groups": []}

    def give(self, path: Path) -> None:
        """Make a file or directory that root has just created the account's own."""
        if self.switched:
            os.chown(path, self.user_id, self.group_id, follow_symlinks=False)


def works_in(pid: int, directory: Path, account: Account) -> bool:
    """Whether a process is alive and has this working directory.

    A postmaster stays in its data directory, so this tells it from a process that
    was given the number of a dead one. A zombie has no working directory.
    """
    return _working_directory(pid, account) == os.path.realpath(directory)


def send_signal(pid: int, directory: Path, account: Account, number: int) -> bool:
    """Signal the process if ``works_in`` still holds; says whether it did.

    Where the kernel offers a handle on the process it is opened before the check,
    so that the number cannot change hands in between.
    """
    handle = _open_handle(pid)
    try:
        if not works_in(pid, directory, account):
            return False
        if sys.platform == "linux" and handle is not None:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def wait_until_gone(
    pid: int, directory: Path, account: Account, timeout: timedelta
) -> bool:
    """Wait until ``works_in`` no longer holds; False when the time is up first."""
    deadline = time.monotonic() + timeout.total_seconds()
    while works_in(pid, directory, account):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _open_handle(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # gone, or a kernel without it; the caller's check decides
        return None


def _working_directory(pid: int, account: Account) -> str | None:
    if sys.platform != "linux":
        return _ask_lsof(pid)
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except PermissionError:
        # Another user's process, which even root may not inspect in a container
        # without that capability; the account itself may.
        return _ask_as(account, ["readlink", f"/proc/{pid}/cwd"])
    except OSError:
        return None


def _ask_lsof(pid: int) -> str | None:
    command = ["lsof", "-a", "-p", str(pid), "-d", "cwd", "-F", "n"]
    found = subprocess.run(  # noqa: S603 - fixed words and a number
        command, capture_output=True, text=True, check=False, env=ENVIRONMENT
    ).stdout
    lines = (line[1:] for line in found.splitlines() if line.startswith("n"))
    return next(lines, None)


def _ask_as(account: Account, command: list[str]) -> str | None:
    if not account.switched:
        return None
    answer = subprocess.run(  # noqa: S603 - fixed words and a number
        command,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd="/",
        **account.options(),
    )
    return answer.stdout.rstrip("\n") or None
