"""``stent workers``, ``stent drain``, ``stent stop``: the fleet and its end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from stent.cli.durations import read_duration
from stent.cli.opening import with_app
from stent.cli.text import escaped, shortened
from stent.errors import UsageError, WorkerNotFoundError
from stent.model import Order, WorkerState

if TYPE_CHECKING:
    from rich.console import Console

    from stent.app import Stent

PREFIX_DIGITS_MIN = 4
WAIT_POLL_SECONDS = 0.1
TABLE_COLUMNS_MIN = 90
STYLES = {
    "running": "green",
    "draining": "yellow",
    "stopped": "bright_black",
    "lost": "red",
    "silent": "red",
}


@click.command()
@click.option("--host", metavar="HOST", help="Only those of this machine.")
@click.option(
    "--ended", is_flag=True, help="Also those that stopped or were lost today."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@click.pass_context
def workers(
    context: click.Context, *, host: str | None, ended: bool, as_json: bool
) -> None:
    """List workers: where they run, what they do, how they are.

    Figures are those of the last renewal of the lease, two seconds old at most. A
    worker that is silent has not renewed its lease, and nobody has taken it over yet.
    """

    async def read(app: Stent) -> list[WorkerState]:
        return await app.list_workers(host=host, ended=ended)

    states = with_app(context, read)
    if as_json:
        from stent.cli.documents import print_json, worker_document

        for state in states:
            print_json(worker_document(state))
        return
    from stent.cli.console import make_console

    console = make_console()
    if not states:
        click.echo("no workers", err=True)
    elif console.width < TABLE_COLUMNS_MIN:
        _print_narrow(console, states)
    else:
        _print_table(console, states)


_Command = Callable[..., None]


def _for_workers(command: _Command) -> _Command:
    """The arguments and options of commands that ask workers for something."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print an object a line."),
        click.option(
            "--timeout",
            type=read_duration,
            metavar="DURATION",
            help="Of --wait; then exit code 5.",
        ),
        click.option("--wait", is_flag=True, help="Until all of them have ended."),
        click.option("--host", metavar="HOST", help="All workers of this machine."),
        click.option("--all", "everywhere", is_flag=True, help="All workers."),
        click.argument("workers", nargs=-1, metavar="[WORKER]..."),
    ):
        command = decorate(command)
    return command


@click.command()
@_for_workers
@click.pass_context
def drain(context: click.Context, /, **given: object) -> None:
    """Ask workers to hand over, finish what runs, and end.

    A WORKER is an id, its first digits, or HOST:PID. They obey within a second,
    wherever they are.
    """
    _ask(context, Order.DRAIN, _Given(**given))  # type: ignore[arg-type]


@click.command()
@_for_workers
@click.pass_context
def stop(context: click.Context, /, **given: object) -> None:
    """Ask workers to end without waiting for what runs.

    What is cut off runs again elsewhere. A WORKER is an id, its first digits, or
    HOST:PID.
    """
    _ask(context, Order.STOP, _Given(**given))  # type: ignore[arg-type]


class _Given:
    """What was typed."""

    def __init__(
        self,
        *,
        workers: tuple[str, ...],
        everywhere: bool,
        host: str | None,
        wait: bool,
        timeout: timedelta | None,
        as_json: bool,
    ) -> None:
        if bool(workers) + everywhere + (host is not None) != 1:
            message = "say which: WORKERs, --host HOST or --all, one of the three"
            raise click.UsageError(message)
        if timeout is not None and not wait:
            message = "--timeout belongs to --wait"
            raise click.UsageError(message)
        self.workers = workers
        self.host = host
        self.wait = wait
        self.timeout = timeout
        self.as_json = as_json


def _ask(context: click.Context, order: Order, given: _Given) -> None:
    async def act(app: Stent) -> list[tuple[WorkerState, bool]]:
        chosen = _choose(await app.list_workers(host=given.host), given.workers)
        if given.host is not None and not chosen:
            message = f"there is no running worker on {given.host}: see `stent workers`"
            raise WorkerNotFoundError(message)
        tell = app.drain_worker if order is Order.DRAIN else app.stop_worker
        asked = [(state, state.alive and await tell(state.id)) for state in chosen]
        _report(asked, order, as_json=given.as_json)
        if given.wait:
            ids = {state.id for state, done in asked if done}
            await _wait_until_ended(app, ids, given.timeout)
        return asked

    with_app(context, act)


