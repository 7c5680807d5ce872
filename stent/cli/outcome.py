"""Wait for an execution, print what came out, and end with the code that says it."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import click

from stent.cli.text import escaped

if TYPE_CHECKING:
    from stent.app import Stent
    from stent.model import ExecutionState

EXECUTION_FAILED = 6
INTERRUPTED = 130


async def wait_for_state(
    app: Stent, execution_id: str, timeout: timedelta | None
) -> ExecutionState:
    """The state of an execution once it has ended.

    Raises:
        TimeoutError: It takes longer.
    """
    # Only that it has ended counts here: this process may lack the classes of the
    # outcome, and shows it without building any.
    try:
        await app.wait_for(execution_id, timeout)
    except TimeoutError:
        seconds = 0.0 if timeout is None else timeout.total_seconds()
        message = f"execution {execution_id} has not ended within {seconds:g} s"
        raise TimeoutError(message) from None
    return await app.state_of(execution_id)


def end_with(state: ExecutionState, *, as_json: bool) -> NoReturn:
    """Print the outcome; a result on stdout, a failure on stderr; exit 0 or 6."""
    from stent.cli.documents import print_json, state_document
    from stent.model import Status

    if as_json:
        print_json(state_document(state))
    elif state.status is Status.COMPLETED:
        _print_result(state.result)
    else:
        error = escaped(state.error or "", keep="\n")
        click.echo(f"execution {state.id} {state.status}: {error}", err=True)
    sys.exit(0 if state.status is Status.COMPLETED else EXECUTION_FAILED)


def _print_result(result: object) -> None:
    import json

    compact = json.dumps(result, ensure_ascii=False)
    if len(compact) > 80 and isinstance(result, (dict, list)):
        compact = json.dumps(result, ensure_ascii=False, indent=2)
    click.echo(escaped(compact, keep="\n"))


def end_interrupted(execution_id: str) -> NoReturn:
    """Ctrl-C ends the waiting, not what is waited for."""
    click.echo(
        f"\nthe execution goes on; `stent wait {execution_id}` waits for it again",
        err=True,
    )
    sys.exit(INTERRUPTED)
