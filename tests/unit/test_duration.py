"""Durations: what is read, what is refused, and that writing is the inverse."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stent.duration import DURATION_MAX, Duration, format_duration, parse_duration
from stent.errors import DurationError

durations = st.timedeltas(min_value=timedelta(0), max_value=DURATION_MAX)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100ms", timedelta(milliseconds=100)),
        ("7us", timedelta(microseconds=7)),
        ("1s", timedelta(seconds=1)),
        ("1.5s", timedelta(milliseconds=1500)),
        (".5h", timedelta(minutes=30)),
        ("0.3s", timedelta(microseconds=300_000)),
        ("1h30m", timedelta(minutes=90)),
        ("1w2d3h4m5s6ms7us", timedelta(9, 4 * 60 + 5, 7, 6, 0, 3)),
        ("  1 h  30 m ", timedelta(minutes=90)),
        ("2 days", timedelta(days=2)),
        ("1 hour 30 minutes", timedelta(minutes=90)),
        ("0s", timedelta(0)),
        ("365000d", DURATION_MAX),
        ("0.0000004s", timedelta(0)),
        ("0.0000005s", timedelta(microseconds=1)),
    ],
)
def test_text_is_read_exactly(text: str, expected: timedelta) -> None:
    """Every unit, combined or alone, spaced or not, gives the exact duration."""
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, timedelta(0)),
        (90, timedelta(seconds=90)),
        (0.25, timedelta(milliseconds=250)),
        (timedelta(hours=2), timedelta(hours=2)),
    ],
)
def test_number_is_seconds_and_timedelta_is_itself(
    value: Duration, expected: timedelta
) -> None:
    """The two forms that are no text."""
    assert parse_duration(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("5", "unit is missing"),
        ("1h 30", "unit is missing"),
        ("h", "number is expected"),
        (".s", "number is expected"),
        ("1.s", "no unit|number is expected|unit is missing"),
        ("5 parsecs", "no unit 'parsecs'"),
        ("1H", "no unit 'H'"),
        ("1h-30m", "no unit 'h-'"),
        ("+1s", "number is expected"),
        ("\u0661s", "number is expected"),
        ("30m1h", "largest to the smallest"),
        ("1h1h", "each once"),
        ("1m1minute", "each once"),
        ("-1s", "negative"),
        (-1, "negative"),
        (-1e-9, "negative"),
        (timedelta(microseconds=-1), "negative"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (float("-inf"), "not finite"),
        (1e300, "longer than 365000 days"),
        (10**400, "longer than 365000 days"),
        (timedelta.max, "longer than 365000 days"),
        ("365001d", "longer than 365000 days"),
        ("9" * 90 + "w", "longer than 365000 days"),
        ("1" * 5_000 + "s", "longer than 100 characters"),
    ],
)
def test_nonsense_is_refused_with_the_reason(value: Duration, reason: str) -> None:
    """Nothing is guessed: every other input names what is wrong with it."""
    with pytest.raises(DurationError, match=reason):
        parse_duration(value)


@pytest.mark.parametrize("value", [True, False, None, b"1s", [1]])
def test_other_types_are_refused(value: object) -> None:
    """A bool is a number to Python, yet no duration."""
    with pytest.raises(DurationError, match="none of the types"):
        parse_duration(value)  # type: ignore[arg-type]  # what an untyped caller does


def test_message_names_option_text_and_examples() -> None:
    """The message alone is enough to repair the call."""
    with pytest.raises(DurationError) as caught:
        parse_duration("5 parsecs", name="timeout")
    message = str(caught.value)
    assert message.startswith("timeout: cannot use '5 parsecs'")
    assert "'1h30m'" in message


def test_message_of_a_number_too_long_to_print() -> None:
    """Python refuses to print such an integer; the error must still be ours."""
    with pytest.raises(DurationError, match="<int>"):
        parse_duration(10**5_000)


def test_message_carries_no_control_characters() -> None:
    """Hostile text cannot reach the terminal through the error."""
    with pytest.raises(DurationError) as caught:
        parse_duration("1\x1b]0;owned\x07\u202es")
    assert str(caught.value).isprintable()


@given(durations)
def test_format_is_the_inverse_of_parse(duration: timedelta) -> None:
    """Whatever is written is read back to the microsecond."""
    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(0), "0s"),
        (timedelta(microseconds=250), "250us"),
        (timedelta(milliseconds=100), "100ms"),
        (timedelta(microseconds=1_500), "1.5ms"),
        (timedelta(seconds=1.5), "1.5s"),
        (timedelta(seconds=10), "10s"),
        (timedelta(minutes=90), "1h30m"),
        (timedelta(days=14, seconds=5), "14d5s"),
        (timedelta(minutes=-90), "-1h30m"),
    ],
)
def test_format_is_short(duration: timedelta, text: str) -> None:
    """Zero parts are left out, and the rest is in the largest fitting unit."""
    assert format_duration(duration) == text


@given(st.text(alphabet=" .0123456789dhmsuwx-+", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    """There is no third way out than a duration within bounds or a DurationError."""
    try:
        duration = parse_duration(text)
    except DurationError:
        return
    assert timedelta(0) <= duration <= DURATION_MAX
