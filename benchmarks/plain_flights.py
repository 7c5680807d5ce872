"""Floor F4: the flights job as a plain loop, without any engine.

It does the same work as `workers.flights` (unpack, parse, clean, enrich, copy), in
chunks of 1 000 rows with a transaction each, and remembers nothing: killed in the
middle it would have to begin again. What an engine adds is measured against it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import asyncpg

from workers.flights.clean import Cleaner, RowCounts
from workers.flights.lookups import load_lookups
from workers.flights.schema import count_table, create_table, write_chunk
from workers.flights.source import ARCHIVE, DATA, extract, index_chunks, read_chunk

ROWS_PER_CHUNK = 1000
# A schema of its own, so that a table `flights` of somebody else is never touched.
SCHEMA = "stent_plain_flights"


async def plain_flights(dsn: str, *, rows_per_chunk: int = ROWS_PER_CHUNK) -> float:
    """Load all flights with a plain loop; what it wrote is dropped afterwards.

    Args:
        dsn: The database to measure.
        rows_per_chunk: Rows of the file per transaction.
    Returns:
        Rows of the file per second, from unpacking to the last commit.
    Raises:
        RuntimeError: The table does not hold what was read; the figure means nothing.
    """
    connection = await asyncpg.connect(dsn, server_settings={"search_path": SCHEMA})
    try:
        await connection.execute(f"drop schema if exists {SCHEMA} cascade")
        await connection.execute(f"create schema {SCHEMA}")
        await create_table(connection)
        with tempfile.TemporaryDirectory() as directory:
            begin = time.perf_counter()
            counts = await _load(connection, Path(directory), rows_per_chunk)
            duration_seconds = time.perf_counter() - begin
        written = await count_table(connection)
        if written.rows != counts.written or written.duplicates:
            raise RuntimeError(f"{counts} but the table says {written}")
        await connection.execute(f"drop schema {SCHEMA} cascade")
    finally:
        await connection.close()
    return counts.read / duration_seconds


async def _load(
    connection: asyncpg.Connection, directory: Path, rows_per_chunk: int
) -> RowCounts:
    path = extract(ARCHIVE, directory)
    cleaner = Cleaner(load_lookups(DATA))
    counts = RowCounts()
    for chunk in index_chunks(path, rows_per_chunk):
        rows = read_chunk(path, chunk)
        cleaned = cleaner.clean(rows, first_row=chunk.first_row)
        async with connection.transaction():
            await write_chunk(connection, cleaned.flights)
        counts += cleaned.counts
    return counts
