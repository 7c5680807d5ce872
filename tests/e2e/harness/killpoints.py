"""Numbers everything a worker commits, and acts when a chosen write is reached.

Installed by the program of a worker process, around the engine's own methods: the
product has no switches for it. A write is a flush of the group commit, or the commit of
an activity's own transaction; both share one numbering.
"""

from __future__ import annotations

import asyncio.selector_events
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stent.services.activities import Activities
from stent.services.transactions import TransactionPool
from stent.store.queries import Query
from stent.store.session import Session, as_store_error
from tests.e2e.harness.ledger import Ledger

SYNC = b"S\x00\x00\x00\x04"
"""The message that ends a request, and with it the transaction around it."""


class Position(StrEnum):
    """Where within a write the worker stands."""

    BEFORE_SEND = "before send"
    UNSYNCED = "executed, not committed"
    SENT = "sent"
    UNACKNOWLEDGED = "committed but unacknowledged"
    AFTER_EFFECT = "after the effect"
    """An attempt has ended; numbered by attempts instead of writes."""


@dataclass(frozen=True, slots=True)
class KillPoint:
    """The write, or for ``AFTER_EFFECT`` the attempt, counted from 1."""

    number: int
    position: Position


class KillPoints:
    """Counts the writes of this process and acts at one of them."""

    def __init__(
        self,
        ledger: Ledger,
        point: KillPoint | None,
        act: Callable[[], None],
        *,
        survives: bool,
    ) -> None:
        """Create it; ``install`` makes it effective.

        Args:
            ledger: Gets a ``write`` line per write and an ``effect`` line per attempt.
            point: Where to act; None only counts.
            act: What to do there.
            survives: ``act`` hits the server; this process goes on without an answer.
        """
        self._ledger = ledger
        self._point = point
        self._act = act
        self._survives = survives
        self._writes = 0
        self._effects = 0
        self._watched: _Watch | None = None

    def install(self) -> None:
        """Wrap the methods through which a worker commits."""
        self._wrap_fetch()
        self._wrap_transactions()
        self._wrap_attempts()
        self._wrap_transport()

    def _reached(self, number: int, position: Position) -> bool:
        return self._point == KillPoint(number, position)

    def _count(self, kind: str) -> int:
        self._writes += 1
        self._ledger.write("write", number=self._writes, kind=kind)
        return self._writes

    def _hit(self) -> None:
        self._ledger.write("hit")
        self._act()

    def _watch(self, number: int, connection: Any, request: bytes) -> None:
        """Act when the request that contains ``request`` is on its way."""
        for position in (Position.UNSYNCED, Position.SENT):
            if self._reached(number, position):
                self._watched = _Watch(connection._transport, request, position)

    def _wrap_fetch(self) -> None:
        fetch = Session.fetch

        async def counted(session: Session, query: Query, **binds: Any) -> Any:
            if query.name != "flush":
                return await fetch(session, query, **binds)
            number = self._count("flush")
            if self._reached(number, Position.BEFORE_SEND):
                self._hit()
            connection = await session.connection()
            self._watch(number, connection, binds["worker_id"].bytes)
            rows = await fetch(session, query, **binds)
            if self._reached(number, Position.UNACKNOWLEDGED):
                self._hit()
                if self._survives:
                    await session.drop()
                    lost = ConnectionResetError("the answer never arrived")
                    raise as_store_error(lost, query.name)
            return rows

        _replace(Session, "fetch", counted)

    def _wrap_transactions(self) -> None:
        commit = TransactionPool._settle_and_commit

        async def counted(
            pool: TransactionPool, opened: Any, attempt: Any, payload: bytes
        ) -> bool:
            number = self._count("transaction")
            if self._reached(number, Position.BEFORE_SEND):
                self._hit()
            self._watch(number, opened.connection, b"COMMIT")
            committed = await commit(pool, opened, attempt, payload)
            if self._reached(number, Position.UNACKNOWLEDGED):
                self._hit()
            return committed

        _replace(TransactionPool, "_settle_and_commit", counted)

    def _wrap_attempts(self) -> None:
        end = Activities._end

        def counted(activities: Activities, *args: Any) -> None:
            self._effects += 1
            self._ledger.write("effect", number=self._effects)
            if self._reached(self._effects, Position.AFTER_EFFECT):
                self._hit()
            end(activities, *args)

        _replace(Activities, "_end", counted)

    def _wrap_transport(self) -> None:
        transport_class: Any = asyncio.selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
        write = transport_class.write

        def watched(transport: Any, data: Any) -> None:
            watch = self._watched
            if watch is None or transport is not watch.transport:
                write(transport, data)
                return
            if watch.begins(bytes(data)):
                unsynced = watch.position is Position.UNSYNCED
                acts = unsynced or watch.is_simple
                if acts:
                    self._watched = None
                if unsynced and watch.is_simple:
                    self._hit()
                    write(transport, data)
                    return
                write(transport, data)
                if acts:
                    self._hit()
                return
            write(transport, data)
            if watch.begun and bytes(data).endswith(SYNC):
                self._watched = None
                self._hit()

        transport_class.write = watched


@dataclass(slots=True)
class _Watch:
    """A connection on which a certain request is awaited."""

    transport: Any
    request: bytes
    position: Position
    begun: bool = False

    @property
    def is_simple(self) -> bool:
        """A COMMIT is one message, executed as soon as it has arrived."""
        return self.request == b"COMMIT"

    def begins(self, data: bytes) -> bool:
        """Whether this is the request."""
        if self.begun or self.request not in data:
            return False
        if self.is_simple and not data.startswith(b"Q"):
            return False
        self.begun = True
        return True


def _replace(owner: type, name: str, function: Callable[..., Any]) -> None:
    assert hasattr(owner, name)
    setattr(owner, name, function)


def die() -> None:
    """End this process at once: nothing is flushed, closed or told to anybody."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Stop this process until somebody lets it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
