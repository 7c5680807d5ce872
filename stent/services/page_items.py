"""The items of a page of a map: taken one by one, by as many as help."""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import anyio

from stent.codec import decode_many, encode
from stent.errors import ActivityFailedError, PayloadError, RetryLaterSignal
from stent.pages import ItemFailed
from stent.registry import DurableFunction
from stent.services.attempts import Attempt, AttemptScope
from stent.services.lanes import Lane, Limit
from stent.services.raised import as_exception, timeout_error, was_asked_to_stop

W = TypeVar("W")

YIELD_SECONDS = 0.005
"""How long items of a page may run without letting others run."""


class PageProgress(Protocol):
    """Takes the outcomes of a page's items as they come."""

    def done_already(self) -> set[int]:
        """Items that need not run."""
        ...

    def add(self, index: int, payload: bytes) -> None:
        """An item is done."""
        ...


class ItemRunner(Protocol[W]):
    """What the items of a page need of the worker that runs them."""

    @property
    def leased(self) -> bool:
        """See ``Activities``."""
        ...

    @property
    def payload_bytes_max(self) -> int:
        """Limit of each result."""
        ...

    async def wait_until_leased(self) -> None:
        """Until the lease was renewed; who waits is cancelled when it was lost."""
        ...

    def has_to_give_way(self, attempt: Attempt) -> bool:
        """Whether something more urgent waits for the slot of the page."""
        ...

    async def give_way(self, attempt: Attempt) -> None:
        """Let it have the slot."""
        ...

    def resume_all_of(self, attempt: Attempt) -> None:
        """Nothing is left for those of the page that gave way."""
        ...

    def lane_of_page(self, attempt: Attempt) -> Lane[W] | None:
        """What limits the items of a page."""
        ...

    @property
    def handing_over(self) -> bool:
        """The worker drains: no more items begin, others run them."""
        ...

    @property
    def limits_revision(self) -> int:
        """Another one than before: ``lane_of_page`` may have another answer."""
        ...

    async def begin_item(self, lane: Lane[W], attempt: Attempt) -> tuple[Limit, ...]:
        """Wait until one more item may start; what ``end_item`` gives back."""
        ...

    def end_item(self, lane: Lane[W], taken: tuple[Limit, ...]) -> None:
        """The item has ended."""
        ...

    async def invoke_item(
        self, function: DurableFunction[Any, Any], args: Any
    ) -> object:
        """Run one item in this process."""
        ...

    async def process_item(
        self,
        function: DurableFunction[Any, Any],
        args: Any,
        scope: AttemptScope,
        on_started: Callable[[], None],
    ) -> object:
        """Run one item in a process of the pool."""
        ...

    def postponed_item(self, attempt: Attempt, later: RetryLaterSignal) -> ItemFailed:
        """What becomes of an item that asked to be tried later."""
        ...

    def failed_item(self, attempt: Attempt, error: BaseException) -> ItemFailed | None:
        """What becomes of an item whose first attempt failed; None: no more."""
        ...

    def forget_heartbeat(self, scope: AttemptScope) -> None:
        """An item is done: what it last said need not be written."""
        ...

    async def write_last_heartbeats(self, attempt: Attempt) -> None:
        """Before the next attempt at what it runs can begin."""
        ...


