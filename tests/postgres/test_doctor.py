"""``stent db doctor``: every finding, by making it true on a real server."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from uuid import uuid4

import asyncpg
import pytest
from asyncpg import Connection
from click.testing import CliRunner

from stent import Settings, Stent, durable
from stent.cli.main import main
from stent.doctor import CHECKS, Finding, Level, examine
from stent.store.migrate import (
    apply_migrations,
    available_migrations,
    created_objects,
)
from tests.e2e.harness.pooler import pooling
from tests.servers import Server, binaries_or_skip, running, short_directory

UNKNOWN = "a function that nobody has"


@durable
async def step(x: int) -> int:
    return x


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of its own: findings about a server are not for other tests to meet."""
    with running(
        binaries_or_skip(18),
        max_prepared_transactions=5,
        max_replication_slots=5,
        wal_level="replica",
    ) as server:
        yield server


@pytest.fixture
async def url(server: Server) -> AsyncIterator[str]:
    """A fresh database with the schema."""
    name = f"test_{uuid4().hex}"
    administrator = await asyncpg.connect(server.url)
    await administrator.execute(f"create database {name}")
    connection = await asyncpg.connect(server.url_of(name))
    await apply_migrations(connection)
    await connection.close()
    yield server.url_of(name)
    await administrator.execute(f"drop database {name} with (force)")
    await administrator.close()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Connection]:
    """A connection to it."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


def now() -> dt.datetime:
    return dt.datetime.now(tz=dt.UTC)


async def look(url: str, **settings: object) -> dict[str, Finding]:
    """The findings by name; of several of one name the last."""
    found = await examine(url, Settings(database_url=url, **settings), clock=now)  # type: ignore[arg-type]
    return {finding.name: finding for finding in found}


async def age_transactions(finding: str, url: str) -> Finding:
    """Look until something that gets older is old enough to be found."""
    while finding not in (found := await look(url)):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return found[finding]


async def test_healthy_database_has_no_findings(url: str) -> None:
    """With a worker that has just run something."""
    async with Stent.bootstrap(url, serve=True) as app:
        assert (await app.wait_for(await app.dispatch(step, 1))).ok
        assert await look(url) == {}


async def test_connection_that_fails_is_an_error(server: Server) -> None:
    """Not a finding: nothing could be looked at."""
    url = server.url_of("nowhere")
    command = ["--url", url, "db", "doctor"]
    result = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert result.exit_code == 1
    assert "nowhere" in result.stderr


async def test_command_prints_findings_and_exits(server: Server, url: str) -> None:
    """Exit code 0 for none, 1 for some; the advice is in both forms."""

    def run(*arguments: str, url: str) -> tuple[int, str]:
        command = ["--url", url, "db", "doctor", *arguments]
        result = CliRunner().invoke(main, command)
        return result.exit_code, result.stdout

    code, text = await asyncio.to_thread(run, url=url)
    assert (code, "nothing is wrong" in text) == (0, True)
    code, text = await asyncio.to_thread(run, url=server.url)
    assert code == 1
    assert "run `stent db migrate`" in text
    code, text = await asyncio.to_thread(run, "--json", url=server.url)
    facts = json.loads(text)
    assert (code, facts["ok"]) == (1, False)
    assert facts["findings"][0]["name"] == "schema"
    assert set(facts["findings"][0]) == {"name", "level", "what", "advice"}
    assert "unchecked" not in text  # the password


async def test_missing_migrations(url: str, database: Connection) -> None:
    await database.execute("delete from stent.migrations where number = 1")
    found = await look(url)
    assert "initial" in found["schema"].what
    assert found["schema"].level is Level.ERROR


async def test_later_migrations_are_a_note(url: str, database: Connection) -> None:
    await database.execute("insert into stent.migrations values (9999, 'of later')")
    found = await look(url)
    assert found["schema_newer"].level is Level.NOTE


async def test_what_the_schema_has_lost_is_named(
    url: str, database: Connection
) -> None:
    """All that the migrations make is known, so nothing else is."""
    everything = created_objects(available_migrations())
    assert {("table", "tasks"), ("function", "take_tokens")} < everything
    assert {("view", "queue_depth"), ("index", "tasks_ready_idx")} < everything
    assert await look(url) == {}
    await database.execute("drop function stent.take_tokens")
    await database.execute("drop table stent.duties cascade")
    found = await look(url)
    assert found["schema_damaged"].level is Level.ERROR
    told = "the schema has lost what its migrations made"
    names = "function take_tokens, table duties"
    assert found["schema_damaged"].what == f"{told}: {names}"


async def test_role_without_rights(
    server: Server, url: str, database: Connection
) -> None:
    """First no right at all, then those of a member of no owner, then a member."""
    role = f"app_{uuid4().hex[:8]}"
    await database.execute(f"create role {role} login")
    theirs = url.replace("//stent:", f"//{role}:")
    assert role in (await look(theirs))["permissions"].what
    await database.execute(f"grant usage on schema stent to {role}")
    await database.execute(f"grant select on stent.migrations to {role}")
    found = await look(theirs)
    assert role in found["permissions"].what
    assert found["limited_sight"].level is Level.NOTE
    await database.execute(f"grant all on all tables in schema stent to {role}")
    found = await look(theirs)
    assert "permissions" not in found
    assert "partitions" in found["ownership"].what
    await database.execute(f"grant pg_read_all_stats to {role}")
    await database.execute(f"grant stent to {role}")
    assert await look(theirs) == {}


async def test_role_without_schema_is_told_to_ask(
    server: Server, database: Connection
) -> None:
    role = f"app_{uuid4().hex[:8]}"
    await database.execute(f"create role {role} login")
    found = await look(server.url.replace("//stent:", f"//{role}:"))
    assert f"create schema stent authorization {role}" in found["schema"].advice


async def test_database_that_is_not_utf8(server: Server, database: Connection) -> None:
    name = f"ascii_{uuid4().hex[:8]}"
    await database.execute(
        f"create database {name} encoding 'SQL_ASCII' template template0"
    )
    found = await look(server.url_of(name))
    assert "SQL_ASCII" in found["encoding"].what


async def test_missing_language(server: Server, database: Connection) -> None:
    name = f"bare_{uuid4().hex[:8]}"
    await database.execute(f"create database {name}")
    connection = await asyncpg.connect(server.url_of(name))
    await connection.execute("drop extension plpgsql")
    await connection.close()
    assert "plpgsql" in (await look(server.url_of(name)))["extension"].advice


@pytest.mark.parametrize(
    ("setting", "finding"),
    [
        ("fsync", "durability"),
        ("full_page_writes", "durability"),
        ("autovacuum", "autovacuum_off"),
        ("track_counts", "autovacuum_off"),
    ],
)
async def test_dangerous_settings_of_the_server(
    url: str, database: Connection, setting: str, finding: str
) -> None:
    await database.execute(f"alter system set {setting} = off")
    await database.execute("select pg_reload_conf()")
    try:
        found = await age_transactions(finding, url)
        assert setting in found.what
        assert found.level is Level.ERROR
    finally:
        await database.execute(f"alter system reset {setting}")
        await database.execute("select pg_reload_conf()")
    while finding in await look(url):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("setting", "value", "finding"),
    [
        ("synchronous_commit", "off", "synchronous_commit"),
        ("default_transaction_read_only", "on", "read_only"),
    ],
)
async def test_settings_of_the_database(
    url: str, database: Connection, setting: str, value: str, finding: str
) -> None:
    """What the session gets counts, wherever it was set."""
    name = await database.fetchval("select current_database()")
    await database.execute(f"alter database {name} set {setting} = {value}")
    assert (await look(url))[finding].level is Level.ERROR


async def test_table_without_autovacuum(url: str, database: Connection) -> None:
    await database.execute("alter table stent.tasks set (autovacuum_enabled = off)")
    assert "tasks" in (await look(url))["autovacuum_off"].what


async def test_pooler_and_ways_around(server: Server, url: str) -> None:
    """No way around; one that is none; one that leads elsewhere; a good one."""
    with pooling(server) as pooler:
        pooled = pooler.url_of(url)
        assert "STENT_DIRECT_URL" in (await look(pooled))["pooler"].what
        assert "pooler" not in await look(url)
        assert "direct_url_pooled" in await look(pooled, direct_url=pooled)
        assert "direct_url_elsewhere" in await look(pooled, direct_url=server.url)
        assert await look(pooled, direct_url=url) == {}


async def add_worker(database: Connection, ends_in: str, **columns: object) -> None:
    await database.execute(
        "insert into stent.leases"
        " (worker_id, expires_at, liveness_key, host, pid, slots, queues)"
        " values (gen_random_uuid(), now() + cast($1::text as interval), 1,"
        "         'elsewhere', 4711, 1, '{default}')",
        ends_in,
    )


async def test_more_workers_than_connections(url: str, database: Connection) -> None:
    """Each takes four and its pool."""
    for _ in range(10):
        await add_worker(database, "1 minute")
    found = (await look(url))["connections_needed"]
    assert "10 workers may need 120 connections" in found.what


async def test_connections_nearly_used_up(url: str, database: Connection) -> None:
    most = await database.fetchval("select current_setting('max_connections')::int")
    async with AsyncExitStack() as stack:
        for _ in range(most - 8):
            connection = await asyncpg.connect(url)
            stack.push_async_callback(connection.close)
        assert "are in use" in (await look(url))["connections_used"].what


async def test_run_out_leases(url: str, database: Connection) -> None:
    await add_worker(database, "-1 minute")
    assert "elsewhere (pid 4711)" in (await look(url))["leases"].what


async def test_open_transactions(
    url: str, database: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle ones, working ones and prepared ones, with who they are."""
    for limit in ("TRANSACTION_SECONDS_MAX", "IDLE_IN_TRANSACTION_SECONDS_MAX"):
        monkeypatch.setattr(f"stent.doctor.{limit}", 0.2)
    idle = await asyncpg.connect(url, server_settings={"application_name": "lazy"})
    await idle.execute("begin; select 1")
    pid = await idle.fetchval("select pg_backend_pid()")
    found = await age_transactions("idle_in_transaction", url)
    assert "lazy" in found.what
    assert f"pg_terminate_backend({pid})" in found.advice
    await idle.execute("create table t (x int); prepare transaction 'it''s'")
    found = await age_transactions("prepared_transaction", url)
    assert "rollback prepared 'it''s'" in found.advice
    await idle.execute("rollback prepared 'it''s'")
    busy = asyncio.create_task(idle.fetchval("select 1 from pg_sleep(30)"))
    found = await age_transactions("old_transaction", url)
    assert "lazy" in found.what
    await database.execute("select pg_cancel_backend($1)", pid)
    with pytest.raises(asyncpg.QueryCanceledError):
        await busy
    await idle.close()


