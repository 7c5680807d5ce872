"""A durable call: a future that is also a coroutine, issued when it is made."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest

from stent import context as stent
from stent.calls import DurableCall
from stent.codec import decode, encode, encode_many
from stent.errors import ExecutionClosedError, PayloadError, UsageError
from stent.journal import ResultDelivered
from stent.model import Recorded
from stent.registry import durable
from stent.replay import Decisions, Finished, Parked, WorkflowRun
from tests.factories import STARTED_AT, begun, outcome_of


@durable(name="calls.fetch")
async def fetch(value: int) -> int:
    return value * 10


@durable(name="calls.broken")
async def broken(value: int) -> int:
    raise StopIteration(value)


def value_of(function: Any, *args: object) -> Any:
    recorded = outcome_of(function, *args).recorded
    assert recorded.ok, recorded
    return decode(recorded.payload)


def addresses(decisions: Decisions) -> list[str]:
    return [call.address for call in decisions.calls]


def answer(run: WorkflowRun, address: str, value: object, at: int = 1) -> None:
    recorded = Recorded(ok=True, payload=encode(value))
    run.deliver(ResultDelivered(address, STARTED_AT + at), recorded)
    assert run.drain()


async def by_await() -> Any:
    return await fetch(1)


async def by_task() -> Any:
    return await asyncio.create_task(fetch(1))


async def by_group() -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(fetch(1))
    return task.result()


async def by_gather() -> Any:
    return (await asyncio.gather(fetch(1)))[0]


async def by_wait() -> Any:
    call: Any = fetch(1)
    done, _ = await asyncio.wait([call])
    return done.pop().result()


async def by_wait_for() -> Any:
    return await asyncio.wait_for(fetch(1), 100)


async def by_shield() -> Any:
    return await asyncio.shield(fetch(1))


async def by_as_completed() -> Any:
    for each in asyncio.as_completed([fetch(1)]):
        return await each
    return None


async def by_anyio() -> Any:
    found = []
    async with anyio.create_task_group() as group:
        group.start_soon(fetch, 1)

        async def keep() -> None:
            found.append(await fetch(1))

        group.start_soon(keep)
    return found[0]


async def by_stent_gather() -> Any:
    return (await stent.gather(fetch(1)))[0]


async def awaited_twice() -> Any:
    call = fetch(1)
    await call
    return await call


async def awaited_by_many() -> Any:
    call = fetch(1)

    async def each() -> Any:
        return await call

    return (await asyncio.gather(each(), each()))[1]


WAYS = [
    by_await,
    by_task,
    by_group,
    by_gather,
    by_wait,
    by_wait_for,
    by_shield,
    by_as_completed,
    by_anyio,
    by_stent_gather,
    awaited_twice,
    awaited_by_many,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_call_goes_where_a_coroutine_goes(way: Any) -> None:
    """Asyncio and anyio take it in all their ways of waiting."""
    assert value_of(durable(name=f"calls.{way.__name__}", kind="workflow")(way)) == 10


def test_a_call_has_the_protocol_of_a_coroutine() -> None:
    """isinstance, iscoroutine and the states that inspect reads."""
    seen: dict[str, object] = {}

    @durable(name="calls.protocol")
    async def flow() -> None:
        call: Any = fetch(1)
        seen["coroutine"] = isinstance(call, Coroutine) and asyncio.iscoroutine(call)
        seen["future"] = asyncio.isfuture(call)
        seen["created"] = inspect.getcoroutinestate(call)
        task = asyncio.create_task(call)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        seen["waiting"] = inspect.getcoroutinestate(call)
        await task
        seen["closed"] = inspect.getcoroutinestate(call)
        seen["name"] = call.__qualname__

    outcome_of(flow)
    assert seen == {
        "coroutine": True,
        "future": True,
        "created": "CORO_CREATED",
        "waiting": "CORO_SUSPENDED",
        "closed": "CORO_CLOSED",
        "name": "calls.fetch",
    }


def test_a_call_is_issued_when_it_is_made() -> None:
    """Awaited or not, in a task that has started or not."""

    @durable(name="calls.unawaited")
    async def flow() -> None:
        _unawaited: Any = fetch(1)
        task = asyncio.create_task(fetch(2))
        made = stent.run(len, "abc")
        mapped = fetch.map([1, 2, 3], chunk=2)
        assert not task.done()
        await asyncio.gather(made, mapped)

    made = addresses(begun(flow).take())
    assert [each.partition("#")[0] for each in made] == [
        ":calls.fetch",
        ":calls.fetch",
        ":run:len",
        ":map:calls.fetch",
        ":map:calls.fetch",
    ]


def test_a_task_cancelled_before_its_first_step_settles_its_call() -> None:
    """``throw`` into a call that nobody has awaited yet cancels it."""

    @durable(name="calls.early_cancel")
    async def flow() -> bool:
        call: Any = fetch(1)
        task = asyncio.create_task(call)
        task.cancel()
        await asyncio.wait([task])
        return bool(task.cancelled() and call.cancelled())

    run = begun(flow)
    decisions = run.take()
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) is True
    assert decisions.calls == []
    assert len(decisions.settled) == 1
    assert run.pending == {}


def test_cancelling_settles_at_once_and_a_late_result_is_not_delivered() -> None:
    """The address is settled; another call is another occurrence."""

    @durable(name="calls.late_result")
    async def flow() -> list[int]:
        call: Any = fetch(1)
        trigger = fetch(2)
        task = asyncio.ensure_future(call)
        await trigger
        task.cancel()
        return [await fetch(1)]

    run = begun(flow)
    first, trigger = addresses(run.take())
    answer(run, trigger, 0)
    decisions = run.take()
    assert [call.address for call in decisions.settled] == [first]
    (again,) = addresses(decisions)
    assert again == first[:-1] + "1"
    answer(run, first, "late")
    assert isinstance(run.outcome(), Parked)
    answer(run, again, 7)
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == [7]


def test_cancelling_a_done_call_is_a_no_op() -> None:
    """Nothing is settled after the result."""

    @durable(name="calls.done_cancel")
    async def flow() -> bool:
        call: Any = fetch(1)
        await call
        return bool(call.cancel())

    run = begun(flow)
    answer(run, addresses(run.take())[0], 1)
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) is False
    assert run.take().settled == []


def test_addresses_are_lineage_function_digest_and_occurrence() -> None:
    """Equal arguments count up; key= replaces the digest and may not repeat."""

    @durable(name="calls.addressed")
    async def flow() -> None:
        keyed = fetch.options(key="mine")
        calls: list[Any] = [fetch(1), fetch(2), fetch(1), keyed(5)]
        with pytest.raises(UsageError, match="'mine' was used before"):
            await keyed(6)
        task = asyncio.create_task(by_await(), name="branch")
        await asyncio.gather(*calls, task)

    made = addresses(begun(flow).take())
    assert made[0].startswith(":calls.fetch#")
    assert made[2] == made[0][:-1] + "1"
    assert made[1] != made[0]
    assert made[3] == ":calls.fetch#=mine.0"
    assert made[4] == "/branch.0" + made[0]


def test_wrong_arguments_fail_where_the_call_is_made() -> None:
    """As Python's own call would, and before anything is issued."""

    @durable(name="calls.wrong")
    async def flow() -> list[str]:
        found = []
        wrong: Any = fetch
        for arguments, keywords in (
            ((), {}),
            ((1, 2), {}),
            ((), {"valeu": 1}),
            ((len,), {}),
        ):
            try:
                wrong(*arguments, **keywords)
            except (TypeError, PayloadError) as error:
                found.append(type(error).__name__)
        return found

    assert value_of(flow) == ["TypeError"] * 3 + ["PayloadError"]


