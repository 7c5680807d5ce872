"""``python -m benchmarks.peers``: others beside stent, in one call, on one server.

Each runs in its own environment and its own database, one after the other, in one
process that dispatches and works. The floors are measured before and after each. Who
cannot be installed or does not run is a line that says why.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import floors
from benchmarks.peers.catalogue import OWN, PEERS, Peer
from benchmarks.peers.environments import (
    Environment,
    NotInstalledError,
    install,
    last_words,
)
from benchmarks.peers.report import Row, table, write
from benchmarks.places import own_database, servers_home
from stent import Stent

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
STOP_SECONDS_MAX = 10
# All that a program is given of the environment: settings of ours, or of Python, or of
# Postgres would be measured as well.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        runs: Of each workload; the median counts.
        seconds: After which no further run of a workload is begun.
        scale: Share of the full size of the workloads.
        limit: Seconds after which a peer is stopped.
        results: Directory for what comes out.
        environments: Directory for what is installed.
    """

    runs: int
    seconds: float
    scale: float
    limit: float
    results: Path
    environments: Path

    @property
    def parameters(self) -> dict[str, Any]:
        """Those that the programs take."""
        return {"runs": self.runs, "seconds": self.seconds, "scale": self.scale}


async def _measure(peers: list[Peer], plan: Plan, url: str) -> list[Row]:
    rows = []
    for peer in peers:
        row = Row(peer)
        rows.append(row)
        try:
            environment = await asyncio.to_thread(_prepare, peer, plan)
        except NotInstalledError as error:
            row.problem = f"it cannot be installed: {error}"
            click.echo(f"{peer.name}: {row.problem}", err=True)
            continue
        row.python = environment.version
        before = await _measure_floors(url)
        async with own_database(url) as own_url:
            await _run(row, environment, plan, own_url)
        after = await _measure_floors(url)
        row.floors = {name: (before[name] + after[name]) / 2 for name in before}
        told = f": {row.problem}" if row.problem else ""
        click.echo(f"{peer.name}: {len(row.figures)} figures{told}", err=True)
    return rows


async def _measure_floors(url: str) -> dict[str, float]:
    return {
        "F1": await floors.rows_per_second(url, 10_000),
        "F2": await floors.commit_ms(url, 500),
    }


def _prepare(peer: Peer, plan: Plan) -> Environment:
    if peer is OWN:
        version = ".".join(platform.python_version_tuple()[:2])
        return Environment(Path(sys.executable), version, None)
    return install(peer, plan.environments)


async def _run(row: Row, environment: Environment, plan: Plan, url: str) -> None:
    """Run a program; what it tells goes into the row, what it says into a file."""
    variables = {n: os.environ[n] for n in KEPT_VARIABLES if n in os.environ}
    parameters = plan.parameters
    if row.peer is OWN:
        variables["PYTHONPATH"] = str(ROOT)
    if environment.server is not None:
        parameters["server"] = str(environment.server.absolute())
    log = plan.results / f"{row.peer.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="stent-bench-") as own,
        log.open("wb") as errors,
    ):
        # What it leaves behind when it is killed goes with it.
        variables["TMPDIR"] = own
        process = await asyncio.create_subprocess_exec(
            environment.python.absolute(),
            PROGRAMS / row.peer.program,
            url,
            json.dumps(parameters),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=variables,
            cwd=own,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(plan.limit):
                await _listen(process, row)
                code = await process.wait()
            if code != 0:
                words = last_words(log.read_text(encoding="utf-8", errors="replace"))
                row.problem = f"it ended with exit code {code}: {words}"
        except TimeoutError:
            row.problem = f"it was not done after {plan.limit:g} s"
        finally:
            await _stop(process)


async def _listen(process: asyncio.subprocess.Process, row: Row) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        figure = json.loads(line)
        row.figures[figure.pop("id")] = figure


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Politely first; then whatever is left of it and of what it has started."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _chosen(only: str) -> list[Peer]:
    """We come first, always.

    Raises:
        click.UsageError: There is no such peer.
    """
    names = {name for name in only.lower().split(",") if name}
    known = {peer.key for peer in (OWN, *PEERS)}
    if names - known:
        unknown = ", ".join(sorted(names - known))
        message = f"no such peer: {unknown}; there are {', '.join(sorted(known))}"
        raise click.UsageError(message)
    return [OWN, *[peer for peer in PEERS if not names or peer.key in names]]


@click.command()
@click.option("--only", default="", help="Comma-separated peers, such as dbos,oban.")
@click.option("--runs", default=3, help="Runs of each workload; the median counts.")
@click.option("--seconds", default=20.0, help="No further run of a workload then.")
@click.option("--scale", default=1.0, help="Share of the full size of the workloads.")
@click.option("--limit", default=600.0, help="Seconds after which a peer is stopped.")
@click.option("--results", default=Path("bench-results"), type=Path, help="Where to.")
@click.option(
    "--environments",
    default=Path(".bench-peers"),
    type=Path,
    help="Where they are installed.",
)
@click.option("--url", default=None, help="Measure on this server instead.")
def main(*, only: str, url: str | None, **plan: Any) -> None:
    """Install, measure, and write one table, one picture and JSON."""
    chosen = Plan(**plan)
    rows = asyncio.run(_with_server(_chosen(only), chosen, url))
    click.echo(table(rows))
    for path in write(rows, chosen.results, chosen.parameters):
        click.echo(path)


async def _with_server(peers: list[Peer], plan: Plan, url: str | None) -> list[Row]:
    if url is not None:
        return await _measure(peers, plan, url)
    with servers_home("stent-bench-") as home:
        async with Stent(home=home) as server:
            return await _measure(peers, plan, server.url)


if __name__ == "__main__":
    main()
