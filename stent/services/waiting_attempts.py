"""What waits in memory for a slot: the most urgent first, then the oldest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

W = TypeVar("W")


class ByPriority(Generic[W]):
    """A queue for each priority; there are few of these."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[W]] = {}
        self._order: list[int] = []
        """Priorities of queues that are not empty, highest first."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        for priority in self._order:
            yield from self._queues[priority]

    def append(self, priority: int, one: W) -> None:
        """Behind all of the same priority."""
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = deque()
            self._order = sorted(self._queues, reverse=True)
        queue.append(one)
        self._count += 1

    def highest(self, eligible: Callable[[W], bool]) -> int | None:
        """The priority of what ``pop`` would return."""
        for priority in self._order:
            if any(eligible(one) for one in self._queues[priority]):
                return priority
        return None

    def count_above(self, priority: int) -> int:
        """How many are more urgent than that."""
        return sum(len(self._queues[p]) for p in self._order if p > priority)

    def pop(self, eligible: Callable[[W], bool]) -> W | None:
        """Take out the first that may go; None if there is none."""
        for priority in self._order:
            queue = self._queues[priority]
            for index, one in enumerate(queue):
                if eligible(one):
                    del queue[index]
                    self._removed(priority, 1)
                    return one
        return None

    def take(self, unwanted: Callable[[W], bool]) -> list[W]:
        """Take out some."""
        taken: list[W] = []
        for priority in list(self._order):
            queue = self._queues[priority]
            out = [one for one in queue if unwanted(one)]
            if out:
                self._queues[priority] = deque(o for o in queue if not unwanted(o))
                self._removed(priority, len(out))
                taken += out
        return taken

    def _removed(self, priority: int, count: int) -> None:
        self._count -= count
        if not self._queues[priority]:
            del self._queues[priority]
            self._order.remove(priority)
