"""Limits as operators see and set them, and pauses."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stent.errors import ConfigurationError, UsageError
from stent.model import KEEP, Keep, QueueDepth
from stent.rate import Rate, parse_rate
from stent.registry import CONCURRENT_MAX, DurableFunction
from stent.services.lanes import function_limit, queue_limit
from stent.store.store import Store

LIMITS_MAX = 10_000
ROWS_COUNTED_MAX = 10_000
"""What waits is counted up to here, for each priority of a function in a queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """One limit and what is in use.

    Attributes:
        name: ``function:NAME`` or ``queue:NAME``.
        max_concurrent: At the same time over the whole fleet; of each key if ``keyed``.
        rate_per_second: Starts a second over the whole fleet.
        burst: Starts at once after a pause.
        keyed: The limit is of each concurrency key.
        paused: Nothing of it starts.
        is_set: By an operator, not by the code.
        held: Slots in use or granted to workers that are about to use them.
        waiting: Tasks and executions that are ready and have no slot; of a queue its
            tasks, and its executions while it is paused.
        capped: Counting what waits stopped at 10 000 a line: it is at least that.
        tokens: Starts that could happen now; None without a rate.
        closed_until: Somebody called ``retry_later``: no starts before.
    """

    name: str
    max_concurrent: int | None
    rate_per_second: float | None
    burst: int | None
    keyed: bool
    paused: bool
    is_set: bool
    held: int
    waiting: int
    capped: bool
    tokens: float | None
    closed_until: dt.datetime | None
    updated_at: dt.datetime


class LimitSettings:
    """Over the store of one app."""

    def __init__(self, store: Store, tell_workers: Callable[[], None]) -> None:
        """Create it; ``tell_workers`` hints all workers that limits have changed."""
        self._store = store
        self._tell_workers = tell_workers

    async def set_limit(
        self,
        target: DurableFunction[Any, Any] | str | None,
        queue: str | None,
        max_concurrent: int | Keep | None,
        rate_limit: str | Keep | None,
    ) -> None:
        """See ``Stent.set_limit``."""
        name = limit_name(target, queue)
        if max_concurrent is KEEP and rate_limit is KEEP:
            message = "say what to limit: max_concurrent=, rate_limit=, or both"
            raise UsageError(message)
        if (
            isinstance(max_concurrent, int)
            and not 1 <= max_concurrent <= CONCURRENT_MAX
        ):
            message = (
                f"max_concurrent is {max_concurrent!r}; it must be a number from 1 to "
                f"{CONCURRENT_MAX}; to start nothing, pause it"
            )
            raise ConfigurationError(message)
        rate: Rate | Keep | None
        rate = parse_rate(rate_limit) if isinstance(rate_limit, str) else rate_limit
        await self._store.set_limit(name, max_concurrent, rate)
        self._tell_workers()

    async def reset_limit(
        self, target: DurableFunction[Any, Any] | str | None, queue: str | None
    ) -> bool:
        """See ``Stent.reset_limit``."""
        found = await self._store.reset_limit(limit_name(target, queue))
        self._tell_workers()
        return found

    async def set_paused(
        self,
        target: DurableFunction[Any, Any] | str | None,
        queue: str | None,
        *,
        paused: bool,
    ) -> None:
        """See ``Stent.pause`` and ``resume``."""
        await self._store.set_paused(limit_name(target, queue), paused=paused)
        self._tell_workers()

    async def limits(self) -> list[LimitState]:
        """Limits that limit something, are paused or were lifted, by name."""
        rows = [
            row
            for row in await self._store.list_limits(LIMITS_MAX)
            if row["max_concurrent"] is not None
            or row["rate_per_second"] is not None
            or row["paused"]
            or row["is_set"]
        ]
        if not rows:
            return []
        depths = await self._store.queue_depth(None, ROWS_COUNTED_MAX)
        return [_state(row, depths) for row in rows]


def _state(row: Mapping[str, Any], depths: Iterable[QueueDepth]) -> LimitState:
    of, _, name = row["name"].partition(":")
    if of == "function":
        concerned = [depth for depth in depths if depth.function == name]
    else:
        concerned = [
            depth
            for depth in depths
            if depth.queue == name and (depth.kind == "task" or row["paused"])
        ]
    waiting = sum(depth.ready for depth in concerned)
    if row["max_concurrent"] is not None and not row["keyed"]:
        # Workers claim a little ahead of their slots.
        tasks = sum(d.running for d in concerned if d.kind == "task")
        waiting += max(0, tasks - row["held"])
    return LimitState(
        **{
            **row,
            "waiting": waiting,
            # None of them is given out before.
            "tokens": row["tokens"] if row["closed_until"] is None else 0.0,
            "capped": any(depth.capped for depth in concerned),
        }
    )


def limit_name(
    target: DurableFunction[Any, Any] | str | None, queue: str | None
) -> str:
    """The name of the limit of a function or a queue.

    Raises:
        UsageError: None of them was given, or both, or a name is empty, or the function
            is not durable.
    """
    if (target is None) == (queue is None):
        message = "give a function, or queue=, one of them"
        raise UsageError(message)
    name = queue if queue is not None else target
    if isinstance(name, DurableFunction):
        name = name.name
    if not isinstance(name, str):
        shown = getattr(name, "__qualname__", repr(name))
        message = f"{shown} is not durable: decorate it with @durable, or give a name"
        raise UsageError(message)
    if not name.isprintable() or not name.strip():
        message = f"{name!r} is no name of a function or a queue"
        raise UsageError(message)
    return function_limit(name) if queue is None else queue_limit(name)
