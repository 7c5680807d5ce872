"""``stent limits``, ``pause`` and ``resume``: what may run at the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from stent.cli.opening import with_app
from stent.cli.text import escaped, shortened_name
from stent.rate import Rate, parse_rate

if TYPE_CHECKING:
    from rich.console import Console

    from stent.app import Stent
    from stent.limit_settings import LimitState

NONE = "none"
"""What is typed for: no such limit."""
SUGGESTED_MAX = 3
TABLE_COLUMNS_MIN = 100
NAME_COLUMNS_MIN = 16
_OTHER_COLUMNS = 84


@dataclass(frozen=True, slots=True)
class Target:
    """A function or a queue."""

    function: str | None
    queue: str | None

    def __post_init__(self) -> None:
        if (self.function is None) == (self.queue is None):
            message = "give a function, or --queue NAME, one of them"
            raise click.UsageError(message)

    @property
    def limit(self) -> str:
        """Name of its limit."""
        if self.queue is not None:
            return f"queue:{self.queue}"
        return f"function:{self.function}"

    def __str__(self) -> str:
        if self.queue is not None:
            return f"queue {escaped(self.queue)}"
        return f"function {escaped(str(self.function))}"


def _read_count(text: str) -> int | str:
    if text.lower() == NONE:
        return NONE
    try:
        return int(text)
    except ValueError:
        message = f"{text!r} is no number; write {NONE} for no such limit"
        raise click.BadParameter(message) from None


def _read_rate(text: str) -> str:
    if text.lower() == NONE:
        return NONE
    return str(parse_rate(text))


_JSON = click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
_QUEUE = click.option("--queue", metavar="NAME", help="A queue, not a function.")


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@click.pass_context
def limits(context: click.Context, *, as_json: bool) -> None:
    """Show limits of functions and queues, with what is in use and what waits."""
    if context.invoked_subcommand is not None:
        if as_json:
            message = f"write --json behind {context.invoked_subcommand}"
            raise click.UsageError(message)
        return

    async def read(app: Stent) -> list[LimitState]:
        return await app.limits()

    states = with_app(context, read)
    if as_json:
        from stent.cli.documents import limit_document, print_json

        for state in states:
            print_json(limit_document(state))
        return
    from stent.cli.console import make_console

    console = make_console()
    if not states:
        click.echo("no limits", err=True)
    elif console.width < TABLE_COLUMNS_MIN:
        _print_narrow(console, states)
    else:
        _print_table(console, states)


@limits.command(name="set")
@click.argument("function", required=False)
@_QUEUE
@click.option(
    "--max-concurrent",
    type=_read_count,
    metavar="N",
    help=f"At the same time over all workers; {NONE}: any number.",
)
@click.option(
    "--rate",
    type=_read_rate,
    metavar="RATE",
    help=f"Starts, such as 200/s or '10/s burst 50'; {NONE}: any number.",
)
@_JSON
@click.pass_context
def set_limit(
    context: click.Context,
    /,
    *,
    function: str | None,
    queue: str | None,
    max_concurrent: int | str | None,
    rate: str | None,
    as_json: bool,
) -> None:
    """Limit FUNCTION, or a queue, from now on, whatever its code says.

    What is not given stays as it is. What runs goes on; nothing more starts until
    there is room.
    """
    target = Target(function, queue)
    if max_concurrent is None and rate is None:
        message = "say what to limit: --max-concurrent N, --rate RATE, or both"
        raise click.UsageError(message)

    async def act(app: Stent, target: Target) -> None:
        given: dict[str, Any] = {"max_concurrent": max_concurrent, "rate_limit": rate}
        await app.set_limit(
            target.function,
            queue=target.queue,
            **{
                name: None if value == NONE else value
                for name, value in given.items()
                if value is not None
            },
        )

    _change(context, target, act, as_json=as_json)


@limits.command(name="reset")
@click.argument("function", required=False)
@_QUEUE
@_JSON
@click.pass_context
def reset_limit(
    context: click.Context,
    /,
    *,
    function: str | None,
    queue: str | None,
    as_json: bool,
) -> None:
    """Limit FUNCTION, or a queue, by what its code says again."""

    async def act(app: Stent, target: Target) -> None:
        await app.reset_limit(target.function, queue=target.queue)

    _change(context, Target(function, queue), act, as_json=as_json)


_Command = Callable[..., None]


def _of_target(command: _Command) -> _Command:
    """The options of commands that pause and resume."""
    option = click.option(
        "--function", metavar="NAME", help="A durable function, such as orders.pack."
    )
    return option(click.option("--queue", metavar="NAME", help="A queue.")(command))


@click.command()
@_of_target
@_JSON
@click.pass_context
def pause(
    context: click.Context,
    /,
    *,
    function: str | None,
    queue: str | None,
    as_json: bool,
) -> None:
    """Start nothing more of a function or a queue; what runs goes on."""

    async def act(app: Stent, target: Target) -> None:
        await app.pause(function=target.function, queue=target.queue)

    _change(context, _named(function, queue), act, as_json=as_json)


@click.command()
@_of_target
@_JSON
@click.pass_context
def resume(
    context: click.Context,
    /,
    *,
    function: str | None,
    queue: str | None,
    as_json: bool,
) -> None:
    """Undo `stent pause`."""

    async def act(app: Stent, target: Target) -> None:
        await app.resume(function=target.function, queue=target.queue)

    _change(context, _named(function, queue), act, as_json=as_json)


def _named(function: str | None, queue: str | None) -> Target:
    if (function is None) == (queue is None):
        message = "say which: --function NAME or --queue NAME, one of them"
        raise click.UsageError(message)
    return Target(function, queue)


def _change(
    context: click.Context,
    target: Target,
    act: Callable[[Stent, Target], Awaitable[None]],
    *,
    as_json: bool,
) -> None:
    """Do it, and tell what holds now, and whether anybody knows of the target."""

    async def run(app: Stent) -> tuple[Target, LimitState | None, str | None]:
        chosen, doubt = await _recognise(app, target)
        await act(app, chosen)
        return chosen, await _find(app, chosen), doubt

    chosen, state, doubt = with_app(context, run)
    if as_json:
        from stent.cli.documents import limit_document, no_limit_document, print_json

        document = (
            no_limit_document(chosen.limit) if state is None else limit_document(state)
        )
        print_json(document | {"known": doubt is None})
    else:
        click.echo(f"{chosen}: {_sentence(state)}")
    if doubt is not None:
        click.echo(escaped(doubt), err=True)


async def _find(app: Stent, target: Target) -> LimitState | None:
    found = [state for state in await app.limits() if state.name == target.limit]
    return found[0] if found else None


def _sentence(state: LimitState | None) -> str:
    """What holds, in words."""
    if state is None:
        return "no limit"
    parts = []
    if state.max_concurrent is not None:
        of_key = " of each key" if state.keyed else ""
        parts.append(f"at most {state.max_concurrent}{of_key} at a time")
    if state.rate_per_second is not None:
        parts.append(f"at most {_rate_of(state)}")
    said = ", ".join(parts) or "no limit"
    by = "set by an operator" if state.is_set else "as the code says"
    said = f"{said}, {by}" if parts or state.is_set else said
    return f"paused; {said}" if state.paused else said


async def _recognise(app: Stent, target: Target) -> tuple[Target, str | None]:
    """The target that was meant, and what to say if nobody knows it."""
    workers = await app.list_workers()
    depths = await app.queue_depth(rows_max=1)
    if target.queue is not None:
        queues = {queue for worker in workers for queue in worker.queues}
        queues |= {depth.queue for depth in depths}
        if target.queue in queues or await app.list_executions(
            queue=target.queue, limit=1
        ):
            return target, None
        unknown = f"no worker serves a queue {target.queue!r} and nothing waits in it"
        return target, f"{unknown}; {_suggestion(target.queue, queues)}"
    name = str(target.function)
    known = {function for worker in workers for function in worker.functions or ()}
    known |= {depth.function for depth in depths}
    known |= {
        state.name.removeprefix("function:")
        for state in await app.limits()
        if not state.is_set and (state.max_concurrent or state.rate_per_second)
    }
    dotted = name.replace(":", ".")
    for written in (name, dotted):
        if written in known or await app.list_executions(function=written, limit=1):
            return Target(written, None), None
    unknown = f"no worker has a function {name} and nothing waits for one"
    return target, f"{unknown}; {_suggestion(dotted, known)}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Names that may have been meant."""
    from difflib import get_close_matches

    last = name.rpartition(".")[2]
    names = sorted(known)
    same = [one for one in names if one.rpartition(".")[2] == last]
    close = (same or get_close_matches(name, names))[:SUGGESTED_MAX]
    return f"did you mean {' or '.join(close)}?" if close else "is the name right?"