async def test_young_transactions_are_no_finding(url: str) -> None:
    other = await asyncpg.connect(url)
    await other.execute("begin; select 1")
    assert await look(url) == {}
    await other.close()


@pytest.mark.timeout(60)
async def test_slot_of_a_standby_that_is_gone(url: str, database: Connection) -> None:
    """It keeps what its standby last wanted kept, deleted rows included."""
    await database.execute("select pg_create_physical_replication_slot('gone', true)")
    try:
        found = (await look(url))["replication_slot"]
        assert "keeps WAL" in found.what
        assert "pg_drop_replication_slot('gone')" in found.advice
    finally:
        await database.execute("select pg_drop_replication_slot('gone')")


@pytest.mark.timeout(60)
async def test_standby_and_its_slot(server: Server, url: str) -> None:
    """A standby takes no writes; when it is gone, its slot holds rows back."""
    connection = await asyncpg.connect(url)
    await connection.execute("select pg_create_physical_replication_slot('feedback')")
    with short_directory() as directory, ExitStack() as stack:
        standby = Server(binaries_or_skip(18), directory / "standby")
        stack.callback(standby.stop)
        await asyncio.to_thread(standby.copy_of, server)
        await asyncio.to_thread(
            standby.start,
            primary_slot_name="feedback",
            hot_standby_feedback="on",
            max_prepared_transactions=5,
            wal_receiver_status_interval="1s",
        )
        database = await connection.fetchval("select current_database()")
        found = await look(standby.url_of(database))
        assert "target_session_attrs=read-write" in found["standby"].advice
        held = "select xmin is not null from pg_replication_slots"
        while not await connection.fetchval(held):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    found_on_primary = await age_transactions("replication_slot", url)
    assert "keeps deleted rows and WAL" in found_on_primary.what
    drop = "select pg_drop_replication_slot('feedback')"
    await connection.execute(drop)
    await connection.close()


