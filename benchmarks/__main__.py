"""``python -m benchmarks``: every workload with its floor, as a table and as JSON.

One embedded PostgreSQL in a new directory, fsync on; the worker runs in this process
except where one is killed or more than one are compared. A figure is the median of the
runs, and is judged as a ratio to a floor measured in the same run: machines are noisy.
"""

from __future__ import annotations

import asyncio
import platform
import statistics
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import backlog, floors, residence, scaling, workloads
from benchmarks.figures import Table, median, percentile
from benchmarks.places import (
    find_pooler,
    own_database,
    pooler,
    servers_home,
    worker_processes,
)
from benchmarks.plain_flights import plain_flights
from benchmarks.shares import SharesUnavailableError
from stent import Stent

PACED_SECONDS = 10.0
"""How long W7 watches claims at half a thousand activities a second."""
CLAIMS_FOR_P99 = 100
"""With fewer, p99 is the worst one."""
SERVER_FULL = 0.75
"""Of its share: Postgres is the limit. While the code of one workflow makes its calls,
or reads the last results, it has nothing to do."""
OWNER_FULL = 0.85
"""Of its share: the worker that advances the workflow is the limit."""
GROWTH_LEAST = 1.15
"""What twice as many workers get more done while neither is the limit."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long.

    Attributes:
        only: Ids of workloads; empty: all.
        runs: Of each workload; the median counts.
        backlog_rows: Rows that wait in W7.
        hold_seconds: How long W7 holds a transaction open.
        share: Of a processor that each process has in W8S.
        entries: Of the journal of W11.
        sleepers: Executions that sleep in W12.
        idle_seconds: How long W12 watches them.
    """

    only: frozenset[str]
    runs: int
    backlog_rows: int
    hold_seconds: float
    share: float
    entries: int
    sleepers: int
    idle_seconds: float

    def wants(self, *names: str) -> bool:
        """Whether one of these is measured."""
        return not self.only or bool(self.only & set(names))


async def _measure(plan: Plan, url: str) -> Table:
    table = Table()
    # Latencies first: after the rest the server is busy cleaning up behind it.
    f2 = await median(lambda: floors.commit_ms(url, 500), plan.runs)
    table.add("F2", "one-row insert, committed", f2, "ms")
    f3 = await median(lambda: floors.notify_ms(url, 300), plan.runs)
    table.add("F3", "insert, NOTIFY, heard", f3, "ms")
    if plan.wants(*_OF_ONE_WORKER):
        async with Stent.bootstrap(url, serve=True) as app:
            await workloads.sequence(app, 50)
            await workloads.fan_out(app, 500)
            await _measure_latencies(table, plan, app, ("F2", f2))
            f1 = await _measure_rows(table, plan, url)
            await _measure_rates(table, plan, app, ("F1", f1))
            if plan.wants("W6"):
                await _measure_flights(table, app, url, plan.runs)
    else:
        await _measure_rows(table, plan, url)
    for name, measure in _SCENARIOS.items():
        if plan.wants(name):
            async with own_database(url) as own_url:
                try:
                    await measure(table, plan, own_url)
                except TimeoutError as error:
                    table.fail(name, str(error) or "it took too long")
    return table


async def _measure_rows(table: Table, plan: Plan, url: str) -> float:
    f1 = await median(lambda: floors.rows_per_second(url, 20_000), plan.runs)
    table.add("F1", "insert, claim, complete by 500", f1, "rows/s")
    return f1


async def _measure_latencies(
    table: Table, plan: Plan, app: Stent, floor: tuple[str, float]
) -> None:
    if plan.wants("W3"):
        step = await median(lambda: workloads.sequence(app, 500), plan.runs)
        table.add("W3", "500 steps in sequence", step, "ms a step", floor, most=3.3)
    if plan.wants("W5"):
        pairs = [await workloads.latency(app, 500) for _ in range(plan.runs)]
        p50 = statistics.median(pair[0] for pair in pairs)
        p99 = statistics.median(pair[1] for pair in pairs)
        table.add("W5", "dispatch to result, p50", p50, "ms", floor, most=15)
        table.add("W5", "dispatch to result, p99", p99, "ms", floor)


