"""Rates as people write them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from stent.errors import ConfigurationError
from stent.rate import Rate, parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("200/s", Rate(200, timedelta(seconds=1), 200)),
        ("10/s burst 50", Rate(10, timedelta(seconds=1), 50)),
        (" 1000 / 5m ", Rate(1000, timedelta(minutes=5), 1000)),
        ("3/minute", Rate(3, timedelta(minutes=1), 3)),
        ("1/1h30m burst 2", Rate(1, timedelta(minutes=90), 2)),
    ],
)
def test_rates_are_read(text: str, rate: Rate) -> None:
    assert parse_rate(text) == rate
    assert parse_rate(str(rate)) == rate


@pytest.mark.parametrize(
    "text",
    [
        *("", "200", "0/s", "-1/s", "5/", "5/0s", "5/s burst 0", "5/s burst"),
        *("1.5/s", "5/x", "1" * 5000 + "/s"),
    ],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_rate(text)


def test_tokens_a_second() -> None:
    assert parse_rate("1000/5m").per_second == pytest.approx(1000 / 300)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("200/s", "200/s"),
        ("10/s burst 50", "10/s burst 50"),
        ("1000/5m", "200/m burst 1000"),
        ("10/7s", "10/7s"),
        ("1/d", "1/d"),
        ("1/500d", "1/500d"),
    ],
)
def test_rates_are_shown_as_people_write_them(text: str, shown: str) -> None:
    """From what is stored, tokens a second; what is shown can be read again."""
    rate = parse_rate(text)
    stored = Rate.of(rate.per_second, rate.burst)
    assert str(stored) == shown
    assert parse_rate(shown).per_second == pytest.approx(rate.per_second)
