"""What happened to one execution, brought into one order."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import ColumnElement, Select, and_, case, func, or_, select

from stent.codec import to_plain
from stent.errors import ExecutionNotFoundError
from stent.history.display import (
    function_of,
    page_of,
    shown_error,
    shown_value,
    shown_worker,
    without_nothing,
)
from stent.history.states import select_executions
from stent.history.tables import (
    ATTEMPTS,
    EXECUTIONS,
    JOURNAL,
    LOSSES,
    PAYLOADS,
    RESULTS,
    SEGMENTS,
    TASKS,
    TELLS,
    Look,
)
from stent.journal import (
    CancelDelivered,
    Delivery,
    ResultDelivered,
    TimeAdvanced,
    Turn,
    decode_turn,
)
from stent.model import Entry, Status
from stent.pages import ItemFailed
from stent.store.store import NIL, merge_parts

Row = Mapping[str, Any]

ROWS_MAX = 20_000
"""Rows of each kind that a history shows; one that is longer says so at its end."""
VALUE_BYTES_MAX = 16 * 1024
"""Larger values are shown as their size."""
RETURNED = "#returned"
"""Address of what the code returned although it had been asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The rows of one execution."""

    execution: Row
    arguments: Row | None
    turns: Sequence[Row]
    results: Sequence[Row]
    attempts: Sequence[Row]
    losses: Sequence[Row]
    tells: Sequence[Row]
    tasks: Sequence[Row]
    children: Sequence[Row]


async def read_stored(look: Look, execution_id: UUID) -> Stored:
    """Everything the database knows of an execution, within the limits of a history.

    Raises:
        ExecutionNotFoundError: There is no such execution.
    """
    own = EXECUTIONS.c.execution_id == execution_id
    found = await look.rows(select_executions().where(own))
    if not found:
        message = f"there is no execution {execution_id}"
        raise ExecutionNotFoundError(message)
    arguments = await look.rows(
        select(*_sized(PAYLOADS.c.payload)).where(
            PAYLOADS.c.execution_id == execution_id, PAYLOADS.c.call_id == NIL
        )
    )
    return Stored(
        execution=found[0],
        arguments=arguments[0] if arguments else None,
        turns=await look.rows(_turns(execution_id)),
        results=await look.rows(_results(execution_id)),
        attempts=await look.rows(_attempts(execution_id)),
        losses=await look.rows(_losses(execution_id)),
        tells=await look.rows(_tells(execution_id)),
        tasks=await look.rows(_tasks(execution_id)),
        children=await look.rows(_children(execution_id)),
    )


def _sized(payload: Any, *, always: Any = None) -> tuple[ColumnElement[Any], ...]:
    """A payload unless it is large, and its length."""
    length = func.octet_length(payload)
    small = length <= VALUE_BYTES_MAX
    shown = small if always is None else or_(always, small)
    return case((shown, payload)).label("payload"), length.label("length")


def _turns(execution_id: UUID) -> Select[Any]:
    rows = JOURNAL.c
    return (
        select(rows.position, rows.payload, rows.recorded_at)
        .where(rows.execution_id == execution_id)
        .order_by(rows.position)
        .limit(ROWS_MAX)
    )


def _results(execution_id: UUID) -> Select[Any]:
    rows, part = RESULTS.c, SEGMENTS.c
    own_parts = and_(
        part.execution_id == rows.execution_id, part.call_id == rows.call_id
    )
    parts_bytes = (
        select(func.sum(func.octet_length(part.payload)))
        .where(own_parts)
        .correlate(RESULTS)
        .scalar_subquery()
    )
    in_order = (
        select(part.payload).where(own_parts).order_by(part.segment).correlate(RESULTS)
    ).scalar_subquery()
    parts = case((parts_bytes <= VALUE_BYTES_MAX, func.array(in_order)))
    return (
        select(
            rows.call_id,
            rows.address,
            rows.ok,
            rows.attempt,
            rows.started_at,
            rows.finished_at,
            rows.worker_id,
            parts.label("parts"),
            parts_bytes.label("parts_bytes"),
            *_sized(rows.payload, always=rows.ok.is_(False)),
        )
        .where(rows.execution_id == execution_id)
        .order_by(rows.finished_at, rows.call_id)
        .limit(ROWS_MAX)
    )


def _attempts(execution_id: UUID) -> Select[Any]:
    rows = ATTEMPTS.c
    return (
        select(
            rows.address,
            rows.attempt,
            rows.started_at,
            rows.finished_at,
            rows.worker_id,
            rows.payload,
        )
        .where(rows.execution_id == execution_id)
        .order_by(rows.finished_at, rows.call_id, rows.attempt)
        .limit(ROWS_MAX)
    )


def _losses(execution_id: UUID) -> Select[Any]:
    rows = LOSSES.c
    return (
        select(rows.address, rows.attempt, rows.worker_id, rows.lost_at)
        .where(rows.execution_id == execution_id)
        .order_by(rows.lost_at, rows.call_id, rows.epoch)
        .limit(ROWS_MAX)
    )


def _tells(execution_id: UUID) -> Select[Any]:
    rows = TELLS.c
    return (
        select(rows.address, rows.told_at, *_sized(rows.payload))
        .where(rows.execution_id == execution_id)
        .order_by(rows.told_at, rows.call_id)
        .limit(ROWS_MAX)
    )


def _tasks(execution_id: UUID) -> Select[Any]:
    rows = TASKS.c
    return (
        select(
            rows.address,
            rows.function,
            rows.queue,
            rows.available_at,
            rows.worker_id,
            rows.attempt,
            rows.is_page,
            rows.arguments,
        )
        .where(rows.execution_id == execution_id)
        .order_by(rows.available_at, rows.call_id)
        .limit(ROWS_MAX)
    )


def _children(execution_id: UUID) -> Select[Any]:
    rows = EXECUTIONS.c
    return (
        select(
            rows.execution_id,
            rows.parent_address,
            rows.function,
            rows.status,
            rows.created_at,
            rows.detached,
        )
        .where(rows.parent_id == execution_id)
        .order_by(rows.created_at, rows.execution_id)
        .limit(ROWS_MAX)
    )


# Within one instant what causes something stands before it.
_CREATED, _STARTED, _ISSUED, _FAILED, _TOLD, _SEEN, _ENDED = range(7)


@dataclass(frozen=True, slots=True)
class _Found:
    """An entry without its position; ``order`` says where it belongs."""

    order: tuple[dt.datetime, int]
    kind: str
    at: dt.datetime
    address: str | None
    detail: dict[str, object]


def entries_of(stored: Stored) -> list[Entry]:
    """The history of an execution.

    The journal gives the order of what the code saw. Everything else is put in by its
    time, calls and failed attempts before the delivery of their result in any case.
    """
    teller = _Teller(stored)
    found = sorted(teller.found(), key=lambda one: one.order)
    return [
        Entry(
            position=position,
            kind=one.kind,
            at=one.at.astimezone(dt.UTC),
            address=one.address,
            detail=one.detail,
        )
        for position, one in enumerate(found)
    ]


class _Teller:
    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._results = {r["address"]: r for r in stored.results if r["address"]}
        self._seen_at: dict[str, dt.datetime] = {}
        self._delivered_at: dict[str, dt.datetime] = {}
        self._first_known: dict[str, dt.datetime] = {}
        self._latest: dt.datetime = stored.execution["created_at"]

    def found(self) -> list[_Found]:
        """All entries; ``sorted`` brings them into order."""
        seen = [*self._seen()]
        others = [
            *self._began(),
            *self._issued(),
            *self._failed(),
            *self._lost(),
            *self._told(),
            *self._unseen(),
        ]
        return [*seen, *others, *self._ended(), *self._cut()]

    def _began(self) -> Iterator[_Found]:
        row, arguments = self._stored.execution, self._stored.arguments
        created_at, started_at = row["created_at"], row["started_at"]
        yield _Found(
            (created_at, _CREATED),
            "execution.created",
            created_at,
            None,
            without_nothing(
                function=row["function"],
                queue=row["queue"],
                parent=None if row["parent_id"] is None else str(row["parent_id"]),
                tags=list(row["tags"]) or None,
                arguments=_shown_arguments(arguments),
            ),
        )
        if started_at is not None:
            yield _Found(
                (max(created_at, started_at), _STARTED),
                "execution.started",
                started_at,
                None,
                {},
            )

    def _seen(self) -> Iterator[_Found]:
        """The journal; its times may not run backwards, so neither does the order."""
        for row in self._stored.turns:
            at = row["recorded_at"]
            self._latest = max(self._latest, at)
            order = (self._latest, _SEEN)
            try:
                turn = decode_turn(row["payload"])
            except msgspec.MsgspecError as error:
                detail: dict[str, object] = {
                    "turn": row["position"],
                    "error": f"<unreadable: {error}>",
                }
                yield _Found(order, "turn.unreadable", at, None, detail)
                continue
            yield from self._decided(turn, at, order)
            for delivery in turn.deliveries:
                kind, address, detail = self._delivered(delivery)
                if address is not None:
                    self._seen_at.setdefault(address, self._latest)
                    self._delivered_at[address] = at
                yield _Found(order, kind, at, address, detail)

    def _decided(
        self, turn: Turn, at: dt.datetime, order: tuple[dt.datetime, int]
    ) -> Iterator[_Found]:
        for address in turn.inline:
            self._first_known.setdefault(address, at)
        for address in turn.settled:
            self._seen_at.setdefault(address, order[0])
            detail: dict[str, object] = {"function": function_of(address)}
            yield _Found(order, "call.settled", at, address, detail)
        if turn.edited is not None:
            yield _Found(order, "replay.edited", at, None, {"code_digest": turn.edited})

    def _delivered(
        self, delivery: Delivery
    ) -> tuple[str, str | None, dict[str, object]]:
        match delivery:
            case ResultDelivered(address=address):
                return "result.delivered", address, self._result(address)
            case TimeAdvanced(at=microseconds):
                return "time.advanced", None, {"to": _instant(microseconds).isoformat()}
            case CancelDelivered(reason=reason):
                return "cancel.delivered", None, {"reason": reason}

    def _result(self, address: str) -> dict[str, object]:
        row = self._results.get(address)
        facts: dict[str, object] = {"function": function_of(address)}
        if row is None:
            return facts | {"error": "<the result is missing>"}
        start = page_of(address)
        if start is not None:
            facts["page_from"] = start
        facts["ok"] = row["ok"]
        if row["ok"]:
            shown = _shown_result(row)
            facts["value"] = shown if start is None else _without_failed_items(shown)
        else:
            facts["error"] = shown_error(row["payload"], row["length"])
        if row["attempt"] > 1:
            facts["attempt"] = row["attempt"]
        if row["started_at"] is not None and row["finished_at"] is not None:
            took = (row["finished_at"] - row["started_at"]).total_seconds()
            facts["duration_ms"] = max(0, round(took * 1000))
        if row["worker_id"] is not None:
            facts["worker"] = shown_worker(row["worker_id"])
        return facts

    def _issued(self) -> Iterator[_Found]:
        """Each call, when the database first knows of it."""
        facts: dict[str, dict[str, object]] = {}
        for row in self._stored.children:
            address = row["parent_address"]
            if address is None:
                continue
            self._known(address, row["created_at"])
            facts[address] = without_nothing(
                function=row["function"],
                child=str(row["execution_id"]),
                detached=row["detached"] or None,
            )
        for row in self._stored.tasks:
            if row["attempt"] == 1:
                self._known(row["address"], row["available_at"])
            facts[row["address"]] = _task_facts(row)
        for row in (*self._stored.attempts, *self._stored.results):
            if row["address"] and row["address"] != RETURNED:
                self._known(row["address"], row["started_at"] or row["finished_at"])
        for row in self._stored.losses:
            if row["address"]:
                self._known(row["address"], row["lost_at"])
        for address, seen_at in self._seen_at.items():
            self._known(address, seen_at)
        for row in self._stored.tasks:
            self._known(row["address"], self._latest)
        for address, at in self._first_known.items():
            detail = facts.get(address) or {"function": function_of(address)}
            order = (self._before_seen(address, at), _ISSUED)
            yield _Found(order, "call.issued", at, address, detail)

    def _known(self, address: str, at: dt.datetime) -> None:
        self._first_known[address] = min(at, self._first_known.get(address, at))

    def _before_seen(self, address: str, at: dt.datetime) -> dt.datetime:
        """Clocks of workers differ a little; causes stand first all the same."""
        started_at = self._stored.execution["started_at"] or at
        return max(started_at, min(at, self._seen_at.get(address, at)))

    def _failed(self) -> Iterator[_Found]:
        for row in self._stored.attempts:
            address, at = row["address"], row["finished_at"]
            detail = without_nothing(
                function=function_of(address),
                attempt=row["attempt"],
                error=shown_error(row["payload"], None),
                worker=None
                if row["worker_id"] is None
                else shown_worker(row["worker_id"]),
            )
            order = (self._before_seen(address, at), _FAILED)
            yield _Found(order, "attempt.failed", at, address, detail)

    def _lost(self) -> Iterator[_Found]:
        """What a worker held when it was lost, whether it had begun or not."""
        for row in self._stored.losses:
            address, at = row["address"], row["lost_at"]
            worker = shown_worker(row["worker_id"])
            if address is None:
                yield _Found((at, _FAILED), "worker.lost", at, None, {"worker": worker})
                continue
            detail: dict[str, object] = {
                "function": function_of(address),
                "attempt": row["attempt"],
                "worker": worker,
            }
            order = (self._before_seen(address, at), _FAILED)
            yield _Found(order, "attempt.lost", at, address, detail)

    def _told(self) -> Iterator[_Found]:
        for row in self._stored.tells:
            value = shown_value(row["payload"], row["length"])
            order = (row["told_at"], _TOLD)
            yield _Found(
                order, "told", row["told_at"], row["address"], {"value": value}
            )

    def _unseen(self) -> Iterator[_Found]:
        """Results that the code has not been given, and may never be."""
        for address, row in self._results.items():
            if address == RETURNED:
                detail: dict[str, object] = {"value": _shown_result(row)}
                order = (row["finished_at"], _SEEN)
                yield _Found(order, "value.returned", row["finished_at"], None, detail)
            elif address not in self._delivered_at:
                at = row["finished_at"]
                order = (self._order_of_unseen(address, at), _SEEN)
                yield _Found(
                    order, "result.recorded", at, address, self._result(address)
                )

    def _order_of_unseen(self, address: str, at: dt.datetime) -> dt.datetime:
        return max(at, self._before_seen(address, self._first_known.get(address, at)))

    def _ended(self) -> Iterator[_Found]:
        row = self._stored.execution
        at, status = row["finished_at"], Status(row["status"])
        if at is None:
            if status is Status.BLOCKED:
                detail = without_nothing(reason=row["blocked_reason"])
                order = (_LAST, _ENDED)
                yield _Found(order, "execution.blocked", row["now"], None, detail)
            return
        outcome = next((r for r in self._stored.results if r["call_id"] == NIL), None)
        detail = {}
        if outcome is not None and outcome["ok"]:
            detail["value"] = shown_value(outcome["payload"], outcome["length"])
        elif outcome is not None:
            detail["error"] = shown_error(outcome["payload"], outcome["length"])
        yield _Found((_LAST, _ENDED), f"execution.{status}", at, None, detail)

    def _cut(self) -> Iterator[_Found]:
        stored = self._stored
        own = (stored.turns, stored.results, stored.attempts, stored.losses)
        others = (stored.tells, stored.tasks, stored.children)
        if any(len(some) >= ROWS_MAX for some in (*own, *others)):
            detail: dict[str, object] = {"rows_max": ROWS_MAX}
            order = (_LAST, _ENDED + 1)
            yield _Found(order, "history.cut", self._latest, None, detail)


_LAST = dt.datetime.max.replace(tzinfo=dt.UTC)


def _shown_arguments(row: Row | None) -> object:
    """``[[positional], {by name}]`` without the empty half."""
    if row is None:
        return None
    shown = shown_value(row["payload"], row["length"])
    return _readable_arguments(shown)


def _readable_arguments(shown: object) -> object:
    match shown:
        case [list() as args, dict() as kwargs] if not kwargs:
            return args
        case [list() as args, dict() as kwargs]:
            return [*args, kwargs]
        case _:
            return shown


def _shown_result(row: Row) -> object:
    """The value of a result; pages of a map may come in parts."""
    if row["parts_bytes"] is None:
        return shown_value(row["payload"], row["length"])
    total = int(row["parts_bytes"]) + row["length"]
    if row["parts"] is None or row["payload"] is None:
        return f"<{total} bytes>"
    try:
        return to_plain(merge_parts([*row["parts"], row["payload"]]))
    except Exception as error:  # noqa: BLE001 - a look must show the rest
        return f"<unreadable: {type(error).__name__}: {error}>"


_ITEM_FAILED_FIELDS = {field.name for field in dataclasses.fields(ItemFailed)}


def _without_failed_items(shown: object) -> object:
    """A page's results, in which items that get another attempt say only that."""
    if not isinstance(shown, list):
        return shown
    return [
        "<tried again>"
        if isinstance(item, dict) and set(item) == _ITEM_FAILED_FIELDS
        else item
        for item in shown
    ]


def _task_facts(row: Row) -> dict[str, object]:
    arguments = None
    if row["arguments"] is not None:
        shown = shown_value(row["arguments"], None)
        arguments = shown if row["is_page"] else _readable_arguments(shown)
    return without_nothing(
        function=row["function"],
        queue=row["queue"],
        page_from=page_of(row["address"]),
        arguments=arguments,
        worker=None if row["worker_id"] is None else shown_worker(row["worker_id"]),
    )


def _instant(microseconds: int) -> dt.datetime:
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return epoch + dt.timedelta(microseconds=microseconds)
