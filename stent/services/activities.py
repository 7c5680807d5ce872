"""Runs attempts of activities on this worker's slots.

Attempts are bare asyncio tasks: they are started, counted and joined here, and a task
group would cost a third of an attempt (docs/decisions/0006-bare-tasks.md).
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import inspect
import logging
import math
import os
import random as random_module
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast
from uuid import UUID

import anyio

from stent.calls import LocalFunction
from stent.codec import (
    decode,
    decode_arguments,
    encode,
    encode_arguments,
    encode_exception,
)
from stent.context import context_scope
from stent.errors import (
    ActivityFailedError,
    LeaseLostError,
    RetryLaterSignal,
    UsageError,
)
from stent.log import (
    ACTIVITY_COMPLETED,
    ACTIVITY_FAILED,
    ACTIVITY_POSTPONED,
    ACTIVITY_RETRIED,
    LogScope,
    get_logger,
    log_scope,
)
from stent.pages import ItemFailed
from stent.registry import DurableFunction, context_caller
from stent.services.attempts import (
    Attempt,
    AttemptScope,
    Committed,
    Ended,
    Failed,
    Starter,
    Stopped,
    Succeeded,
)
from stent.services.forks import EndingWithTheCode
from stent.services.heartbeats import Heartbeats
from stent.services.identity import Identity
from stent.services.lanes import Lane, Limit
from stent.services.limits import ITEM_BEGINS, ItemBegins, Limits
from stent.services.pace import Pace
from stent.services.page_items import PageItems, PageProgress
from stent.services.precedence import Precedence
from stent.services.process_frames import Call
from stent.services.processes import Events, ProcessPool
from stent.services.raised import (
    RaisedInProcess,
    as_exception,
    error_type_of,
    rebuilt,
    timeout_error,
)
from stent.services.residents import microseconds
from stent.services.threads import Threads
from stent.services.waiting_attempts import ByPriority

if TYPE_CHECKING:
    import asyncpg

log = get_logger(__name__)
_standard_log = logging.getLogger(__name__)
"""Asked whether a line is wanted at all: building one costs more than many attempts."""

HELP_PAUSE_SECONDS = 0.05
"""How often a page looks for free slots when there was none."""
LEASE_PAUSE_SECONDS = 0.05
"""How often a page looks whether the lease was renewed."""
THREADS_SECONDS_MAX = 2.0
"""How long a closing worker waits for functions in threads that were asked to stop."""
THREADS_PAUSE_SECONDS = 0.01

OnEnd = Callable[[Attempt, Ended], None]


class Transactions(Protocol):
    """Opens and settles the transactions of attempts."""

    async def open(self, attempt: Attempt) -> asyncpg.Connection:
        """Begin the attempt's transaction."""
        ...

    async def commit(self, attempt: Attempt, payload: bytes) -> bool:
        """Commit it with the result; False: it was not, and can be tried again."""
        ...

    async def roll_back(self, attempt: Attempt) -> None:
        """Undo it."""
        ...


