"""Finds what is wrong with a database, or about to be, and says what to do.

First everything is read, then judged: ``Facts`` come from the server, ``diagnose`` is
pure. Nothing is changed, and nothing waits for a lock.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import asyncpg

from stent.errors import StoreError
from stent.settings import Settings, masked
from stent.store.connecting import Opened, open_connection
from stent.store.migrate import (
    applied_migrations,
    available_migrations,
    created_objects,
)
from stent.store.queries import load
from stent.store.session import as_store_error

VERSION_LEAST = 15
WORKER_CONNECTIONS = 4
DIRECT_CONNECTIONS = 2
"""Of a worker behind a pooler: those that go around it."""
CONNECTIONS_USED_MAX = 0.9
TRANSACTION_SECONDS_MAX = 60
IDLE_IN_TRANSACTION_SECONDS_MAX = 30
SLOT_TRANSACTIONS_MAX = 100_000
"""How far behind an active slot may be; an inactive one may not at all."""
DEAD_ROWS_MAX = 50_000
BLOAT_BYTES_MIN = 32 * 1024 * 1024
BLOAT_RATIO_MAX = 10
ROW_BYTES = 1024
"""A generous row of the tables that fill and empty."""
FILLING_AND_EMPTYING = frozenset({"tasks", "inbox", "leases", "workers"})
SKEW_SECONDS_MAX = 1.0
NOTIFY_USAGE_MAX = 0.1
UNSERVED_SECONDS = 10
OVERDUE_SECONDS_MAX = 2
NAMES_MAX = 5

Row = Mapping[str, Any]
Clock = Callable[[], dt.datetime]


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"  # work is not done, or not safe
    WARNING = "warning"  # it works; something will hurt
    NOTE = "note"  # worth knowing; no finding for the exit code


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: Of the check; does not change between versions.
        level: How bad it is.
        what: What was found, with numbers and names.
        advice: What to do.
    """

    name: str
    level: Level
    what: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was read from the server; rows are those of ``queries/doctor.sql``."""

    server: Row
    skew_seconds: float
    pooled: bool
    direct_pooled: bool
    has_direct: bool
    same_database: bool
    missing: Sequence[str]
    newer: Sequence[int]
    transactions: Sequence[Row]
    pool_size: int
    lost: Sequence[str] = field(default=())
    rights: Sequence[Row] = field(default=())
    tables: Sequence[Row] = field(default=())
    weeks: Sequence[Row] = field(default=())
    workers: Sequence[Row] = field(default=())
    blocked: Row | None = None
    dead_letters: Row | None = None
    unserved: Sequence[Row] = field(default=())


async def examine(url: str, settings: Settings, *, clock: Clock) -> list[Finding]:
    """Look at the database of ``url`` as this process would use it.

    Args:
        url: What workers connect to.
        settings: For ``direct_url`` and the size of the pool.
        clock: This machine's time, to compare with the server's.

    Returns:
        Findings, the worst first.

    Raises:
        StoreError: It cannot be reached.
    """
    try:
        return diagnose(await read_facts(url, settings, clock))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        what = f"examining {masked(url)}"
        raise as_store_error(error, what) from error


async def read_facts(url: str, settings: Settings, clock: Clock) -> Facts:
    """Everything that ``diagnose`` judges."""
    opened = await _open(url)
    try:
        direct = await _look_direct(opened, settings.direct_url)
        facts = await _read_server(opened.connection, clock)
        if not facts["missing"]:
            facts |= await _read_schema(opened.connection)
        return Facts(
            pooled=opened.pooled,
            pool_size=settings.transaction_pool_size,
            **direct,
            **facts,
        )
    finally:
        await opened.connection.close()


async def _open(url: str) -> Opened:
    try:
        return await open_connection(url, "stent doctor", command_timeout=30)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        why = masked(str(error)) or f"no answer ({type(error).__name__})"
        message = f"cannot connect to {masked(url)}: {why}"
        raise StoreError(message, retryable=True) from error


async def _look_direct(opened: Opened, direct_url: str | None) -> dict[str, Any]:
    """Whether the direct URL goes around the pooler, to the same place."""
    if direct_url is None:
        return {"has_direct": False, "direct_pooled": False, "same_database": True}
    direct = await _open(direct_url)
    query = load()["doctor_server"].sql
    try:
        rows = [await c.fetchrow(query) for c in (opened.connection, direct.connection)]
    finally:
        await direct.connection.close()
    places = [(row["started_at"], row["database"]) for row in rows]
    return {
        "has_direct": True,
        "direct_pooled": direct.pooled,
        "same_database": places[0] == places[1],
    }


async def _read_server(connection: asyncpg.Connection, clock: Clock) -> dict[str, Any]:
    queries = load()
    # Once before, so that only the way there and back lies between the two clocks.
    await connection.fetchrow(queries["doctor_server"].sql)
    before = clock()
    server = await connection.fetchrow(queries["doctor_server"].sql)
    after = clock()
    ahead = max((before - server["now"]).total_seconds(), 0)
    behind = max((server["now"] - after).total_seconds(), 0)
    known = available_migrations()
    if server["is_shut_out"]:  # its rights are told; the rest cannot be read
        done = {m.number for m in known}
    elif server["has_schema"]:
        done = await applied_migrations(connection)
    else:
        done = set()
    return {
        "server": server,
        "skew_seconds": ahead - behind,
        "missing": [m.name for m in known if m.number not in done],
        "newer": sorted(done - {m.number for m in known}),
        "transactions": await connection.fetch(queries["doctor_transactions"].sql),
    }


async def _read_schema(connection: asyncpg.Connection) -> dict[str, Any]:
    queries = load()
    rights = await connection.fetch(queries["doctor_rights"].sql)
    if not all(row["usable"] for row in rights):
        # The rest cannot be read.
        return {"rights": rights}
    objects = await connection.fetch(queries["doctor_objects"].sql)
    there = {(row["kind"], row["name"]) for row in objects}
    lost = created_objects(available_migrations()) - there
    if lost:  # nor here
        return {
            "rights": rights,
            "lost": [f"{kind} {name}" for kind, name in sorted(lost)],
        }
    unserved = queries["doctor_unserved"]
    return {
        "rights": rights,
        "tables": await connection.fetch(queries["doctor_tables"].sql),
        "weeks": await connection.fetch(queries["doctor_partitions"].sql),
        "workers": await connection.fetch(queries["doctor_workers"].sql),
        "blocked": await connection.fetchrow(queries["doctor_blocked"].sql),
        "dead_letters": await connection.fetchrow(queries["doctor_dead_letters"].sql),
        "unserved": await connection.fetch(
            unserved.sql, *unserved.arguments({"seconds": UNSERVED_SECONDS})
        ),
    }


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    order = list(Level)
    return sorted(found, key=lambda finding: order.index(finding.level))


def _version(facts: Facts) -> Iterator[Finding]:
    if facts.server["version_number"] < VERSION_LEAST * 10_000:
        yield Finding(
            "version",
            Level.ERROR,
            f"the server is PostgreSQL {facts.server['version']}",
            f"upgrade it to {VERSION_LEAST} or newer",
        )
    if facts.server["encoding"] != "UTF8":
        yield Finding(
            "encoding",
            Level.ERROR,
            f"the database is encoded in {facts.server['encoding']}",
            "make one with: create database ... encoding 'UTF8' template template0",
        )
    if not facts.server["has_plpgsql"]:
        yield Finding(
            "extension",
            Level.ERROR,
            "the language plpgsql is not there",
            "run: create extension plpgsql; stent needs no other one",
        )


def _writable(facts: Facts) -> Iterator[Finding]:
    if facts.server["in_recovery"]:
        yield Finding(
            "standby",
            Level.ERROR,
            "the server is a standby: it takes no writes",
            "name all hosts in the URL and add target_session_attrs=read-write",
        )
    elif facts.server["read_only"] == "on":
        yield Finding(
            "read_only",
            Level.ERROR,
            "default_transaction_read_only is on: the server takes no writes",
            "find out who set it, often a full disk of a managed server, and reset it",
        )


def _pooler(facts: Facts) -> Iterator[Finding]:
    if facts.pooled and not facts.has_direct:
        yield Finding(
            "pooler",
            Level.WARNING,
            "a pooler answers, and STENT_DIRECT_URL is not set: a killed worker is"
            " noticed only when its lease runs out, new work by polling",
            "set STENT_DIRECT_URL to the server itself; in session mode, too",
        )
    if facts.direct_pooled:
        yield Finding(
            "direct_url_pooled",
            Level.ERROR,
            "a pooler answers at STENT_DIRECT_URL",
            "let STENT_DIRECT_URL name the server itself",
        )
    if not facts.same_database:
        yield Finding(
            "direct_url_elsewhere",
            Level.ERROR,
            "STENT_DIRECT_URL and STENT_DATABASE_URL lead to different databases",
            "let both name the same database of the same server",
        )


def _schema(facts: Facts) -> Iterator[Finding]:
    if facts.missing:
        advice = "run `stent db migrate`"
        server = facts.server
        if not (server["has_schema"] or server["may_create"]):
            advice = (
                "as an administrator run: create schema stent authorization"
                f" {server['role']}; then `stent db migrate`"
            )
        elif server["has_schema"] and not server["owns_schema"]:
            advice = (
                f"run `stent db migrate` as {server['schema_owner']}, who owns the "
                "schema, or as a role that belongs to it"
            )
        yield Finding(
            "schema",
            Level.ERROR,
            f"{len(facts.missing)} migration(s) are missing: {_names(facts.missing)}",
            advice,
        )
    if facts.lost:
        yield Finding(
            "schema_damaged",
            Level.ERROR,
            f"the schema has lost what its migrations made: {_names(facts.lost)}",
            "restore all of the schema stent from a backup, never parts of it",
        )
    if facts.newer:
        yield Finding(
            "schema_newer",
            Level.NOTE,
            f"the schema has {len(facts.newer)} migration(s) of a later version",
            "update this program when its fleet has been updated",
        )


def _rights(facts: Facts) -> Iterator[Finding]:
    unusable = [row["name"] for row in facts.rights if not row["usable"]]
    foreign = [row["name"] for row in facts.rights if not row["owned"]]
    role = facts.server["role"]
    if unusable:
        yield Finding(
            "permissions",
            Level.ERROR,
            f"role {role} may not read and write {_names(unusable)}",
            f"make it a member of the role that migrates: grant OWNER to {role}",
        )
    elif foreign:
        yield Finding(
            "ownership",
            Level.ERROR,
            f"role {role} does not own {_names(foreign)}: it cannot create partitions",
            f"make it a member of the role that migrates: grant OWNER to {role}",
        )
    if not facts.server["sees_all"]:
        yield Finding(
            "limited_sight",
            Level.NOTE,
            f"role {role} sees no transactions of other roles",
            f"to let the doctor see them: grant pg_read_all_stats to {role}",
        )


def _connections(facts: Facts) -> Iterator[Finding]:
    most, used = facts.server["connections_max"], facts.server["connections"]
    living = [row for row in facts.workers if row["overdue_seconds"] < 0]
    each = DIRECT_CONNECTIONS if facts.pooled else WORKER_CONNECTIONS
    pools = 0 if facts.pooled else facts.pool_size
    needed = len(living) * (each + pools)
    if used > CONNECTIONS_USED_MAX * most:
        yield Finding(
            "connections_used",
            Level.WARNING,
            f"{used} of {most} connections are in use",
            "raise max_connections, run fewer workers, or put a pooler in front",
        )
    if needed > most:
        yield Finding(
            "connections_needed",
            Level.WARNING,
            f"{len(living)} workers may need {needed} connections, {each} each and up"
            f" to {pools} of their pools; there are {most}",
            "raise max_connections, lower STENT_TRANSACTION_POOL_SIZE, or put a pooler"
            " in front",
        )


def _transactions(facts: Facts) -> Iterator[Finding]:
    for row in facts.transactions:
        if row["kind"] != "session" or row["seconds"] is None:
            continue
        idle = str(row["state"]).startswith("idle in transaction")
        what = f"{row['name']} (pid {row['pid']}, database {row['database']})"
        if idle and row["seconds"] > IDLE_IN_TRANSACTION_SECONDS_MAX:
            yield Finding(
                "idle_in_transaction",
                Level.WARNING,
                f"{what} has been idle in a transaction for {row['seconds']:.0f} s:"
                " rows that were deleted since then cannot be removed",
                f"end it: select pg_terminate_backend({row['pid']}); set"
                " idle_in_transaction_session_timeout for its role",
            )
        elif not idle and row["seconds"] > TRANSACTION_SECONDS_MAX:
            yield Finding(
                "old_transaction",
                Level.WARNING,
                f"{what} has had a transaction open for {row['seconds']:.0f} s: rows"
                " that were deleted since then cannot be removed",
                "let reports read from a standby, or in shorter transactions",
            )


def _holders(facts: Facts) -> Iterator[Finding]:
    for row in facts.transactions:
        if row["kind"] == "prepared" and row["seconds"] > TRANSACTION_SECONDS_MAX:
            yield Finding(
                "prepared_transaction",
                Level.WARNING,
                f"transaction {row['name']!r} was prepared {row['seconds']:.0f} s ago"
                " and has not ended: it keeps its locks and all deleted rows",
                f"decide it: rollback prepared {_quoted(row['name'])}, or commit",
            )
        if row["kind"] == "slot":
            yield from _slot(row)


def _slot(row: Row) -> Iterator[Finding]:
    behind = row["transactions"]
    if not row["active"]:
        held = "deleted rows and " if behind is not None else ""
        yield Finding(
            "replication_slot",
            Level.WARNING,
            f"nobody reads replication slot {row['name']}: it keeps {held}WAL",
            "start its standby, or run: select"
            f" pg_drop_replication_slot({_quoted(row['name'])})",
        )
    elif behind is not None and behind > SLOT_TRANSACTIONS_MAX:
        yield Finding(
            "replication_slot",
            Level.WARNING,
            f"replication slot {row['name']} is {behind} transactions behind: rows that"
            " were deleted since then cannot be removed",
            "end long queries on its standby, or switch hot_standby_feedback off there",
        )


def _vacuum(facts: Facts) -> Iterator[Finding]:
    off = [
        f"{name} is off"
        for name in ("autovacuum", "track_counts")
        if facts.server[name] == "off"
    ]
    off += [f"it is off for {row['name']}" for row in facts.tables if row["vacuum_off"]]
    if off:
        yield Finding(
            "autovacuum_off",
            Level.ERROR,
            f"autovacuum does not clean up: {_names(off)}",
            "switch autovacuum and track_counts on; for a table: alter table ... reset"
            " (autovacuum_enabled)",
        )
    for row in facts.tables:
        if row["dead"] > DEAD_ROWS_MAX and row["dead"] > row["live"]:
            yield Finding(
                "dead_rows",
                Level.WARNING,
                f"stent.{row['name']} has {row['dead']} dead rows beside"
                f" {row['live']} live ones: autovacuum is behind, or held up",
                "end old transactions; else lower autovacuum_naptime and"
                f" autovacuum_vacuum_cost_delay, and run: vacuum stent.{row['name']}",
            )
        if row["name"] in FILLING_AND_EMPTYING:
            yield from _bloat(row)


def _bloat(row: Row) -> Iterator[Finding]:
    expected = max(1, row["live"] + row["dead"]) * ROW_BYTES
    if row["bytes"] > BLOAT_BYTES_MIN and row["bytes"] > BLOAT_RATIO_MAX * expected:
        yield Finding(
            "bloat",
            Level.WARNING,
            f"stent.{row['name']} takes {row['bytes'] // 1024**2} MiB for"
            f" {row['live']} rows",
            f"when little is running: vacuum full stent.{row['name']}; it locks the"
            " table for seconds",
        )


def _partitions(facts: Facts) -> Iterator[Finding]:
    if facts.weeks:
        weeks = _names([row["week"] for row in facts.weeks])
        yield Finding(
            "partitions",
            Level.WARNING,
            f"partitions of the week(s) of {weeks} are missing",
            "start a worker, whose role must own the schema: it makes them at once",
        )


def _durability(facts: Facts) -> Iterator[Finding]:
    off = [n for n in ("fsync", "full_page_writes") if facts.server[n] == "off"]
    if off:
        yield Finding(
            "durability",
            Level.ERROR,
            f"{_names(off)} is off: a crash of the machine can destroy the database",
            "switch it on; if that is too slow, the disks are",
        )
    if facts.server["synchronous_commit"] == "off":
        yield Finding(
            "synchronous_commit",
            Level.ERROR,
            "synchronous_commit is off: a crash loses what was promised",
            "reset it for the server, for this database and for this role",
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    if abs(facts.skew_seconds) > SKEW_SECONDS_MAX:
        way = "ahead of" if facts.skew_seconds > 0 else "behind"
        yield Finding(
            "clock",
            Level.WARNING,
            f"this machine's clock is {abs(facts.skew_seconds):.1f} s {way} the"
            " server's: stent goes by the server's, your logs and your code do not",
            "run a time service on both",
        )


def _workers(facts: Facts) -> Iterator[Finding]:
    overdue = [w for w in facts.workers if w["overdue_seconds"] > OVERDUE_SECONDS_MAX]
    if overdue:
        names = _names([f"{row['host']} (pid {row['pid']})" for row in overdue])
        yield Finding(
            "leases",
            Level.WARNING,
            f"the lease of {len(overdue)} worker(s) has run out, and nobody has taken"
            f" over what they hold: {names}",
            "start a worker: any one takes it over",
        )
    if facts.blocked is not None and facts.blocked["count"]:
        yield Finding(
            "blocked",
            Level.WARNING,
            f"{facts.blocked['count']} execution(s) are blocked, that is, cannot go on"
            f" under the code of the workers; the oldest, {facts.blocked['oldest']}:"
            f" {facts.blocked['reason']}",
            f"stent show {facts.blocked['oldest']}, then run workers with code that"
            " fits, or cancel it",
        )
    if facts.dead_letters is not None:
        letters = facts.dead_letters
        yield Finding(
            "dead_letters",
            Level.WARNING,
            f"{letters['count']} call(s) became dead letters within a day: whichever"
            f" worker ran them was lost; the latest is of {letters['function']}",
            f"stent history {letters['latest']} names the workers; look in their"
            " machines' logs for what ended them, memory for instance",
        )
    for row in facts.unserved:
        more = "at least " if row["capped"] else ""
        yield Finding(
            "unserved",
            Level.WARNING,
            f"{more}{row['ready']} of {row['function']} wait in queue {row['queue']!r}"
            f" for {row['oldest_ready_seconds']:.0f} s, and no living worker runs them",
            "start a worker that imports the function and serves the queue",
        )


def _notify(facts: Facts) -> Iterator[Finding]:
    usage = facts.server["notify_usage"]
    if usage > NOTIFY_USAGE_MAX:
        yield Finding(
            "notify_queue",
            Level.WARNING,
            f"the queue of notifications is {usage:.0%} full: a listener does not read",
            "find a session that is idle in a transaction and has run LISTEN; end it",
        )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _version,
    _writable,
    _schema,
    _rights,
    _durability,
    _pooler,
    _connections,
    _transactions,
    _holders,
    _vacuum,
    _partitions,
    _workers,
    _clock,
    _notify,
)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_MAX])
    left = len(names) - NAMES_MAX
    return f"{shown} and {left} more" if left > 0 else shown


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
