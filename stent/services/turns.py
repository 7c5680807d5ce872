"""Advances the executions this worker owns: commit deliveries, deliver, drain, act.

What a workflow is about to see is committed first (docs/decisions/0003). What it then
decides is acted on at once as far as it runs here, and written with the next turn.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, Protocol
from uuid import UUID

import msgspec

from stent.calls import LocalFunction
from stent.errors import (
    StentError,
    StoreError,
)
from stent.journal import (
    CancelDelivered,
    CancelReason,
    Delivery,
    Journal,
    ResultDelivered,
    TimeAdvanced,
    Turn,
)
from stent.log import (
    CALL_DROPPED,
    EXECUTION_BLOCKED,
    EXECUTION_CANCELLED,
    EXECUTION_COMPLETED,
    EXECUTION_EVICTED,
    EXECUTION_FAILED,
    EXECUTION_TIMED_OUT,
    get_logger,
)
from stent.model import Recorded, Status
from stent.pages import PageCall
from stent.registry import DurableFunction, catalogue
from stent.replay import Decisions, Diverged, Finished, Parked, WorkflowRun
from stent.services.activities import Activities
from stent.services.attempts import (
    Attempt,
)
from stent.services.call_starter import CallStarter
from stent.services.evictions import Evict, Moment, choose, room_kept
from stent.services.identity import Identity
from stent.services.raised import error_type_of
from stent.services.residents import (
    MINUS_INFINITY,
    ActivityRun,
    Arrived,
    CallLike,
    Resident,
    Run,
    instant,
    microseconds,
    resident_child,
    resident_of,
)
from stent.services.settles import told_rows
from stent.services.turn_items import (
    Ending,
    Mark,
    NewCalls,
    Park,
    TurnItem,
    is_idle,
    make_ending,
    only_runs_inline,
    wake_time,
)
from stent.services.writer import Writer
from stent.store.store import Arrival, Stored

log = get_logger(__name__)

SLICE_SECONDS = 0.005
PARK_AFTER_SECONDS = 1.0
NAME_AFTER_SECONDS = 1.0
TIMER_SECONDS_MAX = 3600.0
EVICTIONS_MAX = 500
"""At a time: closing the loops must not keep the worker's for long."""
EVICTED_LATELY_SECONDS = 5.0
DROPS_MAX = 5000
"""Tasks that the end of an execution deletes; claims and tidying find the others."""
_ENDED_EVENTS = {
    Status.COMPLETED: EXECUTION_COMPLETED,
    Status.FAILED: EXECUTION_FAILED,
    Status.CANCELLED: EXECUTION_CANCELLED,
    Status.TIMED_OUT: EXECUTION_TIMED_OUT,
}


OnEnded = Callable[[UUID, str, Ending], None]
"""Told the id, the function and the committed outcome of what has ended here."""


class Hints(Protocol):
    """Tells workers, this one included, that there is something to claim."""

    def tasks(self, queue: str, seconds: float) -> None:
        """A task, available in so many seconds."""
        ...

    def executions(self, queue: str) -> None:
        """An execution."""
        ...


