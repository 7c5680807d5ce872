"""From where claims look: cheap ones at the beginning, dear ones at a mark."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

from stent.clock import DatabaseClock
from stent.services.low_mark import (
    ALWAYS,
    MARGIN,
    PAUSE_SECONDS_MAX,
    PRIORITIES_MAX,
    Look,
    LowMark,
)

START = dt.datetime(2024, 5, 1, tzinfo=dt.UTC)
DEAR = 0.05
CHEAP = 0.001
COUNT = 10


@dataclass
class Claims:
    """A claimer whose claims bring what the test says, at the time it says."""

    seconds: float = 0.0
    lines: str = "a"
    mark: LowMark = field(init=False)

    def __post_init__(self) -> None:
        clock = DatabaseClock(lambda: self.seconds)
        clock.observe(START, 0.0, 0.0)
        self.mark = LowMark(clock, lambda: self.seconds)

    def look(self) -> Look:
        return self.mark.next(self.lines)

    def claim(self, rows: list[dict[str, Any]], took: float) -> bool:
        return self.mark.claimed(self.look(), rows, COUNT, took)

    def at(self) -> dt.datetime:
        return START + dt.timedelta(seconds=self.seconds)


def rows(count: int, at: dt.datetime, *priorities: int) -> list[dict[str, Any]]:
    found = priorities or (0,)
    return [
        {"priority": found[n % len(found)], "available_at": at} for n in range(count)
    ]


def test_cheap_claims_look_at_everything() -> None:
    """Full or not: there is nothing to be saved."""
    claims = Claims()
    for count in (0, 3, COUNT, 3):
        claims.seconds += 1
        assert claims.look().low is ALWAYS
        assert claims.look().priorities == ()
        assert claims.claim(rows(count, START), CHEAP) is (count == COUNT)


def test_dear_claims_begin_where_everything_was_taken() -> None:
    """Before a claim that was not full, less what may not have been committed yet."""
    claims = Claims(seconds=100)
    assert not claims.claim(rows(3, START, 0, 7), DEAR)
    claims.seconds += 1
    look = claims.look()
    assert look.low == START + dt.timedelta(seconds=100) - MARGIN
    assert look.priorities == [0, 7]
    assert not claims.claim([], CHEAP)
    claims.seconds += 1
    assert claims.look().low == START + dt.timedelta(seconds=101) - MARGIN


def test_now_and_then_a_claim_looks_at_everything() -> None:
    """The dearer the rarer, but within seconds."""
    claims = Claims(seconds=100)
    claims.claim(rows(1, START), 60.0)
    claims.seconds += PAUSE_SECONDS_MAX - 0.1
    assert claims.look().low > ALWAYS
    claims.seconds += 0.2
    assert claims.look().low is ALWAYS
    claims.claim([], CHEAP)
    assert claims.look().low is ALWAYS


def test_full_claims_begin_where_the_last_one_ended() -> None:
    """And when one is not full, another one looks at what was before it."""
    claims = Claims(seconds=100)
    claims.claim(rows(1, START), DEAR)
    settled = claims.look().low
    claims.seconds += 10 * 0.5
    assert claims.claim(rows(COUNT, claims.at()), DEAR)
    assert claims.look().low == claims.at()
    assert claims.claim(rows(2, claims.at()), CHEAP)
    assert claims.look().low == settled
    assert not claims.claim([], CHEAP)
    assert claims.look().low > settled


def test_full_of_several_priorities_leaves_no_mark() -> None:
    """Of the lower ones older rows may be left."""
    claims = Claims(seconds=100)
    claims.claim(rows(1, START), DEAR)
    settled = claims.look().low
    assert claims.claim(rows(COUNT, claims.at(), 1, 2), CHEAP)
    assert claims.look().low == settled


def test_what_a_mark_has_missed_follows_at_once() -> None:
    """Not one claim's worth at each look from the beginning."""
    claims = Claims(seconds=100)
    assert not claims.claim([], DEAR)
    claims.seconds += PAUSE_SECONDS_MAX
    assert claims.look().low is ALWAYS
    for _ in range(3):
        assert claims.claim(rows(COUNT, START), DEAR)
        assert claims.look().low <= START
    assert claims.claim(rows(2, START), DEAR) or claims.look().low is ALWAYS


def test_other_functions_have_no_mark() -> None:
    """What waits for a function that was not asked for is not behind it."""
    claims = Claims(seconds=100)
    claims.claim(rows(1, START), DEAR)
    assert claims.look().low > ALWAYS
    claims.lines = "b"
    assert claims.look().low is ALWAYS


def test_reset_and_too_many_priorities_look_at_everything() -> None:
    claims = Claims(seconds=100)
    claims.claim(rows(1, START), DEAR)
    claims.mark.reset()
    assert claims.look().low is ALWAYS
    claims.claim(rows(9, START, *range(9)), DEAR)
    assert claims.look().low > ALWAYS
    claims.claim(rows(PRIORITIES_MAX, START, *range(PRIORITIES_MAX + 1)), DEAR)
    claims.claim(rows(9, START, *range(20, 29)), DEAR)
    assert claims.look().priorities == ()
