"""Who this worker is right now: its id, its incarnation and its two fences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from stent.clock import DatabaseClock
from stent.settings import Settings


@dataclass(slots=True)
class Identity:
    """Shared by the services of one worker; only the writer and the claimer write.

    Attributes:
        worker_id: Fresh per process, never reused.
        incarnation: Grows each time somebody takes the worker's work away.
        flush: Number of the last flush known to be committed.
        claim: Number of the last claim known to be committed.
        settings: Of the process.
        clock: Estimate of database time.
    """

    worker_id: UUID
    settings: Settings
    clock: DatabaseClock
    incarnation: int = 1
    flush: int = 0
    claim: int = 0

    def now_us(self) -> int:
        """Database time in microseconds since 1970, estimated."""
        return int(self.clock.timestamp() * 1e6)


def make_call_ids(execution_id: UUID) -> Callable[[str], UUID]:
    """The function from addresses to call ids of one execution, as in the schema."""
    prefix = hashlib.md5(str(execution_id).encode(), usedforsecurity=False)

    def call_id(address: str) -> UUID:
        state = prefix.copy()
        state.update(address.encode())
        return UUID(bytes=state.digest())

    return call_id
