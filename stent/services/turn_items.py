"""What the owner of an execution writes: turns, outcomes, and where it stands."""

from __future__ import annotations

import datetime as dt
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stent.clock import child_execution_id
from stent.codec import encode_exception
from stent.errors import (
    ExecutionCancelledError,
    ExecutionTimedOutError,
    StoreError,
)
from stent.journal import CancelReason, Turn, encode_turn
from stent.model import Recorded, Status
from stent.pages import ItemCall, ItemFailed, PageCall
from stent.registry import DurableFunction
from stent.services.attempts import Attempt, Failed
from stent.services.identity import Identity
from stent.services.options import store_options
from stent.services.residents import (
    MINUS_INFINITY,
    Arrived,
    CallLike,
    Resident,
    instant,
)
from stent.services.settles import told_rows
from stent.services.writer import execution_missed
from stent.store.flush import Flush, Flushed, Row

ARGUMENTS_IN_TASK_BYTES_MAX = 256
"""Arguments up to here are kept in the hot row itself: one insert less."""
CALLS_PER_FLUSH = 500
"""New calls of one turn that are inserted together; the others follow."""
CALLS_BYTES_PER_FLUSH = 4 * 1024 * 1024
"""The same, about: of long arguments fewer go together."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an execution ends."""

    status: Status
    recorded: Recorded
    returned: Recorded | None = None
    """What the code returned although it was asked to stop."""


_OWN_ENDS = (Status.COMPLETED, Status.FAILED)


def make_ending(recorded: Recorded, cancelled: CancelReason | None) -> Ending:
    """How an execution ends whose root returned or raised ``recorded``."""
    if cancelled is None:
        status = Status.COMPLETED if recorded.ok else Status.FAILED
        return Ending(status, recorded)
    if cancelled == "timeout":
        error: Exception = ExecutionTimedOutError("it took longer than max_duration")
        status = Status.TIMED_OUT
    else:
        why = "its parent ended" if cancelled == "parent" else "it was cancelled"
        error, status = ExecutionCancelledError(why), Status.CANCELLED
    payload = encode_exception(error)
    returned = recorded if recorded.ok else None
    return Ending(status, Recorded(ok=False, payload=payload), returned)


@dataclass(slots=True)
class Mark:
    """New values of the execution's row."""

    status: Status | None = None
    wake_at: Any = None
    cancel_reason: str | None = None
    cancel_by: Any = None
    code_digest: str | None = None
    blocked_digest: str | None = None
    blocked_reason: str | None = None
    release: bool = False


@dataclass(slots=True)
class NewCalls:
    """Rows of calls that are inserted together."""

    tasks: list[Row] = field(default_factory=list)
    payloads: list[Row] = field(default_factory=list)
    attempts: list[Row] = field(default_factory=list)
    suspected: list[Row] = field(default_factory=list)
    children: list[Row] = field(default_factory=list)
    own_children: list[tuple[CallLike, Row]] = field(default_factory=list)
    size: int = 0
    coming: int | None = None
    """The highest priority of those for which there was no slot."""

    @property
    def count(self) -> int:
        """How many calls."""
        return len(self.tasks) + len(self.children)

    def contribute(self, flush: Flush) -> None:
        """All of them."""
        flush.tasks += self.tasks
        flush.payloads += self.payloads
        flush.attempts += self.attempts
        flush.suspected += self.suspected
        flush.children += self.children


