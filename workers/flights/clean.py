"""Turn rows of strings into typed, enriched flights; filter what never arrived.

The whole file is some 337 000 rows, so the loop works in tuples and looks up what
repeats (days, times, planes, routes) instead of computing it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time
from functools import cache
from typing import NamedTuple

from workers.flights.lookups import MISSING, Airport, Lookups

EARTH_RADIUS_MILES = 3958.8
# The file gives the flown distance of a route on the ellipsoid, we compute on a sphere:
# the two differ by at most 0.6 % on any route, so 1 % (or 5 miles on short hops) is
# generous to geometry and still finds a wrong airport.
DISTANCE_TOLERANCE = 0.01
DISTANCE_TOLERANCE_MILES = 5.0

PlaneColumns = tuple[str | None, str | None, str | None, int | None, int | None]
RouteColumns = tuple[str | None, str | None, int, bool | None]


class MalformedRowError(ValueError):
    """A row is not a flight: wrong number of fields, or a field that cannot be read."""

    def __init__(self, row_number: int, problem: str) -> None:
        super().__init__(row_number, problem)
        self.row_number = row_number
        self.problem = problem

    def __str__(self) -> str:
        return f"row {self.row_number}: {self.problem}"


class Flight(NamedTuple):
    """A flight that arrived; the fields are the columns of table `flights`, in order.

    Attributes:
        row_number: Its row in the file, counted from 0: what proves nothing is twice.
        flight_date: The day of departure in New York, as is `scheduled_departure`.
        departure_delay_minutes: Below zero when early; so `arrival_delay_minutes`.
        plane_manufacturer: None, as all of the plane, when the tail number is unknown.
        distance_is_plausible: The distance agrees with the great circle between the
            two airports; None when the place of one is unknown.
    """

    row_number: int
    flight_date: date
    carrier: str
    carrier_name: str | None
    flight_number: int
    scheduled_departure: time
    departure_delay_minutes: int
    arrival_delay_minutes: int
    air_time_minutes: int
    tail_number: str | None
    plane_manufacturer: str | None
    plane_model: str | None
    plane_year: int | None
    plane_seats: int | None
    origin: str
    origin_name: str | None
    destination: str
    destination_name: str | None
    distance_miles: int
    distance_is_plausible: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """How many rows were read, and why some were filtered; counts add up with `+`.

    Attributes:
        cancelled: Filtered: no departure.
        diverted: Filtered: a departure and no arrival delay.
        written: All the others.
    """

    read: int = 0
    cancelled: int = 0
    diverted: int = 0
    written: int = 0

    def __post_init__(self) -> None:
        """Refuse counts that do not add up: a row has exactly one fate."""
        if min(self.read, self.cancelled, self.diverted, self.written) < 0:
            raise ValueError(f"a count is below zero: {self}")
        if self.read != self.filtered + self.written:
            raise ValueError(f"every row read is either filtered or written: {self}")

    @property
    def filtered(self) -> int:
        """Rows without an arrival delay."""
        return self.cancelled + self.diverted

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            read=self.read + other.read,
            cancelled=self.cancelled + other.cancelled,
            diverted=self.diverted + other.diverted,
            written=self.written + other.written,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanedChunk:
    """The flights of one chunk, in file order, and the fate of each of its rows."""

    flights: Sequence[Flight]
    counts: RowCounts


class Cleaner:
    """Cleans rows against fixed lookups; keep one per process, what repeats is cached.

    The caches hold one entry per distinct day, time, plane and route of the file.
    """

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups
        self._day = cache(_day)
        self._time = cache(_time)
        self._plane = cache(self._find_plane)
        self._route = cache(self._find_route)

    def clean(self, rows: Sequence[Sequence[str]], *, first_row: int) -> CleanedChunk:
        """Parse, filter and enrich the rows of a chunk.

        Args:
            rows: Strings in the order of `workers.flights.source.COLUMNS`.
            first_row: Number of the first of them in the file.
        Returns:
            The flights that have an arrival delay, in order, and the fate of all rows.
        Raises:
            MalformedRowError: A row has another number of fields, or one that cannot
                be read; nothing is skipped in silence.
        """
        # Bound once: this loop is most of the job's time outside Postgres.
        day, time_of, plane, route = self._day, self._time, self._plane, self._route
        airlines = self._lookups.airlines
        flights: list[Flight] = []
        cancelled = diverted = 0
        row_number = first_row
        try:
            for row_number, (
                year,
                month,
                day_of_month,
                departure_time,
                _scheduled_departure,
                departure_delay,
                _arrival_time,
                _scheduled_arrival,
                arrival_delay,
                carrier,
                flight_number,
                tail_number,
                origin,
                destination,
                air_time,
                distance,
                hour,
                minute,
                _time_hour,
            ) in enumerate(rows, first_row):
                if arrival_delay == MISSING:
                    if departure_time == MISSING:
                        cancelled += 1
                    else:
                        diverted += 1
                    continue
                tail, manufacturer, model, built, seats = plane(tail_number)
                origin_name, destination_name, miles, plausible = route(
                    origin, destination, distance
                )
                flights.append(
                    Flight(
                        row_number,
                        day(year, month, day_of_month),
                        carrier,
                        airlines.get(carrier),
                        int(flight_number),
                        time_of(hour, minute),
                        int(departure_delay),
                        int(arrival_delay),
                        int(air_time),
                        tail,
                        manufacturer,
                        model,
                        built,
                        seats,
                        origin,
                        origin_name,
                        destination,
                        destination_name,
                        miles,
                        plausible,
                    )
                )
        except ValueError as error:
            raise MalformedRowError(row_number, str(error)) from error
        counts = RowCounts(
            read=len(rows),
            cancelled=cancelled,
            diverted=diverted,
            written=len(flights),
        )
        return CleanedChunk(flights=flights, counts=counts)

    def _find_plane(self, tail_number: str) -> PlaneColumns:
        plane = self._lookups.planes.get(tail_number)
        if plane is None:
            known = None if tail_number == MISSING else tail_number
            return known, None, None, None, None
        return tail_number, plane.manufacturer, plane.model, plane.year, plane.seats

    def _find_route(self, origin: str, destination: str, distance: str) -> RouteColumns:
        start = self._lookups.airports.get(origin)
        end = self._lookups.airports.get(destination)
        miles = int(distance)
        return (
            None if start is None else start.name,
            None if end is None else end.name,
            miles,
            None if start is None or end is None else is_plausible(start, end, miles),
        )


def is_plausible(start: Airport, end: Airport, distance_miles: int) -> bool:
    """Whether a distance agrees with the great circle between two airports."""
    expected = great_circle_miles(start, end)
    tolerance = max(DISTANCE_TOLERANCE_MILES, DISTANCE_TOLERANCE * expected)
    return abs(expected - distance_miles) <= tolerance


def great_circle_miles(start: Airport, end: Airport) -> float:
    """Distance on a sphere, by the haversine formula."""
    north, other_north = math.radians(start.latitude), math.radians(end.latitude)
    east = math.radians(end.longitude - start.longitude)
    haversine = (
        math.sin((other_north - north) / 2) ** 2
        + math.cos(north) * math.cos(other_north) * math.sin(east / 2) ** 2
    )
    return 2 * EARTH_RADIUS_MILES * math.asin(math.sqrt(haversine))


def _day(year: str, month: str, day: str) -> date:
    return date(int(year), int(month), int(day))


def _time(hour: str, minute: str) -> time:
    return time(int(hour), int(minute))
