"""Limits that hold everywhere, and rows that cannot be read."""

from __future__ import annotations

import asyncio
from uuid import UUID

import asyncpg
import pytest

import stent
from stent import (
    ConfigurationError,
    ExecutionCancelledError,
    PayloadError,
    Settings,
    Status,
    Stent,
    durable,
)
from stent.services import turn_items, writer
from stent.store.listen import queue_channel

SMALL = 10_000


@durable
async def produce(count: int) -> str:
    return "x" * count


@durable
async def consume(text: str) -> int:
    return len(text)


@durable
async def produce_in_workflow(count: int) -> str:
    return await produce(count)


@durable
async def pass_on(count: int) -> int:
    return await consume("x" * count)


@durable
async def tell_much(count: int) -> None:
    await stent.sleep(0)
    stent.tell("x" * count)


@durable
async def nap_and_start() -> str:
    await stent.sleep("2.5s")
    return await produce(3)


@durable
async def parent_of_naps(count: int) -> list[str]:
    return await asyncio.gather(*[nap_and_start() for _ in range(count)])


@durable
async def produce_many(count: int) -> int:
    return sum(map(len, await asyncio.gather(*[produce(SMALL) for _ in range(count)])))


@durable
async def map_much(count: int) -> int:
    return len(await stent.map(produce, [SMALL] * count, chunk=count))


@durable(queue="elsewhere")
async def consume_elsewhere(number: int, text: str) -> int:
    return len(text) + number


@durable
async def pass_much_on(count: int) -> int:
    calls = [consume_elsewhere(0 * n, "x" * SMALL + str(n)) for n in range(count)]
    return len(await asyncio.gather(*calls))


