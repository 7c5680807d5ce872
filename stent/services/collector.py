"""Python's garbage collector while a worker runs.

A worker keeps thousands of executions in memory that are no garbage. A full collection
looks at all of them, and by default one follows on every hundred young ones: half of
the time of a worker with 5 000 executions. What is really lost in cycles is young, and
is found as before.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (2_000, 10, 100)
"""At least; see ``gc.set_threshold``."""

_Thresholds = tuple[int, int, int]


class _Collector:
    """What the workers of this process have changed."""

    workers = 0
    before: _Thresholds = (0, 0, 0)
    ours: _Thresholds = (0, 0, 0)


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Raise the thresholds while any worker of the process is in here.

    Thresholds that are higher stay, and so does a collector that is switched off. What
    somebody else sets in the meantime stays, too.
    """
    _Collector.workers += 1
    if _Collector.workers == 1:
        before = gc.get_threshold()
        young, middle, old = map(max, before, THRESHOLDS)
        _Collector.before = before
        _Collector.ours = (young if before[0] else 0, middle, old)
        gc.set_threshold(*_Collector.ours)
    try:
        yield
    finally:
        _Collector.workers -= 1
        if not _Collector.workers and gc.get_threshold() == _Collector.ours:
            gc.set_threshold(*_Collector.before)
