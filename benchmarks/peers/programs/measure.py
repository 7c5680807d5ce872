"""What the programs of the peers share; runs in their environments, without stent.

A program is started with the URL of a database of its own and a JSON object (``runs``,
``seconds``, ``scale``). It prints a JSON line per figure, and nothing else there.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

ACTIVITIES, STEPS, WORKFLOWS, DISPATCHES, JOBS = 2_000, 500, 500, 100, 2_000
Measured = Callable[[int], Awaitable[float]]


@dataclass
class Bench:
    """Runs workloads within their time and tells what came out.

    Attributes:
        url: The database.
        runs: Of each workload, at most; the median counts.
        seconds: After which no further run of a workload is begun.
        scale: Share of the full size.
    """

    url: str
    runs: int
    seconds: float
    scale: float
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def from_arguments(cls) -> Bench:
        """As the starter said."""
        return cls(sys.argv[1], **json.loads(sys.argv[2]))

    def size(self, full: int) -> int:
        """How many of them."""
        return max(10, int(full * self.scale))

    async def fan_out(self, run: Measured) -> None:
        """W1: ``run(count)`` returns the seconds of one gather of no-op activities."""
        count = self.size(ACTIVITIES)
        times = await self._runs(run, count)
        self._tell("W1", count / statistics.median(times), "/s", len(times))

    async def sequence(self, run: Measured) -> None:
        """W3: ``run(count)`` returns the seconds of ``count`` steps in sequence."""
        count = self.size(STEPS)
        times = await self._runs(run, count)
        ms = statistics.median(times) / count * 1000
        self._tell("W3", ms, "ms a step", len(times))

    async def workflows(self, run: Measured) -> None:
        """W4: ``run(count)`` returns the seconds of workflows of three steps each."""
        count = self.size(WORKFLOWS)
        times = await self._runs(run, count)
        self._tell("W4", count / statistics.median(times), "/s", len(times))

    async def latency(self, run: Callable[[int], Awaitable[object]]) -> None:
        """W5: ``run(number)`` dispatches one no-op and checks its result."""
        times = []
        began = time.perf_counter()
        for number in range(self.size(DISPATCHES)):
            at = time.perf_counter()
            await run(number)
            times.append((time.perf_counter() - at) * 1000)
            if len(times) >= 10 and time.perf_counter() - began > self.seconds:
                break
        times.sort()
        self._tell("W5", statistics.median(times), "ms", len(times))

    async def jobs(self, run: Measured) -> None:
        """J1: ``run(count)`` returns the seconds from enqueuing jobs to all done."""
        count = self.size(JOBS)
        times = await self._runs(run, count)
        self._tell("J1", count / statistics.median(times), "/s", len(times))

    async def _runs(self, run: Measured, count: int) -> list[float]:
        times: list[float] = []
        began = time.perf_counter()
        # A small one first: connections are made, statements prepared, code imported.
        await run(10)
        while len(times) < self.runs:
            times.append(await run(count))
            if time.perf_counter() - began > self.seconds:
                break
        return times

    def _tell(self, name: str, value: float, unit: str, runs: int) -> None:
        line = {"id": name, "value": value, "unit": unit, "runs": runs}
        print(json.dumps(line), file=sys.__stdout__, flush=True)


def check(found: object, wanted: object) -> None:
    """A figure of work that was not done right is worth nothing."""
    if found != wanted:
        message = f"expected {wanted!r}, got {found!r}"
        raise AssertionError(message)
