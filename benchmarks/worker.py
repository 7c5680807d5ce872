"""A worker process that can be killed: ``python -m benchmarks.worker URL QUEUE SLOTS``.

``STENT_DIRECT_URL`` names the way around a pooler, as everywhere.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import benchmarks.programs  # noqa: F401 - registers what it runs
from stent import Stent


async def main(url: str, queue: str, slots: str) -> None:
    """Serve until terminated, or killed."""
    async with Stent(url) as app:
        serving = asyncio.ensure_future(
            app.serve(max_concurrency=int(slots), queues=[queue])
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
        await asyncio.wait([serving])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
