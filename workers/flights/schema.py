"""Table `flights`: create it, fill it chunk by chunk, count it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from workers.flights.clean import Flight

TABLE = "flights"
DEFINITION = Path(__file__).with_name("schema.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCounts:
    """What the table itself says: all its rows, and how many different file rows."""

    rows: int
    distinct_rows: int

    @property
    def duplicates(self) -> int:
        """Rows that are there more than once, each extra copy counted."""
        return self.rows - self.distinct_rows


async def create_table(connection: asyncpg.Connection) -> None:
    """Create the table where it is missing; safe to repeat."""
    await connection.execute(DEFINITION.read_text())


async def empty_table(connection: asyncpg.Connection) -> None:
    """Remove every flight, for a run from the start."""
    await connection.execute("truncate table flights")


async def write_chunk(
    connection: asyncpg.Connection, flights: Sequence[Flight]
) -> None:
    """Copy flights into the table, inside the caller's transaction if there is one."""
    await connection.copy_records_to_table(
        TABLE, records=flights, columns=Flight._fields
    )


async def create_index(connection: asyncpg.Connection) -> None:
    """Index the table for questions about one carrier and month; safe to repeat.

    Built after loading: one sort costs less than 327 346 insertions.
    """
    await connection.execute(
        "create index if not exists flights_carrier_flight_date_idx"
        " on flights (carrier, flight_date)"
    )
    await connection.execute("analyze flights")


async def count_table(connection: asyncpg.Connection) -> TableCounts:
    """Count the rows of the table, and how many different rows of the file they are."""
    counts = await connection.fetchrow(
        "select count(*) as rows, count(distinct row_number) as distinct_rows"
        " from flights"
    )
    return TableCounts(rows=counts["rows"], distinct_rows=counts["distinct_rows"])
