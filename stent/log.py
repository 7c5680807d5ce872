"""Structured logging that carries ids and is silent while a workflow is replayed.

Three parts:

- **Event names.** The constants below are API; a line of stent is
  ``log.info(ACTIVITY_COMPLETED, attempt=1, duration_ms=12)``: facts are fields.
- **LogScope.** An execution's context holds one in ``log_scope``. The engine writes
  the ids into ``fields`` and sets ``muted`` while it replays, or evicts.
- **install_structured_logging.** What a program calls to see all of it: on the
  console for people, else a JSON object a line. The library configures no output.

How replay is silenced. Workflow code logs through whatever logger it likes, which its
author may configure before or after the engine starts, so a filter on loggers or
handlers is always missing somewhere. Every stdlib record, however, passes through
``logging.Logger.handle``; ``silence_replay`` wraps that method once per process. The
wrapper reads one context variable and otherwise defers to the original. Rejected: a
record factory (it cannot drop a record) and ``logging.disable`` (it is global, and so
would silence other threads). structlog's own pipeline gets ``drop_replayed`` as its
first processor. What stays audible in replay: ``print``, and loggers that use neither,
which can ask ``is_muted()``.
"""

from __future__ import annotations

import json as json_module
import logging
import math
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Final, TextIO
from uuid import UUID

import structlog
from structlog.contextvars import get_contextvars
from structlog.stdlib import BoundLogger, LoggerFactory, ProcessorFormatter

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

EXECUTION_DISPATCHED: Final = "execution.dispatched"
EXECUTION_STARTED: Final = "execution.started"
EXECUTION_RESUMED: Final = "execution.resumed"
EXECUTION_COMPLETED: Final = "execution.completed"
EXECUTION_FAILED: Final = "execution.failed"
EXECUTION_CANCELLED: Final = "execution.cancelled"
EXECUTION_TIMED_OUT: Final = "execution.timed_out"
EXECUTION_EVICTED: Final = "execution.evicted"
EXECUTION_BLOCKED: Final = "execution.blocked"
EXECUTIONS_PRUNED: Final = "executions.pruned"
EXECUTIONS_RECLAIMED: Final = "executions.reclaimed"
TURN_COMMITTED: Final = "turn.committed"
REPLAY_EDITED: Final = "replay.edited"
ACTIVITY_COMPLETED: Final = "activity.completed"
CALL_DROPPED: Final = "call.dropped"
ACTIVITY_FAILED: Final = "activity.failed"
ACTIVITY_RETRIED: Final = "activity.retried"
ACTIVITY_POSTPONED: Final = "activity.postponed"
ACTIVITY_THREAD_LEFT: Final = "activity.thread_left"
ACTIVITY_CANCELLED: Final = "activity.cancelled"
ACTIVITY_DEAD_LETTERED: Final = "activity.dead_lettered"
ACTIVITY_PAGE_SPLIT: Final = "activity.page_split"
TASKS_CLAIMED: Final = "tasks.claimed"
WORKER_ABSENT: Final = "worker.absent"
WORKER_STARTED: Final = "worker.started"
WORKER_DRAIN_STARTED: Final = "worker.drain_started"
WORKER_DRAINED: Final = "worker.drained"
WORKER_STOPPED: Final = "worker.stopped"
WORKER_HOOK_FAILED: Final = "worker.hook_failed"
WORKER_TAKEN_OVER: Final = "worker.taken_over"
PROCESS_STARTED: Final = "process.started"
PROCESS_LOST: Final = "process.lost"
LEASE_LOST: Final = "lease.lost"
LOOP_BLOCKED: Final = "loop.blocked"
FLUSH_BISECTED: Final = "flush.bisected"
DATABASE_LOST: Final = "database.lost"
DATABASE_RETURNED: Final = "database.returned"
DATABASE_POOLED: Final = "database.pooled"
SCHEMA_MIGRATED: Final = "schema.migrated"


