"""Stands between a worker and Postgres, and loses what a network can lose.

Both sides are unix sockets, as the embedded server's only are. A connection is known by
the ``application_name`` of its first message, so that a test can choose among the
worker's connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, quote, urlsplit

PARSE, BIND, QUERY = b"P", b"B", b"Q"
READY_IDLE = b"Z\x00\x00\x00\x05I"
"""How the server ends an answer outside of a transaction: what it did is committed."""
CHUNK_BYTES = 65536


class Proxy:
    """Forwards until told otherwise."""

    def __init__(self, url: str, directory: Path) -> None:
        """Create it; enter it to listen.

        Args:
            url: Of the database.
            directory: Gets the socket; a short path.
        """
        self._parts = urlsplit(url)
        options = parse_qs(self._parts.query)
        self._name = f".s.PGSQL.{options.get('port', ['5432'])[0]}"
        self._upstream = Path(options["host"][0]) / self._name
        self._directory = directory
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.cut_answer: Callable[[str, str], bool] = lambda _name, _sql: False
        """Asked per answer of a bound statement: connection name, its text."""
        self.cut_commit: Callable[[int], bool] = lambda _number: False
        """Asked per answer to a COMMIT: its number from 1, over all connections."""
        self.cuts = 0
        self.commits = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(
            self._accept, self._directory / self._name
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """The database through this proxy."""
        host = quote(str(self._directory), safe="/")
        query = f"host={host}&port={self._name.rpartition('.')[2]}"
        return self._parts._replace(query=query).geturl()

    def block(self) -> None:
        """From now on nothing gets through, in either direction, and nobody is told."""
        self._open.clear()

    def unblock(self) -> None:
        """Everything that was held up goes on, and so does the rest."""
        self._open.set()

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there: asyncio.StreamWriter | None = None
        try:
            await self._open.wait()
            source, there = await asyncio.open_unix_connection(self._upstream)
            link = _Link(self)
            forward = asyncio.create_task(link.requests(reader, there))
            back = asyncio.create_task(link.answers(source, writer))
            try:
                await asyncio.wait({forward, back}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in (forward, back):
                    one.cancel()
                await asyncio.gather(forward, back, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, there):
                if end is not None:
                    with contextlib.suppress(OSError):
                        end.close()

    async def wait_until_open(self) -> None:
        """Until nothing is held up."""
        await self._open.wait()


class _Link:
    """One connection."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._name: str | None = None
        self._statements: dict[bytes, str] = {}
        self._bound: str | None = None
        self._committing = False

    async def requests(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        """From the worker to the server."""
        while data := await source.read(CHUNK_BYTES):
            if self._name is None:
                self._name = _application_name(data)
            if data[:1] == PARSE:
                statement, sql = data[5:].split(b"\0", 2)[:2]
                self._statements[statement] = sql.decode(errors="replace")
            if data[:1] == BIND:
                statement = data[5:].split(b"\0", 2)[1]
                self._bound = self._statements.get(statement, "")
            if data[:1] == QUERY and b"COMMIT" in data:
                self._committing = True
            await self._proxy.wait_until_open()
            target.write(data)
            await target.drain()

    async def answers(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        """From the server to the worker."""
        while data := await source.read(CHUNK_BYTES):
            if self._bound is not None and data.endswith(READY_IDLE):
                sql, self._bound = self._bound, None
                if self._proxy.cut_answer(self._name or "", sql):
                    self._proxy.cuts += 1
                    return
            if self._committing and data.endswith(READY_IDLE):
                self._committing = False
                self._proxy.commits += 1
                if self._proxy.cut_commit(self._proxy.commits):
                    self._proxy.cuts += 1
                    return
            await self._proxy.wait_until_open()
            target.write(data)
            await target.drain()


def _application_name(first: bytes) -> str:
    """What a connection calls itself in its first message."""
    words = first.split(b"\0")
    if b"application_name" not in words:
        return ""
    return words[words.index(b"application_name") + 1].decode()
