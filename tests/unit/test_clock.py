"""The estimate of the database's clock, and time-ordered ids."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stent.clock import (
    CLOCK_DRIFT_MAX,
    DatabaseClock,
    child_execution_id,
    new_execution_id,
)
from stent.errors import StoreError

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


class Monotonic:
    """A monotonic clock that moves when told."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


def observe(
    clock: DatabaseClock,
    monotonic: Monotonic,
    database_time: datetime,
    round_trip: float = 0.0,
) -> None:
    """Answer a query whose reply arrived this very moment."""
    clock.observe(database_time, monotonic.seconds - round_trip, monotonic.seconds)


def test_unknown_before_the_first_observation() -> None:
    """No guess is made from the wall clock; the error is one to wait out."""
    with pytest.raises(StoreError) as caught:
        DatabaseClock().now()
    assert caught.value.retryable


def test_time_goes_on_between_observations() -> None:
    """The monotonic clock carries the estimate; the answer is in UTC."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    zone = timezone(timedelta(hours=2))
    observe(clock, monotonic, NOON.astimezone(zone))
    monotonic.seconds += 90
    assert clock.now() == NOON + timedelta(seconds=90)
    assert clock.now().tzinfo is UTC
    assert clock.timestamp() == (NOON + timedelta(seconds=90)).timestamp()


def test_database_time_belongs_to_the_middle_of_the_round_trip() -> None:
    """Half the round trip has passed since the database read its clock."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    observe(clock, monotonic, NOON, round_trip=0.5)
    assert clock.now() == NOON + timedelta(seconds=0.25)


def test_slow_answer_does_not_spoil_a_good_one() -> None:
    """The smallest round trip is kept while it agrees with the rest."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    observe(clock, monotonic, NOON, round_trip=0.001)
    before = clock.timestamp()
    observe(clock, monotonic, NOON - timedelta(seconds=0.4), round_trip=1.0)
    assert clock.timestamp() == before


def test_old_observation_gives_way() -> None:
    """Once drift may have cost more than the slower answer's error, it is replaced."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    observe(clock, monotonic, NOON)
    monotonic.seconds += 0.02 / CLOCK_DRIFT_MAX
    drifted = clock.now() + timedelta(seconds=0.005)
    observe(clock, monotonic, drifted - timedelta(seconds=0.01), round_trip=0.02)
    assert abs(clock.now() - drifted) < timedelta(microseconds=10)


def test_contradiction_voids_what_was_known() -> None:
    """The database's clock was set forward: a coarse answer beats a precise memory."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    observe(clock, monotonic, NOON, round_trip=0.001)
    observe(clock, monotonic, NOON + timedelta(hours=1), round_trip=2.0)
    assert clock.now() == NOON + timedelta(hours=1, seconds=1)


def test_clock_set_back_stands_still_until_caught_up() -> None:
    """The estimate never decreases, and goes on where the database has arrived."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    observe(clock, monotonic, NOON)
    assert clock.now() == NOON
    observe(clock, monotonic, NOON - timedelta(seconds=60))
    monotonic.seconds += 59
    assert clock.now() == NOON
    monotonic.seconds += 2
    assert clock.now() == NOON + timedelta(seconds=1)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 3_600),
            st.floats(-7_200, 7_200),
            st.floats(0, 10),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_now_never_decreases(steps: list[tuple[float, float, float]]) -> None:
    """Whatever the database says, a later reading is never below an earlier one."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    readings = []
    for pause, error, round_trip in steps:
        monotonic.seconds += pause
        observe(clock, monotonic, NOON + timedelta(seconds=error), round_trip)
        readings.append(clock.now())
    assert readings == sorted(readings)


@given(
    st.floats(-CLOCK_DRIFT_MAX, CLOCK_DRIFT_MAX),
    st.lists(
        st.tuples(st.floats(0, 60), st.floats(1e-4, 1), st.floats(0, 1)),
        min_size=1,
        max_size=30,
    ),
)
def test_estimate_is_as_good_as_the_last_answer(
    drift: float, steps: list[tuple[float, float, float]]
) -> None:
    """With drift in bounds, the error right after an answer is within its bound.

    The answer's database time may lie anywhere in the round trip, not in its middle.
    The clamp may hold an earlier, still permitted reading, so the bound there is the
    largest met so far.
    """
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)

    def true_time(seconds: float) -> float:
        return NOON.timestamp() + (seconds - 1_000) * (1 + drift)

    bound = 0.0
    for pause, round_trip, share in steps:
        monotonic.seconds += pause
        sent = monotonic.seconds
        monotonic.seconds += round_trip
        answered = datetime.fromtimestamp(true_time(sent + share * round_trip), tz=UTC)
        clock.observe(answered, sent, monotonic.seconds)
        bound = max(bound, round_trip / 2 * (1 + CLOCK_DRIFT_MAX))
        error = abs(clock.timestamp() - true_time(monotonic.seconds))
        assert error <= bound + 1e-3 * round_trip + 1e-5


def test_wall_clock_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose clock is a day off, or away, computes the same database time."""

    def refuse() -> float:
        pytest.fail("the wall clock was read")

    monkeypatch.setattr(time, "time", refuse)
    monkeypatch.setattr(time, "time_ns", refuse)
    clock = DatabaseClock()
    read_at = time.monotonic()
    clock.observe(NOON, read_at, read_at)
    first, second = clock.now(), clock.now()
    assert NOON <= first <= second
    assert new_execution_id(clock.timestamp()).int >> 80 >= NOON.timestamp() * 1_000


