"""What the database says about a run of the flights job, and whether it is right."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg

from workers.flights.clean import RowCounts
from workers.flights.lookups import MISSING
from workers.flights.schema import count_table

# A committed result is one byte for its format, 1 for plain, and then JSON.
_DONE = """
with done as (
    select address, convert_from(substr(payload, 2), 'UTF8') as value
      from stent.results
     where execution_id = $1 and ok and get_byte(payload, 0) = 1),
chunks as (
    select cast(value as jsonb) #> '{$data,1}' as counts
      from done where position('.load_chunk#' in address) > 0)
select count(*) as chunks,
       coalesce(sum(cast(counts ->> 'read' as bigint)), 0) as read,
       coalesce(sum(cast(counts ->> 'cancelled' as bigint)), 0) as cancelled,
       coalesce(sum(cast(counts ->> 'diverted' as bigint)), 0) as diverted,
       coalesce(sum(cast(counts ->> 'written' as bigint)), 0) as written,
       (select count(*) from done where position('.summarize#' in address) > 0)
           as months,
       (select blocked_reason from stent.executions
         where execution_id = $1 and status = 'blocked') as blocked
  from chunks
"""
_HOLDINGS = """
select leases.pid,
       exists (select from stent.executions
                where executions.worker_id = leases.worker_id
                  and executions.execution_id = $1) as owns_execution,
       (select count(*) from stent.tasks
         where tasks.worker_id = leases.worker_id
           and tasks.execution_id = $1) as attempts
  from stent.leases
 where leases.pid = any($2)
"""
_COPYING = """
select backends.pid
  from pg_locks as locks join pg_stat_activity as backends using (pid)
 where locks.relation = cast('flights' as regclass)
   and locks.mode = 'RowExclusiveLock' and locks.granted
   and backends.application_name = 'stent transaction ' || $1
"""
# Counts rows that were copied, their transaction committed or not.
_COPIED = "select n_tup_ins from pg_stat_user_tables where relname = 'flights'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What has been committed of one execution.

    Attributes:
        blocked: Why it cannot go on, as after a change of its code; else None.
        chunks: Results of chunks.
        counts: Their sum.
        months: Results of carriers and months.
    """

    blocked: str | None
    chunks: int
    counts: RowCounts
    months: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a worker has of one execution: the workflow itself, attempts of calls."""

    owns_execution: bool = False
    attempts: int = 0

    @property
    def nothing(self) -> bool:
        """True when others have all of it, or may take it."""
        return not self.owns_execution and self.attempts == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the file says, read by other means than the job's.

    Attributes:
        rows: All of them, without the header.
        arrived: Numbers of the rows with an arrival delay, the first row being 0.
        months: How many (carrier, year, month) these have.
    """

    rows: int
    arrived: AbstractSet[int]
    months: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The file and the database after a run, side by side.

    Attributes:
        lost: Rows of the file that should be in the table and are not.
        twice: Rows of the table that are there already.
        foreign: Rows of the table that should not be there.
        undone: Rows that were copied and rolled back when a worker died.
    """

    expected: Expected
    done: Done
    rows: int
    lost: int
    twice: int
    foreign: int
    undone: int

    @property
    def holds(self) -> bool:
        """True when every figure is right."""
        expected, counts = self.expected, self.done.counts
        return (
            counts.read == expected.rows
            and counts.written == self.rows == len(expected.arrived)
            and self.lost == self.twice == self.foreign == 0
            and self.done.months == expected.months
        )


def read_expected(archive: Path) -> Expected:
    """Count the rows of the archive with the csv module; blocks for about a second.

    Raises:
        KeyError: The file has no column of that name.
    """
    arrived: set[int] = set()
    months: set[tuple[str, str, str]] = set()
    rows = 0
    with (
        zipfile.ZipFile(archive) as bundle,
        bundle.open(bundle.infolist()[0]) as packed,
        io.TextIOWrapper(packed, "utf-8", newline="") as text,
    ):
        for number, row in enumerate(csv.DictReader(text)):
            rows = number + 1
            if row["arr_delay"] != MISSING:
                arrived.add(number)
                months.add((row["carrier"], row["year"], row["month"]))
    return Expected(rows=rows, arrived=arrived, months=len(months))


async def read_done(connection: asyncpg.Connection, execution_id: str) -> Done:
    """Add up the committed results of an execution."""
    row = await connection.fetchrow(_DONE, UUID(execution_id))
    return Done(
        blocked=row["blocked"],
        chunks=row["chunks"],
        months=row["months"],
        counts=RowCounts(
            read=int(row["read"]),
            cancelled=int(row["cancelled"]),
            diverted=int(row["diverted"]),
            written=int(row["written"]),
        ),
    )


async def read_holdings(
    connection: asyncpg.Connection, execution_id: str, pids: AbstractSet[int]
) -> dict[int, Holding]:
    """What each of these worker processes has of an execution; all pids are keys."""
    rows = await connection.fetch(_HOLDINGS, UUID(execution_id), list(pids))
    found = {
        row["pid"]: Holding(
            owns_execution=row["owns_execution"], attempts=row["attempts"]
        )
        for row in rows
    }
    return {pid: found.get(pid, Holding()) for pid in pids}


async def registered(connection: asyncpg.Connection, pids: AbstractSet[int]) -> bool:
    """Whether all of these worker processes have begun to serve."""
    count = await connection.fetchval(
        "select count(*) from stent.leases where pid = any($1)", list(pids)
    )
    return bool(count == len(pids))


async def copying_backends(connection: asyncpg.Connection, pid: int) -> set[int]:
    """Backends in a transaction of a worker process that is filling the table."""
    return {row["pid"] for row in await connection.fetch(_COPYING, str(pid))}


async def live_backends(connection: asyncpg.Connection) -> set[int]:
    """Process ids of all backends of the server."""
    return {
        row["pid"] for row in await connection.fetch("select pid from pg_stat_activity")
    }


async def prove(
    connection: asyncpg.Connection, execution_id: str, expected: Expected
) -> Proof:
    """Count in the database; the workers must have ended, to have told all they did."""
    table = await count_table(connection)
    present = {
        row["row_number"]
        for row in await connection.fetch("select distinct row_number from flights")
    }
    copied = await connection.fetchval(_COPIED)
    return Proof(
        expected=expected,
        done=await read_done(connection, execution_id),
        rows=table.rows,
        lost=len(expected.arrived - present),
        twice=table.duplicates,
        foreign=len(present - expected.arrived),
        undone=copied - table.rows,
    )
