"""``stent ls``: which executions there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stent.cli.opening import with_app
from stent.cli.text import escaped, shortened, shortened_name
from stent.model import ExecutionState, Status

if TYPE_CHECKING:
    from rich.console import Console

    from stent.app import Stent

TABLE_COLUMNS_MIN = 76
REMARK_COLUMNS_MIN = 110
_FIXED_COLUMNS = 36 + 10 + 4 + 3 * 2


@click.command()
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([status.value for status in Status]),
    help="May be repeated.",
)
@click.option("--function", metavar="NAME", help="Durable name, such as flows.crawl.")
@click.option("--tag", metavar="TAG", help="One of its tags.")
@click.option("--queue", metavar="NAME", help="Its queue.")
@click.option(
    "--limit",
    type=click.IntRange(1, 500),
    default=50,
    show_default=True,
    help="How many at most.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@click.pass_context
def ls(  # noqa: PLR0913 - one parameter per option
    context: click.Context,
    *,
    statuses: tuple[str, ...],
    function: str | None,
    tag: str | None,
    queue: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List executions, newest first."""

    async def read(app: Stent) -> list[ExecutionState]:
        return await app.list_executions(
            status=statuses or None,
            function=function,
            tag=tag,
            queue=queue,
            limit=limit,
        )

    states = with_app(context, read)
    if as_json:
        from stent.cli.documents import print_json, state_document

        for state in states:
            print_json(state_document(state))
        return
    from stent.cli.console import make_console

    console = make_console()
    if not states:
        click.echo("no executions", err=True)
    elif console.width < TABLE_COLUMNS_MIN:
        _print_narrow(console, states)
    else:
        _print_table(console, states)


def _print_table(console: Console, states: list[ExecutionState]) -> None:
    from rich.table import Table
    from rich.text import Text

    from stent.cli.console import age, status_text

    with_remark = console.width >= REMARK_COLUMNS_MIN
    left = console.width - _FIXED_COLUMNS - 2
    longest = max(len(state.function) for state in states)
    name_columns = min(longest, left // 3 if with_remark else left)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("ID", no_wrap=True, width=36)
    table.add_column("STATUS", no_wrap=True, width=10)
    table.add_column("AGE", no_wrap=True, width=4, justify="right")
    table.add_column("FUNCTION", no_wrap=True, overflow="crop")
    if with_remark:
        table.add_column("WAITING FOR, RESULT OR ERROR", no_wrap=True, overflow="crop")
    for state in states:
        cells = [
            Text(state.id),
            status_text(state.status),
            Text(age(state.times.created_at)),
            Text(shortened_name(escaped(state.function), max(8, name_columns))),
        ]
        if with_remark:
            room = left - name_columns - 2
            cells.append(Text(shortened(_remark(state), room), style="dim"))
        table.add_row(*cells)
    if with_remark:
        console.print(table)
        return
    # No room beside them: what waits or has failed says why in a line of its own.
    with console.capture() as capture:
        console.print(table)
    heading, *lines = capture.get().splitlines()
    click.echo(heading)
    for line, state in zip(lines, states, strict=True):
        click.echo(line)
        _print_reason(console, state)


def _print_reason(console: Console, state: ExecutionState) -> None:
    from rich.text import Text

    if state.waiting_for or state.error is not None:
        remark = Text(shortened(f"  {_remark(state)}", console.width), style="dim")
        console.print(remark, no_wrap=True, overflow="ellipsis")


def _print_narrow(console: Console, states: list[ExecutionState]) -> None:
    from rich.text import Text

    from stent.cli.console import age, status_text

    for state in states:
        console.print(Text(state.id), no_wrap=True, overflow="fold")
        line = Text("  ").append_text(status_text(state.status))
        name = shortened_name(escaped(state.function), max(8, console.width - 20))
        line.append(f" {age(state.times.created_at)} {name}")
        console.print(line, no_wrap=True, overflow="ellipsis")
        _print_reason(console, state)


def _remark(state: ExecutionState) -> str:
    from stent.cli.console import value_text

    if state.waiting_for:
        more = len(state.waiting_for) - 1
        return escaped(state.waiting_for[0]) + (f" and {more} more" if more else "")
    if state.error is not None:
        return escaped(state.error)
    return value_text(state.result, 200)
