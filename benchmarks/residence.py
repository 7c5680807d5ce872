"""W11 and W12: what a long journal costs to replay, and executions that only wait."""

from __future__ import annotations

import asyncio
import subprocess
import time
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from benchmarks import programs, workloads
from benchmarks.places import worker_processes
from stent import Stent
from stent.journal import Head, Journal
from stent.replay import Finished, replay
from stent.store.session import Session
from stent.store.store import Store

SETTLE_SECONDS = 5
NAP_SECONDS = 36_000
_HEAD = """
select e.execution_id, e.function, p.payload as arguments, e.seed, e.key_seed,
       e.root_id,
       cast(extract(epoch from e.started_at) * 1000000 as bigint) as started_at
  from stent.executions e
  join stent.payloads p on p.execution_id = e.execution_id
       and p.call_id = '00000000-0000-0000-0000-000000000000'
 where e.execution_id = $1
"""
# Its own connection looks twice; that is all it adds.
_TRANSACTIONS = """
select xact_commit + xact_rollback from pg_stat_database
 where datname = current_database()
"""
# Resident or not: when the database knows when to wake it, its worker may die.
_PARKED = """
select count(*) from stent.executions
 where started_at is not null and wake_at > now() and isfinite(wake_at)
"""


@dataclass(frozen=True)
class Replayed:
    """Of a journal with ``entries`` deliveries: milliseconds to read and to replay."""

    entries: int
    load_ms: float
    replay_ms: float


async def record_sequence(app: Stent, steps: int) -> UUID:
    """Run a workflow of ``steps`` activities, one after the other, to its end."""
    execution_id = await app.dispatch(programs.sequence, steps)
    outcome = await app.wait_for(execution_id, timeout=workloads.RUN_SECONDS_MAX)
    outcome.unwrap()
    return UUID(execution_id)


async def replay_once(url: str, execution_id: UUID) -> Replayed:
    """Read the journal as a worker that takes over does, and replay it.

    Raises:
        AssertionError: The replay did not come to the same end.
    """
    session = Session(url, "bench")
    connection = await asyncpg.connect(url)
    row = await connection.fetchrow(_HEAD, execution_id)
    await connection.close()
    began = time.perf_counter()
    rows = await Store(session).load_stored([execution_id])
    stored = rows[execution_id].read()
    loaded = time.perf_counter()
    journal = Journal(
        head=Head(**row),
        code_digest=programs.sequence.code_digest,
        turns=stored.turns,
        results=stored.results,
        issued=stored.issued,
    )
    outcome = replay(programs.sequence, journal)
    ended = time.perf_counter()
    await session.close()
    if not isinstance(outcome, Finished) or not outcome.recorded.ok:
        message = f"the replay ended with {outcome}"
        raise AssertionError(message)
    entries = sum(len(turn.deliveries) for turn in stored.turns)
    return Replayed(entries, (loaded - began) * 1000, (ended - loaded) * 1000)


@dataclass(frozen=True)
class Asleep:
    """What sleeping executions cost the one worker that parked them."""

    park_rate: float
    memory_before_mib: float
    memory_mib: float
    transactions_per_second: float


async def asleep(url: str, count: int, look_seconds: float) -> Asleep:
    """Let ``count`` executions go to sleep on one worker, then watch it idle.

    ``url`` is a database of its own: every transaction in it counts.
    """
    async with worker_processes(url, 1) as (worker,):
        before = memory_mib(worker.pid)
        async with Stent(url) as app:
            began = time.perf_counter()
            await app.dispatch_many(programs.nap, [NAP_SECONDS] * count)
        connection = await asyncpg.connect(url)
        while await connection.fetchval(_PARKED) < count:
            if time.perf_counter() - began > workloads.RUN_SECONDS_MAX:
                message = f"{count} executions did not park"
                raise TimeoutError(message)
            await asyncio.sleep(0.2)
        seconds = time.perf_counter() - began
        await asyncio.sleep(SETTLE_SECONDS)
        first = await connection.fetchval(_TRANSACTIONS)
        await asyncio.sleep(look_seconds)
        last = await connection.fetchval(_TRANSACTIONS)
        await connection.close()
        rate = (last - first) / look_seconds
        return Asleep(count / seconds, before, memory_mib(worker.pid), rate)


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)],  # noqa: S607 - of the system
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout) / 1024
