"""Limits of functions, queues and keys, in one worker; see e2e for fleets."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg
import pytest

import stent
from stent import Stent, UsageError, durable
from stent.clock import DatabaseClock
from stent.errors import ConfigurationError
from stent.limit_settings import LimitState
from stent.registry import DurableFunction
from stent.services import limits
from stent.services.identity import Identity
from stent.services.lanes import Lane, function_limit, queue_limit
from stent.settings import Settings
from stent.store.session import Session
from stent.store.store import Store
from tests.postgres.test_queries import register

running: Counter[str] = Counter()
peak: Counter[str] = Counter()
levels: list[int] = []
"""How many of ``limited`` ran whenever another one began."""
order: list[str] = []


class Gate:
    """Holds activities until a test lets them go on."""

    open: asyncio.Event


@pytest.fixture(autouse=True)
async def _fresh() -> None:
    running.clear()
    peak.clear()
    order.clear()
    levels.clear()
    Gate.open = asyncio.Event()


async def wait_a_while(name: str, steps: int = 3) -> None:
    """Be seen running for a while."""
    running[name] += 1
    peak[name] = max(peak[name], running[name])
    for _ in range(steps):
        await asyncio.sleep(0.001)
    running[name] -= 1


@durable(max_concurrent=3)
async def limited(x: int) -> int:
    levels.append(running["limited"] + 1)
    await wait_a_while("limited")
    return x


@durable(max_concurrent=2)
async def held(x: int) -> int:
    running["held"] += 1
    await Gate.open.wait()
    running["held"] -= 1
    return x


@durable(max_concurrent_per_worker=2)
async def own(x: int) -> int:
    await wait_a_while("own")
    return x


@durable(max_concurrent=2, concurrency_key="customer")
async def keyed(customer: str, x: int) -> int:
    await wait_a_while(customer)
    return x


@durable(max_concurrent=2, concurrency_key="customer")
async def keyed_flow(customer: str, x: int) -> int:
    return await keyed(customer, x)


@durable(max_concurrent=1, concurrency_key=lambda n: n % 2)
async def by_parity(n: int) -> int:
    await wait_a_while(f"parity {n % 2}")
    return n


@durable(queue="reports")
async def report(x: int) -> int:
    await wait_a_while("reports")
    return x


@durable(queue="shared", max_concurrent=2)
async def called(x: int) -> int:
    order.append("called")
    await wait_a_while("shared")
    return x


@durable(queue="shared", max_concurrent=2)
async def mapped(x: int) -> int:
    order.append("mapped")
    await wait_a_while("shared")
    return x


async def take_turn(name: str) -> None:
    order.append(name)
    await wait_a_while("turns", steps=10)


@durable(queue="shared", max_concurrent=2)
async def first_of_three(x: int) -> None:
    await take_turn("first")


@durable(queue="shared", max_concurrent=2)
async def second_of_three(x: int) -> None:
    await take_turn("second")


@durable(queue="shared", max_concurrent=2)
async def third_of_three(x: int) -> None:
    await take_turn("third")


@durable(kind="workflow")
async def three(count: int) -> None:
    functions = (first_of_three, second_of_three, third_of_three)
    await asyncio.gather(*[f(n) for f in functions for n in range(count)])


@durable(max_concurrent_per_worker=2)
async def in_many_queues(x: int) -> int:
    await wait_a_while("many", steps=5)
    return x


@durable(kind="workflow")
async def over_queues(queues: list[str], count: int) -> int:
    calls = [in_many_queues.options(queue=q)(n) for q in queues for n in range(count)]
    return sum(await asyncio.gather(*calls))


@durable
async def both(count: int) -> int:
    calls = asyncio.gather(*[called(n) for n in range(count)])
    items = asyncio.ensure_future(mapped.map(range(count)))
    return sum(await calls) + sum(await items)


@durable
async def quick(x: int) -> int:
    order.append("quick")
    return x


@durable(rate_limit="1000/s burst 3")
async def rated(x: int) -> int:
    return x


@durable(max_concurrent=3, rate_limit="50/s burst 5")
async def rated_and_limited(x: int) -> int:
    await wait_a_while("rated and limited", steps=40)
    return x


@durable(max_concurrent=2)
async def limited_flow(x: int) -> int:
    running["flow"] += 1
    peak["flow"] = max(peak["flow"], running["flow"])
    try:
        await quick(x)
        await stent.sleep("20ms")
        return await quick(x)
    finally:
        running["flow"] -= 1


@durable(kind="workflow")
async def sum_of(name: str, count: int) -> int:
    functions: dict[str, Any] = {
        f.name.rpartition(".")[2]: f
        for f in (
            *(limited, held, own, report, quick, rated, by_parity),
            rated_and_limited,
        )
    }
    return sum(await asyncio.gather(*[functions[name](n) for n in range(count)]))


@durable
async def sum_of_map(count: int) -> int:
    return sum(await stent.map(limited, range(count)))


@durable
async def sum_keyed(count: int) -> int:
    calls = [keyed(f"customer {n % 3}", n) for n in range(count)]
    return sum(await asyncio.gather(*calls))


@durable
async def parent(count: int) -> int:
    return sum(await asyncio.gather(*[limited_flow(n) for n in range(count)]))


@pytest.mark.parametrize(
    ("function", "args", "seen", "most"),
    [
        (sum_of, ("limited", 40), "limited", 3),
        (sum_of, ("own", 40), "own", 2),
        (sum_of, ("by_parity", 20), "parity 1", 1),
        (sum_of_map, (40,), "limited", 3),
        (sum_keyed, (40,), "customer 1", 2),
        (parent, (12,), "flow", 2),
    ],
)
async def test_no_more_run_than_the_limit_says(
    database_url: str, function: Any, args: tuple[Any, ...], seen: str, most: int
) -> None:
    """And as many as it says, at times."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(function, *args))
    assert outcome.unwrap() == sum(range(args[-1]))
    assert peak[seen] == most


