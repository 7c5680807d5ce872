"""The table of the flights job and the figures asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path

import asyncpg
import pytest

from workers.flights.clean import Cleaner, Flight
from workers.flights.figures import Delays, carrier_month, carrier_months
from workers.flights.lookups import load_lookups
from workers.flights.schema import (
    TableCounts,
    count_table,
    create_index,
    create_table,
    empty_table,
    write_chunk,
)
from workers.flights.source import ARCHIVE, DATA, extract, index_chunks, read_chunk


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> list[Flight]:
    """The flights of every fortieth chunk of the file, from all over the year."""
    path = extract(ARCHIVE, tmp_path_factory.mktemp("flights"))
    cleaner = Cleaner(load_lookups(DATA))
    return [
        flight
        for chunk in index_chunks(path, 250)[::40]
        for flight in cleaner.clean(
            read_chunk(path, chunk), first_row=chunk.first_row
        ).flights
    ]


@pytest.fixture
async def table(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with the empty table."""
    connection = await asyncpg.connect(empty_database_url)
    await create_table(connection)
    yield connection
    await connection.close()


async def test_what_is_written_is_what_was_cleaned(
    table: asyncpg.Connection, flights: list[Flight]
) -> None:
    """Every field of every flight comes back from the table as it went in."""
    await write_chunk(table, flights)
    rows = await table.fetch("select * from flights order by row_number")
    assert [Flight(**row) for row in rows] == flights
    assert any(flight.plane_model is None for flight in flights)


async def test_a_chunk_is_part_of_the_callers_transaction(
    table: asyncpg.Connection, flights: list[Flight]
) -> None:
    """Rolled back, a chunk leaves nothing; the next attempt writes it once."""
    transaction = table.transaction()
    await transaction.start()
    await write_chunk(table, flights)
    await transaction.rollback()
    assert await count_table(table) == TableCounts(rows=0, distinct_rows=0)
    async with table.transaction():
        await write_chunk(table, flights)
    count = len(flights)
    assert await count_table(table) == TableCounts(rows=count, distinct_rows=count)


async def test_a_row_written_twice_is_counted(
    table: asyncpg.Connection, flights: list[Flight]
) -> None:
    """The table forbids no duplicate, so the count would show one."""
    await write_chunk(table, flights)
    await write_chunk(table, flights[:3])
    counts = await count_table(table)
    assert counts.duplicates == 3
    await empty_table(table)
    assert await count_table(table) == TableCounts(rows=0, distinct_rows=0)


async def test_creating_is_safe_to_repeat(
    table: asyncpg.Connection, flights: list[Flight]
) -> None:
    """A table that exists keeps its rows; the index may be there already."""
    await write_chunk(table, flights)
    await create_index(table)
    await create_index(table)
    await create_table(table)
    assert (await count_table(table)).rows == len(flights)


async def test_figures_agree_with_the_flights(
    table: asyncpg.Connection, flights: list[Flight]
) -> None:
    """Each carrier and month has the delays that adding up in Python gives."""
    await write_chunk(table, flights)
    expected: dict[tuple[str, int, int], dict[tuple[str, str], Delays]] = {}
    for flight in flights:
        day = flight.flight_date
        routes = expected.setdefault((flight.carrier, day.year, day.month), {})
        route = (flight.origin, flight.destination)
        minutes = flight.arrival_delay_minutes
        one = Delays(flights=1, delay_minutes=minutes, late=int(minutes > 15))
        routes[route] = routes[route] + one if route in routes else one
    keys = await carrier_months(table)
    assert keys == sorted(expected)
    assert {month for _, _, month in keys} >= {1, 12}
    for key in keys:
        figures = await carrier_month(table, *key)
        assert (figures.carrier, figures.month) == (key[0], key[2])
        assert {
            (route.origin, route.destination): route.delays for route in figures.routes
        } == expected[key]


async def test_a_month_without_flights_is_an_error(table: asyncpg.Connection) -> None:
    """Figures of nothing have no mean; asking for them is a mistake."""
    assert await carrier_months(table) == []
    with pytest.raises(LookupError, match="UA in 2013-02"):
        await carrier_month(table, "UA", 2013, 2)


async def test_a_month_ends_at_its_last_day(
    table: asyncpg.Connection, flights: list[Flight]
) -> None:
    """The last day of December belongs to it, the first of January does not."""
    template = flights[0]._replace(carrier="UA")
    days = [date(2013, 11, 30), date(2013, 12, 1), date(2013, 12, 31), date(2014, 1, 1)]
    await write_chunk(table, [template._replace(flight_date=day) for day in days])
    figures = await carrier_month(table, "UA", 2013, 12)
    assert [route.delays.flights for route in figures.routes] == [2]


def test_the_definition_has_a_column_for_each_field() -> None:
    """The table's columns are the fields of a flight, in the same order."""
    definition = (Path(DATA).parent / "schema.sql").read_text()
    body = definition.partition("(\n")[2].partition("    constraint")[0]
    columns = [line.split()[0] for line in body.splitlines() if line.strip()]
    assert tuple(columns) == Flight._fields