@dataclass(slots=True, eq=False)
class TurnItem:
    """One turn of one execution, or its end; see ``writer.Item``.

    Many calls are inserted by several flushes, so that the first begin while the others
    are written; what to make of those in ``rest`` is decided while the flush before
    theirs is under way. The turn is written with the last of them: until then a replay
    makes them all again, and knows those that are there.
    """

    resident: Resident
    on_committed: Callable[[TurnItem], None]
    on_lost: Callable[[Resident], None]
    on_refused: Callable[[Resident, StoreError], None]
    on_inserted: Callable[[TurnItem, NewCalls], None]
    on_taken: Callable[[TurnItem], None]
    turn: Turn | None = None
    results: list[Row] = field(default_factory=list)
    calls: deque[NewCalls] = field(default_factory=lambda: deque([NewCalls()]))
    rest: deque[CallLike] = field(default_factory=deque)
    inline: dict[str, None] = field(default_factory=dict)
    drops: list[Row] = field(default_factory=list)
    cancels: list[Row] = field(default_factory=list)
    tells: list[Row] = field(default_factory=list)
    inbox: list[Row] = field(default_factory=list)
    taken_in: list[Arrived] = field(default_factory=list)
    mark: Mark | None = None
    ending: Ending | None = None
    parent_is_local: Callable[[], bool] = lambda: False
    parent_hears_nothing: Callable[[], None] = lambda: None
    read_inboxes: Callable[[], None] = lambda: None
    results_size: int = 0
    expects_parent: bool = False
    kept: list[Attempt] = field(default_factory=list)
    woken: bool = False
    broken: bool = False
    """Its calls cannot be issued: nothing follows what is being written."""

    @property
    def _is_last(self) -> bool:
        """Whether the turn goes into the next flush."""
        return len(self.calls) == 1 and not self.rest

    @property
    def size(self) -> int:
        """Of what goes into the next flush."""
        if not self._is_last:
            return self.calls[0].size
        return self.results_size + self.calls[0].size

    @property
    def rows(self) -> int:
        """Of what goes into the next flush."""
        return 1 + self.calls[0].count

    def contribute(self, flush: Flush) -> None:
        """Everything of this turn, or some of its calls before it."""
        resident = self.resident
        execution_id = resident.execution_id
        flush.fences.append((execution_id, resident.epoch))
        self.calls[0].contribute(flush)
        self.woken = self.woken or resident.parked
        resident.parked = False
        if not self._is_last:
            self._contribute_early(flush)
            return
        if self.turn is not None:
            payload = encode_turn(self.turn)
            flush.turns.append((execution_id, resident.position, payload))
        flush.results += self.results
        flush.drops += self.drops
        flush.cancels += self.cancels
        flush.reached.update(cancel[1] for cancel in self.cancels)
        flush.tells += self.tells
        flush.inbox += self.inbox
        if self.ending is not None:
            if resident.cancels and self.ending.status in _OWN_ENDS:
                self.ending = make_ending(self.ending.recorded, resident.cancels[0][0])
            self._contribute_ending(flush, self.ending)
            return
        if self.woken:
            self.mark = self.mark or Mark(wake_at=MINUS_INFINITY)
        if self.mark is not None:
            flush.marks.append(self._mark_row(self.mark))

    def _contribute_early(self, flush: Flush) -> None:
        """What does not wait for the turn.

        Results that have been read need no row in the inbox any more: whoever owns the
        execution next finds all that were not delivered. The others would be looked
        through again with every reading of the inbox.
        """
        resident = self.resident
        if self.needs_part:
            self.on_taken(self)
        early = self._early_mark()
        if early is not None:
            flush.marks.append(self._mark_row(early))
        self.taken_in = [one for one in resident.arrived if one.inbox_id is not None]
        flush.inbox += [(resident.execution_id, one.inbox_id) for one in self.taken_in]

    def _early_mark(self) -> Mark | None:
        """What has to be known as soon as there are calls, before their turn.

        Calls that other code makes than the row says would be a divergence.
        """
        digest = None if self.mark is None else self.mark.code_digest
        if digest is None and not self.woken:
            return None
        return Mark(wake_at=MINUS_INFINITY, code_digest=digest)

    def _mark_row(self, mark: Mark) -> Row:
        return (
            self.resident.execution_id,
            mark.status,
            mark.wake_at,
            mark.cancel_reason,
            mark.cancel_by,
            mark.code_digest,
            mark.blocked_digest,
            mark.blocked_reason,
            mark.release,
        )

    def _contribute_ending(self, flush: Flush, ending: Ending) -> None:
        resident = self.resident
        parent = None if resident.detached else resident.head.parent_id
        parent_call = None
        if parent is not None and resident.parent_address is not None:
            parent_call = resident.parent_call_id
        if not self.expects_parent and parent_call is not None:
            self.expects_parent = self.parent_is_local()
        flush.finishes.append(
            (
                resident.execution_id,
                ending.status,
                ending.recorded.ok,
                ending.recorded.payload,
                parent if parent_call is not None else None,
                parent_call,
                resident.parent_address,
                self.expects_parent,
                resident.has_children,
            )
        )
        if resident.has_children:
            flush.orphaning.add(resident.execution_id)
        if parent is not None and not self.expects_parent:
            flush.reached.add(parent)
        if ending.returned is not None:
            address = "#returned"
            flush.results.append(
                (
                    resident.execution_id,
                    resident.call_id(address),
                    address,
                    ending.returned.ok,
                    ending.returned.payload,
                    1,
                    None,
                    None,
                )
            )

    def missed(self, flushed: Flushed) -> str | None:
        """By the execution's row."""
        missed = execution_missed(self.resident.execution_id, flushed)
        if missed == "busy" and self.ending is not None:
            # Perhaps it was asked to stop, and ends as cancelled then.
            self.read_inboxes()
        return missed

    def committed(self) -> None:
        """Go on."""
        inserted = self.calls.popleft()
        for one in self.taken_in:
            if one.inbox_id is not None:
                self.resident.inbox_known.discard(one.inbox_id)
                one.inbox_id = None
        self.taken_in = []
        self.on_inserted(self, inserted)
        if not self.calls:
            self._rows_settled()
            self.on_committed(self)

    def lost(self) -> None:
        """Somebody else owns it, or it has ended."""
        self._rows_settled()
        if self.expects_parent:
            self.parent_hears_nothing()
        self.on_lost(self.resident)

    def refused(self, error: StoreError) -> None:
        """The database refuses something in it."""
        self._rows_settled()
        self.on_refused(self.resident, error)

    def _rows_settled(self) -> None:
        """The rows of running attempts are there by now, or never will be."""
        for attempt in self.kept:
            attempt.row_pending = False

    @property
    def needs_part(self) -> bool:
        """Whether the flush after the next has nothing to insert yet, but could."""
        return bool(self.rest) and len(self.calls) <= 1

    def begin_part(self) -> None:
        """What is added from now on goes into a flush of its own."""
        self.calls.append(NewCalls())

    def _room(self) -> NewCalls:
        """Where the next call goes."""
        if self.is_full:
            self.begin_part()
        return self.calls[-1]

    @property
    def is_full(self) -> bool:
        """Whether the next call goes into another flush."""
        last = self.calls[-1]
        return last.count >= CALLS_PER_FLUSH or last.size >= CALLS_BYTES_PER_FLUSH

    def drop_tasks(self) -> None:
        """None of the calls is made after all; children are."""
        for calls in self.calls:
            calls.tasks.clear()
            calls.payloads.clear()

    @property
    def has_calls(self) -> bool:
        """Whether any call becomes a row."""
        return self.calls[0].count > 0

    def add_task(
        self, call: CallLike, identity: Identity, stored: bytes | None
    ) -> None:
        """The call becomes a claimable row."""
        resident, calls = self.resident, self._room()
        call_id = resident.call_id(call.address)
        arguments: bytes | None = call.arguments
        if len(call.arguments) > ARGUMENTS_IN_TASK_BYTES_MAX:
            calls.payloads.append((resident.execution_id, call_id, call.arguments))
            arguments = None
        if resident.suspect:
            calls.suspected.append((resident.execution_id, call_id))
        delay, number = call.options.delay, 1
        available_at = None if delay is None else identity.clock.now() + delay
        if isinstance(call, ItemCall) and call.failed is not None:
            number = call.failed.number + 1
            available_at = instant(call.failed.retry_at_us)
            if call.failed.number:
                self._add_failed_item(calls, call, call.failed)
        calls.tasks.append(
            (
                resident.execution_id,
                call_id,
                call.address,
                call.function,
                call.options.queue,
                call.options.priority,
                available_at,
                number,
                isinstance(call, PageCall),
                arguments,
                stored,
                False,
            )
        )
        calls.size += len(call.arguments) + 200

    def _add_failed_item(
        self, calls: NewCalls, call: ItemCall, failed: ItemFailed
    ) -> None:
        """The attempt that was made in a page."""
        resident = self.resident
        calls.attempts.append(
            (
                resident.execution_id,
                resident.call_id(call.address),
                None,
                call.address,
                failed.number,
                failed.payload,
                None,
                None,
            )
        )

    def add_own_task(self, attempt: Attempt) -> None:
        """A running inline attempt becomes a task that this worker holds."""
        attempt.row_pending = True
        self.kept.append(attempt)
        self._add_attempt_task(attempt, attempt.number, None, own=True)

    def _add_attempt_task(
        self,
        attempt: Attempt,
        number: int,
        available_at: dt.datetime | None,
        *,
        own: bool,
    ) -> None:
        resident, calls = self.resident, self._room()
        arguments: bytes | None = attempt.arguments
        if len(attempt.arguments) > ARGUMENTS_IN_TASK_BYTES_MAX:
            calls.payloads.append(
                (resident.execution_id, attempt.call_id, attempt.arguments)
            )
            arguments = None
        calls.tasks.append(
            (
                resident.execution_id,
                attempt.call_id,
                attempt.address,
                attempt.function,
                attempt.queue,
                attempt.priority,
                available_at,
                number,
                False,
                arguments,
                attempt.stored_options,
                own,
            )
        )

    def add_failed_inline(self, attempt: Attempt, failed: Failed) -> None:
        """The next attempt of an inline call is anybody's."""
        resident = self.resident
        if failed.postponed is not None:
            self._add_attempt_task(attempt, attempt.number, failed.retry_at, own=False)
            self.tells += told_rows(attempt)
            return
        number, retry_at = attempt.number + 1, failed.retry_at
        self._add_attempt_task(attempt, number, retry_at, own=False)
        self.calls[-1].attempts.append(
            (
                resident.execution_id,
                attempt.call_id,
                None,
                attempt.address,
                attempt.number,
                failed.payload,
                attempt.started_at,
                failed.retry_at,
            )
        )
        self.tells += told_rows(attempt)

    def add_result(self, attempt: Attempt, recorded: Recorded) -> None:
        """The result of an inline attempt."""
        resident = self.resident
        self.results.append(
            (
                resident.execution_id,
                attempt.call_id,
                attempt.address,
                recorded.ok,
                recorded.payload,
                attempt.number,
                attempt.started_at,
                attempt.ended_at,
            )
        )
        self.results_size += len(recorded.payload)
        if attempt.told:
            self.tells += told_rows(attempt)

    def add_child(self, call: CallLike, identity: Identity, *, own: bool) -> None:
        """The call becomes an execution."""
        resident, options, now = self.resident, call.options, identity.clock.now()
        target = call.target
        if not isinstance(target, DurableFunction):
            message = f"{call.address} is no durable function"
            raise TypeError(message)
        wake_at = now if options.delay is None else now + options.delay
        row = (
            child_execution_id(resident.execution_id, call.address),
            resident.execution_id,
            call.address,
            resident.head.root_id,
            call.function,
            target.kind,
            options.queue,
            options.priority,
            resident.head.depth + 1,
            options.detached,
            own,
            None if options.delay is None else wake_at,
            now if own else None,
            None if options.max_duration is None else wake_at + options.max_duration,
            os.urandom(16),
            list(options.tags),
            store_options(options, target),
            call.arguments,
            target.code_digest,
        )
        resident.has_children = True
        calls = self._room()
        calls.children.append(row)
        calls.size += len(call.arguments) + 300
        if own:
            calls.own_children.append((call, row))


