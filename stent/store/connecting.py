"""Connects to the server, and finds out whether a pooler stands in between."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

CONNECT_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A new connection.

    Attributes:
        connection: Its statements outlive a transaction only where that is safe.
        pooled: A pooler answers: the next transaction may run on another backend, so
            there is no session, hence no session lock and no LISTEN.
    """

    connection: asyncpg.Connection
    pooled: bool


async def open_connection(
    url: str,
    name: str,
    *,
    command_timeout: float | None = None,
    pooled: bool = False,
) -> Opened:
    """Connect; through a pooler, without prepared statements that keep a name.

    Args:
        url: Where to; several hosts, and ``target_session_attrs``, as in libpq.
        name: What the server shows as ``application_name``.
        command_timeout: Seconds after which an answer counts as lost; none by default.
        pooled: What was found the last time; a wrong guess costs a second connect.
    """
    connection = await _connect(url, name, command_timeout, cached=not pooled)
    try:
        found = await _is_pooled(connection)
    except BaseException:
        connection.terminate()
        raise
    if found and not pooled:
        await connection.close(timeout=CONNECT_SECONDS_MAX)
        connection = await _connect(url, name, command_timeout, cached=False)
    return Opened(connection, found)


async def _connect(
    url: str, name: str, command_timeout: float | None, *, cached: bool
) -> asyncpg.Connection:
    # Without the cache the driver parses, binds and executes in one unit, unnamed.
    options = {} if cached else {"statement_cache_size": 0}
    return await asyncpg.connect(
        url,
        timeout=CONNECT_SECONDS_MAX,
        command_timeout=command_timeout,
        server_settings={"application_name": name},
        **options,
    )


async def _is_pooled(connection: asyncpg.Connection) -> bool:
    """Whether the backend that answers is another than the one that greeted.

    A pooler greets with a key of its own, for it has to route cancel requests. The
    question has no parameters, so it needs no prepared statement; its answer is the
    number of rows.
    """
    greeted_by = connection.get_server_pid()
    answer = await connection.execute(
        f"select where pg_catalog.pg_backend_pid() = {int(greeted_by)}"
    )
    return str(answer) != "SELECT 1"
