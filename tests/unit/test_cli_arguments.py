"""Words of the command line become arguments by annotation."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from stent.cli.arguments import read_arguments
from stent.errors import PayloadError, UsageError


class Color(Enum):
    RED = "red"


@dataclass
class Size:
    width: int
    unit: str = "cm"


def number(x: int) -> None: ...
def real(x: float) -> None: ...
def word(x: str) -> None: ...
def maybe(x: str | None) -> None: ...
def anything(x) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001
def day(x: dt.date) -> None: ...
def color(x: Color) -> None: ...
def size(x: Size) -> None: ...
def sizes(x: list[Size]) -> None: ...
def uuid(x: UUID) -> None: ...
def path(x: Path) -> None: ...
def decimal(x: Decimal) -> None: ...
def many(*xs: int) -> None: ...
def options(a: int, /, b: int = 0, *, c: str = "", **rest: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "text", "expected"),
    [
        (number, "5", 5),
        (number, "-5", -5),
        (real, "5", 5.0),
        (word, "hello", "hello"),
        (word, '"hello"', "hello"),
        (word, "2013", "2013"),
        (word, "true", "true"),
        (word, "a=b", "a=b"),
        (word, "http://x/?q=1", "http://x/?q=1"),
        (word, "NaN", "NaN"),
        (maybe, "null", None),
        (maybe, "text", "text"),
        (anything, "hello", "hello"),
        (anything, "5", 5),
        (anything, '{"a": [1, null]}', {"a": [1, None]}),
        (day, "2013-01-31", dt.date(2013, 1, 31)),
        (color, "red", Color.RED),
        (size, '{"width": 3}', Size(3)),
        (sizes, '[{"width": 3}, {"width": 4, "unit": "m"}]', [Size(3), Size(4, "m")]),
        (
            uuid,
            "0193b3a0-0000-7000-8000-000000000000",
            UUID(int=0x0193B3A0000070008000000000000000),
        ),
        (path, "/tmp/x", Path("/tmp/x")),
        (decimal, '"1.10"', Decimal("1.10")),
    ],
)
def test_words_are_converted(function: Any, text: str, expected: object) -> None:
    """JSON, or text where that is what fits."""
    (value,), kwargs = read_arguments(function, [text])
    assert value == expected
    assert type(value) is type(expected)
    assert kwargs == {}


def test_names_and_positions() -> None:
    """NAME=VALUE goes to a parameter of that name, or to the catch-all."""
    args, kwargs = read_arguments(options, ["1", "b=2", "c=3", "d=4"])
    assert (args, kwargs) == ([1], {"b": 2, "c": "3", "d": 4})
    assert read_arguments(many, ["1", "2"]) == ([1, 2], {})


@pytest.mark.parametrize(
    ("function", "words", "message"),
    [
        (number, ["five"], "x: Expected `int`, got `str`"),
        (number, ["1.5"], "x: Expected `int`, got `float`"),
        (sizes, ['[{"width": "w"}]'], r"x\[0\]\.width"),
        (color, ["blue"], "'blue' is not one of RED"),
    ],
)
def test_what_does_not_fit_is_refused(
    function: Any, words: list[str], message: str
) -> None:
    """The error names the parameter and the place within it."""
    with pytest.raises(PayloadError, match=message):
        read_arguments(function, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing a required"),
        (["1", "2", "3"], "too many positional"),
        (["1", "b=2", "b=3"], "b is given twice"),
        (["1", "b=2", "3"], "stands behind a keyword"),
    ],
)
def test_wrong_shapes_are_usage_errors(words: list[str], message: str) -> None:
    """Too few, too many, twice, or in an order that Python refuses too."""
    with pytest.raises(UsageError, match=message):
        read_arguments(options, words)
