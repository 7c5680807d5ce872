"""Procrastinate: J1; it has no workflows.

Set as its documentation advises for throughput:
- jobs are deferred together by ``batch_defer_async``;
- one worker with a concurrency that lets I/O overlap, woken by LISTEN/NOTIFY;
- finished jobs are kept, the default, as stent keeps its executions.
"""

from __future__ import annotations

import asyncio
import logging
import time

import procrastinate
from measure import Bench, check

CONCURRENCY = 100
# A connection for the listener, the others to fetch and finish jobs.
POOL_CONNECTIONS = 20


async def main() -> None:
    bench = Bench.from_arguments()
    logging.disable(logging.WARNING)
    connector = procrastinate.PsycopgConnector(
        conninfo=bench.url, max_size=POOL_CONNECTIONS
    )
    app = procrastinate.App(connector=connector)
    ran = 0

    @app.task(name="no_op")
    async def no_op(number: int) -> int:
        nonlocal ran
        ran += 1
        return number

    async def enqueue_to_done(count: int) -> float:
        nonlocal ran
        ran, before = 0, await done(connector)
        began = time.perf_counter()
        await no_op.batch_defer_async(*[{"number": number} for number in range(count)])
        # Asked rarely before the last one has run, so that asking is not the work.
        while ran < count or await done(connector) < before + count:
            await asyncio.sleep(0.01)
        seconds = time.perf_counter() - began
        check(ran, count)
        return seconds

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        worker = asyncio.create_task(
            app.run_worker_async(
                concurrency=CONCURRENCY,
                install_signal_handlers=False,
                listen_notify=True,
            )
        )
        try:
            await bench.jobs(enqueue_to_done)
        finally:
            worker.cancel()
            await asyncio.wait([worker])


async def done(connector: procrastinate.PsycopgConnector) -> int:
    row = await connector.execute_query_one_async(
        "select count(*) as count from procrastinate_jobs where status = 'succeeded'"
    )
    return int(row["count"])


if __name__ == "__main__":
    asyncio.run(main())
