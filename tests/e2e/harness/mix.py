"""All workflows at once, with pauses in which something can happen to their workers."""

from __future__ import annotations

import asyncio
from typing import Any

from stent import DurableFunction, Stent
from tests.e2e.harness import workload

PAUSE = 0.03
RESULT_SECONDS = 60
ROWS = 4
PROGRAMS: dict[str, tuple[DurableFunction[Any, Any], tuple[Any, ...]]] = {
    "sequence": (workload.sequence, (6, PAUSE)),
    "fan-out": (workload.fan_out, (12, PAUSE)),
    "race": (workload.race, (3, PAUSE)),
    "sleep": (workload.sleeper, (2, "200ms")),
    "children": (workload.family, (4, PAUSE)),
    "map": (workload.mapped, (60, PAUSE / 6)),
    "map of a stream": (workload.mapped_stream, (8, PAUSE)),
    "retries": (workload.retried, (6,)),
    "transactions": (workload.transactional, (ROWS,)),
}


def expected_results() -> dict[str, int]:
    """What each workflow returns when nothing happens to it."""
    return {
        "sequence": sum(2 * n for n in range(6)),
        "fan-out": sum(2 * n + 2 * (1000 + n) for n in range(12)),
        "race": sum(2 * n for n in range(3)),
        "sleep": sum(2 * n for n in range(2)),
        "children": sum(2 * (2 * n + 100) for n in (*range(4), 500)),
        "map": sum(2 * n for n in range(61)),
        "map of a stream": sum(
            2 * (200 * row + n) for row in range(3) for n in range(8)
        )
        + 2 * sum(2 * n for n in range(8)),
        "retries": sum(2 * n for n in range(6)),
        "transactions": sum(2 * n for n in range(ROWS)),
    }


class Mix:
    """Executions of all workflows."""

    def __init__(self, app: Stent) -> None:
        """Create it; ``app`` dispatches."""
        self._app = app
        self._outcomes: list[tuple[str, asyncio.Task[Any]]] = []
        self.inserted: dict[str, int] = {}

    async def dispatch(self) -> None:
        """One more of each."""
        for name, (function, args) in PROGRAMS.items():
            execution_id = await self._app.dispatch(function, *args)
            outcome = asyncio.create_task(
                self._app.wait_for(execution_id, RESULT_SECONDS)
            )
            self._outcomes.append((name, outcome))
            if name == "transactions":
                self.inserted[execution_id] = ROWS

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return all(outcome.done() for _, outcome in self._outcomes)

    async def results(self) -> list[tuple[str, object]]:
        """Names and results, once all have ended."""
        return [(name, (await outcome).unwrap()) for name, outcome in self._outcomes]

    @property
    def expected(self) -> list[tuple[str, object]]:
        """What ``results`` should be."""
        expected = expected_results()
        return [(name, expected[name]) for name, _ in self._outcomes]
