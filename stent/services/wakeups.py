"""Regular duties of a worker: inboxes, dropped tasks, deadlines, partitions."""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

import anyio

from stent.codec import encode_exception
from stent.errors import ExecutionCancelledError, ExecutionTimedOutError, StoreError
from stent.log import get_logger
from stent.services.activities import Activities
from stent.services.identity import Identity
from stent.services.settles import Held
from stent.services.turns import Executions
from stent.store.store import Store

log = get_logger(__name__)

INBOX_ROWS_MAX = 2000
SWEEP_COUNT_MAX = 200
HOUSEKEEPING_SECONDS = 600.0
TIDY_SECONDS = 60.0
TIDY_COUNT_MAX = 5000
TIDY_ROUNDS_MAX = 20


class Inboxes:
    """Reads the inbox rows of this worker's executions."""

    def __init__(
        self, store: Store, identity: Identity, executions: Executions
    ) -> None:
        self._store = store
        self._identity = identity
        self._executions = executions
        self._wake = anyio.Event()

    def hint(self) -> None:
        """There may be something."""
        self._wake.set()

    async def run(self) -> None:
        """Read on every hint, and once a second without."""
        while True:
            poll = self._identity.settings.poll_every.total_seconds()
            with anyio.move_on_after(poll * (0.9 + 0.2 * random.random())):  # noqa: S311
                await self._wake.wait()
            self._wake = anyio.Event()
            try:
                while await self.run_once() >= INBOX_ROWS_MAX:
                    continue
            except StoreError as error:
                if not error.retryable:
                    raise
                await anyio.sleep(0.1)

    async def run_once(self) -> int:
        """One read; returns the number of rows."""
        if not self._executions.residents:
            return 0
        arrivals = await self._store.undelivered(
            self._identity.worker_id, self._executions.known_inbox(), INBOX_ROWS_MAX
        )
        self._executions.receive(arrivals)
        return len(arrivals)


class Duties:
    """What must be looked after once a second."""

    def __init__(  # noqa: PLR0913 - composed in one place
        self,
        store: Store,
        identity: Identity,
        executions: Executions,
        activities: Activities,
        held: Held,
        *,
        release_overdue: Callable[[], int],
        hint_workers: Callable[[list[UUID]], None],
        hint_client: Callable[[UUID, UUID], None],
    ) -> None:
        """Create it.

        Args:
            store: Over the claimer's connection.
            identity: Of the worker.
            executions: Its residents.
            activities: Its attempts.
            held: Its tasks.
            release_overdue: Gives back tasks that have waited here for long.
            hint_workers: Tell workers that an inbox has something.
            hint_client: Tell a process that something it waits for has ended.
        """
        self._store = store
        self._identity = identity
        self._executions = executions
        self._activities = activities
        self._held = held
        self._release_overdue = release_overdue
        self._hint_workers = hint_workers
        self._hint_client = hint_client
        self._housekept = 0.0
        self._tidied = time.monotonic()
        self._cancelled = encode_exception(
            ExecutionCancelledError("its cleanup took longer than the grace")
        )
        self._timed_out = encode_exception(
            ExecutionTimedOutError("it took longer than max_duration")
        )

    async def run(self) -> None:
        """Once a second, for ever."""
        while True:
            await anyio.sleep(0.9 + 0.2 * random.random())  # noqa: S311
            await self._tolerate(self.run_once)

    async def _tolerate(self, duty: Callable[[], Awaitable[object]]) -> None:
        """The database may be away; the next second is another chance."""
        try:
            await duty()
        except StoreError as error:
            if not error.retryable:
                raise
            log.debug("duty.postponed", error=str(error))

    async def run_once(self) -> int:
        """Every duty once; returns the number of things done."""
        done = self._executions.park_idle() + self._executions.name_inline()
        done += self._executions.evict() + self._release_overdue()
        done += await self._stop_dropped()
        done += await self._sweep()
        if time.monotonic() - self._tidied > TIDY_SECONDS:
            done += await self.tidy()
        await self._keep_house()
        return done

    async def tidy(self) -> int:
        """Delete rows that outlived their execution; returns their number."""
        self._tidied = time.monotonic()
        done = await self._store.tidy(TIDY_COUNT_MAX)
        done += await self._store.tidy_suspects(TIDY_COUNT_MAX)
        for _ in range(TIDY_ROUNDS_MAX):
            deleted = await self._store.tidy_heartbeats(TIDY_COUNT_MAX)
            done += deleted
            if deleted < TIDY_COUNT_MAX:
                break
        return done

    async def _stop_dropped(self) -> int:
        """Stop attempts whose task was dropped by its execution."""
        asked = {
            (attempt.call_id, attempt.epoch): attempt
            for attempt in self._held
            # The row of one that was handed over is not there before its turn is.
            if attempt.epoch is not None and not attempt.row_pending
        }
        if not asked:
            return 0
        worker_id = self._identity.worker_id
        rows = [attempt.row for attempt in asked.values()]
        found = await self._store.tasks_gone(worker_id, rows)
        gone = self._held & {asked[task] for task in found}
        if gone:
            # An execution that ended without an owner has left its rows. First these:
            # nobody would look for them again once their attempts are forgotten.
            await self._store.drop_ended_tasks(worker_id, [a.row for a in gone])
            self._activities.forget(gone)
            self._held -= gone
            for attempt in gone:
                attempt.tell_settled()
        return len(gone)

    async def _sweep(self) -> int:
        rows = await self._store.sweep(
            SWEEP_COUNT_MAX,
            self._identity.settings.cancel_grace,
            self._cancelled,
            self._timed_out,
        )
        for row in rows:
            log.warning(
                "execution.swept",
                execution_id=str(row["ended_id"]),
                status=row["ended_status"],
            )
            self._hint_workers(row["ended_workers"])
            await self._store.drop_tasks_of(row["ended_id"], TIDY_COUNT_MAX)
            if row["ended_client"] is not None:
                self._hint_client(row["ended_client"], row["ended_id"])
        return len(rows)

    async def _keep_house(self) -> None:
        if time.monotonic() - self._housekept < HOUSEKEEPING_SECONDS:
            return
        self._housekept = time.monotonic()
        now = self._identity.clock.now()
        await self._store.ensure_partitions([now, now + dt.timedelta(days=7)])
        await self._store.forget_workers()
