"""Migrations under a crowd."""

from __future__ import annotations

import asyncio

import asyncpg

from stent.store.migrate import (
    applied_migrations,
    apply_migrations,
    available_migrations,
)


async def test_twenty_at_once_apply_each_migration_once(
    empty_database_url: str,
) -> None:
    """Losers wait, then find nothing to do."""

    async def migrate() -> list[str]:
        connection = await asyncpg.connect(empty_database_url)
        try:
            return list(await apply_migrations(connection))
        finally:
            await connection.close()

    applied = await asyncio.gather(*[migrate() for _ in range(20)])
    names = [name for names in applied for name in names]
    assert sorted(names) == sorted(m.name for m in available_migrations())
    connection = await asyncpg.connect(empty_database_url)
    try:
        assert set(await applied_migrations(connection)) == {
            m.number for m in available_migrations()
        }
    finally:
        await connection.close()