def test_stop_iteration_arrives_as_a_runtime_error() -> None:
    """A future cannot carry it; the cause does."""

    @durable(name="calls.stops")
    async def flow() -> str:
        try:
            await broken(1)
        except RuntimeError as error:
            return type(error).__name__
        return "nothing"

    assert value_of(flow) == "RuntimeError"


def test_a_map_is_done_with_its_pages_and_fails_with_the_first() -> None:
    """Pages arrive in any order; a failed one cancels the rest."""

    @durable(name="calls.mapped")
    async def flow() -> list[int]:
        return await fetch.map([1, 2, 3], chunk=1)

    run = begun(flow)
    made = addresses(run.take())
    assert len(made) == 3
    for at, address in enumerate(reversed(made), 1):
        recorded = Recorded(ok=True, payload=encode_many([address[-5:]]))
        run.deliver(ResultDelivered(address, STARTED_AT + at), recorded)
        run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    run = begun(flow)
    run.deliver(
        ResultDelivered(made[1], STARTED_AT + 1),
        outcome_of(durable(name="calls.fails", kind="workflow")(_fails)).recorded,
    )
    run.drain()
    assert isinstance(run.outcome(), Finished)
    assert {c.address for c in run.take().settled} == {made[0], made[2]}


async def _fails() -> None:
    raise LookupError("a page")


def test_an_empty_map_needs_nobody() -> None:
    """No items, no pages, an empty list."""

    @durable(name="calls.empty")
    async def flow() -> list[int]:
        return await stent.map(fetch, [])

    run = begun(flow)
    assert isinstance(run.outcome(), Finished)
    assert run.take().calls == []


def test_tasks_that_outlive_the_root_may_not_call() -> None:
    """Their calls raise; nothing is issued after the return."""
    seen: list[str] = []

    @durable(name="calls.outliving")
    async def flow() -> int:
        async def background(value: int) -> None:
            try:
                for _ in range(value):
                    await asyncio.sleep(0)
                await fetch(value)
            except (ExecutionClosedError, asyncio.CancelledError) as error:
                seen.append(type(error).__name__)
                try:
                    await fetch(value)
                except ExecutionClosedError:
                    seen.append("closed")

        asyncio.create_task(background(1))  # noqa: RUF006
        asyncio.create_task(background(50))  # noqa: RUF006
        return 1

    run = begun(flow)
    assert isinstance(run.outcome(), Finished)
    assert run.take().calls == []
    assert seen.count("closed") == 2
    run.close()


def test_dropped_code_cannot_call() -> None:
    """A ``finally`` that runs while a run is dropped issues nothing."""
    seen: list[str] = []

    @durable(name="calls.dropped")
    async def flow() -> None:
        try:
            await fetch(1)
        finally:
            try:
                await fetch(2)
            except Exception:  # noqa: BLE001 - must not catch it
                seen.append("swallowed")
            except BaseException as error:
                seen.append(type(error).__name__)
                raise

    run = begun(flow)
    run.take()
    run.close()
    assert seen == ["StopSignal"]
    assert not run.take()


def test_a_call_belongs_to_its_own_loop() -> None:
    """Its attributes say what the engine must do."""

    @durable(name="calls.attributes")
    async def flow() -> None:
        await asyncio.gather(fetch(1), stent.run(len, "ab"), by_child(2))

    one, run_call, child = begun(flow).take().calls
    assert isinstance(one, DurableCall)
    assert (one.target, one.child, one.turn) == (fetch, False, -1)
    assert run_call.function == "run:len"
    assert child.child


@durable(name="calls.by_child")
async def by_child(value: int) -> int:
    return await fetch(value)