def test_nonsense_is_refused() -> None:
    """A naive datetime would be read in the host's zone."""
    clock = DatabaseClock()
    with pytest.raises(ValueError, match="zone"):
        clock.observe(NOON.replace(tzinfo=None), 1.0, 2.0)
    with pytest.raises(ValueError, match="precedes"):
        clock.observe(NOON, 2.0, 1.0)


@given(st.floats(0, 2**47 / 1_000), st.binary(min_size=10, max_size=10))
def test_execution_id_is_a_version_7_uuid(seconds: float, chance: bytes) -> None:
    """Version and variant are those of RFC 9562; time leads; 74 bits are chance."""
    made = new_execution_id(seconds, lambda _: chance)
    assert (made.version, made.variant) == (7, RFC_4122)
    assert made.int >> 80 == int(seconds * 1_000)
    bits = int.from_bytes(chance, "big") & (2**74 - 1)
    assert (made.int >> 64 & 0xFFF) << 62 | made.int & (2**62 - 1) == bits


def test_execution_id_of_the_published_example() -> None:
    """The test vector of RFC 9562, appendix A.6."""
    chance = (0xCC3 << 62 | 0x18C4DC0C0C07398F).to_bytes(10, "big")
    made = new_execution_id(0x017F22E279B0 / 1_000, lambda _: chance)
    assert made == UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")


def test_seeded_source_repeats_and_the_default_does_not() -> None:
    """Chance comes from the source given; without one, from the system."""
    seeded = [new_execution_id(1.0, Random(7).randbytes) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len({new_execution_id(1.0) for _ in range(1_000)}) == 1_000


def test_ids_sort_by_time() -> None:
    """A later millisecond is a greater id, whatever the chance."""
    ids = [new_execution_id(second / 1_000) for second in range(1_000)]
    assert ids == sorted(ids)


@pytest.mark.parametrize("seconds", [-1.0, -1e-9, 2**48 / 1_000])
def test_time_out_of_range_is_refused(seconds: float) -> None:
    """Bits that do not fit are not cut off."""
    with pytest.raises(ValueError, match="uuid v7"):
        new_execution_id(seconds)


@given(st.uuids(), st.text(max_size=50))
def test_child_id_keeps_the_time_of_its_parent(parent: UUID, address: str) -> None:
    """The family lies in one partition, and the id is a valid version 7."""
    child = child_execution_id(parent, address)
    assert child.int >> 80 == parent.int >> 80
    assert (child.version, child.variant) == (7, RFC_4122)
    assert child == child_execution_id(parent, address)
    assert child != child_execution_id(parent, f"{address}/0")


def test_child_id_is_fixed_for_all_time() -> None:
    """Journals hold these ids: this value must never change."""
    parent = UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")
    child = child_execution_id(parent, "main/fetch:0")
    assert child == UUID("017f22e2-79b0-7f8d-a1f9-1174bdd4e5be")


def test_lone_surrogate_in_an_address_has_an_id() -> None:
    """A task may be named with any str."""
    assert child_execution_id(UUID(int=0), "\ud800").version == 7
