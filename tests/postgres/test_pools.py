"""Activities in threads and processes, killed for real."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import stent
from stent import Settings, Stent, durable
from tests import pools
from tests.pools import exists, lines

if TYPE_CHECKING:
    from asyncpg import Connection

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(60)


def serve(database_url: str, *, processes: int = 2, slots: int = 10) -> Stent:
    """An app with a worker."""
    settings = replace(Settings(), process_pool_size=processes)
    settings = replace(settings, database_url=database_url)
    return Stent.bootstrap(serve=True, settings=settings, max_concurrency=slots)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for files and processes; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - they have no events
        await asyncio.sleep(0.01)


# Threads.


async def test_thread_hears_that_its_call_was_cancelled(
    database_url: str, tmp_path: Path
) -> None:
    """The flag is set, the wait ends at once, and what it raises is no outcome."""
    path = tmp_path / "log"
    async with serve(database_url) as app:
        execution_id = await app.dispatch(pools.listen_in_workflow, str(path), None)
        await wait_until(lambda: bool(lines(path)))
        await app.cancel(execution_id)
        outcome = await app.wait_for(execution_id)
        await wait_until(lambda: len(lines(path)) == 2)
    assert isinstance(outcome.error, stent.ExecutionCancelledError)
    assert lines(path) == [["begun", "False"], ["ended", "True"]]


async def test_thread_hears_that_its_time_is_over(
    database_url: str, tmp_path: Path
) -> None:
    """The caller gets the timeout; the thread is told and ends."""
    path = tmp_path / "log"
    async with serve(database_url) as app:
        execution_id = await app.dispatch(pools.listen_in_workflow, str(path), "50ms")
        outcome = await app.wait_for(execution_id)
        await wait_until(lambda: len(lines(path)) == 2)
    assert isinstance(outcome.error, stent.ActivityTimeoutError)
    assert lines(path)[-1] == ["ended", "True"]


async def test_thread_hears_that_its_worker_stops(
    database_url: str, tmp_path: Path
) -> None:
    """A worker in a hurry leaves no thread that would listen."""
    path = tmp_path / "log"
    async with serve(database_url) as app:
        await app.dispatch(pools.listen, str(path))
        await wait_until(lambda: bool(lines(path)))
        app.hurry()
        await app.drain()
        assert lines(path)[-1] == ["ended", "True"]


async def test_threads_have_the_context_of_their_attempt(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The key is that of every attempt; log lines carry the ids."""
    caplog.set_level(logging.INFO, logger="tests.pools")
    path = tmp_path / "log"
    seen: list[dict[str, Any]] = []

    class Ids(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            del record
            seen.append(stent_log.bound_fields())

    from stent import log as stent_log

    handler = Ids()
    pools.log.addHandler(handler)
    try:
        async with serve(database_url) as app:
            execution_id = await app.dispatch(pools.where, str(path))
            result = (await app.wait_for(execution_id)).unwrap()
    finally:
        pools.log.removeHandler(handler)
    first, second = lines(path)
    assert first[1:] == second[1:] == [result["key"], execution_id]
    assert result["function"] == "tests.pools.where"
    assert result["thread"] == "stent-activity"
    assert [fields["attempt"] for fields in seen] == [1, 2]
    assert {fields["execution_id"] for fields in seen} == {execution_id}


async def test_thread_that_does_not_listen_keeps_its_slot(
    database_url: str, tmp_path: Path
) -> None:
    """The outcome is there at once; nothing else runs in its place before it ends."""
    path, until = tmp_path / "log", tmp_path / "until"
    async with serve(database_url, slots=1) as app:
        execution_id = await app.dispatch(pools.deaf_then_quick, str(path), str(until))
        await wait_until(lambda: ["given-up"] in lines(path))
        (worker,) = app._workers
        assert worker.activities.used == 1
        assert worker.activities.room <= 0
        assert ["quick"] not in lines(path)
        until.touch()
        assert (await app.wait_for(execution_id)).unwrap() == "done"
        assert worker.activities.used == 0
    words = [line[0] for line in lines(path)]
    assert words == ["begun", "given-up", "ended", "quick"]


async def test_left_thread_keeps_the_key_of_its_item(
    database_url: str, tmp_path: Path
) -> None:
    """An attempt that was given up does not act under the key of another item."""
    path, until = tmp_path / "log", tmp_path / "until"
    async with serve(database_url) as app:
        execution_id = await app.dispatch(pools.map_deaf, str(path), str(until))
        assert (await app.wait_for(execution_id)).unwrap() == [0, 1, 2]
        until.touch()
        await wait_until(lambda: ["ended", "0", "1"] in [w[:3] for w in lines(path)])
    keys = {(word, *at): key for word, *at, key in lines(path)}
    assert keys["begun", "0", "1"] == keys["ended", "0", "1"]
    assert keys["begun", "0", "1"] == keys["begun", "0", "2"]
    assert len(set(keys.values())) == 3


# Processes.


@pytest.mark.parametrize(
    "value",
    [
        None,
        (1, {"a": {2, 3}}, b"\0\xff"),
        pools.Point(3, pools.Colour.RED),
        stent.Result.Error("business"),
        "\ud800",
        float("-inf"),
    ],
    ids=str,
)
async def test_results_are_stored_as_those_of_threads(
    database_url: str, connection: Connection, value: object
) -> None:
    """The same bytes, whichever side has encoded them."""
    functions = (pools.echo, pools.echo_in_thread)
    async with serve(database_url) as app:
        ids = [await app.dispatch(function, value) for function in functions]
        for execution_id in ids:
            outcome = await app.wait_for(execution_id)
            expected = (
                value if isinstance(value, stent.Result) else stent.Result.Ok(value)
            )
            assert outcome == expected
    rows = await connection.fetch("select distinct ok, payload from stent.results")
    assert len(rows) == 1


@pytest.mark.parametrize("kind", ["own", "cause", "group", "exit", "stop", "result"])
async def test_exceptions_are_those_of_the_loop(database_url: str, kind: str) -> None:
    """Class, message, attributes, notes, cause and members; the traceback is there."""
    async with serve(database_url) as app:
        errors = []
        for function in (pools.fail, pools.fail_here):
            outcome = await app.wait_for(await app.dispatch(function, kind))
            assert isinstance(outcome.error, Exception)
            errors.append(outcome.error)
    there, here = errors
    if kind != "stop":
        assert type(there) is type(here)
        assert str(there) == str(here)
    assert repr(there.__cause__) == repr(here.__cause__) or kind == "stop"
    assert getattr(there, "__notes__", None) == getattr(here, "__notes__", None)
    if isinstance(there, pools.PoolError):
        assert (there.code, there.path) == (7, Path("/tmp/x"))
    assert "tests/pools.py" in there.remote_traceback  # type: ignore[attr-defined]


async def test_result_without_stored_form_fails_the_call(database_url: str) -> None:
    """As everywhere else, and naming the place."""
    async with serve(database_url) as app:
        outcome = await app.wait_for(await app.dispatch(pools.unstorable))
    assert isinstance(outcome.error, stent.PayloadError)
    assert "result" in str(outcome.error)


@pytest.mark.parametrize("how", ["kill", "exit", "segfault", "abort"])
async def test_lost_process_is_a_lost_attempt(
    database_url: str, tmp_path: Path, how: str, connection: Connection
) -> None:
    """It is retried under the same key, by the same worker, in another process."""
    path = tmp_path / "log"
    async with serve(database_url) as app:
        outcome = await app.wait_for(await app.dispatch(pools.die, how, str(path)))
        workers = await connection.fetch("select incarnation from stent.workers")
    assert outcome == stent.Result.Ok(2)
    (first, pid, key), (second, other, same) = lines(path)
    assert (first, second, key) == ("1", "2", same)
    assert pid != other
    assert [row["incarnation"] for row in workers] == [1]
    assert not exists(int(pid))


async def test_process_that_is_always_lost_fails_the_call(database_url: str) -> None:
    """The error says which function, and how its process ended."""
    async with serve(database_url) as app:
        outcome = await app.wait_for(await app.dispatch(pools.die_always))
    assert isinstance(outcome.error, stent.ProcessLostError)
    assert "tests.pools.die_always ended by itself with exit code 9" in str(
        outcome.error
    )


async def test_idle_process_that_was_killed_costs_no_attempt(
    database_url: str, connection: Connection
) -> None:
    """Another one is started for the next call."""
    async with serve(database_url, processes=1) as app:
        _, pid = (await app.wait_for(await app.dispatch(pools.pid_of, 1))).unwrap()
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not exists(pid))
        _, other = (await app.wait_for(await app.dispatch(pools.pid_of, 2))).unwrap()
    assert other != pid
    assert await connection.fetchval("select count(*) from stent.attempts") == 0


