"""What holds work back: limits that are full, rates that are used up, pauses."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from stent.history.display import shown_instant, shown_worker
from stent.rate import Rate
from stent.services.lanes import function_limit, queue_limit

HOLDERS_NAMED_MAX = 3
"""Holders of a limit up to here are named; more are counted."""

_KEYLESS = (
    "no worker claims it: it was called before its function had a concurrency_key"
)
LONG_AGO = dt.datetime(1, 1, 1, tzinfo=dt.UTC)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Held:
    """The slots in use of one limit, or of one key of it.

    Attributes:
        slots: How many.
        holders: Who has them, in words; the first ones.
        more: Holders beyond these.
    """

    slots: int = 0
    holders: tuple[str, ...] = ()
    more: int = 0

    def __str__(self) -> str:
        more = f" and {self.more} more" if self.more else ""
        return ", ".join(self.holders) + more


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits that concern some executions, as they are now.

    Attributes:
        rows: By name; only what limits something or is paused.
        granted: Slots by limit and worker; of limits that are not of a key.
        taken: Slots of executions and calls by limit and key; without one, empty.
        claimed: Tasks that a worker has of a function in a queue, by these three.
        hosts: Machines of workers.
        now: Database time.
    """

    rows: Mapping[str, Row] = field(default_factory=dict)
    granted: Mapping[str, Mapping[UUID, int]] = field(default_factory=dict)
    taken: Mapping[tuple[str, str], Held] = field(default_factory=dict)
    claimed: Mapping[tuple[str, str, UUID], int] = field(default_factory=dict)
    hosts: Mapping[UUID, str] = field(default_factory=dict)
    now: dt.datetime = LONG_AGO

    def pauses(self, function: str, queue: str) -> list[str]:
        """What is paused of a function in a queue."""
        own = [f"function {function} is paused"]
        paused = self._paused(function_limit(function))
        return (own if paused else []) + self.queue_pause(queue)

    def queue_pause(self, queue: str) -> list[str]:
        """Whether a queue is paused."""
        own = [f"queue {queue!r} is paused"]
        return own if self._paused(queue_limit(queue)) else []

    def _paused(self, name: str) -> bool:
        return name in self.rows and bool(self.rows[name]["paused"])

    def on_execution(self, execution: Row) -> list[str]:
        """Why a workflow that has no slot yet does not start."""
        function, queue = execution["function"], execution["queue"]
        row = self.rows.get(function_limit(function))
        reasons = self.pauses(function, queue)
        if row is not None:
            key = execution["limit_key"] if row["keyed"] else ""
            reasons += self._full(row, key or "") + self._no_token(row)
        return reasons

    def on_task(
        self, function: str, queue: str, keys: Sequence[str | None] = ()
    ) -> list[str]:
        """Why tasks of a function in a queue do not start.

        Args:
            function: Durable name.
            queue: They wait in.
            keys: Of the tasks in question, if the function has a ``concurrency_key``;
                None for one that has none.
        """
        reasons = self.pauses(function, queue)
        for row in self._rows_of(function, queue):
            for key in keys if row["keyed"] else ("",):
                reasons += [_KEYLESS] if key is None else self._full(row, key)
            reasons += self._no_token(row) or _rate(row)
        return reasons

    def slots_of(self, worker: UUID, function: str, queue: str) -> int | None:
        """Slots that a worker has for tasks of a function; None: nobody counts."""
        counted = [
            self.granted.get(row["name"], {}).get(worker, 0)
            for row in self._rows_of(function, queue)
            if row["max_concurrent"] is not None and not row["keyed"]
        ]
        return min(counted, default=None)

    def rated(self, function: str, queue: str) -> bool:
        """Whether tasks of a function in a queue wait for tokens."""
        rows = self._rows_of(function, queue)
        return any(row["rate_per_second"] is not None for row in rows)

    def _rows_of(self, function: str, queue: str) -> list[Row]:
        names = (function_limit(function), queue_limit(queue))
        return [self.rows[name] for name in names if name in self.rows]

    def held(self, row: Row, key: str) -> Held:
        """Who has slots of a limit: workers, or executions."""
        taken = self.taken.get((row["name"], key), Held())
        granted = {w: n for w, n in self.granted.get(row["name"], {}).items() if n}
        if not granted:
            return taken
        most = sorted(granted, key=lambda worker: (-granted[worker], worker))
        named = [
            f"worker {shown_worker(worker)}{self._on_host(worker)} ({granted[worker]})"
            for worker in most[:HOLDERS_NAMED_MAX]
        ]
        more = max(0, len(most) - HOLDERS_NAMED_MAX)
        return Held(sum(granted.values()), tuple(named), more)

    def _on_host(self, worker: UUID) -> str:
        host = self.hosts.get(worker)
        return "" if host is None else f" on {host}"

    def _full(self, row: Row, key: str) -> list[str]:
        most, held = row["max_concurrent"], self.held(row, key)
        if most is None or held.slots < most:
            return []
        of_key = f" of key {key!r}" if row["keyed"] else ""
        queue = row["name"].removeprefix("queue:")
        of_queue = "" if queue == row["name"] else f" of queue {queue!r}"
        return [f"slot {held.slots} of {most}{of_key}{of_queue} held by {held}"]

    def _no_token(self, row: Row) -> list[str]:
        at = next_token_at(row, self.now)
        if at is None:
            return []
        closed = row["closed_until"]
        why = _shown_rate(row)
        if closed is not None and closed > self.now:
            why = "an attempt was told to come back later"
        return [f"no token until {shown_instant(at)} ({why})"]


def next_token_at(row: Row, now: dt.datetime) -> dt.datetime | None:
    """When a bucket has its next token; None: it has one, or the limit has no rate."""
    rate = row["rate_per_second"]
    if rate is None:
        return None
    closed = row["closed_until"]
    if closed is not None and closed > now:
        at: dt.datetime = closed
        return at
    refilled: dt.datetime | None = row["refilled_at"]
    if refilled is None:
        return None
    seconds = max(0.0, (now - refilled).total_seconds())
    level = min(row["burst"], row["tokens"] + seconds * rate)
    if level >= 1:
        return None
    return max(now, refilled) + dt.timedelta(seconds=(1 - level) / rate)


def _rate(row: Row) -> list[str]:
    return [] if row["rate_per_second"] is None else [f"at most {_shown_rate(row)}"]


def _shown_rate(row: Row) -> str:
    return str(Rate.of(row["rate_per_second"], row["burst"]))
