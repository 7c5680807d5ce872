"""Group commit: everything a worker writes goes through one flush after another.

Whatever is submitted while a flush is under way joins the next one. When the answer of
a flush is lost, the writer asks the fence row what became of it before it goes on.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import UUID

import anyio
import anyio.lowlevel

from stent.errors import LeaseLostError, StoreError
from stent.log import get_logger
from stent.services.identity import Identity
from stent.services.outage import Outage
from stent.store.flush import Flush, Flushed
from stent.store.store import Store

log = get_logger(__name__)

_NO_PARTITION = "23514"
RECONNECT_PAUSE_MAX_SECONDS = 1.0
STATEMENT_BYTES_MAX = 1_000_000_000
"""Of payloads: Postgres takes no message of 1 GiB."""


class Item(Protocol):
    """Something to write; exactly one of its ends is called."""

    @property
    def size(self) -> int:
        """Payload bytes, about."""
        ...

    @property
    def rows(self) -> int:
        """How much work it is for the database, about; one is a settled attempt."""
        ...

    def contribute(self, flush: Flush) -> None:
        """Add the rows; may be called again for a later flush."""
        ...

    def missed(self, flushed: Flushed) -> str | None:
        """``"lost"``, ``"busy"`` or None, by what the flush did not do."""
        ...

    def committed(self) -> None:
        """It is durable."""
        ...

    def lost(self) -> None:
        """It belongs to somebody else; drop it."""
        ...

    def refused(self, error: StoreError) -> None:
        """The database refuses this item itself."""
        ...


class Writer:
    """The only one through whom a worker changes the database."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        *,
        hint: Callable[[Flushed], None],
    ) -> None:
        """Create the writer of one worker.

        Args:
            store: Over the writer's own connection.
            identity: Whose fence is moved.
            hint: Called after each flush with who should hear of it.
        """
        self._store = store
        self._identity = identity
        self._hint = hint
        self._items: deque[Item] = deque()
        self._wake = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()
        self.flushes = 0

    def submit(self, item: Item) -> None:
        """Write ``item`` with the next flush."""
        self._items.append(item)
        if not self._wake.is_set():
            self._wake.set()

    @property
    def backlog(self) -> int:
        """Items not yet taken by a flush."""
        return len(self._items)

    def drop_all(self) -> None:
        """Forget everything that is not written: it was fenced out."""
        items, self._items = self._items, deque()
        for item in items:
            item.lost()

    async def wait_until_idle(self) -> None:
        """Until everything submitted so far has ended."""
        while self._items or not self._idle.is_set():
            await self._idle.wait()
            await anyio.lowlevel.checkpoint()

    async def run(self) -> None:
        """Flush whenever there is something to flush.

        Raises:
            LeaseLostError: The worker was taken over.
        """
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            if not self._items:
                continue
            self._idle = anyio.Event()
            try:
                while self._items:
                    await self.run_once()
            finally:
                self._idle.set()

    async def run_once(self) -> int:
        """One flush; returns the number of items in it."""
        items = self._take()
        try:
            await self._write(items)
        except LeaseLostError:
            for item in items:
                item.lost()
            raise
        return len(items)

    def _take(self) -> list[Item]:
        settings = self._identity.settings
        items: list[Item] = []
        size = rows = 0
        while self._items:
            size += self._items[0].size
            rows += self._items[0].rows
            full = rows > settings.flush_items_max or size > settings.flush_bytes_max
            if items and full:
                break
            items.append(self._items.popleft())
        return items

    async def _write(self, items: Sequence[Item]) -> None:
        items, flush = self._contributed(items)
        try:
            _refuse_too_long(sum(item.size for item in items))
            flushed = await self._flush(flush)
        except LeaseLostError:
            raise
        except StoreError as error:
            await self._bisect(items, error)
            return
        self.flushes += 1
        again: list[Item] = []
        if flushed.complete:
            for item in items:
                item.committed()
        else:
            for item in items:
                match item.missed(flushed):
                    case None:
                        item.committed()
                    case "busy":
                        again.append(item)
                    case _:
                        item.lost()
        self._hint(flushed)
        if again:
            # Somebody holds a row lock; do not spin on it.
            await anyio.sleep(0.002)
            self._items.extendleft(reversed(again))

    def _contributed(self, items: Sequence[Item]) -> tuple[Sequence[Item], Flush]:
        """A flush of all items; one that fails at that is refused alone."""
        flush = Flush()
        for item in items:
            try:
                item.contribute(flush)
            except Exception as error:
                log.exception("flush.item_failed")
                item.refused(StoreError(f"{type(error).__name__}: {error}"))
                # What it has contributed by then is not to be written.
                return self._contributed([one for one in items if one is not item])
        return items, flush

    async def _bisect(self, items: Sequence[Item], error: StoreError) -> None:
        """The database refuses the flush: find who is to blame, commit the others."""
        if len(items) == 1:
            log.error("flush.refused", error=str(error))
            items[0].refused(error)
            return
        middle = len(items) // 2
        await self._write(items[:middle])
        await self._write(items[middle:])

    async def _flush(self, flush: Flush) -> Flushed:
        """Flush, and find out what happened if the answer is lost."""
        identity = self._identity
        number = identity.flush + 1
        outage = Outage("writer")
        while True:
            try:
                flushed = await self._store.flush(
                    identity.worker_id, identity.incarnation, number, flush
                )
            except LeaseLostError:
                # Perhaps our own earlier try of this number was committed after all.
                found = await self._settle_unknown(number, outage)
                if found is None:
                    continue
                flushed = found
            except StoreError as error:
                if await self._cured(error):
                    continue
                if not error.retryable:
                    raise
                outage.note(error)
                found = await self._settle_unknown(number, outage)
                if found is None:
                    continue
                flushed = found
            outage.end()
            identity.flush = number
            return flushed

    async def _cured(self, error: StoreError) -> bool:
        """A missing partition is made; anything else is not cured here."""
        if getattr(error.__cause__, "sqlstate", None) != _NO_PARTITION or (
            "no partition" not in str(error.__cause__)
        ):
            return False
        await self._store.ensure_partitions([self._identity.clock.now()])
        return True

    async def _settle_unknown(self, number: int, outage: Outage) -> Flushed | None:
        """What became of flush ``number``; None: nothing, try it again.

        Raises:
            LeaseLostError: The worker was taken over.
        """
        identity = self._identity
        pause = 0.01
        while True:
            try:
                fence = await self._store.fence_state(identity.worker_id)
            except LeaseLostError:
                raise
            except StoreError as error:
                if not error.retryable:
                    raise
                outage.note(error)
                await anyio.sleep(pause * (0.5 + random.random()))  # noqa: S311
                pause = min(pause * 2, RECONNECT_PAUSE_MAX_SECONDS)
                continue
            if fence.incarnation != identity.incarnation:
                message = f"worker {identity.worker_id} was taken over"
                raise LeaseLostError(message)
            if fence.flush == number:
                return fence.flushed
            if fence.flush == number - 1:
                return None
            message = (
                f"worker {identity.worker_id} is at flush {fence.flush}, not at "
                f"{number - 1}: somebody else writes in its name"
            )
            raise LeaseLostError(message)


def _refuse_too_long(size: int) -> None:
    """The server would drop the connection, as if it were gone, again and again.

    Raises:
        StoreError: No statement can be so long.
    """
    if size > STATEMENT_BYTES_MAX:
        message = (
            f"{size >> 20} MiB at once are more than a statement can hold: let less "
            "run at the same time, or keep the data elsewhere and pass its name"
        )
        raise StoreError(message)


def execution_missed(execution_id: UUID, flushed: Flushed) -> str | None:
    """``missed`` of an item that belongs to an execution."""
    if execution_id in flushed.lost:
        return "lost"
    return "busy" if execution_id in flushed.busy else None


def task_missed(call_id: UUID, flushed: Flushed) -> str | None:
    """``missed`` of an item that belongs to a task."""
    if call_id in flushed.lost_tasks:
        return "lost"
    return "busy" if call_id in flushed.busy_tasks else None