class LogScope:
    """What the logs of one execution, or of one attempt, have in common.

    Mutable on purpose: every context copied from the execution's, as each of its
    asyncio tasks has one, keeps the same object, so one assignment reaches them all.

    Attributes:
        muted: While True, log calls made in this scope emit nothing.
        fields: Facts for every line: execution_id, workflow, activity, attempt, ...
            An id may be a UUID: most scopes log nothing, so its text is made late.
    """

    __slots__ = ("fields", "muted")

    def __init__(self, *, muted: bool = False, **fields: object) -> None:
        self.muted = muted
        self.fields: dict[str, object] = fields


log_scope: ContextVar[LogScope | None] = ContextVar("stent_log_scope", default=None)


def is_muted() -> bool:
    """Tell whether the calling code is being replayed; for other logging libraries."""
    scope = log_scope.get()
    return scope is not None and scope.muted


def bound_fields() -> dict[str, object]:
    """Return the facts bound here: those of the scope, then structlog's contextvars."""
    scope = log_scope.get()
    facts = {} if scope is None else scope.fields
    of_scope = {k: str(v) if isinstance(v, UUID) else v for k, v in facts.items()}
    return {**of_scope, **get_contextvars()}


def drop_replayed(_: WrappedLogger, __: str, event_dict: EventDict) -> EventDict:
    """Drop what replayed code logs; a structlog processor, to be put first."""
    if is_muted():
        raise structlog.DropEvent
    return event_dict


def silence_replay() -> None:
    """Make the log calls of replayed workflow code emit nothing, in all loggers.

    The engine calls it whenever it starts; repeating it changes nothing. It configures
    no output. See the module's text for how and why. A program that calls
    ``structlog.configure`` later, with an output of its own that bypasses stdlib
    logging, puts ``drop_replayed`` first among the processors itself.
    """
    if not hasattr(logging.Logger.handle, "stent_original"):
        _wrap_logger_handle()
    processors = structlog.get_config()["processors"]
    if drop_replayed not in processors:
        if isinstance(processors, list):
            # In place: loggers that were bound before share this very list.
            processors.insert(0, drop_replayed)
        else:
            structlog.configure(processors=[drop_replayed, *processors])


def get_logger(name: str) -> BoundLogger:
    """Return a logger for library code, usable before anything is configured.

    Its lines are stdlib records of the logger ``name``: the event is the message, the
    facts and bound ids are ``extra`` attributes. So they go where the program sends
    its logs, at the levels it chose, and nowhere if it chose nothing (warnings and
    above then reach stderr, as stdlib does).
    """
    return BoundLogger(logging.getLogger(name), [*_TO_STDLIB], {})


def install_structured_logging(
    logger: logging.Logger | None = None, *, json: bool | None = None
) -> None:
    """Send stdlib and structlog log calls out structured, with ids, silent in replay.

    ``logger.info("Saved", extra={"rows": 3})`` and
    ``structlog.get_logger().info("Saved", rows=3)`` give the same line. Fields bound
    by the engine or with ``structlog.contextvars`` are on every line; what a call
    states itself wins. Control characters in names and values, which could drive a
    terminal or forge lines, come out as visible escapes; bytes as their length.

    Console handlers that the logger already has (plain ``StreamHandler`` on stdout or
    stderr, as ``logging.basicConfig`` makes) change their format; without any, one on
    stderr is added. Other handlers are left alone. A root logger that nobody
    configured gets the level INFO. Calling it again replaces the format, adds nothing.

    Args:
        logger: Whose handlers to set up; the root logger by default.
        json: True for one JSON object a line, False for people; by default people on
            a terminal, else JSON.
    """
    target = logger if logger is not None else logging.getLogger()
    use_stdlib_logging()
    silence_replay()
    _raise_untouched_level(target)
    handlers = [found for found in target.handlers if _is_console(found)]
    if not handlers:
        handlers = [_StderrHandler()]
        target.addHandler(handlers[0])
    for handler in handlers:
        handler.setFormatter(_formatter(handler, json=json))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment, which tests and shells swap."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


