"""Why limited work waits, and who holds the slots, as operators see it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

import stent
from stent import ExecutionState, Stent, durable
from stent.limit_settings import LimitState


class Gate:
    """Holds activities until a test lets them go on."""

    open: asyncio.Event
    running: int = 0
    told: bool = False


@pytest.fixture(autouse=True)
async def _closed_gate() -> None:
    Gate.open = asyncio.Event()
    Gate.running, Gate.told = 0, False


async def be_held(x: int) -> int:
    Gate.running += 1
    await Gate.open.wait()
    return x


@durable(max_concurrent=2)
async def two(x: int) -> int:
    return await be_held(x)


@durable(max_concurrent=1, concurrency_key="customer")
async def bill(customer: str, x: int) -> int:
    return await be_held(x)


@durable(max_concurrent=1)
async def alone(x: int) -> int:
    await asyncio.sleep(0)
    return await free(x)


@durable
async def free(x: int) -> int:
    return await be_held(x)


@durable(rate_limit="1/1000h burst 2")
async def rare(x: int) -> int:
    return x


@durable(rate_limit="1000/s")
async def told_later(x: int) -> int:
    if not Gate.told:
        Gate.told = True
        stent.retry_later("1h")
    return x


@durable
async def calls_two(count: int) -> int:
    return sum(await asyncio.gather(*[two(n) for n in range(count)]))


@durable
async def maps_two(count: int) -> int:
    return sum(await stent.map(two, range(count), chunk=count))


@durable
async def bills(customer: str, count: int) -> int:
    calls = [bill(customer, n) for n in range(count)]
    return sum(await asyncio.gather(*calls))


@durable
async def calls_rare(count: int) -> int:
    return sum(await asyncio.gather(*[rare(n) for n in range(count)]))


@durable
async def calls_told() -> int:
    return await told_later(1)


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    async with Stent.bootstrap(database_url, serve=True) as app:
        yield app
        Gate.open.set()


async def wait_for_waits(app: Stent, execution_id: str, *texts: str) -> ExecutionState:
    """The state once a sentence of why it waits contains all of these."""
    while True:
        state = await app.state_of(execution_id)
        for sentence in state.waiting_for:
            if all(text in sentence for text in texts):
                return state
        await asyncio.sleep(0.02)


async def wait_until_running(count: int) -> None:
    while Gate.running < count:  # noqa: ASYNC110 - activities have no events for tests
        await asyncio.sleep(0.005)


async def worker_of(app: Stent) -> str:
    """As sentences name it."""
    (worker,) = await app.list_workers()
    return UUID(worker.id).hex[:8]


async def limit_of(app: Stent, function: Any) -> LimitState:
    (state,) = [s for s in await app.limits() if s.name == f"function:{function.name}"]
    return state


async def test_a_full_limit_names_the_workers_that_have_it(app: Stent) -> None:
    """What waits in the queue is told; nothing that cannot begin is claimed."""
    execution_id = await app.dispatch(calls_two, 9)
    await wait_until_running(2)
    worker = await worker_of(app)
    held = f"slot 2 of 2 held by worker {worker} on {socket.gethostname()} (2)"
    state = await wait_for_waits(
        app,
        execution_id,
        f"{two.name}: 7 tasks queued",
        f"2 running on worker {worker}",
    )
    (sentence,) = state.waiting_for
    assert held in sentence
    assert sentence.count("held by") == 1
    assert Gate.running == 2
    one = await app.dispatch(two, 1)
    await wait_for_waits(app, one, f"activity {two.name} (queued", held)
    limit = await limit_of(app, two)
    assert (limit.held, limit.waiting, limit.capped) == (2, 8, False)


async def test_what_runs_within_its_limit_just_runs(app: Stent) -> None:
    execution_id = await app.dispatch(calls_two, 2)
    await wait_until_running(2)
    worker = await worker_of(app)
    state = await wait_for_waits(app, execution_id, "running on worker")
    sentence = f"activity {two.name} (running on worker {worker})"
    assert state.waiting_for == (sentence, sentence)
    limit = await limit_of(app, two)
    assert (limit.held, limit.waiting) == (2, 0)


async def test_items_of_a_page_wait_for_slots(app: Stent) -> None:
    execution_id = await app.dispatch(maps_two, 9)
    await wait_until_running(2)
    state = await wait_for_waits(app, execution_id, "slot 2 of 2 held by worker")
    assert f"page from item 0 of map {two.name}" in state.waiting_for[0]
    assert "which has 2 slots for items" in state.waiting_for[0]


async def test_slots_of_others_do_not_count_when_their_worker_is_lost(
    app: Stent, connection: asyncpg.Connection
) -> None:
    """A grant of an earlier incarnation, or of nobody, is not shown."""
    await connection.execute(
        "insert into stent.grants (limit_name, worker_id, incarnation, slots, wanted)"
        " values ($1, $2, 1, 2, 2)",
        f"function:{two.name}",
        uuid4(),
    )
    execution_id = await app.dispatch(calls_two, 9)
    await wait_until_running(2)
    worker = await worker_of(app)
    state = await wait_for_waits(app, execution_id, "slot 2 of 2 held by")
    assert state.waiting_for[0].count("worker") == 2
    assert f"held by worker {worker} " in state.waiting_for[0]


async def test_a_full_key_names_the_execution_that_has_it(app: Stent) -> None:
    """Another key is not concerned."""
    first = await app.dispatch(bills, "ann", 1)
    await wait_until_running(1)
    second = await app.dispatch(bills, "ann", 1)
    other = await app.dispatch(bills, "bob", 1)
    await wait_until_running(2)
    held = f"slot 1 of 1 of key 'ann' held by execution {first}"
    state = await wait_for_waits(app, second, held)
    assert state.waiting_for[0].startswith(f"activity {bill.name} (queued")
    many = await app.dispatch(bills, "ann", 9)
    await wait_for_waits(app, many, "9 tasks queued", held)
    state = await app.state_of(other)
    assert "running on worker" in state.waiting_for[0]
    limit = await limit_of(app, bill)
    assert (limit.held, limit.waiting, limit.keyed) == (2, 10, True)


async def test_a_workflow_waits_for_the_slot_of_another(app: Stent) -> None:
    """The slot is the execution's until it ends, whoever runs it."""
    first = await app.dispatch(alone, 1)
    await wait_until_running(1)
    second = await app.dispatch(alone, 2)
    state = await wait_for_waits(app, second, "slot")
    assert state.status == "pending"
    assert state.waiting_for == (f"slot 1 of 1 held by execution {first}",)
    limit = await limit_of(app, alone)
    assert (limit.held, limit.waiting) == (1, 1)
    Gate.open.set()
    assert (await app.wait_for(second)).unwrap() == 2


