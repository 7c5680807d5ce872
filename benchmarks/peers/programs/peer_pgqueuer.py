"""PgQueuer: J1; it has no workflows.

Set as its documentation advises for throughput:
- jobs are enqueued together, by one statement;
- the driver is asyncpg, the faster of its two;
- a batch of 100 per dequeue instead of 10, which is also how many finished jobs it
  writes at once.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg
from measure import Bench, check
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

BATCH_JOBS = 100


async def main() -> None:
    bench = Bench.from_arguments()
    connection = await asyncpg.connect(bench.url)
    client = await asyncpg.connect(bench.url)
    await Queries(AsyncpgDriver(connection)).install()
    queue = PgQueuer(AsyncpgDriver(connection))
    producer = Queries(AsyncpgDriver(client))
    ran = 0

    @queue.entrypoint("no_op")
    async def no_op(_job: object) -> None:
        nonlocal ran
        ran += 1

    async def enqueue_to_done(count: int) -> float:
        nonlocal ran
        ran = 0
        began = time.perf_counter()
        payloads: list[bytes | None] = [str(n).encode() for n in range(count)]
        await producer.enqueue(["no_op"] * count, payloads, [0] * count)
        # Its table holds what is not done; asked only once the last one has run.
        while ran < count or await client.fetchval("select count(*) from pgqueuer"):
            await asyncio.sleep(0.01)
        seconds = time.perf_counter() - began
        check(ran, count)
        return seconds

    worker = asyncio.create_task(queue.run(batch_size=BATCH_JOBS))
    try:
        await bench.jobs(enqueue_to_done)
    finally:
        queue.shutdown.set()
        await asyncio.wait([worker])
        await client.close()
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