async def fill_and_empty(database: Connection, rows: int) -> None:
    """Tasks that came and went, and were never cleaned up; one is left."""
    await database.execute(
        "alter table stent.tasks set (autovacuum_enabled = off, fillfactor = 10)"
    )
    await database.execute(
        "insert into stent.tasks (execution_id, call_id, address, function, queue)"
        " select gen_random_uuid(), gen_random_uuid(), n::text, 'f', 'q'"
        f" from generate_series(1, {rows}) n"
    )
    await database.execute(f"delete from stent.tasks where address <> '{rows}'")
    await database.execute("select pg_stat_force_next_flush()")


@pytest.mark.timeout(60)
async def test_dead_rows_and_bloat(url: str, database: Connection) -> None:
    """Dead rows until somebody vacuums; the room that they took stays."""
    await fill_and_empty(database, 60_000)
    found = await age_transactions("dead_rows", url)
    assert "stent.tasks has 59999 dead rows" in found.what
    await database.execute("vacuum stent.tasks")
    found = await age_transactions("bloat", url)
    assert "vacuum full stent.tasks" in found.advice
    assert "dead_rows" not in await look(url)


async def test_missing_partitions(url: str, database: Connection) -> None:
    name = await database.fetchval(
        "select min(inhrelid::regclass::text) from pg_inherits"
        " where inhparent = 'stent.results'::regclass"
    )
    await database.execute(f"drop table {name}")
    week = name.rpartition("_")[2]
    found = (await look(url))["partitions"]
    assert f"{week[:4]}-{week[4:6]}-{week[6:]}" in found.what


