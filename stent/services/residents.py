"""An execution whose live loop is in this worker's memory."""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import UUID

from stent.calls import DurableCall
from stent.journal import CancelReason, Delivery, Head, ResultDelivered
from stent.model import Kind, Recorded, Status
from stent.registry import DurableFunction, Options
from stent.replay import Decisions, Finished, Outcome, Parked, WorkflowRun
from stent.services.attempts import Attempt, Failed
from stent.services.identity import make_call_ids


@dataclass(slots=True)
class Arrived:
    """A result that is there to be delivered.

    Attributes:
        attempt: The inline attempt that produced it; its result is not written yet.
        inbox_id: Row to delete with the delivery, unless that was done before.
    """

    address: str
    recorded: Recorded
    attempt: Attempt | None = None
    inbox_id: int | None = None


class Run(Protocol):
    """What advances: a workflow, or a dispatched activity."""

    pending: dict[str, Any]

    def begin(self) -> None:
        """Start."""
        ...

    def deliver(self, delivery: Delivery, recorded: Recorded | None = None) -> None:
        """Hand over."""
        ...

    def drain(self, until: float | None = None) -> bool:
        """Run until quiescent."""
        ...

    def take(self) -> Decisions:
        """What was decided."""
        ...

    def outcome(self) -> Outcome:
        """Where it stands."""
        ...

    def cleans_up(self) -> bool:
        """Whether ``close`` would run code of the user."""
        ...

    def close(self) -> None:
        """Drop it."""
        ...

    @property
    def next_deadline(self) -> int | None:
        """Earliest timer, microseconds."""
        ...

    @property
    def now_us(self) -> int:
        """Time of the last delivery."""
        ...

    @property
    def cancelled(self) -> CancelReason | None:
        """Why it was asked to stop."""
        ...


class ActivityRun:
    """A dispatched activity: an execution with one call and no code of its own."""

    def __init__(
        self, function: DurableFunction[Any, Any], head: Head, options: Options
    ) -> None:
        self.function = function
        self.head = head
        self.options = options
        self.pending: dict[str, Any] = {}
        self._decisions = Decisions()
        self._finished: Finished | None = None
        self._cancelled: CancelReason | None = None
        self._now = head.started_at

    @property
    def address(self) -> str:
        """Of the one call."""
        return f":{self.function.name}#root.0"

    def begin(self) -> None:
        """Issue the call."""
        call = RootCall(
            address=self.address,
            function=self.function.name,
            target=self.function,
            arguments=self.head.arguments,
            options=self.options,
        )
        self.pending[self.address] = call
        self._decisions.calls.append(call)  # type: ignore[arg-type]

    def deliver(self, delivery: Delivery, recorded: Recorded | None = None) -> None:
        """Its result ends it; a cancellation drops the call and ends it."""
        self._now = max(self._now, delivery.at)
        if isinstance(delivery, ResultDelivered):
            self.pending.pop(delivery.address, None)
            if recorded is not None and self._finished is None:
                self._finished = Finished(recorded, self._cancelled)
        elif not isinstance(delivery, ResultDelivered) and hasattr(delivery, "reason"):
            self._cancelled = self._cancelled or delivery.reason
            call = self.pending.pop(self.address, None)
            if call is not None:
                self._decisions.settled.append(call)
            if self._finished is None:
                self._finished = Finished(
                    Recorded(ok=False, payload=b""), self._cancelled
                )

    def drain(self, until: float | None = None) -> bool:
        """There is nothing to run."""
        del until
        return True

    def take(self) -> Decisions:
        """What was decided."""
        decisions, self._decisions = self._decisions, Decisions()
        return decisions

    def outcome(self) -> Outcome:
        """Where it stands."""
        return self._finished or Parked(tuple(self.pending), None)

    def cleans_up(self) -> bool:
        """It has no code."""
        return False

    def close(self) -> None:
        """Nothing to drop."""

    @property
    def next_deadline(self) -> int | None:
        """It has no timers."""
        return None

    @property
    def now_us(self) -> int:
        """Time of the last delivery."""
        return self._now

    @property
    def cancelled(self) -> CancelReason | None:
        """Why it was asked to stop."""
        return self._cancelled


@dataclass(slots=True, kw_only=True)
class RootCall:
    """The one call of a dispatched activity, as a ``DurableCall`` looks."""

    address: str
    function: str
    target: DurableFunction[Any, Any]
    arguments: bytes
    options: Options
    child: bool = False

    def cancelled(self) -> bool:
        """Never by itself."""
        return False


