"""Why an execution is not done, in words."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from stent.history.display import (
    function_of,
    page_of,
    shown_details,
    shown_error,
    shown_instant,
    shown_seconds,
    shown_worker,
)
from stent.history.limits import Limits
from stent.model import Kind, Status

NO_WORKER = "no worker is running"
ONLY_DRAINING = "no worker takes work: those that run are draining"
MOMENT = dt.timedelta(milliseconds=100)
"""What was inserted while one looked is a little younger than the look."""
NAMED_MAX = 5
"""Tasks or children up to here get a sentence each; more are counted."""
NOTICED_AFTER = dt.timedelta(seconds=2)
"""Work that waits longer than this although somebody could take it says how long."""

NO_LIMITS = Limits()

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Workers:
    """Leases as they are now.

    Attributes:
        queues: Served by workers that take work.
        alive: Workers whose lease holds, draining ones included.
        functions: What workers that take work can run, by queue. A queue is left out
            when one of its workers has not said what it can run.
    """

    queues: frozenset[str]
    alive: frozenset[UUID]
    functions: Mapping[str, AbstractSet[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, leases: Iterable[Row], serving: Iterable[Row] = ()) -> Workers:
        """From rows of leases: worker_id, state, queues, holds.

        Args:
            leases: See above.
            serving: queues and functions (or None) of workers that take work.
        """
        living = [lease for lease in leases if lease["holds"]]
        return cls(
            frozenset(
                queue
                for lease in living
                if lease["state"] == "running"
                for queue in lease["queues"]
            ),
            frozenset(lease["worker_id"] for lease in living),
            _functions_by_queue(serving),
        )

    def absence(self, queue: str, function: str) -> str | None:
        """Why nobody runs a function of a queue; None if somebody may."""
        if not self.queues:
            return ONLY_DRAINING if self.alive else NO_WORKER
        if queue not in self.queues:
            return f"no worker serves queue {queue!r}"
        if function in self.functions.get(queue, {function}):
            return None
        elsewhere = self.queues != self.functions.keys() or any(
            function in names for names in self.functions.values()
        )
        of_queue = f" of queue {queue!r}" if elsewhere else ""
        return f"no running worker{of_queue} has the function {function}"


def _functions_by_queue(serving: Iterable[Row]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    unknown: set[str] = set()
    for row in serving:
        if row["functions"] is None:
            unknown.update(row["queues"])
        for queue in row["queues"]:
            found.setdefault(queue, set()).update(row["functions"] or ())
    return {queue: names for queue, names in found.items() if queue not in unknown}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What an unfinished execution has started and not seen finish.

    Attributes:
        groups: Task rows counted by function, queue, worker and whether they retry.
        tasks: The first of them, each with the error of its last attempt.
        children: The first unfinished children; ``total`` counts all.
        inline: Calls that the owner runs itself, with their addresses.
        heartbeats: The last ones of the calls that are named, by call.
    """

    groups: Sequence[Row] = ()
    tasks: Sequence[Row] = ()
    children: Sequence[Row] = ()
    inline: Mapping[UUID, str] = field(default_factory=dict)
    heartbeats: Mapping[UUID, Row] = field(default_factory=dict)


def waits_of(
    execution: Row,
    pending: Pending,
    workers: Workers,
    now: dt.datetime,
    limits: Limits = NO_LIMITS,
) -> tuple[str, ...]:
    """Sentences that say why an execution is not done; none if it is."""
    status = Status(execution["status"])
    if status.terminal:
        return ()
    if status is Status.PENDING:
        return _unstarted(execution, workers, now, limits)
    sentences = [*_standing(execution, status)]
    sentences += _ownership(execution, workers, limits)
    sentences += _tasks(pending, workers, now, limits)
    sentences += _inline(execution, pending, now)
    sentences += _children(pending)
    sentences += _timer(execution, now)
    if not sentences:
        sentences = _nothing_recorded(execution, pending, now)
    return tuple(sentences)


def _unstarted(
    execution: Row, workers: Workers, now: dt.datetime, limits: Limits
) -> tuple[str, ...]:
    starts_at, queue = execution["wake_at"], execution["queue"]
    if execution["cancel_reason"] is not None:
        return ("asked to stop before it started",)
    absence = workers.absence(queue, execution["function"])
    if starts_at is not None and starts_at - now > MOMENT:
        start = f"start at {shown_instant(starts_at)}"
        return (start,) if absence is None else (start, absence)
    reasons = [] if absence is None else [absence]
    if execution["kind"] == Kind.WORKFLOW:
        reasons += limits.on_execution(execution)
    else:
        # Its function's limit is that of its task, once it has one.
        reasons += limits.queue_pause(execution["queue"])
    if reasons:
        return tuple(reasons)
    waited = now - (starts_at or execution["created_at"])
    if waited < NOTICED_AFTER:
        return (f"a worker of queue {queue!r}",)
    able = f"a worker of queue {queue!r} that knows function {execution['function']!r}"
    return (f"{able} and has room, for {shown_seconds(waited)}",)


