"""``python -m benchmarks``: every workload with its floor, as a table and as JSON.

One embedded PostgreSQL in a new directory, fsync on; the worker runs in this process
except where one is killed. A figure is the median of the runs, and is judged as a ratio
to a floor measured in the same run: machines are noisy.
"""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import floors, workloads
from benchmarks.plain_flights import plain_flights
from stent import Stent


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    id: str
    what: str
    value: float
    unit: str
    floor: str
    ratio: float | None
    wanted: str
    met: bool | None


async def _median(measure: Callable[[], Awaitable[float]], runs: int) -> float:
    return statistics.median([await measure() for _ in range(runs)])


async def _measure(only: set[str], runs: int, url: str) -> list[Figure]:
    figures: list[Figure] = []

    def add(  # noqa: PLR0913, PLR0917 - a row
        name: str,
        what: str,
        value: float,
        unit: str,
        floor: tuple[str, float] | None = None,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        ratio = None if floor is None else value / floor[1]
        judged = value if ratio is None else ratio
        wanted, met = "", None
        if least is not None:
            wanted, met = f"at least {least}", judged >= least
        elif most is not None:
            wanted, met = f"at most {most}", judged <= most
        figures.append(
            Figure(
                name, what, value, unit, floor[0] if floor else "", ratio, wanted, met
            )
        )

    def wants(*names: str) -> bool:
        return not only or bool(only & set(names))

    async with Stent.bootstrap(url, serve=True) as app:
        await workloads.sequence(app, 50)
        await workloads.fan_out(app, 500)
        f1 = f2 = 0.0
        # Latencies first: after the rest the server is busy cleaning up behind it.
        if wants("W3", "W5"):
            f2 = await _median(lambda: floors.commit_ms(url, 500), runs)
            add("F2", "one-row insert, committed", f2, "ms")
            f3 = await _median(lambda: floors.notify_ms(url, 300), runs)
            add("F3", "insert, NOTIFY, heard", f3, "ms")
        if wants("W3"):
            step = await _median(lambda: workloads.sequence(app, 500), runs)
            add("W3", "500 steps in sequence", step, "ms a step", ("F2", f2), most=3.3)
        if wants("W5"):
            pairs = [await workloads.latency(app, 500) for _ in range(runs)]
            p50 = statistics.median(pair[0] for pair in pairs)
            p99 = statistics.median(pair[1] for pair in pairs)
            add("W5", "dispatch to result, p50", p50, "ms", ("F2", f2), most=15)
            add("W5", "dispatch to result, p99", p99, "ms", ("F2", f2))
        if wants("W1", "W2", "W4"):
            f1 = await _median(lambda: floors.rows_per_second(url, 20_000), runs)
            add("F1", "insert, claim, complete by 500", f1, "rows/s")
        if wants("W1"):
            for count in (2_000, 20_000):
                rate = await _median(lambda: workloads.fan_out(app, count), runs)  # noqa: B023
                add("W1", f"gather of {count} activities", rate, "/s", ("F1", f1), 0.2)
        if wants("W2"):
            rate = await _median(lambda: workloads.map_items(app, 200_000), runs)
            add("W2", "map of 200000 items", rate, "items/s", ("F1", f1), 1.9)
        if wants("W4"):
            for count in (500, 5_000):
                rate = await _median(lambda: workloads.many_workflows(app, count), runs)  # noqa: B023
                add("W4", f"{count} workflows of 3 steps", rate, "/s", ("F1", f1), 0.03)
        if wants("W6"):
            await _measure_flights(app, url, runs, add)
    if wants("W10"):
        times = sorted(await workloads.takeover(url, max(5, runs)))
        add(
            "W10", "kill -9 to next run, p50", statistics.median(times), "ms", most=1000
        )
        add("W10", "kill -9 to next run, worst", times[-1], "ms")
    return figures


async def _measure_flights(
    app: Stent, url: str, runs: int, add: Callable[..., None]
) -> None:
    from benchmarks.flights import durable_flights  # noqa: PLC0415

    floor = await _median(lambda: plain_flights(url), runs)
    add("F4", "flights, plain loop", floor, "rows/s")
    rate = await _median(lambda: durable_flights(app), runs)
    add("W6", "flights, exactly-once chunks", rate, "rows/s", ("F4", floor))


def _print(figures: list[Figure]) -> None:
    click.echo(f"{'':4} {'workload':34} {'figure':>14}  {'ratio':>12}  wanted")
    for f in figures:
        ratio = "" if f.ratio is None else f"{f.ratio:.3g} of {f.floor}"
        mark = "" if f.met is None else ("  ok" if f.met else "  MISSED")
        value = f"{f.value:,.2f}" if f.value < 100 else f"{f.value:,.0f}"
        click.echo(
            f"{f.id:4} {f.what:34} {value:>10} {f.unit:9} {ratio:>14}  {f.wanted}{mark}"
        )


@click.command()
@click.option("--only", default="", help="Comma-separated ids, such as W1,W3.")
@click.option("--runs", default=3, help="Runs of each workload; the median counts.")
@click.option("--json", "json_path", type=Path, help="Also write the figures here.")
@click.option("--uvloop", "use_uvloop", is_flag=True, help="Run on uvloop.")
@click.option("--url", default=None, help="Measure on this server instead.")
def main(
    *, only: str, runs: int, json_path: Path | None, use_uvloop: bool, url: str | None
) -> None:
    """Measure, print, and fail if a wanted ratio is missed."""
    names = {name for name in only.upper().split(",") if name}
    figures = _run(_with_server(names, runs, url), use_uvloop=use_uvloop)
    click.echo(f"{platform.python_version()}, {'uvloop' if use_uvloop else 'asyncio'}")
    _print(figures)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(f) for f in figures], indent=2))
    sys.exit(1 if any(f.met is False for f in figures) else 0)


def _run(measure: Any, *, use_uvloop: bool) -> list[Figure]:
    if not use_uvloop:
        return list(asyncio.run(measure))
    import uvloop  # noqa: PLC0415 - an extra

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return list(runner.run(measure))


async def _with_server(names: set[str], runs: int, url: str | None) -> list[Figure]:
    if url is not None:
        return await _measure(names, runs, url)
    home = Path(tempfile.mkdtemp(prefix="stent-bench-"))
    try:
        async with Stent(home=home) as server:
            return await _measure(names, runs, server.url)
    finally:
        _remove(home)


def _remove(home: Path) -> None:
    # As root the files of the server are elsewhere, and home has links to them.
    for path in (*home.iterdir(), home):
        shutil.rmtree(path.resolve(), ignore_errors=True)


if __name__ == "__main__":
    main()