async def _measure_rates(
    table: Table, plan: Plan, app: Stent, floor: tuple[str, float]
) -> None:
    runs = plan.runs
    if plan.wants("W1"):
        for count in (2_000, 20_000):
            rate = await _rate(workloads.fan_out, app, count, runs)
            table.add("W1", f"gather of {count} activities", rate, "/s", floor, 0.2)
    if plan.wants("W2"):
        rate = await _rate(workloads.map_items, app, 200_000, runs)
        table.add("W2", "map of 200000 items", rate, "items/s", floor, 1.9)
    if plan.wants("W4"):
        for count in (500, 5_000):
            rate = await _rate(workloads.many_workflows, app, count, runs)
            table.add("W4", f"{count} workflows of 3 steps", rate, "/s", floor, 0.03)


async def _rate(
    workload: Callable[[Stent, int], Awaitable[float]],
    app: Stent,
    count: int,
    runs: int,
) -> float:
    return await median(lambda: workload(app, count), runs)


async def _measure_flights(table: Table, app: Stent, url: str, runs: int) -> None:
    from benchmarks.flights import durable_flights  # noqa: PLC0415

    floor = await median(lambda: plain_flights(url), runs)
    table.add("F4", "flights, plain loop", floor, "rows/s")
    rate = await median(lambda: durable_flights(app), runs)
    table.add("W6", "flights, exactly-once chunks", rate, "rows/s", ("F4", floor))


async def _measure_backlog(table: Table, plan: Plan, url: str) -> None:
    rows = plan.backlog_rows
    async with Stent.bootstrap(url, serve=True) as app:
        await workloads.fan_out(app, 500)
        alone = await _feel_backlog(table, plan, app, "no rows")
        for what, waiting in (
            (f"{rows} rows of others", backlog.waiting_elsewhere),
            (f"{rows} rows, saturated", backlog.waiting_saturated),
        ):
            async with waiting(app, url, rows):
                share = await _feel_backlog(table, plan, app, what, claim_most=15)
            # Of what the floor left to it each time: minutes lie between the two.
            against = share / alone
            table.add("W7", f"W1, {what}, to none", against, "times", least=0.8)


async def _feel_backlog(
    table: Table, plan: Plan, app: Stent, what: str, claim_most: float | None = None
) -> float:
    """What a worker reaches in one situation; the share of the floor beside it."""
    claims = await backlog.paced_claims(app, PACED_SECONDS)
    f1 = await median(lambda: floors.rows_per_second(app.url, 20_000), plan.runs)
    rate = await _rate(workloads.fan_out, app, 20_000, plan.runs)
    table.add("F1", f"floor, {what}", f1, "rows/s")
    table.add("W7", f"W1, {what}", rate, "/s", ("F1", f1))
    table.add("W7", f"claim p50, {what}", percentile(claims, 0.5), "ms")
    p99 = percentile(claims, 0.99)
    table.add("W7", f"claim p99, {what}", p99, "ms", most=claim_most)
    return rate / f1


async def _measure_held_open(table: Table, plan: Plan, url: str) -> None:
    async with Stent.bootstrap(url, serve=True) as app:
        await workloads.fan_out(app, 500)
        held = await backlog.held_open(app, url, plan.hold_seconds)
    what = f"transaction open for {plan.hold_seconds:g} s"
    table.add("W7B", f"activities beside a {what}", held.rate, "/s")
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        before = percentile(held.before_ms, share)
        after = percentile(held.after_ms, share)
        table.add("W7B", f"claim {name} before", before, "ms")
        # The p99 of a few seconds is the worst of some ten claims: shown, not judged.
        few = min(len(held.before_ms), len(held.after_ms)) < CLAIMS_FOR_P99
        most = 3 if share == 0.5 or not few else None
        floor = (f"{name} before", before)
        table.add("W7B", f"claim {name} at the end", after, "ms", floor, most=most)


