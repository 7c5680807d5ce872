"""A server that refuses for a while: workers say why, wait, and go on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import asyncpg
import pytest

from stent import Stent
from tests.e2e.harness import workload
from tests.e2e.harness.checks import check_calls, check_nothing_left, check_pasts
from tests.e2e.harness.commands import clean_environment
from tests.e2e.harness.fleet import Fleet, Process, wait_until
from tests.servers import Server, binaries_or_skip, running

CONNECTIONS_MAX = 20
ROLE = "app"


@pytest.fixture
def server() -> Iterator[Server]:
    with running(binaries_or_skip(18), max_connections=CONNECTIONS_MAX) as server:
        yield server


@pytest.fixture
async def url(server: Server) -> str:
    """As a role without privileges, for which no connection is reserved."""
    administrator = await asyncpg.connect(server.url)
    await administrator.execute(f"create role {ROLE} login")
    await administrator.execute(f"create database work owner {ROLE}")
    await administrator.close()
    return server.url_of("work").replace("//stent:", f"//{ROLE}:")


def lost(worker: Process, word: str) -> bool:
    """Whether it has logged that the database is away for that reason."""
    return any(word in str(line["error"]) for line in worker.lines("database.lost"))


async def test_a_role_needs_no_more_than_its_schema(
    tmp_path: Path, server: Server
) -> None:
    """It may create nothing in the database but in the schema it was given."""
    administrator = await asyncpg.connect(server.url)
    await administrator.execute("create role modest login")
    await administrator.execute("create schema stent authorization modest")
    await administrator.close()
    url = server.url.replace("//stent:", "//modest:")
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "stent", "--url", url, "db", "migrate"],
        cwd=tmp_path,
        env=clean_environment(),
    )
    assert await process.wait() == 0
    async with Fleet(tmp_path) as fleet, Stent(url) as app:
        await fleet.start(url=url)
        outcome = await app.wait_for(await app.dispatch(workload.twice, 2), "20s")
        assert outcome.unwrap() == 8


class Hog:
    """Takes every connection that is free."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._taken: list[asyncpg.Connection] = []

    async def take_until(self, enough: Callable[[], bool]) -> None:
        """Take what becomes free until the condition holds."""
        while not enough():
            with suppress(asyncpg.TooManyConnectionsError):
                self._taken.append(await asyncpg.connect(self._url))
                continue
            await asyncio.sleep(0.005)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._taken:
            await connection.close()


@pytest.mark.timeout(60)
async def test_connections_run_out(tmp_path: Path, server: Server, url: str) -> None:
    """A worker that gets no connection keeps trying and says what to raise."""
    administrator = await asyncpg.connect(server.url)
    async with Fleet(tmp_path) as fleet, Stent(url) as app:
        worker = await fleet.start(url=url)
        execution_id = await app.dispatch(workload.sequence, 40, 0.02)
        await wait_until(lambda: len(fleet.ledger.records("end")) >= 5)
        async with Hog(url) as hog:
            hogging = asyncio.create_task(
                hog.take_until(lambda: lost(worker, "TooManyConnections"))
            )
            while not hogging.done():
                await administrator.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where application_name like 'stent %'"
                    "   and application_name not like 'stent client%'"
                )
                await asyncio.sleep(0.05)
            await hogging
            assert lost(worker, "raise max_connections, or run fewer workers")
        outcome = await app.wait_for(execution_id, "40s")
        assert outcome.unwrap() == sum(2 * n for n in range(40))
        assert not worker.ended
        check_pasts(fleet.ledger.records())
        await check_nothing_left(url)
    await administrator.close()


@pytest.mark.timeout(60)
async def test_server_takes_no_writes_for_a_while(
    tmp_path: Path, server: Server, url: str
) -> None:
    """As on a standby before it is promoted, or on a full disk of a managed server."""
    administrator = await asyncpg.connect(server.url)

    async def set_read_only(value: str) -> None:
        await administrator.execute(
            f"alter system set default_transaction_read_only = {value}"
        )
        await administrator.execute("select pg_reload_conf()")

    async with Fleet(tmp_path) as fleet, Stent(url) as app:
        worker = await fleet.start(url=url)
        execution_id = await app.dispatch(workload.sequence, 30, 0.02)
        await wait_until(lambda: len(fleet.ledger.records("end")) >= 5)
        await set_read_only("on")
        await wait_until(lambda: lost(worker, "target_session_attrs=read-write"))
        await administrator.execute("set default_transaction_read_only = off")
        await set_read_only("off")
        outcome = await app.wait_for(execution_id, "40s")
        assert outcome.unwrap() == sum(2 * n for n in range(30))
        assert check_calls(fleet.ledger.records()) == 0
        assert not worker.ended
        assert not worker.lines("lease.lost")
    await administrator.close()
