"""Postgres is restarted, cut off or loses answers: work pauses and goes on."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from stent import Stent
from tests.e2e.harness import workload
from tests.e2e.harness.checks import (
    check_calls,
    check_nothing_left,
    check_pasts,
    prepare_effects,
    read_committed,
)
from tests.e2e.harness.fleet import Fleet, Process, wait_until
from tests.e2e.harness.ledger import Record
from tests.e2e.harness.mix import Mix
from tests.e2e.harness.proxy import Proxy

LEASE_SECONDS = 2.0
MIGRATING_PROCESSES = 20
DEATHS: Final = {
    "killed": signal.SIGKILL,
    "shut down at once": signal.SIGQUIT,
    "shut down": signal.SIGINT,
}


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    await prepare_effects(database_url)
    async with Stent(database_url) as app:
        yield app


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For sockets, whose paths are limited to about a hundred bytes."""
    path = Path(tempfile.mkdtemp(prefix="stent-px-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(60)
async def test_lost_connections_cost_nothing(
    app: Stent, tmp_path: Path, connection: asyncpg.Connection
) -> None:
    """Backends of two workers are ended in every number, again and again."""
    chance = random.Random(5)
    own = await connection.fetchval("select pg_backend_pid()")
    ended = 0
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        for number in range(1, 8):
            await fleet.wait_for_more("start", 5, lambda: mix.done)
            rows = await connection.fetch(
                "select pid from pg_stat_activity where datname = current_database()"
                " and application_name like 'stent %'"
                " and application_name not like 'stent client%'"
                " and application_name <> 'stent transaction' and pid <> $1",
                own,
            )
            for row in chance.sample(rows, min(number, len(rows))):
                query = "select pg_terminate_backend($1)"
                ended += await connection.fetchval(query, row["pid"])
        assert await mix.results() == mix.expected
        await check_undisturbed(fleet, app, workers)
    assert ended >= 10


@pytest.mark.timeout(60)
@pytest.mark.parametrize("death", DEATHS)
async def test_restart_of_postgres_costs_nothing(
    tmp_path: Path, server_home: Path, death: str
) -> None:
    """Running activities go on while Postgres is away; nobody takes anybody over."""
    async with Fleet(tmp_path) as fleet, Stent(home=server_home) as app:
        await prepare_effects(app.url)
        home = str(server_home)
        workers = [await fleet.start(home=home, slots=10) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        held = await app.dispatch(workload.fan_out, 12, 0.5)
        await wait_until(lambda: len(fleet.ledger.records("start")) >= 30)
        assert app._server is not None
        pid = app._server.cluster.running_pid()
        assert pid is not None
        os.kill(pid, DEATHS[death])
        assert await mix.results() == mix.expected
        assert (await app.wait_for(held)).ok
        assert app._server.cluster.running_pid() != pid
        await check_undisturbed(fleet, app, workers)
        assert any(worker.lines("database.returned") for worker in workers)


async def check_undisturbed(fleet: Fleet, app: Stent, workers: list[Process]) -> None:
    """Nothing ran twice, was taken over, or is left; the same processes work."""
    records = fleet.ledger.records()
    assert check_calls(records, committed=[await read_committed(app.url)]) == 0
    check_pasts(records)
    await check_nothing_left(app.url)
    for worker in workers:
        assert not worker.ended
        assert not worker.lines("worker.taken_over")
        assert not worker.lines("lease.lost")


@pytest.mark.timeout(60)
async def test_cut_off_worker_stops_in_time(
    app: Stent, tmp_path: Path, short_directory: Path
) -> None:
    """A worker that the database does not hear starts nothing after its lease.

    Later it learns that it was replaced, changes nothing, and works again.
    """
    async with Proxy(app.url, short_directory) as proxy, Fleet(tmp_path) as fleet:
        lonely = await fleet.start(url=proxy.url, lease=LEASE_SECONDS, slots=2)
        execution_id = await app.dispatch(workload.fan_out, 60, 0.1)

        def ends() -> list[Record]:
            return [r for r in fleet.ledger.records("end") if r.pid == lonely.pid]

        await wait_until(lambda: len(ends()) >= 6)
        proxy.block()
        other = await fleet.start(url=app.url, lease=LEASE_SECONDS)
        await wait_until(lambda: bool(other.lines("worker.taken_over")))
        fleet.ledger.write("replaced")
        outcome = await app.wait_for(execution_id)
        committed = await read_committed(app.url)
        assert outcome.unwrap() == sum(2 * n + 2 * (1000 + n) for n in range(60))
        proxy.unblock()
        await wait_until(lambda: bool(lonely.lines("lease.lost")))
        assert await other.stop() == 0
        assert (await app.wait_for(await app.dispatch(workload.sequence, 3))).ok
        records = fleet.ledger.records()
        (replaced,) = [r for r in records if r.event == "replaced"]
        late = [
            record
            for record in records
            if record.event == "start"
            and record.pid == lonely.pid
            and record.at > replaced.at
            and record.execution == execution_id
        ]
        assert not late
        assert lonely.lines("lease.running_out")
        check_calls(records, committed=[committed], lost=[lonely.pid])
        check_pasts(records)
        await check_nothing_left(app.url)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("service", "statement"), [("writer", "stent.flush("), ("claimer", "stent.claim_")]
)
async def test_lost_answers_are_found_out(
    app: Stent, tmp_path: Path, short_directory: Path, service: str, statement: str
) -> None:
    """The server commits, its answer is lost: the worker finds out what happened."""
    numbers = itertools.count(1)

    def cut_some(name: str, sql: str) -> bool:
        # A round of claims has some four statements: it must get through at times.
        meant = name == f"stent {service}" and statement in sql
        return meant and next(numbers) % 7 == 0

    async with Proxy(app.url, short_directory) as proxy, Fleet(tmp_path) as fleet:
        proxy.cut_answer = cut_some
        worker = await fleet.start(url=proxy.url)
        mix = Mix(app)
        await mix.dispatch()
        assert await mix.results() == mix.expected
        await check_undisturbed(fleet, app, [worker])
        lost = [line["service"] for line in worker.lines("database.lost")]
        assert service in lost
    assert proxy.cuts >= 3


@pytest.mark.timeout(60)
async def test_lost_transactions_are_found_out(
    app: Stent, tmp_path: Path, short_directory: Path
) -> None:
    """A COMMIT of an activity's own transaction whose answer is lost counts once."""
    async with Proxy(app.url, short_directory) as proxy, Fleet(tmp_path) as fleet:
        proxy.cut_commit = lambda number: number % 2 == 1
        await fleet.start(url=proxy.url)
        execution_id = await app.dispatch(workload.transactional, 4)
        assert (await app.wait_for(execution_id)).unwrap() == 12
        assert check_calls(fleet.ledger.records()) == 0
        rows = await count_effects(app.url)
        assert rows == 4
    assert proxy.cuts >= 2


@pytest.mark.timeout(60)
async def test_twenty_processes_migrate_at_once(
    empty_database_url: str, tmp_path: Path
) -> None:
    """All of them start, and every migration is applied once."""
    async with Fleet(tmp_path) as fleet:
        workers = await asyncio.gather(
            *[fleet.start(url=empty_database_url) for _ in range(MIGRATING_PROCESSES)]
        )
        assert len(fleet.ledger.records("ready")) == MIGRATING_PROCESSES
        async with Stent(empty_database_url, migrate=False) as app:
            assert (await app.wait_for(await app.dispatch(workload.fan_out, 40))).ok
        statuses = await asyncio.gather(*[worker.stop() for worker in workers])
        assert set(statuses) == {0}


async def count_effects(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        count: int = await connection.fetchval("select count(*) from effects")
    finally:
        await connection.close()
    return count
