"""stent itself: W1, W3, W4, W5 and J1, with its defaults."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from measure import Bench, check

from benchmarks import programs
from stent import Stent


async def main() -> None:
    bench = Bench.from_arguments()
    async with Stent.bootstrap(bench.url, serve=True) as app:

        async def result(execution_id: str) -> Any:
            return (await app.wait_for(execution_id)).unwrap()

        async def timed_sum(function: Any, count: int) -> float:
            began = time.perf_counter()
            total = await result(await app.dispatch(function, count))
            seconds = time.perf_counter() - began
            check(total, count * (count - 1) // 2)
            return seconds

        async def many(function: Any, count: int) -> float:
            began = time.perf_counter()
            ids = await app.dispatch_many(function, range(count))
            results = await asyncio.gather(*[result(one) for one in ids])
            seconds = time.perf_counter() - began
            check(results, list(range(count)))
            return seconds

        async def one(number: int) -> None:
            check(await result(await app.dispatch(programs.no_op, number)), number)

        await bench.latency(one)
        await bench.sequence(lambda count: timed_sum(programs.sequence, count))
        await bench.workflows(lambda count: many(programs.three_steps, count))
        await bench.fan_out(lambda count: timed_sum(programs.fan_out, count))
        await bench.jobs(lambda count: many(programs.no_op, count))


if __name__ == "__main__":
    asyncio.run(main())
