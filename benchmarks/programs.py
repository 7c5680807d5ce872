"""Durable programs of the workloads; every activity does nothing on purpose."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import stent
from stent import durable

WAIT_SECONDS = 0.02


@durable
async def no_op(number: int) -> int:
    """The cheapest activity there is."""
    return number


@durable
async def fan_out(count: int) -> int:
    """W1: gather ``count`` activities and sum their results."""
    return sum(await asyncio.gather(*[no_op(number) for number in range(count)]))


@durable
async def map_items(count: int) -> int:
    """W2: map over ``count`` items and sum their results."""
    return sum(await stent.map(no_op, list(range(count))))


@durable
async def sequence(count: int) -> int:
    """W3: ``count`` activities, one after the other."""
    total = 0
    for number in range(count):
        total += await no_op(number)
    return total


@durable
async def three_steps(number: int) -> int:
    """W4: three activities, one after the other."""
    return await no_op(await no_op(await no_op(number)))


@durable(retry=1)
async def mark(number: int, directory: str) -> int:
    """W10: leave a trace of when and where it ran, then take a moment."""
    trace = Path(directory) / f"{number}.{os.getpid()}"
    trace.touch()
    await asyncio.sleep(0.05)
    return number


@durable
async def fan_out_marks(count: int, directory: str) -> int:
    """W10: W1 with activities that leave traces."""
    calls = [mark(number, directory) for number in range(count)]
    return sum(await asyncio.gather(*calls))


@durable
async def fan_out_in(count: int, place: str) -> int:
    """W8: W1 in a named queue, activities too."""
    call = no_op.options(queue=place)
    return sum(await asyncio.gather(*[call(number) for number in range(count)]))


@durable
async def brief_wait(number: int) -> int:
    """W8: an activity that waits for something else, as most do."""
    await asyncio.sleep(WAIT_SECONDS)
    return number


@durable
async def fan_out_waits(count: int) -> int:
    """W8: W1 with activities that wait."""
    return sum(await asyncio.gather(*[brief_wait(number) for number in range(count)]))


@durable
async def nap(seconds: int) -> int:
    """W12: sleep; W7: own the tasks that wait."""
    await stent.sleep(seconds)
    return seconds


@durable(max_concurrent=1, kind="activity")
async def saturated(number: int) -> int:
    """W7: whoever has the one slot keeps it until cancelled."""
    await asyncio.sleep(3600)
    return number
