"""W7: what a worker feels of rows that wait, and of a transaction held open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from benchmarks import programs, workloads
from stent import Stent
from stent.store.store import Store

ELSEWHERE = "elsewhere.nobody_here_runs_it"
SATURATED = programs.saturated.name
# More than the slots: what has none is put into the queue, and claimed.
BURST_ACTIVITIES = 125
BURST_SECONDS = 0.25
_INSERT = """
insert into stent.tasks (execution_id, call_id, address, function, queue, available_at)
select $1, gen_random_uuid(), 'waiting', $2, 'default',
       clock_timestamp() - interval '1 hour' + number * interval '1 microsecond'
  from generate_series(1, $3) as n (number)
"""


@dataclass
class ClaimTimes:
    """Milliseconds of the claims of tasks that this process made, with their time."""

    times: list[tuple[float, float]] = field(default_factory=list)

    def between(self, begin: float, end: float) -> list[float]:
        """Those made between two instants of ``time.perf_counter``."""
        return [duration for at, duration in self.times if begin <= at < end]

    @property
    def all(self) -> list[float]:
        """Every one."""
        return [duration for _, duration in self.times]


@contextmanager
def timed_claims() -> Iterator[ClaimTimes]:
    """Time every claim of tasks of the workers in this process: full round trips."""
    seen = ClaimTimes()
    original = Store.claim_tasks

    async def claim_tasks(store: Store, **claim: Any) -> list[asyncpg.Record]:
        began = time.perf_counter()
        rows = await original(store, **claim)
        seen.times.append((began, (time.perf_counter() - began) * 1000))
        return rows

    setattr(Store, "claim_tasks", claim_tasks)  # noqa: B010 - not for the type checker
    try:
        yield seen
    finally:
        setattr(Store, "claim_tasks", original)  # noqa: B010 - as above


async def paced_claims(app: Stent, seconds: float) -> list[float]:
    """Milliseconds of the claims of a worker that is busy, but not behind.

    At full speed a claim's answer waits for the event loop, whatever the server does.
    """
    with timed_claims() as claims:
        await _bursts(app, seconds)
    return claims.all


@asynccontextmanager
async def waiting_elsewhere(app: Stent, url: str, rows: int) -> AsyncIterator[None]:
    """Rows in the worker's queue, of a function that no worker has."""
    owner = await app.dispatch(programs.nap, 36_000)
    await _insert(url, owner, ELSEWHERE, rows)
    yield
    await _delete(url, ELSEWHERE)
    await app.cancel(owner)


@asynccontextmanager
async def waiting_saturated(app: Stent, url: str, rows: int) -> AsyncIterator[None]:
    """Rows in the worker's queue, of a function whose only slot is taken."""
    owner = await app.dispatch(programs.nap, 36_000)
    holder = await app.dispatch(programs.saturated, 0)
    await _wait_until_running(url, holder)
    await _insert(url, owner, SATURATED, rows)
    yield
    await app.pause(function=programs.saturated)
    await app.cancel(holder)
    await app.wait_for(holder)
    await _delete(url, SATURATED)
    await app.cancel(owner)
    await app.resume(function=programs.saturated)


async def _wait_until_running(url: str, execution_id: str) -> None:
    connection = await asyncpg.connect(url)
    query = "select worker_id is not null from stent.executions where execution_id = $1"
    while not await connection.fetchval(query, execution_id):  # noqa: ASYNC110 - a row
        await asyncio.sleep(0.05)
    await connection.close()


async def _insert(url: str, owner: str, function: str, rows: int) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(_INSERT, owner, function, rows, timeout=600)
    # Else what the server does about its log after so large an insert is measured.
    await connection.execute("checkpoint", timeout=600)
    await connection.close()


async def _delete(url: str, function: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(
        "delete from stent.tasks where function = $1", function, timeout=600
    )
    await connection.execute("vacuum stent.tasks", timeout=600)
    await connection.close()


@dataclass(frozen=True)
class Held:
    """Claims before a transaction was held open, and at the end of that time."""

    before_ms: list[float]
    after_ms: list[float]
    rate: float


async def held_open(app: Stent, url: str, seconds: float) -> Held:
    """Bursts of activities, 500/s in all, while an old snapshot is held open.

    Nothing that dies after the snapshot was taken can be cleaned up.
    """
    share = max(5.0, seconds / 10)
    with timed_claims() as claims:
        began = time.perf_counter()
        await _bursts(app, share)
        before = claims.between(began, time.perf_counter())
        connection = await asyncpg.connect(url)
        holding = connection.transaction(isolation="repeatable_read")
        await holding.start()
        await connection.fetchval("select count(*) from stent.leases")
        began = time.perf_counter()
        done = await _bursts(app, seconds)
        ended = time.perf_counter()
        await holding.rollback()
        await connection.close()
    return Held(
        before, claims.between(ended - share, ended), done / max(ended - began, seconds)
    )


async def _bursts(app: Stent, seconds: float) -> int:
    """A gather every quarter of a second; how many activities were done."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        await workloads.fan_out(app, BURST_ACTIVITIES)
        done += BURST_ACTIVITIES
        due = done / BURST_ACTIVITIES * BURST_SECONDS
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
    return done
