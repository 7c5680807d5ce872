"""Every supported version of Postgres takes the schema and runs workflows.

``make test-postgres`` runs all tests of the database on them; these are the smoke.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest

import stent
from stent import Stent, durable
from stent.store.migrate import apply_migrations
from tests.servers import VERSIONS, Server, binaries_or_skip, running

OF_EMBEDDED = 18
"""What every other test runs on."""
OTHERS = [version for version in VERSIONS if version != OF_EMBEDDED]
ROWS = 50_000


@durable(retry=3)
async def step(x: int) -> int:
    if x == 7 and stent.current().attempt == 1:
        raise ConnectionError
    return x


@durable(effects="transactional")
async def insert(x: int) -> int:
    async with stent.transaction() as connection:
        await connection.execute("insert into effects values ($1)", x)
    return x


@durable
async def everything(count: int) -> int:
    total = sum(await asyncio.gather(*[step(n) for n in range(count)]))
    total += sum(await stent.map(step, range(count)))
    total += await insert(1)
    await stent.sleep("10ms")
    return total + await child(count)


@durable
async def child(count: int) -> int:
    return await step(count) + await step(count)


@pytest.fixture(params=OTHERS, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with running(binaries_or_skip(request.param)) as server:
        yield server


@pytest.mark.timeout(60)
async def test_workflows_run_on_every_version(server: Server) -> None:
    """Fan-out, map, retry, transaction, timer and child, all in one."""
    async with Stent.bootstrap(server.url, serve=True) as app:
        connection = await asyncpg.connect(server.url)
        await connection.execute("create table effects (x integer)")
        outcome = await app.wait_for(await app.dispatch(everything, 300), "50s")
        assert outcome.unwrap() == 2 * sum(range(300)) + 1 + 600
        assert await connection.fetchval("select count(*) from effects") == 1
        await connection.close()


@pytest.mark.timeout(60)
async def test_claims_probe_their_index_on_every_version(server: Server) -> None:
    """A claim behind many rows of others reads a few pages, no more."""
    connection = await asyncpg.connect(server.url)
    await apply_migrations(connection)
    await connection.execute(
        "insert into stent.tasks"
        " (execution_id, call_id, address, function, queue, available_at)"
        " select gen_random_uuid(), gen_random_uuid(), 'a',"
        "        case when n % 1000 = 0 then 'rare' else 'common' end, 'crowd',"
        "        now() - interval '1 hour'"
        f" from generate_series(1, {ROWS}) n"
    )
    rows = await connection.fetch(
        "explain (analyze, buffers, timing off) select * from stent.tasks"
        " where queue = 'crowd' and function = 'rare' and worker_id is null"
        "   and available_at <= now()"
        " order by priority desc, available_at limit 10"
    )
    plan = "\n".join(row[0] for row in rows)
    await connection.execute("delete from stent.tasks where queue = 'crowd'")
    await connection.close()
    assert "tasks_ready_idx" in plan
    assert "Sort" not in plan
