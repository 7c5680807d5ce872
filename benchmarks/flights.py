"""W6: the loading half of the flights job on the engine, beside the plain loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from stent import Stent, durable
from workers.flights.clean import RowCounts
from workers.flights.job import extract_chunks, load_chunks, prepare_table
from workers.flights.source import ARCHIVE, DATA

ROWS_PER_CHUNK = 1000


@durable
async def load_flights(directory: Path) -> RowCounts:
    """What the plain loop does: unpack, parse, clean, enrich, copy."""
    await prepare_table()
    extracted = await extract_chunks(ARCHIVE, directory, ROWS_PER_CHUNK)
    return await load_chunks(extracted, DATA)


async def durable_flights(app: Stent) -> float:
    """Load all flights with the engine.

    Returns:
        Rows of the file per second, from dispatch to the result.
    """
    with tempfile.TemporaryDirectory(prefix="stent-bench-") as directory:
        began = time.perf_counter()
        execution_id = await app.dispatch(load_flights, Path(directory))
        outcome = await app.wait_for(execution_id)
        seconds = time.perf_counter() - began
    counts: RowCounts = outcome.unwrap()
    return counts.read / seconds