class Executions:
    """Everything resident on one worker."""

    def __init__(
        self,
        identity: Identity,
        writer: Writer,
        activities: Activities,
        *,
        queues: frozenset[str],
        hints: Hints,
    ) -> None:
        """Create the manager.

        Args:
            identity: Of the worker.
            writer: Through which all of it is written.
            activities: Where inline attempts run.
            queues: That this worker serves.
            hints: Who may claim what this worker inserts.
        """
        self.residents: dict[UUID, Resident] = {}
        self.accepting = True
        self.on_ended: OnEnded = lambda _execution_id, _function, _ending: None
        self.on_inline_kept: Callable[[Attempt], None] = lambda _attempt: None
        self.read_inboxes: Callable[[], None] = lambda: None
        self.on_proven: Callable[[UUID, bool], None] = lambda _id, _harmless: None
        self.on_room: Callable[[], None] = lambda: None
        self.on_left_behind: Callable[[], None] = lambda: None
        self._identity = identity
        self._writer = writer
        self._hints = hints
        self._calls = CallStarter(
            identity,
            activities,
            self.residents,
            queues=queues,
            has_room=lambda: self.room > 0,
            on_arrived=self._arrive,
            on_failed=self._schedule,
        )
        self._ready: deque[Resident] = deque()
        self._awake = False
        self._leaving = 0
        self._evicted_at = -math.inf
        self._payload_bytes_max = identity.settings.payload_bytes_max

    @property
    def room(self) -> int:
        """How many more executions may become resident."""
        if not self.accepting:
            return 0
        taken = len(self.residents) + self._calls.children_coming
        return max(0, self._identity.settings.resident_max - taken)

    # Becoming resident.

    def adopt(
        self, row: Mapping[str, Any], stored: Stored | None, *, suspect: bool = False
    ) -> None:
        """Start or restore a claimed execution.

        Args:
            row: Of ``claim_executions``.
            stored: What is known of it; None if this is its first claim.
            suspect: It was lost with a worker, perhaps with calls that ran inline.
        """
        resident = self._take_in(row)
        if resident is None:
            return
        resident.suspect = suspect
        if row["cancel_reason"] is not None and row["cancel_by"] is not None:
            resident.cancel_by_us = microseconds(row["cancel_by"])
        resident.cancel_asked = row["cancel_reason"]
        if stored is None:
            resident.run.begin()
        else:
            self._restore(resident, stored)
        self._schedule(resident)

    def refuse(
        self, row: Mapping[str, Any], reason: str, issued: Iterable[str] = ()
    ) -> None:
        """Block a claimed execution without running its code; out of time it ends.

        Args:
            row: Of ``claim_executions``.
            reason: Why it is blocked.
            issued: Addresses of its outstanding calls, as far as they are known.
        """
        resident = self._take_in(row)
        if resident is not None:
            resident.has_children = True  # nobody has looked
            self._block(resident, reason, issued)

    def end_by_force(
        self, row: Mapping[str, Any], issued: Iterable[str], why: str
    ) -> None:
        """End a claimed execution that was asked to stop, without running its code.

        Args:
            row: Of ``claim_executions``, with ``cancel_reason``.
            issued: Addresses of its outstanding calls.
            why: Its code cannot clean up.
        """
        resident = self._take_in(row)
        if resident is not None:
            resident.has_children = True  # nobody has looked
            self._end_by_force(resident, issued, row["cancel_reason"], why)

    def _take_in(self, row: Mapping[str, Any]) -> Resident | None:
        """The resident of a claimed execution; None: not for us, or here already."""
        function = catalogue.find(row["function"])
        if function is None:
            return None
        former = self.residents.get(row["execution_id"])
        if former is not None:
            if former.epoch >= row["epoch"]:
                # A child of ours that became resident while it was taken for lost.
                return None
            # Its release was committed, but we have not heard of that yet.
            self._forget(former)
        resident = resident_of(row, function, self._payload_bytes_max)
        self.residents[resident.execution_id] = resident
        return resident

    def _restore(self, resident: Resident, stored: Stored) -> None:
        resident.has_children = True
        resident.position = len(stored.turns)
        resident.heartbeats = stored.heartbeats
        run = resident.run
        if isinstance(run, WorkflowRun):
            journal = Journal(
                head=resident.head,
                code_digest=resident.code_digest or resident.function.code_digest,
                turns=stored.turns,
                results=stored.results,
                issued=stored.issued,
            )
            resident.restoring = self._replay(resident, run, journal)
            return
        run.begin()
        address = next(iter(run.pending))
        if address in stored.results:
            run.take()
            self._arrive(resident, Arrived(address, stored.results[address]))
        elif address in stored.issued:
            run.take()

    def _replay(self, resident: Resident, run: WorkflowRun, journal: Journal) -> Any:
        yield from run.restore(
            journal,
            strict=False,
            pause_at=lambda: time.perf_counter() + SLICE_SECONDS,
        )
        decisions = run.take()
        delivered = {
            delivery.address
            for turn in journal.turns
            for delivery in turn.deliveries
            if isinstance(delivery, ResultDelivered)
        }
        settled = {address for turn in journal.turns for address in turn.settled}
        known = journal.issued | set(journal.results)
        if decisions.edited is not None:
            resident.left_over = set(known) - run.made
        resident.decisions = Decisions(
            calls=[
                call
                for call in decisions.calls
                if call.address not in known and not call.done()
            ],
            settled=[c for c in decisions.settled if c.address not in settled],
            told=decisions.told,
            edited=decisions.edited,
        )
        for address, recorded in journal.results.items():
            if address not in delivered and address in run.pending:
                self._arrive(resident, Arrived(address, recorded))

    def adopt_child(self, call: CallLike, row: tuple[Any, ...]) -> None:
        """Start a child that was inserted as ours."""
        target = call.target
        if not isinstance(target, DurableFunction) or row[0] in self.residents:
            return
        resident = resident_child(row, target, self._payload_bytes_max)
        self.residents[resident.execution_id] = resident
        resident.run.begin()
        self._schedule(resident)

    # What arrives from elsewhere.

    def expect_local(self, execution_id: UUID) -> bool:
        """See ``settles.Owners``."""
        resident = self.residents.get(execution_id)
        if resident is None or resident.parked or resident.releasing:
            return False
        resident.local_results += 1
        return True

    def expect_no_more(self, execution_id: UUID) -> None:
        """See ``settles.Owners``."""
        resident = self.residents.get(execution_id)
        if resident is not None:
            resident.local_results -= 1

    def arrive(self, execution_id: UUID, address: str, recorded: Recorded) -> None:
        """See ``settles.Owners``."""
        resident = self.residents.get(execution_id)
        if resident is not None:
            resident.local_results -= 1
            self._arrive(resident, Arrived(address, recorded))

    def receive(self, arrivals: Iterable[Arrival]) -> None:
        """Rows of the inbox."""
        for arrival in arrivals:
            resident = self.residents.get(arrival.execution_id)
            if resident is None or arrival.inbox_id in resident.inbox_known:
                continue
            resident.inbox_known.add(arrival.inbox_id)
            if arrival.kind == "cancel":
                reason: CancelReason = (
                    "parent" if arrival.reason == "parent" else "cancel"
                )
                resident.cancels.append((reason, arrival.inbox_id))
                self._schedule(resident)
            elif arrival.address is not None and arrival.recorded is not None:
                self._arrive(
                    resident,
                    Arrived(
                        arrival.address, arrival.recorded, inbox_id=arrival.inbox_id
                    ),
                )
            else:
                resident.inbox_done.append(arrival.inbox_id)

    def known_inbox(self) -> list[int]:
        """Inbox rows that were read and are not deleted yet."""
        return [i for r in self.residents.values() for i in r.inbox_known]

    def _arrive(self, resident: Resident, arrived: Arrived) -> None:
        resident.arrived.append(arrived)
        self._schedule(resident)

    # Advancing.

    def _schedule(self, resident: Resident) -> None:
        if not resident.scheduled and not resident.gone:
            resident.scheduled = True
            self._ready.append(resident)
            if not self._awake:
                self._awake = True
                asyncio.get_running_loop().call_soon(self._advance_ready)

    def _advance_ready(self) -> None:
        """One slice; a plain callback of the real loop, never inside a task's step."""
        ready, until = self._ready, time.perf_counter() + SLICE_SECONDS
        try:
            while ready and time.perf_counter() < until:
                self._advance(ready.popleft(), until)
        finally:
            self._awake = bool(ready)
            if ready:
                asyncio.get_running_loop().call_soon(self._advance_ready)

    def _advance(self, resident: Resident, until: float) -> None:
        resident.scheduled = False
        if resident.gone or resident.flushing or resident.releasing:
            return
        try:
            self._advance_slice(resident, until)
        except StentError as error:
            self._block(resident, f"{type(error).__name__}: {error}")
        except Exception as error:
            log.exception(
                "execution.advance_failed", execution_id=str(resident.execution_id)
            )
            self._block(resident, f"stent failed: {type(error).__name__}: {error}")

    def _advance_slice(self, resident: Resident, until: float) -> None:
        if resident.restoring is not None and not self._step_restoring(resident, until):
            self._schedule(resident)
            return
        run = resident.run
        while True:
            if not run.drain(until):
                self._schedule(resident)
                return
            if not resident.committed:
                break
            delivery, recorded = resident.committed.popleft()
            if isinstance(delivery, ResultDelivered):
                resident.delivered.discard(delivery.address)
            run.deliver(delivery, recorded)
        self._after_drain(resident)

    def _step_restoring(self, resident: Resident, until: float) -> bool:
        steps = resident.restoring
        if steps is None:
            return True
        for _ in steps:
            if time.perf_counter() >= until:
                return False
        resident.restoring = None
        return True

    def _after_drain(self, resident: Resident) -> None:
        outcome = resident.run.outcome()
        match outcome:
            case Diverged(difference=difference):
                reason = resident.cancel_asked or self._why_to_stop(resident)
                if reason is None:
                    self._block(resident, str(difference))
                else:
                    # Its code cannot clean up any more: nothing is left to wait for.
                    nothing = Recorded(ok=False, payload=b"")
                    self._finish(resident, nothing, reason)
                return
            case Finished(recorded=recorded, cancelled=cancelled):
                self._finish(resident, recorded, cancelled)
                return
            case Parked():
                self._next_turn(resident)

    def _next_turn(self, resident: Resident) -> None:
        """Submit what was decided and what comes next, or wait."""
        if isinstance(resident.run, ActivityRun):
            self._advance_activity(resident, resident.run)
            return
        decisions = resident.run.take()
        if resident.decisions:
            decisions = _merge(resident.decisions, decisions)
            resident.decisions = Decisions()
        if not decisions and not self._has_news(resident):
            self._wait(resident)
            return
        item = self._item(resident)
        urgent = self._calls.act(resident, decisions, item)
        urgent = self._accept_code(resident, item) or urgent
        deliveries, committed = self._collect(resident, item)
        if not (urgent or deliveries or item.inbox or item.results):
            # Calls that run inline are named by a later turn, or never need to be.
            self._wait(resident)
            return
        item.turn = Turn(
            deliveries=tuple(deliveries),
            settled=tuple(call.address for call in decisions.settled),
            told=tuple(address for address, _ in decisions.told),
            edited=decisions.edited,
            took=_took(resident.run, committed) or None,
        )
        self._name_inline(item)
        resident.committed.extend(committed)
        self._submit(resident, item)

    def _has_news(self, resident: Resident) -> bool:
        """Whether there may be anything to write or deliver."""
        if (
            resident.arrived
            or resident.cancels
            or resident.inbox_done
            or resident.failed_inline
            or resident.status is Status.BLOCKED
            or resident.code_digest != resident.function.code_digest
        ):
            return True
        due = wake_time(resident)
        return due is not None and due <= self._identity.now_us()

    def _accept_code(self, resident: Resident, item: TurnItem) -> bool:
        """After a replay under other code, or of a blocked execution: say so."""
        digest = resident.function.code_digest
        if resident.code_digest == digest and resident.status is not Status.BLOCKED:
            return False
        resident.code_digest = digest
        item.mark = Mark(wake_at=MINUS_INFINITY, code_digest=digest)
        if resident.status is Status.BLOCKED:
            resident.status = item.mark.status = Status.RUNNING
        return True

    def _advance_activity(self, resident: Resident, run: ActivityRun) -> None:
        """No code sees its deliveries, so nothing has to be committed before."""
        item = self._item(resident)
        decisions = run.take()
        urgent = self._calls.act(resident, decisions, item)
        at = max(self._identity.now_us(), run.now_us)
        for arrived in self._take_arrived(resident, item, keep=False):
            run.deliver(ResultDelivered(arrived.address, at), arrived.recorded)
        for reason, inbox_id in self._take_cancels(resident):
            if inbox_id is not None:
                item.inbox.append((resident.execution_id, inbox_id))
            run.deliver(CancelDelivered(reason, at))
        # A cancellation drops the call.
        self._calls.act(resident, run.take(), item)
        outcome = run.outcome()
        if isinstance(outcome, Finished):
            self._finish(resident, outcome.recorded, outcome.cancelled, item)
        elif urgent or item.inbox:
            self._submit(resident, item)
        else:
            self._wait(resident)

    def _collect(
        self, resident: Resident, item: TurnItem
    ) -> tuple[list[Delivery], list[tuple[Delivery, Recorded | None]]]:
        """What the code sees next, in order: results, cancellation, time."""
        at = max(self._identity.now_us(), resident.run.now_us)
        deliveries: list[tuple[Delivery, Recorded | None]] = [
            (ResultDelivered(arrived.address, at), arrived.recorded)
            for arrived in self._take_arrived(resident, item, keep=True)
        ]
        for reason, inbox_id in self._take_cancels(resident):
            if inbox_id is not None:
                item.inbox.append((resident.execution_id, inbox_id))
            if resident.run.cancelled is None:
                deliveries.append((CancelDelivered(reason, at), None))
                self._mark_cancelling(resident, item, reason, at)
        deadline = resident.run.next_deadline
        if deadline is not None and deadline <= at:
            deliveries.append((TimeAdvanced(at), None))
        return [delivery for delivery, _ in deliveries], deliveries

    def _mark_cancelling(
        self, resident: Resident, item: TurnItem, reason: CancelReason, at: int
    ) -> None:
        grace = self._identity.settings.cancel_grace
        by = instant(at) + grace
        if resident.cancel_by_us is None:
            resident.cancel_by_us = microseconds(by)
        resident.status = Status.CANCELLING
        item.mark = Mark(
            status=Status.CANCELLING,
            code_digest=None if item.mark is None else item.mark.code_digest,
            wake_at=MINUS_INFINITY,
            cancel_reason=reason,
            cancel_by=by,
        )

    def _take_arrived(
        self, resident: Resident, item: TurnItem, *, keep: bool
    ) -> list[Arrived]:
        """Results that somebody waits for; the others are written and forgotten."""
        arrived, resident.arrived = resident.arrived, []
        waited: list[Arrived] = []
        for one in arrived:
            if one.inbox_id is not None:
                item.inbox.append((resident.execution_id, one.inbox_id))
            if one.attempt is not None and (keep or not one.recorded.ok):
                item.add_result(one.attempt, one.recorded)
            elif one.attempt is not None and one.attempt.told:
                item.tells += told_rows(one.attempt)
            waits = one.address in resident.run.pending
            if (waits or one.address in resident.left_over) and (
                one.address not in resident.delivered
            ):
                resident.delivered.add(one.address)
                waited.append(one)
        for inbox_id in resident.inbox_done:
            item.inbox.append((resident.execution_id, inbox_id))
        resident.inbox_done.clear()
        return waited

    def _take_cancels(
        self, resident: Resident
    ) -> list[tuple[CancelReason, int | None]]:
        cancels, resident.cancels = resident.cancels, []
        if (
            resident.deadline_us is not None
            and resident.run.cancelled is None
            and self._identity.now_us() >= resident.deadline_us
        ):
            cancels.append(("timeout", None))
        return cancels

    # Writing.

    def _new_item(
        self, resident: Resident, on_refused: Callable[[Resident, StoreError], None]
    ) -> TurnItem:
        return TurnItem(
            resident,
            self._committed,
            self._lost,
            on_refused,
            self._inserted,
            self._taken,
        )

    def _item(self, resident: Resident) -> TurnItem:
        item = self._new_item(resident, self._refused)
        for attempt, failed in resident.failed_inline:
            item.add_failed_inline(attempt, failed)
        resident.failed_inline = []
        return item

    def _submit(self, resident: Resident, item: TurnItem) -> None:
        resident.flushing = True
        self._stop_timer(resident)
        self._writer.submit(item)

    def _committed(self, item: TurnItem) -> None:
        resident = item.resident
        resident.flushing = False
        for _, inbox_id in item.inbox:
            resident.inbox_known.discard(inbox_id)
        if item.turn is not None:
            resident.position += 1
        self._prove(resident)
        self._expect_no_children(resident)
        if item.ending is not None:
            self._ended(item, item.ending)
        elif item.mark is not None and item.mark.release:
            self._forget(resident)
        elif self.accepting:
            self._schedule(resident)
        else:
            self._release_unless_it_runs(resident)

    def _prove(self, resident: Resident) -> None:
        """Its replay has ended, and nothing of it runs here: it did not kill us."""
        if resident.suspect and not resident.inline:
            resident.suspect = False
            self.on_proven(resident.execution_id, True)  # noqa: FBT003 - harmless

    def _expect_no_children(self, resident: Resident) -> None:
        """They are here by now, or never will be."""
        self._calls.children_came(resident, resident.own_children_coming)

    def _inserted(self, item: TurnItem, calls: NewCalls) -> None:
        """Tell whoever may claim them; begin what is ours."""
        now = self._identity.clock.now()
        for queue, available_at in {(row[4], row[6]) for row in calls.tasks}:
            pause = dt.timedelta(0) if available_at is None else available_at - now
            self._hints.tasks(queue, max(0.0, pause.total_seconds()))
        for queue in {row[6] for row in calls.children if not row[10]}:
            self._hints.executions(queue)
        self._calls.inserted(item.resident, calls)
        self._calls.children_came(item.resident, len(calls.own_children))
        for call, row in calls.own_children:
            self.adopt_child(call, row)
        if item.broken:
            return
        if item.rest and not item.calls and not self._issue_more(item):
            return
        if item.calls:
            self._writer.submit(item)

    def _taken(self, item: TurnItem) -> None:
        """Some of its calls are being inserted: meanwhile prepare the next."""
        asyncio.get_running_loop().call_soon(self._issue_ahead, item)

    def _issue_ahead(self, item: TurnItem) -> None:
        resident = item.resident
        # Its flush may have been refused before it was sent.
        if item.needs_part and not (resident.gone or resident.releasing):
            self._issue_more(item)

    def _issue_more(self, item: TurnItem) -> bool:
        """What another flush can insert; False if that failed."""
        resident = item.resident
        item.begin_part()
        try:
            self._calls.issue(resident, item)
        except Exception as error:
            log.exception(
                "execution.advance_failed", execution_id=str(resident.execution_id)
            )
            item.broken = True
            resident.flushing = False
            self._expect_no_children(resident)
            self._calls.dropped(resident)
            self._block(resident, f"stent failed: {type(error).__name__}: {error}")
            return False
        self._name_inline(item)
        return True

    def _name_inline(self, item: TurnItem) -> None:
        """What has begun to run here of its calls and those before them.

        Even what has ended by now: its result is written with the next turn.
        """
        item.inline.update(dict.fromkeys(item.resident.inline))
        if item.turn is not None and not item.rest:
            inline = tuple(item.inline)
            item.resident.named = frozenset(inline)
            item.turn = msgspec.structs.replace(item.turn, inline=inline)

    def _lost(self, resident: Resident) -> None:
        """Somebody else owns it, or it has ended: nothing of ours counts any more."""
        self._forget(resident)

    def _refused(self, resident: Resident, error: StoreError) -> None:
        resident.flushing = False
        self._expect_no_children(resident)
        self._calls.dropped(resident)
        self._block(resident, f"the database refuses what it wrote: {error}")

    def _block(
        self, resident: Resident, reason: str, issued: Iterable[str] = ()
    ) -> None:
        """Park it for an operator or for other code; end it if it was asked to stop."""
        stop = resident.cancel_asked or self._why_to_stop(resident)
        if stop is not None and not resident.releasing:
            self._end_by_force(resident, issued, stop, reason)
            return
        log.error(
            EXECUTION_BLOCKED,
            execution_id=str(resident.execution_id),
            workflow=resident.function.name,
            reason=reason,
        )
        item = self._new_item(resident, self._give_up)
        item.mark = Mark(
            status=Status.BLOCKED,
            blocked_digest=resident.function.code_digest,
            blocked_reason=_storable_text(reason),
            release=True,
        )
        resident.releasing = True
        for attempt in resident.inline.values():
            attempt.stop()
        self._submit(resident, item)

    def _end_by_force(
        self, resident: Resident, issued: Iterable[str], stop: CancelReason, why: str
    ) -> None:
        """It was asked to stop, and its code cannot clean up: nothing to wait for."""
        log.error(
            "execution.ended_by_force",
            execution_id=str(resident.execution_id),
            workflow=resident.function.name,
            reason=why,
        )
        item = self._item(resident)
        item.drops += [
            (resident.execution_id, resident.call_id(address))
            for address in islice(issued, DROPS_MAX)
        ]
        self._finish(resident, Recorded(ok=False, payload=b""), stop, item)

    def _give_up(self, resident: Resident, error: StoreError) -> None:
        log.error(
            "execution.block_refused",
            execution_id=str(resident.execution_id),
            error=str(error),
        )
        self._forget(resident)

    def _finish(
        self,
        resident: Resident,
        recorded: Recorded,
        cancelled: CancelReason | None,
        item: TurnItem | None = None,
    ) -> None:
        """Write the outcome; what it still waits for is dropped."""
        if item is None:
            item = self._item(resident)
            decisions = _merge(resident.decisions, resident.run.take())
            dropped = [
                c for c in decisions.calls if not (c.options.detached or c.done())
            ]
            if dropped and recorded.ok and cancelled is None:
                _warn_of_dropped(resident, dropped)
            decisions.calls = [c for c in decisions.calls if c.options.detached]
            resident.decisions = Decisions()
            self._calls.act(resident, decisions, item)
            self._calls.issue_all(resident, item)
            if decisions:
                item.turn = Turn(
                    settled=tuple(call.address for call in decisions.settled),
                    told=tuple(address for address, _ in decisions.told),
                )
        item.drop_tasks()
        item.drops += self._left_behind(resident)
        item.mark = None
        for arrived in resident.arrived:
            if arrived.attempt is not None:
                item.add_result(arrived.attempt, arrived.recorded)
        item.ending = make_ending(recorded, cancelled or self._why_to_stop(resident))
        item.read_inboxes = self.read_inboxes
        item.parent_is_local = lambda: self._parent_is_local(resident)
        item.parent_hears_nothing = lambda: self._parent_hears_nothing(resident)
        resident.releasing = True
        for attempt in resident.inline.values():
            attempt.stop()
        resident.inline.clear()
        self._submit(resident, item)

    def _left_behind(self, resident: Resident) -> list[tuple[UUID, UUID]]:
        """Tasks that nobody waits for any more; of very many the first, see tidy."""
        inline, pending = resident.inline, resident.run.pending
        left = (a for a, call in pending.items() if not (a in inline or call.child))
        return [
            (resident.execution_id, resident.call_id(address))
            for address in islice(left, DROPS_MAX)
        ]

    def _why_to_stop(self, resident: Resident) -> CancelReason | None:
        """It returned in time to see none of these, but they came first."""
        if resident.run.cancelled is not None:
            return resident.run.cancelled
        if resident.cancels:
            return resident.cancels[0][0]
        deadline = resident.deadline_us
        if deadline is not None and self._identity.now_us() >= deadline:
            return "timeout"
        return None

    def _parent_is_local(self, resident: Resident) -> bool:
        parent = resident.head.parent_id
        return parent is not None and self.expect_local(parent)

    def _parent_hears_nothing(self, resident: Resident) -> None:
        if resident.head.parent_id is not None:
            self.expect_no_more(resident.head.parent_id)

    def _ended(self, item: TurnItem, ending: Ending) -> None:
        resident = item.resident
        facts = {}
        if ending.status is Status.FAILED:
            facts["error_type"] = error_type_of(ending.recorded.payload)
        log.info(
            _ENDED_EVENTS[ending.status],
            execution_id=str(resident.execution_id),
            workflow=resident.function.name,
            **facts,
        )
        parent = resident.head.parent_id
        if item.expects_parent and parent is not None:
            address = resident.parent_address or ""
            self.arrive(parent, address, ending.recorded)
        self._forget(resident)
        self.on_ended(resident.execution_id, resident.function.name, ending)

    def _forget(self, resident: Resident) -> None:
        if resident.gone:
            return
        resident.gone = True
        if resident.suspect:
            resident.suspect = False
            self.on_proven(resident.execution_id, False)  # noqa: FBT003 - who knows
        self._stop_timer(resident)
        self._expect_no_children(resident)
        self._calls.dropped(resident)
        if resident.leaving:
            self._leaving -= 1
            resident.leaving = False
        if self.residents.get(resident.execution_id) is resident:
            del self.residents[resident.execution_id]
        for attempt in list(resident.inline.values()):
            if attempt.epoch is None:
                attempt.stop()
        resident.inline.clear()
        resident.run.close()

    # Waiting.

    def _wait(self, resident: Resident) -> None:
        resident.idle_since = time.monotonic()
        resident.cleans_up = None
        self._prove(resident)
        if not self.accepting and not _runs_locally(resident):
            self._release(resident)
            return
        deadlines = (
            resident.run.next_deadline,
            None if resident.run.cancelled else resident.deadline_us,
            resident.cancel_by_us if resident.run.cancelled else None,
        )
        due = min((d for d in deadlines if d is not None), default=None)
        if due is None or due == resident.timer_us:
            return
        self._stop_timer(resident)
        seconds = (due - self._identity.now_us()) / 1e6
        resident.timer_us = due
        resident.timer = asyncio.get_running_loop().call_later(
            min(max(0.0, seconds), TIMER_SECONDS_MAX), self._due, resident
        )

    def _due(self, resident: Resident) -> None:
        self._stop_timer(resident)
        if (
            resident.run.cancelled
            and resident.cancel_by_us is not None
            and self._identity.now_us() >= resident.cancel_by_us
            and not resident.flushing
        ):
            self._end_late(resident)
            return
        self._schedule(resident)

    def _end_late(self, resident: Resident) -> None:
        """Its cleanup took longer than the grace."""
        reason = resident.run.cancelled
        if not resident.releasing:
            self._finish(resident, Recorded(ok=False, payload=b""), reason)

    def _stop_timer(self, resident: Resident) -> None:
        if resident.timer is not None:
            resident.timer.cancel()
        resident.timer = resident.timer_us = None

    def park_idle(self) -> int:
        """Write ``wake_at`` of what has had nothing to do for a while."""
        now, count = time.monotonic(), 0
        for resident in self.residents.values():
            if (
                not (resident.parked or resident.leaving)
                and resident.idle_since
                and now - resident.idle_since > PARK_AFTER_SECONDS
                and is_idle(resident)
            ):
                self._writer.submit(Park(resident, wake_time(resident)))
                count += 1
        return count

    def name_inline(self) -> int:
        """Journal calls that have run here for a while, so that people see them."""
        now, count = time.monotonic(), 0
        for resident in self.residents.values():
            if (
                resident.inline
                and isinstance(resident.run, WorkflowRun)
                and resident.idle_since
                and now - resident.idle_since > NAME_AFTER_SECONDS
                and not (resident.leaving or resident.inline.keys() <= resident.named)
                and only_runs_inline(resident)
            ):
                item = self._item(resident)
                resident.named = frozenset(resident.inline)
                item.turn = Turn(inline=tuple(resident.inline))
                self._submit(resident, item)
                count += 1
        return count

    # Letting go of what only waits.

    def evict(self) -> int:
        """Let go of what has waited for long, and of more if there is no room."""
        settings = self._identity.settings
        if not self.accepting:
            return 0
        kept = room_kept(settings.resident_max)
        moment = Moment(
            monotonic=time.monotonic(),
            now_us=self._identity.now_us(),
            evict_after=settings.evict_after,
            surplus=kept - self.room - self._leaving,
        )
        chosen = choose(self.residents.values(), moment)[:EVICTIONS_MAX]
        for resident in chosen:
            resident.leaving = True
            self._leaving += 1
            self._writer.submit(Evict(resident, self._evicted, self._kept))
        return len(chosen)

    def make_room(self) -> int:
        """Let others go if there is little room; returns how much there is now."""
        room = self.room
        if room < room_kept(self._identity.settings.resident_max):
            self.evict()
        return room

    @property
    def evicted_lately(self) -> bool:
        """Whether hints may still come here for what has left."""
        return time.monotonic() - self._evicted_at < EVICTED_LATELY_SECONDS

    def _evicted(self, resident: Resident) -> None:
        log.debug(EXECUTION_EVICTED, execution_id=str(resident.execution_id))
        self._evicted_at = time.monotonic()
        wake_us = wake_time(resident)
        left_behind = (
            resident.arrived
            or resident.cancels
            or resident.inbox_known
            or (wake_us is not None and wake_us <= self._identity.now_us())
        )
        self._forget(resident)
        if left_behind:
            self.on_left_behind()
        self.on_room()

    def _kept(self, resident: Resident) -> None:
        if resident.leaving:
            self._leaving -= 1
            resident.leaving = False
        self._schedule(resident)

    # Leaving.

    def release_all(self) -> None:
        """Hand everything over: others may claim it as soon as this is written."""
        self.accepting = False
        for resident in list(self.residents.values()):
            if not resident.flushing and not resident.releasing:
                self._release_unless_it_runs(resident)

    def _release_unless_it_runs(self, resident: Resident) -> None:
        """What ``stent.run`` has begun can only end here; its result comes first."""
        if _runs_locally(resident):
            self._schedule(resident)
        else:
            self._release(resident)

    def _release(self, resident: Resident) -> None:
        item = self._new_item(resident, self._give_up)
        for attempt, failed in resident.failed_inline:
            item.add_failed_inline(attempt, failed)
        for arrived in resident.arrived:
            if arrived.attempt is not None:
                item.add_result(arrived.attempt, arrived.recorded)
        for address, attempt in list(resident.inline.items()):
            if isinstance(attempt.target, DurableFunction) and attempt.task is not None:
                # It goes on here as a task; its result reaches the next owner.
                item.add_own_task(attempt)
                self.on_inline_kept(attempt)
                del resident.inline[address]
        item.mark = Mark(wake_at=MINUS_INFINITY, release=True)
        resident.releasing = True
        self._submit(resident, item)

    def drop_all(self) -> None:
        """The worker was taken over: nothing here is ours any more."""
        for resident in list(self.residents.values()):
            self._forget(resident)