@dataclass(slots=True, eq=False)
class Park:
    """Write when a resident execution must be advanced if its owner dies."""

    resident: Resident
    wake_us: int | None
    size: int = 0
    rows: int = 1
    wrote: bool = False

    def contribute(self, flush: Flush) -> None:
        """Unless it has got something to do in the meantime."""
        resident = self.resident
        self.wrote = is_idle(resident) and not resident.gone
        if not self.wrote:
            return
        resident.parked = True
        flush.fences.append((resident.execution_id, resident.epoch))
        flush.marks.append(
            (
                resident.execution_id,
                None,
                None if self.wake_us is None else instant(self.wake_us),
                None,
                None,
                None,
                None,
                None,
                False,
            )
        )

    def missed(self, flushed: Flushed) -> str | None:
        """By the execution's row."""
        return execution_missed(self.resident.execution_id, flushed)

    def committed(self) -> None:
        """Nothing else to do."""

    def lost(self) -> None:
        """The next turn will find out."""

    def refused(self, error: StoreError) -> None:
        """Then it is claimed earlier than necessary."""
        del error
        self.resident.parked = False


def wake_time(resident: Resident) -> int | None:
    """When a waiting execution has something to do by itself; microseconds."""
    deadlines = (resident.run.next_deadline, resident.deadline_us)
    return min((due for due in deadlines if due is not None), default=None)


def is_idle(resident: Resident) -> bool:
    """Nothing of it runs, waits to be written or waits to be delivered."""
    return not resident.inline and only_runs_inline(resident)


def only_runs_inline(resident: Resident) -> bool:
    """Nothing waits to be written or to be delivered, whatever runs beside it."""
    return not (
        resident.flushing
        or resident.arrived
        or resident.cancels
        or resident.committed
        or resident.failed_inline
        or resident.local_results
        or resident.restoring is not None
        or resident.scheduled
        or resident.releasing
    )
