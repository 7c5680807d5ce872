"""The health port: what it answers, and that nobody can make it do more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from stent.errors import ConfigurationError, StentError
from stent.services import health
from stent.services.health import HealthPort, open_port, parse_address

GOOD = {"live": True, "ready": True, "workers": []}
DRAINING = {"live": True, "ready": False, "workers": []}


@asynccontextmanager
async def listening(facts: dict[str, object]) -> AsyncIterator[int]:
    """The number of a port that answers with these facts."""
    socket = open_port("127.0.0.1", 0)
    port: int = socket.getsockname()[1]
    async with anyio.create_task_group() as group:
        group.start_soon(HealthPort(socket, lambda: facts).run)
        yield port
        group.cancel_scope.cancel()


async def ask(port: int, request: bytes) -> bytes:
    """All that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def ask_or_nothing(port: int, request: bytes) -> bytes:
    """Nothing from who hangs up, however it does."""
    try:
        return await ask(port, request)
    except (ConnectionResetError, BrokenPipeError):
        return b""


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("path", "facts", "status"),
    [
        ("/live", GOOD, b"200 OK"),
        ("/ready", GOOD, b"200 OK"),
        ("/ready?probe=1", GOOD, b"200 OK"),
        ("/live", DRAINING, b"200 OK"),
        ("/ready", DRAINING, b"503 Service Unavailable"),
        ("/live", DRAINING | {"live": False}, b"503 Service Unavailable"),
    ],
)
async def test_probes_are_answered(
    path: str, facts: dict[str, object], status: bytes
) -> None:
    """200 or 503, and the facts as JSON of the length that is announced."""
    async with listening(facts) as port:
        head, _, body = (await ask(port, get(path))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == facts


async def test_a_head_has_no_body() -> None:
    """The status is all that some probes ask for."""
    async with listening(GOOD) as port:
        answer = await ask(port, get("/live", "HEAD"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/"), b"404"),
        (get("/livewire"), b"404"),
        (get("/live", "POST"), b"405"),
        (b"GET /live\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x00\r\n\r\n", b"400"),
        (get("/live?" + "x" * health.HEADER_BYTES_MAX), b"431"),
        (b"GET /live HTTP/1.1\r\nA: " + b"x" * 200_000, b"431"),
    ],
)
async def test_everything_else_is_refused(request_: bytes, status: bytes) -> None:
    """With the status that says why, and the next probe is answered all the same."""
    async with listening(GOOD) as port:
        answer = await ask(port, request_)
        assert answer.startswith(b"HTTP/1.1 " + status + b" ")
        assert (await ask(port, get("/live"))).startswith(b"HTTP/1.1 200 ")


async def test_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection costs a limited time, and half a request as well."""
    monkeypatch.setattr(health, "REQUEST_SECONDS_MAX", 0.05)
    async with listening(GOOD) as port:
        assert await ask(port, b"") == b""
        assert await ask(port, b"GET /live HTTP/1.1\r\n") == b""


async def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed unread; when others have gone there is room again."""
    monkeypatch.setattr(health, "CONNECTIONS_MAX", 2)
    async with listening(GOOD) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        while await ask_or_nothing(port, get("/live")):
            continue  # The first ones may not have been accepted yet.
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        while not await ask_or_nothing(port, get("/live")):
            continue


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:8080", ("::1", 8080)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    """A port alone is of this machine only."""
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "x", "localhost", "1:2:3", "h:-1", "h:70000"])
def test_no_address_is_refused(text: str) -> None:
    """It is told how one is written."""
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        parse_address(text)


def test_a_port_that_is_taken_is_named() -> None:
    """Before anything is started."""
    with open_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StentError, match=f"127.0.0.1:{port}") as raised:
            open_port("127.0.0.1", port)
        # It may be free in a moment.
        assert not isinstance(raised.value, ConfigurationError)