async def test_long_arguments_are_inserted_in_parts(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement grows with the number of calls."""
    monkeypatch.setattr(turn_items, "CALLS_BYTES_PER_FLUSH", 5 * SMALL)
    monkeypatch.setattr(writer, "STATEMENT_BYTES_MAX", 15 * SMALL)
    queues = ["default", "elsewhere"]
    settings = Settings(database_url=database_url, max_concurrency=2)
    app = Stent.bootstrap(serve=True, settings=settings, queues=queues)
    async with app:
        outcome = await app.wait_for(await app.dispatch(pass_much_on, 60), "20s")
    assert outcome.unwrap() == 60


async def test_more_than_a_statement_can_hold_blocks_one_execution(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would drop the connection each time; others go on."""
    monkeypatch.setattr(writer, "STATEMENT_BYTES_MAX", 15 * SMALL)
    async with Stent.bootstrap(database_url, serve=True) as app:
        much = await app.dispatch(produce_many, 40)
        while (state := await app.state_of(much)).status is not Status.BLOCKED:  # noqa: ASYNC110 - a row
            await asyncio.sleep(0.02)
        assert "more than a statement can hold" in " ".join(state.waiting_for)
        page = await app.wait_for(await app.dispatch(map_much, 40), "10s")
        assert "more than a statement can hold" in str(page.error)
        outcome = await app.wait_for(await app.dispatch(produce_many, 3), "10s")
        assert outcome.unwrap() == 3 * SMALL


@pytest.mark.parametrize("function", [produce, produce_in_workflow, pass_on, tell_much])
async def test_payload_limit_of_the_settings_holds(
    database_url: str, function: stent.DurableFunction[..., object]
) -> None:
    """Results, arguments of calls and told values obey the limit that was set."""
    settings = Settings(database_url=database_url, payload_bytes_max=SMALL)
    async with Stent.bootstrap(settings=settings, serve=True) as app:
        small = await app.wait_for(await app.dispatch(function, SMALL - 100))
        assert small.is_ok()
        large = await app.wait_for(await app.dispatch(function, SMALL + 100))
    assert isinstance(large.error, PayloadError)
    assert str(SMALL) in str(large.error).replace(" ", "").replace(",", "")


async def test_waiting_executions_do_not_fill_the_worker(database_url: str) -> None:
    """With room for two, seven executions that wait for each other all finish."""
    settings = Settings(database_url=database_url, resident_max=2)
    async with Stent.bootstrap(settings=settings, serve=True) as app:
        execution_id = await app.dispatch(parent_of_naps, 6)
        outcome = await app.wait_for(execution_id, timeout=18)
    assert outcome.unwrap() == ["xxx"] * 6


async def test_unreadable_journal_blocks_one_execution(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """A corrupt turn stops nobody else, is told, and does not keep from cancelling."""
    async with Stent(database_url) as app:
        execution_id = await app.dispatch(produce_in_workflow, 3)
        identifier = UUID(execution_id)
        await connection.execute(
            "insert into stent.journal (execution_id, position, payload) "
            "values ($1, 0, '{not json')",
            identifier,
        )
        # As if it had been owned before: then it is restored, not started.
        await connection.execute(
            "update stent.executions set epoch = 5 where execution_id = $1", identifier
        )
    async with Stent.bootstrap(database_url, serve=True) as app:
        await wait_for_status(connection, identifier, Status.BLOCKED)
        state = await app.state_of(execution_id)
        other = await app.wait_for(await app.dispatch(produce_in_workflow, 3))
        assert "cannot be read" in " ".join(state.waiting_for)
        assert other.unwrap() == "xxx"
        await app.cancel(execution_id)
        outcome = await app.wait_for(execution_id)
        assert isinstance(outcome.error, ExecutionCancelledError)


@durable(name="test_bounds.sleeps_long", kind="workflow")
async def sleeps_long() -> None:
    await stent.sleep("1h")


@durable(name="test_bounds.waits_for_sleeper", kind="workflow")
async def waits_for_sleeper() -> None:
    await sleeps_long()


async def test_children_of_what_cannot_be_read_are_cancelled_with_it(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Nobody has looked which there are."""
    child = "select execution_id from stent.executions where parent_id = $1"
    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(waits_for_sleeper)
        while not await connection.fetchval(child, UUID(execution_id)):  # noqa: ASYNC110 - in the database
            await asyncio.sleep(0.005)
    corrupt = "update stent.journal set payload = '{not json' where execution_id = $1"
    assert await connection.execute(corrupt, UUID(execution_id)) != "UPDATE 0"
    async with Stent.bootstrap(database_url, serve=True) as app:
        await app.cancel(execution_id)
        sleeper = await connection.fetchval(child, UUID(execution_id))
        for ended in (execution_id, str(sleeper)):
            outcome = await app.wait_for(ended)
            assert isinstance(outcome.error, ExecutionCancelledError)


async def test_unreadable_task_is_a_failed_call(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """Corrupt options of a task fail the call that it is."""
    delayed = consume.options(delay="1s")

    @durable(name="test_bounds.calls_later", kind="workflow")
    async def calls_later() -> str:
        try:
            await delayed("x")
        except PayloadError as error:
            return str(error)
        return "nothing happened"

    async with Stent.bootstrap(database_url, serve=True) as app:
        execution_id = await app.dispatch(calls_later)
        corrupt = "update stent.tasks set options = 'no json' where execution_id = $1"
        while await connection.execute(corrupt, UUID(execution_id)) != "UPDATE 1":  # noqa: ASYNC110 - in the database
            await asyncio.sleep(0)
        outcome = await app.wait_for(execution_id)
    assert "unreadable" in outcome.unwrap()


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800", "k" * 501, 5])
async def test_texts_that_cannot_be_stored_are_refused(
    database_url: str, key: object
) -> None:
    """A dispatch key is checked where it is given."""
    async with Stent(database_url) as app:
        with pytest.raises(ConfigurationError, match="dispatch_key"):
            await app.dispatch(consume, "x", dispatch_key=key)


def test_channels_are_short_enough() -> None:
    """Postgres cuts names at 63 bytes; ours never reach that."""
    assert len(queue_channel("q" * 200)) < 63


async def wait_for_status(
    connection: asyncpg.Connection, execution_id: UUID, status: Status
) -> None:
    query = "select status from stent.executions where execution_id = $1"
    while await connection.fetchval(query, execution_id) != status:  # noqa: ASYNC110 - in the database
        await asyncio.sleep(0.01)
