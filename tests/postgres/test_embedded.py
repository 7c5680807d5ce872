"""The embedded server: shared, adopted, restarted and stopped as promised."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

import anyio
import anyio.lowlevel
import asyncpg
import pytest

import stent
from stent import Stent
from stent.errors import ConfigurationError, UsageError
from stent.store.embedded import EmbeddedServer, ServerInfo, ServerState
from stent.store.embedded_binaries import PACKAGE, find_binaries, usable_binaries
from stent.store.embedded_process import Account, wait_until_gone

RACING_PROCESSES: Final = 10
STOP_TIMEOUT: Final = timedelta(seconds=10)
OTHER_USER: Final = 65533
REPOSITORY: Final = Path(stent.__file__).parent.parent
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
as_root_only = pytest.mark.skipif(os.geteuid() != 0, reason="changes the account")

# Joins the server, says its process id, and stays until its input ends.
USER_PROCESS: Final = """
import os, sys
from pathlib import Path
from stent.store.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
print(server.start_blocking().pid, flush=True)
if "fork" in sys.argv and os.fork() == 0:
    print("forked", flush=True)
sys.stdin.read()
server.leave_blocking()
"""


class UserProcess:
    """Another process that uses the server until told to leave."""

    def __init__(self, home: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER_PROCESS, str(home), *words],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> int:
        self.process.communicate()
        return self.process.returncode

    def suspend(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def home(server_home: Path) -> Path:
    return server_home


@pytest.fixture
def server(home: Path) -> EmbeddedServer:
    return EmbeddedServer(home)


async def fetch_value(info: ServerInfo, query: str) -> object:
    connection = await asyncpg.connect(info.url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def kill_postmaster(server: EmbeddedServer, pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    data, account = server.cluster.data, server.cluster.account
    assert wait_until_gone(pid, data, account, STOP_TIMEOUT)


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def process_arguments() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            found.append(path.read_text(errors="replace"))
    return found


def start_stranger(account: Account) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, cwd="/", **account.options()
    )


def connect_as_other_user(path: Path) -> subprocess.CompletedProcess[str]:
    # The account changes inside: the interpreter may be closed to other users.
    program = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({OTHER_USER}); os.setuid({OTHER_USER})\n"
        "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def make_home(home: Path, mode: int) -> None:
    home.mkdir()
    home.chmod(mode)


async def test_last_user_stops_the_server(home: Path) -> None:
    """The second user joins the first one's server; it ends with the last of them."""
    first, second = EmbeddedServer(home), EmbeddedServer(home)
    started = await first.start()
    joined = await second.start()
    assert joined == started
    await first.leave()
    assert await fetch_value(joined, "select 1") == 1
    await second.leave()
    assert (await second.status()).state is ServerState.STOPPED


async def test_data_survive_a_stop(server: EmbeddedServer) -> None:
    """The next start finds what was committed, under the same connection string."""
    info = await server.start()
    await fetch_value(info, "create table kept as select 7 as value")
    await server.leave()
    again = await server.start()
    assert again.url == info.url
    assert await fetch_value(again, "select value from kept") == 7
    await server.leave()


async def test_server_is_configured_for_durability(server: EmbeddedServer) -> None:
    """What is durable and what is the same on every machine is set as promised."""
    info = await server.start()
    connection = await asyncpg.connect(info.url)
    rows = await connection.fetch("select name, setting from pg_settings")
    await connection.close()
    await server.leave()
    settings = {row["name"]: row["setting"] for row in rows}
    expected = {
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "unix_socket_permissions": "0700",
        "server_encoding": "UTF8",
        "TimeZone": "UTC",
        "max_connections": "200",
    }
    assert {name: settings[name] for name in expected} == expected


async def test_fsync_cannot_be_switched_off(server: EmbeddedServer) -> None:
    """Neither a configuration file nor ALTER SYSTEM wins over the command line."""
    info = await server.start()
    await fetch_value(info, "alter system set fsync = off")
    await server.leave()
    (server.directory / "local.conf").write_text("fsync = off\nwork_mem = '5MB'\n")
    (server.directory / "local.conf").chmod(0o644)
    again = await server.start()
    assert await fetch_value(again, "show fsync") == "on"
    assert await fetch_value(again, "show work_mem") == "5MB"
    await server.leave()


