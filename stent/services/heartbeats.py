"""Writes what activities say of their progress, the latest of each, once a second."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import UUID

import anyio

from stent.errors import StoreError
from stent.log import get_logger
from stent.services.attempts import Attempt
from stent.services.identity import Identity
from stent.store.store import Store

log = get_logger(__name__)

WRITE_SECONDS = 1.0
"""How often heartbeats are written; the first one after a pause is at once."""
FINAL_SECONDS_MAX = 5.0
"""How long a failed attempt waits until its last heartbeat is written."""
ITEMS_MAX = 200
"""How many one statement writes."""
_PENDING_SECONDS = 0.02


class Heartbeats:
    """The heartbeats of one worker's attempts that are not written yet."""

    def __init__(self, store: Store, identity: Identity) -> None:
        self._store = store
        self._identity = identity
        self._lock = threading.Lock()
        self._fresh: dict[Attempt, dict[UUID, bytes]] = {}
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def note(self, attempt: Attempt, call_id: UUID, payload: bytes) -> None:
        """The latest details of an attempt, or of an item; any thread may call it."""
        with self._lock:
            first = not self._fresh
            self._fresh.setdefault(attempt, {})[call_id] = payload
            attempt.last_beats = attempt.last_beats or {}
            attempt.last_beats[call_id] = payload
        if first and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def forget(self, attempt: Attempt, call_id: UUID | None = None) -> None:
        """It has succeeded, or nobody wants it: what is not written need not be."""
        with self._lock:
            if call_id is None:
                self._fresh.pop(attempt, None)
            elif attempt in self._fresh:
                self._fresh[attempt].pop(call_id, None)

    def drop_all(self) -> None:
        """The worker was taken over."""
        with self._lock:
            self._fresh.clear()

    async def run(self) -> None:
        """Write whenever there is something, at most once a second."""
        self._loop = asyncio.get_running_loop()
        while True:
            if not self._fresh:
                await self._wake.wait()
            self._wake.clear()
            try:
                await self.run_once()
            except StoreError as error:
                if not error.retryable:
                    raise
                log.debug("heartbeats.postponed", error=str(error))
            await anyio.sleep(WRITE_SECONDS)

    async def run_once(self) -> int:
        """Write what there is; returns the number of heartbeats written.

        Raises:
            StoreError: The database is away; what was not written still waits.
        """
        written = 0
        taken = self._take()
        try:
            while taken:
                await self._write(taken[:ITEMS_MAX])
                written += len(taken[:ITEMS_MAX])
                del taken[:ITEMS_MAX]
        finally:
            self._put_back(taken)
        return written

    async def write_last(self, attempt: Attempt) -> None:
        """Before its next attempt can begin; given up after a while."""
        with anyio.move_on_after(FINAL_SECONDS_MAX, shield=True):
            while attempt in self._fresh:
                if not attempt.row_pending:
                    taken = self._take(attempt)
                    try:
                        await self._write(taken)
                    except StoreError as error:
                        self._put_back(taken)
                        if not error.retryable:
                            raise
                    else:
                        return
                await anyio.sleep(_PENDING_SECONDS)
        self.forget(attempt)

    def _take(self, only: Attempt | None = None) -> list[tuple[Attempt, UUID, bytes]]:
        """What can be written: the row of an attempt that was handed over is there."""
        with self._lock:
            attempts = list(self._fresh) if only is None else [only]
            ready = [attempt for attempt in attempts if not attempt.row_pending]
            taken = [
                (attempt, call_id, payload)
                for attempt in ready
                for call_id, payload in self._fresh.pop(attempt, {}).items()
            ]
        taken.sort(key=lambda beat: (beat[0].execution_id, beat[1]))
        return taken

    def _put_back(self, beats: list[tuple[Attempt, UUID, bytes]]) -> None:
        with self._lock:
            for attempt, call_id, payload in beats:
                if attempt.ended_at is None:
                    self._fresh.setdefault(attempt, {}).setdefault(call_id, payload)

    async def _write(self, beats: list[tuple[Attempt, UUID, bytes]]) -> None:
        rows: list[tuple[Any, ...]] = [
            (
                attempt.execution_id,
                call_id,
                attempt.call_id,
                attempt.epoch,
                attempt.number,
                payload,
            )
            for attempt, call_id, payload in beats
        ]
        if rows:
            await self._store.write_heartbeats(
                self._identity.worker_id, self._identity.incarnation, rows
            )
