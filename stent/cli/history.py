"""``stent history``: what happened to an execution, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stent.cli.opening import find_execution, with_app
from stent.cli.text import escaped, shortened

if TYPE_CHECKING:
    from rich.text import Text

    from stent.app import Stent
    from stent.model import Entry

VALUE_CHARACTERS_MAX = 300
NARROW_COLUMNS = 70
_ALARMING = ("turn.unreadable", "history.cut", "attempt.lost", "worker.lost")


@click.command()
@click.argument("execution_id", metavar="ID")
@click.option(
    "--addresses", is_flag=True, help="Show the address of each call as well."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@click.pass_context
def history(
    context: click.Context, execution_id: str, *, addresses: bool, as_json: bool
) -> None:
    """Show what happened to the execution ID, in the order in which it saw it."""

    async def read(app: Stent) -> list[Entry]:
        return await app.history(await find_execution(app, execution_id))

    entries = with_app(context, read)
    if as_json:
        from stent.cli.documents import entry_document, print_json

        for entry in entries:
            print_json(entry_document(entry))
        return
    _print_entries(entries, addresses=addresses)


def _print_entries(entries: list[Entry], *, addresses: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from stent.cli.console import make_console

    console = make_console()
    if entries:
        first = entries[0].at
        console.print(Text(f"times in UTC, from {first:%Y-%m-%d}", style="dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    if console.width >= NARROW_COLUMNS:
        table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for entry in entries:
        told = sentence(entry)
        if addresses and entry.address is not None:
            told.append(f"\n{escaped(entry.address)}", style="dim")
        cells = [
            Text(f"{entry.at:%H:%M:%S}.{entry.at.microsecond // 1000:03}"),
            Text(escaped(entry.kind), style=_style(entry)),
            told,
        ]
        if console.width >= NARROW_COLUMNS:
            cells.insert(0, Text(str(entry.position)))
        table.add_row(*cells)
    console.print(table)


def _style(entry: Entry) -> str:
    if "error" in entry.detail or entry.kind in _ALARMING:
        return "red"
    return "green" if entry.kind.startswith("execution.") else ""


def sentence(entry: Entry) -> Text:
    """The facts of an entry on a line."""
    from rich.text import Text

    facts = dict(entry.detail)
    line = Text(escaped(str(facts.pop("function", ""))))
    if "page_from" in facts:
        line.append(f" from item {facts.pop('page_from')}")
    if "arguments" in facts:
        line.append(_arguments(facts.pop("arguments")))
    if "child" in facts:
        line.append(f" → child {facts.pop('child')}")
    facts.pop("ok", None)
    if "error" in facts:
        error = shortened(escaped(str(facts.pop("error"))), VALUE_CHARACTERS_MAX)
        line.append(" ✗ " if line else "").append(error, style="red")
    if "value" in facts:
        line.append(" = " if line else "= ").append(_shown(facts.pop("value")))
    rest = [_fact(name, value) for name, value in facts.items()]
    if rest:
        line.append(f"  {', '.join(rest)}" if line else ", ".join(rest), style="dim")
    return line


def _arguments(arguments: object) -> str:
    if not isinstance(arguments, list):
        return f"({_shown(arguments)})"
    return f"({', '.join(_shown(one) for one in arguments)})"


def _fact(name: str, value: object) -> str:
    if name == "duration_ms":
        return f"{value} ms"
    shown = value if isinstance(value, str) else _shown(value)
    return f"{name.replace('_', ' ')} {escaped(str(shown))}"


def _shown(value: object) -> str:
    from stent.cli.console import value_text

    return value_text(value, VALUE_CHARACTERS_MAX)
