"""The flights job on real worker processes: killed in the middle, counted exactly."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from stent import Settings, Stent
from workers.flights import job
from workers.flights.clean import MalformedRowError
from workers.flights.demo import (
    INTERRUPTED,
    WORKERS,
    Run,
    make_console,
    observe,
    wait_until_ready,
)
from workers.flights.display import Display, show_proof
from workers.flights.fleet import (
    ROOT,
    WorkerDiedError,
    WorkerProcess,
    start_worker,
    stop_workers,
)
from workers.flights.source import ARCHIVE, COLUMNS
from workers.flights.watch import Expected, prove, read_expected

ROWS = 20_000
ROWS_PER_CHUNK = 100
KILL_AT = 0.2
HOLD_LATER_ROWS = """
create function wait_for_gate() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(1);
    return new;
end $$;
create trigger gate before insert on flights for each row
    when (new.row_number >= 6000) execute function wait_for_gate()
"""
"""The copies of these rows wait in open transactions until a worker was killed."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the file, packed like all of it."""
    path = tmp_path_factory.mktemp("archive") / "flights.csv.zip"
    with (
        zipfile.ZipFile(ARCHIVE) as whole,
        whole.open(whole.infolist()[0]) as packed,
        zipfile.ZipFile(path, "w") as part,
    ):
        lines = b"".join(packed.readline() for _ in range(ROWS + 1))
        part.writestr("flights.csv", lines)
    return path


@pytest.fixture(scope="module")
def expected(archive: Path) -> Expected:
    return read_expected(archive)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[[str, int], list[WorkerProcess]]]:
    """Starts workers on a database; those still alive afterwards are killed."""
    started: list[WorkerProcess] = []

    def start(url: str, count: int) -> list[WorkerProcess]:
        environment = {"STENT_DATABASE_URL": url}
        workers = [
            start_worker(f"worker {number}", tmp_path, environment)
            for number in range(1, count + 1)
        ]
        started.extend(workers)
        return workers

    yield start
    for worker in started:
        worker.kill()


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    settings = Settings(database_url=database_url)
    async with Stent(settings=settings) as opened:
        yield opened


async def open_once_killed(
    gate: asyncpg.Connection, workers: list[WorkerProcess]
) -> None:
    """Those that wait may go on; before that a few at a time, so all have turns."""
    while len(workers) > 1:
        await wait_a_moment()
        await gate.execute("select pg_advisory_unlock(1)")
        await gate.execute("select pg_advisory_lock(1)")
    await gate.close()


async def wait_a_moment() -> None:
    await asyncio.sleep(0.2)


async def test_a_killed_worker_loses_no_row_and_doubles_none(
    app: Stent,
    connection: asyncpg.Connection,
    fleet: Callable[[str, int], list[WorkerProcess]],
    archive: Path,
    expected: Expected,
    tmp_path: Path,
) -> None:
    """It owned the workflow and had transactions open when kill -9 ended it."""
    await connection.execute((ROOT / "workers/flights/schema.sql").read_text())
    await connection.execute(HOLD_LATER_ROWS)
    gate = await asyncpg.connect(app.url)
    await gate.execute("select pg_advisory_lock(1)")
    workers = fleet(app.url, 2)
    await wait_until_ready(connection, workers)
    opening = asyncio.create_task(open_once_killed(gate, workers))
    told = io.StringIO()
    with Display(make_console(told), expected) as display:
        execution_id = await app.dispatch(
            job.flights_etl,
            tmp_path / "work",
            archive,
            rows_per_chunk=ROWS_PER_CHUNK,
        )
        run = Run(
            execution_id=execution_id,
            connection=connection,
            workers=workers,
            expected=expected,
            display=display,
        )
        report = await observe(app, run, kill_at=KILL_AT)
    await opening
    stop_workers(workers)
    proof = await prove(connection, execution_id, expected)
    assert proof.holds, proof
    assert proof.done.chunks == ROWS // ROWS_PER_CHUNK
    assert report.counts == proof.done.counts
    assert sum(line.delays.flights for line in report.carriers) == proof.rows
    assert len(workers) == 1
    assert "kill -9" in told.getvalue()
    assert "has taken over" in told.getvalue()
    assert list((tmp_path / "work").iterdir()) == []

    await connection.execute(
        "insert into flights select * from flights order by row_number limit 2"
    )
    await connection.execute(
        "delete from flights where row_number = (select max(row_number) from flights)"
    )
    wrong = await prove(connection, execution_id, expected)
    assert (wrong.holds, wrong.lost, wrong.twice) == (False, 1, 2)
    show_proof(make_console(told), wrong, duration_seconds=1)
    assert "Wrong:" in told.getvalue()


