"""``stent worker --processes``, its health port, systemd, and commands for a fleet."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stent import Stent
from stent.model import Status
from tests.e2e.harness.commands import (
    Command,
    Commands,
    clean_environment,
    is_alive,
    load_program,
)
from tests.e2e.harness.fleet import POLL_SECONDS, wait_until
from tests.e2e.harness.proxy import Proxy
from tests.servers import short_directory

PROGRAMS = Path(__file__).parent / "programs"
FLOWS = load_program(PROGRAMS / "shell_flows.py")
HEALTH = ("--health", "0")
SHORT_LEASE = {
    "STENT_LEASE_SECONDS": "2",
    "STENT_LEASE_MARGIN_SECONDS": "0.3",
    "STENT_LEASE_RENEW_EVERY_SECONDS": "0.3",
}

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def commands(database_url: str, tmp_path: Path) -> Iterator[Commands]:
    environment = clean_environment(STENT_DATABASE_URL=database_url)
    with Commands(tmp_path, environment) as commands:
        yield commands


def worker(commands: Commands, *words: str, **variables: str) -> Command:
    return commands.start(
        "worker", "shell_flows", *words, cwd=PROGRAMS, session=True, **variables
    )


async def run_one(app: Stent) -> None:
    """The fleet works."""
    outcome = await app.wait_for(await dispatch(app, "add", 3))
    assert outcome.unwrap() == 6


async def dispatch(app: Stent, name: str, *args: object) -> str:
    execution_id: str = await app.dispatch(getattr(FLOWS, name), *args)
    return execution_id


async def wait_for_owner(app: Stent, execution_id: str, *, owned: bool) -> None:
    """Until an execution has a worker, or none."""
    while True:
        state = await app.state_of(execution_id)
        if (state.worker_id is not None) is owned and state.status is Status.RUNNING:
            return
        await asyncio.sleep(POLL_SECONDS)


async def test_processes_are_kept_running(
    commands: Commands, database_url: str
) -> None:
    """One that is killed is started again; a signal ends all, with exit code 0."""
    async with Stent(database_url) as app:
        supervisor = worker(commands, "--processes", "3", *HEALTH)
        facts = await supervisor.wait_for_probe("/ready", 200)
        pids = {one["pid"] for one in facts["workers"]}
        assert len(pids) == 3
        assert {w.pid for w in await app.list_workers()} == pids
        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        (died,) = await supervisor.wait_for("process.died")
        assert (died["pid"], died["exit_code"]) == (victim, -signal.SIGKILL)
        await supervisor.wait_for("process.started", 4)
        facts = await supervisor.wait_for_probe("/ready", 200)
        again = {one["pid"] for one in facts["workers"]}
        assert len(again) == 3
        assert len(again & pids) == 2
        await run_one(app)
        supervisor.signal(signal.SIGTERM)
        assert await supervisor.wait() == 0
        assert len(supervisor.lines("worker.drained")) == 3
        assert not any(is_alive(pid) for pid in pids | again)


async def test_signals_are_passed_on(commands: Commands, database_url: str) -> None:
    """The first drains, also when the whole group gets it; a second one hurries."""
    async with Stent(database_url) as app:
        supervisor = worker(commands, "--processes", "2", *HEALTH)
        await supervisor.wait_for_probe("/ready", 200)
        execution_id = await dispatch(app, "hold")
        await wait_for_owner(app, execution_id, owned=True)
        pids = [line["pid"] for line in supervisor.lines("process.started")]
        # As systemd does: every process of the service gets the signal.
        for pid in (supervisor.pid, *pids):
            os.kill(pid, signal.SIGTERM)
        await wait_for_owner(app, execution_id, owned=False)
        # The idle one ends; the other waits for its activity, not hurried by hearing
        # of it twice.
        await supervisor.wait_for("process.ended")
        assert sum(is_alive(pid) for pid in pids) == 1
        facts = await supervisor.wait_for_probe("/ready", 503)
        assert [one["state"] for one in facts["workers"]] == ["draining"]
        assert facts["workers"][0]["running"] == 1
        assert (await supervisor.probe("/live"))[0] == 200
        supervisor.signal(signal.SIGTERM)
        assert await supervisor.wait() == 0
        assert await app.cancel(execution_id)


async def test_no_worker_outlives_its_supervisor(
    commands: Commands, database_url: str
) -> None:
    """When the supervisor is killed, its workers drain: they hand over and end."""
    async with Stent(database_url) as app:
        supervisor = worker(commands, "--processes", "2", *HEALTH)
        await supervisor.wait_for_probe("/ready", 200)
        execution_id = await dispatch(app, "nap")
        await wait_for_owner(app, execution_id, owned=True)
        pids = [line["pid"] for line in supervisor.lines("process.started")]
        supervisor.signal(signal.SIGKILL)
        await supervisor.wait()
        await wait_until(lambda: not any(is_alive(pid) for pid in pids))
        assert len(supervisor.lines("supervisor.lost")) == 2
        assert len(supervisor.lines("worker.drained")) == 2
        assert (await app.state_of(execution_id)).worker_id is None


async def test_what_cannot_start_is_not_tried_for_ever(commands: Commands) -> None:
    """A module that is not there ends the whole as it ends a single worker."""
    words = ("worker", "no_such_module")
    single = commands.start(*words, cwd=PROGRAMS)
    supervisor = commands.start(*words, "--processes", "2", cwd=PROGRAMS)
    assert await single.wait() == 2
    assert await supervisor.wait() == 2
    assert "no module 'no_such_module'" in supervisor.log.read_text()
    assert len(supervisor.lines("process.started")) == 2


async def test_a_port_that_is_taken_ends_it_at_once(commands: Commands) -> None:
    """Nothing is started without the health that was asked for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = worker(commands, "--health", address)
        assert await refused.wait() == 1
    assert f"cannot listen on {address}" in refused.log.read_text()


