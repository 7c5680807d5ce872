"""Workflows whose every step leaves evidence outside of Postgres.

An activity writes its start and its end; a workflow writes what it sees, under a name
that is new in every life: so the past of one life can be compared with that of another.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import stent
from stent import durable
from tests.e2e.harness.ledger import Ledger

REMOTE = "remote"
"""A queue that only some workers serve."""
ledger = Ledger(Path(os.devnull))
"""Of this process; set before a worker is started."""


def write_to(path: Path) -> None:
    """Let the functions of this module write to ``path``."""
    ledger.close()
    ledger.path = path


class Life:
    """What one life of a workflow sees, in order."""

    def __init__(self) -> None:
        self._execution = stent.current().execution_id
        self._name = os.urandom(6).hex()

    def saw(self, *what: Any) -> None:
        """Write it down."""
        what_text = repr(what)
        ledger.write("saw", execution=self._execution, life=self._name, what=what_text)


class Attempt:
    """Start and end of an activity."""

    def __init__(self) -> None:
        current = stent.current()
        self._facts = {
            "execution": current.execution_id,
            "address": current.address,
            "attempt": current.attempt,
            "key": stent.idempotency_key(),
            "nonce": os.urandom(6).hex(),
        }

    def __enter__(self) -> None:
        ledger.write("start", **self._facts)

    def __exit__(self, kind: object, *_: object) -> None:
        ledger.write("end" if kind is None else "broken", **self._facts)


@durable
async def work(value: int, pause: float = 0.0) -> int:
    """Ordinary work."""
    with Attempt():
        await asyncio.sleep(pause)
    return value * 2


@durable
async def for_ever(value: int) -> int:
    """Work that only a cancellation ends."""
    with Attempt():
        await asyncio.Event().wait()
    return value


@durable(retry=stent.RetryPolicy(max_attempts=4, initial_delay="10ms"))
async def flaky(value: int) -> int:
    """Fails twice."""
    with Attempt():
        await asyncio.sleep(0)
    if stent.current().attempt < 3:
        message = f"try {value} again"
        raise ConnectionError(message)
    return value * 2


@durable(effects="transactional")
async def insert(value: int) -> int:
    """Exactly one row, whatever happens."""
    with Attempt():
        async with stent.transaction() as connection:
            await connection.execute(
                "insert into effects (execution, address) values ($1, $2)",
                stent.current().execution_id,
                stent.current().address,
            )
    return value * 2


@durable
async def sequence(count: int, pause: float = 0.0) -> int:
    """One after the other."""
    life, total = Life(), 0
    for number in range(count):
        total += await work(number, pause)
        life.saw(number, total, stent.now().isoformat())
    return total


@durable
async def twice(value: int) -> int:
    """Two calls, one after the other."""
    life = Life()
    first = await work(value, 0.005)
    life.saw(first)
    return await work(first, 0.005)


@durable
async def wait_for_file(file: str, value: int) -> int:
    """Work that ends when a test says so."""
    with Attempt():
        while not Path(file).exists():  # noqa: ASYNC110, ASYNC240 - files have no events
            await asyncio.sleep(0.01)
    return value


@durable
async def beside(file: str, value: int) -> int:
    """Goes on while one activity takes its time."""
    life, count = Life(), 0
    held = asyncio.ensure_future(wait_for_file(file, value))
    while not held.done():
        count += await work(1, 0.01)
        life.saw(count)
    return await held


@durable
async def fan_out(count: int, pause: float = 0.0) -> int:
    """All at once, and each branch goes on by itself."""
    life = Life()

    async def branch(number: int) -> int:
        first = await work(number, pause)
        life.saw("branch", number, first)
        return first + await work(1000 + number, pause)

    total = sum(await asyncio.gather(*[branch(number) for number in range(count)]))
    life.saw("all", total)
    return total


@durable
async def wide(count: int) -> int:
    """All at once and nothing after it, so that there are few turns."""
    return sum(await asyncio.gather(*[work(number) for number in range(count)]))


@durable
async def remote_fan_out(count: int, pause: float = 0.0) -> int:
    """Calls that workers of another queue run: their results arrive in the inbox."""
    life = Life()
    there = work.options(queue=REMOTE)
    total = 0
    for result in asyncio.as_completed([there(n, pause) for n in range(count)]):
        value = await result
        total += value
        life.saw("there", value, total)
    return total + await work(7)


@durable
async def race(rounds: int, pause: float = 0.0) -> int:
    """The first wins; the other one is cancelled."""
    life, total = Life(), 0
    for number in range(rounds):
        winner = asyncio.ensure_future(work(number, pause))
        loser = asyncio.ensure_future(for_ever(number))
        done, pending = await asyncio.wait(
            {winner, loser}, return_when=asyncio.FIRST_COMPLETED
        )
        life.saw("first", len(done), winner in done)
        for call in pending:
            call.cancel()
        total += winner.result()
        life.saw("left", await work(100 + number), loser.cancelled())
    return total


@durable
async def sleeper(naps: int, nap: str = "120ms") -> int:
    """Sleeps; the deadline is that of its first life."""
    life, total = Life(), 0
    for number in range(naps):
        before = stent.now()
        life.saw("asleep", before.isoformat())
        await stent.sleep(nap)
        life.saw("awake", stent.now().isoformat())
        total += await work(number)
    return total


@durable
async def long_sleeper() -> str:
    """Sleeps much longer than a test."""
    Life().saw("asleep", stent.now().isoformat())
    await stent.sleep("1h")
    return "awake"


@durable
async def leg(value: int, pause: float = 0.0) -> int:
    """A child of ``family``."""
    life = Life()
    first = await work(value, pause)
    life.saw("first", first)
    return first + await work(value + 100, pause)


@durable
async def family(children: int, pause: float = 0.0) -> int:
    """Children, at once and one after the other."""
    life = Life()
    legs = await asyncio.gather(*[leg(number, pause) for number in range(children)])
    life.saw("legs", list(legs))
    last = await leg(500, pause)
    life.saw("last", last)
    return sum(legs) + last


@durable
async def mapped(count: int, pause: float = 0.0) -> int:
    """A map over several pages."""
    life = Life()
    values = await stent.map(work, list(range(count)), chunk=max(1, count // 3))
    life.saw("values", values)
    return sum(values) + await work(count, pause)


@durable
async def mapped_stream(count: int, pause: float = 0.0) -> int:
    """A map over what calls give, and a map whose items fail before they succeed."""
    life = Life()

    async def numbers() -> AsyncIterator[int]:
        for row in range(3):
            first = await work(100 * row, pause)
            life.saw("row", row, first)
            for number in range(first, first + count):
                yield number

    values = await work.map(numbers(), chunk=max(2, count // 2))
    life.saw("values", values)
    again = await flaky.map(iter(range(count)), chunk=3)
    life.saw("again", again)
    bounded = await flaky.map(range(count), concurrency=2)
    life.saw("bounded", bounded)
    return sum(values) + sum(again) + sum(bounded)


@durable
async def retried(count: int) -> int:
    """Calls that fail before they succeed."""
    life = Life()
    values = await asyncio.gather(*[flaky(number) for number in range(count)])
    life.saw("values", list(values))
    return sum(values)


@durable
async def transactional(count: int) -> int:
    """Transactions that commit with their results."""
    life, total = Life(), 0
    for number in range(count):
        total += await insert(number)
        life.saw(number, total)
    return total


@durable
async def block_loop(seconds: float) -> str:
    """Keeps its worker's loop from running."""
    with Attempt():
        time.sleep(seconds)  # noqa: ASYNC251 - that is the point
    return "done"