async def test_a_key_does_not_hold_up_others(database_url: str) -> None:
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.wait_for(await app.dispatch(sum_keyed, 40))
    assert {peak[f"customer {n}"] for n in range(3)} == {2}


@pytest.mark.parametrize("kind", ["task", "execution"])
async def test_calls_from_before_the_key_are_run(
    database_url: str, connection: asyncpg.Connection, kind: str
) -> None:
    """A function gets a concurrency key while calls without one are queued."""
    function = keyed if kind == "task" else keyed_flow
    async with Stent(database_url) as app:
        execution_id = await app.dispatch(function, "customer 1", 7)
        await connection.execute("update stent.executions set options = null")
        await app._start_worker(None, ("default",))
        assert (await app.wait_for(execution_id)).unwrap() == 7


async def test_unlimited_work_is_not_behind_limited(database_url: str) -> None:
    """A hundred wait for the limit; what has none runs."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        behind = await app.dispatch(sum_of, "held", 100)
        await wait_until(lambda: running["held"] == 2)
        first = await app.wait_for(await app.dispatch(sum_of, "quick", 10))
        assert first.unwrap() == sum(range(10))
        assert running["held"] == 2
        Gate.open.set()
        assert (await app.wait_for(behind)).unwrap() == sum(range(100))


async def test_a_queue_has_a_limit(database_url: str) -> None:
    async with Stent(database_url) as app:
        await app.set_limit(queue="reports", max_concurrent=2)
        async with Stent.bootstrap(database_url) as serving:
            await serve_queues(serving, "default", "reports")
            outcome = await app.wait_for(await app.dispatch(sum_of, "report", 30))
    assert outcome.unwrap() == sum(range(30))
    assert peak["reports"] == 2


async def test_a_limit_is_changed_while_it_works(database_url: str) -> None:
    """More start at once when it is raised; ``reset_limit`` restores the code's."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        waiting = await app.dispatch(sum_of, "held", 20)
        await wait_until(lambda: running["held"] == 2)
        await app.set_limit(held, max_concurrent=7)
        await wait_until(lambda: running["held"] == 7)
        await app.set_limit(held, max_concurrent=1)
        assert await app.reset_limit(held)
        state = await limit_of(app, held)
        assert (state.max_concurrent, state.is_set) == (2, False)
        Gate.open.set()
        assert (await app.wait_for(waiting)).ok


