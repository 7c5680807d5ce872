"""Cleaning and enriching flights."""

from __future__ import annotations

from datetime import date, time
from pathlib import Path

import pytest

from workers.flights.clean import (
    Cleaner,
    MalformedRowError,
    RowCounts,
    great_circle_miles,
    is_plausible,
)
from workers.flights.lookups import Airport, Lookups, Plane, load_lookups
from workers.flights.source import (
    ARCHIVE,
    COLUMNS,
    DATA,
    extract,
    index_chunks,
    read_chunk,
)

NEWARK = Airport(name="Newark Liberty Intl", latitude=40.6925, longitude=-74.168667)
HOUSTON = Airport(
    name="George Bush Intercontinental", latitude=29.984433, longitude=-95.341442
)
LOOKUPS = Lookups(
    airlines={"UA": "United Air Lines Inc."},
    planes={
        "N14228": Plane(manufacturer="BOEING", model="737-824", year=1999, seats=149),
        "N00000": Plane(manufacturer="BOEING", model="737", year=None, seats=100),
    },
    airports={"EWR": NEWARK, "IAH": HOUSTON},
)
ROW = {
    "year": "2013",
    "month": "1",
    "day": "31",
    "dep_time": "517",
    "sched_dep_time": "515",
    "dep_delay": "2",
    "arr_time": "830",
    "sched_arr_time": "819",
    "arr_delay": "-11",
    "carrier": "UA",
    "flight": "1545",
    "tailnum": "N14228",
    "origin": "EWR",
    "dest": "IAH",
    "air_time": "227",
    "distance": "1400",
    "hour": "5",
    "minute": "15",
    "time_hour": "2013-01-31T10:00:00Z",
}


def row(**changed: str) -> list[str]:
    assert tuple(ROW) == COLUMNS
    return list((ROW | changed).values())


def test_a_flight_is_typed_and_enriched() -> None:
    """A complete row becomes a flight with all that the lookups know of it."""
    (flight,) = Cleaner(LOOKUPS).clean([row()], first_row=7).flights
    assert flight._asdict() == {
        "row_number": 7,
        "flight_date": date(2013, 1, 31),
        "carrier": "UA",
        "carrier_name": "United Air Lines Inc.",
        "flight_number": 1545,
        "scheduled_departure": time(5, 15),
        "departure_delay_minutes": 2,
        "arrival_delay_minutes": -11,
        "air_time_minutes": 227,
        "tail_number": "N14228",
        "plane_manufacturer": "BOEING",
        "plane_model": "737-824",
        "plane_year": 1999,
        "plane_seats": 149,
        "origin": "EWR",
        "origin_name": "Newark Liberty Intl",
        "destination": "IAH",
        "destination_name": "George Bush Intercontinental",
        "distance_miles": 1400,
        "distance_is_plausible": True,
    }


def test_what_the_lookups_do_not_know_is_none() -> None:
    """Unknown airlines, planes and airports lose their details, never the flight."""
    rows = [
        row(carrier="ZZ", tailnum="N99999", dest="SJU"),
        row(tailnum="NA", origin="XXX"),
        row(tailnum="N00000"),
    ]
    unknown, nameless, yearless = Cleaner(LOOKUPS).clean(rows, first_row=0).flights
    assert (unknown.carrier, unknown.carrier_name) == ("ZZ", None)
    assert (unknown.tail_number, unknown.plane_model) == ("N99999", None)
    assert (unknown.destination, unknown.destination_name) == ("SJU", None)
    assert unknown.distance_is_plausible is None
    assert (nameless.tail_number, nameless.origin_name) == (None, None)
    assert (yearless.plane_year, yearless.plane_seats) == (None, 100)


def test_flights_without_arrival_delay_are_filtered_by_reason() -> None:
    """No departure is cancelled, a departure alone is diverted; the others keep on."""
    rows = [
        row(),
        row(dep_time="NA", dep_delay="NA", arr_time="NA", arr_delay="NA"),
        row(arr_time="NA", arr_delay="NA", air_time="NA"),
        row(arr_delay="NA", air_time="NA"),
        row(arr_delay="0"),
    ]
    cleaned = Cleaner(LOOKUPS).clean(rows, first_row=100)
    assert cleaned.counts == RowCounts(read=5, cancelled=1, diverted=2, written=2)
    assert [flight.row_number for flight in cleaned.flights] == [100, 104]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row()[:-1], "18"),
        ([*row(), "more"], "too many"),
        (row(flight="NA"), "NA"),
        (row(arr_delay=""), "''"),
        (row(day="32"), "day"),
        (row(minute="60"), "minute"),
        (row(distance="1400.5"), r"1400\.5"),
    ],
)
def test_a_malformed_row_is_named(bad: list[str], problem: str) -> None:
    """A row that cannot be read stops the chunk and says which one and why."""
    with pytest.raises(MalformedRowError, match=problem) as caught:
        Cleaner(LOOKUPS).clean([row(), bad, row()], first_row=40)
    assert caught.value.row_number == 41
    assert str(caught.value).startswith("row 41: ")


def test_a_wrong_distance_is_found() -> None:
    """A distance is plausible within one percent of the great circle."""
    expected = great_circle_miles(NEWARK, HOUSTON)
    assert expected == pytest.approx(1397, abs=3)
    assert is_plausible(NEWARK, HOUSTON, round(expected * 1.009))
    assert not is_plausible(NEWARK, HOUSTON, round(expected * 1.02))
    assert not is_plausible(NEWARK, HOUSTON, round(expected * 0.98))


def test_counts_add_up_or_do_not_construct() -> None:
    """Every row read has one fate, also in a sum."""
    one = RowCounts(read=3, cancelled=1, diverted=1, written=1)
    both = one + RowCounts(read=2, written=2)
    assert both == RowCounts(read=5, cancelled=1, diverted=1, written=3)
    assert both.filtered == 2
    with pytest.raises(ValueError, match="either filtered or written"):
        RowCounts(read=3, cancelled=1, written=1)
    with pytest.raises(ValueError, match="below zero"):
        RowCounts(read=0, cancelled=-1, written=1)


def test_the_lookup_files_are_complete() -> None:
    """The vendored lookups have all their rows and their missing years."""
    lookups = load_lookups(DATA)
    assert len(lookups.airlines) == 16
    assert len(lookups.planes) == 3322
    assert len(lookups.airports) == 1458
    assert sum(plane.year is None for plane in lookups.planes.values()) == 70


def test_the_whole_file_gives_the_known_counts(tmp_path: Path) -> None:
    """336 776 flights are read, 9 430 filtered, 327 346 kept; each row once."""
    path = extract(ARCHIVE, tmp_path)
    cleaner = Cleaner(load_lookups(DATA))
    counts = RowCounts()
    kept: set[int] = set()
    unknown_planes = unknown_destinations = implausible = 0
    for chunk in index_chunks(path, 1000):
        cleaned = cleaner.clean(read_chunk(path, chunk), first_row=chunk.first_row)
        counts += cleaned.counts
        for flight in cleaned.flights:
            kept.add(flight.row_number)
            unknown_planes += flight.plane_model is None
            unknown_destinations += flight.destination_name is None
            implausible += flight.distance_is_plausible is False
    assert counts == RowCounts(
        read=336_776, cancelled=8_255, diverted=1_175, written=327_346
    )
    assert counts.filtered == 9_430
    assert len(kept) == 327_346
    assert max(kept) < 336_776
    assert (unknown_planes, unknown_destinations, implausible) == (48_329, 7_537, 0)