@pytest.mark.parametrize("end", ["timeout", "cancel", "hurry"])
async def test_process_ends_with_its_attempt(
    database_url: str, tmp_path: Path, end: str
) -> None:
    """Killed with what it has started, however busy it is."""
    path = tmp_path / "log"
    async with serve(database_url) as app:
        timeout = "300ms" if end == "timeout" else None
        execution_id = await app.dispatch(pools.spin_in_workflow, str(path), timeout)
        await wait_until(lambda: bool(lines(path)))
        ((child, program),) = lines(path)
        if end == "hurry":
            app.hurry()
            await app.drain()
        else:
            if end == "cancel":
                await app.cancel(execution_id)
            outcome = await app.wait_for(execution_id)
            kinds = {
                "timeout": stent.ActivityTimeoutError,
                "cancel": stent.ExecutionCancelledError,
            }
            assert isinstance(outcome.error, kinds[end])
        await wait_until(lambda: not exists(int(child)) and not exists(int(program)))


async def test_no_more_processes_than_the_setting_says(
    database_url: str, tmp_path: Path, connection: Connection
) -> None:
    """The rest waits where other workers may take it; the loop is free meanwhile."""
    path, until = tmp_path / "log", tmp_path / "until"
    async with serve(database_url, processes=2) as app:
        execution_id = await app.dispatch(
            pools.hold_processes, 6, str(path), str(until)
        )
        await wait_until(lambda: len(lines(path)) >= 3)
        (worker,) = app._workers
        assert worker.activities.process_room == 0
        waiting = await connection.fetchval(
            "select count(*) from stent.tasks where worker_id is null"
        )
        assert waiting == 4
        until.touch()
        pids = (await app.wait_for(execution_id)).unwrap()
    assert pids <= 2
    held = 0
    for word, *_ in lines(path):
        held += {"begun": 1, "ended": -1}.get(word, 0)
        assert held <= 2
    assert ["quick"] in lines(path)[:3]


