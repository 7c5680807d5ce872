"""How far ahead to fetch: a moment's work, by what was done lately."""

from __future__ import annotations

import time
from collections.abc import Callable

AHEAD_SECONDS = 0.1


class Pace:
    """Counts what ends.

    Work that is done in microseconds would leave the slots empty while more of it is
    fetched; work that takes seconds is better left to others.
    """

    __slots__ = ("_at", "_completed_before", "_monotonic", "_rate", "completed")

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.completed = 0
        self._monotonic = monotonic
        self._rate = 0.0
        self._at = monotonic()
        self._completed_before = 0

    @property
    def ahead(self) -> int:
        """How much more than there are slots for will begin in a moment."""
        now = self._monotonic()
        elapsed = now - self._at
        if elapsed >= AHEAD_SECONDS:
            rate = (self.completed - self._completed_before) / elapsed
            self._rate = max(rate, self._rate / 2 if elapsed < 1 else 0.0)
            self._at, self._completed_before = now, self.completed
        return int(self._rate * AHEAD_SECONDS)
