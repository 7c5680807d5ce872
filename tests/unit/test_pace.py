"""How far ahead of its slots a worker claims."""

from __future__ import annotations

import time

from stent.services.lanes import TOKEN_SECONDS, Lane, Limit, Load
from stent.services.pace import Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(per_second: int) -> tuple[Pace, Clock]:
    clock = Clock()
    pace = Pace(clock)
    pace.completed = per_second
    clock.now = 1.0
    return pace, clock


def lane_of(*, granted: int, used: int, pace: Pace) -> Lane[None]:
    limit = Limit("function:f", max_concurrent=4, granted=granted, used=used)
    return Lane("default", "f", limits=(limit,), running=used, pace=pace)


def test_nothing_is_fetched_ahead_of_what_takes_long() -> None:
    """Whatever it was would wait here while others are idle."""
    pace, _ = paced(2)
    assert pace.ahead == 0
    assert lane_of(granted=1, used=1, pace=pace).room(100) == 0
    assert lane_of(granted=2, used=1, pace=pace).room(100) == 1


def test_slots_are_not_idle_between_what_is_quick() -> None:
    """A tenth of a second's work; of limited work no more than there are slots."""
    pace, _ = paced(1000)
    assert pace.ahead == 100
    assert lane_of(granted=3, used=3, pace=pace).room(100) == 3


def test_a_lane_without_a_slot_queues_up_for_one() -> None:
    """Other functions of its queue have all slots, and give them back one by one."""
    pace, _ = paced(0)
    lane = lane_of(granted=2, used=2, pace=pace)
    lane.running = 0
    assert lane.room(100) == 1
    assert lane_of(granted=1, used=0, pace=pace).room(100) == 1
    assert lane_of(granted=0, used=0, pace=pace).room(100) == 0


def test_who_takes_turns_has_something_waiting() -> None:
    """Items of a map, for instance, are always there when a slot is free."""
    pace, _ = paced(0)
    lane = lane_of(granted=2, used=2, pace=pace)
    lane.running = 1
    assert lane.room(100) == 0
    assert lane.room(100, contended=True) == 2


def test_what_was_quick_once_is_forgotten() -> None:
    """After a second without an end nothing is fetched ahead."""
    pace, clock = paced(1000)
    assert pace.ahead == 100
    clock.now += 0.5
    assert pace.ahead == 50
    clock.now += 1.5
    assert pace.ahead == 0


def test_a_worker_of_few_at_a_time_fetches_as_few() -> None:
    """``max_concurrent_per_worker`` is kept, and so is its moment's work."""
    pace, _ = paced(2)
    lane: Lane[None] = Lane(
        "default", "f", load=Load(1), per_worker=2, running=1, pace=pace
    )
    assert lane.room(100) == 1
    quick, _ = paced(1000)
    lane = Lane("default", "f", load=Load(2), per_worker=2, running=2, pace=quick)
    assert lane.room(100) == 2


def test_a_function_of_a_worker_is_claimed_in_each_of_its_queues() -> None:
    """One that has no slot waits for its turn; those that take turns have more."""
    pace, _ = paced(0)
    lane: Lane[None] = Lane("b", "f", load=Load(1), per_worker=1, pace=pace)
    assert lane.room(100) == 1
    other: Lane[None] = Lane("a", "f", load=lane.load, per_worker=1, pace=pace)
    assert other.shares(lane)
    lane.load = Load(2)
    lane.per_worker = lane.running = 2
    assert (lane.room(100), lane.room(100, contended=True)) == (0, 2)


def test_a_rate_fetches_no_more_than_the_worker_can_start() -> None:
    """A worker of few slots leaves the others to the fleet."""
    pace, _ = paced(0)
    limit = Limit("function:f", per_second=1000.0, burst=1000, tokens=500)
    lane: Lane[None] = Lane("default", "f", limits=(limit,), pace=pace)
    assert lane.room(2) == 4
    assert lane.room(100) == 200


def test_tokens_are_not_kept() -> None:
    """The bucket is full again by then: they would come on top of it."""
    now = time.monotonic()
    limit = Limit("function:f", per_second=50.0, burst=50)
    limit.pay(5, now)
    assert limit.open
    limit.pay(2, now)
    assert limit.tokens == 7
    limit.pay(3, now - 2 * TOKEN_SECONDS)
    assert limit.lacks_token
    limit.pay(4, now)
    assert (limit.tokens, limit.open) == (4, True)
    slow = Limit("function:g", per_second=0.1, burst=1)
    slow.pay(1, now - 5)
    assert slow.open  # the next one comes in as long
