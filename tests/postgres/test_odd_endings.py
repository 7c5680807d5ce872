"""Attempts that end in ways nobody expects, and what they leave behind."""

from __future__ import annotations

import asyncio

import pytest

import stent
from stent import (
    ActivityFailedError,
    ExecutionCancelledError,
    Stent,
    durable,
    transaction,
)


@durable(retry=1)
async def cancels_itself(number: int) -> int:
    await asyncio.sleep(0.01)
    if number == 7:
        raise asyncio.CancelledError("seven")
    return number


@durable(retry=1)
async def cancels_its_task(number: int) -> int:
    await asyncio.sleep(0.01)
    if number == 7:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)
    return number


@durable
async def map_cancels_itself() -> list[int]:
    return await stent.map(cancels_itself, range(20), chunk=20)


@durable
async def map_cancels_its_task() -> list[int]:
    return await stent.map(cancels_its_task, range(20), chunk=20)


@durable(retry=1)
async def raises_odd_notes() -> None:
    error = ValueError("n")
    error.__notes__ = 5  # type: ignore[assignment]
    raise error


class Hostile(Exception):  # noqa: N818 - a name of its own
    def __getattribute__(self, name: str) -> object:
        raise SystemExit


@durable(retry=1)
async def raises_hostile() -> None:
    raise Hostile


@durable(retry=1)
def exits_generator_in_thread() -> None:
    raise GeneratorExit


@durable
async def ok() -> str:
    return "ok"


@durable
async def dirties_session() -> None:
    async with transaction() as connection:
        await connection.execute("set session search_path = nowhere")
        await connection.execute("create temp table leaked (a int)")
        await connection.execute("select pg_advisory_lock(42)")


@durable
async def looks_at_session() -> list[object]:
    async with transaction() as connection:
        return [
            await connection.fetchval("show search_path"),
            await connection.fetchval("select to_regclass('pg_temp.leaked')::text"),
            await connection.fetchval(
                "select count(*) from pg_locks "
                "where locktype = 'advisory' and objid = 42 and granted"
            ),
        ]


@pytest.mark.parametrize("workflow", [map_cancels_itself, map_cancels_its_task])
async def test_item_that_cancels_itself_is_not_lost(
    database_url: str, workflow: stent.DurableFunction[[], list[int]]
) -> None:
    """A map never returns fewer results than items."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(workflow))
        assert isinstance(outcome.error, ExecutionCancelledError | ActivityFailedError)
        assert (await app.wait_for(await app.dispatch(ok))).unwrap() == "ok"


@pytest.mark.parametrize(
    "function", [raises_odd_notes, raises_hostile, exits_generator_in_thread]
)
async def test_no_exception_keeps_its_slot(
    database_url: str, function: stent.DurableFunction[[], None]
) -> None:
    """Whatever an exception does when it is looked at, the call fails."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=1) as app:
        outcome = await app.wait_for(await app.dispatch(function), timeout=15)
        assert outcome.is_err()
        assert (await app.wait_for(await app.dispatch(ok))).unwrap() == "ok"


async def test_sessions_of_transactions_are_clean(database_url: str) -> None:
    """What one activity did to its session does not reach the next one."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=1) as app:
        await app.wait_for(await app.dispatch(dirties_session))
        outcome = await app.wait_for(await app.dispatch(looks_at_session))
    assert outcome.unwrap() == ['"$user", public', None, 0]
