"""Absurd: W1, W3, W4, W5.

Set as its documentation advises, or more in its favour:
- W1 gathers steps of one task: a task for each activity, awaited by another one, is
  slower by far;
- the worker takes as many tasks at once as it runs, and polls every 10 ms instead of
  every 250 ms, which its latency hangs on. Its `await_task_result` looks after 50 ms,
  then less and less: W5 is measured with it, the others look every 10 ms.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
from absurd_sdk import AsyncAbsurd
from absurdctl import BUNDLED_SCHEMA_SQL
from measure import Bench, check

CONCURRENCY = 100
POLL_SECONDS = 0.01
FINAL = {"completed", "failed", "cancelled"}
FINAL = {"completed", "failed", "cancelled"}
QUEUE = "bench"


async def step(ctx: Any, name: str, number: int) -> int:
    async def no_op() -> int:
        return number

    return int(await ctx.step(name, no_op))


async def main() -> None:
    bench = Bench.from_arguments()
    # What `absurdctl init` does, without its need of psql.
    async with await psycopg.AsyncConnection.connect(bench.url) as connection:
        await connection.execute(BUNDLED_SCHEMA_SQL)
    client = AsyncAbsurd(bench.url, queue_name=QUEUE)
    worker = AsyncAbsurd(bench.url, queue_name=QUEUE)
    await client.create_queue(QUEUE)

    @worker.register_task(name="one_step")
    async def one_step(params: Any, _ctx: Any) -> Any:
        return params["number"]

    @worker.register_task(name="fan_out")
    async def fan_out(params: Any, ctx: Any) -> Any:
        return sum(
            await asyncio.gather(
                *[step(ctx, f"step-{n}", n) for n in range(params["count"])]
            )
        )

    @worker.register_task(name="sequence")
    async def sequence(params: Any, ctx: Any) -> Any:
        total = 0
        for number in range(params["count"]):
            total += await step(ctx, f"step-{number}", number)
        return total

    @worker.register_task(name="three_steps")
    async def three_steps(params: Any, ctx: Any) -> Any:
        number = params["number"]
        for name in ("first", "second", "third"):
            number = await step(ctx, name, number)
        return number

    async def result(task_id: str) -> Any:
        while True:
            found = await client.fetch_task_result(task_id)
            if found is not None and found.state in FINAL:
                check(found.state, "completed")
                return found.result
            await asyncio.sleep(POLL_SECONDS)

    async def start(name: str, **params: int) -> str:
        spawned = await client.spawn(name, params, queue=QUEUE)
        return str(spawned["task_id"])

    async def timed_sum(name: str, count: int) -> float:
        began = time.perf_counter()
        total = await result(await start(name, count=count))
        seconds = time.perf_counter() - began
        check(total, count * (count - 1) // 2)
        return seconds

    async def many(count: int) -> float:
        began = time.perf_counter()
        ids = [await start("three_steps", number=number) for number in range(count)]
        results = [await result(task_id) for task_id in ids]
        seconds = time.perf_counter() - began
        check(results, list(range(count)))
        return seconds

    async def one(number: int) -> None:
        found = await client.await_task_result(await start("one_step", number=number))
        check(found.result, number)

    working = asyncio.create_task(
        worker.start_worker(concurrency=CONCURRENCY, poll_interval=POLL_SECONDS)
    )
    try:
        await bench.latency(one)
        await bench.sequence(lambda count: timed_sum("sequence", count))
        await bench.workflows(many)
        await bench.fan_out(lambda count: timed_sum("fan_out", count))
    finally:
        working.cancel()
        await asyncio.wait([working])


if __name__ == "__main__":
    asyncio.run(main())
