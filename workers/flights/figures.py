"""The figures of the report: asked per carrier and month, then added up."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TypeVar

import asyncpg

Key = TypeVar("Key", bound=Hashable)

# The usual definition of a late flight: more than a quarter of an hour.
LATE_AFTER_MINUTES = 15

_CARRIER_MONTHS = """
select carrier,
       cast(extract(year from flight_date) as integer) as year,
       cast(extract(month from flight_date) as integer) as month
  from flights
 group by 1, 2, 3
 order by 1, 2, 3
"""
_DELAYS = """
select origin, destination, min(carrier_name) as carrier_name,
       count(*) as flights,
       sum(arrival_delay_minutes) as delay_minutes,
       count(*) filter (where arrival_delay_minutes > $4) as late
  from flights
 where carrier = $1 and flight_date >= $2 and flight_date < $3
 group by origin, destination
 order by origin, destination
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """Arrival delays of a number of flights; they add up with `+`.

    Attributes:
        flights: How many flights, at least one.
        delay_minutes: Sum over all of them; early arrivals count below zero.
        late: How many were more than `LATE_AFTER_MINUTES` late.
    """

    flights: int
    delay_minutes: int
    late: int

    def __post_init__(self) -> None:
        """Refuse what has no mean, and more late flights than flights."""
        if self.flights < 1 or not 0 <= self.late <= self.flights:
            raise ValueError(f"impossible delays: {self}")

    @property
    def mean_minutes(self) -> float:
        """Mean arrival delay in minutes."""
        return self.delay_minutes / self.flights

    @property
    def late_share(self) -> float:
        """Share of flights that were late, 0 to 1."""
        return self.late / self.flights

    def __add__(self, other: Delays) -> Delays:
        return Delays(
            flights=self.flights + other.flights,
            delay_minutes=self.delay_minutes + other.delay_minutes,
            late=self.late + other.late,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDelays:
    """Delays of one route."""

    origin: str
    destination: str
    delays: Delays


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierMonth:
    """What one carrier did in one month, route by route."""

    carrier: str
    carrier_name: str
    month: int
    routes: Sequence[RouteDelays]


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierDelays:
    """Delays of one carrier over all its routes and months."""

    carrier: str
    carrier_name: str
    delays: Delays


async def carrier_months(connection: asyncpg.Connection) -> list[tuple[str, int, int]]:
    """List every (carrier, year, month) that has flights, in order: 185 for 2013."""
    rows = await connection.fetch(_CARRIER_MONTHS)
    return [(row["carrier"], row["year"], row["month"]) for row in rows]


async def carrier_month(
    connection: asyncpg.Connection, carrier: str, year: int, month: int
) -> CarrierMonth:
    """Aggregate the flights of one carrier and month.

    Raises:
        LookupError: It has no flights.
    """
    begin = date(year, month, 1)
    end = date(year + month // 12, month % 12 + 1, 1)
    rows = await connection.fetch(_DELAYS, carrier, begin, end, LATE_AFTER_MINUTES)
    if not rows:
        raise LookupError(f"no flights of {carrier} in {year}-{month:02}")
    return CarrierMonth(
        carrier=carrier,
        carrier_name=rows[0]["carrier_name"] or carrier,
        month=month,
        routes=tuple(
            RouteDelays(
                origin=row["origin"],
                destination=row["destination"],
                delays=Delays(
                    flights=row["flights"],
                    delay_minutes=row["delay_minutes"],
                    late=row["late"],
                ),
            )
            for row in rows
        ),
    )


def by_carrier(months: Iterable[CarrierMonth]) -> list[CarrierDelays]:
    """Add up all months and routes of each carrier, worst mean delay first."""
    names: dict[str, str] = {}
    totals: dict[str, Delays] = {}
    for month in months:
        names[month.carrier] = month.carrier_name
        for route in month.routes:
            _add(totals, month.carrier, route.delays)
    carriers = [
        CarrierDelays(carrier=carrier, carrier_name=names[carrier], delays=delays)
        for carrier, delays in totals.items()
    ]
    return sorted(carriers, key=lambda line: (-line.delays.mean_minutes, line.carrier))


def worst_routes(
    months: Iterable[CarrierMonth], *, count: int, flights_min: int
) -> list[RouteDelays]:
    """Rank routes over all carriers and months, worst mean delay first.

    Args:
        months: The figures to add up.
        count: How many routes to return at most.
        flights_min: Routes with fewer flights are left out: one bad day is no route.
    """
    totals: dict[tuple[str, str], Delays] = {}
    for month in months:
        for route in month.routes:
            _add(totals, (route.origin, route.destination), route.delays)
    routes = [
        RouteDelays(origin=origin, destination=destination, delays=delays)
        for (origin, destination), delays in totals.items()
        if delays.flights >= flights_min
    ]
    routes.sort(
        key=lambda line: (-line.delays.mean_minutes, line.origin, line.destination)
    )
    return routes[:count]


def _add(totals: dict[Key, Delays], key: Key, delays: Delays) -> None:
    known = totals.get(key)
    totals[key] = delays if known is None else known + delays
