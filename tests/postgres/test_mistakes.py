"""Mistakes that newcomers make, and what they are told."""

from __future__ import annotations

import asyncio

import pytest

import stent
from stent import ConfigurationError, PayloadError, Stent, UsageError, durable


@durable
async def activity(x: int) -> int:
    return x


@durable(retry=3)
async def retried_workflow() -> int:
    return await activity(1)


@durable
async def calls_with_timeout() -> int:
    return await plain_workflow.options(timeout="1s")()


@durable
async def plain_workflow() -> int:
    return await activity(1)


@durable
async def forgets_await() -> object:
    return activity(1)


@durable(retry=3)
async def reports_attempt(x: int) -> tuple[int, int]:
    attempt = stent.current().attempt
    if attempt < 3:
        message = f"attempt {attempt}"
        raise ValueError(message)
    return x, attempt


@durable
async def maps_reports() -> list[tuple[int, int]]:
    return await stent.map(reports_attempt, range(3))


async def test_dispatch_of_a_call_is_explained(database_url: str) -> None:
    """Passing f(x) instead of f, x names the right form."""
    async with Stent(database_url) as app:
        with pytest.raises(UsageError, match=r"dispatch\(f, x\)"):
            await app.dispatch(activity(1))  # type: ignore[arg-type]


async def test_options_of_attempts_are_refused_for_workflows(database_url: str) -> None:
    """Nothing is accepted and ignored: a workflow has no attempts."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        with pytest.raises(ConfigurationError, match="retry= belongs to activities"):
            await app.dispatch(retried_workflow)
        outcome = await app.wait_for(await app.dispatch(calls_with_timeout))
    assert isinstance(outcome.error, ConfigurationError)
    assert "timeout= belongs to activities" in str(outcome.error)


async def test_forgotten_await_is_named(database_url: str) -> None:
    """A workflow that returns a call instead of its result is told so."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(forgets_await))
    assert isinstance(outcome.error, PayloadError)
    assert "forget await" in str(outcome.error)


async def test_attempts_of_map_items_are_counted(database_url: str) -> None:
    """current().attempt in an item of a map counts that item's attempts."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(maps_reports))
    assert outcome.unwrap() == [(0, 3), (1, 3), (2, 3)]


@durable
async def forgets_to_wait() -> int:
    activity(1)  # type: ignore[unused-coroutine]
    return 1


async def test_a_call_without_await_is_told(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A workflow that returns right after it drops the call: there is a warning."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(forgets_to_wait), "15s")
    assert outcome.unwrap() == 1
    (line,) = [r for r in caplog.records if r.getMessage() == "call.dropped"]
    assert vars(line)["activities"] == [activity.name]


async def test_waiting_without_any_worker_is_told(
    database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with what to do about it; the wait goes on."""
    monkeypatch.setattr("stent.outcomes.ABSENCE_SECONDS", 0.0)
    async with Stent(database_url) as app:
        execution_id = await app.dispatch(activity, 1)
        waiting = asyncio.ensure_future(app.wait_for(execution_id))
        while "worker.absent" not in caplog.text:  # noqa: ASYNC110 - a log line
            await asyncio.sleep(0.01)
        assert not waiting.done()
        async with Stent.bootstrap(database_url, serve=True):
            assert (await waiting).unwrap() == 1
    assert caplog.text.count("worker.absent") == 1


def test_key_that_is_no_parameter_is_refused() -> None:
    """When the function is defined, naming its parameters."""
    with pytest.raises(ConfigurationError, match=r"'nope' is not .* \(customer\)"):

        @durable(max_concurrent=1, concurrency_key="nope")
        async def bill(customer: str) -> str:
            return customer
