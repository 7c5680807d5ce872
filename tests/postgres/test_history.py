"""What inspection says of executions that really ran, wait, fail or are damaged."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from asyncpg import Connection

import stent
from stent import Entry, ExecutionState, Stent, durable
from stent.errors import ExecutionNotFoundError, UsageError
from stent.history import NO_WORKER


@dataclass
class Money:
    amount: int


class Gate:
    """Lets a test hold activities of this module."""

    let_go: asyncio.Event


@durable
async def double(x: int) -> int:
    return 2 * x


@durable(retry=2)
async def unlucky(x: int) -> int:
    message = f"no luck with {x}"
    raise ValueError(message)


@durable
async def hold(x: int) -> int:
    await Gate.let_go.wait()
    return x


@durable
async def pay() -> Money:
    return Money(5)


@durable
async def add(n: int) -> int:
    stent.tell({"n": n})
    return sum(await asyncio.gather(*[double(i) for i in range(n)]))


@durable
async def parent(n: int) -> int:
    return await add(n) + sum(await stent.map(double, range(n)))


@durable
async def doomed() -> int:
    return await unlucky(1)


@durable
async def elsewhere(n: int) -> int:
    calls = [hold.options(queue="nowhere", key=str(i))(i) for i in range(n)]
    return sum(await asyncio.gather(*calls))


@durable
async def far() -> None:
    await add.options(queue="nowhere")(1)


@durable
async def nap() -> None:
    await double(1)
    await stent.sleep("1h")


@durable
async def held() -> int:
    return await hold(1)


@pytest.fixture(autouse=True)
async def _closed_gate() -> None:
    Gate.let_go = asyncio.Event()


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[Stent]:
    async with Stent.bootstrap(database_url, serve=True) as app:
        yield app
        Gate.let_go.set()


@pytest.fixture
async def idle(database_url: str) -> AsyncIterator[Stent]:
    """An app without any worker."""
    async with Stent(database_url) as app:
        yield app


async def wait_for_waits(app: Stent, execution_id: str, text: str) -> ExecutionState:
    """The state once a sentence of why it waits contains ``text``."""
    while True:
        state = await app.state_of(execution_id)
        if any(text in sentence for sentence in state.waiting_for):
            return state
        await asyncio.sleep(0.02)


def undated(state: ExecutionState) -> list[str]:
    """Why it waits, but for how long it has."""
    return [re.sub(r" for \d+ \w+", "", sentence) for sentence in state.waiting_for]


def kinds(entries: list[Entry]) -> list[str]:
    return [entry.kind for entry in entries]


async def test_completed_execution(app: Stent) -> None:
    """State and history of a workflow that gathered: all calls, then its value."""
    execution_id = await app.dispatch(add, 2, tags=["x"], priority=3)
    assert (await app.wait_for(execution_id)).value == 2
    state = await app.state_of(execution_id)
    assert (state.status, state.state) == ("completed", "completed")
    assert (state.result, state.error, state.waiting_for) == (2, None, ())
    assert (state.tags, state.priority, state.attempts) == (("x",), 3, 2)
    assert state.times.started_at is not None
    assert state.times.finished_at is not None
    entries = await app.history(execution_id)
    assert [entry.position for entry in entries] == list(range(len(entries)))
    assert sorted(kinds(entries)) == [
        "call.issued",
        "call.issued",
        "execution.completed",
        "execution.created",
        "execution.started",
        "result.delivered",
        "result.delivered",
        "told",
    ]
    assert kinds(entries)[:2] == ["execution.created", "execution.started"]
    assert entries[0].detail["arguments"] == [2]
    delivered = [e.detail for e in entries if e.kind == "result.delivered"]
    assert sorted(str(d["value"]) for d in delivered) == ["0", "2"]
    assert {d["function"] for d in delivered} == {double.name}
    assert entries[-1].detail == {"value": 2}
    (told,) = (e for e in entries if e.kind == "told")
    assert told.detail == {"value": {"n": 2}}


async def test_parent_and_child_know_each_other(app: Stent) -> None:
    """The child is among the parent's calls and children; both have one root."""
    execution_id = await app.dispatch(parent, 3)
    assert (await app.wait_for(execution_id)).value == 12
    state = await app.state_of(execution_id)
    (child,) = state.children
    below = await app.state_of(child)
    assert (below.parent_id, below.root_id) == (execution_id, execution_id)
    issued = [e for e in await app.history(execution_id) if e.kind == "call.issued"]
    assert issued[0].detail == {"function": add.name, "child": child}
    family = await app.list_executions(root=execution_id)
    assert {one.id for one in family} == {execution_id, child}
    assert [one.id for one in await app.list_executions(parent=execution_id)] == [child]


