"""What is read to restore an execution while others go on settling its calls."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg

from stent.clock import new_execution_id
from stent.codec import encode
from stent.store.session import Session
from stent.store.store import Store

ADDRESS = ":load#1.0"
CALL_ID = UUID(int=1)


class InterruptedStore(Store):
    """Another worker settles the call between the reads of calls and of results."""

    def __init__(self, session: Session, other: asyncpg.Connection) -> None:
        super().__init__(session)
        self.other = other
        self.reads = 0

    async def _fetch(self, name: str, **binds: Any) -> Any:
        if name in ("load_issued", "load_results"):
            self.reads += 1
            if self.reads == 2:
                await settle(self.other, *binds["execution_ids"])
        return await super()._fetch(name, **binds)


async def settle(connection: asyncpg.Connection, execution_id: UUID) -> None:
    async with connection.transaction():
        await connection.execute(
            "delete from stent.tasks where execution_id = $1", execution_id
        )
        await connection.execute(
            "insert into stent.results (execution_id, call_id, address, ok, payload)"
            " values ($1, $2, $3, true, $4)",
            execution_id,
            CALL_ID,
            ADDRESS,
            encode(1, path="result"),
        )


async def test_a_call_settled_while_it_is_read_is_known(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """It is an open call, or it has a result, or both; never neither."""
    now = await connection.fetchval("select extract(epoch from now())")
    execution_id = new_execution_id(float(now))
    await connection.execute(
        "insert into stent.tasks (execution_id, call_id, address, function, queue)"
        " values ($1, $2, $3, 'load', 'default')",
        execution_id,
        CALL_ID,
        ADDRESS,
    )
    session = Session(database_url, "test", command_timeout=10.0)
    try:
        store = InterruptedStore(session, connection)
        stored = (await store.load_stored([execution_id]))[execution_id].read()
    finally:
        await session.close()
    assert store.reads == 2
    assert ADDRESS in stored.issued | set(stored.results)