async def test_killed_postmaster_is_restarted(server: EmbeddedServer) -> None:
    """After kill -9 of the server, its user starts it again and has lost nothing."""
    info = await server.start()
    await fetch_value(info, "create table kept as select 7 as value")
    kill_postmaster(server, info.pid)
    assert (await server.status()).state is ServerState.STOPPED
    again = await server.restart_if_down()
    assert again.pid != info.pid
    assert again.url == info.url
    assert await fetch_value(again, "select value from kept") == 7
    await server.leave()


async def test_restart_of_a_running_server_does_nothing(
    server: EmbeddedServer,
) -> None:
    """Whoever comes second with a failed connection finds the server running."""
    info = await server.start()
    assert await server.restart_if_down() == info
    await server.leave()


async def test_restart_is_for_users(server: EmbeddedServer) -> None:
    """A process that never joined must not bring up a server that nobody stops."""
    with pytest.raises(UsageError):
        await server.restart_if_down()


async def test_killed_backend_is_waited_for(server: EmbeddedServer) -> None:
    """When one backend is killed the server recovers itself and is not replaced."""
    info = await server.start()
    connection = await asyncpg.connect(info.url)
    backend = await connection.fetchval("select pg_backend_pid()")
    os.kill(backend, signal.SIGKILL)
    with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
        await connection.fetchval("select pg_sleep(10)")
    again = await server.restart_if_down()
    assert again.pid == info.pid
    assert await fetch_value(again, "select 1") == 1
    await server.leave()


@linux_only
async def test_zombie_postmaster_does_not_block_a_restart(
    home: Path, server: EmbeddedServer
) -> None:
    """A dead server whose parent does not reap it is replaced all the same."""
    with UserProcess(home) as starter:
        pid = int(starter.said())
        await server.start()
        starter.suspend()
        kill_postmaster(server, pid)
        while not is_zombie(pid):
            await anyio.lowlevel.checkpoint()
        os.kill(pid, 0)  # it does look alive
        again = await server.restart_if_down()
        assert again.pid != pid
        assert await fetch_value(again, "select 1") == 1
        starter.process.send_signal(signal.SIGCONT)
    await server.leave()


async def test_reused_process_id_does_not_block_a_start(
    server: EmbeddedServer,
) -> None:
    """A pid file that names a stranger, alive and of the same user, is stale."""
    info = await server.start()
    kill_postmaster(server, info.pid)
    stranger = start_stranger(server.cluster.account)
    try:
        path = server.cluster.data / "postmaster.pid"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        again = await server.restart_if_down()
        assert await fetch_value(again, "select 1") == 1
        assert stranger.poll() is None
        await server.leave()
        assert stranger.poll() is None
    finally:
        stranger.communicate()


async def test_lost_socket_is_made_again(server: EmbeddedServer) -> None:
    """A server that nobody can reach, its socket deleted, is started anew."""
    info = await server.start()
    (info.socket_directory / ".s.PGSQL.5432").unlink()
    again = await server.restart_if_down()
    assert again.pid != info.pid
    assert await fetch_value(again, "select 1") == 1
    await server.leave()


async def test_server_of_a_killed_user_is_adopted(
    home: Path, server: EmbeddedServer
) -> None:
    """A server left behind by kill -9 is taken over, and ended, by the next user."""
    with UserProcess(home) as user:
        pid = int(user.said())
        user.kill()
    assert (await server.status()).state is ServerState.RUNNING
    assert not (await server.status()).in_use
    assert (await server.start()).pid == pid
    await server.leave()
    assert (await server.status()).state is ServerState.STOPPED


@pytest.mark.timeout(60)
def test_racing_processes_share_one_server(home: Path) -> None:
    """Of many that start at once one creates the server; all leave, it is gone."""
    with ExitStack() as stack:
        users = [
            stack.enter_context(UserProcess(home)) for _ in range(RACING_PROCESSES)
        ]
        pids = {user.said() for user in users}
        assert len(pids) == 1
        assert pids != {""}
        assert [user.leave() for user in users] == [0] * RACING_PROCESSES
    assert EmbeddedServer(home).status_blocking().state is ServerState.STOPPED


async def test_alone_sees_other_users(home: Path, server: EmbeddedServer) -> None:
    """Alone before start is False, as only user True, beside a live one False."""
    assert not server.alone()
    await server.start()
    assert server.alone()
    with UserProcess(home) as user:
        user.said()
        assert not server.alone()
        user.kill()
        assert server.alone()
    await server.leave()
    assert not server.alone()


