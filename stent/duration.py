"""Durations as people write them: ``"1h30m"`` to ``timedelta`` and back."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Final, TypeAlias

from stent.errors import DurationError

Duration: TypeAlias = str | timedelta | float
"""``"100ms"``, ``"1h30m"``, a ``timedelta``, or a number of seconds."""

DURATION_MAX: Final = timedelta(days=365_000)
"""About a thousand years, so that any present instant plus it is a valid datetime."""

_TEXT_CHARACTERS_MAX: Final = 100
_EXAMPLES: Final = (
    "'100ms', '1.5s', '1h30m', '2 days', a timedelta or a number of seconds"
)

# Largest first; the position is the rank that "largest first, no repeats" compares.
_UNITS: Final[tuple[tuple[tuple[str, ...], int], ...]] = (
    (("w", "week", "weeks"), 7 * 86_400_000_000),
    (("d", "day", "days"), 86_400_000_000),
    (("h", "hr", "hrs", "hour", "hours"), 3_600_000_000),
    (("m", "min", "mins", "minute", "minutes"), 60_000_000),
    (("s", "sec", "secs", "second", "seconds"), 1_000_000),
    (("ms", "millisecond", "milliseconds"), 1_000),
    (("us", "microsecond", "microseconds"), 1),
)
_RANKS: Final = {
    spelling: rank
    for rank, (spellings, _) in enumerate(_UNITS)
    for spelling in spellings
}
_UNIT_LIST: Final = " ".join(spellings[0] for spellings, _ in _UNITS)

# re.ASCII: the digits of other scripts match \d otherwise. The pattern is linear.
_COMPONENT: Final = re.compile(
    r"\s*(?P<whole>\d*)(?:\.(?P<fraction>\d+))?\s*(?P<unit>[^\s\d.]*)\s*", re.ASCII
)


def parse_duration(value: Duration, *, name: str = "duration") -> timedelta:
    """Read a duration of zero or more; text is exact down to the microsecond.

    Args:
        value: Text such as ``"1h30m"`` (units w d h m s ms us, largest first, none
            twice, spaces allowed), a timedelta, or a number of seconds.
        name: What the duration is for; the error message begins with it.
    Returns:
        The duration, rounded to whole microseconds, at most ``DURATION_MAX``.
    Raises:
        DurationError: It cannot be read, is negative, not finite or too long.
    """
    if isinstance(value, str):
        return _checked(_parse_text(value, name), value, name)
    if isinstance(value, timedelta):
        return _checked(value, value, name)
    if not _is_number(value):
        raise _refusal(name, value, "it is none of the types that mean a duration")
    if not _is_finite(value):
        raise _refusal(name, value, "it is not finite")
    # Compared before the conversion, which overflows and rounds -1e-9 to zero.
    if value < 0:
        raise _refusal(name, value, "it is negative")
    if value > DURATION_MAX.total_seconds():
        raise _refusal(name, value, _too_long())
    return timedelta(seconds=value)


def format_duration(duration: timedelta) -> str:
    """Write a duration shortly: ``"1h30m"``, ``"1.5s"``, ``"100ms"``, ``"0s"``.

    ``parse_duration`` reads it back exactly. A negative one, which only a difference
    of instants can be, gets a minus sign that ``parse_duration`` refuses.
    """
    if duration < timedelta(0):
        return f"-{format_duration(-duration)}"
    minutes, microseconds = divmod(duration // timedelta(microseconds=1), 60_000_000)
    days, minutes = divmod(minutes, 24 * 60)
    hours, minutes = divmod(minutes, 60)
    whole = "".join(
        f"{count}{unit}"
        for count, unit in ((days, "d"), (hours, "h"), (minutes, "m"))
        if count
    )
    if not microseconds:
        return whole or "0s"
    return whole + _format_seconds(microseconds)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    # Integers are, and math.isfinite() overflows on large ones.
    return not isinstance(value, float) or math.isfinite(value)


def _parse_text(text: str, name: str) -> timedelta:
    if not text.strip():
        raise _refusal(name, text, "it is empty")
    if len(text) > _TEXT_CHARACTERS_MAX:
        reason = f"it is longer than {_TEXT_CHARACTERS_MAX} characters"
        raise _refusal(name, f"{text[:_TEXT_CHARACTERS_MAX]}...", reason)
    if text.lstrip().startswith("-"):
        raise _refusal(name, text, "it is negative")
    nanoseconds, position, last_rank = 0, 0, -1
    while position < len(text):
        match = _COMPONENT.match(text, position)
        if match is None or not (match["whole"] or match["fraction"]):
            reason = f"a number is expected at {text[position:].strip()!r}"
            raise _refusal(name, text, reason)
        rank = _rank(match["unit"], text, name)
        if rank <= last_rank:
            reason = "units go from the largest to the smallest, each once"
            raise _refusal(name, text, reason)
        nanoseconds += _nanoseconds(match["whole"], match["fraction"] or "", rank)
        position, last_rank = match.end(), rank
    microseconds = (nanoseconds + 500) // 1_000
    if microseconds > DURATION_MAX // timedelta(microseconds=1):
        raise _refusal(name, text, _too_long())
    return timedelta(microseconds=microseconds)


def _rank(unit: str, text: str, name: str) -> int:
    if not unit:
        raise _refusal(name, text, f"a unit is missing (units: {_UNIT_LIST})")
    rank = _RANKS.get(unit)
    if rank is None:
        reason = f"there is no unit {unit!r} (units: {_UNIT_LIST})"
        raise _refusal(name, text, reason)
    return rank


def _nanoseconds(whole: str, fraction: str, rank: int) -> int:
    """Integer arithmetic: ``"0.3s"`` must not become 299 999 microseconds."""
    unit_nanoseconds = _UNITS[rank][1] * 1_000
    scale: int = 10 ** len(fraction)
    part = int(fraction or "0") * unit_nanoseconds // scale
    return int(whole or "0") * unit_nanoseconds + part


def _format_seconds(microseconds: int) -> str:
    """Write what is left below a minute in the largest unit that is not zero."""
    for unit, digits in (("s", 6), ("ms", 3)):
        if microseconds >= 10**digits:
            return f"{_format_decimal(microseconds, digits)}{unit}"
    return f"{microseconds}us"


def _format_decimal(value: int, digits: int) -> str:
    whole, fraction = divmod(value, 10**digits)
    return f"{whole}.{fraction:0{digits}}".rstrip("0").rstrip(".")


def _checked(duration: timedelta, value: object, name: str) -> timedelta:
    if duration < timedelta(0):
        raise _refusal(name, value, "it is negative")
    if duration > DURATION_MAX:
        raise _refusal(name, value, _too_long())
    return duration


def _too_long() -> str:
    return f"it is longer than {DURATION_MAX.days} days"


def _refusal(name: str, value: object, reason: str) -> DurationError:
    # ascii(): control characters in the text must not reach a terminal. An integer of
    # more than 4300 digits cannot be written at all.
    try:
        shown = ascii(value)
    except ValueError:
        shown = f"<{type(value).__name__}>"
    if len(shown) > _TEXT_CHARACTERS_MAX + 10:
        shown = f"{shown[:_TEXT_CHARACTERS_MAX]}..."
    message = f"{name}: cannot use {shown}: {reason}; write for example {_EXAMPLES}"
    return DurationError(message)
