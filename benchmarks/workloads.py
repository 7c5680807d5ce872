"""The workloads: each returns one run's figures."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks import programs
from benchmarks.places import worker_processes
from stent import Stent

RUN_SECONDS_MAX = 300


async def _timed(app: Stent, function: object, argument: int) -> float:
    """Seconds from dispatch to the result, which is checked."""
    began = time.perf_counter()
    execution_id = await app.dispatch(function, argument)  # type: ignore[arg-type]
    outcome = await app.wait_for(execution_id, timeout=RUN_SECONDS_MAX)
    seconds = time.perf_counter() - began
    total = outcome.unwrap()
    if total != argument * (argument - 1) // 2:
        message = f"wrong sum {total} of {argument}"
        raise AssertionError(message)
    return seconds


async def fan_out(app: Stent, count: int) -> float:
    """W1: activities/s."""
    return count / await _timed(app, programs.fan_out, count)


async def fan_out_waits(app: Stent, count: int) -> float:
    """W8: activities/s, each of which waits for a moment."""
    return count / await _timed(app, programs.fan_out_waits, count)


async def map_items(app: Stent, count: int) -> float:
    """W2: items/s."""
    return count / await _timed(app, programs.map_items, count)


async def sequence(app: Stent, count: int) -> float:
    """W3: milliseconds a step."""
    return await _timed(app, programs.sequence, count) / count * 1000


async def many_workflows(app: Stent, count: int) -> float:
    """W4: workflows/s."""
    began = time.perf_counter()
    ids = await app.dispatch_many(programs.three_steps, range(count))
    outcomes = await asyncio.gather(
        *[app.wait_for(one, timeout=RUN_SECONDS_MAX) for one in ids]
    )
    seconds = time.perf_counter() - began
    if [outcome.unwrap() for outcome in outcomes] != list(range(count)):
        message = "wrong results"
        raise AssertionError(message)
    return count / seconds


async def latency(app: Stent, count: int) -> tuple[float, float]:
    """W5: milliseconds from dispatch to result, p50 and p99."""
    times = []
    for number in range(count):
        began = time.perf_counter()
        outcome = await app.wait_for(await app.dispatch(programs.no_op, number))
        times.append(time.perf_counter() - began)
        if outcome.unwrap() != number:
            message = "wrong result"
            raise AssertionError(message)
    times.sort()
    return times[count // 2] * 1000, times[int(count * 0.99)] * 1000


async def takeover(url: str, runs: int) -> list[float]:
    """W10: milliseconds from kill -9 of a worker until another runs the same work."""
    return [await _takeover_once(url) for _ in range(runs)]


async def _takeover_once(url: str) -> float:
    count = 400
    with tempfile.TemporaryDirectory(prefix="stent-bench-") as name:
        directory = Path(name)
        async with worker_processes(url, 2, slots=20) as workers, Stent(url) as app:
            execution_id = await app.dispatch(programs.fan_out_marks, count, name)
            victim = workers[0]
            began_by_victim = await _wait_for_marks(directory, victim.pid, 5)
            in_flight = _unfinished(began_by_victim)
            os.kill(victim.pid, signal.SIGKILL)
            killed = time.time()
            await app.wait_for(execution_id, timeout=RUN_SECONDS_MAX)
        return (_first_rerun(directory, victim.pid, in_flight) - killed) * 1000


async def _wait_for_marks(directory: Path, pid: int, count: int) -> list[Path]:
    while True:
        marks = _marks(directory, pid)
        if len(marks) >= count:
            return marks
        await asyncio.sleep(0.002)


def _marks(directory: Path, pid: int) -> list[Path]:
    return list(directory.glob(f"*.{pid}"))


def _unfinished(marks: list[Path]) -> set[str]:
    """Numbers of activities that began so late that they still run."""
    now = time.time()
    return {m.stem for m in marks if now - m.stat().st_mtime < 0.04}


def _first_rerun(directory: Path, victim: int, numbers: set[str]) -> float:
    """When somebody else began one of the victim's activities again."""
    times = [
        mark.stat().st_mtime
        for mark in directory.iterdir()
        if mark.stem in numbers and mark.suffix != f".{victim}"
    ]
    if not times:
        message = "nothing was in flight when the worker was killed"
        raise AssertionError(message)
    return min(times)
