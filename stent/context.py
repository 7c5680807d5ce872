"""What user code may call from inside: sleep, now, run, tell and the others.

Each asks the *scope* it runs in (a workflow or an attempt of an activity); outside of
both, the ones that make sense in a unit test fall back to plain Python.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random as random_module
import time
import uuid as uuid_module
from collections.abc import (
    AsyncIterable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
    TypeVarTuple,
    overload,
)

from stent.codec import decode
from stent.duration import Duration, parse_duration
from stent.errors import ConfigurationError, RetryLaterSignal, UsageError
from stent.kinds import MARK, TRANSACTION, WORKFLOW
from stent.mapping import TakesItem, TakesItems, map_form
from stent.model import Kind
from stent.registry import map_items

if TYPE_CHECKING:
    import asyncpg

HEARTBEAT_BYTES_MAX = 64 * 1024
"""Longest encoded details of a heartbeat: they are written again and again."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """Where the calling code runs.

    Attributes:
        execution_id: The execution; ``root_id`` and ``parent_id`` say where it hangs.
        function: Name of the durable function that runs.
        kind: Whether that is a workflow or an activity.
        attempt: From 1; always 1 in a workflow.
        address: Of the activity call; empty in a workflow.
        tags: Of the execution.
        cancelled: Whether the attempt was asked to stop when this was made: its call
            was cancelled, it ran out of time, or the worker lost it.
        heartbeat_payload: See ``heartbeat``.
    """

    execution_id: str
    root_id: str
    parent_id: str | None
    function: str
    kind: Kind
    attempt: int
    address: str
    tags: tuple[str, ...]
    cancelled: bool = False
    heartbeat_payload: bytes | None = field(default=None, repr=False)

    @property
    def heartbeat(self) -> Any:
        """Details that an earlier attempt gave to ``stent.heartbeat`` last, or None.

        Raises:
            PayloadError: A class in them is not known here any more.
        """
        payload = self.heartbeat_payload
        return None if payload is None else decode(payload)


class Scope(Protocol):
    """What a workflow or an attempt offers to the code inside it."""

    def sleep(self, duration: dt.timedelta) -> Coroutine[Any, Any, None]:
        """Wait."""
        ...

    def now(self) -> dt.datetime:
        """Database time."""
        ...

    def random(self) -> random_module.Random:
        """A generator."""
        ...

    def uuid(self) -> uuid_module.UUID:
        """A new UUID."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, Any]:
        """Run and journal an undecorated function."""
        ...

    def tell(self, value: object) -> None:
        """Append to the execution's log."""
        ...

    def current(self) -> Current:
        """Where this is."""
        ...

    def idempotency_key(self) -> str:
        """The same on every attempt."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[asyncpg.Connection]:
        """The attempt's transaction."""
        ...

    def heartbeat(self, details: object) -> None:
        """Keep details for the next attempt."""
        ...

    def raise_if_cancelled(self, wait: dt.timedelta | None) -> None:
        """End an attempt that was asked to stop."""
        ...


context_scope: ContextVar[Scope | None] = ContextVar("stent_scope", default=None)


def _marked(mark: str) -> Callable[[F], F]:
    def apply(function: F) -> F:
        setattr(function, MARK, mark)
        return function

    return apply


def _scope(name: str) -> Scope:
    scope = context_scope.get()
    if scope is None:
        message = f"stent.{name} works inside a durable function that is executed"
        raise UsageError(message)
    return scope


@_marked(WORKFLOW)
async def sleep(duration: Duration) -> None:
    """Wait durably: the deadline survives crashes and no worker slot is held.

    Args:
        duration: ``"100ms"``, ``"1h30m"``, a timedelta, or seconds.

    Raises:
        DurationError: It cannot be read.
        UsageError: Inside an activity; use ``asyncio.sleep`` there.
    """
    pause = parse_duration(duration)
    scope = context_scope.get()
    if scope is None:
        await asyncio.sleep(pause.total_seconds())
    else:
        await scope.sleep(pause)


