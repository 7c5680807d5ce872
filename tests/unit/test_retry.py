"""RetryPolicy: bounds, pauses and the judgement of errors."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stent.errors import (
    ActivityFailedError,
    ActivityTimeoutError,
    ConfigurationError,
    DurationError,
    NonRetryableError,
    PayloadError,
    StopSignal,
)
from stent.retry import ATTEMPTS_MAX, RetryPolicy


class UnstableError(Exception):
    """A user's transient error."""


class VeryUnstableError(UnstableError):
    """A subclass of it."""


class FinalUnstableError(ConnectionError, NonRetryableError):
    """Transient by its first base, final by the author's word."""


def test_three_means_three_attempts() -> None:
    """``retry=3`` permits an attempt after the first and the second, not the third."""
    policy = RetryPolicy.of(3)
    assert [policy.retries(OSError(), attempt) for attempt in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        False,
    ]


def test_option_forms() -> None:
    """None and 1 mean no retry; a policy is itself; 3 is the default policy."""
    policy = RetryPolicy(max_attempts=7)
    assert RetryPolicy.of(policy) is policy
    assert RetryPolicy.of(None) == RetryPolicy.of(1) == RetryPolicy(max_attempts=1)
    assert RetryPolicy.of(3) == RetryPolicy()
    assert not RetryPolicy.of(None).retries(OSError(), 1)


@pytest.mark.parametrize("value", [True, False, 0, -1, ATTEMPTS_MAX + 1, "3", 3.0])
def test_wrong_option_is_refused(value: Any) -> None:
    """A bool is no number of attempts, and zero attempts would do nothing."""
    with pytest.raises(ConfigurationError, match="attempts"):
        RetryPolicy.of(value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": True}, "max_attempts"),
        ({"backoff_factor": 0.9}, "backoff_factor"),
        ({"backoff_factor": float("nan")}, "backoff_factor"),
        ({"backoff_factor": float("inf")}, "backoff_factor"),
        ({"backoff_factor": 10**400}, "backoff_factor"),
        ({"backoff_factor": "2"}, "backoff_factor"),
        ({"jitter": 1}, "jitter"),
        ({"initial_delay": "1m"}, "raise max_delay"),
        ({"retry_for": ConnectionError}, r"\(ConnectionError,\)"),
        ({"retry_for": "ConnectionError"}, "tuple"),
        ({"never_for": (int,)}, "neither an exception class nor a name"),
        ({"never_for": ("",)}, "neither an exception class nor a name"),
        ({"retry_for": (OSError,), "never_for": (OSError,)}, "OSError in both"),
    ],
)
def test_illegal_policy_does_not_construct(
    options: dict[str, Any], reason: str
) -> None:
    """Every bound is checked where the policy is made, and the message names it."""
    with pytest.raises(ConfigurationError, match=reason):
        RetryPolicy(**options)


def test_illegal_delay_names_its_option() -> None:
    """A duration that cannot be read says which of the two it was."""
    with pytest.raises(DurationError, match=r"RetryPolicy\.max_delay"):
        RetryPolicy(max_delay="soon")


def test_policies_are_values() -> None:
    """However the durations were written, equal policies are equal, also pickled."""
    policy = RetryPolicy(initial_delay="1s", backoff_factor=3)
    same = RetryPolicy(initial_delay=timedelta(seconds=1), backoff_factor=3.0)
    assert policy == same
    assert hash(policy) == hash(same)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert replace(policy, max_attempts=9).delay(1, Random(0)) <= timedelta(seconds=1)


def test_pauses_double_up_to_the_cap() -> None:
    """Without jitter the pauses are exact."""
    policy = RetryPolicy(jitter=False, max_delay="1s")
    pauses = [policy.delay(attempt, Random(0)) for attempt in range(1, 7)]
    assert [pause // timedelta(milliseconds=1) for pause in pauses] == [
        100,
        200,
        400,
        800,
        1000,
        1000,
    ]


@pytest.mark.parametrize("attempt", [10_000, ATTEMPTS_MAX])
@pytest.mark.parametrize("factor", [1.0, 1.000001, 2.0, 1_000.0])
def test_late_attempts_do_not_overflow(attempt: int, factor: float) -> None:
    """Growth beyond what a float holds is the cap, and no initial delay stays none."""
    policy = RetryPolicy(backoff_factor=factor, jitter=False)
    pause = policy.delay(attempt, Random(0))
    assert timedelta(milliseconds=100) <= pause <= timedelta(seconds=30)
    if factor >= 2:
        assert pause == timedelta(seconds=30)
    immediate = RetryPolicy(backoff_factor=factor, initial_delay=0)
    assert immediate.delay(attempt, Random(0)) == timedelta(0)


@given(st.integers(1, 20_000), st.integers())
def test_jitter_stays_below_the_exact_pause(attempt: int, seed: int) -> None:
    """Full jitter draws between nothing and the pause; a seed fixes the draw."""
    policy = RetryPolicy()
    pause = policy.delay(attempt, Random(seed))
    exact = replace(policy, jitter=False).delay(attempt, Random(seed))
    assert timedelta(0) <= pause <= exact
    assert policy.delay(attempt, Random(seed)) == pause


