"""Wake-up hints: channels, a connection that listens, and a sender that coalesces.

Hints only make things faster: whoever is hinted at reads the tables, and reads them
once a second without any hint.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from uuid import UUID

import anyio
import asyncpg

from stent.errors import StoreError
from stent.log import DATABASE_POOLED, get_logger
from stent.store.session import Session
from stent.store.store import Store

log = get_logger(__name__)

PAUSE_SECONDS = 0.01
"""Hints of this long travel together; the first one goes at once."""
PROBE_SECONDS = 30.0
HINTS_MAX = 1000
POOLED_ADVICE = (
    "set STENT_DIRECT_URL to the server itself; until then work is found by polling, "
    "and a killed worker is noticed when its lease runs out"
)

Hint = tuple[str, str]
"""Channel and payload."""
OnHint = Callable[[str, str], None]


LIMITS_CHANNEL = "stent_limits"
"""Where all workers hear that limits have changed."""


def worker_channel(worker_id: UUID) -> str:
    """Where a worker hears of its inboxes."""
    return f"stent_worker_{worker_id.hex}"


def client_channel(client_id: UUID) -> str:
    """Where a process hears that something it waits for has ended."""
    return f"stent_client_{client_id.hex}"


def queue_channel(queue: str) -> str:
    """Where workers hear of new work in a queue; a name of bounded length."""
    digest = hashlib.blake2b(queue.encode(), digest_size=12).hexdigest()
    return f"stent_queue_{digest}"


class Listener:
    """One connection that listens, and comes back when it is lost."""

    def __init__(
        self,
        session: Session,
        channels: Iterable[str],
        on_hint: OnHint,
        *,
        on_connected: Callable[[Session], Awaitable[None]] | None = None,
    ) -> None:
        """Create it.

        Args:
            session: Used by nobody else.
            channels: To listen to.
            on_hint: Called with channel and payload.
            on_connected: Called after each connect, before listening.
        """
        self._session = session
        self._channels = tuple(channels)
        self._on_hint = on_hint
        self._on_connected = on_connected
        self._lost = anyio.Event()
        self._pooled = False

    async def run(self) -> None:
        """Listen for ever."""
        pause = 0.0
        while True:
            try:
                await self._listen()
                pause = 0.0
            except StoreError as error:
                log.debug("listener.lost", error=str(error))
                pause = min(1.0, pause * 2 or 0.02)
            await anyio.sleep(pause * (0.5 + random.random()))  # noqa: S311

    async def _listen(self) -> None:
        self._lost = lost = anyio.Event()
        await self._session.connection()
        if self._session.pooled:
            await self._do_without()
            return
        self._pooled = False
        if self._on_connected is not None:
            await self._on_connected(self._session)
        await self._session.run(self._subscribe, "listen")
        # Whatever was missed while it was away is found by looking.
        for channel in self._channels:
            self._on_hint(channel, "")
        while not lost.is_set():
            with anyio.move_on_after(PROBE_SECONDS):
                await lost.wait()
            if not lost.is_set():
                await self._session.run(_probe, "probe")
        await self._session.drop()

    async def _do_without(self) -> None:
        """Through a pooler others would get our hints: look now and then instead."""
        if not self._pooled:
            self._pooled = True
            log.warning(DATABASE_POOLED, advice=POOLED_ADVICE)
        await self._session.close()
        await anyio.sleep(PROBE_SECONDS)

    async def _subscribe(self, connection: asyncpg.Connection) -> None:
        lost = self._lost
        connection.add_termination_listener(lambda _connection: lost.set())
        for channel in self._channels:
            await connection.add_listener(channel, self._heard)

    def _heard(
        self, _connection: object, _pid: int, channel: str, payload: object
    ) -> None:
        self._on_hint(channel, str(payload))


async def _probe(connection: asyncpg.Connection) -> None:
    await connection.execute("select 1")


class Hinter:
    """Sends hints: the first at once, those of the next moment together."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hints: dict[Hint, None] = {}
        self._wake = anyio.Event()
        self._sent = anyio.Event()
        self._sending = False

    def send(self, channel: str, payload: str = "") -> None:
        """Send soon; a hint that is waiting already is not sent twice."""
        if len(self._hints) < HINTS_MAX:
            self._hints[channel, payload] = None
            self._wake.set()

    async def wait_until_sent(self) -> None:
        """Until nothing is waiting to be sent."""
        while self._hints or self._sending:
            await self._sent.wait()

    async def run(self) -> None:
        """Send for ever; a hint that cannot be sent is dropped."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            hints, self._hints = list(self._hints), {}
            self._sending = True
            began = time.monotonic()
            try:
                await self._store.notify(hints)
            except StoreError as error:
                log.debug("hints.dropped", count=len(hints), error=str(error))
            self._sending = False
            sent, self._sent = self._sent, anyio.Event()
            sent.set()
            pause = PAUSE_SECONDS - (time.monotonic() - began)
            await anyio.sleep(max(0.0, pause))
