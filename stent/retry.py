"""RetryPolicy: whether a failed attempt is followed by another, and after how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeAlias

from stent.duration import Duration, format_duration, parse_duration
from stent.errors import ConfigurationError, NonRetryableError, UsageError

if TYPE_CHECKING:
    from random import Random

ErrorKind: TypeAlias = type[BaseException] | str
"""An exception class, its name, or its ``module.qualname``; subclasses are meant too.

A name serves where the class cannot be imported, such as that of an error that came
back from another worker.
"""

ATTEMPTS_MAX: Final = 1_000_000
BACKOFF_FACTOR_MAX: Final = 1_000.0

# The author said stop, or the caller must change something: no policy overrides these.
_FINAL: Final = (UsageError, NonRetryableError)
# Mistakes in the program, which the next attempt would only repeat.
_NEVER_BY_DEFAULT: Final = frozenset(
    (TypeError, NameError, AttributeError, ImportError, SyntaxError)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often an activity is tried, with what pause, and after which errors.

    Attributes:
        max_attempts: Attempts in all, the first included; 1 means no retry.
        initial_delay: Pause after the first attempt; a timedelta once constructed.
        backoff_factor: Each further pause is that many times the one before, from 1.
        max_delay: No pause is longer; a timedelta once constructed.
        jitter: Draw each pause evenly from zero to its computed length ("full
            jitter"), so that what failed together does not come back together.
        retry_for: Retry after these errors only; empty means after all but the
            default exclusions (TypeError, NameError, AttributeError, ImportError,
            SyntaxError), which naming one of them here lifts.
        never_for: Exclude these errors as well.

    When both lists match, the class that comes first in the error's MRO decides: with
    ``retry_for=(ConnectionError,), never_for=(OSError,)`` a ConnectionResetError is
    retried. UsageError and NonRetryableError are never retried, whatever the lists say.

    Raises:
        ConfigurationError: A value is out of bounds or of the wrong type.
        DurationError: A delay cannot be read.
    """

    max_attempts: int = 3
    initial_delay: Duration = "100ms"
    backoff_factor: float = 2.0
    max_delay: Duration = "30s"
    jitter: bool = True
    retry_for: tuple[ErrorKind, ...] = ()
    never_for: tuple[ErrorKind, ...] = ()
    _initial_seconds: float = field(init=False, repr=False, compare=False)
    _max_seconds: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_attempts(self.max_attempts, "max_attempts")
        _check_factor(self.backoff_factor)
        _check_jitter(self.jitter)
        initial = parse_duration(self.initial_delay, name="RetryPolicy.initial_delay")
        longest = parse_duration(self.max_delay, name="RetryPolicy.max_delay")
        if initial > longest:
            message = (
                f"RetryPolicy.initial_delay ({format_duration(initial)}) is longer than"
                f" max_delay ({format_duration(longest)}); raise max_delay"
            )
            raise ConfigurationError(message)
        _check_kinds(self.retry_for, "retry_for")
        _check_kinds(self.never_for, "never_for")
        if both := set(self.retry_for) & set(self.never_for):
            names = ", ".join(sorted(map(_kind_name, both)))
            message = f"RetryPolicy names {names} in both retry_for and never_for"
            raise ConfigurationError(message)
        # Normalized, so that equal policies compare equal however they were written.
        object.__setattr__(self, "initial_delay", initial)
        object.__setattr__(self, "max_delay", longest)
        object.__setattr__(self, "backoff_factor", float(self.backoff_factor))
        object.__setattr__(self, "_initial_seconds", initial.total_seconds())
        object.__setattr__(self, "_max_seconds", longest.total_seconds())

    @classmethod
    def of(cls, value: int | RetryPolicy | None) -> RetryPolicy:
        """Read a ``retry=`` option: a number of attempts, a policy, or None.

        Args:
            value: 3 means three attempts in all; 1 and None mean no retry.
        Raises:
            ConfigurationError: It is a bool, out of bounds or of another type.
        """
        if isinstance(value, RetryPolicy):
            return value
        if value is None:
            return cls(max_attempts=1)
        _check_attempts(value, "retry")
        return cls(max_attempts=value)

    def delay(self, attempt: int, random: Random) -> timedelta:
        """Return the pause between attempt ``attempt``, counted from 1, and the next.

        Pure but for one draw from ``random``, made only with jitter. Any attempt
        number is safe: growth stops at ``max_delay``.
        """
        seconds = self._seconds_after(attempt)
        if self.jitter:
            seconds *= random.random()
        return timedelta(seconds=seconds)

    def retries(self, error: BaseException, attempt: int) -> bool:
        """Tell whether ``error`` of attempt ``attempt``, from 1, deserves another.

        An exception group is retried when every exception in it, however deep, would
        be: one that cannot pass would fail the next attempt as well. A group class
        named in ``retry_for`` or ``never_for`` decides for its members, except that
        UsageError and NonRetryableError inside stay final. What is not an Exception
        (a cancellation, SystemExit, KeyboardInterrupt) is a request to stop and is
        retried only if ``retry_for`` names it.
        """
        return attempt < self.max_attempts and self._may_pass_next_time(error)

    def _seconds_after(self, attempt: int) -> float:
        if not self._initial_seconds:
            return 0.0
        try:
            growth = self.backoff_factor ** (attempt - 1)
        except OverflowError:
            return self._max_seconds
        return min(self._initial_seconds * growth, self._max_seconds)

    def _may_pass_next_time(self, error: BaseException) -> bool:
        # Not recursive: groups nest as deep as their maker likes.
        pending = [(error, False)]
        while pending:
            current, vouched = pending.pop()
            if isinstance(current, _FINAL):
                return False
            if isinstance(current, BaseExceptionGroup):
                verdict = self._verdict(current, BaseExceptionGroup)
                if verdict is False and not vouched:
                    return False
                vouched = vouched or verdict is True
                pending.extend((member, vouched) for member in current.exceptions)
            elif not (vouched or self._retries_leaf(current)):
                return False
        return True

    def _retries_leaf(self, error: BaseException) -> bool:
        verdict = self._verdict(error, BaseException)
        if verdict is not None:
            return verdict
        return not self.retry_for and isinstance(error, Exception)

    def _verdict(self, error: BaseException, root: type[BaseException]) -> bool | None:
        """Walk the MRO down to ``root``; the first class named anywhere decides."""
        for candidate in type(error).__mro__:
            if not issubclass(candidate, root):
                continue
            if _named_in(candidate, self.never_for):
                return False
            if _named_in(candidate, self.retry_for):
                return True
            if candidate in _NEVER_BY_DEFAULT:
                return False
        return None


