"""``stent wait``: until an execution has ended."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from stent.cli.durations import read_duration
from stent.cli.opening import find_execution, with_app
from stent.cli.outcome import end_interrupted, end_with, wait_for_state

if TYPE_CHECKING:
    from stent.app import Stent
    from stent.model import ExecutionState


@click.command()
@click.argument("execution_id", metavar="ID")
@click.option(
    "--timeout",
    type=read_duration,
    metavar="DURATION",
    help="Then give up, exit code 5.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def wait(
    context: click.Context,
    execution_id: str,
    *,
    timeout: timedelta | None,
    as_json: bool,
) -> None:
    """Wait for the execution ID and print its result.

    The exit code is 0 if it completed, 6 if it failed, was cancelled or timed out.
    """

    async def read(app: Stent) -> ExecutionState:
        found = await find_execution(app, execution_id)
        return await wait_for_state(app, found, timeout)

    try:
        state = with_app(context, read)
    except KeyboardInterrupt:
        end_interrupted(execution_id)
    end_with(state, as_json=as_json)
