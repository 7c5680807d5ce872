"""Every exception that stent raises on purpose. Imports nothing."""

from __future__ import annotations


class StentError(Exception):
    """Base of everything stent raises on purpose."""


class UsageError(StentError):
    """The caller's mistake; retrying cannot help."""


class ConfigurationError(UsageError):
    """An option, setting or environment variable is wrong or not available."""


class DuplicateNameError(UsageError):
    """Two different functions claim the same durable name."""


class PayloadError(UsageError):
    """A value cannot cross the durable boundary; the message names its path."""


class DurationError(UsageError):
    """A duration such as ``"1h30m"`` cannot be read."""


class WorkflowIOError(UsageError):
    """A workflow tried real I/O; that belongs into an activity or ``stent.run``."""


class ExecutionClosedError(UsageError):
    """A durable call was made by code whose execution has already ended."""


class SchemaOutdatedError(UsageError):
    """The database schema is older or newer than this version of stent needs."""


class IdempotencyConflictError(UsageError):
    """A dispatch key was used again with another function or other arguments."""


class ExecutionError(StentError):
    """An outcome of an execution, or its lack."""


class ExecutionFailedError(ExecutionError):
    """The execution failed and its own exception cannot be rebuilt here."""


class ExecutionCancelledError(ExecutionError):
    """The execution was cancelled."""


class ExecutionTimedOutError(ExecutionError):
    """The execution exceeded its ``max_duration``."""


class ExecutionNotFoundError(ExecutionError):
    """No execution has this id."""


class WorkerNotFoundError(UsageError):
    """No worker has this id, or it ended more than a day ago."""


class ExecutionNotFinishedError(ExecutionError):
    """The execution has no outcome yet."""


class ActivityError(StentError):
    """From user code inside an activity."""


class ActivityFailedError(ActivityError):
    """An activity failed with an exception whose class is not known here.

    The class actually raised is a subclass that carries the original name and also
    derives from the first builtin exception of the original's MRO.
    """


class NonRetryableError(ActivityError):
    """Raise it (or a subclass) to fail at once, whatever the retry policy says."""


class OutcomeUnknownError(ActivityError):
    """An at-most-once activity was started and its outcome was lost."""


class WorkerLostError(ActivityError):
    """The worker that ran the activity was lost."""


class ProcessLostError(ActivityError):
    """The process that ran an attempt of ``pool="process"`` ended in the middle."""


class ActivityTimeoutError(ActivityError, TimeoutError):
    """One attempt of an activity ran longer than its ``timeout``."""


class WorkerHookError(StentError):
    """A hook of ``on_worker_start`` failed; its exception is ``__cause__``."""


class UnwrapError(StentError):
    """``Result.unwrap`` met an error that is not an exception; see ``error``."""

    def __init__(self, error: object) -> None:
        super().__init__(error)
        self.error = error

    def __str__(self) -> str:
        return f"unwrap of Result.Error({self.error!r})"


class DeterminismError(StentError):
    """A replay diverged from the journal; the execution is ``blocked``, not failed."""


class LivelockError(DeterminismError):
    """A workflow ran too many callbacks without waiting; names the task."""


class StoreError(StentError):
    """The database refused or was away; the driver's error is ``__cause__``."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        return _store_error, (type(self), self.args[0], self.retryable)


def _store_error(cls: type[StoreError], message: str, retryable: bool) -> StoreError:  # noqa: FBT001 - the shape pickle calls
    return cls(message, retryable=retryable)


class LeaseLostError(StoreError):
    """Somebody else owns the work now: drop it, never settle it."""


class RetryLaterSignal(BaseException):
    """Private control flow: the attempt asks to be made again after a while."""

    def __init__(self, delay_seconds: float) -> None:
        super().__init__(delay_seconds)
        self.delay_seconds = delay_seconds


class StopSignal(BaseException):
    """Private control flow that a user's ``except Exception`` cannot swallow."""