async def test_asking_whether_alone_keeps_the_place(
    home: Path, server: EmbeddedServer
) -> None:
    """The question, answered with no, has not made the asker leave."""
    info = await server.start()
    with UserProcess(home) as user:
        user.said()
        assert not server.alone()
        assert user.leave() == 0
    assert await fetch_value(info, "select 1") == 1
    await server.leave()


async def test_forked_child_is_no_user(home: Path, server: EmbeddedServer) -> None:
    """A child that a killed user forked does not hold its place."""
    with UserProcess(home, "fork") as user:
        user.said()
        assert user.said() == "forked"
        await server.start()
        assert not server.alone()
        user.process.send_signal(signal.SIGKILL)
        user.process.wait()
        assert server.alone()
    await server.leave()


async def test_kept_server_outlives_its_users(
    home: Path, server: EmbeddedServer
) -> None:
    """A server that is kept stays after the last user, until it is stopped."""
    info = await server.start(keep=True)
    await server.leave()
    status = await server.status()
    assert (status.state, status.kept, status.in_use, status.pid) == (
        ServerState.RUNNING,
        True,
        False,
        info.pid,
    )
    assert await EmbeddedServer(home).stop()
    status = await server.status()
    assert (status.state, status.kept) == (ServerState.STOPPED, False)


async def test_stop_spares_a_server_in_use(home: Path, server: EmbeddedServer) -> None:
    """A polite stop only ends the keeping; the last user still stops the server."""
    info = await server.start(keep=True)
    assert not await EmbeddedServer(home).stop(even_if_used=False)
    assert await fetch_value(info, "select 1") == 1
    await server.leave()
    assert (await server.status()).state is ServerState.STOPPED


async def test_cancelled_start_leaves_no_server(server: EmbeddedServer) -> None:
    """Who is cancelled while starting is no user and has left nothing running."""
    async with anyio.create_task_group() as group:
        group.start_soon(server.start)
        while not (server.directory / "start.lock").exists():
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    status = await server.status()
    assert (status.state, status.in_use) == (ServerState.STOPPED, False)


async def test_app_leaves_the_server_when_its_scope_is_cancelled(home: Path) -> None:
    """The scope is anyio's, which cancels every wait, also those of closing."""
    with anyio.CancelScope() as scope:
        async with Stent.bootstrap(home=home, serve=True):
            scope.cancel()
            await anyio.sleep_forever()
    assert (await EmbeddedServer(home).status()).state is ServerState.STOPPED


async def test_interrupted_creation_is_repeated(server: EmbeddedServer) -> None:
    """What a killed initdb left is removed, and the data directory is whole."""
    await server.start()
    await server.leave()
    remains = server.directory / "new-0123456789abcdef"
    server.cluster.data.rename(remains)
    (remains / "PG_VERSION").unlink()
    info = await server.start()
    assert not remains.exists()
    assert await fetch_value(info, "select 1") == 1
    await server.leave()


async def test_long_path_moves_the_socket(home: Path) -> None:
    """Below a path too long for a socket, the server is reachable all the same."""
    server = EmbeddedServer(home.with_name("d" * 100))
    info = await server.start()
    assert len(os.fsencode(info.socket_directory)) < 100
    assert stat.S_IMODE(info.socket_directory.stat().st_mode) == 0o700
    assert await fetch_value(info, "select 1") == 1
    await server.leave()
    if server.directory == server.home:  # as root the path is short anyhow
        assert not info.socket_directory.exists()


async def test_foreign_socket_directory_is_refused(
    tmp_path: Path, server: EmbeddedServer
) -> None:
    """A link that somebody put where the socket's directory belongs is not used."""
    await server.start()
    await server.leave()
    directory = server.cluster.socket_directory
    shutil.rmtree(directory, ignore_errors=True)
    trap = tmp_path / "trap"
    trap.mkdir(mode=0o700)
    server.cluster.account.give(trap)
    directory.symlink_to(trap)
    with pytest.raises(ConfigurationError, match="mode 0700"):
        await server.start()
    directory.unlink()


