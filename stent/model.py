"""Frozen records and closed sets shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from typing import Literal, NewType
from uuid import UUID

ExecutionId = NewType("ExecutionId", UUID)
TaskId = NewType("TaskId", UUID)
WorkerId = NewType("WorkerId", UUID)

DEPTH_MAX = 64


class Kind(StrEnum):
    """What a durable function is."""

    WORKFLOW = "workflow"
    ACTIVITY = "activity"


class Status(StrEnum):
    """Where an execution stands; docs/explanation/states.md draws the arrows."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    BLOCKED = "blocked"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    @property
    def terminal(self) -> bool:
        """True when the status can never change again."""
        return self in TERMINAL


TERMINAL = frozenset(
    {Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT}
)


class Effects(StrEnum):
    """What stent promises about an activity's effects (promise P2)."""

    AT_LEAST_ONCE = "at_least_once"
    TRANSACTIONAL = "transactional"


class Order(StrEnum):
    """What an operator asks of a living worker."""

    DRAIN = "drain"
    """Claim nothing more, hand over what waits, finish what runs, end."""
    STOP = "stop"
    """The same without waiting for what runs."""


class Pool(StrEnum):
    """Where the attempts of a plain function run."""

    THREAD = "thread"
    PROCESS = "process"


class Keep(Enum):
    """Stands for a value that is not given, where None means something else."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


KEEP = Keep.KEEP
"""Of ``Stent.set_limit``: as it is."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A committed result: ``payload`` is a value, or an exception if not ``ok``.

    Attributes:
        took_us: How long its last attempt took, microseconds, if that is known.
    """

    ok: bool
    payload: bytes
    took_us: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionTimes:
    """Instants of an execution in database time; None means not yet, or never."""

    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    wake_at: datetime | None = None
    deadline_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionState:
    """One execution as an inspector sees it.

    Attributes:
        id: The execution's id.
        function: Name of the durable function.
        status: See ``Status``; ``state`` is the same.
        attempts: Attempts made so far by an activity, turns by a workflow.
        waiting_for: Why it is not done, in words; empty once it is.
        result: The value of a completed execution, decoded for display.
        error: ``ClassName: message`` of a failed one.
        traceback: Where that was raised, and from what, as text.
        tags: As given at dispatch.
    """

    id: str
    function: str
    status: Status
    attempts: int
    waiting_for: tuple[str, ...]
    result: object
    error: str | None
    tags: tuple[str, ...]
    times: ExecutionTimes
    kind: Kind
    queue: str
    priority: int
    parent_id: str | None = None
    root_id: str | None = None
    worker_id: str | None = None
    children: tuple[str, ...] = field(default=())
    traceback: str | None = None

    @property
    def state(self) -> Status:
        """The same as ``status``."""
        return self.status


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker as the database knows it: as of its last renewal of the lease.

    Attributes:
        id: Fresh per worker, never reused.
        state: ``running``, ``draining``, ``stopped`` or ``lost``.
        alive: Whether it runs or drains, and its lease holds.
        host: Name of its machine.
        pid: Of its process on that machine.
        version: Of stent; empty for versions that did not say.
        app_version: Of the program, as ``Settings.app_version`` has it.
        slots: Attempts it runs at most at the same time.
        running: Slots in use: attempts that run, and items of maps.
        residents: Executions that it owns.
        lag: By how much its event loop was late, at worst since the renewal before.
        lease_left: Until others may take its work if they do not hear of it.
        queues: That it serves.
        functions: Durable names that it can run; None if it did not say.
        asked: What an operator asked of it, if anything.
        started_at: Database time.
        renewed_at: Database time of the last renewal.
    """

    id: str
    state: str
    alive: bool
    host: str
    pid: int
    version: str
    app_version: str
    slots: int
    running: int
    residents: int
    lag: timedelta
    lease_left: timedelta
    queues: tuple[str, ...]
    functions: tuple[str, ...] | None
    asked: Order | None
    started_at: datetime
    renewed_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHealth:
    """One worker of this process, as it is now, without asking the database.

    Attributes:
        id: Of the worker.
        pid: Of its process.
        state: ``starting``, ``running``, ``draining`` or ``stopped``.
        live: Its event loop turns, and its lease is renewed or the database is away.
        ready: It claims: not starting, not draining, not cut off, not blocked.
        running: Slots in use: attempts that run, and items of maps.
        slots: Attempts it runs at most at the same time.
        residents: Executions that it owns.
        lag: By how much its event loop is late.
        lease_left: Until others may take its work if they do not hear of it.
    """

    id: str
    pid: int
    state: str
    live: bool
    ready: bool
    running: int
    slots: int
    residents: int
    lag: timedelta
    lease_left: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How the workers of one app are.

    Attributes:
        live: No worker is stuck; who is not live should be ended and started again.
        ready: There are workers, and all of them claim.
        workers: Each by itself.
    """

    live: bool
    ready: bool
    workers: tuple[WorkerHealth, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened to an execution, as ``history`` shows it.

    Attributes:
        position: From 0, in the order in which the execution saw things.
        kind: ``execution.started``, ``call.issued``, ``result.delivered``,
            ``time.advanced``, ``cancel.delivered``, ``attempt.failed``, ``told``,
            ``attempt.lost`` and ``worker.lost`` (with the worker that held the call,
            begun or not, or the execution) ...
        at: Database time.
        address: The call concerned, if any.
        detail: Readable facts; payloads as plain JSON-like values.
    """

    position: int
    kind: str
    at: datetime
    address: str | None = None
    detail: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDepth:
    """How much waits and runs in one queue for one function; every number is a count.

    Attributes:
        queue: Its name.
        function: Name of the durable function.
        kind: ``task`` counts activities and pages of maps that workflows have called,
            ``execution`` workflows and activities that were dispatched.
        ready: Could be claimed now; what a lost worker held is among them.
        scheduled: Will be ready later: retries, delays, sleeping executions that no
            worker has in memory.
        running: Held by a live worker; an execution, while something happens in it.
        waiting: Executions in the memory of a live worker that wait for something.
        oldest_ready: For how long the oldest ready one has been ready; None when
            nothing is.
        capped: Counting stopped at the limit: there are at least as many.
    """

    queue: str
    function: str
    kind: Literal["task", "execution"]
    ready: int
    scheduled: int
    running: int
    waiting: int
    oldest_ready: timedelta | None
    capped: bool