@dataclass(slots=True, kw_only=True, eq=False)
class Resident:
    """One owned execution.

    Attributes:
        arrived: Results to deliver with the next turn.
        cancels: (reason, inbox id) to deliver with the next turn.
        committed: Journaled deliveries that the code has not seen yet.
        decisions: Made by the code and not submitted yet.
        flushing: A turn of this execution is with the writer.
        inline: Calls that run here without a task row.
        named: Those that the last turn named.
        left_over: Known calls that edited code has not made, or not yet.
        inbox_done: Inbox rows to delete with the next turn, delivered to nobody.
        heartbeats: What attempts said under an earlier owner, by call.
        has_children: It has started executions, here or under an earlier owner.
        cleans_up: Whether closing it runs code of its user; None: not known yet.
        leaving: Its eviction is with the writer.
        suspect: Lost with its worker, and not proven harmless by a flush since.
        coming: Of each flush that inserts calls for which there was no slot, their
            highest priority.
        own_children_coming: Children in its turn that will be resident here.
        local_results: Results of own tasks that are being written.
        parked: ``wake_at`` is written: nothing runs, others may claim it then.
    """

    execution_id: UUID
    epoch: int
    head: Head
    function: DurableFunction[Any, Any]
    run: Run
    status: Status
    stored_options: bytes | None
    parent_address: str | None
    detached: bool
    queue: str
    priority: int
    deadline_us: int | None
    cancel_by_us: int | None
    position: int = 0
    cancel_asked: CancelReason | None = None
    blocked_digest: str | None = None
    code_digest: str | None = None
    restoring: Iterator[None] | None = None
    arrived: list[Arrived] = field(default_factory=list)
    cancels: list[tuple[CancelReason, int | None]] = field(default_factory=list)
    committed: deque[tuple[Delivery, Recorded | None]] = field(default_factory=deque)
    decisions: Decisions = field(default_factory=Decisions)
    inline: dict[str, Attempt] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    failed_inline: list[tuple[Attempt, Failed]] = field(default_factory=list)
    heartbeats: dict[UUID, bytes] = field(default_factory=dict)
    inbox_known: set[int] = field(default_factory=set)
    left_over: set[str] = field(default_factory=set)
    inbox_done: list[int] = field(default_factory=list)
    delivered: set[str] = field(default_factory=set)
    coming: list[int] = field(default_factory=list)
    local_results: int = 0
    flushing: bool = False
    scheduled: bool = False
    drained: bool = False
    parked: bool = False
    releasing: bool = False
    has_children: bool = False
    gone: bool = False
    idle_since: float = 0.0
    cleans_up: bool | None = None
    own_children_coming: int = 0
    leaving: bool = False
    suspect: bool = False
    timer: Any = None
    timer_us: int | None = None
    call_id: Callable[[str], UUID] = field(init=False)

    def __post_init__(self) -> None:
        self.call_id = make_call_ids(self.execution_id)

    @property
    def parent_call_id(self) -> UUID:
        """Id of the call that this execution is, within its parent."""
        if self.head.parent_id is None or self.parent_address is None:
            message = f"{self.execution_id} has no parent"
            raise ValueError(message)
        return make_call_ids(self.head.parent_id)(self.parent_address)

    @property
    def workflow(self) -> WorkflowRun | None:
        """The run, if it is a workflow's."""
        return self.run if isinstance(self.run, WorkflowRun) else None


def resident_of(
    row: Mapping[str, Any], function: DurableFunction[Any, Any], bytes_max: int
) -> Resident:
    """What was claimed, by its row of ``claim_executions``."""
    head = Head(
        execution_id=row["execution_id"],
        function=row["function"],
        arguments=row["arguments"],
        started_at=microseconds(row["started_at"]) or 0,
        seed=row["seed"],
        key_seed=row["key_seed"],
        root_id=row["root_id"],
        parent_id=row["parent_id"],
        depth=row["depth"],
        tags=tuple(row["tags"]),
    )
    return Resident(
        execution_id=row["execution_id"],
        epoch=row["epoch"],
        head=head,
        function=function,
        run=_make_run(
            function,
            head,
            row["queue"],
            row["priority"],
            row["kind"],
            bytes_max=bytes_max,
        ),
        status=Status(row["status"]),
        stored_options=row["options"],
        parent_address=row["parent_address"],
        detached=row["detached"],
        queue=row["queue"],
        priority=row["priority"],
        deadline_us=microseconds(row["deadline_at"]),
        cancel_by_us=None,
        code_digest=row["code_digest"],
        blocked_digest=row["blocked_digest"],
    )


def _make_run(
    function: DurableFunction[Any, Any],
    head: Head,
    queue: str,
    priority: int,
    kind: str | None = None,
    *,
    bytes_max: int,
) -> WorkflowRun | ActivityRun:
    if (kind or function.kind) == Kind.WORKFLOW:
        return WorkflowRun(function, head, payload_bytes_max=bytes_max)
    # The one call waits in the execution's line, and the execution's delay is over.
    options = replace(function.registered, queue=queue, priority=priority)
    return ActivityRun(function, head, options)


def resident_child(
    row: tuple[Any, ...], target: DurableFunction[Any, Any], bytes_max: int
) -> Resident:
    """A child that was inserted as ours, by its row of the flush."""
    started_at = microseconds(row[12]) or 0
    head = Head(
        execution_id=row[0],
        function=row[4],
        arguments=row[17],
        started_at=started_at,
        seed=row[14],
        key_seed=row[0],
        root_id=row[3],
        parent_id=row[1],
        depth=row[8],
        tags=tuple(row[15]),
    )
    return Resident(
        execution_id=row[0],
        epoch=1,
        head=head,
        function=target,
        run=_make_run(target, head, row[6], row[7], bytes_max=bytes_max),
        status=Status.RUNNING,
        stored_options=row[16],
        parent_address=row[2],
        detached=row[9],
        queue=row[6],
        priority=row[7],
        deadline_us=microseconds(row[13]),
        cancel_by_us=None,
    )


def microseconds(instant: dt.datetime | None) -> int | None:
    """An instant as microseconds since 1970."""
    if instant is None:
        return None
    return (instant - EPOCH) // dt.timedelta(microseconds=1)


def instant(microseconds_since: int) -> dt.datetime:
    """The inverse of ``microseconds``."""
    return EPOCH + dt.timedelta(microseconds=microseconds_since)


EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
MINUS_INFINITY = dt.datetime.min  # noqa: DTZ901 - asyncpg's name of it
"""What asyncpg sends as ``-infinity``: at once."""
CallLike = DurableCall[Any] | RootCall
