"""A worker process that can be killed: ``python -m benchmarks.worker URL``."""

from __future__ import annotations

import asyncio
import sys

import benchmarks.programs  # noqa: F401 - registers what it runs
from stent import Stent


async def main(url: str) -> None:
    """Serve until killed."""
    async with Stent(url) as app:
        await app.serve(max_concurrency=20)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
