"""What one flush writes, as arrays of the composite types of ``0001_initial.sql``.

A list holds tuples in the order of the type's fields; see there for what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

Row = tuple[Any, ...]


@dataclass(slots=True)
class Flush:
    """The content of one flush, by kind.

    Attributes:
        suspected: Calls that a lost worker may have been running.
        reached: Executions that get something into their inbox.
        orphaning: Executions that end and may have started others.
    """

    fences: list[Row] = field(default_factory=list)
    turns: list[Row] = field(default_factory=list)
    results: list[Row] = field(default_factory=list)
    marks: list[Row] = field(default_factory=list)
    tasks: list[Row] = field(default_factory=list)
    payloads: list[Row] = field(default_factory=list)
    drops: list[Row] = field(default_factory=list)
    children: list[Row] = field(default_factory=list)
    cancels: list[Row] = field(default_factory=list)
    tells: list[Row] = field(default_factory=list)
    inbox: list[Row] = field(default_factory=list)
    attempts: list[Row] = field(default_factory=list)
    finishes: list[Row] = field(default_factory=list)
    settles: list[Row] = field(default_factory=list)
    retries: list[Row] = field(default_factory=list)
    segments: list[Row] = field(default_factory=list)
    releases: list[Row] = field(default_factory=list)
    suspected: list[Row] = field(default_factory=list)
    reached: set[UUID] = field(default_factory=set)
    orphaning: set[UUID] = field(default_factory=set)

    def binds(self) -> dict[str, list[Row] | set[UUID] | None]:
        """The lists by the names that the query uses; empty ones cost least as None."""
        return {name: getattr(self, name) or None for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a flush did not do, and who should hear of it.

    Attributes:
        lost: Executions that belong to somebody else, or have ended.
        busy: Executions locked by somebody; try again with the next flush.
        lost_tasks: Calls whose task is not ours any more.
        busy_tasks: Calls whose task is locked by somebody.
        workers: Owners of executions that got something in their inbox.
        ended: (client, execution): a process and what it waited for.
        queues: Where executions without an owner got something in their inbox.
    """

    lost: frozenset[UUID] = frozenset()
    busy: frozenset[UUID] = frozenset()
    lost_tasks: frozenset[UUID] = frozenset()
    busy_tasks: frozenset[UUID] = frozenset()
    workers: tuple[UUID, ...] = ()
    ended: tuple[tuple[UUID, UUID], ...] = ()
    queues: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True when everything was written."""
        return not (self.lost or self.busy or self.lost_tasks or self.busy_tasks)
