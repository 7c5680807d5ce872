"""A thread beside a worker: it answers outsiders while the worker's loop is blocked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

import anyio

from stent.log import get_logger

log = get_logger(__name__)

JOIN_SECONDS_MAX = 5.0

Service = Callable[[], Coroutine[Any, Any, None]]


class Watch:
    """Runs services on an event loop of its own, in a thread, inside ``with``."""

    def __init__(self, services: Sequence[Service]) -> None:
        """Create it; without services there is no thread."""
        self._services = services
        self._thread = threading.Thread(
            target=self._run, name="stent-watch", daemon=True
        )
        self._begun = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        if self._services:
            self._thread.start()
            self._begun.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._loop is None:
            return
        # A loop that is closed has ended by itself.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(JOIN_SECONDS_MAX)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            # The worker goes on; who probes it finds nobody, and knows.
            log.exception("watch.failed")
        finally:
            self._begun.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        async with anyio.create_task_group() as group:
            for service in self._services:
                group.start_soon(service)
            await self._stop.wait()
            group.cancel_scope.cancel()
