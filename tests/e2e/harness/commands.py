"""Processes of the command ``stent``, as an operator starts and looks at them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from tests.e2e.harness.fleet import POLL_SECONDS, ROOT, wait_until

PROGRAMS = Path(__file__).parents[1] / "programs"
COMMAND_SECONDS = 30


def clean_environment(**variables: str) -> dict[str, str]:
    """Of this process, without what could configure stent, and with ``variables``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("STENT_", "COLUMNS", "NO_COLOR", "NOTIFY_", "WATCHDOG"))
    }
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | variables


class ProgramShell:
    """Runs commands in the directory of the programs, and waits for their end."""

    environment: dict[str, str]

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run ``stent WORDS...`` with further environment variables."""
        return subprocess.run(
            [sys.executable, "-m", "stent", *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=PROGRAMS,
            env=self.environment | variables,
            timeout=COMMAND_SECONDS,
        )

    def ok(self, *words: str, **variables: str) -> str:
        """What a command prints that must succeed."""
        done = self.run(*words, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words: str) -> list[dict[str, Any]]:
        """The documents that a command prints, one a line."""
        return [json.loads(line) for line in self.ok(*words, "--json").splitlines()]


class Command:
    """One process of ``stent``; its log goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.pid = process.pid

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def wait(self) -> int:
        """Until it is gone; its exit code."""
        await wait_until(lambda: self.ended)
        return self.process.wait()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of an event, by now."""
        found = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                facts = json.loads(line)
                if isinstance(facts, dict) and facts.get("event") == event:
                    found.append(facts)
        return found

    async def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Until it has logged an event so many times, or has ended."""
        await wait_until(lambda: self.ended or len(self.lines(event)) >= count)
        found = self.lines(event)
        assert len(found) >= count, self.log.read_text(encoding="utf-8")[-4000:]
        return found

    @property
    def port(self) -> int:
        """Of its health."""
        port: int = self.lines("health.opened")[0]["port"]
        return port

    async def probe(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and document of its health port."""
        await self.wait_for("health.opened")
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return int(head.split(b" ")[1]), json.loads(body)

    async def wait_for_probe(self, path: str, status: int) -> dict[str, Any]:
        """Until a probe gets this status; the document that came with it."""
        while True:
            found, facts = await self.probe(path)
            if found == status:
                return facts
            await asyncio.sleep(POLL_SECONDS)


class Commands:
    """All that one test starts; killed at its end."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Create it.

        Args:
            directory: Gets the logs.
            environment: Of every process.
        """
        self._directory = directory
        self._environment = dict(environment)
        self.started: list[Command] = []
        self._others: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for command in self.started:
            for line in command.lines("process.started"):
                self._others.add(line["pid"])
            if not command.ended:
                command.process.kill()
            command.process.wait()
        for pid in self._others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(
        self, *words: str, cwd: Path, session: bool = False, **variables: str
    ) -> Command:
        """Start a command in the background."""
        log = self._directory / f"command-{len(self.started) + 1}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "stent", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=cwd,
                env=self._environment | variables,
                start_new_session=session,
            )
        command = Command(process, log)
        self.started.append(command)
        return command

    async def run(self, *words: str, cwd: Path, **variables: str) -> tuple[int, str]:
        """Run a command to its end; exit code, and what it printed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stent",
            *words,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=cwd,
            env=self._environment | variables,
        )
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode()


def load_program(file: Path) -> ModuleType:
    """A module under the name that processes know which run in its directory."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
