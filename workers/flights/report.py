"""The printed report: what happened to the rows, delays by carrier, worst routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from workers.flights.clean import RowCounts
from workers.flights.figures import (
    LATE_AFTER_MINUTES,
    CarrierDelays,
    CarrierMonth,
    Delays,
    RouteDelays,
    by_carrier,
    worst_routes,
)

WORST_ROUTES = 10
# About two flights a week: less is chance.
ROUTE_FLIGHTS_MIN = 100
PLAIN_WIDTH = 88


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything the report prints, worst first."""

    counts: RowCounts
    carriers: Sequence[CarrierDelays]
    routes: Sequence[RouteDelays]


def make_report(counts: RowCounts, months: Sequence[CarrierMonth]) -> Report:
    """Add the figures of all carriers and months up to one report."""
    return Report(
        counts=counts,
        carriers=by_carrier(months),
        routes=worst_routes(months, count=WORST_ROUTES, flights_min=ROUTE_FLIGHTS_MIN),
    )


def print_report(report: Report, stream: TextIO) -> None:
    """Print a report: coloured and as wide as the terminal, or plain in 88 columns."""
    console = Console(
        file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False
    )
    console.print(_rows_table(report.counts))
    console.print(_carriers_table(report.carriers))
    console.print(_routes_table(report.routes))


def _rows_table(counts: RowCounts) -> Table:
    table = _table("Rows")
    table.add_column("fate")
    table.add_column("rows", justify="right")
    for fate, count in (
        ("read", counts.read),
        ("filtered: cancelled", counts.cancelled),
        ("filtered: diverted", counts.diverted),
        ("written", counts.written),
    ):
        table.add_row(fate, f"{count:,}")
    return table


def _carriers_table(carriers: Sequence[CarrierDelays]) -> Table:
    table = _table("Mean delays by carrier")
    table.add_column("carrier")
    table.add_column("name")
    _add_delay_columns(table)
    for line in carriers:
        table.add_row(line.carrier, line.carrier_name, *_delay_cells(line.delays))
    return table


def _routes_table(routes: Sequence[RouteDelays]) -> Table:
    table = _table(
        f"Worst mean delays (routes with {ROUTE_FLIGHTS_MIN} flights or more)"
    )
    table.add_column("from")
    table.add_column("to")
    _add_delay_columns(table)
    for line in routes:
        table.add_row(line.origin, line.destination, *_delay_cells(line.delays))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _add_delay_columns(table: Table) -> None:
    table.add_column("flights", justify="right")
    table.add_column("delay, min", justify="right")
    table.add_column(f"{LATE_AFTER_MINUTES} min late", justify="right")


def _delay_cells(delays: Delays) -> tuple[str, str, str]:
    return (
        f"{delays.flights:,}",
        f"{delays.mean_minutes:.1f}",
        f"{delays.late_share:.1%}",
    )
