"""One connection that comes back: connects when needed, again after a loss."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import asyncpg

from stent.errors import StoreError
from stent.settings import masked
from stent.store.connecting import open_connection
from stent.store.queries import Query

CONFLICT_ATTEMPTS_MAX = 5
"""Attempts at a statement that met a deadlock or a serialization failure."""

_AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.QueryCanceledError,
    # A standby that is about to be promoted, or a server that protects itself.
    asyncpg.ReadOnlySQLTransactionError,
    # What a connection says between the server's last words and the end of the stream.
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
    EOFError,
)
_CONFLICTS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
_BUSY = (asyncpg.LockNotAvailableError,)
_READ_ONLY_ADVICE = (
    "the server takes no writes: if it is a standby, name all hosts in the URL and add "
    "target_session_attrs=read-write"
)

_KEEP_TO_INDEXES = """
set enable_seqscan = off; set enable_hashjoin = off;
set enable_mergejoin = off; set jit = off
"""
"""A prepared statement keeps the plan it had while the tables were small, see
docs/decisions/0013. Through a pooler nothing is prepared, and nothing is set."""

Revive = Callable[[], Awaitable[None]]


def as_store_error(error: BaseException, what: str) -> StoreError:
    """Translate a driver's error; ``retryable`` when waiting can help."""
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        what = f"{what}: {_READ_ONLY_ADVICE}"
    retryable = isinstance(error, (*_AWAY, *_CONFLICTS, *_BUSY)) and not _unusable(
        error
    )
    # Some have no text, those of timeouts for instance.
    why = ": ".join(filter(None, (type(error).__name__, str(error))))
    text = masked(f"{what}: {why}")
    translated = StoreError(text, retryable=retryable)
    translated.__cause__ = error
    return translated


def _advice(error: BaseException) -> str:
    """What to do about a connection that was never made, as far as that is known."""
    match error:
        case ConnectionRefusedError() | FileNotFoundError():
            return ": no Postgres listens there; start it or check the URL"
        case asyncpg.InvalidCatalogNameError():
            return ": create the database first"
        case asyncpg.InvalidAuthorizationSpecificationError():
            return ": check the user and the password in the URL"
        case asyncpg.TooManyConnectionsError():
            return ": raise max_connections, or run fewer workers"
        case TimeoutError():
            return ": no answer; can the pooler before the server log in there?"
        case _:
            return ""


def _unusable(error: BaseException) -> bool:
    """The driver could not encode an argument: an InterfaceError like a lost link."""
    return isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)


class Session:
    """One named connection to the database; safe for one user at a time."""

    def __init__(
        self,
        url: str,
        name: str,
        *,
        command_timeout: float = 30.0,
        revive: Revive | None = None,
        prepare: Callable[[asyncpg.Connection], Awaitable[None]] | None = None,
    ) -> None:
        """Describe a connection; nothing is opened yet.

        Args:
            url: Where to.
            name: Shown by the database as ``stent <name>``.
            command_timeout: Seconds after which an answer counts as lost.
            revive: Called before connecting again; starts an embedded server.
            prepare: Called on every new connection, before anybody uses it.
        """
        self._url = url
        self._name = name
        self._command_timeout = command_timeout
        self._revive = revive
        self._prepare = prepare
        self._connection: asyncpg.Connection | None = None
        self._process = os.getpid()
        self._parents: list[asyncpg.Connection] = []
        self._lock = anyio.Lock(fast_acquire=True)
        self._lost_once = False
        self.connections_made = 0
        self.pooled = False
        """Whether the last connection was to a pooler: see ``connecting.py``."""

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None and not self._connection.is_closed()

    async def connection(self) -> asyncpg.Connection:
        """The open connection; connects if there is none.

        Raises:
            StoreError: The database is away (``retryable``) or refuses.
        """
        if self._process != os.getpid():
            self._leave_to_parent()
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        try:
            if self._lost_once and self._revive is not None:
                await self._revive()
            opened = await open_connection(
                self._url,
                f"stent {self._name}",
                command_timeout=self._command_timeout,
                pooled=self.pooled,
            )
            connection, self.pooled = opened.connection, opened.pooled
            try:
                await self._make_ready(connection)
            except BaseException:  # cancelled, too: nobody else would close it
                connection.terminate()
                raise
        except (asyncpg.PostgresError, *_AWAY) as error:
            self._lost_once = True
            what = f"connecting ({self._name}){_advice(error)}"
            raise as_store_error(error, what) from error
        self._connection = connection
        self.connections_made += 1
        return connection

    async def _make_ready(self, connection: asyncpg.Connection) -> None:
        if not self.pooled:
            await connection.execute(_KEEP_TO_INDEXES)
        if self._prepare is not None:
            await self._prepare(connection)

    async def fetch(self, query: Query, **binds: Any) -> list[asyncpg.Record]:
        """Run one statement in its own transaction; deadlocks are tried again.

        Raises:
            StoreError: See ``as_store_error``; when the connection was lost, whether
                the statement took effect is unknown.
        """
        arguments = query.arguments(binds)
        async with self._lock:
            for attempt in range(1, CONFLICT_ATTEMPTS_MAX + 1):
                connection = await self.connection()
                try:
                    rows: list[asyncpg.Record] = await connection.fetch(
                        query.sql, *arguments
                    )
                except _CONFLICTS as error:
                    if attempt == CONFLICT_ATTEMPTS_MAX:
                        raise as_store_error(error, query.name) from error
                except (asyncpg.PostgresError, *_AWAY) as error:
                    await self._after_error(error)
                    raise as_store_error(error, query.name) from error
                else:
                    return rows
                await anyio.sleep(random.random() * 0.01 * attempt)  # noqa: S311
        raise AssertionError

    async def run(
        self, use: Callable[[asyncpg.Connection], Awaitable[Any]], what: str
    ) -> Any:
        """Use the connection for something that is more than one statement."""
        async with self._lock:
            connection = await self.connection()
            try:
                return await use(connection)
            except (asyncpg.PostgresError, *_AWAY) as error:
                await self._after_error(error)
                raise as_store_error(error, what) from error

    async def _after_error(self, error: BaseException) -> None:
        """A connection whose state is unknown is not used again."""
        if isinstance(error, _AWAY) and not _unusable(error):
            self._lost_once = True
            await self.drop()

    def _leave_to_parent(self) -> None:
        """A forked child must not speak on its parent's socket, nor close it.

        The object is kept: collecting it would take the socket from the event loop
        that the parent still runs.
        """
        if self._connection is not None:
            self._parents.append(self._connection)
        self._connection, self._process = None, os.getpid()

    async def drop(self) -> None:
        """Forget the connection; the next use makes a new one."""
        if self._process != os.getpid():
            self._leave_to_parent()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def rest(self) -> None:
        """Close the connection between two uses; the next one connects again."""
        async with self._lock:
            await self.close()

    async def close(self) -> None:
        """Close the connection in an orderly way, or drop it after two seconds."""
        if self._process != os.getpid():
            self._leave_to_parent()
        connection, self._connection = self._connection, None
        if connection is None or connection.is_closed():
            return
        with anyio.move_on_after(2, shield=True):
            with suppress(asyncpg.PostgresError, *_AWAY):
                await connection.close()
                return
        connection.terminate()
