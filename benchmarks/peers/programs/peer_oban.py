"""Oban: J1; it has no workflows in its open edition.

Set as its documentation advises for throughput:
- jobs are enqueued together, by one statement;
- a queue limit that lets jobs overlap;
- finished jobs are kept, the default; it prunes them after a day.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from measure import Bench, check
from oban import Oban, worker
from oban.schema import install
from psycopg_pool import AsyncConnectionPool

CONCURRENCY = 100
POOL_CONNECTIONS = 20
_COMPLETED = "select count(*) from oban_jobs where state = 'completed'"
ran = 0


@worker(queue="default")
class NoOp:
    """Counts in this process; what was recorded is asked of the database."""

    async def process(self, _job: Any) -> None:
        global ran  # noqa: PLW0603 - the worker is built for each job
        ran += 1


async def enqueue_to_done(pool: Any, oban: Any, count: int) -> float:
    global ran
    ran, before = 0, await completed(pool)
    began = time.perf_counter()
    # `new` is the decorator's.
    jobs = [NoOp.new({"number": n}) for n in range(count)]  # type: ignore[attr-defined]
    await oban.enqueue_many(jobs)
    # Asked only once the last one has run, so that asking is not the work.
    while ran < count or await completed(pool) < before + count:
        await asyncio.sleep(0.01)
    seconds = time.perf_counter() - began
    check(ran, count)
    return seconds


async def completed(pool: Any) -> int:
    async with pool.connection() as connection:
        cursor = await connection.execute(_COMPLETED)
        (count,) = await cursor.fetchone()
        return int(count)


async def main() -> None:
    bench = Bench.from_arguments()
    pool = AsyncConnectionPool(
        bench.url, min_size=2, max_size=POOL_CONNECTIONS, open=False
    )
    async with pool:
        await install(pool)
        async with Oban(pool=pool, queues={"default": CONCURRENCY}) as oban:
            await bench.jobs(lambda count: enqueue_to_done(pool, oban, count))


if __name__ == "__main__":
    asyncio.run(main())
