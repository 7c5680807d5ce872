"""stent.map: order, failures, control flow of items, arguments."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import stent
from stent import Result, Stent, durable

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
    try:
        async with asyncio.timeout(0.1):
            await stent.map(sleeps, range(50))
    except TimeoutError:
        return "gave up"
    return "?"


@durable
async def sleeps(number: int) -> int:
    try:
        await asyncio.sleep(60)
    finally:
        seen.append(number)
    return number


async def run(database_url: str, function: Any, *args: Any, slots: int = 50) -> Any:
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=slots) as app:
        outcome = await app.wait_for(await app.dispatch(function, *args), "15s")
        (worker,) = app._workers
        while worker.activities.used:  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
        assert not worker.claimer.held
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
