"""Reads the limits that concern some executions, with who holds their slots."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Select,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    exists,
    func,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from stent.history.limits import HOLDERS_NAMED_MAX, Held, Limits
from stent.history.tables import (
    EXECUTIONS,
    GRANTS,
    LEASES,
    LIMITS,
    SLOTS,
    TASKS,
    WORKERS,
    Look,
)
from stent.services.lanes import function_limit, queue_limit
from stent.store.store import NIL

Row = Mapping[str, Any]

GRANTS_MAX = 10_000
CLAIMED_ROWS_MAX = 5_000
"""Tasks of a function in a queue that are looked at, to count those that are claimed;
they are among the first."""


async def read_limits(
    look: Look,
    executions: Sequence[Row],
    tasks: Iterable[Row],
    groups: Iterable[Row],
    now: dt.datetime,
) -> Limits:
    """The limits of what has not started, and of tasks that a worker has.

    Args:
        look: One snapshot.
        executions: That wait for their slot or for a worker.
        tasks: With function, queue and key.
        groups: Of tasks: function, queue and worker.
        now: Database time.
    """
    groups = list(groups)
    names: set[str] = set()
    for row in (*executions, *groups):
        names.add(function_limit(row["function"]))
        names.add(queue_limit(row["queue"]))
    if not names:
        return Limits()
    rows = {row["name"]: row for row in await look.rows(_limits(names))}
    if not rows:
        return Limits()
    granted: dict[str, dict[UUID, int]] = {}
    hosts: dict[UUID, str] = {}
    counted = [n for n, r in rows.items() if r["max_concurrent"] and not r["keyed"]]
    for row in await look.rows(_grants(counted)) if counted else ():
        granted.setdefault(row["limit_name"], {})[row["worker_id"]] = row["slots"]
        if row["host"] is not None:
            hosts[row["worker_id"]] = row["host"]
    wanted = {
        (name, (waiting["limit_key"] or "") if rows[name]["keyed"] else "")
        for waiting in (*executions, *tasks)
        if (name := function_limit(waiting["function"])) in rows
        and rows[name]["max_concurrent"] is not None
    }
    taken = {
        (row["limit_name"], row["key"]): _held(row)
        for row in (await look.rows(_taken(sorted(wanted))) if wanted else ())
    }
    lanes = {
        (group["function"], group["queue"])
        for group in groups
        if group["worker_id"] is not None
        and not {
            function_limit(group["function"]),
            queue_limit(group["queue"]),
        }.isdisjoint(counted)
    }
    claimed = {
        (row["function"], row["queue"], row["worker_id"]): row["count"]
        for row in (await look.rows(_claimed(sorted(lanes))) if lanes else ())
    }
    return Limits(
        rows=rows, granted=granted, taken=taken, claimed=claimed, hosts=hosts, now=now
    )


def _held(row: Row) -> Held:
    named = tuple(
        f"execution {holder}{f' ({slots})' if slots > 1 else ''}"
        for holder, slots in zip(row["holders"], row["of_each"], strict=True)
    )
    return Held(int(row["slots"]), named, row["total"] - len(named))


def _limits(names: Iterable[str]) -> Select[Any]:
    rows = LIMITS.c
    wanted: Any = bindparam("names", sorted(names))
    return select(LIMITS).where(
        rows.name == any_(wanted),
        or_(
            rows.max_concurrent.is_not(None),
            rows.rate_per_second.is_not(None),
            rows.paused,
        ),
    )


def _grants(names: Sequence[str]) -> Select[Any]:
    """Those that count: of a worker's present incarnation."""
    rows = GRANTS.c
    wanted: Any = bindparam("names", list(names))
    return (
        select(rows.limit_name, rows.worker_id, rows.slots, LEASES.c.host)
        .select_from(
            GRANTS.join(
                WORKERS,
                and_(
                    WORKERS.c.worker_id == rows.worker_id,
                    WORKERS.c.incarnation == rows.incarnation,
                ),
            ).outerjoin(LEASES, LEASES.c.worker_id == rows.worker_id)
        )
        .where(rows.limit_name == any_(wanted))
        .order_by(rows.limit_name, rows.worker_id)
        .limit(GRANTS_MAX)
    )


def _pairs(names: tuple[str, str], pairs: Sequence[tuple[str, str]]) -> Any:
    """Pairs of texts as rows, to join something to each of them."""
    arrays = [
        cast(
            bindparam(f"{name}s", [pair[place] for pair in pairs], type_=ARRAY(Text())),
            ARRAY(Text()),
        )
        for place, name in enumerate(names)
    ]
    return func.unnest(*arrays).table_valued(*names).render_derived(name="given")


def _taken(pairs: Sequence[tuple[str, str]]) -> Select[Any]:
    """Slots of executions and calls that count, and the first of their holders."""
    given, rows = _pairs(("limit_name", "key"), pairs), SLOTS.c
    counts = case(
        (
            rows.call_id == NIL,
            exists()
            .where(
                EXECUTIONS.c.execution_id == rows.execution_id,
                EXECUTIONS.c.finished_at.is_(None),
            )
            .correlate(SLOTS),
        ),
        else_=exists()
        .where(
            TASKS.c.execution_id == rows.execution_id,
            TASKS.c.call_id == rows.call_id,
            TASKS.c.epoch == rows.epoch,
            TASKS.c.worker_id.is_not(None),
        )
        .correlate(SLOTS),
    )
    each = (
        select(
            rows.execution_id,
            func.count().label("slots"),
            func.min(rows.taken_at).label("since"),
        )
        .where(rows.limit_name == given.c.limit_name, rows.key == given.c.key, counts)
        .group_by(rows.execution_id)
        .correlate(given)
        .subquery("each")
    )
    order = (each.c.since, each.c.execution_id)
    held = select(
        func.sum(each.c.slots, type_=BigInteger()).label("slots"),
        func.count().label("total"),
        _first(each.c.execution_id, order, Uuid()).label("holders"),
        _first(each.c.slots, order, BigInteger()).label("of_each"),
    ).lateral("held")
    return (
        select(given, held)
        .select_from(given.join(held, true()))
        .where(held.c.slots > 0)
    )


def _first(of: Any, order: Sequence[Any], kind: Any) -> Any:
    """The first values of a group as an array."""
    ordered = aggregate_order_by(of, *order)
    return func.array_agg(ordered, type_=ARRAY(kind))[1:HOLDERS_NAMED_MAX]


def _claimed(lanes: Sequence[tuple[str, str]]) -> Select[Any]:
    """How many tasks of a function in a queue each worker has. tasks_ready_idx."""
    given, rows = _pairs(("function", "queue"), lanes), TASKS.c
    first = (
        select(rows.worker_id)
        .where(rows.queue == given.c.queue, rows.function == given.c.function)
        .order_by(rows.queue, rows.function, rows.priority.desc(), rows.available_at)
        .limit(CLAIMED_ROWS_MAX)
        .lateral("first")
    )
    return (
        select(
            given.c.function,
            given.c.queue,
            first.c.worker_id,
            func.count().label("count"),
        )
        .select_from(given.join(first, true()))
        .where(first.c.worker_id.is_not(None))
        .group_by(given.c.function, given.c.queue, first.c.worker_id)
    )