_Waiting = tuple[Attempt, OnEnd, PageProgress | None]
_GaveWay = tuple[Attempt, asyncio.Future[None]]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What a process returned, as it is stored."""

    payload: bytes


class Activities:
    """The slots of one worker."""

    def __init__(
        self,
        identity: Identity,
        *,
        slots: int,
        transactions: Transactions,
        start: Starter,
        limits: Limits[_Waiting],
        heartbeats: Heartbeats,
    ) -> None:
        """Create the runner.

        Args:
            identity: Of the worker.
            slots: Attempts that may run at the same time.
            transactions: For transactional activities.
            start: Starts executions for activities.
            limits: What limited functions may start.
            heartbeats: Writes what attempts say of their progress.
        """
        limits.on_open = self._fill
        limits.free = lambda: self.slots - self.used
        self._limits = limits
        self._taken: dict[Attempt, tuple[Lane[_Waiting], tuple[Limit, ...]]] = {}
        self.slots = slots
        self.used = 0
        self._accepting = True
        self._leased_until = math.inf
        self._identity = identity
        self._transactions = transactions
        self._start_execution = start
        self._waiting: ByPriority[_Waiting] = ByPriority()
        self._gave_way: ByPriority[_GaveWay] = ByPriority()
        self._limited_was_last = False
        self.handing_over = False
        """The worker drains: pages begin no more items."""
        self._revision = -1
        self._running: dict[Attempt, OnEnd] = {}
        self._random = random_module.Random()  # noqa: S311 - jitter
        self.pace = Pace()
        self._heartbeats = heartbeats
        self._threads = Threads(
            on_left=self._thread_left, on_returned=self._thread_returned
        )
        settings = identity.settings
        self._process = os.getpid()
        self._pages: dict[Attempt, PageItems[_Waiting]] = {}
        self._left: dict[Attempt, int] = {}
        """Functions in threads that have outlived their attempts."""
        self.processes = ProcessPool(
            settings.process_pool_size, settings.payload_bytes_max
        )
        self.precedence = Precedence()
        self.on_free: Callable[[], None] = lambda: None

    @property
    def room(self) -> int:
        """How many more attempts may be taken on: free slots and a moment's work."""
        return self.slots - self.used + self.pace.ahead - len(self._waiting)

    @property
    def limited_may_begin(self) -> bool:
        """Whether something limited waits for nothing but a slot of the worker."""
        return self.accepting and self._limits.next_lane() is not None

    @property
    def waiting(self) -> int:
        """Claimed tasks that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> list[Attempt]:
        """Attempts that run now."""
        return list(self._running)

    def offer(
        self, attempt: Attempt, on_end: OnEnd, progress: PageProgress | None = None
    ) -> None:
        """Run an attempt as soon as there is a slot, and a process if it needs one."""
        lane = None
        if not attempt.despite_pause:
            lane = self._limits.lane(attempt.queue, attempt.function)
        if lane is not None:
            attempt.waits_since = time.monotonic()
            self._limits.offer(lane, (attempt, on_end, progress))
            self._fill()
        elif self.used < self.slots and self.accepting and self._has_pool_for(attempt):
            self._begin(attempt, on_end, progress)
        else:
            attempt.waits_since = time.monotonic()
            self._waiting.append(attempt.priority, (attempt, on_end, progress))

    def limited(self, queue: str, function: str) -> bool:
        """Whether a function in a queue has a limit: then it never runs inline."""
        return self._limits.lane(queue, function) is not None

    def only_paused(self, queue: str, function: str) -> bool:
        """Whether a function in a queue is limited by nothing but a pause."""
        lane = self._limits.lane(queue, function)
        return lane is not None and lane.only_paused

    @property
    def process_room(self) -> int:
        """How many more attempts with ``pool="process"`` would begin at once."""
        waiting = sum(1 for attempt, _, _ in self._waiting if _in_process(attempt))
        return self.processes.room - waiting

    def _has_pool_for(self, attempt: Attempt) -> bool:
        return not _in_process(attempt) or self.processes.room > 0

    def redirect(self, attempt: Attempt, on_end: OnEnd) -> None:
        """Somebody else wants to hear how a running attempt ends."""
        if attempt in self._running:
            self._running[attempt] = on_end

    def take_waiting(self) -> list[Attempt]:
        """Give back what has not begun."""
        waiting = self._waiting.take(lambda _: True)
        limited = self._limits.take_waiting(lambda _: True)
        return [attempt for attempt, _, _ in (*waiting, *limited)]

    def take_overdue(self, seconds: float) -> list[Attempt]:
        """Let others have what has waited for so long: they may be idle.

        Calls that were to run inline become tasks. What pages let pass stays: its turn
        comes with the next item. What waits for nothing but tokens would wait for them
        elsewhere.

        Returns:
            Claimed tasks, to be given back.
        """
        before, page = time.monotonic() - seconds, self.least_urgent_page
        busy = self.used >= self.slots

        def overdue(waiting: _Waiting) -> bool:
            attempt = waiting[0]
            return attempt.waits_since < before and not (
                attempt.stays
                or attempt.despite_pause
                or not isinstance(attempt.target, DurableFunction)
            )

        def passed(waiting: _Waiting) -> bool:
            return page is None or waiting[0].priority <= page

        def slotless(waiting: _Waiting) -> bool:
            lane = self._lane(waiting[0])
            return lane is None or lane.paused or not lane.rated or busy

        claimed = []
        for attempt, on_end, _ in (
            *self._waiting.take(lambda w: overdue(w) and passed(w)),
            *self._limits.give_back(lambda w: overdue(w) and slotless(w)),
        ):
            if attempt.epoch is not None:
                claimed.append(attempt)
            else:
                now = self._identity.clock.now()
                on_end(attempt, Failed(b"", now, postponed=dt.timedelta(0)))
        return claimed

    def forget(self, attempts: AbstractSet[Attempt]) -> None:
        """Drop what waits and stop what runs of these."""
        self._drop(self._waiting.take(lambda w: w[0] in attempts))
        self._drop(self._limits.take_waiting(lambda w: w[0] in attempts))
        for attempt in self.running:
            if attempt in attempts:
                attempt.stop()

    def forget_call(self, call_id: UUID) -> None:
        """Drop or stop every attempt at this call."""
        waiting = (w[0] for w in (*self._waiting, *self._limits.waiting()))
        self.forget({a for a in (*waiting, *self._running) if a.call_id == call_id})

    def _drop(self, unwanted: Iterable[_Waiting]) -> None:
        """They never begin."""
        for attempt, on_end, _ in unwanted:
            attempt.stopped = True
            on_end(attempt, Stopped())

    def set_accepting(self, accepting: bool) -> None:  # noqa: FBT001 - a switch
        """Whether attempts may begin; those that wait begin when they may again."""
        if accepting is not self._accepting:
            self._accepting = accepting
            self._fill()
            if not accepting:
                # What runs ends, the pages too.
                while self._resume_page():
                    pass

    @property
    def accepting(self) -> bool:
        """Whether an attempt may begin now."""
        return self._accepting and self.leased

    @property
    def leased(self) -> bool:
        """Whether the work is certainly still ours; asked at each beginning.

        A worker that was frozen finds out by its own clock, before anybody tells it.
        """
        return time.monotonic() < self._leased_until

    def extend_lease(self, until: float) -> None:
        """Begin nothing from ``until`` on, in seconds of ``time.monotonic()``."""
        self._leased_until = until
        if self._waiting or self._gave_way:
            self._fill()

    @property
    def payload_bytes_max(self) -> int:
        """Limit of a result."""
        return self._identity.settings.payload_bytes_max

    async def wait_until_leased(self) -> None:
        """Until the lease was renewed; who waits is cancelled when it was lost."""
        while not self.leased:  # noqa: ASYNC110 - each page looks for itself
            await asyncio.sleep(LEASE_PAUSE_SECONDS)

    def stop_all(self) -> None:
        """Cancel everything: the worker was taken over."""
        self._drop(self._waiting.take(lambda _: True))
        self._drop(self._limits.take_waiting(lambda _: True))
        for attempt in self.running:
            attempt.stop()

    def stop_waiting_pages(self) -> None:
        """Give up pages of which no item runs: where nothing begins, none will.

        What they have done is kept.
        """
        for attempt, page in list(self._pages.items()):
            if page.only_waits:
                attempt.stop()

    def stop_limited(self) -> int:
        """Cancel what runs under a limit: others may soon be granted its slot."""
        limited = [attempt for attempt in self._running if self._lane(attempt)]
        for attempt in limited:
            attempt.stop()
        return len(limited)

    def _lane(self, attempt: Attempt) -> Lane[_Waiting] | None:
        if attempt.despite_pause or not isinstance(attempt.target, DurableFunction):
            return None
        return self._limits.lane(attempt.queue, attempt.function)

    async def wait_until_idle(self) -> None:
        """Until nothing runs."""
        while self._running:
            await asyncio.wait(
                [attempt.task for attempt in self._running if attempt.task is not None]
            )
            await asyncio.sleep(0)

    def _begin(
        self, attempt: Attempt, on_end: OnEnd, progress: PageProgress | None
    ) -> None:
        self._use_slot(attempt, 1)
        lane = self._lane(attempt)
        if lane is not None and progress is None:
            self._taken[attempt] = lane, lane.take()
        attempt.started_at = self._identity.clock.now()
        self._running[attempt] = on_end
        attempt.task = asyncio.get_running_loop().create_task(
            self._run(attempt, progress), context=contextvars.Context()
        )

    def _use_slot(self, attempt: Attempt, count: int) -> None:
        self.used += count
        if _in_process(attempt):
            self.processes.used += count

    async def _run(self, attempt: Attempt, progress: PageProgress | None) -> None:
        attempt.begun = True
        if attempt.stopped or not await _marked(attempt):
            self._end(attempt, Stopped(), time.perf_counter())
            return
        if progress is None and not _in_process(attempt):
            # The items of a page have it each for themselves, and in a process it
            # counts from when the function begins.
            attempt.start_timer()
        began = time.perf_counter()
        try:
            ended = await self._attempt(attempt, progress)
        except BaseException as error:
            log.exception("activity.runner_failed", activity=attempt.function)
            ended = Failed(encode_exception(error), None)
        finally:
            attempt.stop_timer()
        self._end(attempt, ended, began)

    def _end(self, attempt: Attempt, ended: Ended, began: float) -> None:
        attempt.ended_at = self._identity.clock.now()
        on_end = self._running.pop(attempt)
        self._pages.pop(attempt, None)
        if attempt not in self._left:
            self._give_back_limits(attempt)
        self._use_slot(attempt, -1)
        self.pace.completed += 1
        if _logs_info():
            self._log(attempt, ended, began)
        on_end(attempt, Stopped() if attempt.stopped else ended)
        self._fill()

    def _fill(self) -> None:
        if self._revision != self._limits.revision:
            self._hold_what_is_limited()
        while self.used < self.slots and self.accepting:
            first = self._take_next()
            if first is None:
                if self._resume_page():
                    continue
                break
            if first is ITEM_BEGINS:
                self.used += 1
                continue
            if first[0].stopped:
                self._drop([first])
            else:
                self._begin(*first)
        if self.used < self.slots:
            self._limits.slot_is_free()
        self.on_free()

    def _take_next(self) -> _Waiting | ItemBegins | None:
        """Of what is limited and what is not the more urgent; of equals in turns."""
        lane = self._limits.next_lane()
        if lane is None:
            return self._take_first()
        turn = lane.items[0] if lane.items else lane.waiting[0][0]
        others = (
            self._waiting.highest(self._may_begin),
            self._gave_way.highest(self._may_go_on),
        )
        other = max((o for o in others if o is not None), default=None)
        self._limited_was_last = other is None or not (
            other > turn.priority or (other == turn.priority and self._limited_was_last)
        )
        if self._limited_was_last:
            return self._limits.serve(lane)
        return self._take_first()  # None: it is the turn of a page that gave way

    def _hold_what_is_limited(self) -> None:
        """Limits and pauses are of now, also for what was claimed before them."""
        self._revision = self._limits.revision
        for waiting in self._waiting.take(lambda w: self._lane(w[0]) is not None):
            lane = self._lane(waiting[0])
            if lane is not None:
                self._limits.offer(lane, waiting)

    def lane_of_page(self, attempt: Attempt) -> Lane[_Waiting] | None:
        """What limits the items of a page."""
        return self._lane(attempt)

    @property
    def limits_revision(self) -> int:
        """Another one than before: ``lane_of_page`` may have another answer."""
        return self._limits.revision

    async def begin_item(
        self, lane: Lane[_Waiting], attempt: Attempt
    ) -> tuple[Limit, ...]:
        """Wait until one more item may start; without a slot of the worker meanwhile.

        Returns:
            What ``end_item`` gives back.
        """
        if lane.open and not self._limits.anyone_waits:
            return lane.take()
        self._use_slot(attempt, -1)
        turn = self._limits.queue_item(lane, attempt.priority)
        self._fill()
        try:
            return await turn.came
        except BaseException:
            # Whoever ends the item gives a slot back, so it must have one.
            if not self._limits.leave(lane, turn):
                self.used += 1
            raise
        finally:
            # The slot was taken where its turn came, see ``_fill``.
            if _in_process(attempt):
                self.processes.used += 1

    def end_item(self, lane: Lane[_Waiting], taken: tuple[Limit, ...]) -> None:
        """The item has ended."""
        self._limits.end(lane, taken)
        self._fill()

    def _give_back_limits(self, attempt: Attempt) -> None:
        taken = self._taken.pop(attempt, None)
        if taken is not None:
            self._limits.end(*taken)

    def _take_first(self) -> _Waiting | None:
        """The first that may begin: others are not held up by who needs a process."""
        if self._gave_way:
            highest = self._waiting.highest(self._may_begin)
            page = self._gave_way.highest(self._may_go_on)
            if page is not None and (highest is None or page >= highest):
                return None
        return self._waiting.pop(self._may_begin)

    def _may_begin(self, waiting: _Waiting) -> bool:
        return self._has_pool_for(waiting[0])

    # Pages let the more urgent pass.

    @property
    def least_urgent_page(self) -> int | None:
        """Priority of the page that would give way first; None: no page runs items."""
        running = (a.priority for a, page in self._pages.items() if page.busy)
        return min(running, default=None)

    def room_above(self, priority: int) -> int:
        """How many more tasks may be fetched that pages of a priority let pass."""
        pages = sum(
            attempt.priority <= priority and page.busy > 0
            for attempt, page in self._pages.items()
        )
        return pages - self._waiting.count_above(priority)

    def has_to_give_way(self, attempt: Attempt) -> bool:
        """Whether something more urgent waits for the slot of a page."""
        if self.used != self.slots or not self._waiting or not self.accepting:
            return False  # with more in use, by threads left over, none would be free
        highest = self._waiting.highest(self._may_begin)
        return highest is not None and highest > attempt.priority

    async def give_way(self, attempt: Attempt) -> None:
        """Let the more urgent have the slot between two items of a page."""
        turn: _GaveWay = attempt, asyncio.get_running_loop().create_future()
        self._gave_way.append(attempt.priority, turn)
        self._use_slot(attempt, -1)
        self._fill()
        try:
            await turn[1]
        finally:
            if self._gave_way.take(lambda one: one is turn):
                # Whoever is cancelled here gives a slot back, so it must have one.
                self._use_slot(attempt, 1)

    def resume_all_of(self, attempt: Attempt) -> None:
        """Let end what gave way of a page, without waiting for a slot to do nothing."""
        if self._gave_way:
            for turn in self._gave_way.take(lambda turn: turn[0] is attempt):
                self._resume(turn)

    def _resume_page(self) -> bool:
        """Give a slot to the most urgent page that waits, the first of equals."""
        turn = self._gave_way.pop(self._may_go_on)
        if turn is None:
            return False
        self._resume(turn)
        return True

    def _resume(self, turn: _GaveWay) -> None:
        attempt, future = turn
        self._use_slot(attempt, 1)
        if not future.done():
            future.set_result(None)

    def _may_go_on(self, turn: _GaveWay) -> bool:
        return not self.accepting or self._has_pool_for(turn[0])

    def _thread_left(self, attempt: Attempt) -> None:
        """Its attempt ends, the function does not: it keeps a slot, and its limits."""
        self.used += 1
        self._left[attempt] = self._left.get(attempt, 0) + 1

    def _thread_returned(self, attempt: Attempt) -> None:
        self.used -= 1
        self._left[attempt] -= 1
        if self._left[attempt] == 0:
            del self._left[attempt]
            if attempt not in self._running:
                self._give_back_limits(attempt)
        self._fill()

    async def close(self) -> None:
        """Leave no process behind; let threads that were asked to stop do so."""
        await self.processes.close()
        with anyio.move_on_after(THREADS_SECONDS_MAX):
            while self._left:  # noqa: ASYNC110 - counted by their callbacks
                await asyncio.sleep(THREADS_PAUSE_SECONDS)
        self._threads.close()

    def _enter_scope(self, attempt: Attempt) -> AttemptScope:
        """Make what the running task calls belong to ``attempt``."""
        scope = AttemptScope(
            attempt,
            now=self._identity.clock.now,
            start=self._start_execution,
            open_transaction=self._transactions.open,
            note_heartbeat=self._heartbeats.note,
        )
        _set_scope(scope)
        return scope

    async def _attempt(self, attempt: Attempt, progress: PageProgress | None) -> Ended:
        """Run the code; whatever it raises is an outcome, never the worker's end."""
        scope = self._enter_scope(attempt)
        log_scope.set(
            LogScope(
                execution_id=attempt.execution_id,
                activity=attempt.function,
                attempt=attempt.number,
            )
        )
        try:
            if not self.leased:
                # Frozen between being begun and its first step.
                await self.wait_until_leased()
            with EndingWithTheCode(self._process):
                value = await self._call(attempt, scope, progress)
            if attempt.timed_out:
                return await self._failed(attempt, timeout_error(attempt))
            payload = b""
            if isinstance(value, _Encoded):
                payload = value.payload
            elif progress is None:
                bytes_max = self._identity.settings.payload_bytes_max
                payload = encode(value, path="result", bytes_max=bytes_max)
        except asyncio.CancelledError as error:
            if attempt.timed_out:
                return await self._failed(attempt, timeout_error(attempt))
            return await self._failed(attempt, error)
        except RetryLaterSignal as later:
            delay = dt.timedelta(seconds=later.delay_seconds)
            return await self._postpone(attempt, delay)
        except RaisedInProcess as raised:
            return await self._failed(attempt, raised.error, raised.payload)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: the code's outcome
            return await self._failed(attempt, error)
        if attempt.last_beats is not None:
            self._heartbeats.forget(attempt)
        if attempt.connection is None:
            return Succeeded(payload)
        return await self._commit(attempt, payload)

    async def _commit(self, attempt: Attempt, payload: bytes) -> Ended:
        attempt.settling = True
        try:
            if await self._transactions.commit(attempt, payload):
                return Committed(payload)
        except LeaseLostError:
            return Stopped()
        except Exception as error:  # noqa: BLE001 - such as a deferred constraint
            return await self._failed(attempt, error)
        lost = ConnectionError("the transaction was not committed: try again")
        return Failed(encode_exception(lost), self._identity.clock.now())

    async def _failed(
        self, attempt: Attempt, error: BaseException, payload: bytes | None = None
    ) -> Ended:
        attempt.settling = True
        if attempt.connection is not None:
            await self._transactions.roll_back(attempt)
        if attempt.stopped:
            return Stopped()
        retry_at = self._retry_at(attempt, error)
        if retry_at is not None:
            await self.write_last_heartbeats(attempt)
        return Failed(payload or encode_exception(error), retry_at)

    async def _postpone(self, attempt: Attempt, delay: dt.timedelta) -> Ended:
        attempt.settling = True
        if attempt.connection is not None:
            await self._transactions.roll_back(attempt)
        if attempt.stopped:
            return Stopped()
        if isinstance(attempt.target, LocalFunction):
            error = UsageError("retry_later() works in activities, not in stent.run")
            return Failed(encode_exception(error), None)
        await self.write_last_heartbeats(attempt)
        return Failed(b"", self._identity.clock.now() + delay, postponed=delay)

    def close_bucket(self, attempt: Attempt, delay: dt.timedelta) -> list[str]:
        """Start nothing of its limits for ``delay``; returns their names."""
        return self._limits.close(attempt.queue, attempt.function, delay)

    def _retry_at(self, attempt: Attempt, error: BaseException) -> dt.datetime | None:
        if isinstance(attempt.target, LocalFunction):
            return None
        policy = attempt.options.retry
        if not policy.retries(error, attempt.number):
            return None
        return self._identity.clock.now() + policy.delay(attempt.number, self._random)

    async def _call(
        self, attempt: Attempt, scope: AttemptScope, progress: PageProgress | None
    ) -> object:
        target = attempt.target
        if isinstance(target, LocalFunction):
            return await self._invoke(target.function, target.args, target.kwargs)
        if progress is not None:
            await self._run_page(attempt, scope, target, progress)
            return None
        if target.in_process:
            return await self._run_in_process(
                target, attempt.arguments, scope, attempt.start_timer
            )
        args, kwargs = decode_arguments(attempt.arguments, target.function)
        if target.is_async:
            return await target.function(*args, **kwargs)
        return await self._invoke(target.function, args, kwargs)

    async def _invoke(
        self, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> object:
        """Call something that may be a plain function: then in a thread."""
        if inspect.iscoroutinefunction(inspect.unwrap(function)):
            return await function(*args, **kwargs)
        scope, cancelled = cast("AttemptScope", context_scope.get()).for_thread()
        context = contextvars.copy_context()
        context.run(_set_scope, scope)
        value = await self._threads.run(
            lambda: context.run(_call_in_thread, function, args, kwargs),
            cancelled,
            scope.attempt,
        )
        return await value if inspect.isawaitable(value) else value

    async def _run_in_process(
        self,
        function: DurableFunction[Any, Any],
        arguments: bytes,
        scope: AttemptScope,
        on_started: Callable[[], None],
    ) -> _Encoded:
        """Run a function in a process of the pool; cancelling kills the process.

        Raises:
            ProcessLostError: The process ended before the function did.
            RaisedInProcess: What the function raised.
        """
        current = scope.current()
        call = Call(
            module=function.function.__module__,
            function=function.name,
            arguments=arguments,
            now=(self._identity.clock.timestamp(), time.monotonic()),
            key=scope.idempotency_key(),
            execution_id=current.execution_id,
            root_id=current.root_id,
            parent_id=current.parent_id,
            attempt=current.attempt,
            address=current.address,
            tags=current.tags,
            heartbeat=current.heartbeat_payload,
        )
        events = Events(on_started, scope.keep_told, scope.keep_heartbeat)
        ended = await self.processes.run(call, events)
        if ended.retry_later_seconds is not None:
            raise RetryLaterSignal(ended.retry_later_seconds)
        if ended.ok:
            return _Encoded(ended.payload)
        raise RaisedInProcess(rebuilt(ended.payload), ended.payload)

    async def _run_page(
        self,
        attempt: Attempt,
        scope: AttemptScope,
        function: DurableFunction[Any, Any],
        progress: PageProgress,
    ) -> None:
        """Run the items of a page on as many free slots as there are."""
        page = self._pages[attempt] = PageItems(self, attempt, function, progress)
        helpers_max = page.share - 1
        helpers: list[asyncio.Task[None]] = []

        def help_out() -> None:
            """Others join once the first one waits for something."""
            wanted = min(max(1, len(helpers)), page.left, helpers_max - len(helpers))
            if not page.more or wanted == 0:
                return
            if page.queued:
                # More of them would only wait, too.
                loop.call_later(HELP_PAUSE_SECONDS, help_out)
                return
            free = self.slots - self.used if self.accepting else 0
            if function.in_process:
                free = min(free, self.processes.room)
            for _ in range(min(wanted, free)):
                self._use_slot(attempt, 1)
                helper = loop.create_task(self._help(page, attempt))
                helper.add_done_callback(helped)
                helpers.append(helper)
            loop.call_later(0 if free > 0 else HELP_PAUSE_SECONDS, help_out)

        def helped(helper: asyncio.Task[None]) -> None:
            """Also called for one that was cancelled before its first step."""
            self._use_slot(attempt, -1)
            failure: BaseException | None = None
            if not helper.cancelled():
                failure = helper.exception()
            elif page.more and not attempt.stopped:
                failure = ActivityFailedError("an item cancelled the task it runs in")
            if failure is not None and page.failure is None:
                page.failure = failure
                if attempt.task is not None and not attempt.stopped:
                    attempt.task.cancel("an item of the page failed")
            self._fill()

        loop = asyncio.get_running_loop()
        loop.call_soon(help_out)
        try:
            await page.work(scope)
            while helpers:
                await asyncio.wait([helpers[-1]])
                helpers.pop()
            if page.failure is not None:
                raise page.failure from page.failure.__cause__
        except BaseException:
            page.more = False
            for helper in helpers:
                helper.cancel()
            if page.failure is None or attempt.stopped:
                raise
            if attempt.task is not None and attempt.task.cancelling():
                attempt.task.uncancel()
            raise page.failure from page.failure.__cause__

    async def _help(self, page: PageItems[_Waiting], attempt: Attempt) -> None:
        await page.work(self._enter_scope(attempt))

    def postponed_item(self, attempt: Attempt, later: RetryLaterSignal) -> ItemFailed:
        """What becomes of an item that asked to be tried later; it is no failure."""
        delay = dt.timedelta(seconds=later.delay_seconds)
        self.close_bucket(attempt, delay)
        retry_at_us = microseconds(self._identity.clock.now() + delay) or 0
        return ItemFailed(attempt.number - 1, retry_at_us, b"")

    def failed_item(self, attempt: Attempt, error: BaseException) -> ItemFailed | None:
        """What becomes of an item whose first attempt failed; None: no more."""
        retry_at = self._retry_at(attempt, error)
        if retry_at is None:
            return None
        retry_at_us = microseconds(retry_at) or 0
        return ItemFailed(attempt.number, retry_at_us, encode_exception(error))

    async def invoke_item(
        self, function: DurableFunction[Any, Any], args: Any
    ) -> object:
        """One item of a page, in this process."""
        if function.is_async:
            return await function.function(*args)
        return await self._invoke(function.function, args, {})

    async def process_item(
        self,
        function: DurableFunction[Any, Any],
        args: Any,
        scope: AttemptScope,
        on_started: Callable[[], None],
    ) -> object:
        """One item of a page, in a process."""
        bytes_max = self._identity.settings.payload_bytes_max
        arguments = encode_arguments(tuple(args), {}, bytes_max=bytes_max)
        try:
            encoded = await self._run_in_process(function, arguments, scope, on_started)
        except RaisedInProcess as raised:
            raise raised.error from raised.error.__cause__
        return decode(encoded.payload, function.return_annotation)

    def forget_heartbeat(self, scope: AttemptScope) -> None:
        """An item is done: what it last said need not be written."""
        self._heartbeats.forget(scope.attempt, scope.beat_key)

    async def write_last_heartbeats(self, attempt: Attempt) -> None:
        """Before the next attempt at what it runs can begin."""
        if attempt.last_beats is not None:
            await self._heartbeats.write_last(attempt)

    def _log(self, attempt: Attempt, ended: Ended, began: float) -> None:
        facts: dict[str, Any] = {
            "execution_id": str(attempt.execution_id),
            "activity": attempt.function,
            "attempt": attempt.number,
            "duration_ms": round((time.perf_counter() - began) * 1000, 3),
        }
        match ended:
            case Failed(payload=payload, retry_at=None):
                log.warning(ACTIVITY_FAILED, **facts, error_type=error_type_of(payload))
            case Failed(payload=payload, postponed=None):
                log.info(ACTIVITY_RETRIED, **facts, error_type=error_type_of(payload))
            case Failed(postponed=dt.timedelta() as delay):
                facts["delay_ms"] = round(delay.total_seconds() * 1000)
                log.info(ACTIVITY_POSTPONED, **facts)
            case Succeeded() | Committed():
                log.info(ACTIVITY_COMPLETED, **facts)
            case Stopped():
                return


def _in_process(attempt: Attempt) -> bool:
    target = attempt.target
    return isinstance(target, DurableFunction) and target.in_process


async def _marked(attempt: Attempt) -> bool:
    """Whether it may go on: it is marked, if it has to be, and was not stopped."""
    if attempt.mark is None:
        return True
    try:
        await attempt.mark()
    except asyncio.CancelledError:
        if not attempt.stopped:
            raise
    return not attempt.stopped


def _set_scope(scope: AttemptScope) -> None:
    """In the context that is current, make what is called belong to ``scope``."""
    context_caller.set(cast("Any", scope))
    context_scope.set(cast("Any", scope))


def _call_in_thread(
    function: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object]
) -> object:
    try:
        with EndingWithTheCode(os.getpid()):
            return function(*args, **kwargs)
    except GeneratorExit as error:
        # Thrown into a coroutine it would close it instead of being raised there.
        raise as_exception(error) from error


def _logs_info() -> bool:
    return _standard_log.isEnabledFor(logging.INFO)
