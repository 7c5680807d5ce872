"""stent.map: order, failures, control flow of items, arguments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from asyncpg import Connection

import stent
from stent import PayloadError, Result, RetryPolicy, Settings, Stent, durable

seen: list[Any] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    seen.clear()


@durable(retry=1)
async def item(number: int) -> int:
    await asyncio.sleep(0)
    if number == 13:
        raise ValueError("thirteen")
    return number * 2


mark: ContextVar[int] = ContextVar("mark", default=-1)


@durable(retry=1)
async def marks(number: int) -> int:
    before = mark.get()
    if number % 3:
        mark.set(number)
        await asyncio.sleep(0)
    return before


@durable
async def map_marks(count: int) -> list[int]:
    return await stent.map(marks, range(count), chunk=count)


@durable(retry=1)
async def exits(number: int) -> int:
    await asyncio.sleep(0.01)
    if number % 2:
        raise SystemExit(number)
    return number


@durable(retry=stent.RetryPolicy(max_attempts=3, initial_delay="1ms"))
async def flaky(number: int) -> str:
    seen.append((number, stent.idempotency_key()))
    if sum(n == number for n, _ in seen) < 3:
        raise OSError("again")
    return stent.idempotency_key()


@durable
async def pair(a: int, b: str = "-") -> str:
    return f"{a}{b}"


@durable
def blocking(number: int) -> int:
    return number + 1


@durable
async def child(number: int) -> int:
    return await item(number) + await item(number)


@durable
async def run_map(name: str, count: int, keep: bool) -> list[Any]:
    functions: dict[str, Any] = {
        "item": item,
        "exits": exits,
        "flaky": flaky,
        "blocking": blocking,
    }
    functions["child"] = child
    found: list[Any] = await stent.map(
        functions[name], range(count), return_exceptions=keep
    )
    return [str(f) if isinstance(f, Exception) else f for f in found]


@durable
async def starred() -> list[str]:
    return [
        *await stent.starmap(pair, [(1, "a"), (2, "b")]),
        *await pair.starmap([(3, "-")]),
        *await pair.map([4]),
    ]


@durable
async def catches_map() -> str:
    try:
        await stent.map(item, range(20))
    except ValueError as error:
        return str(error)
    return "nothing"


@durable
async def returns_socket(number: int) -> Any:
    return (lambda: None) if number == 1 else number


@durable
async def map_unstorable(keep: bool) -> list[str]:
    found = await stent.map(returns_socket, range(3), return_exceptions=keep)
    return [type(f).__name__ for f in found]


@durable
async def gives_up() -> str:
    begun = asyncio.create_task(one_begins())
    items = asyncio.create_task(stent.map(sleeps, range(50)))
    await begun
    items.cancel()
    await asyncio.wait([items])
    return "gave up" if items.cancelled() else "?"


@durable
async def one_begins() -> None:
    await asyncio.wait_for(Begun.event.wait(), 10)


class Begun:
    """Set when an item that sleeps has begun."""

    event: asyncio.Event


@durable
async def sleeps(number: int) -> int:
    Begun.event.set()
    try:
        await asyncio.sleep(60)
    finally:
        seen.append(number)
    return number


async def run(database_url: str, function: Any, *args: Any, slots: int = 50) -> Any:
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=slots) as app:
        outcome = await app.wait_for(await app.dispatch(function, *args), "15s")
        (worker,) = app._workers
        # A page that was stopped or settled is held until that is committed.
        while worker.activities.used or worker.claimer.held:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
        return outcome


@pytest.mark.parametrize("count", [0, 1, 12, 500])
async def test_results_in_order(database_url: str, count: int) -> None:
    """Item by item, also none at all."""
    outcome = await run(database_url, run_map, "item", count, True)
    expected = [2 * n if n != 13 else "thirteen" for n in range(count)]
    assert outcome == Result.Ok(expected)


async def test_first_failure_raises(database_url: str) -> None:
    """Without return_exceptions."""
    assert await run(database_url, catches_map) == Result.Ok("thirteen")


@pytest.mark.parametrize("slots", [1, 4])
async def test_an_item_keeps_its_context_variables_to_itself(
    database_url: str, slots: int
) -> None:
    """Also where items of a page run one after the other."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=slots) as app:
        outcome = await app.wait_for(await app.dispatch(map_marks, 12))
    assert outcome.unwrap() == [-1] * 12