@durable(retry=1)
async def leave(how: str) -> str:
    """Tries to end its worker."""
    with Attempt():
        match how:
            case "SystemExit":
                raise SystemExit(3)
            case "KeyboardInterrupt":
                raise KeyboardInterrupt
            case "thread":
                message = "as a plain function"
                raise SystemExit(message)
            case _:
                await asyncio.sleep(0)
    return how


@durable
async def die_once(marker: str) -> str:
    """Ends its process without any clean-up, the first time."""
    with Attempt():
        if _is_first(marker):
            os._exit(7)
    return "survived"


def _is_first(marker: str) -> bool:
    """Whether nobody has asked for this file before."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def _beat(over: str) -> int:
    """Counts until told that it is over; then what the attempt before has said."""
    earlier = stent.current().heartbeat
    number = 0
    while not Path(over).exists():  # noqa: ASYNC240 - the file system of a test
        # Before it is said, so that the ledger is never behind the database.
        ledger.write("beat", number=number)
        stent.heartbeat(number)
        number += 1
        await asyncio.sleep(0.005)
    return -1 if earlier is None else int(earlier)


@durable
async def beats(over: str) -> int:
    """Says how far it has come."""
    return await _beat(over)


@durable
async def beat_inline(over: str) -> int:
    """Without a task row."""
    return await beats(over)


@durable
async def beat_as_task(over: str) -> int:
    """A delay makes it a task."""
    return await beats.options(delay="1ms")(over)


@durable(pool="process")
def beats_in_process(path: str, over: str) -> int:
    """In a process, which has no ledger yet."""
    write_to(Path(path))
    return asyncio.run(_beat(over))


@durable
async def beat_in_process(over: str) -> int:
    """Says it to the worker, which writes it."""
    return await beats_in_process(str(ledger.path), over)


@durable(pool="process")
def computes(path: str, over: str) -> str:
    """Holds its process."""
    write_to(Path(path))
    ledger.write("computes", parent=os.getppid())
    while not Path(over).exists():
        time.sleep(0.01)
    return "computed"


@durable
async def compute(over: str) -> str:
    """In a process."""
    return await computes(str(ledger.path), over)


@durable
async def leaves() -> list[str]:
    """Survives activities that try to end the worker."""
    results = await asyncio.gather(
        *[leave(how) for how in ("SystemExit", "KeyboardInterrupt", "stay")],
        return_exceptions=True,
    )
    return [r if isinstance(r, str) else type(r).__name__ for r in results]


@durable(max_concurrent=3)
async def limited(value: int, pause: float = 0.0) -> int:
    """Work of which three may run at the same time, anywhere."""
    with Attempt():
        await asyncio.sleep(pause)
    return value * 2


@durable(max_concurrent=1, concurrency_key="key")
async def limited_by_key(key: str, value: int, pause: float = 0.0) -> int:
    """Work of which one of each key may run at the same time, anywhere."""
    with Attempt():
        await asyncio.sleep(pause)
    return value * 2


@durable
async def limited_fan_out(count: int, pause: float = 0.0) -> int:
    """All at once, as far as the limit lets them."""
    return sum(await asyncio.gather(*[limited(n, pause) for n in range(count)]))


@durable
async def limited_map(count: int, pause: float = 0.0) -> int:
    """The same in pages."""
    return sum(await stent.map(limited_one, [(n, pause) for n in range(count)]))


@durable(max_concurrent=3)
async def limited_one(item: tuple[int, float]) -> int:
    """Work of which three may run at the same time, anywhere."""
    value, pause = item
    with Attempt():
        await asyncio.sleep(pause)
    return value * 2


@durable
async def keyed_fan_out(count: int, pause: float = 0.0) -> int:
    """Three keys, each on its own."""
    calls = [limited_by_key(f"key {n % 3}", n, pause) for n in range(count)]
    return sum(await asyncio.gather(*calls))


@durable
async def child(value: int, pause: float) -> int:
    """What a limited workflow waits for."""
    return await work(value, pause)


@durable(max_concurrent=3)
async def limited_flow(value: int, pause: float = 0.0) -> int:
    """A workflow of which three may be under way, anywhere; it awaits a child."""
    life = Life()
    life.saw("begin")
    result = await child(value, pause)
    life.saw("end")
    return result


@durable
async def limited_flows(count: int, pause: float = 0.0) -> int:
    """Many of them."""
    return sum(await asyncio.gather(*[limited_flow(n, pause) for n in range(count)]))


@durable(name="workload.kills_its_worker")
async def kills_its_worker(count: int) -> None:
    """End the process without warning, each time."""
    with Attempt():
        await asyncio.sleep(count / 1000)
        os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.Event().wait()


@durable(name="workload.neighbour")
async def neighbour(value: int, seconds: float) -> int:
    """An innocent activity that often runs beside one that kills."""
    with Attempt():
        await asyncio.sleep(seconds)
    return value


@durable(name="workload.poisoned")
async def poisoned(count: int, seconds: float) -> list[Any]:
    """One of the calls kills; what the others return, and how that one fails."""
    killing = kills_its_worker(5)
    others = [neighbour(n, seconds) for n in range(count)]
    outcomes = await asyncio.gather(killing, *others, return_exceptions=True)
    return [type(outcomes[0]).__name__, *outcomes[1:]]


@durable(name="workload.maybe_kills")
async def maybe_kills(value: int) -> int:
    """An item of a map; one of them ends the process, each time."""
    with Attempt():
        if value == 3:
            os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.Event().wait()
    return value * 2


@durable(name="workload.poisoned_map")
async def poisoned_map(count: int) -> list[Any]:
    """One of the items kills; what the others return, and how that one fails."""
    outcomes = await stent.map(
        maybe_kills, range(count), chunk=count, return_exceptions=True
    )
    return [o if isinstance(o, int) else type(o).__name__ for o in outcomes]


@durable(name="workload.kills_in_replay")
async def kills_in_replay() -> None:
    """The workflow's own code ends the process."""
    await neighbour(1, 0.0)
    os.kill(os.getpid(), signal.SIGKILL)
