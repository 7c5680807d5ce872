"""Deletes what finished long ago: a duty of one worker at a time, with little load."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar
from uuid import UUID

import anyio

from stent.errors import StoreError
from stent.log import EXECUTIONS_PRUNED, get_logger
from stent.services.identity import Identity
from stent.store.store import NIL, Store

T = TypeVar("T")
log = get_logger(__name__)

EVERY = timedelta(minutes=10)
"""How often one worker of the fleet looks for what can go."""
EXECUTIONS_PER_BATCH = 200
ROWS_PER_BATCH = 1000
IDLE_SHARE = 9
"""A worker pauses so many times longer than each of its statements took."""
PAUSE_SECONDS_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted: numbers of executions, of their rows, of partitions."""

    executions: int
    rows: int
    partitions: int


async def prune(
    store: Store, older_than: timedelta, *, idle_share: float = 0.0
) -> Pruned:
    """Delete what finished longer ago than ``older_than``, in bounded batches.

    An execution disappears at once and entirely for those who read it, together with
    what it started; then its rows are erased. Safe to interrupt, and to run many times
    at once. Dispatch keys stay.

    Args:
        store: Whose connection is used.
        older_than: Counted in database time from the end of an execution.
        idle_share: How many times longer than each statement to pause after it.

    Raises:
        StoreError: The database is away; what was deleted stays deleted.
    """
    pace = _Pace(idle_share)
    executions = rows = partitions = 0
    after: UUID | None = NIL
    while after is not None:
        forgotten, after = await pace.run(
            partial(store.forget, older_than, after, EXECUTIONS_PER_BATCH)
        )
        executions += forgotten
    while await pace.run(partial(store.drop_partition, older_than)):
        partitions += 1
    while (erased := await pace.run(partial(store.erase, ROWS_PER_BATCH))) is not None:
        rows += erased
    return Pruned(executions, rows, partitions)


class _Pace:
    """Leaves the database and the connection to others most of the time."""

    def __init__(self, idle_share: float) -> None:
        self._idle_share = idle_share

    async def run(self, statement: Callable[[], Awaitable[T]]) -> T:
        began = time.monotonic()
        answer = await statement()
        pause = (time.monotonic() - began) * self._idle_share
        await anyio.sleep(min(pause, PAUSE_SECONDS_MAX))
        return answer


class Retention:
    """The duty of a worker."""

    def __init__(self, store: Store, identity: Identity) -> None:
        """Create it; ``store`` is over a connection whose others can wait a moment."""
        self._store = store
        self._identity = identity

    async def run(self) -> None:
        """Every now and then, for ever."""
        seconds = EVERY.total_seconds()
        while True:
            await anyio.sleep(seconds * (0.1 + 0.2 * random.random()))  # noqa: S311
            try:
                await self.run_once()
            except StoreError as error:
                if not error.retryable:
                    raise
                log.debug("duty.postponed", error=str(error))

    async def run_once(self) -> Pruned | None:
        """Prune if it is anybody's turn; None if it is not."""
        retention = self._identity.settings.retention
        if retention is None or not await self._store.take_duty("retention", EVERY):
            return None
        began = time.monotonic()
        pruned = await prune(self._store, retention, idle_share=IDLE_SHARE)
        if pruned.executions or pruned.rows or pruned.partitions:
            log.info(
                EXECUTIONS_PRUNED,
                count=pruned.executions,
                rows=pruned.rows,
                partitions=pruned.partitions,
                duration_ms=round((time.monotonic() - began) * 1000),
            )
        return pruned