async def test_a_rate_says_when_its_next_token_comes(app: Stent) -> None:
    """Two start, one is fetched ahead, the others are in the queue."""
    execution_id = await app.dispatch(calls_rare, 20)
    state = await wait_for_waits(app, execution_id, "no token until 2", "queued")
    assert "(1/41d16h burst 2)" in state.waiting_for[0]
    limit = await limit_of(app, rare)
    assert limit.tokens is not None
    assert limit.tokens < 1
    await app.set_limit(rare, rate_limit="1000/s")
    assert (await app.wait_for(execution_id)).ok


async def test_a_closed_bucket_says_so(app: Stent) -> None:
    execution_id = await app.dispatch(calls_told)
    state = await wait_for_waits(app, execution_id, "told to come back later")
    assert "no token until 2" in state.waiting_for[0]
    limit = await limit_of(app, told_later)
    assert (limit.closed_until is not None, limit.tokens) == (True, 0)


async def test_a_pause_is_why(app: Stent) -> None:
    """Of a queue, of a workflow, of an activity."""
    await app.pause(function=two)
    await app.pause(function=alone)
    calls = await app.dispatch(calls_two, 9)
    one = await app.dispatch(calls_two, 1)
    flow = await app.dispatch(alone, 1)
    said = f"function {two.name} is paused"
    await wait_for_waits(app, calls, "9 tasks queued", said)
    await wait_for_waits(app, one, "(queued", said)
    state = await wait_for_waits(app, flow, f"function {alone.name} is paused")
    assert state.status == "pending"
    # One that nobody serves: a worker may claim before it has heard of the pause.
    await app.pause(queue="other")
    other = await app.dispatch(free.options(queue="other"), 1)
    state = await wait_for_waits(app, other, "queue 'other' is paused")
    why = ("no worker serves queue 'other'", "queue 'other' is paused")
    assert state.waiting_for == why
    listed = {state.id: state.waiting_for for state in await app.list_executions()}
    assert listed[other] == why
    await app.pause(queue="default")
    queue = next(s for s in await app.limits() if s.name == "queue:default")
    assert (queue.paused, queue.waiting) == (True, 11)
    await app.resume(queue="default")
    assert "queue:default" not in {state.name for state in await app.limits()}


async def test_a_lifted_limit_is_listed(app: Stent) -> None:
    """An operator has overruled the code: that is told until it is reset."""
    await app.set_limit(two, max_concurrent=None)
    limit = await limit_of(app, two)
    assert (limit.max_concurrent, limit.is_set) == (None, True)
    await app.reset_limit(two)
    assert (await limit_of(app, two)).max_concurrent == 2
    await app.set_limit(two, rate_limit="5/s")
    limit = await limit_of(app, two)
    assert (limit.max_concurrent, limit.rate_per_second) == (2, 5)
    await app.set_limit(two, max_concurrent=3)
    limit = await limit_of(app, two)
    assert (limit.max_concurrent, limit.rate_per_second) == (3, 5)
    await app.set_limit(two, rate_limit=None)
    assert (await limit_of(app, two)).rate_per_second is None
