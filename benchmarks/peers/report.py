"""What came out of a comparison: a table, JSON and a picture."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import number
from benchmarks.peers.catalogue import JOBS_ONLY, Peer
from benchmarks.peers.picture import Bar, draw

NOT_MEASURED = "–"
JOBS = "J1"


@dataclass(frozen=True)
class Column:
    """One workload.

    Attributes:
        id: As the programs tell it.
        title: What it is.
        unit: Of its figures.
        floor: What of the database it is set against, ``F1`` or ``F2``.
        more_is_better: Of its figures.
    """

    id: str
    title: str
    unit: str
    floor: str
    more_is_better: bool


COLUMNS = (
    Column("W1", "one workflow gathers no-op activities", "/s", "F1", True),  # noqa: FBT003
    Column("W3", "steps in sequence", "ms a step", "F2", False),  # noqa: FBT003
    Column("W4", "workflows of three steps", "/s", "F1", True),  # noqa: FBT003
    Column("W5", "dispatch to result, p50", "ms", "F2", False),  # noqa: FBT003
    Column(JOBS, "no-op jobs, enqueued to done", "/s", "F1", True),  # noqa: FBT003
)


@dataclass
class Row:
    """One peer.

    Attributes:
        peer: Who.
        python: Version it ran on; empty if it did not.
        floors: F1 and F2, each the mean of right before it and right after it.
        figures: What it told, by id of the workload.
        problem: Why figures are missing, if they are.
    """

    peer: Peer
    python: str = ""
    floors: dict[str, float] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""

    def ratio(self, column: Column) -> float | None:
        """Of its figure to the floor; None where there is no figure."""
        figure, floor = self.figures.get(column.id), self.floors.get(column.floor)
        if figure is None or floor is None:
            return None
        return float(figure["value"]) / floor


def table(rows: list[Row]) -> str:
    """As Markdown, with a line for each that has something to say."""
    heads = [f"{column.id}, {column.unit}" for column in COLUMNS]
    head = ["", "Python", *heads, "F1, rows/s", "F2, ms"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [_cell(row, column) for column in COLUMNS]
        floors = [
            number(row.floors[name]) if name in row.floors else NOT_MEASURED
            for name in ("F1", "F2")
        ]
        lines.append([row.peer.name, row.python or NOT_MEASURED, *cells, *floors])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    columns = [
        f"- {c.id}: {c.title}; in brackets the ratio to {c.floor} of the same line."
        for c in COLUMNS
    ]
    notes = [f"- {row.peer.name}: {row.peer.note}." for row in rows if row.peer.note]
    problems = [
        f"- {row.peer.name}: not measured in full: {row.problem}"
        for row in rows
        if row.problem
    ]
    return "\n".join([text, "", *columns, *notes, *problems, ""])


def _cell(row: Row, column: Column) -> str:
    figure, ratio = row.figures.get(column.id), row.ratio(column)
    if row.peer.note == JOBS_ONLY and column.id != JOBS:
        return "no workflows"
    if figure is None or ratio is None:
        return NOT_MEASURED
    shown = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return f"{number(figure['value'])} ({shown})"


def write(rows: list[Row], directory: Path, plan: dict[str, Any]) -> list[Path]:
    """Write ``peers.md``, ``peers.json`` and ``peers.svg``.

    Args:
        rows: In the order of the table.
        directory: Where to; made when missing.
        plan: Parameters of the call, to be kept with the figures.
    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {
        "measured_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "plan": plan,
        "peers": [
            {
                "key": row.peer.key,
                "name": row.peer.name,
                "python": row.python,
                "requirements": list(row.peer.requirements),
                "npm": row.peer.npm[0] if row.peer.npm else None,
                "note": row.peer.note,
                "floors": row.floors,
                "figures": row.figures,
                "problem": row.problem,
            }
            for row in rows
        ],
    }
    contents = {
        "peers.md": table(rows),
        "peers.json": json.dumps(written, indent=2, ensure_ascii=False) + "\n",
        "peers.svg": draw(_panels(rows)),
    }
    for name, content in contents.items():
        (directory / name).write_text(content, encoding="utf-8")
    return [directory / name for name in contents]


def _panels(rows: list[Row]) -> list[tuple[str, list[Bar]]]:
    """A title and a bar for each of those that do this kind of work."""
    panels = []
    for column in COLUMNS:
        better = "more is better" if column.more_is_better else "less is better"
        bars: list[Bar] = []
        for row in rows:
            figure = row.figures.get(column.id)
            if figure is not None:
                value = float(figure["value"])
                bars.append((row.peer.name, value, f"{number(value)} {column.unit}"))
            elif row.problem:
                bars.append((row.peer.name, None, "not measured"))
        panels.append((f"{column.id}: {column.title} ({better})", bars))
    return panels
