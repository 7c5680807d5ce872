"""What a worker process calls before its first claim and after its last work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stent
from stent import ConfigurationError, Stent, WorkerHookError, durable, hooks
from tests import hooked
from tests.pools import lines

if TYPE_CHECKING:
    from asyncpg import Connection

pytestmark = pytest.mark.timeout(60)
happened: list[str] = []


@pytest.fixture(autouse=True)
def _no_other_hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a test end with it."""
    happened.clear()
    monkeypatch.setattr(hooks, "of_workers", hooks.Hooks())
    yield
    happened.clear()


@durable
async def work() -> str:
    happened.append("work")
    await asyncio.sleep(0)
    return "done"


def record_hooks() -> None:
    @stent.on_worker_start
    async def connect() -> None:
        await asyncio.sleep(0)
        happened.append("connect")

    @Stent.on_worker_start()
    def fill() -> None:
        happened.append("fill")

    @Stent.on_worker_stop
    def empty() -> None:
        happened.append("empty")

    @stent.on_worker_stop
    async def disconnect() -> None:
        await asyncio.sleep(0)
        happened.append("disconnect")


async def test_hooks_run_around_all_work(database_url: str) -> None:
    """In order before the first claim, in the opposite order after the last work."""
    record_hooks()
    async with Stent(database_url) as client:
        execution_id = await client.dispatch(work)
        async with Stent.bootstrap(database_url, serve=True):
            await client.wait_for(execution_id)
    assert happened == ["connect", "fill", "work", "disconnect", "empty"]


async def test_hooks_run_once_in_a_process(database_url: str) -> None:
    """However many workers it has, even if they start and stop together."""
    record_hooks()
    apps = [Stent.bootstrap(database_url, serve=True) for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for app in apps:
            group.create_task(open_app(app))
    assert happened == ["connect", "fill"]
    await apps[0].close()
    assert happened == ["connect", "fill"]
    async with asyncio.TaskGroup() as group:
        for app in apps[1:]:
            group.create_task(app.close())
    assert happened == ["connect", "fill", "disconnect", "empty"]


async def open_app(app: Stent) -> None:
    await app


async def test_hooks_run_again_for_a_later_worker(database_url: str) -> None:
    """What was closed is opened again."""
    record_hooks()
    for _ in range(2):
        async with Stent.bootstrap(database_url, serve=True):
            pass
    assert happened == ["connect", "fill", "disconnect", "empty"] * 2


async def test_client_calls_no_hooks(database_url: str) -> None:
    """Only workers do."""
    record_hooks()
    async with Stent(database_url):
        pass
    assert happened == []


async def test_failing_start_hook_stops_the_worker(
    database_url: str, connection: Connection
) -> None:
    """The error names it, its cause is there, and nothing was claimed or registered."""

    @stent.on_worker_start
    def connect() -> None:
        message = "refused"
        raise ConnectionError(message)

    async with Stent(database_url) as client:
        await client.dispatch(work)
        with pytest.raises(WorkerHookError, match=r"connect failed.*refused") as caught:
            async with Stent.bootstrap(database_url, serve=True):
                pytest.fail("it works")
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert happened == []
    assert await connection.fetchval("select count(*) from stent.workers") == 0


async def test_failing_stop_hook_is_logged(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The others run all the same."""
    record_hooks()

    @stent.on_worker_stop
    def fail() -> None:
        message = "too late"
        raise OSError(message)

    with caplog.at_level(logging.ERROR):
        async with Stent.bootstrap(database_url, serve=True):
            happened.clear()
    assert happened == ["disconnect", "empty"]
    (record,) = [r for r in caplog.records if r.getMessage() == "worker.hook_failed"]
    assert record.error == "too late"  # type: ignore[attr-defined]


async def test_processes_have_hooks_of_their_own(
    database_url: str, tmp_path: Path
) -> None:
    """Once in each process before its first call, and when an idle one ends."""
    path = tmp_path / "log"
    async with Stent.bootstrap(database_url, serve=True) as app:
        for _ in range(2):
            outcome = await app.wait_for(await app.dispatch(hooked.look, str(path)))
            assert outcome.unwrap() == ["model"]
    pid = lines(path)[0][1]
    assert lines(path) == [["looked", pid, "2"]] * 2 + [["unloaded", pid]]
    assert hooked.loaded == []


def test_what_cannot_be_a_hook_is_refused() -> None:
    """When it is defined, naming it."""

    async def waits() -> None:
        """No process of a pool has a loop."""

    def takes(what: str) -> None:
        del what

    with pytest.raises(ConfigurationError, match=r"takes is called without 'what'"):
        stent.on_worker_start(takes)  # type: ignore[type-var]
    with pytest.raises(ConfigurationError, match=r"waits is async def"):
        stent.on_worker_start(pool="process")(waits)
    with pytest.raises(ConfigurationError, match="pool is 'thread'"):
        stent.on_worker_stop(pool="thread")
    with pytest.raises(ConfigurationError, match="a function"):
        stent.on_worker_stop(3)  # type: ignore[call-overload]
