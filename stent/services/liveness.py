"""Lease and liveness lock: how others know that this worker lives, and it of them.

Runs in a thread of its own with an event loop and a connection of its own, so that
code that blocks the worker's loop costs nobody their lease. The thread renews the
lease, holds the shared liveness lock, looks for dead workers and takes them over, and
names the code that blocks the loop.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from stent.errors import LeaseLostError, StoreError
from stent.log import (
    LOOP_BLOCKED,
    WORKER_TAKEN_OVER,
    get_logger,
)
from stent.services.identity import Identity
from stent.services.outage import Outage
from stent.store.queries import load
from stent.store.session import Session
from stent.store.store import Boot, Store

log = get_logger(__name__)

LOOK_SECONDS = 0.2
"""How often a worker looks for dead ones."""
CONFIRM_SECONDS = 0.25
"""A free liveness lock counts when it is still free after this long, without a sign
of life in between."""
LATE_SECONDS = 0.1
"""A look that is later than this proves nothing: the machine is too busy."""
LAG_SECONDS_MAX = 1.0
BEAT_SECONDS = LAG_SECONDS_MAX / 4
"""How often the worker's loop shows that it turns."""


@dataclass(frozen=True, slots=True)
class Reports:
    """What the thread tells the worker; called on the worker's loop."""

    renewed: Callable[[float], None]
    """With ``time.monotonic()`` from which the lease counts."""
    lost: Callable[[], None]
    """The worker was taken over."""
    took_over: Callable[[], None]
    """Somebody's work has become free."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a renewal tells about the worker, for people to look at."""

    running: int
    """Attempts."""
    residents: int
    """Executions it owns."""
    functions: tuple[str, ...]
    """What it can run; written only when it has changed."""


