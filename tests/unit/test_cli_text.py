"""Texts and durations on the command line."""

from __future__ import annotations

from datetime import timedelta

import click
import pytest

from stent.cli.durations import read_duration
from stent.cli.text import escaped, shortened, shortened_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain – ünïcode ✓", "plain – ünïcode ✓"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]8;;http://evil\x07click", "\\x1b]8;;http://evil\\x07click"),
        ("one\r\ntwo", "one\\r\\ntwo"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_written_out(text: str, expected: str) -> None:
    """Nothing that moves a cursor, sets a title, reorders or breaks a line remains."""
    assert escaped(text) == expected


def test_kept_characters_stay() -> None:
    """A newline stays where lines are wanted."""
    assert escaped("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_long_texts_are_cut_where_they_tell_least() -> None:
    """A sentence loses its end, a dotted name its beginning."""
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened_name("package.module.function", 10) == "….function"
    assert shortened_name("f", 10) == "f"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("0.5", 0.5), ("3", 3)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """With units, or as a number of seconds."""
    assert read_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["soon", "-1", "5x", ""])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """The message is that of the durations of the library."""
    with pytest.raises(click.BadParameter, match="duration"):
        read_duration(text)
