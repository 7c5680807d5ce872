"""States and entries as JSON documents, for programs; the keys are public."""

from __future__ import annotations

import datetime as dt
import json

import click

from stent.limit_settings import LimitState
from stent.model import Entry, ExecutionState, QueueDepth, WorkerState
from stent.rate import Rate


def print_json(document: object) -> None:
    """One document on one line; every control character is written out."""
    click.echo(json.dumps(document).replace("\x7f", "\\u007f"))


def state_document(state: ExecutionState) -> dict[str, object]:
    """All that is known of an execution; instants in ISO 8601, UTC."""
    times = state.times
    return {
        "id": state.id,
        "function": state.function,
        "kind": state.kind.value,
        "status": state.status.value,
        "attempts": state.attempts,
        "waiting_for": list(state.waiting_for),
        "result": state.result,
        "error": state.error,
        "traceback": state.traceback,
        "queue": state.queue,
        "priority": state.priority,
        "tags": list(state.tags),
        "parent_id": state.parent_id,
        "root_id": state.root_id,
        "worker_id": state.worker_id,
        "children": list(state.children),
        "created_at": _instant(times.created_at),
        "started_at": _instant(times.started_at),
        "finished_at": _instant(times.finished_at),
        "wake_at": _instant(times.wake_at),
        "deadline_at": _instant(times.deadline_at),
    }


def entry_document(entry: Entry) -> dict[str, object]:
    """One entry of a history."""
    return {
        "position": entry.position,
        "kind": entry.kind,
        "at": _instant(entry.at),
        "address": entry.address,
        "detail": entry.detail,
    }


def depth_document(depth: QueueDepth) -> dict[str, object]:
    """One line of a queue; the same keys as the columns of ``stent.queue_depth``."""
    age = depth.oldest_ready
    return {
        "queue": depth.queue,
        "function": depth.function,
        "kind": depth.kind,
        "ready": depth.ready,
        "scheduled": depth.scheduled,
        "running": depth.running,
        "waiting": depth.waiting,
        "oldest_ready_seconds": None if age is None else age.total_seconds(),
        "capped": depth.capped,
    }


def limit_document(state: LimitState) -> dict[str, object]:
    """One limit with what is in use; a rate also as people write it."""
    of, _, name = state.name.partition(":")
    rate, burst = state.rate_per_second, state.burst
    return {
        "of": of,
        "name": name,
        "max_concurrent": state.max_concurrent,
        "per_key": state.keyed,
        "in_use": state.held,
        "waiting": state.waiting,
        "waiting_capped": state.capped,
        "rate": None if rate is None else str(Rate.of(rate, burst or 1)),
        "rate_per_second": rate,
        "burst": burst,
        "tokens": state.tokens,
        "closed_until": _instant(state.closed_until),
        "paused": state.paused,
        "set_by": _set_by(state),
        "updated_at": _instant(state.updated_at),
    }


def no_limit_document(name: str) -> dict[str, object]:
    """The same of what has no limit, is not paused and was never set."""
    nothing = LimitState(
        name=name,
        max_concurrent=None,
        rate_per_second=None,
        burst=None,
        keyed=False,
        paused=False,
        is_set=False,
        held=0,
        waiting=0,
        capped=False,
        tokens=None,
        closed_until=None,
        updated_at=dt.datetime.min.replace(tzinfo=dt.UTC),
    )
    return limit_document(nothing) | {"updated_at": None}


def _set_by(state: LimitState) -> str | None:
    if state.is_set:
        return "operator"
    limited = state.max_concurrent is not None or state.rate_per_second is not None
    return "code" if limited else None


def worker_document(state: WorkerState) -> dict[str, object]:
    """All that is known of a worker; durations in milliseconds."""
    millisecond = dt.timedelta(milliseconds=1)
    return {
        "id": state.id,
        "state": state.state,
        "alive": state.alive,
        "host": state.host,
        "pid": state.pid,
        "version": state.version,
        "app_version": state.app_version,
        "slots": state.slots,
        "running": state.running,
        "residents": state.residents,
        "lag_ms": round(state.lag / millisecond),
        "lease_left_ms": round(state.lease_left / millisecond),
        "queues": list(state.queues),
        "functions": None if state.functions is None else list(state.functions),
        "asked": None if state.asked is None else state.asked.value,
        "started_at": _instant(state.started_at),
        "renewed_at": _instant(state.renewed_at),
    }


def _instant(at: dt.datetime | None) -> str | None:
    return None if at is None else at.isoformat()
