"""The tables that flights refer to: airlines, planes and airports."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MISSING = "NA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """An aircraft; `year` is the year it was built, where that is known."""

    manufacturer: str
    model: str
    year: int | None
    seats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Airport:
    """An airport; latitude and longitude in degrees, north and east positive."""

    name: str
    latitude: float
    longitude: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookups:
    """Airline names by carrier code, planes by tail number, airports by FAA code."""

    airlines: Mapping[str, str]
    planes: Mapping[str, Plane]
    airports: Mapping[str, Airport]


def load_lookups(directory: Path) -> Lookups:
    """Read `airlines.csv`, `planes.csv` and `airports.csv` of a directory."""
    return Lookups(
        airlines={
            row["carrier"]: row["name"] for row in _rows(directory / "airlines.csv")
        },
        planes={
            row["tailnum"]: Plane(
                manufacturer=row["manufacturer"],
                model=row["model"],
                year=None if row["year"] == MISSING else int(row["year"]),
                seats=int(row["seats"]),
            )
            for row in _rows(directory / "planes.csv")
        },
        airports={
            row["faa"]: Airport(
                name=row["name"],
                latitude=float(row["lat"]),
                longitude=float(row["lon"]),
            )
            for row in _rows(directory / "airports.csv")
        },
    )


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)
