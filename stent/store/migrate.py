"""Applies ``migrations/*.sql``, forward only, under a lock."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import asyncpg

from stent.errors import SchemaOutdatedError

_LOCK = 0x5354_454E_5401
_TABLE = """
create table if not exists stent.migrations (
    number     integer primary key,
    name       text not null,
    applied_at timestamptz not null default now())
"""


_CREATES = re.compile(
    r"^create (?:or replace |unlogged |unique )*(table|view|index|type|function) "
    r"(?:stent\.)?(\w+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: ``0001_initial.sql`` is number 1, name ``initial``."""

    number: int
    name: str
    sql: str


def available_migrations() -> list[Migration]:
    """The migrations of this version of stent, in order."""
    folder = resources.files("stent.store") / "migrations"
    migrations = []
    for file in folder.iterdir():
        if file.name.endswith(".sql"):
            number, _, name = file.name.removesuffix(".sql").partition("_")
            migrations.append(Migration(int(number), name, file.read_text("utf-8")))
    return sorted(migrations, key=lambda migration: migration.number)


def created_objects(migrations: Iterable[Migration]) -> set[tuple[str, str]]:
    """What is there after these migrations, as kind and name; none drops anything."""
    return {
        (kind, name)
        for migration in migrations
        for kind, name in _CREATES.findall(migration.sql)
    }


async def applied_migrations(connection: asyncpg.Connection) -> set[int]:
    """Numbers of the migrations that the database has."""
    if await connection.fetchval("select to_regclass('stent.migrations')") is None:
        return set()
    rows = await connection.fetch("select number from stent.migrations")
    return {row["number"] for row in rows}


async def apply_migrations(connection: asyncpg.Connection) -> list[str]:
    """Bring the schema up to date; any number of processes may do it at once.

    One transaction under an advisory lock: the schema is entirely old or new.

    Returns:
        Names of the migrations applied by this call.
    """
    migrations = available_migrations()
    done = await applied_migrations(connection)
    if done >= {migration.number for migration in migrations}:
        return []
    applied = []
    async with connection.transaction():
        await connection.execute("select pg_advisory_xact_lock($1)", _LOCK)
        if not await connection.fetchval("select to_regnamespace('stent') is not null"):
            # Not "if not exists": that takes the right to create schemas all the same.
            await connection.execute("create schema stent")
        await connection.execute(_TABLE)
        done = await applied_migrations(connection)
        for migration in migrations:
            if migration.number in done:
                continue
            await connection.execute(migration.sql)
            await connection.execute(
                "insert into stent.migrations (number, name) values ($1, $2)",
                migration.number,
                migration.name,
            )
            applied.append(migration.name)
    return applied


async def check_schema(connection: asyncpg.Connection) -> None:
    """Make sure that the database has every migration of this version.

    A schema with later migrations is fine: they only ever add.

    Raises:
        SchemaOutdatedError: It lacks some; says which, and what to do.
    """
    done = await applied_migrations(connection)
    missing = [m.name for m in available_migrations() if m.number not in done]
    if missing:
        message = (
            f"the database lacks {len(missing)} migration(s) of stent "
            f"({', '.join(missing)}): run `stent db migrate`"
        )
        raise SchemaOutdatedError(message)