def _rate_of(state: LimitState) -> str | None:
    if state.rate_per_second is None:
        return None
    return str(Rate.of(state.rate_per_second, state.burst or 1))


def _shown_most(state: LimitState) -> str:
    if state.max_concurrent is None:
        return "-"
    return f"{state.max_concurrent} a key" if state.keyed else str(state.max_concurrent)


def _in_use(state: LimitState) -> str:
    return "-" if state.max_concurrent is None else str(state.held)


def _waiting(state: LimitState) -> str:
    return f"{state.waiting}{'+' if state.capped and state.waiting else ''}"


def _set_by(state: LimitState) -> str:
    """Who said how much; pauses are always an operator's."""
    if state.is_set:
        return "operator"
    limited = state.max_concurrent or state.rate_per_second
    return "code" if limited else "-"


def _standing(state: LimitState) -> str:
    """Whether something starts at all."""
    if state.paused:
        return "paused"
    if state.closed_until is None:
        return "open"
    from datetime import UTC, datetime, timedelta

    from stent.cli.console import duration

    left = state.closed_until - datetime.now(UTC)
    # The answer is a moment old: what ends within it has ended.
    return "open" if left < timedelta(seconds=1) else f"closed for {duration(left)}"


def _print_table(console: Console, states: list[LimitState]) -> None:
    from rich.table import Table

    from stent.cli.console import text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    longest = max(NAME_COLUMNS_MIN, console.width - _OTHER_COLUMNS)
    for column, right in _COLUMNS:
        table.add_column(column, no_wrap=True, justify="right" if right else "left")
    for state in states:
        of, _, name = state.name.partition(":")
        table.add_row(
            of,
            text(shortened_name(escaped(name), longest)),
            _shown_most(state),
            _in_use(state),
            _waiting(state),
            text(_rate_of(state) or "-"),
            "-" if state.tokens is None else str(int(state.tokens)),
            text(_standing(state), "" if _standing(state) == "open" else "yellow"),
            _set_by(state),
        )
    console.print(table)


_COLUMNS = (
    ("OF", False),
    ("NAME", False),
    ("LIMIT", True),
    ("IN USE", True),
    ("WAITING", True),
    ("RATE", False),
    ("TOKENS", True),
    ("STATE", False),
    ("SET BY", False),
)


def _print_narrow(console: Console, states: list[LimitState]) -> None:
    from rich.text import Text

    for state in states:
        of, _, name = state.name.partition(":")
        line = Text(f"{of} {escaped(name)}", style="bold")
        console.print(line, no_wrap=True, overflow="ellipsis")
        facts = f"  {_sentence(state)}; {_waiting(state)} waiting"
        if state.max_concurrent is not None:
            facts += f", {state.held} in use"
        console.print(Text(facts))