def _runs_locally(resident: Resident) -> bool:
    """Whether a ``stent.run`` of it has begun."""
    return any(
        isinstance(attempt.target, LocalFunction) and attempt.task is not None
        for attempt in resident.inline.values()
    )


def _storable_text(text: str) -> str:
    """What the database takes: no NUL, no lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _took(
    run: Run, deliveries: Iterable[tuple[Delivery, Recorded | None]]
) -> dict[str, int]:
    """How long the pages took whose results are delivered."""
    return {
        delivery.address: recorded.took_us
        for delivery, recorded in deliveries
        if isinstance(delivery, ResultDelivered)
        and recorded is not None
        and recorded.took_us is not None
        and isinstance(run.pending.get(delivery.address), PageCall)
    }


def _warn_of_dropped(resident: Resident, calls: Iterable[CallLike]) -> None:
    """They were made and never had a chance: most likely an await was forgotten."""
    names = sorted({call.function for call in calls})
    log.warning(
        CALL_DROPPED,
        execution_id=str(resident.execution_id),
        workflow=resident.function.name,
        activities=names,
    )


def _merge(first: Decisions, second: Decisions) -> Decisions:
    return Decisions(
        calls=first.calls + second.calls,
        settled=first.settled + second.settled,
        told=first.told + second.told,
        edited=second.edited or first.edited,
    )
