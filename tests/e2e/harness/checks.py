"""What must hold of the evidence, whatever was killed."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg

from stent import Stent
from stent.codec import decode_many
from stent.pages import ItemFailed
from stent.store.store import merge_parts, part_indexes, part_of_page
from tests.e2e.harness.ledger import Ledger, Record, by_call

PAGE = re.compile(r"\[(?P<start>\d+)\+(?P<size>\d+)\]#[0-9a-f]+$")
EFFECTS = "create table if not exists effects (execution text, address text)"


@dataclass(frozen=True, slots=True)
class Committed:
    """What the database has of calls at an instant.

    Attributes:
        at: Seconds of the monotonic clock, after it was read.
        calls: Execution and address of every call with a result.
        items: The same of items of maps, of pages that are not done.
        again: Items that are calls of their own, because they failed in their page or
            it was taken apart, with their last attempt in the page: not its result
            counts for them, but their own.
    """

    at: float
    calls: frozenset[tuple[str, str]]
    items: frozenset[tuple[str, str]]
    again: dict[tuple[str, str], int]

    def has(self, call: tuple[str, str], attempt: int) -> bool:
        """Whether the call, or the page it is an item of, is committed."""
        execution, address = call
        if call in self.again:
            return call in self.calls or attempt <= self.again[call]
        page = (execution, address.rpartition("/")[0])
        return call in self.calls or call in self.items or page in self.calls


async def read_committed(url: str) -> Committed:
    """Once nothing is being executed on behalf of a process that is gone."""
    connection = await asyncpg.connect(url)
    try:
        await wait_until_settled(connection)
        calls = await connection.fetch(
            """
            select r.execution_id, r.address, r.ok, r.payload,
                   (select array_agg(s.payload) from stent.segments s
                     where s.execution_id = r.execution_id and s.call_id = r.call_id)
                   as segments
              from stent.results r where r.address <> ''
            """
        )
        parts = await connection.fetch(
            "select execution_id, address, s.payload"
            "  from stent.segments s join stent.tasks t using (execution_id, call_id)"
        )
    finally:
        await connection.close()
    items: set[tuple[str, str]] = set()
    again: dict[tuple[str, str], int] = {}
    for part in parts:
        for address, attempts in _items_of(part["address"], part["payload"]):
            item = str(part["execution_id"]), address
            if attempts is None:
                items.add(item)
            else:
                again[item] = attempts
    for row in calls:
        if row["ok"] and PAGE.search(row["address"]):
            segments = row["segments"]
            payload = merge_parts([*segments, row["payload"]]) if segments else None
            whole = part_of_page(range_of(row["address"]), payload or row["payload"])
            for address, attempts in _items_of(row["address"], whole):
                if attempts is not None:
                    again[str(row["execution_id"]), address] = attempts
    found = frozenset((str(row["execution_id"]), row["address"]) for row in calls)
    return Committed(time.monotonic(), found, frozenset(items), again)


def range_of(address: str) -> list[int]:
    """Indexes of the items of a page, within it."""
    page = PAGE.search(address)
    assert page is not None
    return list(range(int(page["size"])))


def _items_of(address: str, part: bytes) -> list[tuple[str, int | None]]:
    """Address of each item in a part of a page's result; its attempts if it failed."""
    page = PAGE.search(address)
    assert page is not None
    values = decode_many(merge_parts([part]))
    return [
        (
            f"{address}/{int(page['start']) + index}",
            value.number if isinstance(value, ItemFailed) else None,
        )
        for index, value in zip(sorted(part_indexes(part)), values, strict=True)
    ]


async def wait_until_settled(connection: asyncpg.Connection) -> None:
    """Until no other backend of this database executes a statement."""
    busy = (
        "select count(*) from pg_stat_activity where datname = current_database()"
        " and pid <> pg_backend_pid() and state = 'active'"
        " and wait_event_type is distinct from 'Client'"
    )
    while await connection.fetchval(busy):  # noqa: ASYNC110 - tables have no events
        await asyncio.sleep(0.005)


def check_pasts(records: Iterable[Record]) -> int:
    """Every life of an execution sees what the ones before saw; counts the lives."""
    lives: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.event == "saw":
            lives.setdefault((record.execution, record.life), []).append(record.what)
    longest: dict[str, list[str]] = {}
    for (execution, _), seen in lives.items():
        known = longest.setdefault(execution, [])
        common = min(len(known), len(seen))
        assert seen[:common] == known[:common], f"{execution} has two pasts"
        if len(seen) > len(known):
            longest[execution] = seen
    return len(lives)