@overload
def map(  # noqa: A001 - the name users type
    function: TakesItem[T, R],
    items: Iterable[T] | AsyncIterable[T],
    *,
    return_exceptions: Literal[False] = False,
    chunk: int | Literal["auto"] = "auto",
    concurrency: int | None = None,
) -> Coroutine[Any, Any, list[R]]: ...
@overload
def map(  # noqa: A001 - the name users type
    function: TakesItem[T, R],
    items: Iterable[T] | AsyncIterable[T],
    *,
    return_exceptions: bool,
    chunk: int | Literal["auto"] = "auto",
    concurrency: int | None = None,
) -> Coroutine[Any, Any, list[R | BaseException]]: ...
@_marked(WORKFLOW)
def map(  # noqa: A001 - the name users type
    function: Any,
    items: Any,
    *,
    return_exceptions: bool = False,
    chunk: int | str = "auto",
    concurrency: int | None = None,
) -> Coroutine[Any, Any, list[Any]]:
    """Call a durable function once per item; results in the order of the items.

    Cheaper than ``gather`` from about 50 items: items of an activity travel in pages,
    each claimed by one worker, and every item is journaled on its own, so after a crash
    only unfinished items run again. Each item of a workflow, or of a transactional
    activity, is an execution or a task of its own.

    Args:
        function: A durable function of one parameter.
        items: Any iterable, or an asynchronous one that awaits durable calls only. It
            is pulled while the map runs, a page at a time and no more than 1 000 pages,
            100 000 items or 16 MiB ahead, and again in a replay: it must give the same
            items then, else the execution is blocked.
        return_exceptions: Put exceptions into the list instead of raising the first.
            Without it, the first item out of attempts raises; the others are stopped.
        chunk: Items per page, up to 10 000; ``"auto"`` chooses so that a page takes
            about a second.
        concurrency: Items that may be in flight at the same time, over all workers.

    Returns:
        An awaitable of the results, all in memory; what the iterable raises, it raises.

    Raises:
        ConfigurationError: ``chunk`` or ``concurrency`` is no number of items.
        TypeError: ``items`` cannot be iterated.
        UsageError: The function is not durable.
    """
    form = map_form(
        return_exceptions=return_exceptions, chunk=chunk, concurrency=concurrency
    )
    return map_items(function, items, form)


@overload
def starmap(
    function: TakesItems[*Ts, R],
    items: Iterable[tuple[*Ts]] | AsyncIterable[tuple[*Ts]],
    *,
    return_exceptions: Literal[False] = False,
    chunk: int | Literal["auto"] = "auto",
    concurrency: int | None = None,
) -> Coroutine[Any, Any, list[R]]: ...
@overload
def starmap(
    function: TakesItems[*Ts, R],
    items: Iterable[tuple[*Ts]] | AsyncIterable[tuple[*Ts]],
    *,
    return_exceptions: bool,
    chunk: int | Literal["auto"] = "auto",
    concurrency: int | None = None,
) -> Coroutine[Any, Any, list[R | BaseException]]: ...
@_marked(WORKFLOW)
def starmap(
    function: Any,
    items: Any,
    *,
    return_exceptions: bool = False,
    chunk: int | str = "auto",
    concurrency: int | None = None,
) -> Coroutine[Any, Any, list[Any]]:
    """Like ``map``, each item being the sequence of positional arguments."""
    form = map_form(
        star=True,
        return_exceptions=return_exceptions,
        chunk=chunk,
        concurrency=concurrency,
    )
    return map_items(function, items, form)


@_marked(WORKFLOW)
async def gather(*calls: Any, return_exceptions: bool = False) -> list[Any]:
    """``asyncio.gather``, as a list; here for symmetry with ``map``."""
    return list(await asyncio.gather(*calls, return_exceptions=return_exceptions))


def now() -> dt.datetime:
    """Database time, aware, UTC; in a workflow the time of the last delivery."""
    scope = context_scope.get()
    return dt.datetime.now(dt.UTC) if scope is None else scope.now()


def random() -> random_module.Random:
    """A random generator; in a workflow seeded by the execution and the task."""
    scope = context_scope.get()
    return random_module.SystemRandom() if scope is None else scope.random()


def uuid() -> uuid_module.UUID:
    """A random UUID; in a workflow the same one in every replay."""
    scope = context_scope.get()
    return uuid_module.uuid4() if scope is None else scope.uuid()


@overload
def run(
    function: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, R]: ...
@overload
def run(
    function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, R]: ...
