"""What would run when a suspended coroutine is closed."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from stent.cleanups import cleans_up

ran: list[str] = []


@types.coroutine
def wait() -> Any:
    yield


async def plain() -> None:
    await wait()


async def catches_errors() -> None:
    try:
        await wait()
    except ValueError as error:
        ran.append(str(error))


async def comprehends() -> list[None]:
    return [await wait() for _ in range(2)]


async def waits_after_cleaning_up() -> None:
    try:
        ran.append("before")
    finally:
        ran.append("cleanup")
    await wait()


async def times_out() -> None:
    async with asyncio.timeout(None):
        await wait()


async def finally_() -> None:
    try:
        await wait()
    finally:
        ran.append("finally")


async def bare_except() -> None:
    try:
        await wait()
    except BaseException:
        ran.append("caught")
        raise


async def with_() -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(ran.append, "with")
        await wait()


async def nested() -> None:
    await finally_()


async def generate() -> AsyncGenerator[int, None]:
    try:
        await wait()
        yield 1
    finally:
        ran.append("generator")


@pytest.mark.parametrize(
    "function",
    [plain, catches_errors, comprehends, waits_after_cleaning_up],
)
def test_nothing_runs(function: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """It is found not to clean up, and closing it runs nothing."""
    suspended = function()
    suspended.send(None)
    ran.clear()
    found = cleans_up(suspended)
    suspended.close()
    assert not found
    assert ran == []


@pytest.mark.parametrize("function", [finally_, bare_except, with_, nested])
def test_something_runs(function: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """It is found to clean up, and closing it runs that."""
    suspended = function()
    suspended.send(None)
    ran.clear()
    found = cleans_up(suspended)
    suspended.close()
    assert found
    assert len(ran) == 1


async def test_async_with_of_asyncio_is_none() -> None:
    """A timeout around the place is no reason."""
    task = asyncio.get_running_loop().create_task(times_out())
    await asyncio.sleep(0)
    coroutine = task.get_coro()
    found = cleans_up(coroutine)
    task.cancel()
    assert not found


def test_generators_are_looked_into() -> None:
    """A finally around what an async generator awaits counts."""
    generator = generate()
    step = generator.asend(None)
    step.send(None)
    assert cleans_up(generator)
    with contextlib.suppress(RuntimeError):
        step.close()
