"""stent: durable async workflows for Python on Postgres.

Names are loaded when first used, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stent.app import Handle, Stent
    from stent.context import (
        Current,
        attempt,
        compensate,
        counters,
        current,
        gather,
        heartbeat,
        idempotency_key,
        map,  # noqa: A004 - the name users type
        now,
        patched,
        raise_if_cancelled,
        random,
        recover,
        restart,
        retry_later,
        run,
        sleep,
        starmap,
        state,
        tell,
        transaction,
        uuid,
        wait_for_signal,
    )
    from stent.errors import (
        ActivityError,
        ActivityFailedError,
        ActivityTimeoutError,
        ConfigurationError,
        DeterminismError,
        DuplicateNameError,
        DurationError,
        ExecutionCancelledError,
        ExecutionClosedError,
        ExecutionError,
        ExecutionFailedError,
        ExecutionNotFinishedError,
        ExecutionNotFoundError,
        ExecutionTimedOutError,
        IdempotencyConflictError,
        LivelockError,
        NonRetryableError,
        PayloadError,
        ProcessLostError,
        SchemaOutdatedError,
        StentError,
        StoreError,
        UnwrapError,
        UsageError,
        WorkerHookError,
        WorkerLostError,
        WorkerNotFoundError,
        WorkflowIOError,
    )
    from stent.hooks import on_worker_start, on_worker_stop
    from stent.limit_settings import LimitState
    from stent.log import install_structured_logging
    from stent.model import (
        Entry,
        ExecutionState,
        Health,
        QueueDepth,
        Status,
        WorkerHealth,
        WorkerState,
    )
    from stent.registry import DurableFunction, durable
    from stent.result import Result
    from stent.retry import RetryPolicy
    from stent.settings import Settings
    from stent.version import __version__

_PLACES = {
    "stent.app": "Handle Stent",
    "stent.context": (
        "Current attempt compensate counters current gather heartbeat idempotency_key "
        "map now patched raise_if_cancelled random recover restart retry_later run "
        "sleep starmap state tell transaction uuid wait_for_signal"
    ),
    "stent.errors": (
        "ActivityError ActivityFailedError ActivityTimeoutError ConfigurationError "
        "DeterminismError DuplicateNameError DurationError ExecutionCancelledError "
        "ExecutionClosedError ExecutionError ExecutionFailedError "
        "ExecutionNotFinishedError ExecutionNotFoundError ExecutionTimedOutError "
        "IdempotencyConflictError LivelockError NonRetryableError PayloadError "
        "ProcessLostError SchemaOutdatedError StentError StoreError UnwrapError "
        "UsageError WorkerHookError WorkerLostError WorkerNotFoundError WorkflowIOError"
    ),
    "stent.hooks": "on_worker_start on_worker_stop",
    "stent.log": "install_structured_logging",
    "stent.model": (
        "Entry ExecutionState Health QueueDepth Status WorkerHealth WorkerState"
    ),
    "stent.limit_settings": "LimitState",
    "stent.registry": "DurableFunction durable",
    "stent.result": "Result",
    "stent.retry": "RetryPolicy",
    "stent.settings": "Settings",
    "stent.version": "__version__",
}
_HOMES = {name: home for home, names in _PLACES.items() for name in names.split()}

__all__ = [
    "ActivityError",
    "ActivityFailedError",
    "ActivityTimeoutError",
    "ConfigurationError",
    "Current",
    "DeterminismError",
    "DuplicateNameError",
    "DurableFunction",
    "DurationError",
    "Entry",
    "ExecutionCancelledError",
    "ExecutionClosedError",
    "ExecutionError",
    "ExecutionFailedError",
    "ExecutionNotFinishedError",
    "ExecutionNotFoundError",
    "ExecutionState",
    "ExecutionTimedOutError",
    "Handle",
    "Health",
    "IdempotencyConflictError",
    "LimitState",
    "LivelockError",
    "NonRetryableError",
    "PayloadError",
    "ProcessLostError",
    "QueueDepth",
    "Result",
    "RetryPolicy",
    "SchemaOutdatedError",
    "Settings",
    "Status",
    "Stent",
    "StentError",
    "StoreError",
    "UnwrapError",
    "UsageError",
    "WorkerHealth",
    "WorkerHookError",
    "WorkerLostError",
    "WorkerNotFoundError",
    "WorkerState",
    "WorkflowIOError",
    "__version__",
    "attempt",
    "compensate",
    "counters",
    "current",
    "durable",
    "gather",
    "heartbeat",
    "idempotency_key",
    "install_structured_logging",
    "map",
    "now",
    "on_worker_start",
    "on_worker_stop",
    "patched",
    "raise_if_cancelled",
    "random",
    "recover",
    "restart",
    "retry_later",
    "run",
    "sleep",
    "starmap",
    "state",
    "tell",
    "transaction",
    "uuid",
    "wait_for_signal",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        message = f"module 'stent' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
