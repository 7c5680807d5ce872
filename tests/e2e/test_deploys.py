"""Workers come and go: handovers, rolling deploys, start storms, forks, neighbours."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from stent import Stent, durable
from tests.e2e.harness import workload
from tests.e2e.harness.checks import check_calls, check_nothing_left, check_pasts
from tests.e2e.harness.commands import Command, Commands, clean_environment
from tests.e2e.harness.fleet import Fleet, say, wait_until
from tests.e2e.harness.ledger import Ledger, Record

PROGRAMS = Path(__file__).parent / "programs"
SHOP = '''
"""Version {version} of a program."""

import asyncio
import os
from pathlib import Path

import stent
from stent import durable
from tests.e2e.harness import workload

workload.write_to(Path(os.environ["LEDGER"]))


@durable
async def charge(amount: int) -> int:
    with workload.Attempt():
        workload.ledger.write("ran", version={version})
        await asyncio.sleep(0.03)
    return amount


@durable
async def order(number: int) -> int:
    life = workload.Life()
    parts = await asyncio.gather(*[charge(number * 10 + i) for i in range(3)])
    life.saw("parts", parts)
    await stent.sleep("50ms")
    total = {total}
    last = await charge(total)
    life.saw("last", last)
    return last
'''
WIDE = """
import asyncio

import stent
from stent import durable


@durable
async def step(number: int) -> int:
    return number


@durable
async def flow(number: int) -> int:
    total = await step(number)
    more = asyncio.gather(*[step(n) for n in range({more})])
    await stent.sleep("6s")
    await more
    return total
