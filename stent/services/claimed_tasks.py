"""Runs the tasks that a worker has claimed, and writes how they end."""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

import msgspec

from stent.codec import encode, encode_exception
from stent.errors import PayloadError, WorkerLostError
from stent.log import ACTIVITY_DEAD_LETTERED, ACTIVITY_PAGE_SPLIT, get_logger
from stent.model import Recorded
from stent.pages import ItemFailed
from stent.registry import DurableFunction, catalogue
from stent.services.activities import Activities
from stent.services.attempts import (
    Attempt,
    Committed,
    Ended,
    Failed,
    Stopped,
    Succeeded,
)
from stent.services.identity import Identity
from stent.services.options import AttemptOptions, load_options
from stent.services.residents import microseconds
from stent.services.settles import Held, Owners, Page, Release, Retry, Settle
from stent.services.suspects import (
    COUNTED,
    LOST_MAX,
    Suspected,
    Suspects,
    killed_too_often,
)
from stent.services.writer import Writer
from stent.store.store import Store

log = get_logger(__name__)

SUSPECT_PAUSE = dt.timedelta(seconds=0.05)
"""After which what may not begin yet may be claimed again."""
OVERDUE_MAX = 500
"""So many are given back together."""
OVERDUE_SECONDS = 1.0
"""A claimed task that has waited for a slot for so long may be claimed by others."""
STOPPED_MAX = 10_000
"""Stopped attempts that are remembered, so that a lost answer does not revive them."""


