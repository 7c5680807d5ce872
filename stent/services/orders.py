"""Orders: what an operator asks of this worker through the database."""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio

from stent.errors import StoreError
from stent.log import get_logger
from stent.model import Order
from stent.services.identity import Identity
from stent.store.store import Store

log = get_logger(__name__)

POLL_SECONDS_MAX = 1.0
"""An order that no hint announced is found after this long."""


class Orders:
    """Reads what one worker is asked, and has it obeyed once."""

    def __init__(
        self, store: Store, identity: Identity, obey: Callable[[Order], None]
    ) -> None:
        """Create it.

        Args:
            store: Over any connection of the worker.
            identity: Of the worker.
            obey: Called with an order that is new.
        """
        self._store = store
        self._identity = identity
        self._obey = obey
        self._obeyed: Order | None = None
        self._wake = anyio.Event()

    def hint(self) -> None:
        """There may be an order."""
        self._wake.set()

    async def run(self) -> None:
        """Read on every hint, and about once a second without."""
        poll = self._identity.settings.poll_every.total_seconds()
        pause = min(poll, POLL_SECONDS_MAX)
        while True:
            with anyio.move_on_after(pause * (0.8 + 0.2 * random.random())):  # noqa: S311
                await self._wake.wait()
            self._wake = anyio.Event()
            try:
                await self.run_once()
            except StoreError as error:
                if not error.retryable:
                    raise
                log.debug("duty.postponed", error=str(error))

    async def run_once(self) -> Order | None:
        """One read; the order, if there is a new one."""
        asked = await self._store.asked_of(self._identity.worker_id)
        if asked is None or asked == self._obeyed:
            return None
        order = self._obeyed = Order(asked)
        log.info("worker.asked", worker_id=str(self._identity.worker_id), order=order)
        self._obey(order)
        return order
