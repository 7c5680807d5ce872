"""W8: the same work on more worker processes, and behind a transaction pooler.

W8S: the same where each process, and Postgres, has a share of a processor.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks import programs, workloads
from benchmarks.places import ProcessorTimes, worker_processes
from benchmarks.shares import server_pids, share
from stent import Stent

Workload = Callable[[Stent, int], Awaitable[float]]
QUEUES = ("bench-a", "bench-b")


@dataclass(frozen=True)
class Scaled:
    """What so many processes reached.

    Attributes:
        rate: Median of the runs.
        busy: Share of the time of all processors, Postgres and workers together.
    """

    rate: float
    busy: float | None


async def with_processes(
    url: str, count: int, work: Workload, size: int, runs: int
) -> Scaled:
    """A workload on ``count`` worker processes.

    Args:
        url: Of the database.
        count: Of worker processes.
        work: Of one workflow, which one worker advances, or of many.
        size: How much of it.
        runs: The median counts.
    """
    async with worker_processes(url, count), Stent(url) as app:
        await workloads.fan_out(app, 500)
        processors = ProcessorTimes()
        rates = [await work(app, size) for _ in range(runs)]
        busy = processors.busy()
    return Scaled(sorted(rates)[len(rates) // 2], busy)


@dataclass(frozen=True)
class Shared:
    """What so many processes reached, each with its share of a processor.

    Attributes:
        rate: Median of the runs.
        server: Used by Postgres, of what it had; 1 is all of it.
        busiest: The same of the busiest worker process of each run, on average.
        others: The same of the other ones together; None if there are none.
    """

    rate: float
    server: float
    busiest: float
    others: float | None


async def with_shares(  # noqa: PLR0913, PLR0917 - what is varied
    url: str,
    count: int,
    each: float,
    server: float,
    work: Workload,
    size: int,
    runs: int,
) -> Shared:
    """A workload on ``count`` worker processes with ``each`` of a processor.

    Args:
        url: Of the database.
        count: Of worker processes.
        each: Share of a processor that each of them has.
        server: Share that Postgres has, all its processes together.
        work: Of one workflow, or of many.
        size: How much of it.
        runs: The median counts.

    Raises:
        SharesUnavailableError: Shares cannot be had here.
    """
    with ExitStack() as groups:
        postgres = groups.enter_context(share(server))
        postgres.add(await server_pids(url))
        async with worker_processes(url, count) as processes, Stent(url) as app:
            shares = [groups.enter_context(share(each)) for _ in processes]
            for one, process in zip(shares, processes, strict=True):
                one.add([process.pid])
            await work(app, 100)
            rates: list[float] = []
            used: list[list[float]] = []
            for _ in range(runs):
                before = [one.used_seconds for one in (postgres, *shares)]
                began = time.perf_counter()
                rates.append(await work(app, size))
                seconds = time.perf_counter() - began
                of_shares = [
                    (one.used_seconds - first) / (seconds * one.processors)
                    for one, first in zip((postgres, *shares), before, strict=True)
                ]
                used.append([of_shares[0], *sorted(of_shares[1:], reverse=True)])
    means = [sum(of_one) / runs for of_one in zip(*used, strict=True)]
    return Shared(
        rate=sorted(rates)[runs // 2],
        server=means[0],
        busiest=means[1],
        others=sum(means[2:]) / (count - 1) if count > 1 else None,
    )


async def two_fleets(url: str, direct_url: str | None, each: int, runs: int) -> float:
    """W1 in two queues at once, a worker process for each: activities/s, median.

    Args:
        url: Of the database, as the workers and the client reach it.
        direct_url: The way around the pooler, if there is one.
        each: Activities in each queue.
        runs: The median counts.
    """
    first, second = QUEUES
    with _environment(url, direct_url):
        async with (
            worker_processes(url, 1, queue=first),
            worker_processes(url, 1, queue=second),
            Stent(url) as app,
        ):
            await _both(app, 500)
            rates = [await _both(app, each) for _ in range(runs)]
    return sorted(rates)[len(rates) // 2]


async def _both(app: Stent, each: int) -> float:
    began = time.perf_counter()
    ids = [
        await app.dispatch(programs.fan_out_in, each, name, queue=name)
        for name in QUEUES
    ]
    outcomes = await asyncio.gather(
        *[app.wait_for(one, timeout=workloads.RUN_SECONDS_MAX) for one in ids]
    )
    seconds = time.perf_counter() - began
    if {outcome.unwrap() for outcome in outcomes} != {each * (each - 1) // 2}:
        message = "wrong sums"
        raise AssertionError(message)
    return each * len(QUEUES) / seconds


@contextmanager
def _environment(url: str, direct_url: str | None) -> Iterator[None]:
    """For the processes started meanwhile, and for this one."""
    if direct_url is None:
        yield
        return
    changes = {"STENT_DATABASE_URL": url, "STENT_DIRECT_URL": direct_url}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