async def _measure_scaling(table: Table, plan: Plan, url: str) -> None:
    activities = 20_000
    works: tuple[tuple[str, scaling.Workload, int], ...] = (
        ("W1", workloads.fan_out, activities),
        ("W1 of 20 ms each", workloads.fan_out_waits, activities),
        ("W4", workloads.many_workflows, 5_000),
    )
    of_one: dict[str, float] = {}
    for name, work, size in works:
        for count in (1, 2, 4):
            scaled = await scaling.with_processes(url, count, work, size, plan.runs)
            one = of_one.setdefault(name, scaled.rate)
            what = f"{name} on {count} worker process{'es' if count > 1 else ''}"
            busy = scaled.busy
            note = "" if busy is None else f"processors {busy:.0%} busy"
            table.add("W8", what, scaled.rate, "/s", ("one", one), note=note)
    first = of_one["W1"]
    straight = await scaling.two_fleets(url, None, activities // 2, plan.runs)
    table.add("W8", "two fleets, connected directly", straight, "/s", ("one", first))
    program = find_pooler()
    if program is None:
        why = "no pgbouncer on this machine"
        table.miss("W8", "two fleets through pgbouncer", why)
        return
    async with pooler(program, url) as pooled:
        rate = await scaling.two_fleets(pooled, url, activities // 2, plan.runs)
    table.add("W8", "two fleets through pgbouncer", rate, "/s", ("direct", straight))


async def _measure_shares(table: Table, plan: Plan, url: str) -> None:
    """Until one of them is the limit, more workers get more done."""
    works: tuple[tuple[str, scaling.Workload, int], ...] = (
        ("W1", workloads.fan_out, 10_000),
        ("W4", workloads.many_workflows, 1_000),
    )
    table.add("W8S", "of a processor has each process", plan.share, "")
    try:
        for servers, beside in ((1, "the same"), (2, "twice that")):
            for name, work, size in works:
                what = f"{name}, Postgres has {beside}"
                await _measure_shared(table, plan, url, (what, work, size), servers)
    except SharesUnavailableError as error:
        table.miss("W8S", "workers with a share of a processor", str(error))


async def _measure_shared(
    table: Table,
    plan: Plan,
    url: str,
    workload: tuple[str, scaling.Workload, int],
    servers: int,
) -> None:
    what, work, size = workload
    one = before = 0.0
    for count in (1, 2, 4):
        shared = await scaling.with_shares(
            url, count, plan.share, plan.share * servers, work, size, plan.runs
        )
        one = one or shared.rate
        # It has to grow, unless Postgres has nothing left to give, or the one process
        # that advances the one workflow.
        owned = work is workloads.fan_out and shared.busiest >= OWNER_FULL
        full = owned or shared.server >= SERVER_FULL
        least = None if count == 1 or full else round(GROWTH_LEAST * before / one, 2)
        before = shared.rate
        note = f"Postgres {shared.server:.0%}, busiest worker {shared.busiest:.0%}"
        if shared.others is not None:
            note += f", others {shared.others:.0%} of their shares"
        label = f"{count} worker{'s' if count > 1 else ''}, {what}"
        table.add("W8S", label, shared.rate, "/s", ("one", one), least, note=note)


async def _measure_takeover(table: Table, plan: Plan, url: str) -> None:
    times = sorted(await workloads.takeover(url, max(5, plan.runs)))
    p50 = statistics.median(times)
    table.add("W10", "kill -9 to next run, p50", p50, "ms", most=1000)
    table.add("W10", "kill -9 to next run, worst", times[-1], "ms")


async def _measure_replay(table: Table, plan: Plan, url: str) -> None:
    async with Stent.bootstrap(url, serve=True) as app:
        execution_id = await residence.record_sequence(app, plan.entries)
    seen = [await residence.replay_once(url, execution_id) for _ in range(plan.runs)]
    what = f"journal of {seen[0].entries} entries"
    loaded = statistics.median(one.load_ms for one in seen)
    replayed = statistics.median(one.replay_ms for one in seen)
    table.add("W11", f"{what}, read", loaded, "ms")
    table.add("W11", f"{what}, replayed", replayed, "ms")


async def _measure_sleepers(table: Table, plan: Plan, url: str) -> None:
    async with worker_processes(url, 1):
        # So that the schema is there, and what follows begins with nothing to do.
        pass
    seen = await residence.asleep(url, plan.sleepers, plan.idle_seconds)
    what = f"{plan.sleepers} executions"
    table.add("W12", f"{what} dispatched and parked", seen.park_rate, "/s")
    table.add("W12", "memory of the worker before", seen.memory_before_mib, "MiB")
    floor = ("before", seen.memory_before_mib)
    table.add("W12", f"memory, {what} asleep", seen.memory_mib, "MiB", floor)
    idle = seen.transactions_per_second
    table.add("W12", f"transactions, {what} asleep", idle, "/s")


_Scenario = Callable[[Table, Plan, str], Coroutine[Any, Any, None]]
_SCENARIOS: dict[str, _Scenario] = {
    "W7": _measure_backlog,
    "W7B": _measure_held_open,
    "W8": _measure_scaling,
    "W8S": _measure_shares,
    "W10": _measure_takeover,
    "W11": _measure_replay,
    "W12": _measure_sleepers,
}
"""Those that have a database of their own."""


_OF_ONE_WORKER = ("W1", "W2", "W3", "W4", "W5", "W6")


@click.command()
@click.option("--only", default="", help="Comma-separated ids, such as W1,W3.")
@click.option("--runs", default=3, help="Runs of each workload; the median counts.")
@click.option("--json", "json_path", type=Path, help="Also write the figures here.")
@click.option("--uvloop", "use_uvloop", is_flag=True, help="Run on uvloop.")
@click.option("--url", default=None, help="Measure on this server instead.")
@click.option(
    "--rows", "backlog_rows", default=1_000_000, help="W7: rows that wait.", type=int
)
@click.option("--hold", "hold_seconds", default=30.0, help="W7B: seconds held open.")
@click.option("--share", default=0.25, help="W8S: processor time of each process.")
@click.option("--entries", default=10_000, help="W11: entries of the journal.")
@click.option("--sleepers", default=100_000, help="W12: executions that sleep.")
@click.option("--idle", "idle_seconds", default=15.0, help="W12: seconds watched.")
def main(
    *, only: str, json_path: Path | None, use_uvloop: bool, url: str | None, **plan: Any
) -> None:
    """Measure, print, and fail if a wanted ratio is missed."""
    names = frozenset(name for name in only.upper().split(",") if name)
    unknown = names - {*_OF_ONE_WORKER, *_SCENARIOS}
    if unknown:
        message = f"no workload has the id {', '.join(sorted(unknown))}"
        raise click.UsageError(message)
    table = _run(_with_server(Plan(only=names, **plan), url), use_uvloop=use_uvloop)
    click.echo(f"{platform.python_version()}, {'uvloop' if use_uvloop else 'asyncio'}")
    table.print()
    if json_path is not None:
        table.write(json_path)
    sys.exit(1 if table.missed else 0)


def _run(measure: Coroutine[Any, Any, Table], *, use_uvloop: bool) -> Table:
    if not use_uvloop:
        return asyncio.run(measure)
    import uvloop  # noqa: PLC0415 - an extra

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure)


async def _with_server(plan: Plan, url: str | None) -> Table:
    if url is not None:
        return await _measure(plan, url)
    with servers_home("stent-bench-") as home:
        async with Stent(home=home) as server:
            return await _measure(plan, server.url)


if __name__ == "__main__":
    main()
