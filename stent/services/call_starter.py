"""What becomes of the calls that code makes: they run here, or become rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from stent.calls import DurableCall, LocalFunction
from stent.clock import child_execution_id
from stent.log import REPLAY_EDITED, get_logger
from stent.model import Effects, Recorded, Status
from stent.pages import ItemCall, PageCall
from stent.registry import DurableFunction, Options
from stent.replay import Decisions
from stent.retry import RetryPolicy
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
from stent.services.options import (
    AttemptOptions,
    StoredPage,
    load_options,
    store_options,
)
from stent.services.residents import Arrived, CallLike, Resident, RootCall
from stent.services.turn_items import NewCalls, TurnItem

log = get_logger(__name__)

_LOCAL_OPTIONS = AttemptOptions(RetryPolicy.of(1), None)


class CallStarter:
    """Starts the calls of the executions that are resident on one worker."""

    def __init__(  # noqa: PLR0913 - composed in one place
        self,
        identity: Identity,
        activities: Activities,
        residents: Mapping[UUID, Resident],
        *,
        queues: frozenset[str],
        has_room: Callable[[], bool],
        on_arrived: Callable[[Resident, Arrived], None],
        on_failed: Callable[[Resident], None],
    ) -> None:
        """Create it.

        Args:
            identity: Of the worker.
            activities: Where inline attempts run.
            residents: Whose calls they are.
            queues: That this worker serves.
            has_room: Whether one more execution may become resident.
            on_arrived: Called with the outcome of an inline call.
            on_failed: Called when an inline call needs another attempt.
        """
        self._identity = identity
        self._activities = activities
        self._residents = residents
        self._queues = queues
        self._has_room = has_room
        self._on_arrived = on_arrived
        self._on_failed = on_failed
        self._inline = 0
        self._queued: Options | None = None
        self.children_coming = 0
        """Children that were inserted as ours, or will be, and are not resident yet."""

    def children_came(self, resident: Resident, count: int) -> None:
        """So many are here, or never will be."""
        count = min(count, resident.own_children_coming)
        resident.own_children_coming -= count
        self.children_coming -= count

    def act(self, resident: Resident, decisions: Decisions, item: TurnItem) -> bool:
        """Start what runs here, turn the rest into rows; True if a flush is needed.

        As many as a flush inserts: the others become ``item.rest``.
        """
        item.rest.extend(decisions.calls)
        self.issue(resident, item)
        for call in decisions.settled:
            self._settle(resident, call, item)
        for address, payload in decisions.told:
            item.tells.append(
                (resident.execution_id, resident.call_id(address), address, payload)
            )
        if decisions.edited is not None:
            log.info(
                REPLAY_EDITED,
                execution_id=str(resident.execution_id),
                code_digest=decisions.edited,
            )
        return bool(
            item.has_calls or decisions.settled or decisions.told or decisions.edited
        )

    def issue(self, resident: Resident, item: TurnItem) -> None:
        """Take from ``item.rest`` what the next flush can insert."""
        self._queued = None
        while item.rest and not item.is_full:
            self._issue(resident, item.rest.popleft(), item)

    def issue_all(self, resident: Resident, item: TurnItem) -> None:
        """Take everything."""
        self._queued = None
        while item.rest:
            self._issue(resident, item.rest.popleft(), item)

    def _issue(self, resident: Resident, call: CallLike, item: TurnItem) -> None:
        target = call.target
        if call.address in resident.left_over:
            return
        if isinstance(target, LocalFunction):
            self._run_inline(resident, call)
        elif call.child:
            own = (
                call.options.queue in self._queues
                and call.options.delay is None
                and self._has_room()
                and isinstance(target, DurableFunction)
                and not self._activities.limited(call.options.queue, target.name)
            )
            item.add_child(call, self._identity, own=own)
            if own:
                resident.own_children_coming += 1
                self.children_coming += 1
        elif self._may_run_inline(resident, call) and (
            # As a task of what is paused it would not be claimed by anybody.
            self._has_slot(call) or self._cleans_up_despite_pause(resident, call)
        ):
            self._run_inline(resident, call)
        else:
            item.add_task(call, self._identity, self._stored_options(resident, call))
            if call.options is not self._queued:
                self._queue_up(resident, call, item.calls[-1])

    def _queue_up(self, resident: Resident, call: CallLike, calls: NewCalls) -> None:
        """If there is no slot for it now, none may be given to what is less urgent."""
        target, options, activities = call.target, call.options, self._activities
        if (
            options.delay is not None
            or (isinstance(target, DurableFunction) and target.in_process)
            or options.queue not in self._queues
            or activities.limited(options.queue, call.function)
            or self._has_slot(call)
        ):
            return
        # Known of one, known of all with its options.
        self._queued = options
        before = calls.coming
        calls.coming = activities.precedence.queued(before, options.priority)
        if before is not None:
            resident.coming.remove(before)
        resident.coming.append(calls.coming)

    def inserted(self, resident: Resident, calls: NewCalls) -> None:
        """Calls that became tasks are in the database."""
        if calls.coming is not None and resident.coming:
            self._activities.precedence.inserted(calls.coming)
            resident.coming.remove(calls.coming)

    def dropped(self, resident: Resident) -> None:
        """Those that are coming never will be."""
        for priority in resident.coming:
            self._activities.precedence.dropped(priority)
        resident.coming.clear()

    def _may_run_inline(self, resident: Resident, call: CallLike) -> bool:
        target, activities = call.target, self._activities
        return not (
            resident.suspect
            or isinstance(call, PageCall | ItemCall)
            or not isinstance(target, DurableFunction)
            or target.effects is Effects.TRANSACTIONAL
            or call.options.delay is not None
            or call.options.queue not in self._queues
            or not activities.accepting
            or (
                activities.limited(call.options.queue, target.name)
                and not self._cleans_up_despite_pause(resident, call)
            )
            or (target.in_process and activities.process_room <= 0)
        )

    def _has_slot(self, call: CallLike) -> bool:
        activities = self._activities
        return (
            activities.room > 0
            and not activities.precedence.holds_back(call.options.priority)
            and (activities.waiting == 0 or self._inline < activities.slots // 2)
        )

    def _cleans_up_despite_pause(self, resident: Resident, call: CallLike) -> bool:
        """A pause must not keep what was asked to stop from cleaning up."""
        return resident.status is Status.CANCELLING and self._activities.only_paused(
            call.options.queue, call.function
        )

    def _run_inline(self, resident: Resident, call: CallLike) -> None:
        target = call.target
        if target is None:
            message = f"{call.address} has no target"
            raise TypeError(message)
        stored = self._stored_options(resident, call)
        attempt = Attempt(
            execution_id=resident.execution_id,
            call_id=resident.call_id(call.address),
            address=call.address,
            target=target,
            arguments=call.arguments,
            options=load_options(stored, target)
            if isinstance(target, DurableFunction)
            else _LOCAL_OPTIONS,
            stored_options=stored,
            number=1,
            epoch=None,
            key_seed=resident.head.key_seed,
            root_id=resident.head.root_id,
            parent_id=resident.head.parent_id,
            tags=resident.head.tags,
            queue=call.options.queue,
            priority=call.options.priority,
            earlier_beats=resident.heartbeats or None,
            despite_pause=self._cleans_up_despite_pause(resident, call),
        )
        resident.inline[call.address] = attempt
        self._inline += 1
        self._activities.offer(attempt, self._inline_ended)

    def _stored_options(self, resident: Resident, call: CallLike) -> bytes | None:
        if isinstance(call, RootCall):
            return resident.stored_options
        page = None
        if isinstance(call, PageCall):
            form = call.form
            page = StoredPage(
                call.start, call.size, form.star, form.return_exceptions, call.share
            )
        if not isinstance(call.target, DurableFunction):
            return None
        return store_options(call.options, call.target, page)

    def _inline_ended(self, attempt: Attempt, ended: Ended) -> None:
        self._inline -= 1
        resident = self._residents.get(attempt.execution_id)
        if resident is None or resident.inline.get(attempt.address) is not attempt:
            return
        del resident.inline[attempt.address]
        match ended:
            case Succeeded(payload=payload) | Committed(payload=payload):
                recorded = Recorded(ok=True, payload=payload)
                self._on_arrived(resident, Arrived(attempt.address, recorded, attempt))
            case Failed(payload=payload, retry_at=None):
                recorded = Recorded(ok=False, payload=payload)
                self._on_arrived(resident, Arrived(attempt.address, recorded, attempt))
            case Failed():
                resident.failed_inline.append((attempt, ended))
                self._on_failed(resident)
            case Stopped():
                return

    def _settle(
        self, resident: Resident, call: DurableCall[Any], item: TurnItem
    ) -> None:
        """The code does not wait for it any more: stop it wherever it is."""
        attempt = resident.inline.pop(call.address, None)
        if attempt is not None:
            attempt.stop()
            self._activities.forget({attempt})
            return
        if call.child:
            child = child_execution_id(resident.execution_id, call.address)
            item.cancels.append((resident.execution_id, child, "cancel"))
            return
        call_id = resident.call_id(call.address)
        item.drops.append((resident.execution_id, call_id))
        self._activities.forget_call(call_id)