async def test_every_cause_stands_before_its_effect(app: Stent) -> None:
    """A call is issued before an attempt fails, and that before the delivery."""
    execution_id = await app.dispatch(doomed)
    assert (await app.wait_for(execution_id)).is_err()
    entries = await app.history(execution_id)
    assert kinds(entries) == [
        "execution.created",
        "execution.started",
        "call.issued",
        "attempt.failed",
        "result.delivered",
        "execution.failed",
    ]
    error = "ValueError: no luck with 1"
    assert entries[3].detail["error"] == error
    assert entries[3].detail["attempt"] == 1
    assert (entries[4].detail["ok"], entries[4].detail["attempt"]) == (False, 2)
    assert entries[5].detail == {"error": error}
    state = await app.state_of(execution_id)
    assert (state.status, state.error, state.result) == ("failed", error, None)


async def test_attempts_of_an_activity_are_counted(app: Stent) -> None:
    """Dispatched by itself, an activity tells how often it was tried."""
    good, bad = await app.dispatch(double, 4), await app.dispatch(unlucky, 4)
    assert (await app.wait_for(good)).value == 8
    assert (await app.wait_for(bad)).is_err()
    assert (await app.state_of(good)).attempts == 1
    assert (await app.state_of(bad)).attempts == 2


async def test_values_are_shown_without_their_classes(app: Stent) -> None:
    """A dataclass comes as its fields; nothing of it is built."""
    execution_id = await app.dispatch(pay)
    assert (await app.wait_for(execution_id)).value == Money(5)
    assert (await app.state_of(execution_id)).result == {"amount": 5}


async def test_without_worker_that_is_why(idle: Stent) -> None:
    """Nobody runs anything: the state says so."""
    execution_id = await idle.dispatch(add, 1)
    state = await idle.state_of(execution_id)
    assert (state.status, state.attempts) == ("pending", 0)
    assert state.waiting_for == (NO_WORKER,)


async def test_queue_that_nobody_serves_is_why(app: Stent) -> None:
    """There is a worker, but not for this queue."""
    execution_id = await app.dispatch(add, 1, queue="nowhere")
    state = await app.state_of(execution_id)
    assert state.waiting_for == ("no worker serves queue 'nowhere'",)


async def test_tasks_children_and_timers_are_why(app: Stent) -> None:
    """What it has started and not seen finish, in words."""
    one = await app.dispatch(elsewhere, 1)
    many = await app.dispatch(elsewhere, 9)
    child = await app.dispatch(far)
    timer = await app.dispatch(nap)
    unserved = "no worker serves queue 'nowhere'"
    state = await wait_for_waits(app, one, "nowhere")
    assert state.waiting_for == (f"activity {hold.name} (queued; {unserved})",)
    state = await wait_for_waits(app, many, "nowhere")
    assert state.waiting_for == (f"activity {hold.name}: 9 tasks queued, {unserved}",)
    state = await wait_for_waits(app, child, "child")
    assert state.waiting_for == (f"child {state.children[0]} {add.name} (pending)",)
    state = await wait_for_waits(app, timer, "timer until 2")
    assert len(state.waiting_for) == 1
    assert state.times.wake_at is not None
    listed = {state.id: state for state in await app.list_executions()}
    for execution_id in (one, many, child, timer):
        alone = await app.state_of(execution_id)
        assert undated(listed[execution_id]) == undated(alone)


async def test_open_calls_are_in_the_history(app: Stent) -> None:
    """A task that nobody has taken is an issued call with its queue and arguments."""
    execution_id = await app.dispatch(elsewhere, 1)
    await wait_for_waits(app, execution_id, "nowhere")
    entries = await app.history(execution_id)
    assert kinds(entries)[-1] == "call.issued"
    assert entries[-1].detail == {
        "function": hold.name,
        "queue": "nowhere",
        "arguments": [0],
    }


async def test_running_activity_is_why(app: Stent) -> None:
    """What runs beside the workflow has no row; its worker is named."""
    activity, workflow = await app.dispatch(hold, 1), await app.dispatch(held)
    state = await wait_for_waits(app, activity, "its attempt 1, running on worker")
    await wait_for_waits(app, workflow, "on worker")
    assert state.worker_id is not None
    assert state.waiting_for[0].endswith(UUID(state.worker_id).hex[:8])


async def test_cancelled_execution(app: Stent) -> None:
    """The request is delivered, the call settled, the outcome an error."""
    execution_id = await app.dispatch(elsewhere, 1)
    await wait_for_waits(app, execution_id, "nowhere")
    assert await app.cancel(execution_id)
    assert (await app.wait_for(execution_id)).is_err()
    found = kinds(await app.history(execution_id))
    assert found[-1] == "execution.cancelled"
    assert "cancel.delivered" in found
    state = await app.state_of(execution_id)
    assert (state.status, state.waiting_for) == ("cancelled", ())
    assert state.error is not None
    assert state.error.startswith("ExecutionCancelledError")


