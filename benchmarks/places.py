"""Where to measure: databases of their own, worker processes, a pooler."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit
from uuid import uuid4

import asyncpg

from stent import Stent

START_SECONDS_MAX = 30
STOP_SECONDS_MAX = 30
POOLER_PROGRAMS = ("/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer")
POOLER_PORT = 6432
# Fewer backends than the fleets have connections: transactions of one end up on all.
POOLER_CONFIGURATION = """\
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr =
unix_socket_dir = {directory}
listen_port = {pooler_port}
auth_type = any
pool_mode = transaction
default_pool_size = 8
max_client_conn = 500
logfile = {directory}/log
"""


@contextmanager
def servers_home(prefix: str) -> Iterator[Path]:
    """A new directory for an embedded server, gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield home
    finally:
        # As root the files of the server are elsewhere, and home has links to them.
        for path in (*home.iterdir(), home):
            shutil.rmtree(path.resolve(), ignore_errors=True)


@asynccontextmanager
async def own_database(url: str) -> AsyncIterator[str]:
    """A new database on the server of ``url``, dropped afterwards."""
    name = f"bench_{uuid4().hex[:12]}"
    connection = await asyncpg.connect(url)
    await connection.execute(f"create database {name}")
    await connection.close()
    try:
        yield urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        connection = await asyncpg.connect(url)
        await connection.execute(f"drop database if exists {name} with (force)")
        await connection.close()


@asynccontextmanager
async def worker_processes(
    url: str, count: int, *, queue: str = "default", slots: int = 100
) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Worker processes, stopped at the end.

    Args:
        url: Their database.
        count: How many.
        queue: The one they serve.
        slots: Attempts at the same time in each.
    """
    arguments = ["-m", "benchmarks.worker", url, queue, str(slots)]
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, *arguments)
        for _ in range(count)
    ]
    try:
        await _wait_until_alive(url, {process.pid for process in processes})
        yield processes
    finally:
        await asyncio.gather(*[_stop(process) for process in processes])


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Let it give back what it holds; else the next workers take it over."""
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _wait_until_alive(url: str, pids: set[int]) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    async with Stent(url) as app:
        while pids - {worker.pid for worker in await app.list_workers()}:
            if time.monotonic() > deadline:
                message = f"no workers after {START_SECONDS_MAX} s"
                raise TimeoutError(message)
            await asyncio.sleep(0.05)


class ProcessorTimes:
    """How busy the processors of the machine are, where the system tells."""

    _SOURCE = Path("/proc/stat")
    _IDLE = slice(3, 5)
    """Idle, and waiting for disks."""
    _GUEST = 8
    """From here on it is counted among the others already."""

    def __init__(self) -> None:
        """Begin to measure."""
        self._began = self._read()

    def busy(self) -> float | None:
        """The share of their time that they were busy; None if nothing tells."""
        if not self._began:
            return None
        spent = [b - a for a, b in zip(self._began, self._read(), strict=True)]
        return 1 - sum(spent[self._IDLE]) / max(1, sum(spent))

    def _read(self) -> list[int]:
        if not self._SOURCE.exists():
            return []
        with self._SOURCE.open(encoding="ascii") as lines:
            return [int(part) for part in lines.readline().split()[1 : self._GUEST + 1]]


def find_pooler() -> Path | None:
    """The program of pgbouncer, if there is one."""
    for place in (shutil.which("pgbouncer"), *POOLER_PROGRAMS):
        if place is not None and Path(place).is_file():
            return Path(place)
    return None


@asynccontextmanager
async def pooler(program: Path, url: str) -> AsyncIterator[str]:
    """A pgbouncer in transaction mode before the server of ``url``: its URL.

    Raises:
        TimeoutError: It does not listen.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    with tempfile.TemporaryDirectory(prefix="stent-bench-") as name:
        directory = Path(name)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            POOLER_CONFIGURATION.format(
                host=query.get("host", [parts.hostname or "localhost"])[0],
                port=query.get("port", [str(parts.port or 5432)])[0],
                user=parts.username,
                password=parts.password,
                directory=directory,
                pooler_port=POOLER_PORT,
            ),
            encoding="utf-8",
        )
        # It refuses to run as root: then it is nobody, as the embedded server is.
        user = "nobody" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(directory, user)
            shutil.chown(configuration, user)
        process = await asyncio.create_subprocess_exec(
            program, "-q", configuration, user=user
        )
        try:
            await _wait_until_it_listens(directory / f".s.PGSQL.{POOLER_PORT}")
            place = urlencode({"host": name, "port": POOLER_PORT}, safe="/")
            yield parts._replace(
                netloc=f"{parts.username}:{parts.password}@", query=place
            ).geturl()
        finally:
            process.terminate()
            await process.wait()


async def _wait_until_it_listens(path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(path))
            return
        await asyncio.sleep(0.02)
    message = f"pgbouncer does not listen at {path}"
    raise TimeoutError(message)
