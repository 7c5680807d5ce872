"""Reading the flights file by chunks."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from workers.flights.source import (
    COLUMNS,
    DATA,
    FileChunk,
    SourceError,
    extract,
    index_chunks,
    read_chunk,
)

HEADER = ",".join(COLUMNS)


def write_rows(directory: Path, count: int, *, end: str = "\n") -> Path:
    path = directory / "flights.csv"
    # Rows of different lengths, so that a wrong offset cannot come out right.
    rows = [",".join([str(number) * (number % 7 + 1)] * 19) for number in range(count)]
    path.write_text("\n".join([HEADER, *rows]) + end)
    return path


@pytest.mark.parametrize(("count", "rows_per_chunk"), [(10, 3), (9, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("end", ["\n", ""])
def test_chunks_are_every_row_once(
    tmp_path: Path, count: int, rows_per_chunk: int, end: str
) -> None:
    """The chunks of a file, read in any order, hold each row exactly once."""
    path = write_rows(tmp_path, count, end=end)
    chunks = index_chunks(path, rows_per_chunk)
    rows = {
        chunk.first_row + number: row[0]
        for chunk in reversed(chunks)
        for number, row in enumerate(read_chunk(path, chunk))
    }
    assert rows == {number: str(number) * (number % 7 + 1) for number in range(count)}
    assert sum(chunk.rows for chunk in chunks) == count
    assert all(chunk.rows == rows_per_chunk for chunk in chunks[:-1])


def test_a_file_without_rows_has_no_chunks(tmp_path: Path) -> None:
    """A header alone is a valid file with nothing to do."""
    assert index_chunks(write_rows(tmp_path, 0), 3) == []


def test_another_header_is_refused(tmp_path: Path) -> None:
    """A file with other columns is not read as if they were the known ones."""
    path = tmp_path / "flights.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SourceError, match="columns"):
        index_chunks(path, 3)


def test_a_quoted_row_is_refused_by_number(tmp_path: Path) -> None:
    """Quotes could hide a newline, so the index names the row that has one."""
    path = write_rows(tmp_path, 4)
    lines = path.read_text().splitlines()
    lines[3] = '"a"' + lines[3]
    path.write_text("\n".join(lines))
    with pytest.raises(SourceError, match="row 2"):
        index_chunks(path, 3)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    """A chunk whose rows moved, vanished or joined is refused, not half read."""
    path = write_rows(tmp_path, 10)
    first, second, *_, last = index_chunks(path, 3)
    content = path.read_text()
    for chunk, changed in (
        (last, content[:-2]),
        (first, content.replace("year", "years")),
        (second, content.replace("11,11,", "1111,", 1)),
        (first, content.replace("\n1", ";1", 1)),
    ):
        assert changed != content
        path.write_text(changed)
        with pytest.raises(SourceError, match="changed"):
            read_chunk(path, chunk)
    path.write_text(content)
    assert len(read_chunk(path, second)) == 3


@pytest.mark.parametrize(
    ("first_row", "rows", "offset_bytes", "size_bytes"),
    [(-1, 1, 1, 9), (0, 0, 1, 9), (0, 1, 0, 9), (0, 5, 1, 4)],
)
def test_an_impossible_chunk_does_not_construct(
    first_row: int, rows: int, offset_bytes: int, size_bytes: int
) -> None:
    """A chunk that no file can have is refused where it is made."""
    with pytest.raises(ValueError, match="chunk"):
        FileChunk(
            first_row=first_row,
            rows=rows,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
        )


def pack(directory: Path, *members: tuple[str, str]) -> Path:
    archive = directory / "archive.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        for name, content in members:
            bundle.writestr(name, content)
    return archive


def test_extract_repairs_a_partial_copy_and_keeps_a_whole_one(tmp_path: Path) -> None:
    """Unpacking is safe to repeat: a whole file is kept, a torn one replaced."""
    archive = pack(tmp_path, ("folder/rows.csv", "content"))
    directory = tmp_path / "out" / "deep"
    path = extract(archive, directory)
    assert path == directory / "rows.csv"
    whole = path.stat()
    assert extract(archive, directory).stat().st_ino == whole.st_ino
    path.write_text("cont")
    assert extract(archive, directory).read_text() == "content"
    assert [entry.name for entry in directory.iterdir()] == ["rows.csv"]


def test_extract_wants_one_file(tmp_path: Path) -> None:
    """An archive of several files does not say which one is meant."""
    archive = pack(tmp_path, ("a.csv", ""), ("b.csv", ""))
    with pytest.raises(SourceError, match="2 files"):
        extract(archive, tmp_path / "out")


def test_vendored_files_are_those_of_the_source() -> None:
    """Each file's checksum is the one that SOURCE.md records."""
    text = (DATA / "SOURCE.md").read_text()
    row = r"^\| `([\w.]+)`.*\| `([0-9a-f]{64})` \|$"
    recorded = dict(re.findall(row, text, re.MULTILINE))
    actual = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in DATA.iterdir()
        if path.suffix in {".csv", ".zip"}
    }
    assert recorded == actual
