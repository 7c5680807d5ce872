"""What the demonstration shows: a live bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from workers.flights.watch import Done, Expected, Proof

# What has been done in the last seconds tells best how long the rest will take.
RATE_SECONDS = 3.0
# Between two lines where there is no terminal.
LINE_SECONDS_MIN = 0.5


class Display:
    """Progress of one run, as the database tells it."""

    def __init__(self, console: Console, expected: Expected) -> None:
        """Show nothing yet.

        Args:
            console: A terminal gets a bar, anything else plain lines.
            expected: How much there is to do.
        """
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            _Column(_count, "progress.download"),
            _Column(_rate, "progress.data.speed"),
            _Column(_left, "progress.remaining"),
            console=console,
            disable=not self._live,
            expand=True,
            speed_estimate_period=RATE_SECONDS,
        )
        self._rows = self._progress.add_task("load", total=expected.rows, unit="rows")
        self._months = self._progress.add_task(
            "ask", total=expected.months, unit="months"
        )
        self._shown: dict[TaskID, float] = {}
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False)

    def update(self, done: Done) -> None:
        """Show what is committed."""
        self._progress.update(self._rows, completed=done.counts.read)
        self._progress.update(self._months, completed=done.months)
        if not self._live:
            self._print_lines()

    def _print_lines(self) -> None:
        now = time.monotonic()
        due = now >= self._next_line
        for task in self._progress.tasks:
            moved = task.completed > self._shown.get(task.id, 0)
            if moved and (due or task.finished):
                self._shown[task.id] = task.completed
                self._next_line = now + LINE_SECONDS_MIN
                parts = (_count(task), _rate(task), _left(task))
                self.say(
                    f"{task.description:4} {task.percentage:3.0f} %  "
                    + "  ".join(part for part in parts if part)
                )


class _Column(ProgressColumn):
    """A cell of text."""

    def __init__(self, content: Callable[[Task], str], style: str) -> None:
        super().__init__()
        self._content = content
        self._style = style

    def render(self, task: Task) -> Text:
        return Text(self._content(task), style=self._style, justify="right")


def _count(task: Task) -> str:
    return f"{task.completed:,.0f}/{task.total or 0:,.0f} {task.fields['unit']}"


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    return "" if speed is None else f"{speed:,.0f}/s"


def _left(task: Task) -> str:
    if task.finished or task.time_remaining is None:
        return ""
    return f"{task.time_remaining:.0f} s left"


def show_proof(console: Console, proof: Proof, duration_seconds: float) -> None:
    """Print what was counted beside what should be there, and the verdict."""
    expected, counts = proof.expected, proof.done.counts
    arrived = len(expected.arrived)
    table = Table(
        title="Counted in the database", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("what")
    table.add_column("database", justify="right")
    table.add_column("expected", justify="right")
    table.add_column("")
    for what, found, wanted in (
        ("rows read, says the journal", counts.read, expected.rows),
        ("rows written, says the journal", counts.written, arrived),
        ("rows in the table", proof.rows, arrived),
        ("rows lost", proof.lost, 0),
        ("rows twice", proof.twice, 0),
        ("rows of no flight", proof.foreign, 0),
        ("carrier months asked", proof.done.months, expected.months),
    ):
        mark = "[green]ok[/]" if found == wanted else "[bold red]WRONG[/]"
        table.add_row(what, f"{found:,}", f"{wanted:,}", mark)
    console.print(table)
    if proof.undone:
        console.print(
            f"{proof.undone:,} rows that the dead worker had copied were rolled back."
        )
    verdict = "[bold green]Exact[/]" if proof.holds else "[bold red]Wrong[/]"
    console.print(
        f"{verdict}: {counts.read:,} read, {proof.rows:,} written, {proof.lost:,} lost,"
        f" {proof.twice:,} twice, in {duration_seconds:.1f} s.",
        highlight=False,
    )
