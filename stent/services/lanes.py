"""What may start of a limited function: limits, and lanes that wait for them.

A lane is a (queue, function) that is limited: by the function's limit, the queue's, or
the worker's own. Its attempts and items wait in the lane, not among the others, so
unlimited work is never behind them. Nothing here asks the database: see ``limits.py``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from stent.services.pace import Pace
from stent.store.store import StoredLimit

W = TypeVar("W")

PREFETCH_SECONDS = 0.5
"""For how long of a rate tasks are fetched ahead."""
PREFETCH_MAX = 200
TOKEN_SECONDS = 0.1
"""For how long a token may be kept, or for the time in which one comes."""


@dataclass(slots=True, eq=False)
class Limit:
    """One limit, and what this worker has of it.

    Attributes:
        granted: Slots this worker may use; without ``max_concurrent`` not counted.
        used: Slots in use; more than granted after the limit was lowered.
        held: Slots that others see as taken here.
        tokens: Starts that were paid for.
        tokens_until: ``time.monotonic()`` from which they are worth nothing.
        ask_at: ``time.monotonic()`` before which asking for slots is useless.
        tokens_at: The same for tokens.
        extra: Slots wanted for tasks that are about to be claimed.
        unsure: What is granted is not known: an answer is under way, or was lost.
        asked: Slots that others see as wanted here.
        asked_tokens: Tokens that were asked for last.
        told: Slots that were in use when it was last asked for more.
        lowered: More may be granted or used, here or elsewhere, than there is.
    """

    name: str
    max_concurrent: int | None = None
    per_second: float | None = None
    burst: int | None = None
    keyed: bool = False
    paused: bool = False
    granted: int = 0
    used: int = 0
    held: int = 0
    tokens: int = 0
    tokens_until: float = 0.0
    ask_at: float = 0.0
    tokens_at: float = 0.0
    extra: int = 0
    unsure: bool = False
    asked: int = 0
    asked_tokens: int = 0
    told: int = 0
    lowered: bool = False
    asked_at: float = 0.0
    idle_since: float = math.inf

    @property
    def counts(self) -> bool:
        """Whether slots are granted to workers; those of keys are taken at claims."""
        return self.max_concurrent is not None and not self.keyed

    @property
    def open(self) -> bool:
        """Whether one more may start now."""
        return not (self.paused or self.full) and self.paid

    @property
    def full(self) -> bool:
        """Whether it has no slot for one more."""
        return self.counts and self.used >= self.granted

    @property
    def lacks_token(self) -> bool:
        """Whether nothing but a token is missing."""
        return not (self.paid or self.paused or self.full)

    @property
    def paid(self) -> bool:
        """Whether no token is needed, or one is here that is fresh."""
        if self.per_second is None:
            return True
        return self.tokens > 0 and time.monotonic() < self.tokens_until

    def pay(self, tokens: int, now: float) -> None:
        """So many tokens have come.

        Kept for long they would be starts on top of those that the bucket, full again
        by then, allows.
        """
        if tokens > 0 and self.per_second is not None:
            self.tokens = tokens + (self.tokens if self.paid else 0)
            self.tokens_until = now + max(TOKEN_SECONDS, 1 / self.per_second)

    @property
    def may_get_more(self) -> bool:
        """Whether asking for slots makes sense."""
        has_all = self.granted >= (self.max_concurrent or 0) and not self.unsure
        return self.counts and not (self.paused or has_all)

    def update(self, stored: StoredLimit) -> None:
        """What holds now."""
        before, counted = self.max_concurrent or math.inf, self.counts
        self.max_concurrent = stored.max_concurrent
        self.keyed, self.paused = stored.keyed, stored.paused
        if self.counts is not counted:
            self.granted = 0
        if (self.max_concurrent or math.inf) < before or self.counts > counted:
            self.lowered, self.ask_at = True, 0.0
        if stored.per_second != self.per_second:
            self.per_second, self.burst = stored.per_second, stored.burst
            self.tokens, self.tokens_at = 0, 0.0


@dataclass(slots=True, eq=False)
class Load:
    """What this worker runs of one function, in all its queues together."""

    running: int = 0


@dataclass(slots=True, eq=False)
class ItemTurn:
    """An item of a page that waits; what it has taken is the result of ``came``."""

    priority: int
    came: asyncio.Future[tuple[Limit, ...]]


@dataclass(slots=True, eq=False)
class Lane(Generic[W]):
    """The attempts of one limited function in one queue.

    Attributes:
        load: Of its function.
        waiting: Claimed attempts that have not begun.
        items: Items of pages, whose page has begun.
        running: Attempts and items that have begun.
        served: When its turn came last, as a number that grows.
        after: The key that was served last.
        backlog: There were more tasks in the database than were fetched.
    """

    queue: str
    function: str
    load: Load = field(default_factory=Load)
    limits: tuple[Limit, ...] = ()
    per_worker: int | None = None
    keyed: bool = False
    waiting: deque[W] = field(default_factory=deque)
    items: deque[ItemTurn] = field(default_factory=deque)
    running: int = 0
    served: int = 0
    after: str = ""
    backlog: bool = False
    pace: Pace = field(default_factory=Pace)

    @property
    def limited(self) -> bool:
        """Whether anything limits it."""
        return bool(self.limits) or self.per_worker is not None

    @property
    def only_paused(self) -> bool:
        """Whether nothing but a pause limits it."""
        return self.per_worker is None and not any(
            limit.max_concurrent is not None or limit.per_second is not None
            for limit in self.limits
        )

    @property
    def paused(self) -> bool:
        """Whether nothing of it may start."""
        return any(limit.paused for limit in self.limits)

    @property
    def rated(self) -> bool:
        """Whether what starts costs tokens."""
        return any(limit.per_second is not None for limit in self.limits)

    @property
    def open(self) -> bool:
        """Whether one more may start now."""
        return self.own_room > 0 and all(limit.open for limit in self.limits)

    @property
    def own_room(self) -> float:
        """How many more the worker may run, by what the code says."""
        if self.per_worker is None:
            return math.inf
        return max(0, self.per_worker - self.load.running)

    @property
    def hungry(self) -> bool:
        """Whether more should be fetched, so that no slot is idle meanwhile."""
        return self.backlog and 2 * len(self.waiting) <= self.running

    @property
    def wanted(self) -> int:
        """How many wait to start."""
        return len(self.waiting) + len(self.items)

    def shares(self, other: Lane[W]) -> bool:
        """Whether another takes slots of the same limits, or of the worker's own."""
        if other.load is self.load and self.per_worker is not None:
            return True
        return not set(other.limits).isdisjoint(self.limits)

    def usable(self, limit: Limit, asked: Collection[Limit] = ()) -> int:
        """How many more slots of one of its limits it could use.

        No more than it has of its other limits: who holds slots of one limit and lacks
        those of another would keep them from who has it the other way round.

        Args:
            limit: One of its own.
            asked: More of these may come in the same moment.
        """
        usable = int(min(self.wanted, self.own_room))
        for other in self.limits:
            if other is not limit and other not in asked:
                if other.paused:
                    return 0
                if other.counts:
                    usable = min(usable, other.granted)
        return usable

    def reach(self, limit: Limit, asked: Collection[Limit]) -> float:
        """How many slots of one of its limits are of use, by its other limits.

        Args:
            limit: One of its own.
            asked: More of these may come in the same moment.
        """
        return min(
            (
                (other.max_concurrent or 0) if other in asked else other.granted
                for other in self.limits
                if other is not limit and other.counts
            ),
            default=math.inf,
        )

    def take(self) -> tuple[Limit, ...]:
        """One starts; give back what this returns when it ends."""
        self.running += 1
        self.load.running += 1
        for limit in self.limits:
            limit.used += 1
            if limit.per_second is not None:
                limit.tokens -= 1
        return self.limits

    def room(self, free: int, *, contended: bool = False) -> int:
        """How many tasks to claim: what may start, and a little ahead.

        Args:
            free: Slots of the worker.
            contended: Others wait here for slots of its limits: lanes take turns, and
                who has nothing waiting misses its turn.
        """
        if self.paused:
            return 0
        room, pace = free + PREFETCH_MAX, self.pace.ahead
        if self.per_worker is not None:
            left = self.per_worker - self.load.running
            ahead = self._ahead(self.per_worker, left, pace, contended)
            room = min(room, left + ahead - self.wanted)
        for limit in self.limits:
            if limit.counts:
                idle = limit.granted - limit.used
                ahead = self._ahead(limit.granted, idle, pace, contended)
                room = min(room, (idle + ahead if limit.granted else 0) - self.wanted)
            if limit.per_second is not None:
                ahead = math.ceil(limit.per_second * PREFETCH_SECONDS)
                ahead = max(1, min(ahead, PREFETCH_MAX, max(pace, free)))
                room = min(room, min(limit.tokens, free) + ahead - self.wanted)
        return max(0, room)

    def _ahead(self, slots: int, idle: int, pace: int, contended: bool) -> int:  # noqa: FBT001
        """How many to claim beyond those for which there is a slot now."""
        # One waits for a slot that other lanes will give back.
        least = int(idle <= 0 and not self.running)
        return min(slots, PREFETCH_MAX, max(pace, slots if contended else least))


def function_limit(name: str) -> str:
    """Name of the limit of a function."""
    return f"function:{name}"


def queue_limit(name: str) -> str:
    """Name of the limit of a queue."""
    return f"queue:{name}"
