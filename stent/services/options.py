"""Options of one call or execution that differ from its function's, as bytes."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from stent.registry import DurableFunction, Options
from stent.retry import RetryPolicy


class StoredRetry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A retry policy; exception classes by name."""

    max_attempts: int
    initial_delay_us: int
    backoff_factor: float
    max_delay_us: int
    jitter: bool
    retry_for: tuple[str, ...] = ()
    never_for: tuple[str, ...] = ()


class StoredPage(msgspec.Struct, frozen=True):
    """Which part of a map a task is."""

    start: int
    size: int
    star: bool
    return_exceptions: bool
    concurrency: int | None = None
    """Items of the page that may run at the same time; None: any number."""


class StoredOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that travels with a task or an activity execution."""

    retry: StoredRetry | None = None
    timeout_us: int | None = None
    page: StoredPage | None = None
    limit_key: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptOptions:
    """What holds for the attempts of one call."""

    retry: RetryPolicy
    timeout: dt.timedelta | None
    page: StoredPage | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(StoredOptions)


def store_options(
    options: Options,
    function: DurableFunction[Any, Any],
    page: StoredPage | None = None,
) -> bytes | None:
    """What differs from the function's own options; None when nothing does."""
    own = function.registered
    if options is own and page is None:
        return None
    retry = None if options.retry == own.retry else _store_retry(options.retry)
    timeout = None if options.timeout == own.timeout else options.timeout
    key = options.limit_key
    if retry is None and timeout is None and page is None and key is None:
        return None
    microseconds = None if timeout is None else timeout // dt.timedelta(microseconds=1)
    return _encoder.encode(StoredOptions(retry, microseconds, page, key))


def load_options(
    stored: bytes | None, function: DurableFunction[Any, Any]
) -> AttemptOptions:
    """The options of a call of ``function``."""
    own = function.registered
    options = AttemptOptions(own.retry, own.timeout)
    if stored is None:
        return options
    read = _decoder.decode(stored)
    if read.retry is not None:
        options = replace(options, retry=_load_retry(read.retry))
    if read.timeout_us is not None:
        timeout = dt.timedelta(microseconds=read.timeout_us)
        options = replace(options, timeout=timeout)
    return replace(options, page=read.page)


def _store_retry(policy: RetryPolicy) -> StoredRetry:
    microsecond = dt.timedelta(microseconds=1)
    return StoredRetry(
        policy.max_attempts,
        _timedelta(policy.initial_delay) // microsecond,
        policy.backoff_factor,
        _timedelta(policy.max_delay) // microsecond,
        policy.jitter,
        tuple(_name(kind) for kind in policy.retry_for),
        tuple(_name(kind) for kind in policy.never_for),
    )


def _timedelta(duration: object) -> dt.timedelta:
    """The policy keeps its delays as timedeltas once constructed."""
    if not isinstance(duration, dt.timedelta):
        message = f"not a timedelta: {duration!r}"
        raise TypeError(message)
    return duration


def _name(kind: type[BaseException] | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _load_retry(stored: StoredRetry) -> RetryPolicy:
    return RetryPolicy(
        max_attempts=stored.max_attempts,
        initial_delay=dt.timedelta(microseconds=stored.initial_delay_us),
        backoff_factor=stored.backoff_factor,
        max_delay=dt.timedelta(microseconds=stored.max_delay_us),
        jitter=stored.jitter,
        retry_for=stored.retry_for,
        never_for=stored.never_for,
    )
