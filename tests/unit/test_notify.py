"""What systemd is told, over real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import anyio
import pytest

from stent.errors import ConfigurationError
from stent.services.notify import Notifier
from stent.settings import ServiceManager, Settings, environment_of

WORKING = {"live": True, "ready": True, "workers": [{"state": "running"}]}
STUCK = {"live": False, "ready": False, "workers": [{"state": "running"}]}
DRAINING = {"live": True, "ready": False, "workers": [{"state": "draining"}]}
STARTING = {"live": True, "ready": False, "workers": []}


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket, and its address as the environment gives it."""
    address = str(tmp_path / "notify")
    if request.param == "abstract":
        if not Path("/proc/net/unix").exists():
            pytest.skip("the abstract name space is Linux's")
        address = f"@stent-test-{uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address.replace("@", "\0"))
        listening.settimeout(10)
        yield listening, address


async def told(
    manager: tuple[socket.socket, str],
    facts: dict[str, object],
    until: str,
    watchdog: timedelta | None = None,
) -> list[str]:
    """The first lines of datagrams, up to one that begins like ``until``."""
    listening, address = manager
    lines: list[str] = []
    notifier = Notifier(ServiceManager(address, watchdog), lambda: facts)

    async def hear() -> None:
        while not lines or lines[-1] != until:
            data = await anyio.to_thread.run_sync(listening.recv, 4096)
            lines.append(data.decode().split("\n")[0])
            if lines[-1] == "READY=1":
                facts.update(DRAINING)

    async with anyio.create_task_group() as group:
        group.start_soon(notifier.run)
        await hear()
        group.cancel_scope.cancel()
    return lines


async def test_ready_once_then_stopping_once(
    manager: tuple[socket.socket, str],
) -> None:
    """READY=1 when it claims, STOPPING=1 when its workers drain, whoever asked."""
    assert await told(manager, dict(WORKING), "STOPPING=1") == ["READY=1", "STOPPING=1"]


async def test_the_watchdog_hears_of_who_lives(
    manager: tuple[socket.socket, str],
) -> None:
    """Also before it is ready; nothing else is said then."""
    period = timedelta(milliseconds=20)
    assert await told(manager, dict(STARTING), "WATCHDOG=1", period) == ["WATCHDOG=1"]


async def test_the_watchdog_hears_nothing_of_who_is_stuck(
    manager: tuple[socket.socket, str],
) -> None:
    """A worker whose loop does not turn is left to the service manager."""
    listening, address = manager
    looks = 0

    def look() -> dict[str, object]:
        nonlocal looks
        looks += 1
        return STUCK

    notifier = Notifier(ServiceManager(address, timedelta(milliseconds=2)), look)
    async with anyio.create_task_group() as group:
        group.start_soon(notifier.run)
        while looks < 5:
            await anyio.lowlevel.checkpoint()
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.recv(4096)
        group.cancel_scope.cancel()


async def test_an_end_between_two_looks_is_told(
    manager: tuple[socket.socket, str],
) -> None:
    """A drain with nothing to wait for takes less time than a pause."""
    listening, address = manager
    looked = anyio.Event()

    def look() -> dict[str, object]:
        looked.set()
        return WORKING

    async with anyio.create_task_group() as group:
        group.start_soon(Notifier(ServiceManager(address), look).run)
        await looked.wait()
        group.cancel_scope.cancel()
    said = [(await anyio.to_thread.run_sync(listening.recv, 4096)) for _ in range(2)]
    assert [lines.split(b"\n")[0] for lines in said] == [b"READY=1", b"STOPPING=1"]


def test_who_does_not_listen_is_no_obstacle(tmp_path: Path) -> None:
    """A socket that is not there, or is full, costs a warning and no exception."""
    notifier = Notifier(ServiceManager(str(tmp_path / "nobody")), lambda: WORKING)
    notifier.send("READY=1")
    notifier.tell_stopping()
    assert notifier.stopping


def test_the_environment_names_the_manager() -> None:
    """The watchdog counts only if it is meant for this process."""
    socket_ = {"NOTIFY_SOCKET": "/run/x"}
    period = {"WATCHDOG_USEC": "30000000"}
    of = ServiceManager.from_env
    assert of({}) is None
    assert of({"NOTIFY_SOCKET": "", **period}) is None
    assert of(socket_) == ServiceManager("/run/x")
    watched = ServiceManager("/run/x", timedelta(seconds=30))
    assert of(socket_ | period) == watched
    assert of(socket_ | period | {"WATCHDOG_PID": str(os.getpid())}) == watched
    assert of(socket_ | period | {"WATCHDOG_PID": "1"}) == ServiceManager("/run/x")
    with pytest.raises(ConfigurationError, match="WATCHDOG_USEC"):
        of(socket_ | {"WATCHDOG_USEC": "soon"})


def test_settings_travel_to_a_process_in_its_environment(tmp_path: Path) -> None:
    """What a supervisor was given reaches its workers; its service manager does not."""
    given = Settings(
        database_url="postgresql://u:p@h/d?sslmode=require",
        home=tmp_path,
        app_version="7",
        drain_timeout=timedelta(milliseconds=1500),
        max_concurrency=3,
    )
    assert Settings.from_env(environment_of(given)) == given
    embedded = Settings(home=tmp_path)
    assert Settings.from_env(environment_of(embedded)) == embedded
    assert ServiceManager.from_env(environment_of(given)) is None