class LeaseKeeper:
    """The thread."""

    def __init__(
        self,
        session: Session,
        identity: Identity,
        liveness_key: int,
        reports: Reports,
        *,
        figures: Callable[[], Figures],
        alone: Callable[[], bool],
    ) -> None:
        """Create the keeper of one worker's lease.

        Args:
            session: Used by this thread only.
            identity: Of the worker; only read.
            liveness_key: Of the advisory lock.
            reports: What to call on the worker's loop.
            figures: Of the worker; called in the thread.
            alone: Whether no other process can be using the database server.
        """
        self._session = session
        self._store = Store(session)
        self._identity = identity
        self._liveness_key = liveness_key
        self._reports = reports
        self._figures = figures
        self._told: tuple[str, ...] = ()
        self._alone = alone
        self._main: asyncio.AbstractEventLoop | None = None
        self._main_thread = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._boot: Boot | None = None
        self._seen: dict[UUID, tuple[dt.datetime, float]] = {}
        self._connections = 0
        self._beat = time.monotonic()
        self._lag_seconds = 0.0
        self._lag_logged = False
        self._next_renewal = 0.0
        self.looked_at = self.renewed_at = time.monotonic()

    def start(self) -> None:
        """Start the thread; call it on the worker's loop, once registered."""
        self._told = self._figures().functions
        self._main = asyncio.get_running_loop()
        self._main_thread = threading.get_ident()
        self._beat_once()
        self._thread = threading.Thread(
            target=self._run, name="stent-lease", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it; blocks a moment, so call it in a thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def renew_soon(self) -> None:
        """Renew at the next look: the incarnation has changed."""
        self._next_renewal = 0.0

    @property
    def lag_seconds(self) -> float:
        """By how much the worker's loop is late now; safe in any thread."""
        return max(0.0, time.monotonic() - self._beat - BEAT_SECONDS)

    def _beat_once(self) -> None:
        self._lag_seconds = max(self._lag_seconds, self.lag_seconds)
        self._beat = time.monotonic()
        if not self._stop.is_set() and self._main is not None:
            self._main.call_later(BEAT_SECONDS, self._beat_once)

    def _tell(self, report: Callable[..., None], *args: object) -> None:
        if self._main is not None and not self._main.is_closed():
            try:
                self._main.call_soon_threadsafe(report, *args)
            except RuntimeError:
                # The loop was closed in between: there is nobody to tell.
                self._stop.set()

    def _run(self) -> None:
        asyncio.run(self._keep())

    async def _keep(self) -> None:
        outage = Outage("lease")
        while not self._stop.is_set():
            try:
                await self._look()
                outage.end()
            except LeaseLostError:
                self._tell(self._reports.lost)
            except StoreError as error:
                outage.note(error)
            self.looked_at = time.monotonic()
            self._watch_loop()
            usual = LOOK_SECONDS * (0.8 + 0.4 * random.random())  # noqa: S311
            pause = 0.05 if outage.lasts else usual
            await self._pause(pause)
        await self._session.close()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but notice ``stop`` and the loss of the connection soon."""
        until = time.monotonic() + seconds
        connected = self._session.is_open
        while not self._stop.is_set() and time.monotonic() < until:
            await asyncio.sleep(min(0.05, seconds))
            if connected and not self._session.is_open:
                # Others must not find the lock free for long.
                return

    async def _look(self) -> None:
        await self._hold_lock()
        if time.monotonic() >= self._next_renewal:
            await self._renew()
        await self._find_dead()

    async def _hold_lock(self) -> None:
        """After every connect: take the shared lock, note under which boot."""
        await self._session.connection()
        if self._session.connections_made == self._connections:
            return
        boot = await self._store.current_boot()
        held = await take_liveness_lock(self._session, self._liveness_key)
        await self._store.record_boot(
            self._identity.worker_id, boot.name if held else None
        )
        self._boot = boot
        # At once: a sign of life, for whoever found the lock free in the meantime.
        self._next_renewal = 0.0
        self._connections = self._session.connections_made
        self._seen.clear()

    async def _renew(self) -> None:
        identity, sent, figures = self._identity, time.monotonic(), self._figures()
        lag_seconds = max(self._lag_seconds, self.lag_seconds)
        self._lag_seconds = 0.0
        now = await self._store.renew_lease(
            identity.worker_id,
            identity.incarnation,
            identity.settings.lease,
            running=figures.running,
            residents=figures.residents,
            lag_ms=round(lag_seconds * 1000),
        )
        if figures.functions != self._told:
            await self._store.tell_functions(identity.worker_id, figures.functions)
            self._told = figures.functions
        identity.clock.observe(now, sent, time.monotonic())
        every = identity.settings.lease_renew_every.total_seconds()
        self._next_renewal = sent + every
        self.renewed_at = sent
        self._tell(self._reports.renewed, sent)

    async def _find_dead(self, *, late: bool = False) -> None:
        """Take over who is lost.

        Args:
            late: This look should have been earlier: where everything is late, a worker
                whose connections were cut may still be connecting again.
        """
        boot = self._boot
        if boot is None:
            return
        identity = self._identity
        suspects = await self._store.suspects(
            identity.worker_id, boot, identity.settings.lease, alone=self._alone()
        )
        now = time.monotonic()
        unlocked = False
        for suspect in suspects:
            if suspect.expired:
                await self._take_over(suspect.worker_id, suspect.incarnation, "lease")
            elif not suspect.unlocked:
                self._seen.pop(suspect.worker_id, None)
            else:
                unlocked = True
                seen = self._seen.get(suspect.worker_id)
                if seen is None or seen[0] != suspect.renewed_at:
                    self._seen[suspect.worker_id] = (suspect.renewed_at, now)
                elif not late and now - seen[1] >= CONFIRM_SECONDS:
                    await self._take_over(
                        suspect.worker_id, suspect.incarnation, "lock"
                    )
        if unlocked:
            await self._pause(CONFIRM_SECONDS)
            waited = time.monotonic() - now
            if any(now - first < CONFIRM_SECONDS for _, first in self._seen.values()):
                await self._find_dead(late=waited > CONFIRM_SECONDS + LATE_SECONDS)

    async def _take_over(self, worker_id: UUID, incarnation: int, why: str) -> None:
        self._seen.pop(worker_id, None)
        freed = await self._store.take_over(worker_id, incarnation)
        if freed is None:
            return
        log.warning(
            WORKER_TAKEN_OVER,
            lost_worker_id=str(worker_id),
            reason=why,
            executions=freed[0],
            tasks=freed[1],
        )
        self._tell(self._reports.took_over)

    def _watch_loop(self) -> None:
        """Name the line that keeps the worker's loop from running."""
        lag = time.monotonic() - self._beat
        if lag < LAG_SECONDS_MAX:
            self._lag_logged = False
            return
        if self._lag_logged:
            return
        self._lag_logged = True
        frame = sys._current_frames().get(self._main_thread)  # noqa: SLF001 - the only way
        stack = "".join(traceback.format_stack(frame)[-6:]) if frame else ""
        log.warning(LOOP_BLOCKED, lag_ms=round(lag * 1000), blocked_at=stack)


async def take_liveness_lock(session: Session, key: int) -> bool:
    """Hold the shared lock on this session's connection, until that ends.

    Returns:
        False behind a pooler: the lock would belong to a connection of the pooler,
        whose end says nothing about this worker. Then the lease decides alone.
    """
    await session.connection()
    if session.pooled:
        return False
    await session.fetch(load()["take_liveness_lock"], liveness_key=key)
    return True
