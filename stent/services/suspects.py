"""What was lost with its worker: marked before it runs again, and counted.

A task, or the replay of an execution, that was lost once is suspected. It is marked in
the database as it begins: a task when it has its slot. Lost while it was marked it
counts one; from then on this worker runs one such thing at a time, or begins another
when the first has done no harm for long. After three it is
not run again. See docs/decisions/0021-poison.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio

from stent.errors import StoreError
from stent.services.outage import Outage
from stent.store.store import Store

LOST_MAX = 4
"""The first time, which does not count, and three that do."""
COUNTED = 2
"""Lost so often, something counts."""

Suspected = tuple[UUID, UUID]
"""Execution and call; the nil call is the execution's own replay."""
MARK_PAUSE_SECONDS = 0.05
"""How often a mark is tried while the database is away."""
HARMLESS_SECONDS = 10.0
"""After so long a call that counts is not waited for: it may be waiting for others."""


@dataclass(slots=True)
class _Running:
    """What was marked here and has not ended."""

    lost: int
    epoch: int
    since: float


class Suspects:
    """Those of one worker."""

    def __init__(
        self, store: Store, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Create it; ``store`` is over the claimer's connection."""
        self._store = store
        self._monotonic = monotonic
        self._running: dict[Suspected, _Running] = {}
        self._withdrawn: list[tuple[UUID, UUID, int]] = []
        self._marks: list[tuple[UUID, UUID, int]] = []
        self._cleared: set[Suspected] = set()
        self._beginning: dict[tuple[UUID, UUID, int], None] = {}
        self._marking = anyio.Lock()
        self._outage = Outage("suspects")

    async def losses(
        self, rows: list[Any], claimed: list[Suspected]
    ) -> dict[Suspected, int]:
        """How often these were lost; mostly nobody was, and nobody is asked.

        Args:
            rows: Of a claim, which say whether there are any suspects.
            claimed: The same as execution and call.
        """
        if not rows or not rows[0]["suspects"]:
            return {}
        return await self._store.suspects_among(claimed)

    def may_begin(self, lost: int) -> bool:
        """Whether something that was lost so often may begin now."""
        long_ago = self._monotonic() - HARMLESS_SECONDS
        return lost < COUNTED or all(
            one.lost < COUNTED or one.since < long_ago for one in self._running.values()
        )

    def _note(self, suspected: Suspected, epoch: int, lost: int) -> None:
        """It begins; whoever is left beside it is not blamed for what it does."""
        if lost >= COUNTED:
            for other, one in self._running.items():
                if one.lost >= COUNTED:
                    self._withdrawn.append((*other, one.epoch))
                    one.lost = COUNTED - 1
        self._running[suspected] = _Running(lost, epoch, self._monotonic())

    async def _write(self, marks: list[tuple[UUID, UUID, int]]) -> None:
        withdrawn, self._withdrawn = self._withdrawn, []
        if withdrawn:
            await self._store.withdraw_marks(withdrawn)
        await self._store.mark_suspects(marks)

    def begin(self, suspected: Suspected, epoch: int, lost: int) -> None:
        """It is to be marked, and to run once ``write_marks`` has returned."""
        self._note(suspected, epoch, lost)
        self._marks.append((*suspected, epoch))

    async def mark(self, suspected: Suspected, epoch: int, lost: int) -> None:
        """Mark a task that has its slot; with those that begin at the same time.

        Returns once the mark is written, however long the database is away: until then
        nothing of the task must begin.
        """
        self._note(suspected, epoch, lost)
        mark = *suspected, epoch
        self._beginning[mark] = None
        try:
            while mark in self._beginning:
                async with self._marking:
                    written = mark not in self._beginning or await self._write_some()
                if not written:
                    await anyio.sleep(MARK_PAUSE_SECONDS)
        finally:
            self._beginning.pop(mark, None)

    async def _write_some(self) -> bool:
        """Write all that are beginning; False: the database is away."""
        marks = list(self._beginning)
        try:
            await self._write(marks)
        except StoreError as error:
            self._outage.note(error)
            return False
        self._outage.end()
        for mark in marks:
            self._beginning.pop(mark, None)
        return True

    async def write_marks(self) -> None:
        """Mark what is about to begin.

        Raises:
            StoreError: The database is away: nothing of it must begin.
        """
        if not self._marks:
            return
        marks, self._marks = self._marks, []
        try:
            await self._write(marks)
        except BaseException:
            for execution_id, call_id, _ in marks:
                self._running.pop((execution_id, call_id), None)
            raise

    @property
    def any_running(self) -> bool:
        """Whether anything suspected runs here."""
        return bool(self._running)

    def is_running(self, suspected: Suspected) -> bool:
        """Whether it was marked here and has not ended."""
        return suspected in self._running

    def end(self, suspected: Suspected, *, cleared: bool) -> bool:
        """It has ended without killing us; True if others may have waited for that.

        Args:
            suspected: What was begun, or not.
            cleared: It is not suspected any more.
        """
        ended = self._running.pop(suspected, None)
        if ended is None:
            return False
        if cleared:
            self._cleared.add(suspected)
        return ended.lost >= COUNTED

    def keep(self, here: set[Suspected]) -> None:
        """Forget what was to begin and did not: the database was away in between."""
        self._marks.clear()
        self._running = {s: n for s, n in self._running.items() if s in here}

    def clear(self, suspected: Suspected) -> None:
        """Forget what is known about it."""
        self._cleared.add(suspected)

    async def write_cleared(self) -> None:
        """Delete the rows of those that are not suspected any more."""
        if self._cleared:
            cleared = set(self._cleared)
            await self._store.clear_suspects(list(cleared))
            self._cleared -= cleared

    def drop_all(self) -> None:
        """The worker was taken over: whoever did it has counted."""
        self._running.clear()
        self._marks.clear()
        self._cleared.clear()


KILLED = (
    " killed the worker, or the worker was lost each time for another "
    "reason: look at its memory, and for native code that crashes"
)


def killed_too_often(what: str) -> str:
    """Why it is not run again."""
    return what + KILLED


def is_killer(reason: str | None) -> bool:
    """Whether an execution was blocked because it killed too often."""
    return reason is not None and reason.endswith(KILLED)
