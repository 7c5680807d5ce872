"""The command ``stent``: its global options, its commands, its exit codes.

Commands live in modules of their own, imported when they are used, and what is heavy
(SQLAlchemy, rich, structlog) is imported by the command that needs it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from stent.cli.text import escaped
from stent.errors import (
    ExecutionNotFoundError,
    StentError,
    UsageError,
    WorkerNotFoundError,
)
from stent.settings import Settings, masked

FAILURE, USAGE, NOT_FOUND, TIMED_OUT = 1, 2, 3, 5
"""Exit codes; 0 is success, 6 (see ``outcome``) an execution that failed."""

_COMMANDS = {
    "worker": "stent.cli.worker:worker",
    "run": "stent.cli.run:run",
    "ls": "stent.cli.ls:ls",
    "show": "stent.cli.show:show",
    "history": "stent.cli.history:history",
    "wait": "stent.cli.wait:wait",
    "cancel": "stent.cli.cancel:cancel",
    "queues": "stent.cli.queues:queues",
    "limits": "stent.cli.limits:limits",
    "pause": "stent.cli.limits:pause",
    "resume": "stent.cli.limits:resume",
    "workers": "stent.cli.workers:workers",
    "drain": "stent.cli.workers:drain",
    "stop": "stent.cli.workers:stop",
    "db": "stent.cli.db:db",
}


class LazyGroup(click.Group):
    """Imports a command when it is asked for, and turns our errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table above."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it."""
        del ctx
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; what stent raises on purpose is for people to read."""
        try:
            return super().invoke(ctx)
        except (StentError, TimeoutError) as error:
            end(ctx, error)
        except ExceptionGroup as group:
            # Services of a worker run in groups; what stopped one of them is inside.
            _, unexpected = group.split(StentError)
            if unexpected is not None:
                raise
            end(ctx, first_error(group))


def end(context: click.Context, error: Exception) -> NoReturn:
    """One line on stderr and an exit code; never a traceback."""
    message = str(error) or type(error).__name__
    click.echo(f"Error: {escaped(masked(message), keep=chr(10))}", err=True)
    context.exit(exit_code_of(error))


def exit_code_of(error: Exception) -> int:
    """What the shell is told."""
    match error:
        case ExecutionNotFoundError() | WorkerNotFoundError():
            return NOT_FOUND
        case UsageError():
            return USAGE
        case TimeoutError():
            return TIMED_OUT
        case _:
            return FAILURE


def first_error(group: ExceptionGroup[Exception]) -> Exception:
    """The first that is no group."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, ExceptionGroup) else first


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--url",
    metavar="URL",
    help="postgresql://...; default STENT_DATABASE_URL, else the embedded Postgres.",
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the embedded Postgres; default STENT_HOME, else ./.stent.",
)
@click.version_option(import_module("stent").__version__, prog_name="stent")
@click.pass_context
def main(context: click.Context, url: str | None, home: Path | None) -> None:
    """Durable async workflows on Postgres.

    \b
    Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 5 timeout,
    6 the execution failed.
    """  # noqa: D301 - click's mark of a paragraph that is not rewrapped
    if home is not None and url is not None:
        message = "--url and --home exclude each other: one database at a time"
        raise click.UsageError(message)
    context.obj = Settings.from_env(url=url, home=home)
