"""The embedded Postgres: started by its first user, shared, stopped by the last.

Two lock files make that true for any number of processes. Whoever starts, joins,
restarts, leaves or stops holds the exclusive lock of ``start.lock``; every user holds
the shared lock of ``users.lock`` and touches it under the first one only. The kernel
frees both when a process dies, however it dies: a server left behind is adopted by
the next user and stopped by the next last one. ``keep`` marks a server that stays.

A server is recognised by connecting to it with the password, which it has to know as
well, never by a process id: a zombie looks alive.

As root, all files lie below ``/var/lib/stent``, where the account ``nobody`` can reach
its own ones; ``home`` holds a link to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import threading
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

import anyio
import anyio.lowlevel
from anyio import to_thread

from stent.errors import ConfigurationError, StoreError, UsageError
from stent.settings import masked
from stent.store.embedded_binaries import find_binaries, usable_binaries
from stent.store.embedded_cluster import (
    PORT,
    Answer,
    Cluster,
    make_private_directory,
)
from stent.store.embedded_locks import SharedLock, exclusive, is_held
from stent.store.embedded_process import Account

ROOT_DIRECTORY: Final = Path("/var/lib/stent")
SHORT_DIRECTORY: Final = Path("/tmp")  # noqa: S108 - see make_private_directory
SOCKET_PATH_BYTES_MAX: Final = 100
LOCK_TIMEOUT: Final = timedelta(seconds=120)
AT_ONCE: Final = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """How to reach a running server; the password is not in its ``repr``.

    Attributes:
        url: Connection string that asyncpg and psql take, password included.
        socket_directory: Where its socket is.
        data_directory: Where its data are.
        pid: The postmaster's process id, to tell people; never proof of life.
    """

    url: str
    socket_directory: Path
    data_directory: Path
    pid: int | None

    def __repr__(self) -> str:
        return (
            f"ServerInfo(url={masked(self.url)!r}, "
            f"socket_directory={str(self.socket_directory)!r}, "
            f"data_directory={str(self.data_directory)!r}, pid={self.pid})"
        )


class ServerState(StrEnum):
    """Whether there is a server."""

    ABSENT = "absent"  # no data directory yet
    STOPPED = "stopped"
    RUNNING = "running"
    UNREACHABLE = "unreachable"  # alive, but it does not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """What can be said about a server without starting it.

    Attributes:
        state: Whether it runs.
        in_use: Some process uses it, this one included.
        kept: It stays when the last user leaves.
        pid: The postmaster's process id, None unless it is alive.
        url: Connection string without its password, None before the first start.
        data_directory: Where its data are.
        log_directory: Where its log files are.
    """

    state: ServerState
    in_use: bool
    kept: bool
    pid: int | None
    url: str | None
    data_directory: Path
    log_directory: Path


class EmbeddedServer:
    """One process's part in the embedded server of a directory.

    Every ``async`` method does its blocking work in a thread and may be called from
    any event loop; calls on one object take turns.
    """

    def __init__(self, home: Path, *, root_directory: Path = ROOT_DIRECTORY) -> None:
        """Nothing is touched before ``start``.

        Args:
            home: Directory of the server's files; made when missing. One directory
                is one server, whatever name or link leads to it.
            root_directory: Where the files of every server that root runs are.
        """
        self.home = home.expanduser().resolve()
        account = Account.of_server()
        directory = self.home
        if account.switched:
            name = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:16]
            directory = root_directory / name
        self.cluster = Cluster(
            directory=directory,
            socket_directory=_socket_directory(directory),
            account=account,
        )
        self._start_lock = directory / "start.lock"
        self._users_lock = directory / "users.lock"
        self._keep = directory / "keep"
        self._users: SharedLock | None = None
        self._turn = threading.RLock()

    @property
    def directory(self) -> Path:
        """Where all files of this server are; ``home`` itself unless run by root."""
        return self.cluster.directory

    async def start(self, *, keep: bool = False) -> ServerInfo:
        """Become a user of the server: adopt it if it answers, else start it.

        Args:
            keep: Leave it running when the last user leaves, until ``stop``.
        Raises:
            ConfigurationError: It cannot run here; the message says what to do.
            StoreError: It did not come up, or another process is stuck starting it.
        """
        try:
            info = await to_thread.run_sync(self.start_blocking, keep)
            await anyio.lowlevel.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            # The thread finishes its work all the same, only nobody hears of it.
            with anyio.move_on_after(LOCK_TIMEOUT.total_seconds(), shield=True):
                await self.leave()
            raise
        return info

    async def leave(self) -> None:
        """Cease to be a user; the last one stops the server unless it is kept."""
        await to_thread.run_sync(self.leave_blocking)

    async def restart_if_down(self) -> ServerInfo:
        """Start the server again if it is dead; for users whose connections fail.

        Many may call it at once: one starts it, the others find it running.

        Raises:
            StoreError: It is alive but does not answer, or did not come up;
                retryable.
            UsageError: ``start`` was not called before.
        """
        return await to_thread.run_sync(self.restart_if_down_blocking)

    async def stop(self, *, even_if_used: bool = True) -> bool:
        """Stop the server and forget that it was to be kept.

        Args:
            even_if_used: Otherwise a server in use goes on until its last user leaves.
        Returns:
            Whether the server is down now.
        """
        return await to_thread.run_sync(self.stop_blocking, even_if_used)

    async def status(self) -> ServerStatus:
        """Look without changing anything."""
        return await to_thread.run_sync(self.status_blocking)

    def alone(self) -> bool:
        """Whether this object is the only user; never waits.

        False when in doubt: while anybody starts or leaves, and for a second object
        in the same process.
        """
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if self._users is None:
                return False
            with exclusive(self._start_lock, AT_ONCE):
                return self._users.is_only()
        except StoreError:
            return False
        finally:
            self._turn.release()

    def start_blocking(self, keep: bool = False) -> ServerInfo:  # noqa: FBT001, FBT002 - called by run_sync
        """``start`` for code without an event loop."""
        with self._turn:
            _prepare_home(self.home)
            _prepare_directory(self.home, self.cluster)
            with exclusive(self._start_lock, LOCK_TIMEOUT):
                info = self._ensure_running()
                if self._users is None or not self._users.held:
                    self._users = SharedLock(self._users_lock)
                if keep:
                    self._keep.touch(mode=0o600)
                return info

    def leave_blocking(self) -> None:
        """``leave`` for code without an event loop."""
        with self._turn, contextlib.ExitStack() as stack:
            users, self._users = self._users, None
            if users is None or not users.held:
                return
            stack.callback(users.release)
            stack.enter_context(exclusive(self._start_lock, LOCK_TIMEOUT))
            if users.is_only() and not self._keep.exists():
                self._stop()

    def restart_if_down_blocking(self) -> ServerInfo:
        """``restart_if_down`` for code without an event loop."""
        if self._users is None:
            message = "restart_if_down is for users of the server: start comes first"
            raise UsageError(message)
        with self._turn, exclusive(self._start_lock, LOCK_TIMEOUT):
            return self._ensure_running()

    def stop_blocking(self, even_if_used: bool = True) -> bool:  # noqa: FBT001, FBT002 - called by run_sync
        """``stop`` for code without an event loop."""
        with self._turn:
            if not self.directory.is_dir():
                return True
            with exclusive(self._start_lock, LOCK_TIMEOUT):
                self._keep.unlink(missing_ok=True)
                if not even_if_used and is_held(self._users_lock):
                    return False
                self._stop()
                return True

    def status_blocking(self) -> ServerStatus:
        """``status`` for code without an event loop."""
        exists = self.cluster.exists
        pid = self.cluster.running_pid() if exists else None
        return ServerStatus(
            state=self._state(exists=exists, alive=pid is not None),
            in_use=self._in_use(),
            kept=self._keep.exists(),
            pid=pid,
            url=masked(self.cluster.url()) if exists else None,
            data_directory=self.cluster.data,
            log_directory=self.cluster.logs,
        )

    def _ensure_running(self) -> ServerInfo:
        """Adopt, wait for, start or create; under the exclusive lock."""
        cluster = self.cluster
        if cluster.exists:
            cluster.check_version()
        if not (cluster.exists and self._answers()):
            binaries = usable_binaries(
                find_binaries(), self.directory / "binaries", cluster.account
            )
            make_private_directory(cluster.logs, cluster.account)
            make_private_directory(cluster.socket_directory, cluster.account)
            if not cluster.exists:
                cluster.create(binaries)
            cluster.launch(binaries)
        cluster.prune_logs()
        found = cluster.pid_file()
        return ServerInfo(
            url=cluster.url(),
            socket_directory=cluster.socket_directory,
            data_directory=cluster.data,
            pid=None if found is None else found.pid,
        )

    def _answers(self) -> bool:
        if self.cluster.probe() is Answer.READY:
            return True
        return self.cluster.wait_for_running()

    def _stop(self) -> None:
        self.cluster.stop()
        socket_directory = self.cluster.socket_directory
        if socket_directory.parent == SHORT_DIRECTORY and socket_directory.exists():
            shutil.rmtree(socket_directory)

    def _state(self, *, exists: bool, alive: bool) -> ServerState:
        if not exists:
            return ServerState.ABSENT
        if self.cluster.probe() is Answer.READY:
            return ServerState.RUNNING
        return ServerState.UNREACHABLE if alive else ServerState.STOPPED

    def _in_use(self) -> bool:
        if not self._users_lock.exists():
            return False
        try:
            with exclusive(self._start_lock, AT_ONCE):
                return is_held(self._users_lock)
        except StoreError:  # somebody is starting or leaving
            return True


def _socket_directory(directory: Path) -> Path:
    """Beside the data, unless the kernel's limit on socket paths forbids it."""
    plain = directory / "socket"
    if len(os.fsencode(plain / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES_MAX:
        return plain
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return SHORT_DIRECTORY / f"stent-{os.geteuid()}-{digest}"


def _prepare_home(home: Path) -> None:
    """Make the directory; refuse one that somebody else controls."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.stat()
    except OSError as error:
        message = f"{home} cannot be used: {error.strerror}; set STENT_HOME to another"
        raise ConfigurationError(message) from error
    if found.st_uid != os.geteuid():
        message = (
            f"{home} belongs to user {found.st_uid}, this is user {os.geteuid()}: "
            "run as its owner, or set STENT_HOME to another directory"
        )
        raise ConfigurationError(message)
    if found.st_mode & stat.S_IWOTH:
        message = f"{home} may be written to by everyone: chmod o-w it"
        raise ConfigurationError(message)
    ignore = home / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")


def _prepare_directory(home: Path, cluster: Cluster) -> None:
    """Make root's directory for the server's files and link ``home`` to it."""
    directory = cluster.directory
    if directory == home:
        return
    link = home / "server"
    old = link.readlink() if link.is_symlink() else directory
    if old != directory and (old / "data").exists() and not cluster.exists:
        message = (
            f"{home} was moved and its database is still in {old}: move that to "
            f"{directory} to keep it, or remove {link} to start with an empty one"
        )
        raise ConfigurationError(message)
    try:
        directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Others may pass through, to reach what is theirs, and see no names.
        directory.mkdir(mode=0o711, exist_ok=True)
        for path in (directory.parent, directory):
            _check_only_root_writes(path)
        if old != directory:
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(directory)
    except FileExistsError:
        pass  # another process was faster
    except OSError as error:
        message = (
            f"{directory} cannot be used: {error.strerror}; run as another user than "
            "root, or set STENT_DATABASE_URL"
        )
        raise ConfigurationError(message) from error


def _check_only_root_writes(path: Path) -> None:
    found = path.lstat()
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or writable:
        message = f"{path} must be a directory that only root may write to"
        raise ConfigurationError(message)