@pytest.mark.parametrize("keep", [True, False])
async def test_exit_of_an_item_ends_no_worker(database_url: str, keep: bool) -> None:
    """SystemExit of one item is that item's failure."""
    outcome = await run(database_url, run_map, "exits", 8, keep)
    if keep:
        assert outcome.unwrap()[::2] == [0, 2, 4, 6]
        assert "SystemExit" in outcome.unwrap()[1]
    else:
        assert isinstance(outcome.error, Exception)


async def test_item_is_retried_under_its_key(database_url: str) -> None:
    """Three attempts, one key per item."""
    outcome = await run(database_url, run_map, "flaky", 5, False)
    assert len(set(outcome.unwrap())) == 5
    for number in range(5):
        assert len({k for n, k in seen if n == number}) == 1
        assert sum(n == number for n, _ in seen) == 3


@pytest.mark.parametrize("name", ["blocking", "child"])
async def test_other_kinds_of_functions(database_url: str, name: str) -> None:
    """Plain functions in threads, workflows as children."""
    outcome = await run(database_url, run_map, name, 5, False)
    blocking_results, child_results = [1, 2, 3, 4, 5], [0, 4, 8, 12, 16]
    expected = blocking_results if name == "blocking" else child_results
    assert outcome == Result.Ok(expected)


async def test_starmap_and_methods(database_url: str) -> None:
    """Positional arguments per item, on the module and on the function."""
    assert await run(database_url, starred) == Result.Ok(["1a", "2b", "3-", "4-"])


@pytest.mark.parametrize("keep", [True, False])
async def test_unstorable_item(database_url: str, keep: bool) -> None:
    """It is that item's failure."""
    outcome = await run(database_url, map_unstorable, keep)
    if keep:
        assert outcome == Result.Ok(["int", "PayloadError", "int"])
    else:
        assert isinstance(outcome.error, stent.PayloadError)


@pytest.mark.parametrize("slots", [4, 100])
async def test_giving_up_stops_the_items(database_url: str, slots: int) -> None:
    """All of its running items are cancelled, the others never begin."""
    Begun.event = asyncio.Event()
    outcome = await run(database_url, gives_up, slots=slots)
    assert outcome == Result.Ok("gave up")
    # One that was free for a moment may have been taken before the drop was written.
    assert 1 <= len(seen) <= 2 * slots


async def test_map_outside_of_a_workflow(database_url: str) -> None:
    """One execution per item."""
    async with Stent.bootstrap(database_url, serve=True):
        assert await Stent.map(pair, [1, 2]) == ["1-", "2-"]


@durable(retry=1)
async def fails_beside_a_slow_one(number: int) -> int:
    if number == 0:
        await asyncio.sleep(60)
    await asyncio.sleep(0.02)
    raise ValueError(f"item {number}")


@durable
async def one_page() -> None:
    await stent.map(fails_beside_a_slow_one, range(3), chunk=3)


async def test_failed_item_does_not_wait_for_slow_ones(database_url: str) -> None:
    """The first item out of attempts ends the map; its neighbours are stopped."""
    outcome = await run(database_url, one_page)
    assert isinstance(outcome.error, ValueError)


@durable
async def generated(count: int) -> int:
    return sum(await stent.map(item, (n for n in range(100, 100 + count))))


@durable
async def numbers_of(page: int) -> list[int]:
    return [] if page == 3 else list(range(100 * (page + 1), 100 * (page + 1) + 50))


async def all_numbers() -> AsyncIterator[int]:
    page = 0
    while numbers := await numbers_of(page):
        for number in numbers:
            yield number
        page += 1


@durable
async def streamed() -> int:
    return sum(await item.map(all_numbers()))


