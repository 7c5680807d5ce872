"""The commands of the files that run stent elsewhere, run here, without containers.

Each process gets the command that its file gives it. What stands in for the container
is replaced: the program's place, the address of the health port (two containers have
the same one), the directory of the volume, and the database's URL.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import asyncpg
import pytest

from stent import Stent, durable
from stent.store.embedded_binaries import find_binaries
from tests.deployment import (
    ROOT,
    compose,
    container,
    dockerfile,
    manifest,
    unit,
    unit_command,
)
from workers.flights.source import ARCHIVE
from workers.flights.watch import prove, read_expected

WAIT_SECONDS = 40
JOB_SECONDS = 150


@durable(name="deployment.wait", kind="activity")
async def waiting(n: int) -> int:
    return n


class Machine:
    """Runs commands of `stent`; what is still alive at the end is killed."""

    def __init__(self, database_url: str, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("STENT_")},
            "STENT_DATABASE_URL": database_url,
            "PYTHONPATH": str(ROOT),
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """A command that ends."""
        return subprocess.run(
            [sys.executable, "-m", "stent", *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=self.environment,
            timeout=JOB_SECONDS,
        )

    def start(
        self, words: list[str], before: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        """A command that stays; its log goes to a file, named by its number."""
        log = self.directory / f"{len(self.started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", "stent", *words],
                cwd=self.directory,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stderr=output,
            )
        self.started.append(process)
        return process

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until it holds; nobody waits for a process that has ended."""
        give_up = time.monotonic() + WAIT_SECONDS
        while not condition():
            for number, process in enumerate(self.started):
                log = (self.directory / f"{number}.log").read_text(encoding="utf-8")
                assert process.poll() is None, log
            assert time.monotonic() < give_up, "it never held"
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """What the manager of a container sends, and how the worker ends."""
        (number,) = {
            signal.Signals[one.words]
            for one in dockerfile()
            if one.name == "STOPSIGNAL"
        }
        process.send_signal(number)
        return process.wait(WAIT_SECONDS)


