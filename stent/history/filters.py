"""The one filter language of lists of executions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self
from uuid import UUID

from sqlalchemy import Select, and_, any_, bindparam

from stent.errors import UsageError
from stent.history.tables import EXECUTIONS
from stent.model import Status

LIMIT_MAX = 500
LIMIT = 100
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_TIME_BITS = 0xFFFF_FFFF_FFFF << 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which executions, checked; None means any."""

    status: tuple[Status, ...] | None = None
    function: str | None = None
    tag: str | None = None
    queue: str | None = None
    parent: UUID | None = None
    root: UUID | None = None
    limit: int = LIMIT
    before: UUID | None = None

    @classmethod
    def read(cls, given: dict[str, Any]) -> Self:
        """Check filters as users write them.

        Raises:
            UsageError: A filter is unknown or its value makes no sense.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            message = (
                f"unknown filter {unknown[0]!r}; filters are: "
                f"{', '.join(sorted(known))}"
            )
            raise UsageError(message)
        return cls(
            status=_statuses(given.get("status")),
            limit=_limit(given.get("limit")),
            function=_text("function", given),
            tag=_text("tag", given),
            queue=_text("queue", given),
            parent=_id("parent", given),
            root=_id("root", given),
            before=_id("before", given),
        )

    def applied_to(self, statement: Select[Any]) -> Select[Any]:
        """Newest first; ids begin with a time, so their order is one of time."""
        rows = EXECUTIONS.c
        if self.status is not None:
            values = [str(status) for status in self.status]
            statement = statement.where(
                rows.status == any_(bindparam("statuses", values))
            )
        if self.function is not None:
            statement = statement.where(rows.function == self.function)
        if self.queue is not None:
            statement = statement.where(rows.queue == self.queue)
        if self.tag is not None:
            # The first condition is that of the partial index.
            empty: Any = bindparam("no_tags", [])
            tags: Any = bindparam("tags", [self.tag])
            statement = statement.where(
                and_(rows.tags != empty, rows.tags.op("@>")(tags))
            )
        if self.parent is not None:
            statement = statement.where(rows.parent_id == self.parent)
        if self.root is not None:
            # Descendants share the time of their root: a range of the primary key.
            first = UUID(int=self.root.int & _TIME_BITS)
            last = UUID(int=first.int | ~_TIME_BITS & (1 << 128) - 1)
            statement = statement.where(
                rows.root_id == self.root, rows.execution_id.between(first, last)
            )
        if self.before is not None:
            statement = statement.where(rows.execution_id < self.before)
        return statement.order_by(rows.execution_id.desc()).limit(self.limit)


def _statuses(value: Any) -> tuple[Status, ...] | None:
    if value is None:
        return None
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, Iterable):
        message = f"status is {value!r}; it must be one status or several"
        raise UsageError(message)
    try:
        return tuple(Status(one) for one in several)
    except ValueError:
        message = f"status is {value!r}; statuses are: {', '.join(Status)}"
        raise UsageError(message) from None


def _limit(value: Any) -> int:
    if value is None:
        return LIMIT
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and 1 <= value <= LIMIT_MAX
    ):
        return value
    message = f"limit is {value!r}; it must be a number from 1 to {LIMIT_MAX}"
    raise UsageError(message)


def _text(name: str, given: dict[str, Any]) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, str) and not _UNSTORABLE.search(value):
        return value
    message = f"{name} is {value!r}; it must be a text that Postgres can hold"
    raise UsageError(message)


def _id(name: str, given: dict[str, Any]) -> UUID | None:
    value = given.get(name)
    if value is None or isinstance(value, UUID):
        return value
    try:
        return UUID(value)
    except (ValueError, AttributeError, TypeError):
        message = f"{name} is {value!r}; it must be the id of an execution"
        raise UsageError(message) from None