@pytest.mark.parametrize("workers", [1, 3])
async def test_a_lowered_limit_holds_when_what_ran_has_ended(
    database_url: str, workers: int
) -> None:
    """Though the workers have more to start at every moment."""
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(Stent.bootstrap(database_url, serve=True))
        for _ in range(workers - 1):
            await stack.enter_async_context(Stent.bootstrap(database_url, serve=True))
        await app.set_limit(limited, max_concurrent=10)
        first = await app.dispatch(sum_of, "limited", 500)
        await wait_until(lambda: peak["limited"] == 10)
        await app.set_limit(limited, max_concurrent=2)
        while (await held_of(app, limited)) > 2:  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)
        begun = len(levels)
        assert (await app.wait_for(first)).ok
    assert len(levels) - begun >= 100
    assert max(levels[begun:]) <= 2


@pytest.mark.parametrize("workers", [1, 3])
async def test_functions_share_the_slots_of_their_queue(
    database_url: str, workers: int
) -> None:
    """Slots that one worker has of a function, and none of the queue, are of no use."""
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(Stent(database_url))
        for _ in range(workers):
            served = Stent.bootstrap(
                database_url, serve=True, queues=["default", "shared"]
            )
            await stack.enter_async_context(served)
        await app.set_limit(queue="shared", max_concurrent=2)
        outcome = await app.wait_for(await app.dispatch(both, 150))
        assert outcome.unwrap() == 2 * sum(range(150))
    assert peak["shared"] == 2
    first = Counter(order[:150])
    assert min(first["called"], first["mapped"]) >= 25


async def test_three_functions_take_turns_with_one_slot(database_url: str) -> None:
    """None is passed over while it has something waiting."""
    async with Stent(database_url) as app:
        await app.set_limit(queue="shared", max_concurrent=1)
        await serve_queues(app, "default", "shared")
        assert (await app.wait_for(await app.dispatch(three, 60))).ok
    assert peak["turns"] == 1
    for name in ("first", "second", "third"):
        starts = [at for at, other in enumerate(order[:150]) if other == name]
        gaps = [after - at for at, after in pairwise([0, *starts, 150])]
        assert max(gaps) <= 15, (name, gaps)


async def test_what_a_worker_may_run_of_a_function_counts_over_its_queues(
    database_url: str,
) -> None:
    queues = ["default", "one", "two"]
    async with Stent.bootstrap(database_url, serve=True, queues=queues) as app:
        outcome = await app.wait_for(await app.dispatch(over_queues, queues, 20))
        assert outcome.unwrap() == 3 * sum(range(20))
    assert peak["many"] == 2


async def test_slots_for_which_there_is_nothing_to_claim_go_back(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others were faster."""
    monkeypatch.setattr(limits, "RELOAD_SECONDS", 3600.0)
    async with Stent(database_url) as app, Stent(database_url) as other:
        await serve_queues(app, "shared")
        await set_limit_of_queue(other, 4, app)
        assert await slots_wanted_by(app) == {"called": 2, "shared": 2}
        while await held_of(app, called):  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)


async def test_slots_without_those_of_the_queue_go_back_at_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of no use, and others might have what is missing."""
    monkeypatch.setattr(limits, "RELOAD_SECONDS", 3600.0)
    monkeypatch.setattr(limits, "IDLE_SECONDS", 3600.0)
    async with Stent(database_url) as app, Stent(database_url) as other:
        await serve_queues(app, "shared")
        await serve_queues(other, "shared")
        await set_limit_of_queue(other, 2, app)
        await set_limit_of_queue(app, 1, other)
        assert await slots_wanted_by(other, 1) == {"called": 1, "shared": 1}
        assert await slots_wanted_by(app) == {"called": 1, "shared": 0}
        while await held_of(app, called) > 1:  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)