def _standing(execution: Row, status: Status) -> list[str]:
    if status is Status.BLOCKED:
        reason = execution["blocked_reason"] or "unknown"
        return [f"blocked until its code changes: {reason}"]
    if status is Status.PAUSED:
        return ["paused until somebody resumes it"]
    if status is Status.CANCELLING:
        by = execution["cancel_by"]
        until = "" if by is None else f", until {shown_instant(by)} at the latest"
        reason = execution["cancel_reason"] or "cancel"
        return [f"its cleanup after being asked to stop ({reason}){until}"]
    return []


def _ownership(execution: Row, workers: Workers, limits: Limits) -> list[str]:
    worker = execution["worker_id"]
    if worker is None:
        if execution["status"] == Status.BLOCKED or not execution["wake_is_due"]:
            return []
        absence = workers.absence(execution["queue"], execution["function"])
        pauses = limits.pauses(execution["function"], execution["queue"])
        return ["; ".join([absence or "a worker that takes it over", *pauses])]
    if worker not in workers.alive:
        absence = workers.absence(execution["queue"], execution["function"])
        then = absence or "others will take it over"
        return [f"its worker {shown_worker(worker)} is gone; {then}"]
    return []


def _tasks(
    pending: Pending, workers: Workers, now: dt.datetime, limits: Limits
) -> list[str]:
    total = sum(group["count"] for group in pending.groups)
    if total <= NAMED_MAX:
        beats = pending.heartbeats
        return [
            _task(task, workers, now, limits, _said(beats.get(task["call_id"]), now))
            for task in pending.tasks
        ]
    functions: dict[str, list[Row]] = {}
    for group in pending.groups:
        functions.setdefault(group["function"], []).append(group)
    return [
        _group(function, groups, pending.tasks, workers, limits)
        for function, groups in functions.items()
    ]


def _said(beat: Row | None, now: dt.datetime) -> str:
    """What a call last told of its progress, and when."""
    if beat is None:
        return ""
    ago = shown_seconds(max(now - beat["recorded_at"], dt.timedelta(0)))
    details = shown_details(beat["payload"], beat["length"])
    return f"; heartbeat {ago} ago{'' if details is None else f': {details}'}"


def _task(
    task: Row, workers: Workers, now: dt.datetime, limits: Limits, said: str
) -> str:
    start = page_of(task["address"])
    what = f"activity {task['function']}"
    if start is not None:
        what = f"page from item {start} of map {task['function']}"
    attempt = task["attempt"]
    error = ""
    if attempt > 1:
        error = f"; last error {shown_error(task['last_error'], None)}"
    if task["worker_id"] is not None:
        place = _place(task, workers, limits, is_page=start is not None)
        again = f", attempt {attempt}{error}" if attempt > 1 else ""
        return f"{what} ({place.where}{again}{said}{_list(place.why)})"
    pause = task["available_at"] - now
    absence = workers.absence(task["queue"], task["function"])
    blames = [] if absence is None else [absence]
    blames += limits.on_task(task["function"], task["queue"], (task["limit_key"],))
    blame = _list(blames)
    if attempt > 1:
        when = f" in {shown_seconds(pause)}" if pause > MOMENT else ""
        return f"{what} (attempt {attempt}{when}{error}{said}{blame})"
    if pause > MOMENT:
        return f"{what} (starts in {shown_seconds(pause)}{blame})"
    waited = f" for {shown_seconds(-pause)}" if -pause > NOTICED_AFTER else ""
    return f"{what} (queued{waited}{blame})"


def _inline(execution: Row, pending: Pending, now: dt.datetime) -> list[str]:
    worker = execution["worker_id"]
    if worker is None:
        return []
    where = f"running on worker {shown_worker(worker)}"
    sentences = []
    for call, address in list(pending.inline.items())[:NAMED_MAX]:
        said = _said(pending.heartbeats.get(call), now)
        sentences.append(f"activity {function_of(address)} ({where}{said})")
    if len(pending.inline) > NAMED_MAX:
        more = len(pending.inline) - NAMED_MAX
        sentences.append(f"{more} more activities running there")
    return sentences


