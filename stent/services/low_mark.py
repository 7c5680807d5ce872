"""From where a claim looks for tasks, so that it does not walk over what is gone.

What was claimed and settled stays in the ready index until no old transaction can see
it any more. A claim that begins at the beginning then walks over all of it, and takes
milliseconds, or tenths of a second. It need not: what became available before a claim
that found less than it asked for has been taken. So while claims from the beginning are
dear, they are made now and then only, and the others begin at a mark.

What a mark can miss is found by the next claim from the beginning: a row whose
transaction took longer than MARGIN to commit, and one that another claim had locked and
gave back.

The index is sorted by priority before it is by time, so a claim names the priorities
that this worker has met, and searches the gaps between them for others.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stent.clock import DatabaseClock

ALWAYS = dt.datetime(1, 1, 2, tzinfo=dt.UTC)
"""A mark below everything."""
MARGIN = dt.timedelta(seconds=5)
"""A row is committed no later than this after it says it became available."""
CHEAP_SECONDS = 0.002
CHEAP_SECONDS_PER_ROW = 0.00005
SHARE = 1500
"""Claims from the beginning take a part of the time no greater than one in so many."""
PAUSE_SECONDS_MAX = 20.0
PRIORITIES_MAX = 20
"""With more than that a claim probes too much; it begins at the beginning."""


@dataclass(frozen=True, slots=True)
class Look:
    """One claim to make.

    Attributes:
        low: Nothing that became available earlier is looked at.
        priorities: Those that are looked at by name; the others are looked for.
        began_at: In database time.
        passing: The mark counts only while claims come back full.
    """

    low: dt.datetime
    priorities: Sequence[int]
    began_at: dt.datetime
    passing: bool


class LowMark:
    """Of one worker's claims: of all its unlimited tasks, or of a limited function."""

    def __init__(
        self, clock: DatabaseClock, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._lines: Hashable = None
        self._priorities = {0}
        self._thorough_at = 0.0
        self._settled = ALWAYS
        """What became available earlier has been taken."""
        self._passing: dt.datetime | None = None
        """The same, of the priority that the last claim was full of."""

    def reset(self) -> None:
        """Begin at the beginning."""
        self._settled, self._passing, self._thorough_at = ALWAYS, None, 0.0

    def next(self, lines: Hashable) -> Look:
        """What to look at now.

        Args:
            lines: The queues and functions; other ones than before have no mark.
        """
        if lines != self._lines:
            self._lines = lines
            self.reset()
        low = max(self._settled, self._passing or ALWAYS)
        if self._monotonic() >= self._thorough_at or not self._is_worth(low):
            return Look(ALWAYS, (), self._clock.now(), passing=False)
        passing = self._passing is not None
        return Look(low, sorted(self._priorities), self._clock.now(), passing)

    def _is_worth(self, low: dt.datetime) -> bool:
        return low > ALWAYS and len(self._priorities) <= PRIORITIES_MAX

    def claimed(
        self, look: Look, rows: Sequence[Mapping[str, Any]], count: int, seconds: float
    ) -> bool:
        """Learn from a claim; whether another one may find more at once.

        Args:
            look: What was looked at.
            rows: What it brought.
            count: What was asked for.
            seconds: How long it took.
        """
        self._priorities.update(row["priority"] for row in rows)
        if any(row["available_at"] < self._settled for row in rows):
            # A mark has missed these, and what it has missed is seldom alone.
            self._settled = ALWAYS
        self.looked(look, seconds, len(rows))
        if len(rows) >= count:
            self._passing = _passed(rows)
            return True
        self._passing = None
        if not look.passing:
            self._settled = max(self._settled, look.began_at - MARGIN)
        return look.passing

    def looked(self, look: Look, seconds: float, count: int = 0) -> None:
        """Learn how dear a look from the beginning is, which brought so many rows."""
        if look.low is ALWAYS:
            dear = seconds - CHEAP_SECONDS - CHEAP_SECONDS_PER_ROW * count
            pause = min(PAUSE_SECONDS_MAX, SHARE * max(0.0, dear))
            self._thorough_at = self._monotonic() + pause


def _passed(rows: Sequence[Mapping[str, Any]]) -> dt.datetime | None:
    """Before which nothing is left, after a claim that took all it asked for.

    The rows are the oldest of their priority; of lower priorities nothing is known.
    """
    if len({row["priority"] for row in rows}) > 1:
        return None
    latest: dt.datetime = max(row["available_at"] for row in rows)
    return latest