async def test_idle_slots_go_back_while_other_work_is_claimed(
    database_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that were asked for just now wait for the end of the claim."""
    monkeypatch.setattr(limits, "FORGET_SECONDS", 3600.0)
    session = Session(database_url, "limits")
    worker = UUID(await register(connection))
    alone: limits.Limits[Any] = limits.Limits(
        Store(session),
        Identity(worker, Settings.from_env(), DatabaseClock()),
        queues=["shared"],
        hint_worker=lambda _: None,
    )
    async with Stent(database_url) as app, asyncio.TaskGroup() as tasks:
        await app.set_limit(queue="shared", max_concurrent=4)
        for function in (mapped, called):
            await app.set_limit(function, max_concurrent=2)
        await alone.reload()
        running = tasks.create_task(alone.run())
        for function, done in ((mapped, True), (called, False)):
            lane = alone.lane("shared", function.name)
            assert lane is not None
            await alone.want([lane], 2)
            if done:
                alone.claimed()
        while await held_of(app, mapped):  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)
        assert await held_of(app, called) == 2
        alone.claimed()
        while await held_of(app, called):  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)
        running.cancel()
    await session.close()


async def set_limit_of_queue(app: Stent, count: int, heard_by: Stent) -> None:
    """And wait until the worker of another app, which listens by now, knows it."""
    await app.set_limit(queue="shared", max_concurrent=count)
    lane = lane_of_calls(heard_by)
    name = queue_limit("shared")
    await wait_until(
        lambda: (name, count) in {(m.name, m.max_concurrent) for m in lane.limits}
    )


def lane_of_calls(app: Stent) -> Lane[Any]:
    """That of ``called`` in the worker of an app."""
    (worker,) = app._workers
    lane = worker.limits.lane("shared", called.name)
    assert lane is not None
    return lane


async def slots_wanted_by(app: Stent, count: int = 5) -> dict[str, int]:
    """What the worker of an app gets when it believes that tasks are waiting."""
    (worker,) = app._workers
    lane = lane_of_calls(app)
    await worker.limits.want([lane], count)
    worker.limits.claimed()
    return {
        m.name.rpartition(":")[2].rpartition(".")[2]: m.granted for m in lane.limits
    }


async def test_a_rate_that_was_never_used_has_all_of_its_burst(
    database_url: str,
) -> None:
    async with Stent.bootstrap(database_url, serve=True) as app:
        state = await limit_of(app, rated)
        assert state.tokens == 3


async def test_tokens_are_asked_for_though_there_are_no_more_slots(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How soon it asks for a second slot, which it will not get, does not matter."""
    monkeypatch.setattr(limits, "ASK_SECONDS_MAX", 3600.0)
    monkeypatch.setattr(limits, "FORGET_SECONDS", 3600.0)
    async with Stent.bootstrap(database_url, serve=True) as app:
        calls = await app.dispatch(sum_of, "rated_and_limited", 60)
        assert (await app.wait_for(calls)).unwrap() == sum(range(60))
    assert peak["rated and limited"] == 3


async def test_what_a_lifted_limit_had_granted_is_free_when_it_is_reset(
    database_url: str,
) -> None:
    """Idle, whoever had it; what still runs counts again."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        first = await app.dispatch(sum_of, "held", 20)
        await wait_until(lambda: running["held"] == 2)
        await app.set_limit(held, max_concurrent=None)
        await wait_until(lambda: running["held"] == 20)
        assert await app.reset_limit(held)
        while (await held_of(app, held)) < 20:  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)
        await app.set_limit(held, max_concurrent=None)
        Gate.open.set()
        assert (await app.wait_for(first)).ok
        assert await app.reset_limit(held)
        while (await held_of(app, held)) > 0:  # noqa: ASYNC110 - asks the database
            await asyncio.sleep(0.002)
        async with Stent.bootstrap(database_url, serve=True, queues=["other"]):
            call = held.options(queue="other")
            assert (await app.wait_for((await call.start(1)).id)).unwrap() == 1


@pytest.mark.parametrize("what", ["function", "queue"])
async def test_a_pause_starts_nothing_until_it_is_over(
    database_url: str, what: str
) -> None:
    paused: dict[str, Any] = {"function": {"function": quick}, "queue": {"queue": "q"}}
    async with Stent.bootstrap(database_url) as app:
        await app.pause(**paused[what])
        await serve_queues(app, "default", "q")
        held_up = await app.dispatch(quick.options(queue="q"), 1)
        assert (await app.wait_for(await app.dispatch(sum_of, "own", 5))).ok
        with pytest.raises(TimeoutError):
            await app.wait_for(held_up, "50ms")
        assert not order
        await app.resume(**paused[what])
        assert (await app.wait_for(held_up)).unwrap() == 1


async def test_tokens_are_not_given_twice(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """A bucket of three that does not refill lets three start, on any worker."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.set_limit(rated, rate_limit="1/1000h burst 3")
        execution_id = await app.dispatch(sum_of, "rated", 10)
        done = "select count(*) from stent.results where address like '%.rated#%'"
        while await connection.fetchval(done) < 3:  # noqa: ASYNC110 - rows have no events
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await app.wait_for(execution_id, "300ms")
        assert await connection.fetchval(done) == 3
        await app.set_limit(rated, rate_limit="1000/s")
        assert (await app.wait_for(execution_id)).ok


later: list[int] = []


@durable(rate_limit="1000/s", retry=2)
async def told_to_wait(x: int) -> int:
    later.append(stent.current().attempt)
    if len(later) <= 5:
        stent.retry_later("5ms")
    return x


@durable
async def told_inline(x: int) -> int:
    later.append(stent.current().attempt)
    if len(later) <= 5:
        stent.retry_later("5ms")
    return x


@durable
async def told_in_thread_flow() -> int:
    return await told_inline(7)


@durable
def told_in_thread(x: int) -> int:
    later.append(stent.current().attempt)
    if len(later) <= 5:
        stent.retry_later(0.005)
    return x


@durable
async def told_in_map() -> int:
    return sum(await stent.map(told_to_wait, [7]))


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (told_to_wait, (7,)),
        (told_inline, (7,)),
        (told_in_thread, (7,)),
        (told_in_thread_flow, ()),
        (told_in_map, ()),
    ],
)
async def test_retry_later_is_no_attempt(
    database_url: str, function: Any, args: tuple[Any, ...]
) -> None:
    """Five times told to come back, with two attempts allowed: the first succeeds."""
    later.clear()
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(function, *args))
    assert outcome.unwrap() == 7
    assert later == [1] * 6


