"""Opening and closing an app, and what is refused because it is not there yet."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest

import stent
from stent import ConfigurationError, Result, Stent, durable
from stent.registry import Process

if TYPE_CHECKING:
    from collections.abc import Callable

CANARY = "canary-pw"


@durable
async def double(x: int) -> int:
    return 2 * x


@durable
async def uses_later(name: str) -> str:
    try:
        found = getattr(stent, name)("a")
        if asyncio.iscoroutine(found):
            await found
    except ConfigurationError as error:
        await double(1)
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    "options",
    [
        {"idempotent": True},
        {"idempotency_key": "x"},
        {"cached": True},
        {"version": "1"},
        {"effects": "at_most_once"},
    ],
)
def test_options_of_later_releases_are_refused(options: dict[str, Any]) -> None:
    """At registration and at the call, saying that they are not available."""
    with pytest.raises(ConfigurationError, match="not available"):
        durable(**options)
    if "effects" not in options:
        with pytest.raises(ConfigurationError, match="not available"):
            double.options(**options)


@pytest.mark.parametrize(
    "options",
    [{"max_concurrency": 5}, {"retries": 3}, {"timeout": "soon"}, {"retry": 0}],
)
def test_unknown_and_wrong_options_are_refused(options: dict[str, Any]) -> None:
    """Nothing is accepted and ignored."""
    with pytest.raises(stent.UsageError):
        durable(**options)


@pytest.mark.parametrize(
    "name",
    [
        *("schedule", "schedules", "retry", "fork", "send_signal"),
        *("list_dead_letters", "requeue_dead_letter", "discard_dead_letter"),
    ],
)
def test_methods_of_later_releases_say_so(name: str) -> None:
    """They exist and refuse."""
    with pytest.raises(ConfigurationError, match=f"Stent.{name} is not available"):
        getattr(Stent("postgresql://nobody@localhost/none"), name)("x")


@pytest.mark.parametrize(
    "name",
    [
        *("wait_for_signal", "attempt", "recover", "compensate", "patched", "restart"),
        *("state", "counters"),
    ],
)
async def test_functions_of_later_releases_say_so(database_url: str, name: str) -> None:
    """Inside a workflow too."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(uses_later, name), "10s")
    assert outcome.unwrap() == f"stent.{name} is not available in this release"


@pytest.mark.parametrize("name", ["signal", "events"])
async def test_handles_refuse_what_is_not_there(database_url: str, name: str) -> None:
    """Signals and events come later."""
    async with Stent(database_url) as app:
        method: Callable[..., Any] = getattr(app.handle("0" * 32), name)
        with pytest.raises(ConfigurationError, match="not available"):
            await (method("x") if name == "signal" else method())


async def test_use_sets_the_app_of_the_process(database_url: str) -> None:
    """Until it is closed; then calls are plain again."""
    app = await Stent.use(database_url)
    try:
        async with Stent.bootstrap(database_url, serve=True):
            assert await asyncio.wait_for(_call_elsewhere(), 10) == 8
    finally:
        await app.close()
    assert Process.caller is None
    assert await double(4) == 8


async def _call_elsewhere() -> int:
    return await double(4)


async def test_serve_works_until_it_is_drained(database_url: str) -> None:
    """And until it is cancelled."""
    async with Stent(database_url) as app:
        serving = asyncio.ensure_future(app.serve(max_concurrency=10))
        assert await app.wait_for(await app.dispatch(double, 1), "10s") == Result.Ok(2)
        await app.drain()
        await serving
        again = asyncio.ensure_future(app.serve(queues=["default"]))
        assert await app.wait_for(await app.dispatch(double, 2), "10s") == Result.Ok(4)
        again.cancel()
        with pytest.raises(asyncio.CancelledError):
            await again
        assert not app._workers


async def test_awaiting_opens_and_close_can_be_repeated(database_url: str) -> None:
    """`await Stent(...)` is the other way to open one."""
    app = await Stent.bootstrap(database_url, serve=True)
    assert await app.wait_for(await app.dispatch(double, 1), "10s") == Result.Ok(2)
    await app.close()
    await app.close()
    with pytest.raises(stent.UsageError):
        await app.dispatch(double, 1)


async def test_database_that_is_not_there(unused_tcp_port_of: int) -> None:
    """A clear error without the password, and nothing left open."""
    url = f"postgresql://someone:{CANARY}@127.0.0.1:{unused_tcp_port_of}/none"
    app = Stent(url)
    with pytest.raises(stent.StoreError) as caught:
        await app
    assert CANARY not in str(caught.value)
    assert CANARY not in repr(app)
    gc.collect()


@pytest.fixture
def unused_tcp_port_of() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def test_password_is_masked(database_url: str) -> None:
    """In the repr of an app and of its settings; `url` has it."""
    async with Stent(database_url) as app:
        password = app.url.partition("://stent:")[2].partition("@")[0]
        assert password
        for text in (repr(app), repr(app.settings), str(app)):
            assert password not in text


async def test_schema_is_not_touched_without_leave(empty_database_url: str) -> None:
    """migrate=False says what is missing."""
    with pytest.raises(stent.SchemaOutdatedError, match="stent db migrate"):
        await Stent(empty_database_url, migrate=False)
    async with Stent(empty_database_url):
        pass
    async with Stent(empty_database_url, migrate=False):
        pass