async def test_a_blocked_loop_is_not_live(
    commands: Commands, database_url: str
) -> None:
    """The port answers while the worker's loop is blocked, and says so."""
    async with Stent(database_url) as app:
        blocked = worker(commands, *HEALTH, **SHORT_LEASE)
        facts = await blocked.wait_for_probe("/ready", 200)
        assert (facts["live"], facts["workers"][0]["state"]) == (True, "running")
        execution_id = await dispatch(app, "block", 4)
        await blocked.wait_for_probe("/ready", 503)
        facts = await blocked.wait_for_probe("/live", 503)
        assert facts["workers"][0]["lag_ms"] >= 2000
        # The lease is renewed all the same, so its work is its own.
        assert facts["workers"][0]["lease_left_ms"] > 0
        await blocked.wait_for_probe("/live", 200)
        await blocked.wait_for_probe("/ready", 200)
        assert (await app.wait_for(execution_id)).unwrap() == 4


async def test_without_the_database_it_is_live_and_not_ready(
    commands: Commands, database_url: str
) -> None:
    """Starting it again would not help; it is ready again when the database is back."""
    with short_directory() as directory:
        async with Proxy(database_url, directory) as proxy:
            cut_off = worker(
                commands, *HEALTH, **SHORT_LEASE, STENT_DATABASE_URL=proxy.url
            )
            await cut_off.wait_for_probe("/ready", 200)
            proxy.block()
            facts = await cut_off.wait_for_probe("/ready", 503)
            while facts["workers"][0]["lease_left_ms"] > 0:
                assert facts["live"]
                _, facts = await cut_off.probe("/ready")
            assert (await cut_off.probe("/live"))[0] == 200
            proxy.unblock()
            await cut_off.wait_for_probe("/ready", 200)
            cut_off.signal(signal.SIGTERM)
            assert await cut_off.wait() == 0


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
async def test_systemd_is_told(
    commands: Commands, database_url: str, tmp_path: Path, processes: tuple[str, ...]
) -> None:
    """READY=1 once it claims, WATCHDOG=1 while it lives, STOPPING=1 when it drains."""
    address = str(tmp_path / "notify")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.setblocking(False)

        async def hear(wanted: str) -> list[str]:
            heard: list[str] = []
            while wanted not in heard:
                data = await loop.sock_recv(listening, 4096)
                heard += data.decode().split("\n")
            return heard

        service = worker(
            commands, *processes, NOTIFY_SOCKET=address, WATCHDOG_USEC="400000"
        )
        before = await hear("READY=1")
        assert "STOPPING=1" not in before
        async with Stent(database_url) as app:
            alive = [one for one in await app.list_workers() if one.alive]
            assert len(alive) == len(processes) or len(alive) == 1
            assert "READY=1" not in await hear("WATCHDOG=1")
            execution_id = await dispatch(app, "hold")
            await wait_for_owner(app, execution_id, owned=True)
            service.signal(signal.SIGTERM)
            await hear("STOPPING=1")
            # It lives as long as it drains.
            await hear("WATCHDOG=1")
            service.signal(signal.SIGTERM)
            assert await service.wait() == 0
            await app.cancel(execution_id)


