"""A pgbouncer in transaction mode in front of a server of the tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stent.store.embedded_process import ENVIRONMENT
from tests.servers import PORT, Server, short_directory

PLACES = ("/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer", "/usr/bin/pgbouncer")
START_SECONDS_MAX = 10
# Few backends for many clients: transactions of one client end up on all of them.
CONFIGURATION = """\
[databases]
* = host={server} port={port} user={user}
[pgbouncer]
listen_addr =
unix_socket_dir = {directory}
listen_port = {port}
auth_type = any
pool_mode = transaction
default_pool_size = {backends}
max_client_conn = 500
server_round_robin = 1
logfile = {directory}/log
"""


@dataclass(frozen=True)
class Pooler:
    """A running pgbouncer."""

    directory: Path
    server: Server
    process: subprocess.Popen[bytes]

    def url_of(self, direct_url: str) -> str:
        """The same database through the pooler."""
        query = f"host={self.directory}&port={PORT}"
        return urlsplit(direct_url)._replace(query=query).geturl()


def program_or_skip() -> Path:
    """The program, or a skipped test that says what to install."""
    found = shutil.which("pgbouncer")
    for place in (found, *PLACES):
        if place is not None and Path(place).is_file():
            return Path(place)
    pytest.skip("pgbouncer is not installed here; on Debian: apt-get install pgbouncer")


@contextmanager
def pooling(server: Server, *, backends: int = 4) -> Iterator[Pooler]:
    """A pgbouncer before ``server``, gone afterwards."""
    program = program_or_skip()
    with short_directory() as directory:
        server.account.give(directory)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            CONFIGURATION.format(
                server=server.directory,
                port=PORT,
                user=urlsplit(server.url).username,
                directory=directory,
                backends=backends,
            )
        )
        configuration.chmod(0o644)
        process = subprocess.Popen(
            [program, "-q", configuration],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            **server.account.options(),
        )
        try:
            _wait_until_it_listens(process, directory)
            yield Pooler(directory, server, process)
        finally:
            process.terminate()
            process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(directory / f".s.PGSQL.{PORT}"))
            return
        time.sleep(0.02)
    log = directory / "log"
    words = log.read_text() if log.exists() else "it said nothing"
    message = f"pgbouncer did not start: {words}"
    raise AssertionError(message)