# The names a LogRecord has by itself; ``extra`` may not use them.
_RECORD_ATTRIBUTES: Final = frozenset(
    logging.LogRecord("", 0, "", 0, "", (), None).__dict__
) | {"message", "asctime", "taskName"}
_RENAMED: Final = "_stent_renamed"
_RECORD_PRIVATE: Final = frozenset(("_logger", "_name", _RENAMED))
# The keys of a line that only the formatter sets.
_CANONICAL: Final = frozenset(
    ("timestamp", "level", "logger", "event", "exception", "stack", "exc_info")
)
_STDLIB_OPTIONS: Final = ("exc_info", "stack_info", "stacklevel")


def _to_stdlib(
    logger: WrappedLogger, _: str, event_dict: EventDict
) -> tuple[tuple[object], dict[str, object]]:
    """Turn a structlog event into the arguments of a stdlib call.

    A field named like an attribute of LogRecord, which stdlib refuses, gets an
    underscore for foreign handlers; our formatter gives it its name back.
    """
    message = event_dict.pop("event", "")
    options = {key: event_dict.pop(key) for key in _STDLIB_OPTIONS if key in event_dict}
    # structlog's own logger class skips the frames itself, and would skip too many.
    if type(logger).findCaller is logging.Logger.findCaller:
        options["stacklevel"] = options.get("stacklevel", 1) + _structlog_frames()
    fields = {**bound_fields(), **event_dict}
    renamed = {f"{key}_": key for key in fields if key in _RECORD_ATTRIBUTES}
    extra = {
        f"{key}_" if key in _RECORD_ATTRIBUTES else key: value
        for key, value in fields.items()
    }
    if renamed:
        extra[_RENAMED] = renamed
    return (message,), {**options, "extra": extra}


def _structlog_frames() -> int:
    """Count the frames between the caller of a structlog method and the stdlib call."""
    count = 0
    # Up to the frame in which structlog runs its processors, which returns before.
    frame = sys._getframe(2).f_back  # noqa: SLF001 - public but for its name
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        "structlog"
    ):
        count, frame = count + 1, frame.f_back
    return count


# Without drop_replayed: the records pass the wrapped Logger.handle.
_TO_STDLIB: Final[tuple[Processor, ...]] = (
    structlog.stdlib.filter_by_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    _to_stdlib,
)


def use_stdlib_logging() -> None:
    """Let structlog's loggers write stdlib records, with what is bound."""
    # LoggerFactory replaces the process's logger class, perhaps the program's own, to
    # find the caller; the stack level that _to_stdlib passes does that already.
    logger_class = logging.getLoggerClass()
    factory = LoggerFactory()
    logging.setLoggerClass(logger_class)
    structlog.configure(
        processors=[*_TO_STDLIB],
        context_class=dict,
        logger_factory=factory,
        wrapper_class=BoundLogger,
        cache_logger_on_first_use=False,
    )


def _wrap_logger_handle() -> None:
    original = logging.Logger.handle

    def handle(self: logging.Logger, record: logging.LogRecord) -> None:
        scope = log_scope.get()
        if scope is None or not scope.muted:
            original(self, record)

    handle.stent_original = original  # type: ignore[attr-defined]  # the mark of the wrapper
    logging.Logger.handle = handle  # type: ignore[method-assign]  # the only funnel of all records


def _raise_untouched_level(logger: logging.Logger) -> None:
    """Let info lines through where WARNING is merely stdlib's default."""
    root = logging.getLogger()
    untouched = logger is root or logger.level == logging.NOTSET
    if (
        untouched
        and not root.handlers
        and logger.getEffectiveLevel() == logging.WARNING
    ):
        logger.setLevel(logging.INFO)


def _is_console(handler: logging.Handler) -> bool:
    # The exact class: subclasses, such as the recorder of a test runner, are not ours.
    if type(handler) is logging.StreamHandler:
        return handler.stream in (sys.stdout, sys.stderr)
    return isinstance(handler, _StderrHandler)