async def test_a_worker_that_dies_by_itself_ends_the_demonstration(
    app: Stent,
    connection: asyncpg.Connection,
    fleet: Callable[[str, int], list[WorkerProcess]],
) -> None:
    """What the worker said last is in the error; nobody waits for the dead."""
    workers = fleet("postgresql://nobody@127.0.0.1:1/nowhere?connect_timeout=1", 1)
    with pytest.raises(WorkerDiedError, match="worker 1 ended with status 1"):
        await wait_until_ready(connection, workers)


async def test_a_bad_chunk_stops_no_other_and_fails_the_job(
    database_url: str,
    connection: asyncpg.Connection,
    archive: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Five of six chunks are written; the error names the row of the sixth."""
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(bad, "w") as part:
        lines = whole.read("flights.csv").splitlines(keepends=True)[:301]
        fields = lines[151].split(b",")
        fields[COLUMNS.index("distance")] = b"far"
        lines[151] = b",".join(fields)
        part.writestr("flights.csv", b"".join(lines))
    caplog.set_level(logging.INFO, job.logger.name)
    settings = Settings(database_url=database_url)
    async with Stent.bootstrap(settings=settings, serve=True) as app:
        execution_id = await app.dispatch(
            job.flights_etl, tmp_path / "work", bad, rows_per_chunk=50
        )
        outcome = await app.wait_for(execution_id)
    assert isinstance(outcome.error, ExceptionGroup)
    assert str(outcome.error) == "1 of 6 chunks were not loaded (1 sub-exception)"
    [error] = outcome.error.exceptions
    assert isinstance(error, MalformedRowError)
    assert error.row_number == 150
    chunks = await connection.fetch(
        "select distinct row_number / 50 as chunk from flights order by chunk"
    )
    assert [row["chunk"] for row in chunks] == [0, 1, 2, 4, 5]
    records = [record for record in caplog.records if record.name == job.logger.name]
    assert [facts(record) for record in records] == [
        ("batch_start", 6, 0.0, 0, 6, 0, 0, 0.0),
        ("batch_complete", 6, 100.0, 6, 6, 5, 1, 5 / 6),
    ]
    assert list((tmp_path / "work").iterdir()) == []


def facts(record: logging.LogRecord) -> tuple[object, ...]:
    return tuple(
        getattr(record, name)
        for name in (
            "operation",
            "batch_size",
            "progress_pct",
            "processed",
            "total",
            "succeeded",
            "failed",
            "success_rate",
        )
    )


def test_an_interrupted_demonstration_leaves_nothing(tmp_path: Path) -> None:
    """A signal in the middle: no process and no file of it remains."""
    with subprocess.Popen(
        [sys.executable, "-m", "workers.flights.demo"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        ready = next(line for line in demo.stdout if line.startswith("Ready:"))
        [home] = tmp_path.iterdir()
        server = (home / "postgres" / "server").resolve()
        demo.send_signal(signal.SIGTERM)
        assert "Stopping." in demo.stdout.read()
        assert demo.wait() == INTERRUPTED
    assert list(tmp_path.iterdir()) == []
    assert not server.exists()
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", ready)]
    assert len(pids) == len(WORKERS)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