def _choose(states: list[WorkerState], named: tuple[str, ...]) -> list[WorkerState]:
    if not named:
        return states
    return list(
        {one.id: one for one in (_find(states, name) for name in named)}.values()
    )


def _find(states: list[WorkerState], name: str) -> WorkerState:
    """The one living worker that was meant.

    Raises:
        WorkerNotFoundError: There is none.
        UsageError: Several begin so, or there are too few digits.
    """
    digits = name.replace("-", "").lower()
    found = [state for state in states if f"{state.host}:{state.pid}" == name]
    if not found:
        found = [s for s in states if s.id.replace("-", "").startswith(digits)]
        if found and len(digits) < PREFIX_DIGITS_MIN:
            message = f"{name!r}: give at least {PREFIX_DIGITS_MIN} digits of the id"
            raise UsageError(message)
    if not found:
        message = f"there is no running worker {name}: see `stent workers`"
        raise WorkerNotFoundError(message)
    if len(found) > 1:
        message = f"several workers are meant by {name}, {found[0].id} among them"
        raise UsageError(message)
    return found[0]


def _report(
    asked: list[tuple[WorkerState, bool]], order: Order, *, as_json: bool
) -> None:
    if as_json:
        from stent.cli.documents import print_json

        for state, done in asked:
            print_json({"id": state.id, "order": order.value, "asked": done})
        return
    if not asked:
        click.echo("no workers", err=True)
    for state, done in asked:
        where = f"{state.id} ({escaped(state.host)}, pid {state.pid})"
        if done:
            click.echo(f"asked {where} to {order.value}")
        else:
            click.echo(f"{where} does not answer: its lease has run out", err=True)


async def _wait_until_ended(
    app: Stent, ids: set[str], timeout: timedelta | None
) -> None:
    """Until none of them is alive.

    Raises:
        TimeoutError: Some still are.
    """
    import anyio

    seconds = None if timeout is None else timeout.total_seconds()
    left = ids
    with anyio.move_on_after(seconds):
        while left:
            left = ids & {s.id for s in await app.list_workers() if s.alive}
            if left:
                await anyio.sleep(WAIT_POLL_SECONDS)
    if left:
        message = f"still running: {', '.join(sorted(left))}"
        raise TimeoutError(message)


def _shown_state(state: WorkerState) -> str:
    silent = state.state in ("running", "draining") and not state.alive
    return "silent" if silent else state.state


def _print_table(console: Console, states: list[WorkerState]) -> None:
    from rich.table import Table
    from rich.text import Text

    from stent.cli.console import text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, right in _COLUMNS:
        table.add_column(name, no_wrap=True, justify="right" if right else "left")
    for state in states:
        shown = _shown_state(state)
        table.add_row(
            state.id.replace("-", "")[:8],
            Text(shown, style=STYLES[shown]),
            text(shortened(state.host, 24)),
            str(state.pid),
            text(_version(state)),
            f"{state.running}/{state.slots}",
            str(state.residents),
            _milliseconds(state.lag),
            f"{state.lease_left.total_seconds():.1f}s",
            _up(state),
            text(shortened(",".join(state.queues), 40)),
        )
    console.print(table)


def _up(state: WorkerState) -> str:
    """How long it has been there; of one that has ended, how long it was heard of."""
    from stent.cli.console import age, duration

    if state.state in ("running", "draining"):
        return age(state.started_at)
    return duration(state.renewed_at - state.started_at)


_COLUMNS = (
    ("WORKER", False),
    ("STATE", False),
    ("HOST", False),
    ("PID", True),
    ("VERSION", False),
    ("SLOTS", True),
    ("OWNS", True),
    ("LAG", True),
    ("LEASE", True),
    ("UP", True),
    ("QUEUES", False),
)


def _print_narrow(console: Console, states: list[WorkerState]) -> None:
    from rich.text import Text

    for state in states:
        shown = _shown_state(state)
        line = Text(f"{state.id.replace('-', '')[:8]} ")
        line.append(shown, style=STYLES[shown])
        line.append(
            f" {escaped(state.host)}:{state.pid} {state.running}/{state.slots}"
            f" lag {_milliseconds(state.lag)}"
        )
        console.print(line, no_wrap=True, overflow="ellipsis")


def _version(state: WorkerState) -> str:
    parts = [part for part in (state.app_version, state.version) if part]
    return shortened(" / ".join(parts), 30) or "?"


def _milliseconds(duration: timedelta) -> str:
    return f"{duration / timedelta(milliseconds=1):.0f}ms"
