"""The lines of the table, and how they are judged, printed and kept."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click


@dataclass(frozen=True)
class Figure:
    """One line of the table; without a value ``wanted`` says why there is none."""

    id: str
    what: str
    value: float | None
    unit: str
    floor: str = ""
    ratio: float | None = None
    wanted: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Table:
    """The figures of one run."""

    figures: list[Figure] = field(default_factory=list)

    def add(  # noqa: PLR0913, PLR0917 - a row
        self,
        name: str,
        what: str,
        value: float,
        unit: str,
        floor: tuple[str, float] | None = None,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> None:
        """Add a line, judged by its ratio if it has a floor, else by its value."""
        ratio = None if floor is None else value / floor[1]
        judged = value if ratio is None else ratio
        wanted, met = "", None
        if least is not None:
            wanted, met = f"at least {least}", judged >= least
        elif most is not None:
            wanted, met = f"at most {most}", judged <= most
        self.figures.append(
            Figure(
                name,
                what,
                value,
                unit,
                floor[0] if floor else "",
                ratio,
                wanted,
                met,
                note,
            )
        )
        click.echo(f"{name:4} {what}: {number(value)} {unit}", err=True)

    def miss(self, name: str, what: str, why: str) -> None:
        """Add a line that says why there is no figure."""
        self.figures.append(Figure(name, what, None, "", wanted=why))
        click.echo(f"{name:4} {what}: not measured: {why}", err=True)

    def fail(self, name: str, why: str) -> None:
        """Add a line for a workload that did not come to its end."""
        what = "not all of it was measured"
        self.figures.append(Figure(name, what, None, "", wanted=why, met=False))
        click.echo(f"{name:4} {what}: {why}", err=True)

    @property
    def missed(self) -> bool:
        """Whether something that is wanted was not met."""
        return any(figure.met is False for figure in self.figures)

    def print(self) -> None:
        """Print the table."""
        click.echo(f"{'':4} {'workload':42} {'figure':>14}  {'ratio':>16}  wanted")
        for figure in self.figures:
            click.echo(_line(figure))

    def write(self, path: Path) -> None:
        """Write the figures as JSON, with what they were measured on."""
        written = {
            "python": platform.python_version(),
            "machine": platform.platform(),
            "figures": [asdict(figure) for figure in self.figures],
        }
        path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def number(value: float) -> str:
    """As people read it: two decimals below 100, thousands apart above."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _line(figure: Figure) -> str:
    if figure.value is None:
        return f"{figure.id:4} {figure.what:42} not measured: {figure.wanted}"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.3g} of {figure.floor}"
    mark = "" if figure.met is None else ("  ok" if figure.met else "  MISSED")
    value = f"{number(figure.value):>10} {figure.unit:9}"
    last = ", ".join(part for part in (figure.wanted + mark, figure.note) if part)
    return f"{figure.id:4} {figure.what:42} {value} {ratio:>16}  {last}"


async def median(measure: Callable[[], Awaitable[float]], runs: int) -> float:
    """Of several runs."""
    return statistics.median([await measure() for _ in range(runs)])


def percentile(times: list[float], share: float) -> float:
    """The value below which ``share`` of ``times`` lie.

    Raises:
        ValueError: There are none; then nothing was measured.
    """
    if not times:
        message = "nothing was measured"
        raise ValueError(message)
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
