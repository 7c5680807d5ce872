"""``History``: the questions people and programs ask about executions."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from stent.errors import ExecutionNotFoundError
from stent.history.entries import entries_of, read_stored
from stent.history.filters import Filter
from stent.history.states import MANY, ONE, read_states, select_executions
from stent.history.tables import EXECUTIONS, Look, look
from stent.model import Entry, ExecutionState
from stent.store.store import Store


class History:
    """Answers from one database.

    Attributes:
        store: Whose connection is used; it is only read from.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    async def state(self, execution_id: str) -> ExecutionState:
        """Everything about one execution at a glance.

        Raises:
            ExecutionNotFoundError: There is no such execution.
            StoreError: The database is away or the answer takes too long.
        """
        identifier = _parse(execution_id)

        async def read(look: Look) -> list[ExecutionState]:
            own = EXECUTIONS.c.execution_id == identifier
            rows = await look.rows(select_executions().where(own))
            return await read_states(look, rows, ONE)

        states = await look(self.store, read, "state of an execution")
        if not states:
            message = f"there is no execution {execution_id}"
            raise ExecutionNotFoundError(message)
        return states[0]

    async def list_executions(self, **filters: Any) -> list[ExecutionState]:
        """Executions, newest first, in a total order by id.

        Args:
            **filters: ``status`` (one or several), ``function``, ``tag``, ``queue``,
                ``parent``, ``root`` (an id; the root itself is among them), ``limit``
                (100, at most 500), ``before`` (an id: only what is older).

        Raises:
            UsageError: A filter is unknown or its value makes no sense.
            StoreError: The database is away or the answer takes too long.
        """
        wanted = Filter.read(filters)

        async def read(look: Look) -> list[ExecutionState]:
            rows = await look.rows(wanted.applied_to(select_executions()))
            return await read_states(look, rows, MANY)

        return await look(self.store, read, "list of executions")

    async def entries(self, execution_id: str) -> list[Entry]:
        """What happened to an execution, in the order in which it saw it.

        Raises:
            ExecutionNotFoundError: There is no such execution.
            StoreError: The database is away or the answer takes too long.
        """
        identifier = _parse(execution_id)

        async def read(look: Look) -> list[Entry]:
            return entries_of(await read_stored(look, identifier))

        return await look(self.store, read, "history of an execution")


def _parse(execution_id: str) -> UUID:
    try:
        return UUID(execution_id)
    except (ValueError, AttributeError, TypeError):
        message = f"there is no execution {execution_id}"
        raise ExecutionNotFoundError(message) from None
