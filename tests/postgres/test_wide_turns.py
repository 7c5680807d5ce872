"""Turns with more calls than one flush inserts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest

import stent
from stent import Stent, durable
from stent.services.turn_items import CALLS_PER_FLUSH

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from asyncpg import Connection

MANY = 3 * CALLS_PER_FLUSH + 7


@durable
async def itself(number: int) -> int:
    return number


@durable(kind="workflow")
async def child(number: int) -> int:
    return await itself(number)


def here(number: int) -> int:
    return number


@durable
async def calls_of_all_kinds() -> list[int]:
    """Activities, what runs in the worker itself, and children, in turns."""
    calls: list[Awaitable[int]] = []
    for number in range(0, MANY, 3):
        calls.append(itself(number))
        calls.append(stent.run(here, number + 1))
        calls.append(child(number + 2))
    return list(await asyncio.gather(*calls))


@durable
async def leaves_detached() -> None:
    for number in range(MANY):
        await child.options(detached=True).start(number)


@durable
async def leaves_undone() -> int:
    calls = [asyncio.ensure_future(itself(number)) for number in range(MANY)]
    return await calls[0]


@durable(queue="nobody")
async def never() -> None:
    raise AssertionError


@durable
async def waits_for_nobody() -> None:
    await asyncio.gather(*[never() for _ in range(MANY)])


async def test_calls_of_all_kinds(database_url: str) -> None:
    """Each is made once, whichever flush it belongs to."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(calls_of_all_kinds), "60s")
        assert outcome.unwrap() == list(range(len(outcome.unwrap())))
        assert len(outcome.unwrap()) >= MANY


async def test_detached_children_of_a_last_turn(
    database_url: str, connection: Connection
) -> None:
    """They are all there when their parent has ended."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        parent = await app.dispatch(leaves_detached)
        (await app.wait_for(parent, "60s")).unwrap()
        children = await connection.fetch(
            "select execution_id::text from stent.executions where detached"
        )
        assert len(children) == MANY
        for (one,) in children:
            (await app.wait_for(one, "60s")).unwrap()


@pytest.mark.parametrize("slots", [2, 2 * MANY])
async def test_execution_ends_although_calls_are_left(
    database_url: str, slots: int
) -> None:
    """With slots for all of them none needs a row, nor a flush that inserts it."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=slots) as app:
        identifier = await app.dispatch(leaves_undone)
        assert (await app.wait_for(identifier, "60s")).unwrap() == 0


async def test_cancelled_while_calls_are_inserted(
    database_url: str, connection: Connection
) -> None:
    """As soon as the first of them can be seen."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(waits_for_nobody)
        with anyio.fail_after(30):
            while not await connection.fetchval("select count(*) from stent.tasks"):  # noqa: ASYNC110 - a row
                await asyncio.sleep(0)
        await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "60s")
        assert isinstance(outcome.error, stent.ExecutionCancelledError)
    assert await connection.fetchval("select count(*) from stent.tasks") == 0
