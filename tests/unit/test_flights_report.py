"""The figures and the printed report of the flights job."""

from __future__ import annotations

import io

import pytest

from workers.flights.clean import RowCounts
from workers.flights.figures import (
    CarrierMonth,
    Delays,
    RouteDelays,
    by_carrier,
    worst_routes,
)
from workers.flights.report import make_report, print_report


def delays(flights: int, delay_minutes: int, late: int = 0) -> Delays:
    return Delays(flights=flights, delay_minutes=delay_minutes, late=late)


def month(carrier: str, number: int, **routes: Delays) -> CarrierMonth:
    return CarrierMonth(
        carrier=carrier,
        carrier_name=f"{carrier} Airways",
        month=number,
        routes=tuple(
            RouteDelays(origin=name[:3], destination=name[3:], delays=figures)
            for name, figures in routes.items()
        ),
    )


MONTHS = [
    month("AA", 1, JFKMIA=delays(100, 1000, 40), EWRMIA=delays(50, 0, 5)),
    month("AA", 2, JFKMIA=delays(100, 3000, 60)),
    month("BB", 1, JFKMIA=delays(100, -1000, 0), LGAORD=delays(10, 900, 10)),
]


def test_carriers_are_added_up_and_sorted_by_mean_delay() -> None:
    """The months and routes of a carrier become one line, worst mean first."""
    lines = by_carrier(MONTHS)
    assert [(line.carrier, line.delays) for line in lines] == [
        ("AA", delays(250, 4000, 105)),
        ("BB", delays(110, -100, 10)),
    ]
    assert lines[0].carrier_name == "AA Airways"
    assert lines[0].delays.mean_minutes == pytest.approx(16)
    assert lines[0].delays.late_share == pytest.approx(0.42)


def test_routes_are_added_up_over_carriers() -> None:
    """A route counts with the flights of all carriers; rare ones are left out."""
    routes = worst_routes(MONTHS, count=10, flights_min=50)
    assert [(line.origin, line.destination, line.delays) for line in routes] == [
        ("JFK", "MIA", delays(300, 3000, 100)),
        ("EWR", "MIA", delays(50, 0, 5)),
    ]
    (worst,) = worst_routes(MONTHS, count=1, flights_min=1)
    assert (worst.origin, worst.destination) == ("LGA", "ORD")


@pytest.mark.parametrize(("flights", "late"), [(0, 0), (2, 3), (2, -1)])
def test_impossible_delays_do_not_construct(flights: int, late: int) -> None:
    """Delays of no flights have no mean, and no more are late than flew."""
    with pytest.raises(ValueError, match="impossible"):
        delays(flights, 0, late)


def test_the_report_is_plain_text_off_a_terminal() -> None:
    """Piped, the report has every figure, no escape code and at most 88 columns."""
    stream = io.StringIO()
    counts = RowCounts(read=336_776, cancelled=8_255, diverted=1_175, written=327_346)
    print_report(make_report(counts, MONTHS), stream)
    text = stream.getvalue()
    for figure in ("336,776", "8,255", "1,175", "327,346", "AA Airways", "42.0%"):
        assert figure in text
    lines = text.splitlines()
    assert any(line.split()[:4] == ["JFK", "MIA", "300", "10.0"] for line in lines)
    assert not any("LGA" in line for line in lines)
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 88
