"""One Postgres for the whole test run, and a database of its own per test.

It is the embedded one unless ``--postgres`` names another.

The process that the run begins with makes a directory for all servers; each test
process joins the shared one when a test first asks for a database, and when all is
over, or was interrupted, the first process stops every server and removes its files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
import uvloop

from stent.settings import SCHEMES
from stent.store.embedded import EmbeddedServer
from stent.store.embedded_locks import exclusive
from tests.servers import Server, binaries_of, short_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from asyncpg import Connection

TEMPLATE: Final = "stent_template"
TEMPLATE_TIMEOUT: Final = timedelta(seconds=15)
LOOPS: Final[Mapping[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
IN_MEMORY: Final = Path("/dev/shm")
IN_MEMORY_BYTES_MIN: Final = 3 << 30
ROOT: Final = pytest.StashKey[Path]()
SHARED: Final = pytest.StashKey[Path]()
OTHER_URL: Final = pytest.StashKey[str | None]()
CLOSE_OTHER: Final = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--loop`` and ``--postgres``."""
    parser.addoption(
        "--loop",
        choices=sorted(LOOPS),
        default="asyncio",
        help="event loop that asynchronous tests and fixtures run on",
    )
    parser.addoption(
        "--postgres",
        metavar="PLACE",
        help="run on this Postgres instead of the embedded one: a version that is"
        " installed, such as 15, a directory of programs, or a URL",
    )


def pytest_asyncio_loop_factories(
    config: pytest.Config,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every asynchronous test on the loop that ``--loop`` names."""
    name = config.getoption("--loop")
    return {name: LOOPS[name]}


def pytest_configure(config: pytest.Config) -> None:
    """Agree on the directory that holds every server's files."""
    handed_over = getattr(config, "workerinput", None)
    if handed_over is None:
        config.stash[ROOT] = Path(tempfile.mkdtemp(prefix="stent-test-"))
        config.stash[SHARED] = _directory_of_shared()
        config.stash[OTHER_URL] = _start_other(config)
    else:
        config.stash[ROOT] = Path(handed_over["stent_root"])
        config.stash[SHARED] = Path(handed_over["stent_shared"])
        config.stash[OTHER_URL] = handed_over["stent_other_url"]


def _start_other(config: pytest.Config) -> str | None:
    """Start what ``--postgres`` names; its connection string."""
    place: str | None = config.getoption("--postgres")
    if place is None or place.startswith(SCHEMES):
        return place
    binaries = binaries_of(place)
    if binaries is None:
        message = f"PostgreSQL {place} is not installed here: skipped"
        pytest.exit(message, returncode=0)
    stack = config.stash[CLOSE_OTHER] = ExitStack()
    server = Server(binaries, stack.enter_context(short_directory()) / "other")
    stack.callback(server.stop)
    server.initialize()
    server.start(max_connections=200)
    return server.url


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more test process than processors: what waits for others uses none."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each test process the directory."""
    node.workerinput["stent_root"] = str(node.config.stash[ROOT])
    node.workerinput["stent_shared"] = str(node.config.stash[SHARED])
    node.workerinput["stent_other_url"] = node.config.stash[OTHER_URL]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave no server and no file behind, whatever ended the run."""
    config.stash.get(CLOSE_OTHER, ExitStack()).close()
    root = config.stash.get(ROOT, None)
    if root is None or hasattr(config, "workerinput"):
        return
    for home in root.iterdir():
        if home.is_dir():
            remove_server(EmbeddedServer(home))
    shared = config.stash[SHARED]
    remove_server(_shared_server(shared))
    for directory in (root, shared):
        shutil.rmtree(directory, ignore_errors=True)


def _directory_of_shared() -> Path:
    """Where the server that tests share has its files: in memory, where there is room.

    A new file takes ext4 the longer, the more have been deleted in the last minutes,
    and every database is 300 files.
    """
    place = None
    if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK | os.X_OK):
        found = os.statvfs(IN_MEMORY)
        room = found.f_bavail * found.f_frsize >= IN_MEMORY_BYTES_MIN
        # Root's server runs from a copy of the programs, beside the data.
        if room and not found.f_flag & os.ST_NOEXEC:
            place = IN_MEMORY
    directory = Path(tempfile.mkdtemp(prefix="stent-test-", dir=place))
    directory.chmod(0o711)  # root's server runs under another account
    return directory


def _shared_server(directory: Path) -> EmbeddedServer:
    return EmbeddedServer(directory / "home", root_directory=directory / "root")


def remove_server(server: EmbeddedServer) -> None:
    """Stop a server and delete all of its files."""
    server.stop_blocking()
    for directory in (server.directory, server.home):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def server_home(pytestconfig: pytest.Config) -> Iterator[Path]:
    """Home for a server of the test's own; stopped and removed afterwards."""
    home = pytestconfig.stash[ROOT] / uuid4().hex[:12]
    yield home
    remove_server(EmbeddedServer(home))


@pytest.fixture(scope="session")
def server_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """Connection string of the shared server, naming its maintenance database."""
    other = pytestconfig.stash[OTHER_URL]
    if other is not None:
        yield other
        return
    server = _shared_server(pytestconfig.stash[SHARED])
    info = server.start_blocking()
    yield info.url
    server.leave_blocking()


@pytest.fixture(scope="session")
def migrated_template(server_url: str, pytestconfig: pytest.Config) -> str:
    """Name of a database with all migrations applied; made once for all processes."""
    lock = pytestconfig.stash[ROOT] / "template.lock"
    with exclusive(lock, TEMPLATE_TIMEOUT):
        asyncio.run(_ensure_template(server_url))
    return TEMPLATE


@pytest.fixture
async def empty_database_url(server_url: str) -> AsyncIterator[str]:
    """Connection string of a database without any table of ours."""
    async for url in _database(server_url, "template1"):
        yield url


@pytest.fixture
async def database_url(server_url: str, migrated_template: str) -> AsyncIterator[str]:
    """Connection string of a fresh database with all migrations applied."""
    async for url in _database(server_url, migrated_template):
        yield url


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """A plain connection to the test's own database."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def _database(server_url: str, template: str) -> AsyncIterator[str]:
    """Clone a database and drop it afterwards, whoever is still connected.

    The strategy that logs pages takes 40 ms for a small template, the one that
    copies files 70 ms: it needs two checkpoints.
    """
    name = f"test_{uuid4().hex}"
    administrator = await asyncpg.connect(server_url)
    try:
        await administrator.execute(
            f"create database {name} template {template} strategy wal_log"
        )
        yield _url_of(server_url, name)
        await administrator.execute(f"drop database {name} with (force)")
    finally:
        await administrator.close()


async def _ensure_template(server_url: str) -> None:
    from stent.store.migrate import apply_migrations

    administrator = await asyncpg.connect(server_url)
    try:
        found = "select true from pg_database where datname = $1 and datistemplate"
        if await administrator.fetchval(found, TEMPLATE):
            return
        await administrator.execute(f"create database {TEMPLATE}")
        connection = await asyncpg.connect(_url_of(server_url, TEMPLATE))
        try:
            await apply_migrations(connection)
        finally:
            await connection.close()
        await administrator.execute(f"alter database {TEMPLATE} is_template true")
    finally:
        await administrator.close()


def _url_of(server_url: str, database: str) -> str:
    return urlsplit(server_url)._replace(path=f"/{database}").geturl()
