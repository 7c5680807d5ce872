"""Limits over a fleet whose workers are killed: by what the activities wrote."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from stent import Stent
from tests.e2e.harness import workload
from tests.e2e.harness.checks import check_nothing_left, read_committed
from tests.e2e.harness.fleet import Fleet, say
from tests.e2e.harness.ledger import Record

WORKERS = 3
LIMIT = 3
PAUSE_SECONDS = 0.05


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    """Dispatches; the workers are other processes."""
    async with Stent(database_url) as app:
        yield app


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "function", [workload.limited_fan_out, workload.limited_map], ids=["calls", "map"]
)
async def test_a_limit_holds_while_holders_are_killed(
    app: Stent, tmp_path: Path, function: Any
) -> None:
    """Never more than three at a time, and all of it is done."""
    count, chance = 150, random.Random(7)
    died: dict[int, float] = {}
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url) for _ in range(WORKERS)]
        execution_id = await app.dispatch(function, count, PAUSE_SECONDS)
        outcome = asyncio.ensure_future(app.wait_for(execution_id))
        for _ in range(4):
            await fleet.wait_for_more("start", 12, outcome.done)
            victim = chance.randrange(WORKERS)
            await workers[victim].kill()
            died[workers[victim].pid] = time.monotonic()
            workers[victim] = await fleet.start(url=app.url)
        assert (await outcome).unwrap() == sum(2 * n for n in range(count))
        records = fleet.ledger.records("start", "end", "broken")
        spans = list(running_spans(records, died))
        assert most_at_once(spans) <= LIMIT
        say(f"{len(spans)} attempts, {use_of_slots(spans, died):.0%} of the slots used")
        await read_committed(app.url)
        await check_nothing_left(app.url)
        states = {one.name: one for one in await app.limits()}
        assert all(state.keyed or state.held <= LIMIT for state in states.values())


@pytest.mark.timeout(90)
async def test_keys_have_limits_of_their_own_while_holders_are_killed(
    app: Stent, tmp_path: Path
) -> None:
    """One of each key at a time, and the keys do not wait for each other."""
    count, chance = 60, random.Random(3)
    died: dict[int, float] = {}
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url) for _ in range(WORKERS)]
        execution_id = await app.dispatch(workload.keyed_fan_out, count, PAUSE_SECONDS)
        outcome = asyncio.ensure_future(app.wait_for(execution_id))
        for _ in range(3):
            await fleet.wait_for_more("start", 8, outcome.done)
            victim = chance.randrange(WORKERS)
            await workers[victim].kill()
            died[workers[victim].pid] = time.monotonic()
            workers[victim] = await fleet.start(url=app.url)
        assert (await outcome).unwrap() == sum(2 * n for n in range(count))
        spans = list(
            running_spans(fleet.ledger.records("start", "end", "broken"), died)
        )
        assert 1 < most_at_once(spans) <= 3


@pytest.mark.timeout(90)
async def test_limited_workflows_that_await_children_finish(
    app: Stent, tmp_path: Path
) -> None:
    """Sixty of them, three at a time, though an owner is killed: no deadlock."""
    async with Fleet(tmp_path) as fleet:
        workers = [await fleet.start(url=app.url, slots=10) for _ in range(2)]
        execution_id = await app.dispatch(workload.limited_flows, 60, 0.01)
        outcome = asyncio.ensure_future(app.wait_for(execution_id))
        await fleet.wait_for_more("start", 20, outcome.done)
        await workers[0].kill()
        assert (await outcome).unwrap() == sum(2 * n for n in range(60))
        open_now: set[str] = set()
        for record in fleet.ledger.records("saw"):
            execution = str(record.facts["execution"])
            if record.facts["what"] == "('begin',)":
                open_now.add(execution)
            else:
                open_now.discard(execution)
            assert len(open_now) <= LIMIT
        await check_nothing_left(app.url)


@pytest.mark.timeout(60)
async def test_workflows_do_not_take_the_slots_of_their_activities(
    app: Stent, tmp_path: Path
) -> None:
    """Ten workflows of five calls each, with ten slots in all."""
    async with Fleet(tmp_path) as fleet:
        await fleet.start(url=app.url, slots=10)
        ids = [await app.dispatch(workload.fan_out, 5, 0.01) for _ in range(10)]
        expected = sum(2 * n + 2 * (1000 + n) for n in range(5))
        assert [(await app.wait_for(i)).unwrap() for i in ids] == [expected] * 10


def running_spans(
    records: Iterable[Record], died: dict[int, float]
) -> Iterable[tuple[float, float]]:
    """When each attempt ran, until its end or that of its process."""
    begun: dict[object, Record] = {}
    for record in records:
        nonce = record.facts["nonce"]
        if record.event == "start":
            begun[nonce] = record
        else:
            yield begun.pop(nonce).at, record.at
    for record in begun.values():
        yield record.at, died[record.pid]


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """How many ran at the same time, at most."""
    changes = sorted([(at, 1) for at, _ in spans] + [(at, -1) for _, at in spans])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def use_of_slots(spans: list[tuple[float, float]], died: dict[int, float]) -> float:
    """Part of the slots in use, leaving out a second and a half after each kill."""
    dead = [(at, at + 1.5) for at in died.values()]
    begin, end = min(at for at, _ in spans), max(at for _, at in spans)
    used = whole = 0.0
    step = 0.001
    at = begin
    while at < end - 2 * PAUSE_SECONDS:
        if not any(first <= at < last for first, last in dead):
            whole += LIMIT * step
            used += step * min(LIMIT, sum(first <= at < last for first, last in spans))
        at += step
    return used / whole if whole else 1.0
