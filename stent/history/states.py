"""Executions at a glance: what is read for many of them at once."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    Subquery,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    or_,
    select,
    true,
)

from stent.history.display import shown_error, shown_traceback, shown_value
from stent.history.holders import read_limits
from stent.history.limits import Limits
from stent.history.tables import (
    ATTEMPTS,
    EXECUTIONS,
    HEARTBEATS,
    JOURNAL,
    LEASES,
    RESULTS,
    TASKS,
    WORKER_FUNCTIONS,
    Look,
)
from stent.history.waits import NAMED_MAX, Pending, Workers, waits_of
from stent.journal import decode_turn
from stent.model import ExecutionState, ExecutionTimes, Kind, Status
from stent.services.identity import make_call_ids
from stent.store.store import NIL

Row = Mapping[str, Any]

WORKERS_MAX = 1_000
HEARTBEAT_BYTES_MAX = 4 * 1024
"""Larger details of a heartbeat are shown as their size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much of each execution is read.

    Attributes:
        result_bytes: Larger results are shown as their size.
        children: Ids of children, the first ones.
        counted: Tasks or children up to here are counted exactly.
    """

    result_bytes: int
    children: int
    counted: int


ONE = Bounds(result_bytes=4 * 1024 * 1024, children=1_000, counted=100_000)
"""For one execution."""
MANY = Bounds(result_bytes=16 * 1024, children=20, counted=1_000)
"""For each execution of a list."""


def select_executions() -> Select[Any]:
    """Rows of executions with how often they were tried and what the time is."""
    rows = EXECUTIONS.c
    later = case((func.isfinite(rows.wake_at), rows.wake_at)).label("wake_at")
    due = func.coalesce(rows.wake_at <= func.now(), False).label("wake_is_due")
    taken = [column for column in rows if column.name != "wake_at"]
    return select(
        *taken, later, due, func.now().label("now"), _attempts().label("attempts")
    ).select_from(EXECUTIONS)


def _attempts() -> ColumnElement[int]:
    """Turns of a workflow; of an activity, attempts begun."""
    own = EXECUTIONS.c.execution_id

    def most(of: Any, value: Any) -> ColumnElement[int]:
        return (
            select(func.max(value))
            .where(of.c.execution_id == own)
            .correlate(EXECUTIONS)
            .scalar_subquery()
        )

    begun = TASKS.c.attempt - case((TASKS.c.worker_id.is_(None), 1), else_=0)
    first = case((EXECUTIONS.c.started_at.is_not(None), 1), else_=0)
    return case(
        (
            EXECUTIONS.c.kind == Kind.WORKFLOW.value,
            func.coalesce(most(JOURNAL, JOURNAL.c.position + 1), 0),
        ),
        else_=func.greatest(
            first,
            most(RESULTS, RESULTS.c.attempt),
            most(ATTEMPTS, ATTEMPTS.c.attempt),
            most(TASKS, begun),
        ),
    )


async def read_states(
    look: Look, rows: Sequence[Row], bounds: Bounds
) -> list[ExecutionState]:
    """The states of executions, in the order of ``rows`` of ``select_executions``."""
    if not rows:
        return []
    ids = [row["execution_id"] for row in rows]
    unfinished = [row for row in rows if row["finished_at"] is None]
    outcomes = by_execution(await look.rows(_outcomes(ids, bounds)))
    children = by_execution(await look.rows(_children_of(ids, bounds)))
    pending: dict[UUID, Pending] = {}
    workers, limits = Workers(frozenset(), frozenset()), Limits()
    if unfinished:
        workers = await read_workers(look)
        pending = await _read_pending(look, unfinished, bounds)
        limits = await read_limits(
            look,
            [row for row in unfinished if row["worker_id"] is None],
            [task for found in pending.values() for task in found.tasks],
            [group for found in pending.values() for group in found.groups],
            rows[0]["now"],
        )
    return [
        _state(
            row,
            outcomes.get(row["execution_id"], []),
            [child["child_id"] for child in children.get(row["execution_id"], [])],
            waits_of(
                row,
                pending.get(row["execution_id"], Pending()),
                workers,
                row["now"],
                limits,
            ),
        )
        for row in rows
    ]


async def read_workers(look: Look) -> Workers:
    """Who is there to do something."""
    rows = LEASES.c
    holds = and_(
        rows.expires_at > func.now(),
        or_(rows.state == "running", rows.state == "draining"),
    )
    statement = (
        select(rows.worker_id, rows.state, rows.queues, holds.label("holds"))
        .where(holds)
        .order_by(rows.worker_id)
        .limit(WORKERS_MAX)
    )
    serving = (
        select(rows.queues, WORKER_FUNCTIONS.c.functions)
        .select_from(
            LEASES.outerjoin(
                WORKER_FUNCTIONS, WORKER_FUNCTIONS.c.worker_id == rows.worker_id
            )
        )
        .where(holds, rows.state == "running")
        .distinct()
        .limit(WORKERS_MAX)
    )
    return Workers.of(await look.rows(statement), await look.rows(serving))


async def _read_pending(
    look: Look, executions: Sequence[Row], bounds: Bounds
) -> dict[UUID, Pending]:
    ids = [row["execution_id"] for row in executions]
    groups = by_execution(await look.rows(_task_groups(ids, bounds)))
    tasks = by_execution(await look.rows(_first_tasks(ids, bounds)))
    children = by_execution(await look.rows(_open_children(ids, bounds)))
    inline = await _read_inline(look, ids)
    beats = await _read_heartbeats(look, executions, tasks, inline)
    return {
        execution_id: Pending(
            groups=groups.get(execution_id, ()),
            tasks=tasks.get(execution_id, ()),
            children=children.get(execution_id, ()),
            inline=inline.get(execution_id, {}),
            heartbeats={beat["task_id"]: beat for beat in beats.get(execution_id, ())},
        )
        for execution_id in ids
    }


async def _read_heartbeats(
    look: Look,
    executions: Sequence[Row],
    tasks: Mapping[UUID, Sequence[Row]],
    inline: Mapping[UUID, Mapping[UUID, str]],
) -> dict[UUID, list[Row]]:
    """The last ones of what gets a sentence."""
    calls: list[tuple[UUID, UUID | None]] = []
    for execution in executions:
        execution_id = execution["execution_id"]
        calls += [
            (execution_id, task["call_id"]) for task in tasks.get(execution_id, ())
        ]
        inline_here = list(inline.get(execution_id, ()))[:NAMED_MAX]
        calls += [(execution_id, call) for call in inline_here]
        if execution["kind"] == Kind.ACTIVITY:
            calls.append((execution_id, None))
    return by_execution(await look.rows(_last_heartbeats(calls)) if calls else ())


def _last_heartbeats(calls: Sequence[tuple[UUID, UUID | None]]) -> Select[Any]:
    """The last one of each call; of a page, the last one of its items.

    Args:
        calls: Execution and call; None: whatever is called, it is one activity.
    """
    pairs = zip(*calls, strict=True)
    arrays = [
        cast(bindparam(None, list(of), ARRAY(Uuid())), ARRAY(Uuid())) for of in pairs
    ]
    given = func.unnest(*arrays).table_valued("id", "call").render_derived(name="given")
    rows = HEARTBEATS.c
    length = func.octet_length(rows.payload)
    last = (
        select(
            rows.task_id,
            rows.recorded_at,
            length.label("length"),
            case((length <= HEARTBEAT_BYTES_MAX, rows.payload)).label("payload"),
        )
        .where(
            rows.execution_id == given.c.id,
            or_(given.c.call.is_(None), rows.task_id == given.c.call),
        )
        .order_by(rows.recorded_at.desc())
        .limit(1)
        .lateral("last")
    )
    return select(given.c.id.label("execution_id"), last).select_from(
        given.join(last, true())
    )


async def _read_inline(look: Look, ids: list[UUID]) -> dict[UUID, dict[UUID, str]]:
    """Calls the last turn says its worker runs, and that have no result or row yet.

    Returns:
        By execution, the address of each call.
    """
    named: dict[UUID, dict[UUID, str]] = {}
    for row in await look.rows(_last_turns(ids)):
        execution_id = row["execution_id"]
        try:
            turn = decode_turn(row["payload"])
        except msgspec.MsgspecError:
            continue  # Its history says that it is unreadable.
        if turn.inline:
            call_id = make_call_ids(execution_id)
            named[execution_id] = {call_id(a): a for a in turn.inline}
    if not named:
        return {}
    calls: Any = bindparam("calls", [call for of in named.values() for call in of])
    known: Any = bindparam("known", list(named))
    for table in (RESULTS, TASKS):
        statement = select(table.c.execution_id, table.c.call_id).where(
            table.c.execution_id == any_(known), table.c.call_id == any_(calls)
        )
        for row in await look.rows(statement):
            named[row["execution_id"]].pop(row["call_id"], None)
    return named


def by_execution(rows: Iterable[Row]) -> dict[UUID, list[Row]]:
    """Rows by their ``execution_id``."""
    found: dict[UUID, list[Row]] = {}
    for row in rows:
        found.setdefault(row["execution_id"], []).append(row)
    return found


def _given(ids: Sequence[UUID]) -> Subquery:
    """The ids as rows, to join something to each of them."""
    array: Any = bindparam("ids", list(ids), type_=ARRAY(Uuid()))
    return select(func.unnest(cast(array, ARRAY(Uuid()))).label("id")).subquery("given")


def _outcomes(ids: Sequence[UUID], bounds: Bounds) -> Select[Any]:
    rows = RESULTS.c
    length = func.octet_length(rows.payload)
    shown = case((or_(rows.ok.is_(False), length <= bounds.result_bytes), rows.payload))
    wanted: Any = bindparam("ids", list(ids))
    return select(
        rows.execution_id, rows.ok, length.label("length"), shown.label("payload")
    ).where(rows.execution_id == any_(wanted), rows.call_id == NIL)


def _children_of(ids: Sequence[UUID], bounds: Bounds) -> Select[Any]:
    given, rows = _given(ids), EXECUTIONS.c
    first = (
        select(rows.execution_id.label("child_id"))
        .where(rows.parent_id == given.c.id)
        .order_by(rows.execution_id)
        .limit(bounds.children)
        .lateral("first")
    )
    return select(given.c.id.label("execution_id"), first.c.child_id).select_from(
        given.join(first, true())
    )


def _open_children(ids: Sequence[UUID], bounds: Bounds) -> Select[Any]:
    given, rows = _given(ids), EXECUTIONS.c
    found = (
        select(rows.execution_id, rows.function, rows.status)
        .where(
            rows.parent_id == given.c.id,
            rows.finished_at.is_(None),
            rows.detached.is_(False),
        )
        .order_by(rows.execution_id)
        .limit(bounds.counted)
        .correlate(given)
        .subquery("found")
    )
    first = (
        select(found, func.count().over().label("total"))
        .order_by(found.c.execution_id)
        .limit(NAMED_MAX)
        .lateral("first")
    )
    return select(
        given.c.id.label("execution_id"),
        first.c.execution_id.label("child_id"),
        first.c.function,
        first.c.status,
        first.c.total,
    ).select_from(given.join(first, true()))


def _some_tasks(given: Subquery, bounds: Bounds) -> Subquery:
    return (
        select(TASKS)
        .where(TASKS.c.execution_id == given.c.id)
        .limit(bounds.counted)
        .correlate(given)
        .subquery("found")
    )


def _task_groups(ids: Sequence[UUID], bounds: Bounds) -> Select[Any]:
    given = _given(ids)
    found = _some_tasks(given, bounds)
    retries = and_(found.c.attempt > 1, found.c.worker_id.is_(None)).label("retries")
    keys = (found.c.function, found.c.queue, found.c.worker_id)
    groups = (
        select(*keys, retries, func.count().label("count"))
        .group_by(*keys, retries)
        .lateral("groups")
    )
    return (
        select(given.c.id.label("execution_id"), groups)
        .select_from(given.join(groups, true()))
        .order_by(groups.c.function, groups.c.queue, groups.c.worker_id)
    )


def _first_tasks(ids: Sequence[UUID], bounds: Bounds) -> Select[Any]:
    """The first tasks, those that failed before in front, each with its last error."""
    given = _given(ids)
    found = _some_tasks(given, bounds)
    order = (found.c.attempt.desc(), found.c.available_at, found.c.call_id)
    first = select(found).order_by(*order).limit(NAMED_MAX).lateral("first")
    failed = ATTEMPTS.c
    last_error = (
        select(failed.payload)
        .where(
            failed.execution_id == first.c.execution_id,
            failed.call_id == first.c.call_id,
        )
        .order_by(failed.attempt.desc())
        .limit(1)
        .scalar_subquery()
    )
    return select(
        given.c.id.label("execution_id"),
        first.c.call_id,
        first.c.address,
        first.c.function,
        first.c.queue,
        first.c.available_at,
        first.c.worker_id,
        first.c.attempt,
        first.c.limit_key,
        last_error.label("last_error"),
    ).select_from(given.join(first, true()))


def _last_turns(ids: Sequence[UUID]) -> Select[Any]:
    given, rows = _given(ids), JOURNAL.c
    last = (
        select(rows.payload)
        .where(rows.execution_id == given.c.id)
        .order_by(rows.position.desc())
        .limit(1)
        .lateral("last")
    )
    return select(given.c.id.label("execution_id"), last.c.payload).select_from(
        given.join(last, true())
    )


def _state(
    row: Row,
    outcomes: Sequence[Row],
    children: Sequence[UUID],
    waits: tuple[str, ...],
) -> ExecutionState:
    outcome = outcomes[0] if outcomes and row["finished_at"] is not None else None
    status = Status(row["status"])
    result = error = traceback = None
    if outcome is not None and outcome["ok"]:
        result = shown_value(outcome["payload"], outcome["length"])
    elif outcome is not None:
        error = shown_error(outcome["payload"], outcome["length"])
        traceback = shown_traceback(outcome["payload"])
    elif status.terminal:
        error = "<the outcome is missing>"
    return ExecutionState(
        id=str(row["execution_id"]),
        function=row["function"],
        status=status,
        attempts=row["attempts"],
        waiting_for=waits,
        result=result,
        error=error,
        traceback=traceback,
        tags=tuple(row["tags"]),
        times=ExecutionTimes(
            created_at=_utc(row["created_at"]),
            started_at=_utc_or_none(row["started_at"]),
            finished_at=_utc_or_none(row["finished_at"]),
            wake_at=_utc_or_none(row["wake_at"]),
            deadline_at=_utc_or_none(row["deadline_at"]),
        ),
        kind=Kind(row["kind"]),
        queue=row["queue"],
        priority=row["priority"],
        parent_id=_text(row["parent_id"]),
        root_id=_text(row["root_id"]),
        worker_id=_text(row["worker_id"]),
        children=tuple(str(child) for child in children),
    )


def _utc(at: dt.datetime) -> dt.datetime:
    return at.astimezone(dt.UTC)


def _utc_or_none(at: dt.datetime | None) -> dt.datetime | None:
    return None if at is None else _utc(at)


def _text(identifier: UUID | None) -> str | None:
    return None if identifier is None else str(identifier)
