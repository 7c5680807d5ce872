"""Through pgbouncer in transaction mode everything works, and nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from stent import Settings, Stent
from stent.store.migrate import apply_migrations
from tests.e2e.harness import workload
from tests.e2e.harness.checks import (
    check_calls,
    check_nothing_left,
    check_pasts,
    prepare_effects,
    read_committed,
)
from tests.e2e.harness.fleet import Fleet, wait_until
from tests.e2e.harness.mix import Mix
from tests.e2e.harness.pooler import Pooler, pooling, program_or_skip
from tests.servers import Server, binaries_or_skip, running

LEASE_SECONDS = 2.0
BACKENDS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    program_or_skip()
    with running(binaries_or_skip(18)) as server:
        yield server


@pytest.fixture
def pooler(server: Server) -> Iterator[Pooler]:
    with pooling(server, backends=BACKENDS) as pooler:
        yield pooler


@pytest.fixture
async def direct_url(server: Server) -> str:
    """A database of the test's own, around the pooler."""
    name = f"test_{uuid4().hex}"
    administrator = await asyncpg.connect(server.url)
    await administrator.execute(f"create database {name}")
    await administrator.close()
    url = server.url_of(name)
    await prepare_effects(url)
    return url


@pytest.fixture
def url(pooler: Pooler, direct_url: str) -> str:
    """The same database through the pooler."""
    return pooler.url_of(direct_url)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("way_around", [True, False])
async def test_workers_are_killed_behind_a_pooler(
    tmp_path: Path, url: str, direct_url: str, way_around: bool
) -> None:
    """Around the pooler the lock tells that a worker was killed, else the lease."""
    around = direct_url if way_around else None
    settings = Settings(database_url=url, direct_url=around)
    async with Fleet(tmp_path) as fleet, Stent(settings=settings) as app:

        async def start() -> None:
            await fleet.start(url=url, direct_url=around, lease=LEASE_SECONDS)

        await start()
        await start()
        mix = Mix(app)
        await mix.dispatch()
        lost = []
        for victim in list(fleet.processes.values()):
            await fleet.wait_for_more("start", 10, lambda: mix.done)
            lost.append(victim.pid)
            await victim.kill()
            await start()
        assert await mix.results() == mix.expected
        records = fleet.ledger.records()
        committed = await read_committed(direct_url)
        check_calls(records, committed=[committed], lost=lost)
        check_pasts(records)
        await check_nothing_left(direct_url)
        reasons = {
            line["reason"]
            for process in fleet.processes.values()
            for line in process.lines("worker.taken_over")
        }
        assert reasons <= ({"lock", "lease"} if way_around else {"lease"})
        living = [p for p in fleet.processes.values() if not p.ended]
        warned = [bool(p.lines("database.pooled")) for p in living]
        assert warned == [not way_around] * len(living)


@pytest.mark.timeout(60)
async def test_pooler_may_drop_its_backends(
    tmp_path: Path, url: str, direct_url: str
) -> None:
    """What ends on the pooler's side is no sign of death: nobody is taken over."""
    connection = await asyncpg.connect(direct_url)
    async with Fleet(tmp_path) as fleet, Stent(url) as app:
        workers = [await fleet.start(url=url) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        ended = 0
        for _ in range(6):
            await fleet.wait_for_more("start", 8, lambda: mix.done)
            ended += await connection.fetchval(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
                " and backend_type = 'client backend'"
                # Its end would cost the transaction of an activity its attempt.
                " and application_name not like 'stent transaction%'"
            )
        assert await mix.results() == mix.expected
        records = fleet.ledger.records()
        check_calls(records, committed=[await read_committed(direct_url)])
        check_pasts(records)
        await check_nothing_left(direct_url)
        for worker in workers:
            assert not worker.ended
            assert not worker.lines("worker.taken_over")
            assert not worker.lines("lease.lost")
    await connection.close()
    assert ended >= 6


@pytest.mark.timeout(60)
async def test_many_clients_share_few_backends(
    tmp_path: Path, url: str, direct_url: str
) -> None:
    """No statement, lock, or channel of a client stays on a backend of the pooler."""
    connection = await asyncpg.connect(direct_url)
    async with Fleet(tmp_path) as fleet, Stent(url) as app:
        for _ in range(3):
            await fleet.start(url=url)
        mix = Mix(app)
        await mix.dispatch()
        assert await mix.results() == mix.expected
        row = await connection.fetchrow(
            "select (select count(*) from pg_locks where locktype = 'advisory') locks,"
            " (select count(*) from pg_stat_activity where pid <> pg_backend_pid()"
            "    and datname = current_database()) backends"
        )
        assert row["locks"] == 0
        assert row["backends"] <= BACKENDS
        assert check_calls(fleet.ledger.records()) == 0
    await connection.close()


async def test_schema_is_made_through_a_pooler(url: str, direct_url: str) -> None:
    """Several processes may migrate at once; a database without schema is no wall."""

    async def migrate() -> None:
        async with Stent(url):
            pass

    await asyncio.gather(*[migrate() for _ in range(4)])
    connection = await asyncpg.connect(direct_url)
    assert await apply_migrations(connection) == []
    await connection.close()


@pytest.mark.timeout(60)
async def test_work_between_processes_is_found_without_hints(
    tmp_path: Path, url: str
) -> None:
    """A worker without LISTEN looks by itself."""
    async with Fleet(tmp_path) as fleet, Stent(url) as app:
        worker = await fleet.start(url=url)
        await wait_until(lambda: bool(worker.lines("database.pooled")))
        for _ in range(3):
            execution_id = await app.dispatch(workload.sequence, 3)
            assert (await app.wait_for(execution_id)).unwrap() == 6