def _named_in(candidate: type, kinds: tuple[ErrorKind, ...]) -> bool:
    return bool(kinds) and (
        candidate in kinds
        or candidate.__name__ in kinds
        or f"{candidate.__module__}.{candidate.__qualname__}" in kinds
    )


def _check_attempts(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        message = (
            f"{name} must be a number of attempts, for example 3, not {value!r}"
            "; None or 1 means no retry, a RetryPolicy says more"
        )
        raise ConfigurationError(message)
    if not 1 <= value <= ATTEMPTS_MAX:
        message = (
            f"{name} counts attempts, the first included, from 1 to {ATTEMPTS_MAX}"
            f", not {value}"
        )
        raise ConfigurationError(message)


def _check_factor(value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 1 <= value <= BACKOFF_FACTOR_MAX
    ):
        message = (
            f"RetryPolicy.backoff_factor must be from 1 to {BACKOFF_FACTOR_MAX:g}"
            f", not {value!r}"
        )
        raise ConfigurationError(message)


def _check_jitter(value: object) -> None:
    if not isinstance(value, bool):
        message = f"RetryPolicy.jitter must be True or False, not {value!r}"
        raise ConfigurationError(message)


def _check_kinds(kinds: object, name: str) -> None:
    if not isinstance(kinds, tuple):
        message = (
            f"RetryPolicy.{name} must be a tuple of exception classes or names, for"
            f" example (ConnectionError,), not {kinds!r}"
        )
        raise ConfigurationError(message)
    for kind in kinds:
        is_class = isinstance(kind, type) and issubclass(kind, BaseException)
        if not is_class and not (isinstance(kind, str) and kind):
            message = (
                f"RetryPolicy.{name}: {kind!r} is neither an exception class nor a name"
            )
            raise ConfigurationError(message)


def _kind_name(kind: ErrorKind) -> str:
    return kind if isinstance(kind, str) else kind.__name__