async def test_items_of_a_map_run_in_processes(database_url: str) -> None:
    """An item whose process is lost is tried again, by itself."""
    async with serve(database_url) as app:
        outcome = await app.wait_for(await app.dispatch(pools.map_squares, 12))
    assert outcome.unwrap() == [n * n for n in range(12)]


async def test_items_that_wait_for_a_slot_hold_no_process(
    database_url: str, tmp_path: Path
) -> None:
    """Other functions have them meanwhile, and all of them afterwards."""
    path, until = tmp_path / "log", tmp_path / "until"
    async with serve(database_url, processes=2) as app:
        mapped = await app.dispatch(pools.map_one_at_a_time, 4, str(path), str(until))
        await wait_until(lambda: bool(lines(path)))
        other = await app.wait_for(await app.dispatch(pools.pid_of, 1), "15s")
        assert other.is_ok()
        until.touch()
        assert (await app.wait_for(mapped)).unwrap() == [0, 1, 2, 3]
        (worker,) = app._workers
        assert worker.activities.processes.used == 0
        assert worker.activities.used == 0


async def test_a_drained_worker_leaves_no_process(database_url: str) -> None:
    """Idle ones end too."""
    async with serve(database_url) as app:
        _, pid = (await app.wait_for(await app.dispatch(pools.pid_of, 1))).unwrap()
        assert exists(pid)
        await app.drain()
        assert not exists(pid)