async def test_files_are_closed_to_others(server: EmbeddedServer) -> None:
    """Data, logs and socket are 0700, password and start log 0600."""
    info = await server.start()
    cluster = server.cluster
    for directory in (info.data_directory, info.socket_directory, cluster.logs):
        found = directory.stat()
        assert stat.S_IMODE(found.st_mode) == 0o700
        assert found.st_uid == cluster.account.user_id
    for file in (cluster.password_file, server.directory / "start.log"):
        found = file.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_uid == os.geteuid()
    await server.leave()


async def test_nobody_is_trusted(server: EmbeddedServer) -> None:
    """Who can reach the socket still needs the password."""
    info = await server.start()
    guess = info.url.replace(info.url.split(":")[2].split("@")[0], "guess")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(guess)
    await server.leave()


@as_root_only
async def test_other_user_cannot_reach_the_socket(server: EmbeddedServer) -> None:
    """Another account does not get as far as the password."""
    info = await server.start()
    tried = connect_as_other_user(info.socket_directory / ".s.PGSQL.5432")
    assert tried.returncode != 0
    assert "PermissionError" in tried.stderr
    await server.leave()


async def test_open_password_file_is_refused(server: EmbeddedServer) -> None:
    """A password that others can read is none."""
    await server.start()
    await server.leave()
    server.cluster.password_file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        await server.start()


async def test_home_open_to_everyone_is_refused(home: Path) -> None:
    """In a directory that anybody may write to, nothing is safe."""
    make_home(home, mode=0o777)
    with pytest.raises(ConfigurationError, match="chmod o-w"):
        await EmbeddedServer(home).start()


@as_root_only
async def test_home_of_another_user_is_refused(home: Path) -> None:
    """Root does not make files in somebody else's server."""
    make_home(home, mode=0o700)
    os.chown(home, OTHER_USER, OTHER_USER)
    with pytest.raises(ConfigurationError, match="belongs to user"):
        await EmbeddedServer(home).start()


@as_root_only
async def test_moved_home_is_noticed(tmp_path: Path, server: EmbeddedServer) -> None:
    """A moved project does not silently get an empty database."""
    await server.start()
    await server.leave()
    moved = EmbeddedServer(server.home.rename(tmp_path / "elsewhere"))
    with pytest.raises(ConfigurationError, match=r"was moved .* is still in"):
        await moved.start()


@as_root_only
def test_unreachable_binaries_are_copied(tmp_path: Path) -> None:
    """What the account cannot reach is copied; no directory is opened for it."""
    closed = tmp_path / "closed"
    found = find_binaries()
    package = found.directory.parent.parent
    place = closed / PACKAGE
    shutil.copytree(
        package / "pginstall18",
        place / "pginstall18",
        symlinks=True,
        ignore=shutil.ignore_patterns("include"),
    )
    libraries = package.with_name(f"{PACKAGE}.libs")
    if libraries.exists():
        shutil.copytree(libraries, closed / libraries.name)
    closed.chmod(0o700)
    account = Account.of_server()
    hidden = type(found)(place / "pginstall18" / "bin")
    with tempfile.TemporaryDirectory() as reachable:
        Path(reachable).chmod(0o711)
        copies = Path(reachable) / "binaries"
        usable = usable_binaries(hidden, copies, account)
        assert usable.directory.is_relative_to(copies)
        initdb = [str(usable.initdb), "--version"]
        subprocess.run(initdb, check=True, cwd="/", **account.options())
        assert usable_binaries(hidden, copies, account) == usable
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


async def test_missing_programs_are_explained(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra, the error says both ways out."""
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ConfigurationError) as caught:
        await server.start()
    assert 'pip install "stent-engine[local]"' in str(caught.value)
    assert "STENT_DATABASE_URL" in str(caught.value)


async def test_other_major_version_is_refused(server: EmbeddedServer) -> None:
    """Data of another major version are left as they are, with a way out."""
    await server.start()
    await server.leave()
    (server.cluster.data / "PG_VERSION").write_text("17\n")
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 17.*pg_dumpall"):
        await server.start()
    assert (server.cluster.data / "base").is_dir()


@linux_only
async def test_password_is_not_shown(server: EmbeddedServer) -> None:
    """No repr, status, process list or log tells the password."""
    info = await server.start()
    password = server.cluster.password_file.read_text().strip()
    assert password in info.url
    shown = [repr(info), repr(await server.status())]
    shown += process_arguments()
    shown += [path.read_text() for path in server.cluster.logs.iterdir()]
    shown.append((server.directory / "start.log").read_text())
    assert not [text for text in shown if password in text]
    await server.leave()