"""
TOTALS = {1: "sum(parts)", 2: "parts[0] + parts[1] + parts[2]"}
STORM = 20
CUSTOMERS = 12

pytestmark = pytest.mark.timeout(90)


@durable(name="shop.order", kind="workflow")
async def order(number: int) -> int:
    """What the test dispatches; the workers have their own."""
    return number


@durable(name="wide.flow", kind="workflow")
async def wide(number: int) -> int:
    """The same."""
    return number


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    async with Stent(database_url) as app:
        yield app


async def test_a_draining_worker_hands_over_at_once(app: Stent, tmp_path: Path) -> None:
    """Its workflow goes on elsewhere while it still runs an activity of it.

    Nobody polls here: the other worker heard of it.
    """
    async with Fleet(tmp_path) as fleet:
        marker = tmp_path / "go on"
        took = []
        draining = await fleet.start(url=app.url)
        for number in range(3):
            marker.unlink(missing_ok=True)
            execution_id = await app.dispatch(workload.beside, str(marker), number)
            await fleet.wait_for_more("saw", 5, lambda: False)
            other = await fleet.start(url=app.url)
            began = time.monotonic()
            draining.signal(signal.SIGTERM)
            took.append(await first_seen_by(fleet.ledger, other.pid) - began)
            # It goes on for real, not only up to what was known.
            await fleet.wait_for_more("saw", 5, lambda: False)
            assert not draining.ended
            marker.touch()
            assert (await app.wait_for(execution_id)).unwrap() == number
            assert await draining.wait() == 0
            assert not other.lines("worker.taken_over")
            draining = other
        records = fleet.ledger.records()
        assert check_calls(records) == 0
        check_pasts(records)
        await check_nothing_left(app.url)
        say("handed over in " + ", ".join(f"{s * 1000:.0f} ms" for s in took))


async def first_seen_by(ledger: Ledger, pid: int) -> float:
    """When a workflow first saw something in a process; waits for it."""

    def seen() -> list[float]:
        return [record.at for record in ledger.records("saw") if record.pid == pid]

    await wait_until(lambda: bool(seen()))
    return seen()[0]


async def wait_for_more(ledger: Ledger, event: str, count: int) -> None:
    """Until there are so many more records of an event."""
    enough = len(ledger.records(event)) + count
    await wait_until(lambda: len(ledger.records(event)) >= enough)


async def test_deploys_under_load(app: Stent, tmp_path: Path) -> None:
    """Two versions of a module replace each other: nothing is lost, nothing repeated.

    Every other time the old version is asked to drain through the database.
    """
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for version, total in TOTALS.items():
        (tmp_path / str(version)).mkdir()
        (tmp_path / str(version) / "shop.py").write_text(
            SHOP.format(version=version, total=total)
        )
    environment = clean_environment(STENT_DATABASE_URL=app.url, LEDGER=str(ledger.path))
    with Commands(tmp_path, environment) as commands:

        async def deploy(version: int) -> Command:
            command = commands.start(
                "worker",
                "shop",
                "--concurrency",
                "8",
                cwd=tmp_path / str(version),
                STENT_APP_VERSION=str(version),
            )
            await command.wait_for("worker.started")
            return command

        running = list(await asyncio.gather(deploy(1), deploy(1)))
        numbers, enough = itertools.count(), asyncio.Event()
        bought = 0

        async def customer() -> None:
            """One order after the other."""
            nonlocal bought
            while not enough.is_set():
                number = next(numbers)
                outcome = await app.wait_for(await app.dispatch(order, number))
                assert outcome.unwrap() == number * 30 + 3
                bought += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(CUSTOMERS):
                group.create_task(customer())
            for number, version in enumerate((2, 1, 2, 1)):
                await wait_for_more(ledger, "end", 10)
                fresh = list(await asyncio.gather(deploy(version), deploy(version)))
                for old in running:
                    if number % 2:
                        old.signal(signal.SIGTERM)
                    else:
                        await ask_to_drain(app, old.pid)
                assert [await old.wait() for old in running] == [0, 0]
                running = fresh
            enough.set()
        workers = {w.app_version for w in await app.list_workers()}
        assert workers == {"1"}
        everybody = [one for one in commands.started if one.lines("worker.started")]
        assert len(everybody) == 10
        assert not any(one.lines("worker.taken_over") for one in everybody)
        assert not any(one.lines("execution.blocked") for one in everybody)
    records = ledger.records()
    assert check_calls(records) == 0
    lives = check_pasts(records)
    await check_nothing_left(app.url)
    assert len(records_of(records, "start")) == 4 * bought
    assert {record.version for record in records_of(records, "ran")} == {1, 2}
    moved = lives - bought
    say(f"{bought} executions, {moved} handovers, 4 deploys of 2 workers")
    assert moved > 0


async def test_code_is_taken_back_while_its_calls_are_inserted(
    app: Stent, tmp_path: Path, connection: asyncpg.Connection
) -> None:
    """The old code goes on: the row knows that its calls are those of other code."""
    for version, more in (("old", 0), ("new", 20_000)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "wide.py").write_text(WIDE.format(more=more))
    environment = clean_environment(STENT_DATABASE_URL=app.url)
    with Commands(tmp_path, environment) as commands:

        async def kill_once(version: str, query: str) -> None:
            command = commands.start("worker", "wide", cwd=tmp_path / version)
            while not await connection.fetchval(query):  # noqa: ASYNC110 - a row
                await asyncio.sleep(0.005)
            command.signal(signal.SIGKILL)
            await command.wait()

        execution_id = await app.dispatch(wide, 7)
        await kill_once("old", "select count(*) > 0 from stent.journal")
        await kill_once("new", "select count(*) >= 500 from stent.tasks")
        commands.start("worker", "wide", cwd=tmp_path / "old")
        outcome = await app.wait_for(execution_id, "30s")
    assert outcome.unwrap() == 7


def records_of(records: list[Record], event: str) -> list[Record]:
    return [record for record in records if record.event == event]


async def ask_to_drain(app: Stent, pid: int) -> None:
    (worker,) = [one for one in await app.list_workers() if one.pid == pid]
    assert await app.drain_worker(worker.id)


async def test_twenty_workers_start_at_once(app: Stent, tmp_path: Path) -> None:
    """A backlog is done once, by many, and nobody is taken for dead in the rush."""
    async with Fleet(tmp_path) as fleet:
        ids = await app.dispatch_many(workload.twice, range(300))
        async with asyncio.TaskGroup() as group:
            for _ in range(STORM):
                group.create_task(fleet.start(url=app.url, slots=2))
        assert len([w for w in await app.list_workers() if w.alive]) == STORM
        assert [
            (await app.wait_for(execution_id)).unwrap() for execution_id in ids
        ] == [4 * number for number in range(300)]
        processes = list(fleet.processes.values())
        for process in processes:
            process.signal(signal.SIGTERM)
        assert [await process.wait() for process in processes] == [0] * STORM
        for event in ("worker.taken_over", "lease.lost", "lease.running_out"):
            assert not any(process.lines(event) for process in processes)
        records = fleet.ledger.records()
        assert check_calls(records) == 0
        check_pasts(records)
        await check_nothing_left(app.url)
        took_part = {record.pid for record in records_of(records, "start")}
        say(f"{len(took_part)} of {STORM} workers took part")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_fork_shares_no_connection(database_url: str, loop: str) -> None:
    """In the child the parent's app is refused, and the parent notices nothing."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        str(PROGRAMS / "forks.py"),
        database_url,
        loop,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    facts = json.loads(output)
    child = facts.pop("child")
    assert facts == {"before": 2, "after": 6, "exit_code": 0, "made": [1]}
    assert child.pop("own") == 8
    assert set(child) == {"dispatch", "call", "serve", "list"}
    assert all("open a Stent in this process" in text for text in child.values())


async def test_services_of_one_machine_do_not_meet(
    database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    """Two databases, one host: each has its own workers, and takes over only those."""
    urls = (database_url, empty_database_url)
    with Commands(tmp_path, clean_environment()) as commands:

        async def start(url: str) -> Command:
            command = commands.start(
                "worker",
                "shell_flows",
                "--health",
                "0",
                cwd=PROGRAMS,
                STENT_DATABASE_URL=url,
            )
            await command.wait_for("worker.started")
            return command

        services = [await start(url) for url in urls]
        for url, service in zip(urls, services, strict=True):
            async with Stent(url) as app:
                assert [w.pid for w in await app.list_workers()] == [service.pid]
            assert (await service.probe("/ready"))[0] == 200
        os.kill(services[0].pid, signal.SIGKILL)
        await services[0].wait()
        heir = await start(urls[0])
        await heir.wait_for("worker.taken_over")
        assert not services[1].lines("worker.taken_over")
        assert (await services[1].probe("/ready"))[0] == 200
        async with Stent(urls[1]) as app:
            assert [w.pid for w in await app.list_workers()] == [services[1].pid]