def test_jitter_spreads_over_the_whole_pause() -> None:
    """Full means from zero: a thousand draws reach both ends and balance."""
    random = Random(1)
    policy = RetryPolicy(initial_delay="1s")
    draws = [policy.delay(1, random).total_seconds() for _ in range(1_000)]
    assert min(draws) < 0.05
    assert max(draws) > 0.95
    assert 0.45 < sum(draws) / len(draws) < 0.55


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        NameError(),
        UnboundLocalError(),
        AttributeError(),
        ModuleNotFoundError(),
        SyntaxError(),
        PayloadError("args[0]: socket"),
        NonRetryableError(),
        FinalUnstableError(),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        SystemExit(1),
        StopSignal(),
    ],
)
def test_mistakes_and_stops_are_not_retried(error: BaseException) -> None:
    """What the next attempt would only repeat, and what asks to stop."""
    assert not RetryPolicy().retries(error, 1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        ValueError(),
        TimeoutError(),
        UnstableError(),
        ActivityTimeoutError(),
        ActivityFailedError(),
    ],
)
def test_other_errors_are_retried(error: BaseException) -> None:
    """The default is to try again."""
    assert RetryPolicy().retries(error, 1)


def test_error_of_an_unknown_class_is_judged_by_its_builtin() -> None:
    """A stand-in for a foreign error derives from its builtin, which decides."""
    foreign = type("ForeignError", (ActivityFailedError, TypeError), {})
    assert not RetryPolicy().retries(foreign(), 1)
    assert RetryPolicy(retry_for=("ForeignError",)).retries(foreign(), 1)


@pytest.mark.parametrize(
    "kind", [UnstableError, "UnstableError", f"{__name__}.UnstableError"]
)
def test_kinds_match_along_the_mro(kind: type[BaseException] | str) -> None:
    """A class, its name and its full name all mean the class and what derives of it."""
    only = RetryPolicy(retry_for=(kind,))
    never = RetryPolicy(never_for=(kind,))
    assert only.retries(VeryUnstableError(), 1)
    assert not only.retries(ValueError(), 1)
    assert not never.retries(VeryUnstableError(), 1)
    assert never.retries(ValueError(), 1)


def test_name_of_another_module_does_not_match() -> None:
    """A full name is compared in full."""
    policy = RetryPolicy(retry_for=("elsewhere.UnstableError",))
    assert not policy.retries(UnstableError(), 1)


@pytest.mark.parametrize(
    ("retry_for", "never_for", "error", "expected"),
    [
        ((ConnectionError,), (OSError,), ConnectionResetError(), True),
        ((ConnectionError,), (OSError,), FileNotFoundError(), False),
        ((OSError,), (ConnectionError,), ConnectionResetError(), False),
        ((OSError,), (ConnectionError,), FileNotFoundError(), True),
        ((TypeError,), (), TypeError(), True),
        ((ImportError,), (), ModuleNotFoundError(), True),
        ((Exception,), (), TypeError(), False),
        ((Exception,), (), ValueError(), True),
        ((NonRetryableError,), (), NonRetryableError(), False),
        ((PayloadError,), (), PayloadError(), False),
        ((SystemExit,), (), SystemExit(), True),
        ((Exception,), (), SystemExit(), False),
    ],
)
def test_nearest_named_class_decides(
    retry_for: tuple[type[BaseException], ...],
    never_for: tuple[type[BaseException], ...],
    error: BaseException,
    expected: bool,
) -> None:
    """Where the lists overlap, the more specific word wins; final stays final."""
    policy = RetryPolicy(retry_for=retry_for, never_for=never_for)
    assert policy.retries(error, 1) is expected


def group(*members: Exception) -> ExceptionGroup[Exception]:
    """Make a group of these."""
    return ExceptionGroup("several", members)


@pytest.mark.parametrize(
    ("policy", "error", "expected"),
    [
        (RetryPolicy(), group(OSError(), ValueError()), True),
        (RetryPolicy(), group(OSError(), TypeError()), False),
        (RetryPolicy(), group(OSError(), group(NonRetryableError())), False),
        (RetryPolicy(retry_for=(OSError,)), group(OSError(), group(OSError())), True),
        (RetryPolicy(retry_for=(OSError,)), group(OSError(), ValueError()), False),
        (RetryPolicy(retry_for=(Exception,)), group(TypeError()), False),
        (RetryPolicy(retry_for=(ExceptionGroup,)), group(TypeError()), True),
        (RetryPolicy(retry_for=(ExceptionGroup,)), group(PayloadError()), False),
        (RetryPolicy(never_for=("ExceptionGroup",)), group(OSError()), False),
        (
            RetryPolicy(),
            BaseExceptionGroup("", [OSError(), asyncio.CancelledError()]),
            False,
        ),
    ],
)
def test_group_is_judged_by_all_its_members(
    policy: RetryPolicy,
    error: BaseExceptionGroup[BaseException],
    expected: bool,
) -> None:
    """One member that cannot pass would fail the next attempt as well."""
    assert policy.retries(error, 1) is expected


def test_deep_group_does_not_exhaust_the_stack() -> None:
    """Nesting is the maker's choice, not a limit of ours."""
    error = group(OSError())
    for _ in range(20_000):
        error = group(error)
    assert RetryPolicy().retries(error, 1)
    # Released level by level: the interpreter's own release of such a chain recurses.
    while isinstance(error.exceptions[0], ExceptionGroup):
        error = error.exceptions[0]
