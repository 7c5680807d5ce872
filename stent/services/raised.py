"""What becomes of what the code of an attempt raises."""

from __future__ import annotations

import asyncio
import datetime as dt

from stent.codec import MissingTypeError, decode_exception, describe_exception
from stent.duration import format_duration
from stent.errors import (
    ActivityFailedError,
    ActivityTimeoutError,
    ExecutionCancelledError,
    PayloadError,
)
from stent.services.attempts import Attempt


class RaisedInProcess(Exception):  # noqa: N818 - carries an error
    """What a process raised: as it is stored, and built again for the retry policy."""

    def __init__(self, error: Exception, payload: bytes) -> None:
        super().__init__(error, payload)
        self.error = error
        self.payload = payload


def was_asked_to_stop(error: BaseException) -> bool:
    """Whether a cancellation came from outside; code may raise one by itself."""
    task = asyncio.current_task()
    return (
        isinstance(error, asyncio.CancelledError)
        and task is not None
        and task.cancelling() > 0
    )


def as_exception(error: BaseException) -> Exception:
    """SystemExit and the like would end the worker's loop if a task raised them."""
    if isinstance(error, Exception):
        return error
    if isinstance(error, asyncio.CancelledError):
        return ExecutionCancelledError(str(error) or "the item cancelled itself")
    failure = ActivityFailedError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def timeout_error(attempt: Attempt) -> ActivityTimeoutError:
    return ActivityTimeoutError(
        f"attempt {attempt.number} of {attempt.function} ran longer than "
        f"{format_duration(attempt.options.timeout or dt.timedelta(0))}"
    )


def rebuilt(payload: bytes) -> Exception:
    """An exception that a process raised; of a class unknown here, what it said."""
    try:
        return decode_exception(payload)
    except MissingTypeError:
        name, message = describe_exception(payload)
        return ActivityFailedError(f"{name}: {message}")


def error_type_of(payload: bytes) -> str:
    """Name of the class of a stored exception, for log lines."""
    try:
        return describe_exception(payload)[0]
    except PayloadError:
        return "unreadable"
