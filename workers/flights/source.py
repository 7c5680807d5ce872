"""Read the flights CSV in chunks, each at the cost of its own bytes alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
ARCHIVE = DATA / "flights.csv.zip"
COLUMNS = (
    "year",
    "month",
    "day",
    "dep_time",
    "sched_dep_time",
    "dep_delay",
    "arr_time",
    "sched_arr_time",
    "arr_delay",
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "air_time",
    "distance",
    "hour",
    "minute",
    "time_hour",
)


class SourceError(ValueError):
    """The file is not the table this job reads, or it changed since it was indexed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChunk:
    """A range of whole rows of a CSV file.

    Attributes:
        first_row: Number of its first row, counted from 0 without the header.
        rows: How many rows it has, at least one.
        offset_bytes: Where its first row begins in the file, after the header.
        size_bytes: Its length in the file, the last newline included.
    """

    first_row: int
    rows: int
    offset_bytes: int
    size_bytes: int

    def __post_init__(self) -> None:
        """Refuse a range that no file can have."""
        if self.first_row < 0 or self.offset_bytes < 1:
            raise ValueError(f"a chunk begins before the first row: {self}")
        if self.rows < 1 or self.size_bytes < self.rows:
            raise ValueError(f"a chunk has at least one row of one byte: {self}")


def extract(archive: Path, directory: Path) -> Path:
    """Unpack the one CSV file of an archive, once; safe to repeat and to race.

    Args:
        archive: A zip file with exactly one member.
        directory: Where the CSV goes; created if missing.
    Returns:
        The path of the CSV. A complete copy that is already there is kept.
    Raises:
        SourceError: The archive holds no file, or more than one.
    """
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        if len(members) != 1:
            raise SourceError(f"{archive} holds {len(members)} files, expected one")
        member = members[0]
        path = directory / Path(member.filename).name
        if path.exists() and path.stat().st_size == member.file_size:
            return path
        directory.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed, so that nobody ever reads half a file.
        descriptor, partial = tempfile.mkstemp(prefix=path.name, dir=directory)
        try:
            with os.fdopen(descriptor, "wb") as target, bundle.open(member) as packed:
                shutil.copyfileobj(packed, target, length=1 << 20)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    return path


def index_chunks(path: Path, rows_per_chunk: int) -> list[FileChunk]:
    """Divide a CSV file into chunks by scanning its line ends, one line in memory.

    Args:
        path: The flights CSV, header first.
        rows_per_chunk: At least one; the last chunk may have fewer rows.
    Returns:
        The chunks in file order; together they are every row exactly once.
    Raises:
        SourceError: The header is another one, or a row holds a quote: a newline
            inside quotes would make byte offsets lie.
    """
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk must be at least 1, not {rows_per_chunk}")
    chunks: list[FileChunk] = []
    with path.open("rb") as file:
        header = file.readline()
        if tuple(header.decode().rstrip("\r\n").split(",")) != COLUMNS:
            raise SourceError(f"{path} does not begin with the columns of the flights")
        begin = end = len(header)
        row = first_row = 0
        for row, line in enumerate(file, start=1):
            if b'"' in line:
                raise SourceError(f"{path}, row {row - 1}: quotes are not supported")
            end += len(line)
            if row - first_row == rows_per_chunk:
                chunks.append(_chunk(first_row, row, begin, end))
                begin, first_row = end, row
        if row > first_row:
            chunks.append(_chunk(first_row, row, begin, end))
    return chunks


def _chunk(first_row: int, next_row: int, begin: int, end: int) -> FileChunk:
    return FileChunk(
        first_row=first_row,
        rows=next_row - first_row,
        offset_bytes=begin,
        size_bytes=end - begin,
    )


def read_chunk(path: Path, chunk: FileChunk) -> list[list[str]]:
    """Read the rows of one chunk: a seek and a read of its bytes.

    Returns:
        One list of strings per row, in the order of `COLUMNS`, nothing interpreted.
    Raises:
        SourceError: The file no longer has those rows at that place.
    """
    with path.open("rb") as file:
        # One byte more on either side: a chunk stands between two line ends.
        file.seek(chunk.offset_bytes - 1)
        before = file.read(1)
        content = file.read(chunk.size_bytes)
        after = file.read(1)
    # Plain splitting takes half the time of the csv module; the index refused quotes.
    rows = [line.split(",") for line in content.decode().splitlines()]
    whole = before == b"\n" and (content.endswith(b"\n") or not after)
    if not whole or len(content) != chunk.size_bytes or len(rows) != chunk.rows:
        raise SourceError(
            f"{path} changed since it was indexed: bytes {chunk.offset_bytes} to "
            f"{chunk.offset_bytes + chunk.size_bytes} are not its rows "
            f"{chunk.first_row} to {chunk.first_row + chunk.rows - 1}"
        )
    return rows
