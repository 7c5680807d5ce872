"""Limits as an operator handles them in a shell, while two workers are at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness.commands import (
    PROGRAMS,
    Command,
    ProgramShell,
    clean_environment,
)
from tests.e2e.harness.fleet import wait_until

FLOWS = "limited_flows"


class Shell(ProgramShell):
    """ProgramShell on one database, and the workers that were started."""

    def __init__(self, url: str, directory: Path) -> None:
        self.environment = clean_environment(STENT_DATABASE_URL=url)
        self.gate = directory / "open"
        self.environment["GATE"] = str(self.gate)
        self.directory = directory
        self.workers: list[Command] = []

    async def start(self) -> Command:
        """A worker that has begun to claim."""
        worker = self._spawn()
        await worker.wait_for("worker.started")
        return worker

    def _spawn(self) -> Command:
        log = self.directory / f"worker{len(self.workers)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "stent", "worker", FLOWS],
                stderr=stderr,
                cwd=PROGRAMS,
                env=self.environment,
            )
        self.workers.append(Command(process, log))
        return self.workers[-1]

    def limit(self, name: str) -> dict[str, Any]:
        """The line of a limit."""
        (found,) = [one for one in self.json("limits") if one["name"] == name]
        return found

    def waits(self, execution_id: str) -> str:
        """Why an execution waits."""
        (shown,) = self.json("show", execution_id)
        return " | ".join(shown["waiting_for"])


@pytest.fixture
def shell(database_url: str, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(database_url, tmp_path)
    yield shell
    for worker in shell.workers:
        if not worker.ended:
            worker.process.kill()
        worker.process.wait()


@pytest.mark.timeout(120)
async def test_limits_are_seen_and_changed_from_a_shell(shell: Shell) -> None:
    """Two workers share three slots; more are given, the queue is paused, all ends."""
    name = f"{FLOWS}.guarded"
    await shell.start()
    await shell.start()
    execution_id = shell.ok("run", f"{FLOWS}:guarded_flow", "12").strip()
    await wait_until(lambda: shell.limit(name)["in_use"] == 3)
    limit = shell.limit(name)
    assert (limit["max_concurrent"], limit["set_by"]) == (3, "code")
    await wait_until(lambda: shell.limit(name)["waiting"] == 9)
    assert "slot 3 of 3 held by worker " in shell.waits(execution_id)
    for columns in ("60", "120"):
        output = shell.ok("limits", COLUMNS=columns)
        assert name in output
        assert max(map(len, output.splitlines())) <= int(columns)
    said = shell.ok("limits", "set", f"{FLOWS}:guarded", "--max-concurrent", "5")
    assert said == f"function {name}: at most 5 at a time, set by an operator\n"
    await wait_until(lambda: shell.limit(name)["in_use"] == 5)
    shell.ok("limits", "set", name, "--rate", "1000/s")
    limit = shell.limit(name)
    assert (limit["max_concurrent"], limit["rate"]) == (5, "1000/s")
    assert limit["set_by"] == "operator"
    said = shell.ok("limits", "reset", name)
    assert said == f"function {name}: at most 3 at a time, as the code says\n"
    assert "paused" in shell.ok("pause", "--queue", "default")
    held_up = shell.ok("run", f"{FLOWS}:guarded_flow", "1").strip()
    await wait_until(lambda: "queue 'default' is paused" in shell.waits(held_up))
    shell.gate.touch()
    assert "no limit" in shell.ok("resume", "--queue", "default")
    assert shell.ok("wait", execution_id, "--timeout", "20s") == "66\n"
    assert shell.ok("wait", held_up, "--timeout", "20s") == "0\n"


@pytest.mark.timeout(90)
def test_what_nobody_knows_is_accepted_and_said(shell: Shell) -> None:
    """A limit may be there before its function; a mistyped name is noticed."""
    shell.ok("db", "migrate")
    done = shell.run("limits", "set", "shop.pay", "--rate", "5/m", "--json")
    assert (done.returncode, json.loads(done.stdout)["known"]) == (0, False)
    assert "no worker has a function shop.pay" in done.stderr
    done = shell.run("pause", "--queue", "reprots")
    assert (done.returncode, done.stdout) == (0, "queue reprots: paused; no limit\n")
    assert "no worker serves a queue 'reprots'" in done.stderr
    known = {one["name"]: one for one in shell.json("limits")}
    assert (known["shop.pay"]["rate"], known["reprots"]["paused"]) == ("5/m", True)
    shell.ok("run", f"{FLOWS}:guarded_flow", "1")
    done = shell.run("pause", "--function", "guarded_flow")
    assert f"did you mean {FLOWS}.guarded_flow?" in done.stderr


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "words",
    [
        ("limits", "set", "shop.pay"),
        ("limits", "set", "--max-concurrent", "3"),
        ("limits", "set", "shop.pay", "--queue", "x", "--rate", "1/s"),
        ("limits", "set", "shop.pay", "--rate", "fast"),
        ("limits", "set", "shop.pay", "--max-concurrent", "0"),
        ("limits", "reset"),
        ("pause",),
        ("resume", "--function", "a", "--queue", "b"),
    ],
)
def test_mistakes_are_refused(shell: Shell, words: tuple[str, ...]) -> None:
    done = shell.run(*words)
    assert done.returncode == 2, os.linesep.join((done.stdout, done.stderr))
    assert "Error: " in done.stderr
    assert done.stdout == ""
