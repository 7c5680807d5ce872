"""Transactions of activities: the user's SQL and the result commit together."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio
import asyncpg

from stent.errors import LeaseLostError, StoreError, UsageError
from stent.log import get_logger
from stent.model import Effects
from stent.registry import DurableFunction
from stent.services.attempts import Attempt
from stent.services.identity import Identity
from stent.services.settles import told_rows
from stent.store.connecting import open_connection
from stent.store.queries import load
from stent.store.session import as_store_error
from stent.store.store import Store

log = get_logger(__name__)

RESET_SECONDS_MAX = 5.0
UNKNOWN_SECONDS_MAX = 60.0
"""How long the fate of a lost COMMIT is waited for."""
_AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    OSError,
    TimeoutError,
)


@dataclass(slots=True)
class _Open:
    """A transaction under way."""

    connection: asyncpg.Connection
    transaction: Any
    transaction_id: str
    """The server's own name of it, by which its end can be asked for."""


async def _reset(connection: asyncpg.Connection) -> bool:
    """Undo what an earlier activity did to the session; False: it cannot be used."""
    try:
        query = f"{connection.get_reset_query()}; discard temp"
        await connection.execute(query, timeout=RESET_SECONDS_MAX)
    except (asyncpg.PostgresError, *_AWAY):
        connection.terminate()
        return False
    except BaseException:
        connection.terminate()
        raise
    return True


class TransactionPool:
    """Connections that transactional activities borrow; opened when first needed."""

    def __init__(
        self,
        url: str,
        identity: Identity,
        store: Store,
        *,
        hint_owner: Callable[[UUID], None],
        hint_inboxes: Callable[[str], None],
    ) -> None:
        """Create the pool.

        Args:
            url: The same database as the worker's.
            identity: Of the worker.
            store: To find out what became of a lost COMMIT.
            hint_owner: Tell a worker that an execution of its has a result.
            hint_inboxes: Tell a queue that an execution without an owner has one.
        """
        self._url = url
        self._identity = identity
        self._store = store
        self._hint_owner = hint_owner
        self._hint_inboxes = hint_inboxes
        self._idle: list[asyncpg.Connection] = []
        self._open: dict[UUID, _Open] = {}
        self._closed = False
        self._pooled = False
        self._limiter = anyio.Semaphore(identity.settings.transaction_pool_size)
        self._queries = load()

    async def open(self, attempt: Attempt) -> asyncpg.Connection:
        """Begin the attempt's transaction; waits for a free connection.

        Raises:
            UsageError: The activity is not transactional.
            StoreError: The database is away.
        """
        target = attempt.target
        if (
            not isinstance(target, DurableFunction)
            or target.effects is not Effects.TRANSACTIONAL
            or attempt.epoch is None
            or attempt.options.page is not None
        ):
            message = (
                f"{attempt.function} opens transaction(): declare it with "
                '@durable(effects="transactional")'
            )
            raise UsageError(message)
        await self._limiter.acquire()
        connection = None
        try:
            connection = await self._connect()
            transaction = connection.transaction()
            await transaction.start()
            identify = self._queries["transaction_identity"]
            transaction_id = await connection.fetchval(identify.sql)
        except BaseException as error:
            self._limiter.release()
            if connection is not None:
                connection.terminate()
            if isinstance(error, (asyncpg.PostgresError, *_AWAY)):
                raise as_store_error(error, "opening a transaction") from error
            raise
        self._open[attempt.call_id] = _Open(connection, transaction, transaction_id)
        return connection

    async def _connect(self) -> asyncpg.Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_closed():
                continue
            # Behind a pooler there is no session of ours that could be dirty.
            if self._pooled or await _reset(connection):
                return connection
        # With the process, so that its open transactions can be told from others'.
        name = f"stent transaction {os.getpid()}"
        opened = await open_connection(self._url, name, pooled=self._pooled)
        self._pooled = opened.pooled
        return opened.connection

    async def commit(self, attempt: Attempt, payload: bytes) -> bool:
        """Write the result and commit; see ``activities.Transactions``.

        Raises:
            LeaseLostError: The task is not ours any more; nothing was committed.
        """
        opened = self._open.pop(attempt.call_id)
        attempt.connection = None
        try:
            return await self._settle_and_commit(opened, attempt, payload)
        finally:
            self._give_back(opened)

    async def _settle_and_commit(
        self, opened: _Open, attempt: Attempt, payload: bytes
    ) -> bool:
        query = self._queries["settle_in_transaction"]
        told = told_rows(attempt)
        binds: dict[str, object] = {
            "execution_id": attempt.execution_id,
            "call_id": attempt.call_id,
            "epoch": attempt.epoch,
            "worker_id": self._identity.worker_id,
            "address": attempt.address,
            "payload": payload,
            "attempt": attempt.number,
            "started_at": attempt.started_at,
            "tell_ids": [row[1] for row in told],
            "tell_addresses": [row[2] for row in told],
            "tell_payloads": [row[3] for row in told],
        }
        try:
            row = await opened.connection.fetchrow(query.sql, *query.arguments(binds))
            if row is None:
                await opened.transaction.rollback()
                message = f"{attempt.address} belongs to somebody else"
                raise LeaseLostError(message)
            await opened.transaction.commit()
        except _AWAY as error:
            log.warning("transaction.outcome_unknown", error=type(error).__name__)
            opened.connection.terminate()
            return await self._find_out(opened, attempt)
        if row["owner"] is not None:
            self._hint_owner(row["owner"])
        elif row["queue"] is not None:
            self._hint_inboxes(row["queue"])
        return True

    async def _find_out(self, opened: _Open, attempt: Attempt) -> bool:
        """Whether a COMMIT whose answer was lost took effect."""
        until = time.monotonic() + UNKNOWN_SECONDS_MAX
        while not self._closed:
            try:
                if await self._store.transaction_has_ended(opened.transaction_id):
                    found = await self._store.result_of_call(
                        attempt.execution_id, attempt.call_id
                    )
                    return found is not None
            except StoreError as error:
                if not error.retryable:
                    raise
            if time.monotonic() > until:
                message = f"the outcome of {attempt.address} cannot be found out"
                raise StoreError(message, retryable=True)
            await anyio.sleep(0.05 + random.random() * 0.1)  # noqa: S311
        raise LeaseLostError("the worker has stopped")

    async def roll_back(self, attempt: Attempt) -> None:
        """Undo everything the attempt did; a lost connection has done so already."""
        opened = self._open.pop(attempt.call_id, None)
        attempt.connection = None
        if opened is None:
            return
        with anyio.move_on_after(5, shield=True):
            try:
                await opened.transaction.rollback()
            except (asyncpg.PostgresError, *_AWAY):
                opened.connection.terminate()
        self._give_back(opened)

    def _give_back(self, opened: _Open) -> None:
        connection = opened.connection
        if not connection.is_closed():
            if connection.is_in_transaction():
                connection.terminate()
            else:
                self._idle.append(connection)
        self._limiter.release()

    async def close(self) -> None:
        """Close what is idle; cut off what is open: nothing of it is committed."""
        self._closed = True
        for opened in self._open.values():
            opened.connection.terminate()
        idle, self._idle = self._idle, []
        for connection in idle:
            with anyio.move_on_after(2, shield=True):
                await connection.close()
                continue
            connection.terminate()
