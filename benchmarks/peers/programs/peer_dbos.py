"""DBOS: W1, W3, W4, W5.

Set as its documentation advises, or more in its favour:
- steps are gathered inside the workflow, without its queues: a queue adds a row and a
  poll for every step;
- workflows are started, not enqueued, and awaited by their local handles;
- the pool of its system database is larger than the default, so that steps which are
  gathered do not wait for a connection;
- logs of the console only from errors up: a line per workflow is not the work.
"""

from __future__ import annotations

import asyncio
import time

from dbos import DBOS
from measure import Bench, check

POOL_CONNECTIONS = 40


@DBOS.step()
async def no_op(number: int) -> int:
    return number


@DBOS.workflow()
async def fan_out(count: int) -> int:
    results = await asyncio.gather(*[no_op(number) for number in range(count)])
    return int(sum(results))


@DBOS.workflow()
async def sequence(count: int) -> int:
    total = 0
    for number in range(count):
        total += await no_op(number)
    return total


@DBOS.workflow()
async def three_steps(number: int) -> int:
    return int(await no_op(await no_op(await no_op(number))))


@DBOS.workflow()
async def one_step(number: int) -> int:
    return int(await no_op(number))


async def timed_sum(workflow: object, count: int) -> float:
    began = time.perf_counter()
    handle = await DBOS.start_workflow_async(workflow, count)
    total = await handle.get_result()
    seconds = time.perf_counter() - began
    check(total, count * (count - 1) // 2)
    return seconds


async def many(count: int) -> float:
    began = time.perf_counter()
    handles = [await DBOS.start_workflow_async(three_steps, n) for n in range(count)]
    results = [await handle.get_result() for handle in handles]
    seconds = time.perf_counter() - began
    check(results, list(range(count)))
    return seconds


async def one(number: int) -> None:
    handle = await DBOS.start_workflow_async(one_step, number)
    check(await handle.get_result(), number)


async def main() -> None:
    bench = Bench.from_arguments()
    DBOS(
        config={
            "name": "bench",
            "system_database_url": bench.url,
            "sys_db_pool_size": POOL_CONNECTIONS,
            "log_level": "ERROR",
        }
    )
    DBOS.launch()
    try:
        await bench.latency(one)
        await bench.sequence(lambda count: timed_sum(sequence, count))
        await bench.workflows(many)
        await bench.fan_out(lambda count: timed_sum(fan_out, count))
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    asyncio.run(main())