async def test_lists_are_filtered_and_ordered(idle: Stent) -> None:
    """Newest first, page by page, by any of the filters."""
    ids = [await idle.dispatch(double, i, queue=f"q{i % 2}") for i in range(6)]
    tagged = await idle.dispatch(add, 1, tags=["red", "blue"])
    await idle.cancel(ids[0])

    async def listed(**filters: Any) -> list[str]:
        return [state.id for state in await idle.list_executions(**filters)]

    everything = sorted([*ids, tagged], reverse=True)
    assert await listed() == everything
    first = await listed(limit=4)
    assert first + await listed(before=first[-1]) == everything
    assert await listed(tag="blue") == [tagged]
    assert await listed(tag="bl%") == []
    assert await listed(function=add.name) == [tagged]
    assert set(await listed(queue="q1")) == {ids[1], ids[3], ids[5]}
    assert await listed(status="cancelled") == [ids[0]]
    assert await listed(status=["cancelled", "pending"]) == everything
    assert await listed(status="pending", queue="q0", limit=1) == [max(ids[2], ids[4])]
    with pytest.raises(UsageError, match="unknown filter 'colour'"):
        await listed(colour="red")


async def test_filters_are_values_only(idle: Stent) -> None:
    """Whatever a filter contains, it is compared and nothing else."""
    await idle.dispatch(double, 1)
    for text in ("' or true --", "$1", "%", "\\", ":x", '"; drop'):
        for name in ("function", "tag", "queue"):
            assert await idle.list_executions(**{name: text}) == []


async def test_unknown_ids_are_told(idle: Stent) -> None:
    """Neither state nor history of what does not exist."""
    for unknown in (str(uuid4()), "nonsense", ""):
        with pytest.raises(ExecutionNotFoundError):
            await idle.state_of(unknown)
        with pytest.raises(ExecutionNotFoundError):
            await idle.history(unknown)


async def test_inspection_changes_nothing(idle: Stent, connection: Connection) -> None:
    """It looks within a read-only transaction, and leaves the session as it was."""
    execution_id = await idle.dispatch(double, 1)
    before = await connection.fetch("select * from stent.executions")
    await idle.state_of(execution_id)
    await idle.history(execution_id)
    await idle.list_executions()
    assert await connection.fetch("select * from stent.executions") == before
    assert await idle.dispatch(double, 2)


async def test_damaged_payloads_are_shown_as_such(
    app: Stent, connection: Connection
) -> None:
    """An unknown codec, junk and an unreadable turn hide nothing else."""
    execution_id = await app.dispatch(add, 2)
    assert (await app.wait_for(execution_id)).is_ok()
    identifier = UUID(execution_id)
    for table, payload in (
        ("results", b"\x7funknown codec"),
        ("tells", b"\x01{junk"),
        ("payloads", b""),
    ):
        await connection.execute(
            f"update stent.{table} set payload = $1 where execution_id = $2",
            payload,
            identifier,
        )
    await connection.execute(
        "update stent.journal set payload = 'junk' "
        "where execution_id = $1 and position = 1",
        identifier,
    )
    state = await app.state_of(execution_id)
    assert str(state.result).startswith("<unreadable: unknown payload codec 127")
    entries = await app.history(execution_id)
    details = {entry.kind: entry.detail for entry in entries}
    assert str(details["told"]["value"]).startswith("<unreadable: ")
    assert str(details["execution.created"]["arguments"]).startswith("<unreadable: ")
    assert str(details["turn.unreadable"]["error"]).startswith("<unreadable: ")
    assert str(details["execution.completed"]["value"]).startswith("<unreadable: ")
    assert [s.id for s in await app.list_executions()] == [execution_id]


async def test_large_results_are_shown_as_their_size(app: Stent) -> None:
    """A list stays small; the state of one execution has the value."""
    big = "x" * 100_000
    execution_id = await app.dispatch(echo, big)
    assert (await app.wait_for(execution_id)).value == big
    (listed,) = await app.list_executions()
    assert listed.result == "<100003 bytes>"
    assert (await app.state_of(execution_id)).result == big


@durable
async def echo(text: str) -> str:
    return text


async def test_a_long_inline_call_is_seen_while_it_runs(database_url: str) -> None:
    """No task row tells of it: the owner journals its name after a while."""
    Gate.let_go = asyncio.Event()
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(holds)
        running = f"activity {hold.name} (running on worker"
        state = await app.state_of(execution_id)
        while not any(running in wait for wait in state.waiting_for):
            await asyncio.sleep(0.05)
            state = await app.state_of(execution_id)
        kinds = [entry.kind for entry in await app.history(execution_id)]
        assert "call.issued" in kinds
        Gate.let_go.set()
        assert (await app.wait_for(execution_id, "15s")).unwrap() == 3


@durable
async def holds() -> int:
    return sum(await asyncio.gather(hold(1), hold(2)))
