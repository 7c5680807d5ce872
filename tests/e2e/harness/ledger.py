"""A file outside of Postgres that says what really happened, whoever died meanwhile.

Every line is one ``write`` to a file opened for appending: lines of several processes
never mix, and what a killed process had written stays. Times are of the machine's
monotonic clock, which all of its processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line.

    Attributes:
        event: ``start``, ``end`` of an activity; ``saw`` of a workflow; ``write`` of a
            worker; whatever else a process wants to prove.
        at: Seconds of the monotonic clock.
        facts: By event.
    """

    event: str
    at: float
    pid: int
    facts: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.facts[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def call(self) -> tuple[str, str]:
        """Which activity call it is about."""
        return self.facts["execution"], self.facts["address"]


class Ledger:
    """Appends to the file and reads all of it."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first write.

        Args:
            path: The file; shared by all processes of a test.
        """
        self.path = path
        self._descriptor: int | None = None

    def write(self, event: str, **facts: object) -> None:
        """Append one line; it survives the death of this process at once."""
        if self._descriptor is None:
            flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY
            self._descriptor = os.open(self.path, flags, 0o644)
        line = {"event": event, "at": time.monotonic(), "pid": os.getpid(), **facts}
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")

    def records(self, *events: str) -> list[Record]:
        """Everything so far, or only these events, in order of writing."""
        if not self.path.exists():
            return []
        found = []
        # What follows the last newline is being written.
        for line in self.path.read_text().split("\n")[:-1]:
            facts = json.loads(line)
            record = Record(
                event=facts.pop("event"),
                at=facts.pop("at"),
                pid=facts.pop("pid"),
                facts=facts,
            )
            if not events or record.event in events:
                found.append(record)
        return found

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def by_call(records: Iterable[Record]) -> Iterator[tuple[Any, list[Record]]]:
    """Records grouped by activity call."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(record.call, []).append(record)
    yield from groups.items()
