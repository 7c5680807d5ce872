"""Connections belong to their session from the moment they are open."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from stent.errors import StoreError
from stent.store.session import Session


async def test_a_connection_that_is_not_made_ready_is_closed(database_url: str) -> None:
    """Cancelled on the way, or refused: nobody else knows of it."""
    made: list[asyncpg.Connection] = []
    entered = asyncio.Event()

    async def wait(connection: asyncpg.Connection) -> None:
        made.append(connection)
        entered.set()
        await asyncio.Event().wait()

    async def fail(connection: asyncpg.Connection) -> None:
        made.append(connection)
        await connection.execute("select 1 / 0")

    connecting = asyncio.create_task(
        Session(database_url, "cancelled", prepare=wait).connection()
    )
    await entered.wait()
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    with pytest.raises(StoreError, match="division by zero"):
        await Session(database_url, "refused", prepare=fail).connection()
    assert [connection.is_closed() for connection in made] == [True, True]
