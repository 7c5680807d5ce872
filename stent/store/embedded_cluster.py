"""One data directory of the embedded server: create, launch, probe and stop it.

Nothing here decides who may use the server; callers hold the exclusive lock of
``embedded.py`` while they call anything that changes it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import stat
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote

import asyncpg

from stent.errors import ConfigurationError, StoreError
from stent.store.embedded_binaries import MAJOR_VERSION, MISSING, Binaries
from stent.store.embedded_process import (
    ENVIRONMENT,
    Account,
    send_signal,
    wait_until_gone,
    works_in,
)

USER: Final = "stent"
DATABASE: Final = "postgres"
PORT: Final = 5432
PROBE_TIMEOUT: Final = timedelta(seconds=5)
READY_TIMEOUT: Final = timedelta(seconds=60)
FAST_STOP_TIMEOUT: Final = timedelta(seconds=20)
IMMEDIATE_STOP_TIMEOUT: Final = timedelta(seconds=5)
POLL_SECONDS: Final = 0.005
LOG_FILES_MAX: Final = 5
LOG_EXCERPT_BYTES_MAX: Final = 2_000

# Order of the lines in postmaster.pid, fixed by PostgreSQL's pidfile.h.
_PID_LINE = 0
_STATUS_LINE = 7
_ORPHANS_REMAIN = "is still in use"

# wal_level: nobody replicates this server, so it need not write what a replica
# needs; an idle one then writes nothing at all. The log names no values: a message
# may be shown to people who must not see the data.
_CONFIGURATION: Final = """\
# Written at every start; put changes into local.conf beside this file.
max_connections = 200
shared_buffers = 128MB
wal_level = minimal
max_wal_senders = 0
max_logical_replication_workers = 0
password_encryption = scram-sha-256
timezone = 'UTC'
log_timezone = 'UTC'
datestyle = 'iso, ymd'
lc_messages = 'C'
logging_collector = on
log_filename = 'server-%Y%m%d-%H%M%S.log'
log_file_mode = 0600
log_rotation_size = 8MB
log_rotation_age = 1d
log_checkpoints = off
log_error_verbosity = terse
log_min_error_statement = panic
include_if_exists 'local.conf'
"""
_ACCESS: Final = "local all all scram-sha-256\n"


class Answer(StrEnum):
    """What a server said to an attempt to connect with the password."""

    READY = "ready"
    BUSY = "busy"  # starting, recovering or shutting down
    SILENT = "silent"  # accepted the connection and did not speak in time
    ABSENT = "absent"  # nobody listens


@dataclass(frozen=True, slots=True)
class PidFile:
    """What the postmaster wrote about itself; it may be dead by now."""

    pid: int
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The places and the account of one server; its user holds the password."""

    directory: Path
    socket_directory: Path
    account: Account

    @property
    def data(self) -> Path:
        """The data directory, 0700, owned by the account."""
        return self.directory / "data"

    @property
    def logs(self) -> Path:
        """Log files of the server, 0700, owned by the account."""
        return self.directory / "log"

    @property
    def password_file(self) -> Path:
        """The password of the only user, 0600, owned by who uses the server."""
        return self.directory / "password"

    @property
    def exists(self) -> bool:
        """Whether the data directory was created, to its end."""
        return (self.data / "PG_VERSION").exists()

    def url(self) -> str:
        """The full connection string.

        Raises:
            ConfigurationError: The password file is missing or open to others.
        """
        password = quote(self._password(), safe="")
        host = quote(str(self.socket_directory), safe="/")
        return f"postgresql://{USER}:{password}@/{DATABASE}?host={host}&port={PORT}"

    def pid_file(self) -> PidFile | None:
        """Read ``postmaster.pid``; None when it is missing or half written."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            status = lines[_STATUS_LINE].strip() if len(lines) > _STATUS_LINE else ""
            return PidFile(int(lines[_PID_LINE]), status)
        except (OSError, ValueError, IndexError):
            return None

    def running_pid(self) -> int | None:
        """Process id of a postmaster that is alive and works in this directory."""
        found = self.pid_file()
        if found is None or not works_in(found.pid, self.data, self.account):
            return None
        return found.pid

    def check_version(self) -> None:
        """Refuse data of another major version, which the programs cannot read.

        Raises:
            ConfigurationError: Names both versions and the way out.
        """
        version = (self.data / "PG_VERSION").read_text().strip()
        if version != str(MAJOR_VERSION):
            message = (
                f"{self.data} holds data of PostgreSQL {version}, the embedded server "
                f"is {MAJOR_VERSION}: dump it with pg_dumpall of {version}, move "
                f"{self.directory} away, start again and load the dump"
            )
            raise ConfigurationError(message)

    def create(self, binaries: Binaries) -> None:
        """Create the data directory; interrupted at any point, it can be repeated.

        Everything is on disk before the directory gets its name: ``initdb`` syncs
        what it wrote, and the renaming is synced here.

        Raises:
            ConfigurationError: The programs do not run on this machine.
            StoreError: ``initdb`` failed; its last words are in the message.
        """
        for left_over in self.directory.glob("new-*"):
            shutil.rmtree(left_over)
        staging = self.directory / f"new-{secrets.token_hex(8)}"
        staging.mkdir(mode=0o700)
        password_copy = staging / "password"
        _write_private(password_copy, self._new_password())
        data = staging / "data"
        data.mkdir(mode=0o700)
        for path in (password_copy, data, staging):
            self.account.give(path)
        self._run_initdb(binaries, data, password_copy)
        data.rename(self.data)
        _sync_directory(self.directory)
        shutil.rmtree(staging)

    def launch(self, binaries: Binaries) -> None:
        """Start the server and wait until it answers.

        A pid file left by a dead postmaster does not block it: its number is passed
        on as the one Postgres may ignore. So a zombie that nobody reaps, or another
        process that was given the number, is no obstacle, while Postgres's own check
        for surviving backends stays in force; those are waited for.

        Raises:
            ConfigurationError: The programs do not run, or the password is wrong.
            StoreError: It did not come up; the last words of its log are told.
        """
        self._write_configuration()
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while True:
            process = self._spawn(binaries)
            try:
                if self._wait_until_ready(process, deadline):
                    return
            except (ConfigurationError, StoreError):
                self.stop()
                raise
            words = _last_words(self.directory / "start.log")
            if _ORPHANS_REMAIN not in words or time.monotonic() >= deadline:
                message = f"the embedded Postgres did not start: {words}"
                raise StoreError(message, retryable=True)
            time.sleep(POLL_SECONDS * 10)

    def wait_for_running(self) -> bool:
        """Wait for a live postmaster to get ready; False when it died instead.

        Raises:
            StoreError: It lives but does not answer; retryable, and never killed
                for it: a suspended server still owns its data.
        """
        deadline = time.monotonic() + READY_TIMEOUT.total_seconds()
        while (pid := self.running_pid()) is not None:
            answer = self.probe()
            if answer is Answer.READY:
                return True
            if answer is Answer.ABSENT and self._lost_its_socket():
                self.stop()
                return False
            if answer is Answer.SILENT or time.monotonic() >= deadline:
                message = f"the embedded Postgres (process {pid}) does not answer"
                raise StoreError(message, retryable=True)
            time.sleep(POLL_SECONDS)
        return False

    def probe(self) -> Answer:
        """Connect with the password, in an event loop of its own; blocks.

        Raises:
            ConfigurationError: The server does not know the password.
        """
        return asyncio.run(_connect_once(self.url()))

    def stop(self) -> None:
        """Stop the server: fast, then immediate, then by force; no-op when down.

        Raises:
            StoreError: The process survived even that.
        """
        pid = self.running_pid()
        if pid is None:
            return
        steps = (
            (signal.SIGINT, FAST_STOP_TIMEOUT),
            (signal.SIGQUIT, IMMEDIATE_STOP_TIMEOUT),
            (signal.SIGKILL, IMMEDIATE_STOP_TIMEOUT),
        )
        for number, timeout in steps:
            if not send_signal(pid, self.data, self.account, number):
                return
            if wait_until_gone(pid, self.data, self.account, timeout):
                return
        message = f"the embedded Postgres (process {pid}) cannot be stopped"
        raise StoreError(message)

    def prune_logs(self) -> None:
        """Keep the newest log files; the names sort by time."""
        for path in sorted(self.logs.glob("server-*.log"))[:-LOG_FILES_MAX]:
            path.unlink(missing_ok=True)

    def _password(self) -> str:
        try:
            mode = self.password_file.stat().st_mode
            password = self.password_file.read_text().strip()
        except FileNotFoundError as error:
            message = f"{self.password_file} is missing, so nobody can connect"
            raise ConfigurationError(message) from error
        if mode & 0o077:
            message = f"{self.password_file} is open to others: chmod 600 it"
            raise ConfigurationError(message)
        return password

    def _new_password(self) -> str:
        if not self.password_file.exists():
            _write_private(self.password_file, f"{secrets.token_urlsafe(32)}\n")
        return self._password() + "\n"

    def _run_initdb(self, binaries: Binaries, data: Path, password: Path) -> None:
        # Builtin C.UTF-8 sorts the same on every machine and needs no locale of it.
        command = [
            str(binaries.initdb),
            f"--pgdata={data}",
            f"--username={USER}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ]
        try:
            done = subprocess.run(  # noqa: S603 - a program of our own installation
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=ENVIRONMENT,
                cwd="/",
                umask=0o077,
                start_new_session=True,  # Ctrl-C is not meant for it
                **self.account.options(),
            )
        except OSError as error:
            raise self._cannot_run(error) from error
        if done.returncode != 0:
            words = done.stderr[-LOG_EXCERPT_BYTES_MAX:].strip()
            message = f"initdb failed with exit code {done.returncode}: {words}"
            raise StoreError(message)

    def _write_configuration(self) -> None:
        # These lie outside the data directory, which belongs to the account: root
        # never writes where another user could have put a symbolic link.
        for name, text in (("server.conf", _CONFIGURATION), ("access.conf", _ACCESS)):
            path = self.directory / name
            fresh = path.with_suffix(".new")
            fresh.write_text(text)
            fresh.chmod(0o644 if self.account.switched else 0o600)
            fresh.replace(path)

    def _spawn(self, binaries: Binaries) -> subprocess.Popen[bytes]:
        """Start the postmaster in a session of its own and reap it when it ends."""
        options = {
            "config_file": self.directory / "server.conf",
            "hba_file": self.directory / "access.conf",
            "log_directory": self.logs,
            "listen_addresses": "",
            "unix_socket_directories": f'"{self.socket_directory}"',
            "unix_socket_permissions": "0700",
            "port": PORT,
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
        }
        command = [str(binaries.postgres), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        stale = self.pid_file()
        grandparent = {} if stale is None else {"PG_GRANDPARENT_PID": str(stale.pid)}
        for left_over in self.socket_directory.glob(".s.PGSQL.*"):
            left_over.unlink()
        try:
            with _open_private(self.directory / "start.log") as log:
                process = subprocess.Popen(  # noqa: S603 - our own installation
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=ENVIRONMENT | grandparent,
                    cwd="/",
                    umask=0o077,
                    start_new_session=True,
                    **self.account.options(),
                )
        except OSError as error:
            raise self._cannot_run(error) from error
        threading.Thread(
            target=process.wait, name="stent-postgres-reaper", daemon=True
        ).start()
        return process

    def _wait_until_ready(
        self, process: subprocess.Popen[bytes], deadline: float
    ) -> bool:
        """True once it answers, False when it ended by itself."""
        while process.returncode is None:
            found = self.pid_file()
            if found == PidFile(process.pid, "ready") and (
                self.probe() is Answer.READY
            ):
                return True
            if time.monotonic() >= deadline:
                message = f"the embedded Postgres was not ready within {READY_TIMEOUT}"
                raise StoreError(message, retryable=True)
            time.sleep(POLL_SECONDS)
        return False

    def _cannot_run(self, error: OSError) -> ConfigurationError:
        if isinstance(error, PermissionError) and self.account.switched:
            return ConfigurationError(
                "the embedded Postgres refuses to run as root, and changing to the "
                "user nobody is forbidden here: run as another user, or set "
                "STENT_DATABASE_URL"
            )
        return ConfigurationError(MISSING)

    def _lost_its_socket(self) -> bool:
        found = self.pid_file()
        path = self.socket_directory / f".s.PGSQL.{PORT}"
        return found is not None and found.status == "ready" and not path.exists()


def make_private_directory(path: Path, account: Account) -> None:
    """Create a 0700 directory of the account, or verify that it is one.

    In a directory that everyone may write to, somebody else may have been first:
    a link, another owner or open permissions are refused.

    Raises:
        ConfigurationError: The name is taken by something else.
    """
    try:
        path.mkdir(mode=0o700)
        account.give(path)
    except FileExistsError as error:
        found = path.lstat()
        # A process killed between the two calls above has left root's directory.
        if account.switched and found.st_uid == 0 and stat.S_ISDIR(found.st_mode):
            account.give(path)
            found = path.lstat()
        private = stat.S_IMODE(found.st_mode) & 0o077 == 0
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == account.user_id
        if not (ours and private):
            message = f"{path} must be a directory of user {account.user_id}, mode 0700"
            raise ConfigurationError(message) from error


async def _connect_once(url: str) -> Answer:
    seconds = PROBE_TIMEOUT.total_seconds()
    try:
        connection = await asyncpg.connect(url, timeout=seconds)
    except asyncpg.InvalidPasswordError as error:
        message = "the embedded Postgres refuses the password of its password file"
        raise ConfigurationError(message) from error
    except asyncpg.TooManyConnectionsError:
        return Answer.READY
    except asyncpg.CannotConnectNowError:
        return Answer.BUSY
    except TimeoutError:
        return Answer.SILENT
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return Answer.ABSENT
    await connection.close(timeout=seconds)
    return Answer.READY


def _open_private(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def _write_private(path: Path, text: str) -> None:
    """Write a new file for its owner's eyes, on disk when this returns."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with _open_private(fresh) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_words(path: Path) -> str:
    return path.read_text(errors="replace")[-LOG_EXCERPT_BYTES_MAX:].strip()