def _list(reasons: Iterable[str]) -> str:
    return "".join(f"; {reason}" for reason in reasons)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where tasks are that a worker has claimed, and why they may not have begun."""

    where: str
    why: Sequence[str] = ()


def _place(claimed: Row, workers: Workers, limits: Limits, *, is_page: bool) -> _Place:
    """Of a task, or of a group of them.

    A worker claims a little ahead of its slots and tokens, and only it knows what has
    begun: that is told unless it has no more tasks than slots.
    """
    worker, function, queue = (claimed[n] for n in ("worker_id", "function", "queue"))
    on = f"on worker {shown_worker(worker)}"
    if worker not in workers.alive:
        return _Place(f"running {on}, which is gone")
    slots = limits.slots_of(worker, function, queue)
    pauses = limits.pauses(function, queue)
    has = limits.claimed.get((function, queue, worker), 0)
    if slots is None and not limits.rated(function, queue):
        return _Place(f"running {on}", pauses)
    if slots is not None and (is_page or has > slots):
        unit = "slot" if slots == 1 else "slots"
        tasks = "items" if is_page else f"{has} tasks"
        begun = "running or next" if slots else "next"
        where = f"{begun} {on}, which has {slots} {unit} for {tasks}"
        return _Place(where, limits.on_task(function, queue))
    if limits.rated(function, queue):
        return _Place(f"running or next {on}", limits.on_task(function, queue))
    return _Place(f"running {on}", pauses)


def _group(
    function: str,
    groups: Sequence[Row],
    tasks: Sequence[Row],
    workers: Workers,
    limits: Limits,
) -> str:
    parts = []
    tasks = [task for task in tasks if task["function"] == function]
    queued = sum(g["count"] for g in groups if g["worker_id"] is None)
    retrying = sum(g["count"] for g in groups if g["retries"])
    if queued - retrying:
        parts.append(f"{_tasks_word(queued - retrying)} queued")
    # The same is not told twice.
    why: dict[str, None] = {}
    for group in groups:
        if group["worker_id"] is not None:
            place = _place(group, workers, limits, is_page=False)
            parts.append(f"{group['count']} {place.where}")
            why.update(dict.fromkeys(place.why))
    if retrying:
        errors = [
            shown_error(task["last_error"], None)
            for task in tasks
            if task["attempt"] > 1
        ]
        last = f" (last error {errors[0]})" if errors else ""
        parts.append(f"{retrying} waiting for another attempt{last}")
    waiting = sorted({g["queue"] for g in groups if g["worker_id"] is None})
    blames = {workers.absence(queue, function) for queue in waiting}
    parts += sorted(blame for blame in blames if blame is not None)
    keys = [task["limit_key"] for task in tasks if task["worker_id"] is None]
    distinct = tuple(dict.fromkeys(keys))
    for queue in waiting:
        why.update(dict.fromkeys(limits.on_task(function, queue, distinct)))
    return f"activity {function}: {', '.join(parts)}{_list(why)}"


def _tasks_word(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _children(pending: Pending) -> list[str]:
    named = [
        f"child {child['child_id']} {child['function']} ({child['status']})"
        for child in pending.children
    ]
    more = (pending.children[0]["total"] if pending.children else 0) - len(named)
    return [*named, f"{more} more children"] if more > 0 else named


def _timer(execution: Row, now: dt.datetime) -> list[str]:
    wake_at = execution["wake_at"]
    if wake_at is None or wake_at == execution["deadline_at"]:
        return []
    late = " (overdue)" if wake_at < now - NOTICED_AFTER else ""
    return [f"timer until {shown_instant(wake_at)}{late}"]


def _nothing_recorded(execution: Row, pending: Pending, now: dt.datetime) -> list[str]:
    worker = execution["worker_id"]
    if worker is not None and execution["kind"] == Kind.ACTIVITY:
        where = f"running on worker {shown_worker(worker)}"
        said = "".join(_said(beat, now) for beat in pending.heartbeats.values())
        return [f"its attempt {execution['attempts']}, {where}{said}"]
    if worker is not None and execution["wake_is_due"]:
        where = f"worker {shown_worker(worker)}"
        return [f"its code, or an activity right beside it, on {where}"]
    deadline = execution["deadline_at"]
    until = "" if deadline is None else f"; it ends by {shown_instant(deadline)}"
    return [f"nothing outside of its own code (a lock, an event, a queue){until}"]
