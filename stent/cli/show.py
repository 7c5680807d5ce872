"""``stent show``: one execution at a glance, with what it started."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from stent.cli.opening import find_execution, with_app
from stent.cli.text import escaped
from stent.model import Entry, ExecutionState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from stent.app import Stent

CHILDREN_SHOWN_MAX = 20
DEPTH_SHOWN_MAX = 5
EXECUTIONS_SHOWN_MAX = 100
VALUE_CHARACTERS_MAX = 2_000


@dataclass(slots=True)
class Calls:
    """Calls of one function by one execution."""

    function: str
    issued: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def open(self) -> int:
        """Not ended yet."""
        return max(0, self.issued - self.done - self.failed - self.cancelled)


@dataclass(slots=True)
class Node:
    """An execution and what it started."""

    state: ExecutionState
    calls: list[Calls] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    hidden: int = 0
    """Children that are not shown."""


@click.command()
@click.argument("execution_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def show(context: click.Context, execution_id: str, *, as_json: bool) -> None:
    """Show the execution ID: state, why it waits, what it started, its outcome."""

    async def read(app: Stent) -> Node:
        found = await find_execution(app, execution_id)
        budget = [EXECUTIONS_SHOWN_MAX]
        return await _read_node(app, await app.state_of(found), 0, budget)

    node = with_app(context, read)
    if as_json:
        from stent.cli.documents import print_json

        print_json(_document(node))
    else:
        _print(node)


async def _read_node(
    app: Stent, state: ExecutionState, depth: int, budget: list[int]
) -> Node:
    budget[0] -= 1
    node = Node(state, count_calls(await app.history(state.id)))
    for child in state.children:
        shown = len(node.children) < CHILDREN_SHOWN_MAX and depth < DEPTH_SHOWN_MAX
        if not shown or budget[0] <= 0:
            node.hidden = len(state.children) - len(node.children)
            break
        below = await app.state_of(child)
        node.children.append(await _read_node(app, below, depth + 1, budget))
    return node


def count_calls(entries: Iterable[Entry]) -> list[Calls]:
    """The activities an execution called, by function; children are executions.

    Items of maps count as calls. One that failed in its page is a call of its own
    afterwards: what counted as done with the page is not.
    """
    from stent.history.display import items_at

    counted: dict[str, Calls] = {}
    children: set[str | None] = set()
    for entry in entries:
        name = str(entry.detail.get("function", ""))
        if "child" in entry.detail:
            children.add(entry.address)
        if entry.address is None or entry.address in children:
            continue
        calls = counted.setdefault(name, Calls(name))
        issued = items_at(entry.address)
        match entry.kind:
            case "call.issued":
                calls.issued += issued
                calls.done -= issued == 0
            case "result.delivered" | "result.recorded" if entry.detail.get("ok"):
                calls.done += max(1, issued)
            case "result.delivered" | "result.recorded":
                calls.failed += 1
            case "call.settled":
                calls.cancelled += max(1, issued)
    return [calls for calls in counted.values() if calls.issued]


def _document(node: Node) -> dict[str, object]:
    from stent.cli.documents import state_document

    return {
        **state_document(node.state),
        "calls": [dataclasses.asdict(calls) for calls in node.calls],
        "tree": [_document(child) for child in node.children],
    }


def _print(node: Node) -> None:
    from rich.text import Text

    from stent.cli.console import make_console, text

    console, state = make_console(), node.state
    console.print(_title(state))
    for name, value in _facts(state):
        console.print(Text(f"  {name:10}", style="dim").append(escaped(value)))
    if state.waiting_for:
        console.print(Text("waiting for", style="bold"))
        for sentence in state.waiting_for:
            _print_indented(console, text(sentence))
    if node.calls or node.children:
        console.print(Text("started", style="bold"))
        _print_indented(console, _tree(node))
    if state.error is not None:
        console.print(Text("error", style="bold"))
        _print_indented(console, Text(escaped(state.error, keep="\n"), style="red"))
        if state.traceback is not None:
            lines = escaped(state.traceback.rstrip(), keep="\n")
            _print_indented(console, Text(lines, style="dim"))
    elif state.status.terminal:
        console.print(Text("result", style="bold"))
        _print_indented(console, Text(_result(state.result)))


def _print_indented(console: Console, shown: Text | Tree) -> None:
    from rich.padding import Padding

    console.print(Padding(shown, (0, 0, 0, 2)))


def _title(state: ExecutionState) -> Text:
    from stent.cli.console import status_text, text

    return (
        text(state.function, "bold").append("  ").append_text(status_text(state.status))
    )


def _facts(state: ExecutionState) -> Iterator[tuple[str, str]]:
    from stent.cli.console import took

    times = state.times
    yield "id", state.id
    yield "kind", state.kind
    if state.kind == "workflow":
        yield "turns", str(state.attempts)
    else:
        yield "attempts", str(state.attempts)
    yield "created", _instant(times.created_at)
    if times.started_at is not None:
        yield "started", _instant(times.started_at)
    if times.finished_at is not None:
        duration = took(state)
        after = "" if duration is None else f", after {duration}"
        yield "finished", _instant(times.finished_at) + after
    if times.deadline_at is not None and times.finished_at is None:
        yield "ends by", _instant(times.deadline_at)
    yield (
        "queue",
        state.queue + (f", priority {state.priority}" if state.priority else ""),
    )
    if state.tags:
        yield "tags", ", ".join(state.tags)
    if state.parent_id is not None:
        yield "parent", state.parent_id
    if state.root_id not in (None, state.id, state.parent_id):
        yield "root", str(state.root_id)
    if state.worker_id is not None:
        yield "worker", state.worker_id


def _instant(at: dt.datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _tree(node: Node) -> Tree:
    from rich.tree import Tree

    top = Tree("", hide_root=True, guide_style="dim")
    _grow(top, node)
    return top


def _grow(tree: Tree, node: Node) -> None:
    from rich.text import Text

    from stent.cli.console import status_text, text, took

    for calls in node.calls:
        tree.add(_calls_text(calls, ended=node.state.status.terminal))
    for child in node.children:
        label = text(child.state.function).append("  ")
        label.append_text(status_text(child.state.status))
        duration = took(child.state)
        if duration is not None:
            label.append(f" in {duration}", style="dim")
        label.append(f"\n{child.state.id}", style="dim")
        _grow(tree.add(label), child)
    if node.hidden:
        tree.add(Text(f"and {node.hidden} more children", style="dim"))


def _calls_text(calls: Calls, *, ended: bool) -> Text:
    from stent.cli.console import text

    times = f" × {calls.issued}" if calls.issued > 1 else ""
    label = text(calls.function + times).append("  ")
    parts = [
        (calls.done, "done", "green"),
        (calls.failed, "failed", "red"),
        (calls.cancelled, "cancelled", "bright_black"),
        (calls.open, "dropped", "bright_black")
        if ended
        else (calls.open, "open", "cyan"),
    ]
    for count, word, style in parts:
        if count:
            label.append(word if calls.issued == 1 else f"{count} {word} ", style=style)
    return label


def _result(result: object) -> str:
    import json

    from stent.cli.text import shortened

    compact = json.dumps(result, ensure_ascii=False)
    if len(compact) > 70 and isinstance(result, (dict, list)):
        compact = json.dumps(result, ensure_ascii=False, indent=2)
    return shortened(escaped(compact, keep="\n"), VALUE_CHARACTERS_MAX)
