"""``stent cancel``: ask an execution to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stent.cli.opening import find_execution, with_app

if TYPE_CHECKING:
    from stent.app import Stent
    from stent.model import ExecutionState


@click.command()
@click.argument("execution_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per ID.")
@click.pass_context
def cancel(
    context: click.Context, execution_ids: tuple[str, ...], *, as_json: bool
) -> None:
    """Ask the executions ID, and what they started, to stop.

    What has ended stays as it is; that is no failure.
    """

    async def ask(app: Stent) -> list[tuple[bool, ExecutionState]]:
        found = [await find_execution(app, one) for one in execution_ids]
        return [(await app.cancel(one), await app.state_of(one)) for one in found]

    for asked, state in with_app(context, ask):
        if as_json:
            from stent.cli.documents import print_json

            print_json({"id": state.id, "asked": asked, "status": state.status.value})
        elif not asked:
            click.echo(f"execution {state.id} has ended already: {state.status}")
        elif state.status.terminal:
            click.echo(f"execution {state.id} is {state.status}")
        else:
            click.echo(f"execution {state.id} was asked to stop; it is {state.status}")
