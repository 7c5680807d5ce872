"""Rates as people write them: ``"200/s"``, ``"10/s burst 50"``, ``"1000/5m"``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Final

from stent.duration import format_duration, parse_duration
from stent.errors import ConfigurationError, DurationError

COUNT_MAX: Final = 1_000_000_000
DENOMINATOR_MAX: Final = 1_000
"""Rates are shown as so many in so many seconds at most, or as one in a longer time."""
_RATE: Final = re.compile(
    r"\s*(?P<count>\d{1,10})\s*/\s*(?P<per>[\w. ]{1,40}?)"
    r"(?:\s+burst\s+(?P<burst>\d{1,10}))?\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: ``count`` tokens drip in ``per`` time, at most ``burst`` stay.

    Attributes:
        count: At least 1.
        per: Above zero.
        burst: How many may start at once after a pause; default ``count``.
    """

    count: int
    per: timedelta
    burst: int

    def __post_init__(self) -> None:
        if not (1 <= self.count <= COUNT_MAX and 1 <= self.burst <= COUNT_MAX):
            message = f"a rate and its burst are numbers from 1 to {COUNT_MAX}"
            raise ConfigurationError(message)
        if self.per <= timedelta(0):
            message = "a rate needs a time above zero"
            raise ConfigurationError(message)

    @property
    def per_second(self) -> float:
        """Tokens a second."""
        return self.count / self.per.total_seconds()

    @classmethod
    def of(cls, per_second: float, burst: int) -> Rate:
        """As somebody may have written it: ``6/m`` rather than 0.1 a second."""
        for unit in _UNITS:
            count = per_second * unit.total_seconds()
            if count >= 1 - _CLOSE and abs(count - round(count)) < _CLOSE * count:
                return cls(round(count), unit, burst)
        found = Fraction(per_second).limit_denominator(DENOMINATOR_MAX)
        if found > 0:
            return cls(found.numerator, timedelta(seconds=found.denominator), burst)
        return cls(1, timedelta(seconds=round(1 / per_second)), burst)

    def __str__(self) -> str:
        burst = "" if self.burst == self.count else f" burst {self.burst}"
        per = format_duration(self.per)
        return f"{self.count}/{per[1:] if per in _ONE else per}{burst}"


_UNITS: Final = tuple(timedelta(seconds=seconds) for seconds in (1, 60, 3600, 86_400))
_CLOSE: Final = 1e-9
_ONE: Final = frozenset({"1s", "1m", "1h", "1d"})


def parse_rate(text: str) -> Rate:
    """Read a rate.

    Args:
        text: ``COUNT/TIME`` or ``COUNT/TIME burst COUNT``; the time is a unit such as
            ``s m h d`` or a duration such as ``10s``.
    Raises:
        ConfigurationError: It cannot be read.
    """
    found = _RATE.fullmatch(str(text))
    if found is None:
        raise _refusal(text)
    per = found["per"].strip()
    try:
        duration = parse_duration(f"1{per}" if per[0].isalpha() else per)
    except DurationError as error:
        raise _refusal(text) from error
    count = int(found["count"])
    return Rate(count, duration, int(found["burst"] or count))


def _refusal(text: object) -> ConfigurationError:
    message = (
        f"rate {ascii(text)[:100]} cannot be read; write for example '200/s', "
        "'10/s burst 50' or '1000/5m'"
    )
    return ConfigurationError(message)
