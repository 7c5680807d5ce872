"""The primary is lost and its standby promoted: the workers find it and go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

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
from tests.e2e.harness.fleet import Fleet, wait_until
from tests.e2e.harness.mix import Mix
from tests.servers import PASSWORD, PORT, USER, Server, binaries_or_skip
from tests.servers import short_directory as make_short_directory


class Pair:
    """A primary and its streaming standby."""

    def __init__(self, directory: Path) -> None:
        binaries = binaries_or_skip(18)
        self.primary = Server(binaries, directory / "a", {"wal_level": "replica"})
        self.standby = Server(binaries, directory / "b")

    @property
    def url(self) -> str:
        """Both of them; whoever takes writes is connected to."""
        hosts = f"{self.primary.directory},{self.standby.directory}"
        ports = f"{PORT},{PORT}"
        place = f"host={hosts}&port={ports}&target_session_attrs=read-write"
        return f"postgresql://{USER}:{PASSWORD}@/postgres?{place}"

    def start(self, **settings: object) -> None:
        """Start both."""
        self.primary.initialize()
        self.primary.start(**settings)
        self.standby.copy_of(self.primary)
        self.standby.start()

    def stop(self) -> None:
        self.standby.stop()
        self.primary.stop()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with make_short_directory() as directory:
        pair = Pair(directory)
        try:
            yield pair
        finally:
            pair.stop()


@pytest.fixture
async def app(pair: Pair) -> AsyncIterator[Stent]:
    """Over both servers, with nothing that the standby lacks."""
    await asyncio.to_thread(pair.start)
    async with Stent(pair.url) as app:
        await prepare_effects(pair.primary.url)
        yield app


async def wait_for_replay(pair: Pair) -> None:
    """Until the standby has everything that is on the primary now."""
    connection = await asyncpg.connect(pair.primary.url)
    query = "select replay_lsn >= $1 from pg_stat_replication where state = 'streaming'"
    written = await connection.fetchval("select pg_current_wal_lsn()")
    while not await connection.fetchval(query, written):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await connection.close()


@pytest.mark.timeout(90)
async def test_synchronous_standby_takes_over_without_loss(
    pair: Pair, app: Stent, tmp_path: Path
) -> None:
    """With synchronous replication every promise outlives the primary."""
    connection = await asyncpg.connect(pair.primary.url)
    await connection.execute("alter system set synchronous_standby_names = '*'")
    await connection.execute("select pg_reload_conf()")
    await connection.close()
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=pair.url) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        await mix.dispatch()
        await fleet.wait_for_more("start", 40, lambda: mix.done)
        assert not mix.done
        await asyncio.to_thread(pair.primary.kill)
        await asyncio.to_thread(pair.standby.promote)
        connection = await asyncpg.connect(pair.standby.url)
        # It has no standby of its own to wait for.
        await connection.execute("alter system reset synchronous_standby_names")
        await connection.execute("select pg_reload_conf()")
        await connection.close()
        assert await mix.results() == mix.expected
        records = fleet.ledger.records()
        committed = await read_committed(pair.standby.url)
        assert check_calls(records, committed=[committed]) == 0
        check_pasts(records)
        await check_nothing_left(pair.standby.url)
        for worker in workers:
            assert not worker.ended
            assert not worker.lines("worker.taken_over")
            assert not worker.lines("lease.lost")


@pytest.mark.timeout(90)
async def test_lagging_standby_takes_over(
    pair: Pair, app: Stent, tmp_path: Path
) -> None:
    """What the standby never got is done again; nobody waits for what is gone."""
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=pair.url) for _ in range(2)]
        mix = Mix(app)
        await mix.dispatch()
        await mix.dispatch()
        execution_id = await app.dispatch(workload.sequence, 60, 0.05)
        await fleet.wait_for_more("start", 30, lambda: mix.done)
        await wait_for_replay(pair)
        await asyncio.to_thread(pair.standby.kill)
        # From here on every commit will be lost.
        await fleet.wait_for_more("end", 25, lambda: mix.done)
        await asyncio.to_thread(pair.primary.kill)
        await asyncio.to_thread(pair.standby.start)
        await asyncio.to_thread(pair.standby.promote)
        assert await mix.results() == mix.expected
        outcome = await app.wait_for(execution_id, "60s")
        assert outcome.unwrap() == sum(2 * n for n in range(60))
        connection = await asyncpg.connect(pair.standby.url)
        unfinished = "select count(*) from stent.executions where finished_at is null"
        while await connection.fetchval(unfinished):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await connection.close()
        await check_nothing_left(pair.standby.url)
        await wait_until(lambda: any(w.lines("lease.lost") for w in workers))
        assert not any(worker.ended for worker in workers)
        # And they go on as before.
        assert (await app.wait_for(await app.dispatch(workload.sequence, 3))).ok
