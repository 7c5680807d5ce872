"""Retries: policies, timeouts, keys, and where attempts run."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

import stent
from stent import NonRetryableError, Result, RetryPolicy, Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

tries: list[Any] = []
FAST = RetryPolicy(max_attempts=4, initial_delay="1ms", jitter=False)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    tries.clear()


class RateLimitedError(Exception):
    """Of this module."""


@durable(retry=FAST)
async def succeeds_at(attempt: int) -> int:
    tries.append((stent.current().attempt, stent.idempotency_key()))
    if len(tries) < attempt:
        raise ConnectionError(f"try {len(tries)}")
    return len(tries)


@durable
async def calls(attempt: int) -> int:
    return await succeeds_at(attempt)


@durable(retry=FAST)
async def raises(name: str) -> None:
    tries.append(name)
    errors: dict[str, BaseException] = {
        "type": TypeError("wrong"),
        "never": NonRetryableError("stop"),
        "limited": RateLimitedError("slow down"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "cancelled": asyncio.CancelledError(),
        "stop": StopIteration(1),
    }
    raise errors[name]


@durable
async def catches(name: str) -> str:
    try:
        await raises(name)
    except Exception as error:  # noqa: BLE001 - whatever it is
        return type(error).__name__
    return "nothing"


@durable(retry=RetryPolicy(max_attempts=3, initial_delay="1ms", retry_for=(OSError,)))
async def only_os_errors(name: str) -> None:
    tries.append(name)
    raise OSError(name) if name == "os" else ValueError(name)


@durable(
    retry=RetryPolicy(
        max_attempts=3, initial_delay="1ms", never_for=(RateLimitedError,)
    )
)
async def never_limited() -> None:
    tries.append(1)
    raise RateLimitedError("no")


@durable(retry=RetryPolicy(max_attempts=2, initial_delay="1ms"), timeout="50ms")
async def too_slow() -> None:
    tries.append(1)
    await asyncio.sleep(60)


@durable(retry=1, timeout="50ms")
async def swallows_its_timeout() -> str:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        tries.append("swallowed")
    return "too late"


@durable(retry=1)
async def plain_slow(seconds: float) -> str:
    tries.append(1)
    await asyncio.sleep(seconds)
    return "done"


@durable
async def overrides() -> list[str]:
    found = []
    try:
        await plain_slow.options(
            retry=RetryPolicy(max_attempts=3, initial_delay="1ms"), timeout="30ms"
        )(60)
    except TimeoutError as error:
        found.append(type(error).__name__)
    found.append(await plain_slow(0.05))
    return found


@durable(timeout="300ms", retry=1)
async def item(number: int) -> int:
    await asyncio.sleep(0.05)
    return number


@durable(timeout="40ms", retry=1)
async def slow_item(number: int) -> int:
    tries.append(number)
    await asyncio.sleep(60 if number == 2 else 0)
    return number


@durable
async def map_items(count: int) -> list[int]:
    return await stent.map(item, range(count), chunk=100)


@durable
async def map_slow_items(count: int) -> list[Any]:
    found: list[Any] = await slow_item.map(
        range(count), chunk=100, return_exceptions=True
    )
    return [type(f).__name__ if isinstance(f, Exception) else f for f in found]


@pytest.mark.parametrize("function", [succeeds_at, calls])
async def test_retries_until_it_succeeds(
    database_url: str, connection: Connection, function: Any
) -> None:
    """Attempts are counted, share one key, and the failed ones are on record."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(function, 3), "10s")
    assert outcome == Result.Ok(3)
    assert [number for number, _ in tries] == [1, 2, 3]
    assert len({key for _, key in tries}) == 1
    rows = await connection.fetch("select attempt from stent.attempts order by attempt")
    assert [row["attempt"] for row in rows] == [1, 2]


async def test_out_of_attempts_fails(database_url: str) -> None:
    """With the last exception; retry=4 means four attempts."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(calls, 99), "10s")
    assert isinstance(outcome.error, ConnectionError)
    assert str(outcome.error) == "try 4"
    assert len(tries) == 4


@pytest.mark.parametrize(
    ("name", "attempts", "caught"),
    [
        ("type", 1, "TypeError"),
        ("never", 1, "NonRetryableError"),
        ("limited", 4, "RateLimitedError"),
    ],
)
async def test_what_is_retried(
    database_url: str, name: str, attempts: int, caught: str
) -> None:
    """Programming errors and NonRetryableError are not."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(catches, name), "10s")
    assert outcome == Result.Ok(caught)
    assert len(tries) == attempts


@pytest.mark.parametrize("name", ["exit", "interrupt", "cancelled", "stop"])
async def test_control_flow_of_an_activity_is_its_failure(
    database_url: str, name: str
) -> None:
    """The worker survives it and the workflow can catch it as an Exception."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(catches, name), "10s")
        assert outcome.unwrap() != "nothing"
        direct = await app.wait_for(await app.dispatch(raises, name), "10s")
        assert isinstance(direct.error, Exception)
        assert await app.wait_for(await app.dispatch(calls, 1), "10s")


async def test_retry_for_and_never_for(database_url: str) -> None:
    """The policy's classes decide, here and in any process."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        for name in ("os", "value"):
            await app.wait_for(await app.dispatch(only_os_errors, name), "10s")
        await app.wait_for(await app.dispatch(never_limited), "10s")
    assert tries == ["os", "os", "os", "value", 1]


async def test_timeout_is_per_attempt(database_url: str) -> None:
    """Each attempt gets the whole timeout; the error is a TimeoutError."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(too_slow), "10s")
        assert isinstance(outcome.error, stent.ActivityTimeoutError)
        assert isinstance(outcome.error, TimeoutError)
        swallowed = await app.wait_for(await app.dispatch(swallows_its_timeout), "10s")
        assert isinstance(swallowed.error, stent.ActivityTimeoutError)
    assert tries == [1, 1, "swallowed"]


@pytest.mark.parametrize("slots", [10, 1])
async def test_options_of_a_call_hold_for_this_call(
    database_url: str, slots: int
) -> None:
    """Also for the attempts that run elsewhere than the first one."""
    async with (
        Stent.bootstrap(database_url, serve=True, max_concurrency=slots) as app,
        Stent.bootstrap(database_url, serve=True, max_concurrency=slots),
    ):
        outcome = await app.wait_for(await app.dispatch(overrides), "10s")
    assert outcome == Result.Ok(["ActivityTimeoutError", "done"])
    assert len(tries) == 4


async def test_timeout_of_a_map_is_per_item(database_url: str) -> None:
    """A page takes as long as its items take together."""
    async with Stent.bootstrap(database_url, serve=True, max_concurrency=1) as app:
        outcome = await app.wait_for(await app.dispatch(map_items, 10), "10s")
        assert outcome == Result.Ok(list(range(10)))
        slow = await app.wait_for(await app.dispatch(map_slow_items, 4), "10s")
    assert slow == Result.Ok([0, 1, "ActivityTimeoutError", 3])


async def test_clock_of_the_host_does_not_matter(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases, timers and retries live on database time."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86_400 + 7_200 * real() % 3_600)
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(calls, 3), "10s")
        assert outcome == Result.Ok(3)
        delayed = await app.dispatch(succeeds_at, 1, delay="50ms", max_duration="1h")
        assert (await app.wait_for(delayed, "10s")).is_ok()
