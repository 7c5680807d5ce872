"""The flights job as a durable workflow: extract, load chunk by chunk, ask, report.

Killed at any moment it goes on where it was: each activity that has finished keeps its
result, and each chunk's rows are committed together with that result, so no row is
lost and none is there twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from stent import RetryPolicy, durable, transaction
from workers.flights import schema
from workers.flights.clean import Cleaner, MalformedRowError, RowCounts
from workers.flights.figures import CarrierMonth, carrier_month, carrier_months
from workers.flights.lookups import load_lookups
from workers.flights.report import Report, make_report
from workers.flights.source import (
    ARCHIVE,
    DATA,
    FileChunk,
    SourceError,
    extract,
    index_chunks,
    read_chunk,
)

logger = logging.getLogger(__name__)

ROWS_PER_CHUNK = 1000
# Bounds what waits in memory and in the queue, and sets the pace of the progress
# records; large enough that a fleet is seldom idle at the end of a wave.
CHUNKS_PER_WAVE = 64
# Another attempt would read the same bytes again.
NOT_FOR_BAD_DATA = RetryPolicy(never_for=(MalformedRowError, SourceError))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """The unpacked file and the ranges of rows it is divided into."""

    path: Path
    chunks: Sequence[FileChunk]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a batch of chunks is; every field counts chunks."""

    total: int
    succeeded: int = 0
    failed: int = 0

    @property
    def processed(self) -> int:
        """Chunks that have an outcome."""
        return self.succeeded + self.failed

    @property
    def percent(self) -> float:
        """Share of the chunks that have an outcome, 0 to 100; none of none is all."""
        return 100 * self.processed / self.total if self.total else 100.0

    def add(self, *, succeeded: int, failed: int) -> Progress:
        """The progress after another wave."""
        return replace(
            self, succeeded=self.succeeded + succeeded, failed=self.failed + failed
        )

    def log(self, operation: str, batch_size: int) -> None:
        """Write a structured record; workflows do not repeat theirs when replayed."""
        logger.info(
            "Progress: %d/%d (%.1f%%)",
            self.processed,
            self.total,
            self.percent,
            extra={
                "operation": operation,
                "batch_size": batch_size,
                "progress_pct": round(self.percent, 1),
                "processed": self.processed,
                "total": self.total,
                "succeeded": self.succeeded,
                "failed": self.failed,
                "success_rate": self.succeeded / max(1, self.processed),
            },
        )


@durable
async def flights_etl(
    directory: Path,
    archive: Path = ARCHIVE,
    lookups: Path = DATA,
    rows_per_chunk: int = ROWS_PER_CHUNK,
) -> Report:
    """Load the flights of an archive into table `flights`, replacing what it holds.

    Args:
        directory: Where the archive is unpacked; every worker must see it.
        archive: A zip file with the flights CSV.
        lookups: Directory of the CSV files of airlines, planes and airports.
        rows_per_chunk: Rows of the file per transaction.
    Returns:
        What happened to the rows, delays by carrier and the worst routes.
    Raises:
        ExceptionGroup: Some chunks could not be loaded; all others were.
        SourceError: The archive does not hold the flights.
    """
    await prepare_table()
    extracted = await extract_chunks(archive, directory, rows_per_chunk)
    try:
        counts = await load_chunks(extracted, lookups)
    finally:
        await remove_file(extracted.path)
    await index_table()
    months = await asyncio.gather(
        *[summarize(carrier, year, month) for carrier, year, month in await months_of()]
    )
    return make_report(counts, months)


async def load_chunks(extracted: Extracted, lookups: Path) -> RowCounts:
    """Load all chunks over the fleet, a wave at a time; a bad one stops no other."""
    counts = RowCounts()
    errors: list[Exception] = []
    progress = Progress(total=len(extracted.chunks))
    for start in range(0, progress.total, CHUNKS_PER_WAVE):
        wave = extracted.chunks[start : start + CHUNKS_PER_WAVE]
        progress.log("batch_start", len(wave))
        outcomes = await asyncio.gather(
            *[load_chunk(extracted.path, chunk, lookups) for chunk in wave],
            return_exceptions=True,
        )
        loaded = [outcome for outcome in outcomes if isinstance(outcome, RowCounts)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        progress = progress.add(succeeded=len(loaded), failed=len(failed))
        progress.log("batch_complete", len(wave))
        counts = sum(loaded, counts)
        errors += failed
    if errors:
        raise ExceptionGroup(
            f"{len(errors)} of {progress.total} chunks were not loaded", errors
        )
    return counts


@durable
async def prepare_table() -> None:
    """Create the table where it is missing, and empty it."""
    async with transaction() as connection:
        await schema.create_table(connection)
        await schema.empty_table(connection)


@durable(retry=NOT_FOR_BAD_DATA)
def extract_chunks(archive: Path, directory: Path, rows_per_chunk: int) -> Extracted:
    """Unpack the archive and divide its file; blocks, so it runs in a thread."""
    path = extract(archive, directory)
    return Extracted(path=path, chunks=index_chunks(path, rows_per_chunk))


@durable(retry=NOT_FOR_BAD_DATA)
async def load_chunk(path: Path, chunk: FileChunk, lookups: Path) -> RowCounts:
    """Read, clean, enrich and write one chunk, exactly once.

    The rows and this activity's result are one transaction: if its worker dies before
    the commit there is neither, afterwards there are both.
    """
    rows = read_chunk(path, chunk)
    cleaned = cleaner(lookups).clean(rows, first_row=chunk.first_row)
    async with transaction() as connection:
        await schema.write_chunk(connection, cleaned.flights)
    return cleaned.counts


@cache
def cleaner(lookups: Path) -> Cleaner:
    """The lookups in memory: read once per process, not once per chunk."""
    return Cleaner(load_lookups(lookups))


@durable
def remove_file(path: Path) -> None:
    """Remove the unpacked file; safe to repeat."""
    path.unlink(missing_ok=True)


@durable
async def index_table() -> None:
    """Index the table for the questions that follow."""
    async with transaction() as connection:
        await schema.create_index(connection)


@durable
async def months_of() -> list[tuple[str, int, int]]:
    """Every (carrier, year, month) that has flights."""
    async with transaction() as connection:
        return await carrier_months(connection)


@durable
async def summarize(carrier: str, year: int, month: int) -> CarrierMonth:
    """Aggregate the flights of one carrier and month."""
    async with transaction() as connection:
        return await carrier_month(connection, carrier, year, month)
