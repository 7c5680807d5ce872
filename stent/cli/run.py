"""``stent run``: dispatch a durable function from the shell."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from stent.cli.durations import read_duration
from stent.cli.opening import with_app
from stent.cli.outcome import end_interrupted, end_with, wait_for_state
from stent.cli.targets import load_function
from stent.cli.text import escaped

if TYPE_CHECKING:
    from stent.app import Stent
    from stent.model import ExecutionState

_NUMBER = re.compile(r"-\.?\d")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("target", metavar="MODULE:FUNCTION")
@click.argument("words", nargs=-1, metavar="[ARGS]...", type=click.UNPROCESSED)
@click.option("--wait", is_flag=True, help="Wait for the outcome and print it.")
@click.option(
    "--timeout",
    type=read_duration,
    metavar="DURATION",
    help="Of --wait; then exit code 5.",
)
@click.option(
    "--max-duration",
    type=read_duration,
    metavar="DURATION",
    help="End the execution after that, such as 90s, 1h30m.",
)
@click.option("--queue", metavar="NAME", help="Whose workers run it.")
@click.option("--priority", type=int, metavar="N", help="Higher ones come first.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="May be repeated.")
@click.option(
    "--delay", type=read_duration, metavar="DURATION", help="Start it after that."
)
@click.option(
    "--key", metavar="KEY", help="Dispatch key: the same key starts nothing twice."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def run(  # noqa: PLR0913 - one parameter per option
    context: click.Context,
    target: str,
    words: tuple[str, ...],
    *,
    wait: bool,
    timeout: timedelta | None,
    max_duration: timedelta | None,
    queue: str | None,
    priority: int | None,
    tags: tuple[str, ...],
    delay: timedelta | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Start FUNCTION of MODULE and print the execution's id.

    Each of ARGS is JSON, converted by the parameter's annotation; a word that is no
    JSON is a text. NAME=VALUE gives an argument by name.

    With --wait the id goes to stderr, and the result, as JSON, to stdout.

    \b
    Example: stent run flows:crawl '["https://a.example"]' depth=2 --wait
    """  # noqa: D301 - click's mark of a paragraph that is not rewrapped
    from stent.cli.arguments import read_arguments

    _refuse_unknown_options(context, words)
    function = load_function(target)
    args, kwargs = read_arguments(function.function, words)
    given = {
        "max_duration": max_duration,
        "queue": queue,
        "priority": priority,
        "tags": list(tags) or None,
        "delay": delay,
        "dispatch_key": key,
    }
    chosen = function.options(**{n: v for n, v in given.items() if v is not None})
    started: list[str] = []

    async def start(app: Stent) -> ExecutionState | None:
        execution_id = await app.dispatch(chosen, *args, **kwargs)
        started.append(execution_id)
        if not wait:
            return None if not as_json else await app.state_of(execution_id)
        click.echo(f"execution {execution_id}", err=True)
        await _say_if_nobody_runs_it(app, execution_id)
        return await wait_for_state(app, execution_id, timeout)

    try:
        state = with_app(context, start, create=True)
    except KeyboardInterrupt:
        if not started:
            raise
        end_interrupted(started[0])
    if wait and state is not None:
        end_with(state, as_json=as_json)
    if state is not None:
        from stent.cli.documents import print_json, state_document

        print_json(state_document(state))
    else:
        click.echo(started[0])


def _refuse_unknown_options(context: click.Context, words: tuple[str, ...]) -> None:
    """Only negative numbers may begin with a dash; a mistyped option is no argument."""
    for word in words:
        if word.startswith("-") and len(word) > 1 and not _NUMBER.match(word):
            raise click.NoSuchOption(word, ctx=context)


async def _say_if_nobody_runs_it(app: Stent, execution_id: str) -> None:
    from stent.model import Status

    state = await app.state_of(execution_id)
    missing = [why for why in state.waiting_for if why.startswith("no worker")]
    if state.status is Status.PENDING and missing:
        click.echo(
            f"{escaped(missing[0])}: start one with `stent worker`; waiting", err=True
        )
