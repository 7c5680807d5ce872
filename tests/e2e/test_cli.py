"""The command `stent` as a shell sees it: output, exit codes, signals."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness.commands import PROGRAMS, ProgramShell

ROOT = Path(__file__).parent.parent.parent
FLOWS = "shell_flows"
WAIT_SECONDS = 15


@dataclass
class Shell(ProgramShell):
    """ProgramShell on one database, and the workers that were started."""

    environment: dict[str, str]
    workers: list[subprocess.Popen[str]]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A worker that has begun to claim."""
        worker = subprocess.Popen(
            [sys.executable, "-m", "stent", "worker", FLOWS, *words],
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROGRAMS,
            env=self.environment,
        )
        self.workers.append(worker)
        wait_for_event(worker, "worker.started")
        return worker


def wait_for_event(worker: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """The first log line of an event; every line before is JSON too."""
    assert worker.stderr is not None
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        ready, _, _ = select.select([worker.stderr], [], [], until - time.monotonic())
        if not ready:
            break
        line = worker.stderr.readline()
        if not line:
            break
        facts: dict[str, Any] = json.loads(line)
        if facts["event"] == event:
            return facts
    message = f"the worker logged no {event}"
    raise AssertionError(message)


def wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < until, "it never held"
        time.sleep(0.05)


@pytest.fixture
def shell(database_url: str) -> Iterator[Shell]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("STENT_", "COLUMNS", "NO_COLOR", "FORCE_COLOR"))
    }
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    shell = Shell(
        kept
        | {"STENT_DATABASE_URL": database_url, "PYTHONPATH": os.pathsep.join(paths)},
        [],
    )
    yield shell
    for worker in shell.workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
        assert worker.stderr is not None
        worker.stderr.close()


@pytest.mark.timeout(60)
def test_run_prints_what_came_out(shell: Shell) -> None:
    """Results on stdout as JSON, failures on stderr, each with its exit code."""
    shell.start()
    done = shell.run("run", f"{FLOWS}:add", "3", "--wait")
    assert (done.returncode, done.stdout) == (0, "6\n")
    orders = '[{"item": "tea", "count": 2}, {"item": "cup"}]'
    done = shell.run("run", f"{FLOWS}:buy", orders, "note=fragile", "--wait")
    assert json.loads(done.stdout) == {"item": "tea fragile", "count": 3}
    done = shell.run("run", f"{FLOWS}:fail", "\x1b[2Jgone", "--wait")
    assert (done.returncode, done.stdout) == (6, "")
    assert "ValueError: \\x1b[2Jgone" in done.stderr
    done = shell.run("run", f"{FLOWS}:fail", "x", "--wait", "--json")
    assert done.returncode == 6
    assert json.loads(done.stdout)["status"] == "failed"


@pytest.mark.timeout(60)
def test_run_without_worker_says_so(shell: Shell) -> None:
    """It waits all the same, as long as it was told to; the key finds it again."""
    words = ("run", f"{FLOWS}:add", "2", "--key", "once")
    done = shell.run(*words, "--wait", "--timeout", "0.2")
    assert done.returncode == 5
    assert "no worker is running" in done.stderr
    assert "has not ended within 0.2 s" in done.stderr
    execution_id = shell.ok(*words).strip()
    assert execution_id in done.stderr
    assert shell.run("run", f"{FLOWS}:add", "3", "--key", "once").returncode == 2


@pytest.mark.timeout(60)
def test_an_execution_can_be_looked_at(shell: Shell) -> None:
    """Listed, shown with what it started, told in order, waited for."""
    shell.start()
    execution_id = shell.ok("run", f"{FLOWS}:family", "2").strip()
    assert shell.ok("wait", execution_id, "--timeout", "10s") == "2\n"
    assert {one["function"] for one in shell.json("ls")} == {
        f"{FLOWS}.family",
        f"{FLOWS}.add",
    }
    (listed,) = shell.json("ls", "--function", f"{FLOWS}.family")
    (shown,) = shell.json("show", execution_id)
    assert listed["id"] == shown["id"] == execution_id
    assert (shown["status"], shown["result"]) == ("completed", 2)
    (child,) = shown["tree"]
    assert child["calls"] == [
        {
            "function": f"{FLOWS}.double",
            "issued": 2,
            "done": 2,
            "failed": 0,
            "cancelled": 0,
        }
    ]
    kinds = [entry["kind"] for entry in shell.json("history", execution_id)]
    assert kinds == [
        "execution.created",
        "execution.started",
        "call.issued",
        "result.delivered",
        "execution.completed",
    ]
    for words in (("ls",), ("show", execution_id), ("history", execution_id)):
        assert f"{FLOWS}.family" in shell.ok(*words)
    assert shell.json("show", execution_id[:-2])[0]["id"] == execution_id
    # A child shares the time in its parent's id.
    ambiguous = shell.run("show", execution_id[:13])
    assert ambiguous.returncode == 2
    assert shown["children"][0] in ambiguous.stderr