async def test_blocked_executions(url: str, database: Connection) -> None:
    async with Stent(url) as app:
        execution_id = await app.dispatch(step, 1)
        await database.execute("update stent.executions set status = 'blocked'")
        found = (await look(url))["blocked"]
        assert execution_id in found.what
        assert f"stent show {execution_id}" in found.advice


async def test_dead_letters_of_a_day(url: str, database: Connection) -> None:
    """The latest is named; those of last week are history."""
    insert = (
        "insert into stent.dead_letters"
        " (execution_id, call_id, address, function, queue, reason, parked_at)"
        " values (gen_random_uuid(), gen_random_uuid(), 'a', $1, 'default',"
        "         'worker_lost', now() - cast($2::text as interval))"
        " returning cast(execution_id as text)"
    )
    async with Stent(url):
        await database.execute(insert, "of.last.week", "7 days")
        assert "dead_letters" not in await look(url)
        await database.execute(insert, "earlier", "2 hours")
        latest = await database.fetchval(insert, "latest", "1 hour")
        found = (await look(url))["dead_letters"]
        assert "2 call(s)" in found.what
        assert found.what.endswith("of latest")
        assert f"stent history {latest}" in found.advice


async def test_work_that_nobody_can_run(url: str, database: Connection) -> None:
    """No worker; then one of other functions; then one that has it."""
    async with Stent(url) as app:
        await app.dispatch(step, 1)
        await database.execute(
            "update stent.executions set wake_at = now() - interval '1 minute'"
        )
        found = (await look(url))["unserved"]
        assert f"1 of {step.name} wait in queue 'default'" in found.what
        await add_worker(database, "1 minute")
        await database.execute(
            "insert into stent.worker_functions"
            f" select worker_id, '{{{UNKNOWN}}}' from stent.leases"
        )
        assert "unserved" in await look(url)
        await database.execute(
            "update stent.worker_functions set functions = functions || $1::text",
            step.name,
        )
        assert "unserved" not in await look(url)


async def test_clocks_that_differ(url: str) -> None:
    """Either way; a slow answer alone is no difference."""
    for seconds, word in ((30, "ahead of"), (-30, "behind")):
        shift = dt.timedelta(seconds=seconds)

        def clock(shift: dt.timedelta = shift) -> dt.datetime:
            return now() + shift

        (found,) = await examine(url, Settings(database_url=url), clock=clock)
        assert (found.name, word in found.what) == ("clock", True)


@pytest.mark.timeout(60)
async def test_notifications_that_nobody_reads() -> None:
    """A listener that is stuck in a transaction fills the queue for all."""
    with running(binaries_or_skip(18), max_notify_queue_pages=64) as server:
        listener = await asyncpg.connect(server.url)
        await listener.execute("listen c")
        await listener.execute("begin; select 1")
        sender = await asyncpg.connect(server.url)
        for number in range(40):
            text = str(number) * 1000
            await sender.execute("select pg_notify('c', $1)", text)
        found = await look(server.url)
        assert "LISTEN" in found["notify_queue"].advice
        await listener.close()
        await sender.close()


async def test_server_of_an_old_version(url: str) -> None:
    """The least version is that of the documentation."""
    from stent.doctor import VERSION_LEAST, diagnose, read_facts

    facts = await read_facts(url, Settings(database_url=url), now)
    server = dict(facts.server) | {"version_number": 140_012, "version": "14.12"}
    from dataclasses import replace

    (found,) = diagnose(replace(facts, server=server))
    assert (found.name, VERSION_LEAST) == ("version", 15)


def test_every_check_is_listed_once() -> None:
    assert len(set(CHECKS)) == len(CHECKS)
