"""``stent.queue_depth``: what waits and runs, and what it costs to ask."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, urlsplit
from uuid import UUID, uuid4

import anyio
import asyncpg
import pytest
from asyncpg import Connection
from click.testing import CliRunner

from stent import QueueDepth, Settings, Stent, UsageError, durable, sleep
from stent.cli.main import main
from stent.clock import new_execution_id

EMPTY = QueueDepth(
    queue="default",
    function="f",
    kind="task",
    ready=0,
    scheduled=0,
    running=0,
    waiting=0,
    oldest_ready=None,
    capped=False,
)
ROWS = 30_000
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "sql.md"


@durable(name="depth.double", kind="activity")
async def double(n: int) -> int:
    return 2 * n


@durable(name="depth.nap")
async def nap(seconds: int) -> None:
    await sleep(seconds)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    async with Stent(settings=Settings(database_url=database_url)) as opened:
        yield opened


async def add_tasks(
    connection: Connection,
    count: int,
    *,
    age: timedelta = timedelta(hours=1),
    worker_id: UUID | None = None,
    function: str = "f",
    priority: int = 0,
) -> None:
    await connection.execute(
        "insert into stent.tasks (execution_id, call_id, address, function, queue,"
        " available_at, worker_id, priority)"
        " select gen_random_uuid(), gen_random_uuid(), 'a', $2, 'default',"
        "        clock_timestamp() - $3::interval, $4, $5 from generate_series(1, $1)",
        count,
        function,
        age,
        worker_id,
        priority,
    )


async def add_worker(connection: Connection, lease: timedelta) -> UUID:
    worker_id = uuid4()
    await connection.execute(
        "insert into stent.leases"
        " (worker_id, expires_at, liveness_key, host, pid, slots, queues)"
        " values ($1, clock_timestamp() + $2::interval, 1, 'h', 1, 1, '{default}')",
        worker_id,
        lease,
    )
    return worker_id


async def add_execution(
    connection: Connection, wake_at: str, *, worker_id: UUID | None = None
) -> UUID:
    """An execution of ``f``; ``wake_at`` is an SQL expression."""
    execution_id = new_execution_id(time.time())
    await connection.execute(
        "insert into stent.executions (execution_id, function, kind, queue, wake_at,"
        " worker_id, seed, key_seed, root_id)"
        f" values ($1, 'f', 'workflow', 'default', {wake_at}, $2, '', $1, $1)",
        execution_id,
        worker_id,
    )
    return execution_id


def without_age(depth: QueueDepth) -> QueueDepth:
    return replace(depth, oldest_ready=None)


async def test_nothing_waits(app: Stent) -> None:
    """An empty database has no lines."""
    assert await app.queue_depth() == []


async def test_tasks_by_what_they_wait_for(app: Stent, connection: Connection) -> None:
    """Ready, later, held by the living, and, as ready, held by the lost."""
    alive = await add_worker(connection, timedelta(minutes=1))
    lost = await add_worker(connection, timedelta(seconds=-1))
    await add_tasks(connection, 3)
    await add_tasks(connection, 2, age=timedelta(hours=2), priority=-5)
    await add_tasks(connection, 4, age=timedelta(hours=-1))
    await add_tasks(connection, 5, age=timedelta(hours=3), worker_id=alive)
    await add_tasks(connection, 6, worker_id=lost)
    await add_tasks(connection, 7, worker_id=uuid4())
    (depth,) = await app.queue_depth()
    assert without_age(depth) == replace(
        EMPTY, ready=3 + 2 + 6 + 7, scheduled=4, running=5
    )
    # The oldest that is ready has another priority; what runs has no say.
    assert depth.oldest_ready is not None
    assert timedelta(hours=2) <= depth.oldest_ready < timedelta(hours=3)


async def test_executions_by_what_they_wait_for(
    app: Stent, connection: Connection
) -> None:
    """Running is told from waiting in memory; an inbox makes ready."""
    alive = await add_worker(connection, timedelta(minutes=1))
    now, later, minus_infinity = (
        "clock_timestamp() - interval '1 minute'",
        "clock_timestamp() + interval '1 hour'",
        "'-infinity'",
    )
    await add_execution(connection, now)
    await add_execution(connection, minus_infinity)
    await add_execution(connection, later)
    parked = await add_execution(connection, "null")
    woken = [
        await add_execution(connection, "null"),
        await add_execution(connection, later),
    ]
    for execution_id in (*woken, *woken):
        await connection.execute(
            "insert into stent.inbox (execution_id, kind) values ($1, 'result')",
            execution_id,
        )
    for wake_at in (minus_infinity, later, "null", "null"):
        await add_execution(connection, wake_at, worker_id=alive)
    lost = uuid4()
    for wake_at in (minus_infinity, now, later, "null"):
        await add_execution(connection, wake_at, worker_id=lost)
    (depth,) = await app.queue_depth()
    assert without_age(depth) == replace(
        EMPTY, kind="execution", ready=2 + 2 + 2, scheduled=1 + 1, running=1, waiting=3
    )
    assert depth.oldest_ready is not None
    assert timedelta(minutes=1) <= depth.oldest_ready < timedelta(minutes=10)
    await connection.execute(
        "insert into stent.inbox (execution_id, kind) values ($1, 'cancel')", parked
    )
    (depth,) = await app.queue_depth()
    assert depth.ready == 7


async def test_what_came_back_is_as_old_as_its_last_turn(
    app: Stent, connection: Connection
) -> None:
    """A workflow of days that was handed over a minute ago is no alarm."""
    execution_id = await add_execution(connection, "'-infinity'")
    await connection.execute(
        "update stent.executions set created_at = now() - interval '3 days'"
    )
    (depth,) = await app.queue_depth()
    assert depth.oldest_ready is not None
    assert depth.oldest_ready > timedelta(days=2)
    await connection.execute(
        "insert into stent.journal (execution_id, position, payload, recorded_at)"
        " values ($1, 0, '', now() - interval '1 day'),"
        "        ($1, 1, '', now() - interval '1 minute')",
        execution_id,
    )
    (depth,) = await app.queue_depth()
    assert depth.oldest_ready is not None
    assert timedelta(minutes=1) <= depth.oldest_ready < timedelta(hours=1)


async def test_lines_are_in_order_and_complete(
    app: Stent, connection: Connection
) -> None:
    """Each queue and function once, whatever the priorities; one queue on demand."""
    names = ["a", "b b", "Z", "ä", "zz"]
    for function in names:
        for priority in (-3, 0, 0, 7):
            await add_tasks(connection, 2, function=function, priority=priority)
    await app.dispatch(double.options(queue="other"), 1)
    found = [(d.queue, d.function, d.kind, d.ready) for d in await app.queue_depth()]
    ordered = await connection.fetch(
        "select n from unnest($1::text[]) n order by n", names
    )
    assert found == [
        *[("default", row["n"], "task", 8) for row in ordered],
        ("other", "depth.double", "execution", 1),
    ]
    assert [d.queue for d in await app.queue_depth("other")] == ["other"]


async def test_counting_stops(app: Stent, connection: Connection) -> None:
    """Up to the limit counts are exact; from there on they say so."""
    await add_tasks(connection, 5)
    await add_tasks(connection, 4, age=timedelta(hours=-1))
    (exact,) = await app.queue_depth(rows_max=6)
    assert (exact.ready, exact.scheduled, exact.capped) == (5, 4, False)
    (depth,) = await app.queue_depth(rows_max=3)
    assert (depth.ready, depth.scheduled, depth.capped) == (3, 3, True)
    for refused in (0, -1, 1_000_001):
        with pytest.raises(UsageError, match="rows_max"):
            await app.queue_depth(rows_max=refused)


async def rows_read(connection: Connection, table: str) -> tuple[int, int]:
    """Rows of a table that scans, and that indexes, have brought so far."""
    await connection.execute("select pg_stat_force_next_flush()")
    row = await connection.fetchrow(
        "select seq_tup_read, idx_tup_fetch from pg_stat_user_tables"
        " where schemaname = 'stent' and relname = $1",
        table,
    )
    return row["seq_tup_read"], row["idx_tup_fetch"]


async def cost_of_asking(connection: Connection, table: str) -> tuple[int, int]:
    """Rows that one question reads by scans and by indexes."""
    before = await rows_read(connection, table)
    await connection.fetch("select * from stent.count_queues(1000)")
    after = await rows_read(connection, table)
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.timeout(60)
async def test_the_cost_does_not_grow_with_the_backlog(connection: Connection) -> None:
    """Many rows and many lines are read up to the limit; nothing is scanned."""
    await add_tasks(connection, ROWS)
    scanned, fetched = await cost_of_asking(connection, "tasks")
    assert scanned == 0
    assert 1_000 <= fetched <= 1_010
    # 300 lines: each is counted up to the 100 rows that are promised to it.
    for function in range(100):
        for priority in range(3):
            await add_tasks(connection, 110, function=f"g{function}", priority=priority)
    scanned, fetched = await cost_of_asking(connection, "tasks")
    assert scanned == 0
    assert 30_000 <= fetched <= 32_000


@pytest.mark.timeout(60)
async def test_the_cost_does_not_grow_with_waiting_executions(
    connection: Connection,
) -> None:
    """Neither with those that wait in a queue nor with those in memory."""
    await connection.execute(
        "insert into stent.executions (execution_id, function, kind, queue, wake_at,"
        " worker_id, seed, key_seed, root_id)"
        " select gen_random_uuid(), 'f', 'workflow', 'default',"
        "        clock_timestamp() - interval '1 hour',"
        "        case when n % 2 = 0 then cast($2 as uuid) end, '', gen_random_uuid(),"
        "        gen_random_uuid() from generate_series(1, $1) n",
        ROWS,
        await add_worker(connection, timedelta(minutes=1)),
    )
    scanned, fetched = await cost_of_asking(connection, "executions")
    assert scanned == 0
    assert 2_000 <= fetched <= 2_020


async def test_a_monitor_needs_no_right_on_the_tables(
    connection: Connection, database_url: str
) -> None:
    """Reading the view is all that a scaler may do; payloads stay unseen."""
    await add_tasks(connection, 2)
    role, password = f"monitor_{uuid4().hex}", uuid4().hex
    await connection.execute(f"create role {role} login password '{password}'")
    try:
        await connection.execute(f"grant usage on schema stent to {role}")
        await connection.execute(f"grant select on stent.queue_depth to {role}")
        parts = urlsplit(database_url)
        host = parts.netloc.rpartition("@")[2]
        other = parts._replace(netloc=f"{role}:{quote(password)}@{host}").geturl()
        monitor = await asyncpg.connect(other)
        try:
            assert await monitor.fetchval("select ready from stent.queue_depth") == 2
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await monitor.fetch("select * from stent.tasks")
        finally:
            await monitor.close()
    finally:
        await connection.execute(f"drop owned by {role}")
        await connection.execute(f"drop role {role}")


async def test_a_sleeping_workflow_waits_and_comes_back(
    app: Stent, connection: Connection
) -> None:
    """In memory it waits; after a drain others may have it, and nothing runs."""
    await app.dispatch(nap, 3600)
    await app.dispatch(nap.options(delay="1h"), 0)
    (depth,) = await app.queue_depth()
    assert (depth.function, depth.ready, depth.scheduled) == ("depth.nap", 1, 1)

    async def until(*wanted: int) -> None:
        found: tuple[int, ...] = ()
        with anyio.fail_after(15):
            while found != wanted:
                (depth,) = await app.queue_depth()
                free = depth.ready + depth.scheduled
                found = (free, depth.running, depth.waiting)

    async with anyio.create_task_group() as group:
        group.start_soon(app.serve)
        await until(1, 0, 1)
        await app.drain()
        group.cancel_scope.cancel()
    await until(2, 0, 0)


async def test_the_command_prints_it(app: Stent, connection: Connection) -> None:
    """One object a line with the names of the view, or a table."""
    await add_tasks(connection, 12)

    def invoke(*words: str) -> str:
        arguments = ["--url", app.url, "queues", *words]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    output = await asyncio.to_thread(invoke, "--json")
    (row,) = await connection.fetch("select * from stent.queue_depth")
    shown = json.loads(output)
    assert shown.pop("oldest_ready_seconds") > 3_600
    assert shown | {"oldest_ready_seconds": row["oldest_ready_seconds"]} == dict(row)
    table = await asyncio.to_thread(invoke, "--rows-max", "10")
    assert table.split() == [
        *("QUEUE", "FUNCTION", "KIND"),
        *("READY", "SCHEDULED", "RUNNING", "WAITING", "OLDEST"),
        *("default", "f", "task", "10+", "0", "0", "0", "1h"),
    ]
    assert await asyncio.to_thread(invoke, "--queue", "none", "--json") == ""


async def test_the_reference_is_that_of_the_view(connection: Connection) -> None:
    """Names, types and order of the columns; and every statement of the page runs."""
    text = PAGE.read_text(encoding="utf-8")
    columns = await connection.fetch(
        "select column_name, data_type from information_schema.columns"
        " where table_schema = 'stent' and table_name = 'queue_depth'"
        " order by ordinal_position"
    )
    documented = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", text, re.MULTILINE)
    assert documented == [tuple(row) for row in columns]
    blocks = re.findall(r"^```sql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    transaction = connection.transaction()
    await transaction.start()
    for block in blocks:
        await connection.execute(block)
    await transaction.rollback()
