"""One attempt of an activity: what runs, where the code stands, how it ended."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from stent.calls import LocalFunction
from stent.clock import child_execution_id
from stent.codec import encode
from stent.context import HEARTBEAT_BYTES_MAX, Current
from stent.errors import UsageError
from stent.model import Kind
from stent.registry import DurableFunction
from stent.services.activity_code import ActivityCode
from stent.services.identity import make_call_ids
from stent.services.options import AttemptOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

Starter = Callable[
    [DurableFunction[Any, Any], Sequence[object], Mapping[str, object], UUID],
    Awaitable[Any],
]
"""Starts a root execution under a given id; returns its handle."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """It returned; the payload is its encoded value."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """It raised, or ran out of time.

    Attributes:
        payload: The encoded exception.
        retry_at: Database time of the next attempt; None: out of attempts.
        postponed: It asked to be made again after this long: it does not count.
    """

    payload: bytes
    retry_at: dt.datetime | None
    postponed: dt.timedelta | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """Nobody wants its outcome any more."""


@dataclass(frozen=True, slots=True)
class Committed:
    """It committed its result itself, in its own transaction."""

    payload: bytes


Ended = Succeeded | Failed | Stopped | Committed


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """A call that a worker runs, or is about to.

    Attributes:
        target: What is called.
        number: Of the attempt, from 1.
        epoch: Of its task; None when it runs inline.
        row_pending: It was inline; the row of its task is with the writer.
        mark: Says in the database that it begins; awaited before anything of it runs.
        begun: Its first step was made. A task that is cancelled earlier never runs, so
            it could not give its slot back.
        settling: Its transaction is being committed or rolled back, which must end
            either way: it is not cancelled any more.
        despite_pause: It cleans up after a cancellation: no pause holds it.
        on_settled: Called when the task is not ours any more, its outcome committed.
        told: (address, payload) of ``tell``, written with the outcome.
        timer: Ends it when its time is over.
        stays: It is not given back, however long it waits for a slot.
        waits_since: ``time.monotonic()`` when it was found that it has to wait.
        earlier_beats: What attempts before this one gave to ``heartbeat``, by the call
            ids of the call and of items.
        last_beats: What this one gave.
    """

    execution_id: UUID
    call_id: UUID
    address: str
    target: DurableFunction[Any, Any] | LocalFunction
    arguments: bytes
    options: AttemptOptions
    stored_options: bytes | None
    number: int
    epoch: int | None
    key_seed: UUID
    root_id: UUID
    parent_id: UUID | None
    tags: tuple[str, ...]
    queue: str = "default"
    priority: int = 0
    started_at: dt.datetime | None = None
    ended_at: dt.datetime | None = None
    task: asyncio.Task[None] | None = None
    stopped: bool = False
    timed_out: bool = False
    begun: bool = False
    settling: bool = False
    row_pending: bool = False
    told: list[tuple[str, bytes]] = field(default_factory=list)
    connection: asyncpg.Connection | None = None
    despite_pause: bool = False
    on_settled: Callable[[Attempt], None] | None = None
    timer: asyncio.TimerHandle | None = None
    waits_since: float = 0.0
    stays: bool = False
    mark: Callable[[], Awaitable[None]] | None = None
    earlier_beats: dict[UUID, bytes] | None = None
    last_beats: dict[UUID, bytes] | None = None

    @property
    def function(self) -> str:
        """Name of what is called."""
        if isinstance(self.target, DurableFunction):
            return self.target.name
        return getattr(self.target.function, "__qualname__", "local function")

    @property
    def row(self) -> tuple[UUID, UUID, int]:
        """Execution, call and epoch of its task."""
        return self.execution_id, self.call_id, self.epoch or 0

    def tell_settled(self) -> None:
        """Its task is not ours any more."""
        if self.on_settled is not None:
            self.on_settled(self)

    def stop(self) -> None:
        """Cancel it; its outcome is not wanted."""
        self.stopped = True
        if self.task is not None and self.begun and not self.settling:
            self.task.cancel("the call was cancelled")

    def start_timer(self) -> None:
        """Its time counts from now."""
        if self.options.timeout is not None:
            self.timer = asyncio.get_running_loop().call_later(
                self.options.timeout.total_seconds(), self.expire
            )

    def stop_timer(self) -> None:
        """It has ended."""
        if self.timer is not None:
            self.timer.cancel()

    def expire(self) -> None:
        """Its time is over."""
        if self.task is None or self.task.done() or self.stopped or self.settling:
            return
        self.timed_out = True
        self.task.cancel("the attempt timed out")


class AttemptScope(ActivityCode):
    """What an activity's code may call; see ``context.Scope``."""

    def __init__(
        self,
        attempt: Attempt,
        *,
        now: Callable[[], dt.datetime],
        start: Starter,
        open_transaction: Callable[[Attempt], Awaitable[asyncpg.Connection]],
        note_heartbeat: Callable[[Attempt, UUID, bytes], None],
    ) -> None:
        self.attempt = attempt
        self.item: int | None = None
        """Index within a page of a map."""
        self._now = now
        self._start = start
        self._open_transaction = open_transaction
        self._note_heartbeat = note_heartbeat
        self._thread_cancelled: threading.Event | None = None
        self._opening = asyncio.Lock()
        self._started = 0

    def begin_item(self, item: int) -> None:
        """What is called from now on belongs to an item of a page."""
        self.item, self._started = item, 0

    def start(
        self,
        function: DurableFunction[Any, Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, Any]:
        """Start a new root execution, the same one on every attempt."""
        self._started += 1
        key = f"{self.idempotency_key()}:{function.name}:{self._started}"
        execution_id = child_execution_id(self.attempt.execution_id, key)
        return _awaited(self._start(function, args, kwargs, execution_id))

    async def sleep(self, duration: dt.timedelta) -> None:
        """An activity waits with asyncio."""
        del duration
        self._refuse("calls stent.sleep; use asyncio.sleep, or")

    def now(self) -> dt.datetime:
        """Database time."""
        return self._now()

    async def run(
        self,
        function: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Any:
        """An activity runs things directly."""
        del function, args, kwargs
        self._refuse("calls stent.run; call the function directly, or")

    def tell(self, value: object) -> None:
        """Keep a value until the outcome is written."""
        self.keep_told(encode(value, path="told value"))

    def keep_told(self, payload: bytes) -> None:
        """The same with an encoded value."""
        number = len(self.attempt.told) + 1
        address = f"{self._address()}!{self.attempt.number}.{number}"
        self.attempt.told.append((address, payload))

    def current(self) -> Current:
        """This attempt."""
        attempt = self.attempt
        parent = attempt.parent_id
        return Current(
            execution_id=str(attempt.execution_id),
            root_id=str(attempt.root_id),
            parent_id=None if parent is None else str(parent),
            function=attempt.function,
            kind=Kind.ACTIVITY,
            attempt=attempt.number,
            address=self._address(),
            tags=attempt.tags,
            cancelled=self.cancelled,
            heartbeat_payload=self.earlier_beat,
        )

    def for_thread(self) -> tuple[AttemptScope, threading.Event]:
        """A scope for a function in a thread, which may outlive its attempt.

        Returns:
            The scope, which stays with its item of a map, and what tells the function
            that nobody waits for it any more.
        """
        scope, cancelled = copy.copy(self), threading.Event()
        scope._thread_cancelled = cancelled  # noqa: SLF001 - of the same class
        return scope, cancelled

    @property
    def cancelled(self) -> bool:
        """Whether its code should come to an end."""
        attempt, thread = self.attempt, self._thread_cancelled
        return (
            attempt.stopped
            or attempt.timed_out
            or (thread is not None and thread.is_set())
        )

    @property
    def earlier_beat(self) -> bytes | None:
        """Details of the attempt before."""
        earlier = self.attempt.earlier_beats
        return None if earlier is None else earlier.get(self.beat_key)

    @property
    def beat_key(self) -> UUID:
        """Call id of what runs: an item that fails becomes a call of that id."""
        attempt = self.attempt
        if self.item is None:
            return attempt.call_id
        return make_call_ids(attempt.execution_id)(self._address())

    def heartbeat(self, details: object) -> None:
        """Keep the latest details; they are written a moment later."""
        self.raise_if_cancelled(None)
        bytes_max = HEARTBEAT_BYTES_MAX
        payload = encode(details, path="heartbeat details", bytes_max=bytes_max)
        self.keep_heartbeat(payload)

    def keep_heartbeat(self, payload: bytes) -> None:
        """The same with encoded details."""
        self._note_heartbeat(self.attempt, self.beat_key, payload)

    def raise_if_cancelled(self, wait: dt.timedelta | None) -> None:
        """Raise in a thread what a coroutine would get at its next await.

        Raises:
            asyncio.CancelledError: It was asked to stop.
            UsageError: It would block the loop.
        """
        if wait is not None:
            if self._thread_cancelled is None:
                message = (
                    f"the activity {self.attempt.function} would block the worker with "
                    "raise_if_cancelled(wait=...): use asyncio.sleep, which ends early "
                    "by itself"
                )
                raise UsageError(message)
            self._thread_cancelled.wait(wait.total_seconds())
        if self.cancelled:
            raise asyncio.CancelledError(
                "the attempt timed out"
                if self.attempt.timed_out
                else "the call was cancelled"
            )

    def idempotency_key(self) -> str:
        """A digest of the execution's key seed and the call's address."""
        key = child_execution_id(self.attempt.key_seed, self._address())
        return key.hex

    def transaction(self) -> AbstractAsyncContextManager[asyncpg.Connection]:
        """The attempt's one transaction; opened at the first use."""
        return self._transaction()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[asyncpg.Connection]:
        async with self._opening:
            if self.attempt.connection is None:
                self.attempt.connection = await self._open_transaction(self.attempt)
        yield self.attempt.connection

    def _address(self) -> str:
        if self.item is None:
            return self.attempt.address
        return f"{self.attempt.address}/{self.item}"

    def _refuse(self, what: str) -> NoReturn:
        message = (
            f"the activity {self.attempt.function} {what}: durable calls belong into a "
            'workflow; say @durable(kind="workflow") if this function is one'
        )
        raise UsageError(message)


async def _awaited(started: Awaitable[Any]) -> Any:
    return await started
