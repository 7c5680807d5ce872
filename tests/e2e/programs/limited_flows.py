"""Limited work that a test holds until it makes a file."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from stent import durable


@durable(max_concurrent=3)
async def guarded(x: int) -> int:
    while not Path(os.environ["GATE"]).exists():  # noqa: ASYNC110, ASYNC240 - a test's
        await asyncio.sleep(0.02)
    return x


@durable
async def guarded_flow(count: int) -> int:
    return sum(await asyncio.gather(*[guarded(n) for n in range(count)]))