def _formatter(handler: logging.Handler, *, json: bool | None) -> ProcessorFormatter:
    stream = getattr(handler, "stream", sys.stderr)
    terminal = stream is not None and stream.isatty()
    if json if json is not None else not terminal:
        rendering: list[Processor] = [_sanitize_for_json, _render_json]
    else:
        console = structlog.dev.ConsoleRenderer(
            colors=terminal,
            sort_keys=False,
            # The default expects to render tracebacks itself, local variables included,
            # which may be payloads or secrets; format_exc_info comes first instead.
            exception_formatter=structlog.dev.plain_traceback,
        )
        rendering = [_sanitize_for_console, console]
    return ProcessorFormatter(
        processors=[_collect, structlog.processors.format_exc_info, *rendering]
    )


def _collect(_: WrappedLogger, __: str, event_dict: EventDict) -> EventDict:
    """Put the facts of a record in one order: canonical ones, bound ids, its own."""
    record: logging.LogRecord = event_dict.pop("_record")
    event_dict.pop("_from_structlog")
    created = datetime.fromtimestamp(record.created, tz=UTC)
    line: EventDict = {
        "timestamp": created.isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": event_dict.pop("event", ""),
    }
    exc_info = event_dict.pop("exc_info", None)
    stack = event_dict.pop("stack_info", None)
    for source in (bound_fields(), event_dict, _extra_fields(record)):
        for key, value in source.items():
            line[f"{key}_" if key in _CANONICAL else key] = value
    if exc_info:
        line["exc_info"] = exc_info
    if stack:
        line["stack"] = stack
    return line


def _extra_fields(record: logging.LogRecord) -> dict[str, object]:
    attributes = record.__dict__
    renamed: Mapping[str, str] = attributes.get(_RENAMED, {})
    return {
        renamed.get(key, key): value
        for key, value in attributes.items()
        if key not in _RECORD_ATTRIBUTES and key not in _RECORD_PRIVATE
    }


# Controls (C0, DEL, C1), line and paragraph separators, marks that reorder text, and
# lone surrogates, which no stream can encode.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NESTING_MAX: Final = 8
_SHOWN_AS_TEXT: Final = (date, time, timedelta, Decimal, Enum, PurePath, UUID, float)


def _sanitize_for_json(_: WrappedLogger, __: str, event_dict: EventDict) -> EventDict:
    """Escape in keys and values; newlines stay, as JSON writes them in two letters."""
    return {
        _escape(key): _sanitize(value, keep="\n\t") for key, value in event_dict.items()
    }


def _sanitize_for_console(
    _: WrappedLogger, __: str, event_dict: EventDict
) -> EventDict:
    """Escape in keys and values; only a traceback or stack may span lines."""
    return {
        _escape(key): _sanitize(
            value, keep="\n\t" if key in ("exception", "stack") else "\t"
        )
        for key, value in event_dict.items()
    }


def _render_json(_: WrappedLogger, __: str, event_dict: EventDict) -> str:
    return json_module.dumps(event_dict, default=repr)


def _sanitize(value: object, *, keep: str, depth: int = 0) -> object:
    """Reduce a value to what JSON has, every text in it escaped."""
    if isinstance(value, str):
        return _escape(str.__str__(value), keep=keep)
    if depth < _NESTING_MAX and isinstance(value, Mapping):
        return {
            _escape(str(key)): _sanitize(item, keep=keep, depth=depth + 1)
            for key, item in value.items()
        }
    if depth < _NESTING_MAX and isinstance(value, (list, tuple, set, frozenset)):
        return [_sanitize(item, keep=keep, depth=depth + 1) for item in value]
    plain = _plain(value)
    return _escape(plain, keep=keep) if isinstance(plain, str) else plain


def _plain(value: object) -> str | float | bool | None:
    """Show one value as a JSON scalar; bytes, which may be a payload, as a length."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    # JSON has no word for infinity and what is not a number: they become text.
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{memoryview(value).nbytes} bytes>"
    return str(value) if isinstance(value, _SHOWN_AS_TEXT) else repr(value)


def _escape(text: str, *, keep: str = "") -> str:
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text
    )