class PageItems(Generic[W]):
    """The items of one page that have not been taken."""

    def __init__(
        self,
        runner: ItemRunner[W],
        attempt: Attempt,
        function: DurableFunction[Any, Any],
        progress: PageProgress,
    ) -> None:
        form = attempt.options.page
        if form is None:
            message = "a page task without its form"
            raise PayloadError(message)
        self._form = form
        items = decode_many(attempt.arguments)
        done = progress.done_already()
        self._left = deque(
            (index, item) for index, item in enumerate(items) if index not in done
        )
        self.more = True
        self.failure: BaseException | None = None
        self._runner = runner
        self._attempt = attempt
        self._function = function
        self._progress = progress
        self._waiting = self.busy = 0
        """``busy``: items that run now."""
        self._process = os.getpid()
        self._lane: Lane[W] | None = None
        self._revision = -1

    @property
    def left(self) -> int:
        """Items that nobody has taken."""
        return len(self._left)

    @property
    def queued(self) -> int:
        """Items that wait for a limit."""
        return 0 if self._lane is None else len(self._lane.items)

    @property
    def only_waits(self) -> bool:
        """Whether none of its items runs: all wait for a limit, or are for others."""
        return self._waiting > 0 and self.busy == 0

    @property
    def share(self) -> int:
        """Items that may run at the same time."""
        return self._form.concurrency or len(self._left)

    async def work(self, scope: AttemptScope) -> None:
        """Take items until none is left.

        Each finds the context as it is now. One that changes it ends the task in which
        items run one after the other; mostly none does.
        """
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        try:
            more = await self._work(scope, context)
            while more:
                work = self._work(scope, context)
                more = await loop.create_task(work, context=context.copy())
        except BaseException:
            self.more = False
            raise

    async def _work(self, scope: AttemptScope, context: contextvars.Context) -> bool:
        """True if the context is not ``context`` any more, and items may be left."""
        left = self._left
        pause_at = time.perf_counter() + YIELD_SECONDS
        count = 0
        while left and self.more:
            if self._runner.handing_over:
                await self._wait_to_be_stopped()
            if not self._runner.leased:
                await self._runner.wait_until_leased()
                continue
            if self._runner.has_to_give_way(self._attempt):
                await self._runner.give_way(self._attempt)
                continue
            index, item = left.popleft()
            if not left:
                self._runner.resume_all_of(self._attempt)
            payload = await self._run_item(index, item, scope)
            if os.getpid() != self._process:
                os._exit(0)  # a copy that the item has forked: see forks.py
            self._progress.add(index, payload)
            if self._attempt.last_beats is not None:
                self._runner.forget_heartbeat(scope)
            if contextvars.copy_context() != context:
                return True
            count += 1
            if count & 15 == 0 and time.perf_counter() > pause_at:
                await asyncio.sleep(0)
                pause_at = time.perf_counter() + YIELD_SECONDS
        if not left:
            self.more = False
        return False

    async def _wait_to_be_stopped(self) -> None:
        """Until the last item that runs here has ended: then the page is given back."""
        self._waiting += 1
        try:
            await anyio.sleep_forever()
        finally:
            self._waiting -= 1

    async def _run_item(self, index: int, item: Any, scope: AttemptScope) -> bytes:
        """The one place where an item starts; its result, or what stands for it.

        It is encoded at once: its object may be changed later, and one that cannot be
        stored is this item's failure.

        An item that has attempts left is given up here, so that it holds nobody up: it
        becomes a task of its own.
        """
        scope.begin_item(self._form.start + index)
        args = item if self._form.star else (item,)
        try:
            if self._runner.limits_revision != self._revision:
                self._revision = self._runner.limits_revision
                self._lane = self._runner.lane_of_page(self._attempt)
            if self._lane is None:
                value = await self._attempt_item(args, scope)
            else:
                value = await self._attempt_limited(self._lane, args, scope)
            return self._encoded(value, index)
        except RetryLaterSignal as later:
            await self._runner.write_last_heartbeats(self._attempt)
            return encode(self._runner.postponed_item(self._attempt, later))
        except BaseException as error:
            if os.getpid() != self._process:
                os._exit(1)
            if was_asked_to_stop(error):
                raise
            failed = self._runner.failed_item(self._attempt, error)
            if failed is not None:
                await self._runner.write_last_heartbeats(self._attempt)
                return encode(failed)
            outcome = as_exception(error)
            if self._form.return_exceptions:
                return self._encoded_error(outcome, index)
            raise outcome from outcome.__cause__

    def _encoded(self, value: object, index: int) -> bytes:
        path = f"results[{self._form.start + index}]"
        return encode(value, path=path, bytes_max=self._runner.payload_bytes_max)

    def _encoded_error(self, error: Exception, index: int) -> bytes:
        try:
            return self._encoded(error, index)
        except Exception as refusal:  # noqa: BLE001 - of a class with odd attributes
            if not isinstance(refusal, PayloadError):
                name = type(error).__name__
                refusal = ActivityFailedError(f"{name}, which cannot be stored")
            return self._encoded(refusal, index)

    async def _attempt_limited(
        self, lane: Lane[W], args: Any, scope: AttemptScope
    ) -> object:
        """An item takes its own slot and token."""
        self._waiting += 1
        try:
            taken = await self._runner.begin_item(lane, self._attempt)
        finally:
            self._waiting -= 1
        try:
            return await self._attempt_item(args, scope)
        finally:
            self._runner.end_item(lane, taken)

    async def _attempt_item(self, args: Any, scope: AttemptScope) -> object:
        self.busy += 1
        try:
            return await self._run_in_time(args, scope)
        finally:
            self.busy -= 1

    async def _run_in_time(self, args: Any, scope: AttemptScope) -> object:
        timeout = self._attempt.options.timeout
        runner, function = self._runner, self._function
        if timeout is None and not function.in_process:
            return await runner.invoke_item(function, args)
        seconds = None if timeout is None else timeout.total_seconds()
        limit = asyncio.timeout(None if function.in_process else seconds)

        def begin() -> None:
            """In a process the time counts from when the function begins."""
            if seconds is not None:
                limit.reschedule(asyncio.get_running_loop().time() + seconds)

        try:
            async with limit:
                if function.in_process:
                    return await runner.process_item(function, args, scope, begin)
                return await runner.invoke_item(function, args)
        except TimeoutError as error:
            if limit.expired():
                raise timeout_error(self._attempt) from error
            raise
