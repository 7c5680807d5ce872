"""Where time and ids come from: the database's clock as known here, and uuid v7."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias
from uuid import UUID

from stent.errors import StoreError

Instant: TypeAlias = datetime
"""A point in time: a datetime that knows its zone; UTC wherever stent makes it."""

RandomBytes: TypeAlias = Callable[[int], bytes]
"""Returns that many random bytes, as ``os.urandom`` and ``Random(seed).randbytes``."""

CLOCK_DRIFT_MAX: Final = 500e-6
"""Seconds a second by which two clocks may part: the fastest slew NTP allows itself."""

_RANDOM_BYTES: Final = 10
_TIME_BITS_MAX: Final = 2**48 - 1


class DatabaseClock:
    """Estimates the database's clock from this machine's monotonic clock.

    Everything durable counts in database time, yet asking for it costs a round trip.
    Each answer of the database that carries its time is shown to ``observe``; between
    answers the monotonic clock carries the estimate on. The wall clock of this machine
    is never read, so setting it changes nothing.

    An observation is off by at most half its round trip, and by ``CLOCK_DRIFT_MAX`` a
    second more as it ages. A new one replaces the old when it is at least as certain,
    or when it contradicts the old: then one of the clocks was set or this machine
    slept, and what was known before is void.

    ``now`` never decreases. After the database's clock was set back it stands still
    until that clock has caught up, as do the timers that the database itself compares.
    Safe to share between threads.

    Args:
        monotonic: Seconds that never decrease, from any origin.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._best: _Observation | None = None
        self._last_timestamp = float("-inf")

    def observe(
        self, database_time: Instant, sent_monotonic: float, received_monotonic: float
    ) -> None:
        """Learn from one answer of the database.

        Args:
            database_time: What ``clock_timestamp()`` said; its zone is known.
            sent_monotonic: Seconds, read just before the query was sent.
            received_monotonic: Seconds, read just after the answer arrived.
        Raises:
            ValueError: ``database_time`` has no zone, or received precedes sent.
        """
        if database_time.utcoffset() is None:
            message = f"database_time must know its zone, {database_time} does not"
            raise ValueError(message)
        if received_monotonic < sent_monotonic:
            message = f"received {received_monotonic} precedes sent {sent_monotonic}"
            raise ValueError(message)
        middle = (sent_monotonic + received_monotonic) / 2
        seen = _Observation(
            offset=database_time.timestamp() - middle,
            error=(received_monotonic - sent_monotonic) / 2,
            taken_at=received_monotonic,
        )
        with self._lock:
            best = self._best
            if best is None or best.yields_to(seen):
                self._best = seen

    def now(self) -> Instant:
        """Return the estimated database time, in UTC; never less than before.

        Raises:
            StoreError: Nothing was observed yet; the worker has not connected.
        """
        return datetime.fromtimestamp(self.timestamp(), tz=UTC)

    def timestamp(self) -> float:
        """Return ``now`` as seconds since 1970-01-01 UTC.

        Raises:
            StoreError: Nothing was observed yet; the worker has not connected.
        """
        with self._lock:
            if self._best is None:
                message = "the database's time is not known before the first connection"
                raise StoreError(message, retryable=True)
            estimate = self._monotonic() + self._best.offset
            self._last_timestamp = max(self._last_timestamp, estimate)
            return self._last_timestamp


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observation:
    """One answer. Seconds throughout; ``taken_at`` is monotonic."""

    offset: float
    error: float
    taken_at: float

    def yields_to(self, newer: _Observation) -> bool:
        age = max(newer.taken_at - self.taken_at, 0.0)
        error = self.error + age * CLOCK_DRIFT_MAX
        contradicted = abs(newer.offset - self.offset) > error + newer.error
        return contradicted or newer.error <= error


def new_execution_id(
    timestamp_seconds: float, random_bytes: RandomBytes = os.urandom
) -> UUID:
    """Make a time-ordered id: a uuid v7 of 48 bits of milliseconds and 74 random bits.

    Args:
        timestamp_seconds: Database time since 1970-01-01 UTC.
        random_bytes: The source of chance; called once.
    Raises:
        ValueError: The time is before 1970 or beyond the year 10889.
    Source: RFC 9562, section 5.7
    """
    milliseconds = int(timestamp_seconds * 1_000)
    if timestamp_seconds < 0 or milliseconds > _TIME_BITS_MAX:
        message = f"a uuid v7 cannot carry the time {timestamp_seconds} s"
        raise ValueError(message)
    return _version_7(milliseconds, random_bytes(_RANDOM_BYTES))


def child_execution_id(parent: UUID, address: str) -> UUID:
    """Derive the id of the execution that ``parent`` starts at ``address``.

    The same pair gives the same id on every machine and Python version. It keeps the
    parent's 48 time bits, so a family lies in one partition; the other 74 bits are a
    hash of the pair.
    """
    digest = hashlib.blake2b(
        parent.bytes + address.encode("utf-8", "surrogatepass"),
        digest_size=_RANDOM_BYTES,
        person=b"stent.child",
    ).digest()
    return _version_7(parent.int >> 80, digest)


def _version_7(milliseconds: int, chance: bytes) -> UUID:
    """Lay out 48 bits of time, version 7, 12 bits, variant 10, 62 bits."""
    bits = int.from_bytes(chance, "big")
    high, low = (bits >> 62) & 0xFFF, bits & (2**62 - 1)
    return UUID(int=milliseconds << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low)
