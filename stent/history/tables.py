"""The tables that are read, and how a SQLAlchemy statement reaches asyncpg.

Everything a caller gives travels as a bind, so no filter can change a statement. One
look is one read-only transaction on one snapshot: what it shows was true together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import column, func, select, table
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.expression import Executable, TableClause

from stent.store.store import Store

T = TypeVar("T")

STATEMENT_TIMEOUT = timedelta(seconds=10)
"""A look that takes longer is given up by the database."""

_DIALECT = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


def _table(name: str, columns: str) -> TableClause:
    return table(name, *(column(word) for word in columns.split()), schema="stent")


EXECUTIONS = _table(
    "executions",
    "execution_id function kind status queue priority worker_id wake_at deadline_at "
    "cancel_reason cancel_by created_at started_at finished_at root_id parent_id "
    "parent_address detached blocked_reason tags limit_key",
)
TASKS = _table(
    "tasks",
    "execution_id call_id address function queue priority available_at worker_id epoch "
    "attempt is_page arguments limit_key",
)
RESULTS = _table(
    "results",
    "execution_id call_id address ok payload attempt started_at finished_at worker_id",
)
ATTEMPTS = _table(
    "attempts",
    "execution_id call_id attempt address payload started_at finished_at worker_id",
)
JOURNAL = _table("journal", "execution_id position payload recorded_at")
PAYLOADS = _table("payloads", "execution_id call_id payload")
SEGMENTS = _table("segments", "execution_id call_id segment payload")
LOSSES = _table(
    "losses", "execution_id call_id epoch address attempt worker_id lost_at"
)
TELLS = _table("tells", "execution_id call_id address payload told_at")
HEARTBEATS = _table("heartbeats", "execution_id task_id payload recorded_at")
WORKERS = _table("workers", "worker_id incarnation")
LIMITS = _table(
    "limits",
    "name max_concurrent rate_per_second burst keyed paused tokens refilled_at "
    "closed_until",
)
GRANTS = _table("grants", "limit_name worker_id incarnation slots")
SLOTS = _table("slots", "limit_name key execution_id call_id epoch taken_at")
WORKER_FUNCTIONS = _table("worker_functions", "worker_id functions")
LEASES = _table("leases", "worker_id state expires_at host pid queues renewed_at")

_PLANNED_ANEW = {
    "plan_cache_mode": "force_custom_plan",
    "enable_seqscan": "on",
    "enable_hashjoin": "on",
    "enable_mergejoin": "on",
}
"""Whatever is asked: what the session keeps to indexes for is the hot path alone."""


class Look:
    """One read-only transaction."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def rows(self, statement: Executable) -> list[asyncpg.Record]:
        """Run a statement; its values are sent beside it, never inside."""
        text, values = compiled(statement)
        rows: list[asyncpg.Record] = await self._connection.fetch(text, *values)
        return rows


def compiled(statement: Executable) -> tuple[str, list[Any]]:
    """The statement in asyncpg's form, and its values in order."""
    found = statement.compile(dialect=_DIALECT)  # type: ignore[attr-defined]
    names = found.positiontup or []
    return str(found), [found.params[name] for name in names]


async def look(store: Store, use: Callable[[Look], Awaitable[T]], what: str) -> T:
    """Run ``use`` on one snapshot of the database.

    Args:
        store: Whose session is borrowed meanwhile.
        use: Reads what it needs.
        what: Named in an error.

    Raises:
        StoreError: The database is away, or took longer than STATEMENT_TIMEOUT.
    """
    milliseconds = str(STATEMENT_TIMEOUT // timedelta(milliseconds=1))
    settings = {"statement_timeout": milliseconds, **_PLANNED_ANEW}
    local = select(*[func.set_config(*one, True) for one in settings.items()])  # noqa: FBT003 - for this transaction only

    async def within(connection: asyncpg.Connection) -> T:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            one = Look(connection)
            await one.rows(local)
            return await use(one)

    found: T = await store.session.run(within, what)
    return found