def check_calls(
    records: Collection[Record],
    *,
    committed: Iterable[Committed] = (),
    lost: Collection[int] = (),
    resumed: Collection[tuple[int, float]] = (),
) -> int:
    """No committed call runs again; one in flight does once a loss at most.

    Args:
        records: Of the ledger.
        committed: What was read from the database at some moments.
        lost: Process ids of workers whose work was taken over, one per loss.
        resumed: Process ids and instants of workers that were frozen until then. What
            such a process was about to do when it stopped, it does first of all: no
            check of its own could have been later.
    Returns:
        Number of attempts that were made again because of a loss.
    """
    begun_before = _first_of(records, resumed)
    starts = sorted(
        (r for r in records if r.event == "start" and r not in begun_before),
        key=lambda record: record.at,
    )
    for known in committed:
        again = [r for r in starts if r.at > known.at and known.has(r.call, r.attempt)]
        assert not again, f"a committed call ran again: {again}"
    repeated = 0
    for call, attempts in by_call(starts):
        assert len({r.key for r in attempts}) == 1, f"{call} has two keys: {attempts}"
        numbers: dict[int, list[Record]] = {}
        for record in attempts:
            numbers.setdefault(record.attempt, []).append(record)
        for same in numbers.values():
            for record in same[:-1]:
                assert record.pid in lost, f"{call} ran twice for no reason: {same}"
            assert len(same) <= 1 + len(lost), f"{call} ran too often: {same}"
            repeated += len(same) - 1
    return repeated


def _first_of(
    records: Collection[Record], resumed: Collection[tuple[int, float]]
) -> list[Record]:
    """What each process did first after it was resumed."""
    firsts = []
    for pid, instant in resumed:
        later = [r for r in records if r.pid == pid and r.at >= instant]
        firsts += sorted(later, key=lambda record: record.at)[:1]
    return firsts


def check_ended(records: Collection[Record], committed: Committed) -> None:
    """Every committed result of ``work`` belongs to an attempt that ended."""
    ended = {r.call for r in records if r.event in {"end", "broken"}}
    started = {r.call for r in records if r.event == "start"}
    missing = (started & committed.calls) - ended
    assert not missing, f"results of attempts that never ended: {missing}"


async def check_nothing_left(url: str) -> None:
    """No task, inbox row or owned execution survives the executions."""
    connection = await asyncpg.connect(url)
    try:
        left = await connection.fetchrow(
            """
            select (select count(*) from stent.tasks t
                      join stent.executions e using (execution_id)
                     where e.finished_at is null) as tasks,
                   (select count(*) from stent.inbox) as inbox,
                   (select count(*) from stent.executions
                     where finished_at is null) as executions,
                   (select count(*) from stent.executions
                     where worker_id is not null and finished_at is not null) as owned
            """
        )
    finally:
        await connection.close()
    assert set(left.values()) == {0}, dict(left)


async def check_effects(url: str, execution_id: str, count: int) -> None:
    """Every transactional call has left exactly one row."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "select address, count(*) from effects where execution = $1 group by 1",
            execution_id,
        )
    finally:
        await connection.close()
    assert [row["count"] for row in rows] == [1] * count


async def prepare_effects(url: str) -> None:
    """Create the table that transactional activities write to."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(EFFECTS)
    finally:
        await connection.close()


class Databases:
    """Clones of the template, for tests that need several at once."""

    def __init__(self, server_url: str, template: str) -> None:
        """Create it; enter it to clone.

        Args:
            server_url: Of the maintenance database.
            template: Name of a database with the schema of stent.
        """
        self._server_url = server_url
        self._template = template
        self._names: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        administrator = await asyncpg.connect(self._server_url)
        for name in self._names:
            await administrator.execute(f"drop database {name} with (force)")
        await administrator.close()

    async def clone(self) -> str:
        """A fresh database; its connection string."""
        name = f"test_{uuid4().hex}"
        administrator = await asyncpg.connect(self._server_url)
        await administrator.execute(
            f"create database {name} template {self._template} strategy wal_log"
        )
        await administrator.close()
        self._names.append(name)
        url = urlsplit(self._server_url)._replace(path=f"/{name}").geturl()
        await prepare_effects(url)
        return url


async def undisturbed(app: Stent, ledger: Ledger) -> None:
    """Nothing ran twice, and nobody saw two pasts, although nobody was killed."""
    check_calls(ledger.records())
    check_pasts(ledger.records())
    await check_nothing_left(app.url)
