"""Floors: what the database alone costs, measured in the same run."""

from __future__ import annotations

import asyncio
import time
import uuid

import asyncpg

BATCH_ROWS = 500
_TABLES = """
drop schema if exists stent_floor cascade;
create schema stent_floor;
create table stent_floor.task (
    task_id uuid primary key, function text not null, arguments bytea not null,
    worker_id integer, available_at timestamptz not null default clock_timestamp()
) with (fillfactor = 70);
create index on stent_floor.task (function, available_at, task_id);
create table stent_floor.result (task_id uuid primary key, payload bytea not null);
create table stent_floor.single (number integer primary key);
"""
_INSERT = """
insert into stent_floor.task (task_id, function, arguments)
select task_id, 'no_op', arguments
  from unnest($1::uuid[], $2::bytea[]) as n (task_id, arguments)
"""
_CLAIM = """
with ready as (
    select task_id from stent_floor.task
     where function = 'no_op' and worker_id is null
     order by available_at, task_id limit $1 for update skip locked)
update stent_floor.task t set worker_id = 1 from ready where t.task_id = ready.task_id
returning t.task_id, t.arguments
"""
_COMPLETE = """
with done as (
    delete from stent_floor.task where task_id = any ($1::uuid[]) returning task_id)
insert into stent_floor.result (task_id, payload)
select d.task_id, d.payload from unnest($1::uuid[], $2::bytea[]) as d (task_id, payload)
"""


async def rows_per_second(url: str, rows: int) -> float:
    """F1: rows through insert, claim and complete, in batches of 500."""
    connection = await asyncpg.connect(url)
    await connection.execute(_TABLES)
    payload = b"x" * 64
    began = time.perf_counter()
    for _ in range(0, rows, BATCH_ROWS):
        ids = [uuid.uuid4() for _ in range(BATCH_ROWS)]
        await connection.execute(_INSERT, ids, [payload] * BATCH_ROWS)
    while claimed := await connection.fetch(_CLAIM, BATCH_ROWS):
        ids = [row["task_id"] for row in claimed]
        await connection.execute(_COMPLETE, ids, [payload] * len(ids))
    seconds = time.perf_counter() - began
    await connection.close()
    return rows / seconds


async def commit_ms(url: str, count: int) -> float:
    """F2: milliseconds of a one-row insert with its commit, median."""
    connection = await asyncpg.connect(url)
    await connection.execute(_TABLES)
    times = []
    for number in range(count):
        began = time.perf_counter()
        await connection.execute("insert into stent_floor.single values ($1)", number)
        times.append(time.perf_counter() - began)
    await connection.close()
    return sorted(times)[count // 2] * 1000


async def notify_ms(url: str, count: int) -> float:
    """F3: milliseconds of an insert with NOTIFY until a listener has it, median."""
    sender, listener = await asyncpg.connect(url), await asyncpg.connect(url)
    await sender.execute(_TABLES)
    heard = asyncio.Event()
    await listener.add_listener("stent_floor", lambda *_: heard.set())
    times = []
    for number in range(count):
        heard.clear()
        began = time.perf_counter()
        async with sender.transaction():
            await sender.execute("insert into stent_floor.single values ($1)", number)
            await sender.execute("select pg_notify('stent_floor', '')")
        await heard.wait()
        times.append(time.perf_counter() - began)
    await sender.close()
    await listener.close()
    return sorted(times)[count // 2] * 1000