@_marked(WORKFLOW)
def run(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Coroutine[Any, Any, Any]:
    """Run an undecorated function once and journal its result.

    For small side effects such as reading a file. It runs in the worker that advances
    the workflow (``async def`` on its loop, ``def`` in a thread); a crash before the
    result is journaled runs it again. Exceptions are not retried.
    """
    scope = context_scope.get()
    if scope is not None:
        return scope.run(function, args, kwargs)
    return _run_plainly(function, args, kwargs)


async def _run_plainly(
    function: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object]
) -> Any:
    value = function(*args, **kwargs)
    return await value if isinstance(value, Coroutine) else value


def tell(value: object) -> None:
    """Append ``value`` to the execution's log, once, however often it is replayed.

    In an activity it is written together with the attempt's result.

    Raises:
        PayloadError: The value cannot be stored.
    """
    scope = context_scope.get()
    if scope is not None:
        scope.tell(value)


def current() -> Current:
    """Which execution and attempt the calling code belongs to."""
    return _scope("current()").current()


def idempotency_key() -> str:
    """A key for downstream systems: the same on every attempt of this call.

    Raises:
        UsageError: Not inside an activity.
    """
    return _scope("idempotency_key()").idempotency_key()


@_marked(TRANSACTION)
def transaction() -> AbstractAsyncContextManager[asyncpg.Connection]:
    """The attempt's one database transaction: user SQL and result commit together.

    Leaving the block commits nothing; stent commits after the function returned, in
    the same transaction as its result, and rolls back if it raised. So the SQL is
    executed exactly once, whatever crashes.

    Raises:
        UsageError: Not inside an activity.
    """
    return _scope("transaction()").transaction()


def retry_later(delay: Duration) -> NoReturn:
    """End this attempt and make it again after ``delay``; it does not count as one.

    For a service that says when to come back (``Retry-After``). Until then nothing
    starts under the function's ``rate_limit``, on any worker. Its own SQL is rolled
    back. Nothing bounds how often: give the execution a ``max_duration``.

    Raises:
        UsageError: Not inside an activity.
        DurationError: It cannot be read.
    """
    pause = parse_duration(delay, name="delay")
    if _scope("retry_later()").current().kind is not Kind.ACTIVITY:
        message = "retry_later() belongs into an activity; a workflow uses stent.sleep"
        raise UsageError(message)
    raise RetryLaterSignal(pause.total_seconds())


def heartbeat(details: object = None) -> None:
    """Say how far this attempt has come, for the one after it.

    The next attempt, wherever it runs, finds the details in
    ``stent.current().heartbeat``; in a map, those of its item. They are written at
    most once a second, the latest of them only: after kill -9 of the worker the next
    attempt sees what was given until about a second before. A failed attempt's last
    details are written before the next one can begin. Works in threads and processes.

    Args:
        details: Anything that can be stored, at most 64 KiB encoded.

    Raises:
        asyncio.CancelledError: The attempt was asked to stop.
        PayloadError: The details cannot be stored.
        UsageError: In a workflow. Outside of an execution nothing happens.
    """
    scope = context_scope.get()
    if scope is not None:
        scope.heartbeat(details)


def raise_if_cancelled(*, wait: Duration | None = None) -> None:
    """End an attempt in a thread that was asked to stop; else return.

    A thread cannot be interrupted: a ``def`` activity that takes long calls this now
    and then, outside of what must not be left half-done. Stent ends ``async def``
    activities at their next ``await``, and processes with SIGKILL.

    Args:
        wait: Wait so long for being asked to stop: a pause that ends early. Only in
            plain functions.

    Raises:
        asyncio.CancelledError: The call was cancelled, the attempt ran out of time, or
            the worker lost it. ``except Exception`` does not catch it; let it pass.
        UsageError: In a workflow, or with ``wait`` in a coroutine. Outside of an
            execution it only pauses.
    """
    pause = None if wait is None else parse_duration(wait, name="wait")
    scope = context_scope.get()
    if scope is not None:
        scope.raise_if_cancelled(pause)
    elif pause is not None:
        time.sleep(pause.total_seconds())


def _later(name: str, mark: str | None = WORKFLOW) -> Callable[..., NoReturn]:
    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        message = f"stent.{name} is not available in this release"
        raise ConfigurationError(message)

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = "Not available in this release: raises ``ConfigurationError``."
    if mark:
        setattr(refuse, MARK, mark)
    return refuse


wait_for_signal = _later("wait_for_signal")
attempt = _later("attempt")
recover = _later("recover")
compensate = _later("compensate")
patched = _later("patched")
restart = _later("restart")
state = _later("state", None)
counters = _later("counters", None)
