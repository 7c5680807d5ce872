"""Which calls would overtake a more urgent task if they ran here at once."""

from __future__ import annotations

from collections import Counter

from stent.store.store import BELOW_ALL


class Precedence:
    """Knows, of one worker, the most urgent task that waits for its slots.

    Calls of lower priority queue up behind it. Those of the same do not: that would
    take from a worker that is behind what lets it catch up.

    A task waits from when there is no slot for its call until a claim that began after
    it was inserted; what that claim leaves, until the next.
    """

    def __init__(self) -> None:
        self._coming: Counter[int] = Counter()
        """Executions with calls that are being inserted, by the highest priority."""
        self._inserted = self._looked_for = self._left = BELOW_ALL
        self._bar = BELOW_ALL

    def queued(self, before: int | None, priority: int) -> int:
        """There is no slot for a call of an execution: it becomes a task.

        Args:
            before: The highest priority of others of this execution that are coming.
            priority: Of the call.

        Returns:
            The highest one now.
        """
        if before is not None and before >= priority:
            return before
        self._withdraw(before)
        self._coming[priority] += 1
        self._bar = max(self._bar, priority)
        return priority

    def inserted(self, priority: int) -> None:
        """What ``queued`` returned has been committed."""
        self._withdraw(priority)
        self._inserted = max(self._inserted, priority)
        self._set_bar()

    def dropped(self, priority: int) -> None:
        """What ``queued`` returned will never be committed."""
        self._withdraw(priority)
        self._set_bar()

    def _withdraw(self, priority: int | None) -> None:
        if priority is not None:
            self._coming[priority] -= 1
            if not self._coming[priority]:
                del self._coming[priority]

    def begin_claim(self) -> None:
        """What was inserted by now will be found."""
        self._looked_for = max(self._looked_for, self._inserted)
        self._inserted = BELOW_ALL

    def end_claim(self, left: int = BELOW_ALL) -> None:
        """The most urgent that it may have left has the priority ``left``."""
        self._looked_for, self._left = BELOW_ALL, left
        self._set_bar()

    def _set_bar(self) -> None:
        coming = max(self._coming, default=BELOW_ALL)
        self._bar = max(coming, self._inserted, self._looked_for, self._left)

    def holds_back(self, priority: int) -> bool:
        """Whether a more urgent task waits."""
        return priority < self._bar
