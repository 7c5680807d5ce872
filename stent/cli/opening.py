"""How commands reach the database, and find the execution that was meant."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import click

from stent.errors import ExecutionNotFoundError, StoreError, UsageError
from stent.settings import Settings

if TYPE_CHECKING:
    from stent.app import Stent

T = TypeVar("T")

PREFIX_DIGITS_MIN = 8
_ID_DIGITS = 32


def with_app(
    context: click.Context,
    use: Callable[[Stent], Awaitable[T]],
    *,
    create: bool = False,
) -> T:
    """Open the app of the command's settings and run ``use`` with it.

    Args:
        context: Of the command.
        use: What the command does.
        create: Make a database, and bring its schema up to date, if need be; else a
            database that is not there is an error, and a URL's schema is left alone.
    """
    settings: Settings = context.find_object(Settings) or Settings.from_env()

    if not create:
        require_database(settings)

    async def run() -> T:
        async with opened(settings, create=create) as app:
            return await use(app)

    return asyncio.run(run())


@asynccontextmanager
async def opened(settings: Settings, *, create: bool) -> AsyncIterator[Stent]:
    """See ``with_app``."""
    from stent.app import Stent
    from stent.log import install_structured_logging

    install_structured_logging()
    logging.getLogger().setLevel(logging.WARNING)
    migrate = create or settings.database_url is None
    async with Stent(settings=settings, migrate=migrate) as app:
        yield app


def require_database(settings: Settings) -> None:
    """Looking at an embedded database does not make one."""
    from stent.store.embedded import EmbeddedServer, ServerState

    if settings.database_url is not None:
        return
    if EmbeddedServer(settings.home).status_blocking().state is ServerState.ABSENT:
        message = (
            f"there is no database in {settings.home} yet: start a worker, dispatch "
            "something, or give another one with --home, --url or STENT_DATABASE_URL"
        )
        raise StoreError(message)


async def find_execution(app: Stent, given: str) -> str:
    """The id that was meant: whole, or its first digits if no other begins so.

    Raises:
        ExecutionNotFoundError: Nothing begins so.
        UsageError: Several do, or there are fewer than PREFIX_DIGITS_MIN digits.
    """
    digits = given.replace("-", "").lower()
    try:
        number = int(digits, 16)
    except ValueError:
        message = f"{given!r} is not the id of an execution"
        raise ExecutionNotFoundError(message) from None
    if len(digits) == _ID_DIGITS:
        return str(UUID(int=number))
    if not PREFIX_DIGITS_MIN <= len(digits) < _ID_DIGITS:
        message = (
            f"{given!r} is not an id: give all of it, or at least its first "
            f"{PREFIX_DIGITS_MIN} digits"
        )
        raise UsageError(message)
    last = UUID(digits.ljust(_ID_DIGITS, "f"))
    newest = await app.list_executions(before=str(last), limit=2)
    found = [s.id for s in newest if s.id.replace("-", "").startswith(digits)]
    if not found:
        message = f"there is no execution whose id begins with {given}"
        raise ExecutionNotFoundError(message)
    if len(found) > 1:
        message = (
            f"several executions begin with {given}, {found[0]} and {found[1]} among "
            "them: give more digits"
        )
        raise UsageError(message)
    return found[0]
