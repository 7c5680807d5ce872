"""The other project that is called stent (1.1.2): W1, W3, W4, W5.

Set as its documentation advises:
- its PostgreSQL backend, the one it names for production, with asyncpg's pool;
- one worker with room for as many attempts as stent has by default;
- its worker polls every 10 ms instead of every 100 ms: without Redis, which is no part
  of this comparison, its latency hangs on polls. Its `wait_for` looks twice a second,
  which cannot be set: W5 is measured with it, the others look every 10 ms.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from typing import Any

from measure import Bench, check

# Not `import stent`: for whoever reads the types, that is this project.
Stent: Any = importlib.import_module("stent").Stent

CONCURRENCY = 100
POLL_SECONDS = 0.01
FINAL = {"completed", "failed", "timed_out", "cancelled"}


@Stent.durable
async def no_op(number: int) -> int:
    return number


@Stent.durable
async def fan_out(count: int) -> int:
    return sum(await asyncio.gather(*[no_op(number) for number in range(count)]))


@Stent.durable
async def sequence(count: int) -> int:
    total = 0
    for number in range(count):
        total += await no_op(number)
    return total


@Stent.durable
async def three_steps(number: int) -> int:
    return int(await no_op(await no_op(await no_op(number))))


async def main() -> None:
    bench = Bench.from_arguments()
    logging.disable(logging.WARNING)
    backend = Stent.backends.PostgresBackend(bench.url)
    await backend.init_db()
    executor = Stent.use(backend=backend, poll_min_interval=POLL_SECONDS)
    worker = asyncio.create_task(
        executor.serve(max_concurrency=CONCURRENCY, poll_interval=POLL_SECONDS)
    )

    async def result(execution_id: str) -> Any:
        while (await executor.state_of(execution_id)).state not in FINAL:
            await asyncio.sleep(POLL_SECONDS)
        return (await executor.result_of(execution_id)).unwrap()

    async def timed_sum(function: Any, count: int) -> float:
        began = time.perf_counter()
        total = await result(await executor.dispatch(function, count))
        seconds = time.perf_counter() - began
        check(total, count * (count - 1) // 2)
        return seconds

    async def many(count: int) -> float:
        began = time.perf_counter()
        ids = await asyncio.gather(
            *[executor.dispatch(three_steps, number) for number in range(count)]
        )
        results = await asyncio.gather(*[result(one) for one in ids])
        seconds = time.perf_counter() - began
        check(results, list(range(count)))
        return seconds

    async def one(number: int) -> None:
        outcome = await executor.wait_for(await executor.dispatch(no_op, number))
        check(outcome.unwrap(), number)

    try:
        await bench.latency(one)
        await bench.sequence(lambda count: timed_sum(sequence, count))
        await bench.workflows(many)
        await bench.fan_out(lambda count: timed_sum(fan_out, count))
    finally:
        worker.cancel()
        await asyncio.wait([worker])
        await executor.shutdown()
        await backend.close()


if __name__ == "__main__":
    asyncio.run(main())
