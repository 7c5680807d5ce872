"""The timeout of an activity is that of one attempt, also for the items of a map."""

from __future__ import annotations

import asyncio
from typing import cast

import stent
from stent import ActivityTimeoutError, Stent, durable

attempts: list[int] = []


@durable(retry=2, timeout="100ms")
async def stuck_if_odd(n: int) -> int:
    attempts.append(n)
    if n % 2:
        await asyncio.Event().wait()
    await asyncio.sleep(0.03)
    return n


@durable
async def map_in_one_page(count: int) -> list[str]:
    results = await stent.map(
        stuck_if_odd, range(count), chunk=count, return_exceptions=True
    )
    return [
        type(result).__name__ if isinstance(result, Exception) else str(result)
        for result in cast("list[object]", results)
    ]


@durable
async def map_and_raise() -> None:
    await stent.map(stuck_if_odd, [1], chunk=1)


async def test_each_item_has_its_own_timeout(database_url: str) -> None:
    """A page that takes longer than the timeout loses only the items that do."""
    attempts.clear()
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=1) as app:
        # One slot, one page: the even items alone take longer than one timeout.
        execution_id = await app.dispatch(map_in_one_page, 8)
        results = (await app.wait_for(execution_id, "15s")).unwrap()
    stuck = ActivityTimeoutError.__name__
    assert results == ["0", stuck, "2", stuck, "4", stuck, "6", stuck]
    assert sorted(attempts) == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]


async def test_a_timeout_fails_the_map(database_url: str) -> None:
    """Without return_exceptions it raises, naming the last attempt."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(map_and_raise), "15s")
    assert isinstance(outcome.error, ActivityTimeoutError)
    assert "attempt 2 of" in str(outcome.error)
