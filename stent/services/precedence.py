"""Which calls would overtake a more urgent task if they ran here at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOBODY = -(2**15) - 1
"""Below every priority."""
COMING_SECONDS = 1.0
"""Within which a call that became a task is committed and claimed, mostly."""


class Precedence:
    """Knows, of one worker, the most urgent task that waits in the database.

    Calls of lower priority queue up behind it. Those of the same do not: that would
    take from a worker that is behind what lets it catch up.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._waiting = NOBODY
        self._coming = NOBODY
        self._coming_until = 0.0

    def queued(self, priority: int) -> None:
        """A call for which there was no slot becomes a task."""
        now = self._monotonic()
        if priority >= self._coming or now >= self._coming_until:
            self._coming, self._coming_until = priority, now + COMING_SECONDS

    def claimed(self, rows: Sequence[Mapping[str, Any]], *, more: bool) -> None:
        """Learn from a claim; ``more``: it may have left some of the last priority."""
        found = more and bool(rows)
        self._waiting = min(row["priority"] for row in rows) if found else NOBODY

    def holds_back(self, priority: int) -> bool:
        """Whether a more urgent task waits."""
        if priority < self._waiting:
            return True
        return priority < self._coming and self._monotonic() < self._coming_until