@pytest.fixture
def machine(empty_database_url: str, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(empty_database_url, tmp_path)
    yield machine
    for process in machine.started:
        if process.poll() is None:
            process.kill()
        process.wait()


def succeeds(words: list[str], environment: Mapping[str, str]) -> bool:
    """Whether a check ends with 0."""
    done = subprocess.run(words, check=False, capture_output=True, env=environment)
    return done.returncode == 0


def children_of(process_id: int) -> list[int]:
    """As the namespace outside sees them."""
    file = Path(f"/proc/{process_id}/task/{process_id}/children")
    return [int(word) for word in file.read_text(encoding="utf-8").split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def placed(words: list[str], changes: Mapping[str, str]) -> list[str]:
    """The same command for another address or directory."""
    for old in changes:
        assert any(old in word for word in words), old
    changed = []
    for given in words:
        word = given
        for old, new in changes.items():
            word = word.replace(old, new)
        changed.append(word)
    return changed


def answer(port: int, path: str) -> int:
    """The status that a probe sees; 0 when nobody listens."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            status: int = response.status
            return status
    except HTTPError as error:
        return error.code
    except (URLError, ConnectionError, TimeoutError):
        return 0


@pytest.mark.timeout(2 * JOB_SECONDS + 3 * WAIT_SECONDS)
async def test_compose_without_containers(
    machine: Machine, empty_database_url: str
) -> None:
    """Migrate, two workers, the job: every row is there once; then all end well."""
    services = compose({"POSTGRES_PASSWORD": "cafe"})["services"]
    parts = urlsplit(empty_database_url)
    (socket_directory,) = parse_qs(parts.query)["host"]
    check = placed(
        services["postgres"]["healthcheck"]["test"][1:],
        {"127.0.0.1": socket_directory, "=stent": "=postgres"},
    )
    program, *words = check
    place = {"PGPORT": parse_qs(parts.query).get("port", ["5432"])[0]}
    pg_isready = str(find_binaries().psql.with_name(program))
    assert succeeds([pg_isready, *words], os.environ | place)

    migrated = machine.run(services["migrate"]["command"])
    assert migrated.returncode == 0, migrated.stderr

    worker = services["worker"]
    ports = [free_port() for _ in range(worker["deploy"]["replicas"])]
    for port in ports:
        words = placed(worker["command"], {"0.0.0.0:8080": f"127.0.0.1:{port}"})
        machine.start(words)

    def healthy(port: int) -> bool:
        program, *words = placed(
            worker["healthcheck"]["test"][1:], {":8080/": f":{port}/"}
        )
        assert program == "python"
        done = subprocess.run(
            [sys.executable, *words], check=False, capture_output=True
        )
        return done.returncode == 0

    assert len(ports) == 2
    for port in ports:
        machine.wait_until(lambda port=port: healthy(port))  # type: ignore[misc]

    volume = machine.directory / "work"
    job = placed(services["flights"]["command"], {"/work": str(volume)})
    done = machine.run(job)
    assert done.returncode == 0, done.stderr
    (execution_id,) = [
        line.split()[1] for line in done.stderr.splitlines() if "execution " in line
    ]
    connection = await asyncpg.connect(empty_database_url)
    try:
        expected = read_expected(ARCHIVE)
        proof = await prove(connection, execution_id, expected)
        assert proof.holds, proof
        assert expected.rows == 336_776
        # Started again, as after a restart of the machine, it runs nothing twice.
        again = machine.run(job)
        assert (again.returncode, again.stdout) == (0, done.stdout)
        count = "select count(*) from stent.executions where parent_id is null"
        assert await connection.fetchval(count) == 1
        workers = await connection.fetchval(
            "select count(distinct worker_id) from stent.results"
        )
        assert workers == 2
    finally:
        await connection.close()
    assert [machine.stop(process) for process in machine.started] == [0, 0]


@pytest.mark.timeout(4 * WAIT_SECONDS)
def test_kubernetes_without_a_cluster(machine: Machine) -> None:
    """The job migrates, the probes see the worker come and go."""
    migrated = machine.run(container("Job")["args"])
    assert migrated.returncode == 0, migrated.stderr
    found, port = container("Deployment"), free_port()
    probes = {
        name: found[name]["httpGet"]["path"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    words = placed(found["args"], {"0.0.0.0:8080": f"127.0.0.1:{port}"})
    worker = machine.start(words)
    for path in probes.values():
        machine.wait_until(lambda path=path: answer(port, path) == 200)  # type: ignore[misc]
    assert machine.stop(worker) == 0
    assert answer(port, probes["readinessProbe"]) == 0


PID_NAMESPACE = [
    "unshare",
    *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
    *("--pid", "--fork", "--kill-child"),
]


@pytest.mark.timeout(4 * WAIT_SECONDS)
async def test_process_1_drains(
    machine: Machine, database_url: str, connection: asyncpg.Connection
) -> None:
    """Without an init: what the kernel ignores for process 1, a worker obeys."""
    unshare = shutil.which(PID_NAMESPACE[0])
    if unshare is None or not succeeds([*PID_NAMESPACE, "true"], os.environ):
        pytest.skip("this machine does not allow process namespaces")
    machine.environment["STENT_DATABASE_URL"] = database_url
    outer = machine.start(["worker", "workers.flights.job"], before=PID_NAMESPACE)
    log = machine.directory / "0.log"
    machine.wait_until(lambda: "worker.started" in log.read_text(encoding="utf-8"))
    (process_1,) = children_of(outer.pid)
    row = await connection.fetchrow("select pid, state from stent.leases")
    assert tuple(row) == (1, "running")
    os.kill(process_1, signal.SIGTERM)
    assert outer.wait(WAIT_SECONDS) == 0
    assert await connection.fetchval("select state from stent.leases") == "stopped"


async def test_the_scaler_reads_a_number(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Its query is one integer: nothing, then what could be claimed."""
    (trigger,) = manifest("ScaledObject")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert await connection.fetchval(query) == 0
    async with Stent(database_url) as app:
        await app.dispatch_many(waiting, range(7))
        await app.dispatch(waiting.options(queue="other"), 1)
        await app.dispatch(waiting.options(delay="1h"), 1)
    rows = await connection.fetch(query)
    assert [tuple(row) for row in rows] == [(7,)]
    assert isinstance(rows[0][0], int)


@pytest.mark.timeout(4 * WAIT_SECONDS)
def test_the_unit_without_systemd(machine: Machine) -> None:
    """Its command tells systemd when it serves, that it lives, and when it stops."""
    environment = {
        "WORKER_MODULES": "workers.flights.job",
        "WORKER_OPTIONS": "--concurrency 5 --queue default",
    }
    _, *words = unit_command(environment)
    assert unit()["Service"]["Type"] == "notify"
    address = machine.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(WAIT_SECONDS)
        worker = machine.start(
            words, NOTIFY_SOCKET=str(address), WATCHDOG_USEC="1000000"
        )
        heard: list[str] = []

        def hear(wanted: str) -> None:
            while wanted not in heard:
                heard.extend(manager.recv(4096).decode().splitlines())

        hear("READY=1")
        hear("WATCHDOG=1")
        assert machine.stop(worker) == 0
        hear("STOPPING=1")