async def test_items_of_generators_and_streams(database_url: str) -> None:
    """Pulled while the map runs; a stream may await durable calls."""
    outcome = await run(database_url, generated, 20_000)
    assert outcome == Result.Ok(2 * sum(range(100, 20_100)))
    outcome = await run(database_url, streamed)
    firsts = (100, 200, 300)
    assert outcome == Result.Ok(2 * sum(sum(range(f, f + 50)) for f in firsts))


class Running:
    """How many items run, and ran, at the same time."""

    now = most = 0
    wanted = 0
    full: asyncio.Event


def expect_running(wanted: int) -> None:
    Running.now = Running.most = 0
    Running.wanted = wanted
    Running.full = asyncio.Event()


@durable
async def counted(number: int) -> int:
    Running.now += 1
    Running.most = max(Running.most, Running.now)
    if Running.now == Running.wanted:
        Running.full.set()
    await Running.full.wait()
    for _ in range(number % 4):
        await asyncio.sleep(0)
    Running.now -= 1
    return number


@durable
async def bounded(count: int, concurrency: int) -> int:
    return sum(await counted.map(range(count), concurrency=concurrency))


@pytest.mark.parametrize("concurrency", [1, 5])
async def test_concurrency_over_workers(database_url: str, concurrency: int) -> None:
    """Over all workers as many items run as the map allows, and never more."""
    expect_running(concurrency)
    async with (
        Stent.bootstrap(database_url, serve=True, max_concurrency=4) as app,
        Stent.bootstrap(database_url, serve=True, max_concurrency=4),
    ):
        outcome = await app.wait_for(await app.dispatch(bounded, 600, concurrency))
    assert outcome == Result.Ok(sum(range(600)))
    assert Running.most == concurrency


@durable(retry=stent.RetryPolicy(max_attempts=3, initial_delay="1ms", jitter=False))
async def second_time(number: int) -> int:
    attempt = stent.current().attempt
    seen.append((number, attempt, stent.current().address))
    if number % 10 == 0 and attempt < 3:
        message = f"attempt {attempt} of {number}"
        raise OSError(message)
    return number


@durable
async def map_second_time(count: int, concurrency: int | None) -> int:
    return sum(await second_time.map(range(count), chunk=20, concurrency=concurrency))


@pytest.mark.parametrize("concurrency", [None, 2])
async def test_failed_items_become_tasks(
    database_url: str, connection: Connection, concurrency: int | None
) -> None:
    """Their attempts are counted in the database and told by the history."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(map_second_time, 40, concurrency)
        outcome = await app.wait_for(execution_id, "15s")
        entries = await app.history(execution_id)
    assert outcome == Result.Ok(sum(range(40)))
    rows = await connection.fetch("select address, attempt from stent.attempts")
    failed = sorted((n, a, address) for n, a, address in seen if n % 10 == 0 and a < 3)
    assert len(failed) == 8
    assert {(row["address"], row["attempt"]) for row in rows} == {
        (address, attempt) for _, attempt, address in failed
    }
    results = await connection.fetch("select address, attempt from stent.results")
    attempts = {row["address"]: row["attempt"] for row in results}
    assert all(attempts[address] == 3 for _, _, address in failed)
    told = [entry for entry in entries if entry.kind == "attempt.failed"]
    assert {entry.detail["attempt"] for entry in told} == {1, 2}
    assert "OSError: attempt 1 of 0" in {entry.detail["error"] for entry in told}
    assert sum(n % 10 != 0 for n, _, _ in seen) == 36


IN_AN_HOUR = stent.RetryPolicy(
    max_attempts=2, initial_delay="1h", max_delay="1h", jitter=False
)


@durable(retry=IN_AN_HOUR)
async def slow_to_retry(number: int) -> int:
    if number == 0:
        raise OSError("again in an hour")
    return number


@durable
async def map_slow_to_retry() -> None:
    await slow_to_retry.map(range(10), chunk=10)


async def test_waiting_item_holds_no_page(
    database_url: str, connection: Connection
) -> None:
    """Its page is done and its slot free while it waits for its next attempt."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(map_slow_to_retry)
        query = """
            select address, attempt, worker_id, is_page,
                   available_at > now() + interval '50 minutes' as later
              from stent.tasks
        """
        rows: list[Any] = []
        while [row["is_page"] for row in rows] != [False]:
            await asyncio.sleep(0.01)
            rows = await connection.fetch(query)
        (task,) = rows
        assert task["later"]
        assert task["worker_id"] is None
        assert task["attempt"] == 2
        assert task["address"].endswith("/0")
        (worker,) = app._workers
        assert worker.activities.used == 0
        waits = (await app.state_of(execution_id)).waiting_for
        assert "attempt 2" in waits[0]
        await app.cancel(execution_id)
        assert not (await app.wait_for(execution_id)).ok