@pytest.mark.timeout(60)
def test_cancel_ends_what_waits(shell: Shell) -> None:
    """Asked once it stops, asked again it has ended already; waiting then fails."""
    shell.start()
    execution_id = shell.ok("run", f"{FLOWS}:nap").strip()
    wait_until(lambda: shell.json("show", execution_id)[0]["status"] == "running")
    (answer,) = shell.json("cancel", execution_id)
    assert answer["asked"] is True
    done = shell.run("wait", execution_id, "--timeout", "10s")
    assert done.returncode == 6
    assert "cancelled" in done.stderr
    assert "has ended already: cancelled" in shell.ok("cancel", execution_id)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (("show", "00000000-0000-7000-8000-000000000000"), 3),
        (("history", "not an id"), 3),
        (("wait", "00000000deadbeef"), 3),
        (("cancel", "0000"), 2),
        (("ls", "--status", "done"), 2),
        (("run", f"{FLOWS}:add", "many"), 2),
        (("run", f"{FLOWS}:nothing"), 2),
        (("run", f"{FLOWS}:add", "1", "--wiat"), 2),
        (("worker", "absent_module"), 2),
        (("worker", "json"), 2),
        (("--url", "postgresql://x@127.0.0.1:1/x", "ls"), 1),
    ],
)
def test_mistakes_have_exit_codes(
    shell: Shell, words: tuple[str, ...], exit_code: int
) -> None:
    """And one sentence on stderr, never a traceback."""
    done = shell.run(*words)
    assert done.returncode == exit_code
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.timeout(120)
def test_output_fits_and_is_plain_where_asked(shell: Shell) -> None:
    """No line is wider than the terminal; NO_COLOR means no colour; pipes get none."""
    execution_id = shell.ok("run", f"{FLOWS}:fail", "x" * 300).strip()
    for columns in ("40", "80", "120"):
        for words in (("ls",), ("show", execution_id), ("history", execution_id)):
            output = shell.ok(*words, COLUMNS=columns)
            assert max(map(len, output.splitlines())) <= int(columns)
            assert "\x1b" not in output
        # Why it waits is said at any width.
        assert "no worker" in shell.ok("ls", COLUMNS=columns)
    forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[33m" in shell.ok("ls", **forced)
    assert "\x1b[33m" not in shell.ok("ls", **forced, NO_COLOR="1")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_a_worker(shell: Shell, number: signal.Signals) -> None:
    """It hands over what waits and leaves with exit code 0."""
    worker = shell.start("--queue", "default", "--concurrency", "5")
    execution_id = shell.ok("run", f"{FLOWS}:nap").strip()
    wait_until(lambda: shell.json("show", execution_id)[0]["status"] == "running")
    worker.send_signal(number)
    wait_for_event(worker, "worker.drained")
    assert worker.wait(WAIT_SECONDS) == 0
    (state,) = shell.json("show", execution_id)
    assert (state["status"], state["worker_id"]) == ("running", None)


@pytest.mark.timeout(60)
def test_a_second_signal_hurries(shell: Shell) -> None:
    """A worker that drains a long activity does not wait for it when asked twice."""
    worker = shell.start()
    execution_id = shell.ok("run", f"{FLOWS}:hold").strip()
    wait_until(lambda: shell.json("show", execution_id)[0]["status"] == "running")
    worker.send_signal(signal.SIGTERM)
    wait_until(lambda: shell.json("show", execution_id)[0]["worker_id"] is None)
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(WAIT_SECONDS) == 0