class ClaimedTasks:
    """The tasks that one worker has claimed."""

    def __init__(  # noqa: PLR0913 - composed in one place
        self,
        store: Store,
        identity: Identity,
        executions: Owners,
        activities: Activities,
        writer: Writer,
        suspects: Suspects,
        *,
        ready_in: Callable[[float], None],
        wake: Callable[[], None],
        on_key_free: Callable[[Attempt], None],
    ) -> None:
        """Create it.

        Args:
            store: Over the claimer's connection.
            identity: Of the worker.
            executions: Take results from memory if they are here.
            activities: Where attempts run.
            writer: Through which their ends are written.
            suspects: What was lost with its worker.
            ready_in: Called with the seconds after which there may be tasks to claim.
            wake: Called when there is something for ``give_back_postponed``.
            on_key_free: Called with an attempt that has given back the slot of its key.
        """
        self.held: Held = set()
        self._store = store
        self._identity = identity
        self._executions = executions
        self._activities = activities
        self._writer = writer
        self._suspects = suspects
        self._ready_in = ready_in
        self._wake = wake
        self._on_key_free = on_key_free
        self._stopped: dict[tuple[UUID, int | None], None] = {}
        self._postponed: deque[tuple[Attempt, dt.timedelta, bool]] = deque()
        """Each with its pause, and whether we look for it afterwards."""
        self._overdue: list[Attempt] = []

    def known(self) -> set[tuple[UUID, int | None]]:
        """Call and epoch of what is here, or was until lately."""
        here = {(attempt.call_id, attempt.epoch) for attempt in self.held}
        return here | set(self._stopped)

    def drop_all(self) -> None:
        """The worker was taken over: nothing here is ours any more."""
        self.held.clear()
        self._overdue.clear()

    async def take(self, rows: list[Any], queue: str = "") -> None:
        """Run what was claimed; ``queue`` is that of all, where it matters."""
        lost = await self._suspects.losses(
            rows, [(row["execution_id"], row["call_id"]) for row in rows]
        )
        if lost:
            broken = [
                r for r in rows if r["is_page"] and lost.get(_key(r), 0) >= COUNTED
            ]
            for row in broken:
                await self._split_page(row)
            taken = {_key(row) for row in broken}
            rows = [
                row
                for row in rows
                if _key(row) not in taken and self._may_begin(row, lost)
            ]
        # What ran inline when its worker was lost is a task for the first time.
        again = [
            row
            for row in rows
            if row["epoch"] > 1 or row["attempt"] > 1 or _key(row) in lost
        ]
        beats: dict[UUID, dict[UUID, bytes]] = {}
        if again:
            beats = await self._store.load_heartbeats(
                [_key(row) for row in again if not row["is_page"]],
                [_key(row) for row in again if row["is_page"]],
            )
        await self._suspects.write_marks()
        for row in rows:
            await self._take_task(
                row,
                queue or row.get("queue", "default"),
                beats.get(row["call_id"]),
                lost.get(_key(row), 0),
            )
        await self.give_back_postponed()

    def _may_begin(self, row: Any, lost: dict[Suspected, int]) -> bool:
        """Mark an attempt after a loss; what has killed too often is parked."""
        suspected = row["execution_id"], row["call_id"]
        times, function = lost.get(suspected, 0), catalogue.find(row["function"])
        if times < COUNTED or function is None:
            return True  # a first loss is marked with the slot: see _take_task
        if times >= LOST_MAX:
            self._park(row, function)
            return False
        activities = self._activities
        if not self._suspects.may_begin(times) or activities.used >= activities.slots:
            # Not kept in memory, where it would wait for its turn: others may run it.
            # Nor are we the first to look for it again: we would always be faster.
            attempt = _attempt(row, function, load_options(None, function))
            self.held.add(attempt)
            self._postponed.append((attempt, SUSPECT_PAUSE, False))
            return False
        self._suspects.begin(suspected, row["epoch"], times)
        return True

    async def _take_task(
        self,
        row: Mapping[str, Any],
        queue: str,
        beats: dict[UUID, bytes] | None,
        lost: int,
    ) -> None:
        function = catalogue.find(row["function"])
        if function is None:
            return
        try:
            attempt = _attempt(row, function, load_options(row["options"], function))
            attempt.queue = queue
            attempt.earlier_beats = beats
            # Its mark says that it begins here.
            attempt.stays = lost > 0
            if 0 < lost < COUNTED:
                attempt.mark = partial(
                    self._suspects.mark, _key(row), row["epoch"], lost
                )
            if row.get("limit_key") is not None:
                attempt.on_settled = self._on_key_free
            if not row["is_page"]:
                self.held.add(attempt)
                self._activities.offer(attempt, self._ended)
                return
            page = await self._page_of(attempt)
        except msgspec.MsgspecError as error:
            self._fail_unreadable(row, function, error)
            return
        self.held.add(attempt)

        def ended(attempt: Attempt, how: Ended) -> None:
            self._page_ended(page, attempt, how)

        self._activities.offer(attempt, ended, page)

    async def _page_of(self, attempt: Attempt) -> Page:
        segments = await self._store.load_segments(
            attempt.execution_id, attempt.call_id
        )
        return Page(attempt, self.held, self._executions, self._writer.submit, segments)

    def _ended(self, attempt: Attempt, ended: Ended) -> None:
        self._suspect_ended(attempt, ended)
        match ended:
            case Succeeded(payload=payload):
                recorded = Recorded(ok=True, payload=payload)
                self._settle(attempt, recorded)
            case Failed(payload=payload, retry_at=None):
                recorded = Recorded(ok=False, payload=payload)
                self._settle(attempt, recorded)
            case Failed(postponed=None):
                self._writer.submit(Retry(attempt, self.held, ended, self._retry_waits))
            case Failed(postponed=dt.timedelta() as delay):
                self._activities.close_bucket(attempt, delay)
                self._postponed.append((attempt, delay, True))
                self._wake()
            case Committed():
                self.held.discard(attempt)
            case Stopped():
                self._let_go(attempt)

    def _page_ended(self, page: Page, attempt: Attempt, ended: Ended) -> None:
        self._suspect_ended(attempt, ended)
        match ended:
            case Succeeded():
                page.complete()
            case Failed(payload=payload, retry_at=None):
                page.fail(payload)
            case Failed(payload=payload):
                page.fail(payload)
            case Committed():
                self.held.discard(attempt)
            case Stopped():
                self._let_go(attempt)

    def _settle(self, attempt: Attempt, recorded: Recorded) -> None:
        self._writer.submit(
            Settle(attempt, self.held, recorded, self._executions, self._writer.submit)
        )

    def _let_go(self, attempt: Attempt) -> None:
        """Its row goes with the turn that dropped it, which may not be written yet."""
        self.held.discard(attempt)
        self._stopped[attempt.call_id, attempt.epoch] = None
        if len(self._stopped) > STOPPED_MAX:
            del self._stopped[next(iter(self._stopped))]

    def _retry_waits(self, retry_at: Any) -> None:
        pause = (retry_at - self._identity.clock.now()).total_seconds()
        self._ready_in(pause)

    def keep_inline(self, attempt: Attempt) -> None:
        """An inline attempt has become a task of ours."""
        attempt.epoch = 1
        self.held.add(attempt)
        self._activities.redirect(attempt, self._ended)

    def release_waiting(self) -> None:
        """Give back claimed tasks that have not begun."""
        for attempt in self._activities.take_waiting():
            if attempt.epoch is not None:
                self._writer.submit(Release(attempt, self.held))

    def release_overdue(self) -> int:
        """Give back what waits behind something long, or is paused by now."""
        overdue = self._activities.take_overdue(OVERDUE_SECONDS)
        if overdue:
            self._overdue += overdue
            self._wake()
        return len(overdue)

    async def _give_back_overdue(self) -> None:
        """In their old place in the line; after a lost answer once more."""
        while self._overdue:
            given = self._overdue[:OVERDUE_MAX]
            rows = [attempt.row for attempt in given]
            await self._store.give_back(self._identity.worker_id, rows)
            del self._overdue[: len(given)]
            self.held.difference_update(given)
            for attempt in given:
                attempt.tell_settled()

    async def give_back_postponed(self) -> None:
        """Tasks whose attempt asked to be made again; after a lost answer once more.

        And those that have waited here for too long.
        """
        await self._give_back_overdue()
        while self._postponed:
            attempt, delay, ours = self._postponed[0]
            if attempt.epoch is not None:
                await self._store.release_later(
                    self._identity.worker_id,
                    attempt.execution_id,
                    attempt.call_id,
                    attempt.epoch,
                    delay,
                )
            self._postponed.popleft()
            self.held.discard(attempt)
            if ours:
                self._ready_in(delay.total_seconds())

    async def _split_page(self, row: Any) -> None:
        """Perhaps one of its items kills: each becomes a call of its own.

        So the killer is found, and takes none of the others with it.
        """
        function = catalogue.find(row["function"])
        if function is None:
            return
        try:
            attempt = _attempt(row, function, load_options(row["options"], function))
            page = await self._page_of(attempt)
        except msgspec.MsgspecError as error:
            self._fail_unreadable(row, function, error)
            return
        form = attempt.options.page
        if form is None:
            self._fail_unreadable(row, function, PayloadError("it has no form"))
            return
        now = attempt.ended_at = self._identity.clock.now()
        again = encode(ItemFailed(attempt.number - 1, microseconds(now) or 0, b""))
        left = [i for i in range(form.size) if i not in page.done_already()]
        facts = {
            "execution_id": str(attempt.execution_id),
            "activity": function.name,
            "items": len(left),
        }
        if len(left) > 1:
            log.warning(ACTIVITY_PAGE_SPLIT, **facts)
        else:
            # There is nothing to be split, and there may be many of them.
            log.debug(ACTIVITY_PAGE_SPLIT, **facts)
        self.held.add(attempt)
        for index in left:
            page.add(index, again)
        page.complete()

    def _park(self, row: Any, function: DurableFunction[Any, Any]) -> None:
        """It is a dead letter: its call fails, and nobody runs it again."""
        what = f"{LOST_MAX} attempts at {function.name}"
        error = WorkerLostError(killed_too_often(what))
        log.error(
            ACTIVITY_DEAD_LETTERED,
            execution_id=str(row["execution_id"]),
            activity=function.name,
            attempt=row["attempt"],
            error_type=type(error).__name__,
        )
        self._fail(row, function, error)

    def _fail_unreadable(
        self,
        row: Mapping[str, Any],
        function: DurableFunction[Any, Any],
        error: Exception,
    ) -> None:
        """A task whose row cannot be read is a failed call, not a dead worker."""
        failure = PayloadError(f"the task of {row['address']} is unreadable: {error}")
        self._fail(row, function, failure)

    def _fail(
        self, row: Any, function: DurableFunction[Any, Any], failure: Exception
    ) -> None:
        """A claimed task that is not run: its call fails."""
        attempt = _attempt(row, function, load_options(None, function))
        attempt.started_at = attempt.ended_at = self._identity.clock.now()
        self.held.add(attempt)
        recorded = Recorded(ok=False, payload=encode_exception(failure))
        self._settle(attempt, recorded)

    def _suspect_ended(self, attempt: Attempt, ended: Ended) -> None:
        """It did not kill us; whoever waited for that may begin."""
        if not self._suspects.any_running:
            return
        match ended:
            case Stopped() | Failed(retry_at=dt.datetime()):
                cleared = False
            case _:
                cleared = True
        suspected = attempt.execution_id, attempt.call_id
        if self._suspects.end(suspected, cleared=cleared):
            self._ready_in(0)


def _key(row: Mapping[str, Any]) -> tuple[UUID, UUID]:
    return row["execution_id"], row["call_id"]


def _attempt(
    row: Mapping[str, Any],
    function: DurableFunction[Any, Any],
    options: AttemptOptions,
) -> Attempt:
    return Attempt(
        execution_id=row["execution_id"],
        call_id=row["call_id"],
        address=row["address"],
        target=function,
        arguments=row["arguments"],
        options=options,
        stored_options=row["options"],
        number=row["attempt"],
        epoch=row["epoch"],
        key_seed=row["key_seed"],
        root_id=row["root_id"],
        parent_id=row["parent_id"],
        tags=tuple(row["tags"]),
        priority=row["priority"],
    )
