"""asyncio's waiting functions under a ``DurableLoop``, the same on every version.

``wait_for`` makes a task on 3.11 and none on 3.12, ``as_completed`` puts bare
coroutines into a set: both would change identities between runs. Under a
``DurableLoop`` these functions, and ``wait``, are our own; elsewhere the originals.
gather's outer future and anyio's nested scopes are held in sets too and get a stable
order here. anyio's worker threads, which bypass the loop, are refused. Nothing else is
patched.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio import events, tasks
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from typing import Any

from anyio._backends import _asyncio as anyio_backend

from stent.loop import DurableLoop, refuse_io


def _durable_loop() -> DurableLoop | None:
    loop = events._get_running_loop()  # noqa: SLF001
    return loop if isinstance(loop, DurableLoop) else None


async def _wait_for(awaitable: Awaitable[Any], timeout: float | None) -> Any:
    if timeout is None:
        return await awaitable
    if timeout > 0:
        async with asyncio.timeout(timeout):
            return await awaitable
    future = asyncio.ensure_future(awaitable)
    if future.done():
        return future.result()
    future.cancel()
    await _wait([future], None, asyncio.ALL_COMPLETED)
    try:
        return future.result()
    except asyncio.CancelledError as error:
        raise TimeoutError from error


async def _wait(
    given: Iterable[Any],
    timeout: float | None,
    return_when: str,
) -> tuple[set[Any], set[Any]]:
    if asyncio.isfuture(given) or asyncio.iscoroutine(given):
        message = f"a list of futures is needed, not {type(given).__name__}"
        raise TypeError(message)
    waited = dict.fromkeys(given)
    if not waited:
        message = "wait needs at least one task or future"
        raise ValueError(message)
    if return_when not in _RETURN_WHEN:
        message = f"return_when is {return_when!r}; it must be one of {_RETURN_WHEN}"
        raise ValueError(message)
    if not all(asyncio.isfuture(future) for future in waited):
        message = "wait takes tasks and durable calls, not bare coroutines"
        raise TypeError(message)
    pending = [future for future in waited if not future.done()]
    if pending and not _enough(waited, return_when):
        await _wait_until_enough(pending, timeout, return_when)
    done = {future for future in waited if future.done()}
    return done, {future for future in waited if not future.done()}


async def _wait_until_enough(
    pending: list[Any],
    timeout: float | None,
    return_when: str,
) -> None:
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    left = len(pending)

    def finished(future: Any) -> None:
        nonlocal left
        left -= 1
        if not waiter.done() and (left == 0 or _enough((future,), return_when)):
            waiter.set_result(None)

    def expired() -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = None if timeout is None else loop.call_later(timeout, expired)
    for future in pending:
        future.add_done_callback(finished)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()
        for future in pending:
            future.remove_done_callback(finished)


_RETURN_WHEN = (
    asyncio.FIRST_COMPLETED,
    asyncio.FIRST_EXCEPTION,
    asyncio.ALL_COMPLETED,
)


def _enough(futures: Iterable[Any], return_when: str) -> bool:
    """Whether a single one of these ends the wait before all are done."""
    if return_when == asyncio.FIRST_COMPLETED:
        return any(future.done() for future in futures)
    return return_when == asyncio.FIRST_EXCEPTION and any(
        future.done() and not future.cancelled() and future.exception() is not None
        for future in futures
    )


class _AsCompleted:
    """Iterator, plain or asynchronous, over awaitables in order of completion."""

    def __init__(
        self, given: Iterable[Any], timeout: float | None, loop: DurableLoop
    ) -> None:
        if asyncio.isfuture(given) or asyncio.iscoroutine(given):
            message = f"a list of awaitables is needed, not {type(given).__name__}"
            raise TypeError(message)
        self._loop = loop
        self._done: deque[Any] = deque()
        self._waiters: deque[Any] = deque()
        self._expired = False
        futures = [asyncio.ensure_future(item) for item in dict.fromkeys(given)]
        self._left = len(futures)
        self._pending = dict.fromkeys(futures)
        self._timer = (
            None if timeout is None else loop.call_later(timeout, self._expire)
        )
        for future in futures:
            future.add_done_callback(self._finish)

    def _finish(self, future: Any) -> None:
        if self._expired:
            return
        self._pending.pop(future, None)
        self._done.append(future)
        self._wake()
        if not self._pending and self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        for future in self._pending:
            future.remove_done_callback(self._finish)
        while self._waiters:
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def _next_done(self) -> Any:
        while not self._done:
            if self._expired:
                raise TimeoutError
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                # Woken and cancelled in the same delivery: wake another one instead.
                if self._done and not waiter.cancelled():
                    self._wake()
                raise
        return self._done.popleft()

    async def _next_result(self) -> Any:
        return (await self._next_done()).result()

    def __iter__(self) -> Iterator[Coroutine[Any, Any, Any]]:
        return self

    def __next__(self) -> Coroutine[Any, Any, Any]:
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        return self._next_result()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._left == 0:
            raise StopAsyncIteration
        self._left -= 1
        return await self._next_done()


def _patched_wait_for(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def wait_for(fut: Any, timeout: float | None, **kwargs: Any) -> Any:
        if _durable_loop() is None:
            return await original(fut, timeout, **kwargs)
        return await _wait_for(fut, timeout)

    return wait_for


def _patched_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def wait(
        fs: Any,
        *,
        timeout: float | None = None,
        return_when: str = asyncio.ALL_COMPLETED,
    ) -> Any:
        if _durable_loop() is None:
            return await original(fs, timeout=timeout, return_when=return_when)
        return await _wait(fs, timeout, return_when)

    return wait


def _patched_as_completed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def as_completed(fs: Any, *, timeout: float | None = None) -> Any:
        loop = _durable_loop()
        if loop is None:
            return original(fs, timeout=timeout)
        return _AsCompleted(fs, timeout, loop)

    return as_completed


def _patched_all_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_tasks(loop: Any = None) -> Any:
        durable = _durable_loop() if loop is None else loop
        if not isinstance(durable, DurableLoop):
            return original(loop)
        # asyncio's own set is that of the process: its order is not ours to repeat.
        return set(durable.live_tasks())

    return all_tasks


class _OrderedScopes(dict[Any, None]):
    """The part of a set that anyio uses for nested scopes, in order of insertion."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)

    def remove(self, item: Any) -> None:
        del self[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__()))


