"""Durable functions that the tests of the command line run from a shell."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import stent
from stent import durable


@dataclass
class Order:
    """An argument with a shape."""

    item: str
    count: int = 1


@durable
async def double(x: int) -> int:
    return 2 * x


@durable
async def add(n: int) -> int:
    return sum(await asyncio.gather(*[double(i) for i in range(n)]))


@durable
async def family(n: int) -> int:
    return await add(n)


@durable
async def buy(orders: list[Order], *, note: str = "") -> Order:
    total = sum(order.count for order in orders)
    return await pack(orders[0].item, total, note)


@durable
async def pack(item: str, count: int, note: str) -> Order:
    return Order(f"{item} {note}".strip(), count)


@durable(retry=1)
async def refuse(reason: str) -> None:
    raise ValueError(reason)


@durable
async def fail(reason: str) -> None:
    await refuse(reason)


@durable
async def nap() -> None:
    await stent.sleep("1h")


@durable
async def hold() -> None:
    await asyncio.sleep(3600)


@durable
async def block(seconds: float) -> float:
    time.sleep(seconds)  # noqa: ASYNC251 - blocks the worker's loop
    return seconds
