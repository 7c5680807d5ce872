"""Lets go of executions that only wait: which ones, and how that is written.

What is let go of has no owner any more. It is claimed again when its time comes or its
inbox has something, by any worker, and replayed. See docs/decisions/0014-letting-go.md.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stent.errors import StoreError
from stent.log import get_logger
from stent.services.residents import Resident, instant
from stent.services.turn_items import is_idle, wake_time
from stent.services.writer import execution_missed
from stent.store.flush import Flush, Flushed

log = get_logger(__name__)

IDLE_SECONDS_MIN = 1.0
"""What has waited for less is not let go of: most of it goes on in a moment."""
ROOM_KEPT = 200
"""So many executions more may become resident, if others can be let go of."""
ROOM_KEPT_SHARE = 4
"""No more than this part of all."""
DUE_SOON_SHARE = 6
"""What wakes up within this part of ``evict_after`` is let go of for want of room only.
"""


def room_kept(resident_max: int) -> int:
    """How many executions there should be room for."""
    return max(1, min(ROOM_KEPT, resident_max // ROOM_KEPT_SHARE))


@dataclass(frozen=True, slots=True)
class Moment:
    """What decides about evictions, at one moment.

    Attributes:
        monotonic: ``time.monotonic()``.
        now_us: Database time, microseconds.
        evict_after: How long what only waits may stay.
        surplus: How many have to go for want of room.
    """

    monotonic: float
    now_us: int
    evict_after: dt.timedelta
    surplus: int


def choose(residents: Iterable[Resident], moment: Moment) -> list[Resident]:
    """Who has to go: what waits for long, then the least recently used.

    An execution whose closing would run code of its user goes last: only for want of
    room, and after all others.
    """
    evict_after = moment.evict_after.total_seconds()
    oldest = moment.monotonic - min(IDLE_SECONDS_MIN, evict_after)
    idle = [
        resident
        for resident in residents
        if 0 < resident.idle_since <= oldest
        and not resident.leaving
        and _evictable(resident)
    ]
    waited = moment.monotonic - evict_after
    soon = moment.now_us + int(evict_after / DUE_SOON_SHARE * 1e6)
    chosen = [
        resident
        for resident in idle
        if resident.idle_since <= waited
        and not _wakes_before(resident, soon)
        and not _cleans_up(resident)
    ]
    missing = moment.surplus - len(chosen)
    if missing <= 0:
        return chosen
    taken = {resident.execution_id for resident in chosen}
    others = [r for r in idle if r.execution_id not in taken]
    return chosen + _least_recently_used(others, missing)


def _least_recently_used(residents: list[Resident], count: int) -> list[Resident]:
    chosen: list[Resident] = []
    last: list[Resident] = []
    for resident in sorted(residents, key=lambda resident: resident.idle_since):
        if len(chosen) == count:
            return chosen
        (last if _cleans_up(resident) else chosen).append(resident)
    return (chosen + last)[:count]


def _evictable(resident: Resident) -> bool:
    # One that was asked to stop has little time: its owner keeps it.
    return is_idle(resident) and resident.run.cancelled is None


def _wakes_before(resident: Resident, then_us: int) -> bool:
    wake_us = wake_time(resident)
    return wake_us is not None and wake_us < then_us


def _cleans_up(resident: Resident) -> bool:
    if resident.cleans_up is None:
        resident.cleans_up = resident.run.cleans_up()
    return resident.cleans_up


@dataclass(slots=True, eq=False)
class Evict:
    """Give an execution that waits to whoever comes when it wakes; see ``Item``."""

    resident: Resident
    on_evicted: Callable[[Resident], None]
    on_kept: Callable[[Resident], None]
    size: int = 0
    rows: int = 1
    wrote: bool = False

    def contribute(self, flush: Flush) -> None:
        """Unless it has got something to do in the meantime."""
        resident = self.resident
        # Once it was written it stays so: the flush may be written again, in parts.
        if not self.wrote and (resident.gone or not _evictable(resident)):
            return
        self.wrote = True
        # From here on results of its calls go to its inbox, also those of this flush.
        resident.releasing = True
        wake_us = wake_time(resident)
        wake_at = None if wake_us is None else instant(wake_us)
        flush.fences.append((resident.execution_id, resident.epoch))
        flush.marks.append(
            (resident.execution_id, None, wake_at, None, None, None, None, None, True)
        )

    def missed(self, flushed: Flushed) -> str | None:
        """By the execution's row; one that is locked goes on waiting here."""
        missed = execution_missed(self.resident.execution_id, flushed)
        if missed == "busy":
            self._take_back()
        return missed

    def committed(self) -> None:
        """It is nobody's now, unless it had something to do."""
        if self.wrote:
            self.on_evicted(self.resident)
        else:
            self.on_kept(self.resident)

    def lost(self) -> None:
        """It is somebody else's already, or it has ended."""
        self.on_evicted(self.resident)

    def refused(self, error: StoreError) -> None:
        """It stays."""
        log.warning(
            "execution.eviction_refused",
            execution_id=str(self.resident.execution_id),
            error=str(error),
        )
        self._take_back()
        self.on_kept(self.resident)

    def _take_back(self) -> None:
        self.wrote = self.resident.releasing = False