def test_retry_later_belongs_into_an_activity() -> None:
    with pytest.raises(UsageError, match="inside a durable function"):
        stent.retry_later("1s")


@pytest.mark.parametrize(
    "options",
    [
        {"max_concurrent": 0},
        {"max_concurrent": True},
        {"max_concurrent": "5"},
        {"max_concurrent_per_worker": -1},
        {"rate_limit": "fast"},
        {"rate_limit": 5},
        {"concurrency_key": "x"},
        {"concurrency_key": 5, "max_concurrent": 1},
    ],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    async def some(x: int) -> int:
        return x

    with pytest.raises(ConfigurationError):
        durable(**options)(some)


async def test_a_key_that_cannot_be_found_is_refused(database_url: str) -> None:
    async with Stent(database_url) as app:
        with pytest.raises(UsageError, match="concurrency_key"):
            await app.dispatch(keyed, "", 1)


async def test_targets_are_a_function_or_a_queue(database_url: str) -> None:
    async with Stent(database_url) as app:
        with pytest.raises(UsageError):
            await app.set_limit(max_concurrent=1)
        with pytest.raises(UsageError, match="what to limit"):
            await app.set_limit(quick)
        with pytest.raises(UsageError):
            await app.pause(function=quick, queue="default")
        with pytest.raises(UsageError, match="wait_until is not durable"):
            await app.pause(function=wait_until)  # type: ignore[arg-type]
        for name in ("", " ", "a\nb"):
            with pytest.raises(UsageError):
                await app.set_limit(queue=name, max_concurrent=1)
            with pytest.raises(UsageError):
                await app.pause(function=name)
        with pytest.raises(ConfigurationError, match="must have a name"):
            await app.serve(queues=["default", ""])


async def limit_of(app: Stent, function: DurableFunction[Any, Any]) -> LimitState:
    """What operators see of the limit of a function."""
    name = function_limit(function.name)
    (state,) = [state for state in await app.limits() if state.name == name]
    return state


async def held_of(app: Stent, function: DurableFunction[Any, Any]) -> int:
    """Slots that workers have been granted."""
    return (await limit_of(app, function)).held


async def serve_queues(app: Stent, *queues: str) -> None:
    """Serve in the background of the app, as ``bootstrap(serve=True)`` does."""
    await app._start_worker(None, queues)


async def wait_until(condition: Any) -> None:
    """The test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - activities have no events for tests
        await asyncio.sleep(0.002)