def _patched_scope_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if _durable_loop() is not None:
            self._child_scopes = _OrderedScopes()

    return __init__


def _patched_thread_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if _durable_loop() is not None:
            # Its callback would come from another thread and the wait never end.
            refuse_io("anyio.to_thread")
        original(self, *args, **kwargs)

    return __init__


def _gathering_hash(self: Any) -> int:
    loop = self.get_loop()
    if not isinstance(loop, DurableLoop):
        return object.__hash__(self)
    ordinal: int | None = getattr(self, "_stent_hash", None)
    if ordinal is None:
        ordinal = self._stent_hash = loop.next_hash("gather")
    return ordinal


def install() -> None:
    """Patch asyncio once per process; safe to call again."""
    if getattr(asyncio, "_stent_waiting", False):
        return
    for name, patch in (
        ("wait_for", _patched_wait_for),
        ("wait", _patched_wait),
        ("as_completed", _patched_as_completed),
        ("all_tasks", _patched_all_tasks),
    ):
        patched = patch(getattr(tasks, name))
        setattr(tasks, name, patched)
        setattr(asyncio, name, patched)
    anyio_backend.all_tasks = asyncio.all_tasks  # type: ignore[attr-defined]
    tasks._GatheringFuture.__hash__ = _gathering_hash  # type: ignore[attr-defined]  # noqa: SLF001
    thread = anyio_backend.WorkerThread
    thread.__init__ = _patched_thread_init(thread.__init__)  # type: ignore[method-assign]
    scope = anyio_backend.CancelScope
    scope.__init__ = _patched_scope_init(scope.__init__)  # type: ignore[method-assign]
    asyncio._stent_waiting = True  # type: ignore[attr-defined]  # noqa: SLF001


install()