async def test_processes_say_and_ask_what_activities_may(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heartbeats, told values, logs, the key and database time."""
    path = tmp_path / "log"
    async with serve(database_url) as app:
        execution_id = await app.dispatch(pools.talk, str(path), tags=["a"])
        result = (await app.wait_for(execution_id)).unwrap()
        history = await app.history(execution_id)
    assert result["heartbeat"] == {
        "attempt": 1,
        "point": pools.Point(1, pools.Colour.RED),
    }
    assert result["tags"] == ("a",)
    assert lines(path) == [[result["key"]]] * 2
    told = [entry.detail for entry in history if entry.kind == "told"]
    assert len(told) == 2
    records = [r for r in caplog.records if r.getMessage() == "from a process"]
    assert [r.attempt_seen for r in records] == [1, 2]  # type: ignore[attr-defined]
    assert {(r.name, r.funcName) for r in records} == {("tests.pools", "talk")}
    assert all(r.process != os.getpid() for r in records)


@pytest.mark.parametrize("what", ["call", "start", "transaction"])
async def test_processes_refuse_what_they_cannot_do(
    database_url: str, what: str
) -> None:
    """At once, naming the function."""
    async with serve(database_url) as app:
        outcome = await app.wait_for(await app.dispatch(pools.overstep, what))
    assert isinstance(outcome.error, stent.UsageError)
    assert "tests.pools.overstep" in str(outcome.error)


MAIN = """
import asyncio, os
from dataclasses import dataclass
import beside
from stent import Stent, durable

@dataclass
class Pair:
    a: int
    b: int

@durable(pool="process")
def swapped(pair: Pair) -> Pair:
    assert os.getpid() != {parent}
    return Pair(pair.b, pair.a)

async def main():
    async with Stent.bootstrap({url!r}, serve=True) as app:
        first = (await app.wait_for(await app.dispatch(swapped, Pair(1, 2)))).unwrap()
        assert type(first) is Pair
        other = (await app.wait_for(await app.dispatch(beside.same, first))).unwrap()
        assert type(other) is Pair
        print(other)

{guard}asyncio.run(main())
"""
BESIDE = """
from stent import durable

@durable(pool="process")
def same(value):
    return value
"""


def run_main(
    directory: Path, url: str, guard: str, *words: str
) -> subprocess.CompletedProcess[str]:
    (directory / "beside.py").write_text(BESIDE)
    text = MAIN.format(parent=0, url=url, guard=guard)
    (directory / "my-program.py").write_text(text)
    (directory / "program.py").write_text(text)
    return subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


@pytest.mark.parametrize(
    "words", [("program.py",), ("my-program.py",), ("-m", "program")], ids=str
)
def test_functions_and_classes_of_the_program_work(
    database_url: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """However it was started, and for functions of other modules as well."""
    done = run_main(tmp_path, database_url, 'if __name__ == "__main__": ', *words)
    assert (done.returncode, done.stdout) == (0, "Pair(a=2, b=1)\n"), done.stderr


def test_program_without_a_guard_is_told_so(database_url: str, tmp_path: Path) -> None:
    """It does not start workers within workers."""
    done = run_main(tmp_path, database_url, "", "program.py")
    assert done.returncode == 1
    assert 'begin the program with `if __name__ == "__main__":`' in done.stderr


@durable
async def forks_and_leaves(number: int) -> int:
    pid = os.fork()
    if pid == 0:
        sys.exit(number)
    return pid


@durable
async def forks_in_all_ways(count: int) -> list[int]:
    return [await forks_and_leaves(1), *await stent.map(forks_and_leaves, [1] * count)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_copy_of_the_worker_ends_with_the_code(database_url: str) -> None:
    """It neither reports the call nor goes on as a second worker."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(forks_in_all_ways, 2), "15s")
    for pid in outcome.unwrap():
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it has ended, or the test hangs
        assert os.waitstatus_to_exitcode(status) == 1
