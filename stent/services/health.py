"""A health port: tells probes over HTTP whether a process lives and is ready.

A few lines of HTTP/1.1 on asyncio streams, bounded in every direction: one request per
connection, a header of limited size, a limited time, a limited number of connections.
It answers ``GET`` and ``HEAD`` of ``/live`` and ``/ready`` with 200 or 503 and a small
JSON document, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import Callable
from datetime import timedelta
from http import HTTPStatus

import anyio

from stent.errors import ConfigurationError, StentError
from stent.log import get_logger
from stent.model import Health, WorkerHealth

log = get_logger(__name__)

DEFAULT_HOST = "127.0.0.1"
HEADER_BYTES_MAX = 8 * 1024
REQUEST_SECONDS_MAX = 5.0
"""For reading a request and writing its answer."""
CONNECTIONS_MAX = 32
"""More at the same time are closed unread."""
PORT_HIGHEST = 65_535
_END = b"\r\n\r\n"
_MILLISECOND = timedelta(milliseconds=1)


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``:PORT`` or ``PORT``; an IPv6 address stands in brackets.

    Raises:
        ConfigurationError: It is none of them.
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if (
        not port.isdecimal()
        or int(port) > PORT_HIGHEST
        or (":" in host and not bracketed)
    ):
        message = f"{text!r} is no address: write HOST:PORT or PORT"
        raise ConfigurationError(message)
    del separator
    return (host[1:-1] if bracketed else host) or DEFAULT_HOST, int(port)


def open_port(host: str, port: int) -> socket.socket:
    """Listen; port 0 takes a free one.

    Raises:
        ConfigurationError: There is no such address.
        StentError: Somebody has it, perhaps not for long.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            raise StentError(message) from error
        raise ConfigurationError(message) from error


def worker_facts(worker: WorkerHealth) -> dict[str, object]:
    """A worker as probes see it; durations in milliseconds."""
    return {
        "id": worker.id,
        "pid": worker.pid,
        "state": worker.state,
        "live": worker.live,
        "ready": worker.ready,
        "running": worker.running,
        "slots": worker.slots,
        "residents": worker.residents,
        "lag_ms": round(worker.lag / _MILLISECOND),
        "lease_left_ms": round(worker.lease_left / _MILLISECOND),
    }


def health_facts(health: Health) -> dict[str, object]:
    """The document that probes get."""
    return {
        "live": health.live,
        "ready": health.ready,
        "workers": [worker_facts(worker) for worker in health.workers],
    }


class HealthPort:
    """Answers probes on one listening socket."""

    def __init__(
        self, listening: socket.socket, look: Callable[[], dict[str, object]]
    ) -> None:
        """Create it.

        Args:
            listening: See ``open_port``; closed at the end.
            look: How things are now, as ``health_facts`` has it; it must not wait.
        """
        self._listening = listening
        self._look = look
        self._connections = 0

    async def run(self) -> None:
        """Answer until cancelled."""
        host, port, *_ = self._listening.getsockname()
        server = await asyncio.start_server(
            self._serve, sock=self._listening, limit=HEADER_BYTES_MAX
        )
        log.info("health.opened", host=host, port=port)
        try:
            await anyio.sleep_forever()
        finally:
            server.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._connections >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections += 1
        try:
            with anyio.move_on_after(REQUEST_SECONDS_MAX):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.write_eof()
                # Who closes with unread bytes resets the connection, and the answer
                # with it.
                await reader.read(HEADER_BYTES_MAX)
        except OSError as error:
            log.debug("health.probe_lost", error=str(error))
        finally:
            self._connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(_END)
        except asyncio.LimitOverrunError:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, {})
        except asyncio.IncompleteReadError:
            return _response(HTTPStatus.BAD_REQUEST, {})
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, {})
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, {}, allow=True)
        path = target.split(b"?", 1)[0]
        if path not in (b"/live", b"/ready"):
            return _response(HTTPStatus.NOT_FOUND, {})
        facts = self._look()
        good = facts[path[1:].decode()]
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        return _response(status, facts, body=method == b"GET")


def _response(
    status: HTTPStatus,
    facts: dict[str, object],
    *,
    body: bool = True,
    allow: bool = False,
) -> bytes:
    content = json.dumps(facts or {"error": status.phrase}).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET, HEAD"] if allow else []),
    ]
    head = "\r\n".join(lines).encode() + _END
    return head + content if body else head
