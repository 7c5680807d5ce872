"""The line between a supervisor and one of its worker processes.

A socket pair. Downwards travel orders, a line each: an order is a level, so one that
is heard twice, or comes on top of a signal to the whole process group, is heard once.
Upwards travel health documents, a line of JSON each. When the supervisor dies, in
whatever way, the kernel closes its end: the worker notices at once and drains, so no
worker outlives its supervisor for long.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import anyio

from stent.log import get_logger
from stent.model import Order

log = get_logger(__name__)

REPORT_SECONDS = 1.0
CHANGE_SECONDS = 0.1
"""A change of what probes are told is reported this soon."""
LINE_BYTES_MAX = 64 * 1024
ORPHAN_GRACE = timedelta(seconds=30)
"""How much longer than its drain an orphan may take before it is ended."""
ORPHANED = 1
"""Exit code of an orphan that had to be ended."""

Look = Callable[[], dict[str, object]]


class Leash:
    """The worker's end."""

    def __init__(
        self,
        descriptor: int,
        look: Look,
        obey: Callable[[Order], None],
        drain_timeout: timedelta,
    ) -> None:
        """Take the end over.

        Args:
            descriptor: Of the socket, inherited.
            look: How the worker is now; must not wait.
            obey: Called with every order, on this leash's thread.
            drain_timeout: How long an orphan may take to end in an orderly way.
        """
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - takes no keyword
        self._socket = socket.socket(fileno=descriptor)
        self._look = look
        self._obey = obey
        self._patience = drain_timeout + ORPHAN_GRACE

    async def run(self) -> None:
        """Report and obey until cancelled."""
        reader, writer = await asyncio.open_connection(sock=self._socket)
        async with anyio.create_task_group() as group:
            group.start_soon(self._report, writer)
            await self._listen(reader)
            log.warning("supervisor.lost")
            self._obey(Order.DRAIN)
            await anyio.sleep(self._patience.total_seconds())
            # Its loop is blocked, or something does not end: nobody else can do it.
            log.error("worker.abandoned")
            os._exit(ORPHANED)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Until the other end is closed."""
        try:
            while line := await reader.readline():
                self._obey(Order(line.decode().strip()))
        except OSError:
            return

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        told: tuple[object, object] | None = None
        since = REPORT_SECONDS
        try:
            while True:
                facts = self._look()
                now = (facts["live"], facts["ready"])
                if now != told or since >= REPORT_SECONDS:
                    told, since = now, 0.0
                    writer.write(json.dumps(facts).encode() + b"\n")
                    await writer.drain()
                await anyio.sleep(CHANGE_SECONDS)
                since += CHANGE_SECONDS
        except OSError:
            return  # The reader notices as well, and says so.