@durable
async def fails_third(number: int) -> int:
    seen.append(number)
    if number == 2:
        await item(1)
        raise ValueError("third")
    try:
        await stent.sleep("1h")
    finally:
        seen.append("stopped")
    return number


@durable
async def map_children(concurrency: int | None) -> None:
    await fails_third.map(range(20), concurrency=concurrency)


@pytest.mark.parametrize("concurrency", [None, 3])
async def test_failed_child_stops_its_siblings(
    database_url: str, connection: Connection, concurrency: int | None
) -> None:
    """They are cancelled, and what was not issued never is."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(map_children, concurrency))
        assert str(outcome.error) == "third"
        open_ones = "select count(*) from stent.executions where finished_at is null"
        while await connection.fetchval(open_ones):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    started = 20 if concurrency is None else concurrency
    assert sorted(n for n in seen if n != "stopped") == list(range(started))
    assert seen.count("stopped") == started - 1


def read_numbers(directory: str) -> list[int]:
    return [int(line) for line in Path(directory, "numbers").read_text().split()]


async def test_changed_items_block(database_url: str, tmp_path: Path) -> None:
    """An iterable that gives other items in a replay is told, and has no effect."""
    numbers = tmp_path / "numbers"
    numbers.write_text("1 2 3 4")
    async with Stent(database_url) as app:
        execution_id = await app.dispatch(changing_later, str(tmp_path))
        async with Stent.bootstrap(database_url, serve=True) as first:
            while "sleeping" not in seen:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await first.drain()
        numbers.write_text("1 2 5 4")
        async with Stent.bootstrap(database_url, serve=True):
            state = await app.state_of(execution_id)
            while state.status != "blocked":
                await asyncio.sleep(0.01)
                state = await app.state_of(execution_id)
        assert "items 2 to 3 of the map of" in state.waiting_for[0]


@durable
async def changing_later(directory: str) -> list[int]:
    found = await item.map(read_numbers(directory), chunk=2)
    seen.append("sleeping")
    await stent.sleep("1h")
    return found


async def test_map_outside_with_a_bound(database_url: str) -> None:
    """No more executions at the same time; streams and exceptions as inside."""
    expect_running(3)

    async def numbers() -> AsyncIterator[int]:
        for number in range(40):
            yield number

    async with Stent.bootstrap(database_url, serve=True):
        assert await counted.map(numbers(), concurrency=3) == list(range(40))
        kept = await item.map(range(12, 15), concurrency=2, return_exceptions=True)
        with pytest.raises(ValueError, match="thirteen"):
            await item.map(numbers(), concurrency=2)
    assert Running.most == 3
    assert [type(each).__name__ for each in kept] == ["int", "ValueError", "int"]


@durable(max_concurrent=1, concurrency_key=lambda number: number % 3)
async def one_of_a_key(number: int) -> int:
    key = number % 3
    assert key not in seen
    seen.append(key)
    await asyncio.sleep(0.001)
    seen.remove(key)
    return number


@durable(max_concurrent=2)
async def one_of_two(number: int) -> int:
    seen.append(number)
    assert len(seen) <= 2
    await asyncio.sleep(0)
    seen.remove(number)
    return number


@durable
async def postponed(number: int) -> int:
    seen.append(number)
    if number == 3 and seen.count(3) == 1:
        stent.retry_later("10ms")
    return 10 * number + stent.current().attempt


@durable
async def map_limited(name: str, count: int) -> list[int]:
    limited: dict[str, Any] = {
        "key": one_of_a_key,
        "slots": one_of_two,
        "later": postponed,
    }
    found: list[int] = await stent.map(limited[name], range(count))
    return found


@pytest.mark.parametrize("name", ["key", "slots"])
async def test_each_item_takes_its_slot(database_url: str, name: str) -> None:
    """Also one of its key: such items are tasks of their own."""
    outcome = await run(database_url, map_limited, name, 30)
    assert outcome == Result.Ok(list(range(30)))


async def test_item_may_ask_for_later(database_url: str) -> None:
    """That is no failed attempt."""
    outcome = await run(database_url, map_limited, "later", 6)
    assert outcome == Result.Ok([10 * n + 1 for n in range(6)])
    assert seen.count(3) == 2


class Unbound:
    """An attribute that fails when it is read, as a detached lazy one does."""

    def __set__(self, owner: object, value: object) -> None:
        return

    def __get__(self, owner: object, of: type | None = None) -> object:
        if owner is None:
            raise AttributeError
        message = "not bound"
        raise RuntimeError(message)


@dataclass
class Row:
    id: int
    rows: Any = Unbound()


@durable(retry=1)
async def odd_result(kind: str, number: int) -> Any:
    if kind == "growing":
        seen.append(number)
        return seen
    if number:
        return number
    return Row(1, []) if kind == "unbound" else {1, print}


@durable
async def map_odd(kind: str, keep: bool) -> list[str]:
    items = [(kind, number) for number in range(3)]
    try:
        found = await stent.starmap(odd_result, items, return_exceptions=keep, chunk=3)
    except Exception as error:  # noqa: BLE001 - its class is looked at
        return [type(error).__name__, str(error)]
    return [repr(one) for one in found]


@pytest.mark.parametrize(
    ("kind", "name"), [("unbound", "RuntimeError"), ("lambda", "PayloadError")]
)
async def test_result_that_cannot_be_encoded_fails_its_item(
    database_url: str, kind: str, name: str
) -> None:
    """As that of a single call does; neither the others nor the worker are touched."""
    first = (await run(database_url, map_odd, kind, False)).unwrap()
    assert first[0] == name
    kept = (await run(database_url, map_odd, kind, True)).unwrap()
    assert kept[0].startswith(name)
    assert kept[1:] == ["1", "2"]


async def test_results_are_what_they_were_when_the_item_returned(
    database_url: str,
) -> None:
    """Whatever becomes of their objects later."""
    seen.clear()
    found = (await run(database_url, map_odd, "growing", False)).unwrap()
    assert found == ["[0]", "[0, 1]", "[0, 1, 2]"]


@durable
async def shipped(number: int) -> int:
    seen.append(number)
    return number


@durable(kind="activity", retry=RetryPolicy(max_attempts=3, initial_delay="10ms"))
async def order(number: int) -> str:
    handle = await shipped.start(number)
    if stent.current().attempt == 1:
        raise ConnectionError
    return str(handle.id)


@durable
async def orders() -> int:
    return len(set(await stent.map(order, range(3), chunk=3, concurrency=1)))


async def test_what_an_item_starts_is_started_once(database_url: str) -> None:
    """Whichever items ran before it on the same worker."""
    seen.clear()
    assert (await run(database_url, orders)).unwrap() == 3
    assert sorted(seen) == [0, 1, 2]


@durable
async def big(number: int) -> str:
    return "x" * number


@durable
async def map_big() -> list[str]:
    try:
        return await stent.map(big, [10, 20, 5_000])
    except PayloadError as error:
        return [str(error)]


async def test_results_obey_the_limit_that_is_set(database_url: str) -> None:
    """Each for itself, and the error names the item."""
    settings = replace(Settings.from_env(), payload_bytes_max=2_000)
    async with Stent.bootstrap(database_url, serve=True, settings=settings) as app:
        outcome = await app.wait_for(await app.dispatch(map_big), "15s")
    (said,) = outcome.unwrap()
    assert "results[2]" in said
    assert "2000" in said