async def test_the_fleet_from_a_shell(commands: Commands, database_url: str) -> None:
    """workers, drain and stop: by id, by host and pid, all; waiting; exit codes."""
    async with Stent(database_url) as app:
        fleet = [worker(commands, STENT_APP_VERSION="shop 7") for _ in range(3)]
        for one in fleet:
            await one.wait_for("worker.started")
        code, printed = await commands.run("workers", "--json", cwd=PROGRAMS)
        assert code == 0
        found = {one["pid"]: one for one in map(json.loads, printed.splitlines())}
        assert set(found) == {one.pid for one in fleet}
        shown = found[fleet[0].pid]
        assert (shown["state"], shown["app_version"]) == ("running", "shop 7")
        assert "shell_flows.add" in shown["functions"]
        for columns in ("160", "60"):
            code, table = await commands.run("workers", cwd=PROGRAMS, COLUMNS=columns)
            assert max(map(len, table.splitlines())) <= int(columns)
            assert all(str(one.pid) in table for one in fleet)
        # By the beginning of its id, with a wait for its end.
        short = shown["id"][:8]
        code, printed = await commands.run("drain", short, "--wait", cwd=PROGRAMS)
        assert (code, shown["id"] in printed) == (0, True)
        assert await fleet[0].wait() == 0
        # By host and pid, although it runs something.
        execution_id = await dispatch(app, "hold")
        await wait_for_owner(app, execution_id, owned=True)
        state = await app.state_of(execution_id)
        (busy,) = [w for w in await app.list_workers() if w.id == state.worker_id]
        place = f"{busy.host}:{busy.pid}"
        code, printed = await commands.run(
            "drain", place, "--wait", "--timeout", "0.3", cwd=PROGRAMS
        )
        assert (code, "still running" in printed) == (5, True)
        code, printed = await commands.run("stop", place, "--wait", cwd=PROGRAMS)
        assert code == 0, printed
        assert await app.cancel(execution_id)
        code, _ = await commands.run("stop", "--all", "--wait", cwd=PROGRAMS)
        assert [await one.wait() for one in fleet] == [0, 0, 0]
        _, printed = await commands.run("workers", "--ended", "--json", cwd=PROGRAMS)
        states = {json.loads(line)["state"] for line in printed.splitlines()}
        assert states == {"stopped"}
        wrong = {
            "drain 0123abcd": 3,
            "drain": 2,
            f"stop {short} --all": 2,
            "drain --all --timeout 1s": 2,
        }
        for line, expected in wrong.items():
            code, printed = await commands.run(*line.split(), cwd=PROGRAMS)
            assert code == expected, printed
