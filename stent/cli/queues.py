"""``stent queues``: how much waits and runs where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stent.cli.opening import with_app
from stent.cli.text import escaped, shortened_name

if TYPE_CHECKING:
    from rich.console import Console

    from stent.app import Stent
    from stent.model import QueueDepth

NAME_COLUMNS_MIN = 12
_COUNTS = ("READY", "SCHEDULED", "RUNNING", "WAITING", "OLDEST")
_COUNT_COLUMNS = 9
_KIND_COLUMNS = 9


@click.command()
@click.option("--queue", metavar="NAME", help="Only this queue.")
@click.option(
    "--rows-max",
    type=click.IntRange(1, 1_000_000),
    default=10_000,
    show_default=True,
    metavar="N",
    help="Where counting stops; then a count ends with +.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@click.pass_context
def queues(
    context: click.Context, *, queue: str | None, rows_max: int, as_json: bool
) -> None:
    """Show how much is ready, scheduled, running and waiting, by queue and function.

    OLDEST is for how long the oldest ready one has been ready.
    """

    async def read(app: Stent) -> list[QueueDepth]:
        return await app.queue_depth(queue, rows_max=rows_max)

    depths = with_app(context, read)
    if as_json:
        from stent.cli.documents import depth_document, print_json

        for depth in depths:
            print_json(depth_document(depth))
        return
    from stent.cli.console import make_console

    if depths:
        _print_table(make_console(), depths)
    else:
        click.echo("nothing waits or runs", err=True)


def _print_table(console: Console, depths: list[QueueDepth]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    counts = len(_COUNTS) * (_COUNT_COLUMNS + 2)
    room = (console.width - counts - _KIND_COLUMNS - 3 * 2) // 2
    longest = max(NAME_COLUMNS_MIN, room)
    table.add_column("QUEUE", overflow="fold")
    table.add_column("FUNCTION", overflow="fold")
    table.add_column("KIND", no_wrap=True)
    for name in _COUNTS:
        table.add_column(name, no_wrap=True, justify="right")
    for depth in depths:
        cells = (
            shortened_name(escaped(depth.queue), longest),
            shortened_name(escaped(depth.function), longest),
            depth.kind,
            *_counts(depth),
        )
        table.add_row(*[Text(cell) for cell in cells])
    console.print(table)


def _counts(depth: QueueDepth) -> tuple[str, ...]:
    from stent.cli.console import duration

    more = "+" if depth.capped else ""
    numbers = (depth.ready, depth.scheduled, depth.running, depth.waiting)
    shown = tuple(f"{number}{more if number else ''}" for number in numbers)
    age = depth.oldest_ready
    return (*shown, "-" if age is None else duration(age))
