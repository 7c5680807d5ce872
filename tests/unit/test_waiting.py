"""wait_for, wait and as_completed: asyncio's semantics under the durable loop."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import tasks
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from stent import waiting
from stent.loop import DurableLoop

waiting.install()
Program = Callable[[], Coroutine[Any, Any, Any]]


def on_durable_loop(program: Program) -> Any:
    """Run to the end; only time is delivered."""
    loop = DurableLoop(salt=3, now=10**15)
    task = loop.create_task(program())
    loop.drain()
    while not task.done():
        deadline = loop.next_deadline()
        assert deadline is not None, "nothing can happen any more"
        loop.begin_delivery()
        loop.set_time(deadline)
        loop.fire_timers()
        loop.drain()
    loop.finish()
    loop.close()
    return task.result()


async def value_after(value: Any, delay: float) -> Any:
    await asyncio.sleep(delay)
    return value


async def error_after(delay: float) -> None:
    await asyncio.sleep(delay)
    raise LookupError(delay)


async def caught(awaitable: Any) -> str:
    try:
        return f"value {await awaitable}"
    except BaseException as error:  # noqa: BLE001 - its class is compared
        return type(error).__name__


async def wait_for_in_time() -> Any:
    return await asyncio.wait_for(value_after(1, 0.001), 5)


async def wait_for_without_timeout() -> Any:
    return await asyncio.wait_for(value_after(1, 0), None)


async def wait_for_late() -> Any:
    return await caught(asyncio.wait_for(value_after(1, 5), 0.001))


async def wait_for_nothing_left() -> Any:
    done = asyncio.get_running_loop().create_future()
    done.set_result(3)
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    return [
        await caught(asyncio.wait_for(value_after(1, 5), 0)),
        await caught(asyncio.wait_for(done, 0)),
        await caught(asyncio.wait_for(cancelled, 0)),
        await caught(asyncio.wait_for(error_after(0), 5)),
    ]


async def wait_for_is_cancelled() -> Any:
    inner = asyncio.create_task(value_after(1, 5))
    outer = asyncio.create_task(asyncio.wait_for(inner, 5))
    await asyncio.sleep(0.001)
    outer.cancel()
    found = await caught(outer)
    return [found, inner.cancelled()]


async def wait_for_swallowing_task() -> Any:
    async def swallows() -> str:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            return "swallowed"
        return "slept"

    return await caught(asyncio.wait_for(swallows(), 0.001))


async def wait_first() -> Any:
    futures = [asyncio.create_task(value_after(i, 0.001 + i * 5)) for i in range(3)]
    done, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return [futures.index(task) for task in done], len(pending)


async def wait_first_exception() -> Any:
    futures: list[Any] = [
        asyncio.create_task(value_after(0, 0)),
        asyncio.create_task(error_after(0.001)),
        asyncio.create_task(value_after(0, 5)),
    ]
    done, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    return sorted(futures.index(t) for t in done), [futures.index(t) for t in pending]


async def wait_cancelled_is_no_exception() -> Any:
    futures = [asyncio.create_task(value_after(0, 5)) for _ in range(2)]
    asyncio.get_running_loop().call_soon(futures[0].cancel)
    asyncio.get_running_loop().call_later(0.002, futures[1].cancel)
    done, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    return len(done), len(pending)


async def wait_with_timeout() -> Any:
    futures = [asyncio.create_task(value_after(i, i * 5)) for i in range(2)]
    done, pending = await asyncio.wait(futures, timeout=0.01)
    for task in pending:
        task.cancel()
    return len(done), len(pending)


async def wait_is_cancelled() -> Any:
    inner = asyncio.create_task(value_after(0, 5))
    outer = asyncio.create_task(asyncio.wait([inner]))
    await asyncio.sleep(0.001)
    outer.cancel()
    found = await caught(outer)
    left = inner.done()
    inner.cancel()
    return found, left


async def wait_refuses() -> Any:
    coroutine = value_after(0, 0)
    try:
        return [
            await caught(asyncio.wait([])),
            await caught(asyncio.wait([coroutine])),
            await caught(asyncio.wait(asyncio.get_running_loop().create_future())),
            await caught(
                asyncio.wait([asyncio.ensure_future(asyncio.sleep(0))], return_when="x")
            ),
        ]
    finally:
        coroutine.close()


async def completes_in_order() -> Any:
    delays = (0.03, 0.01, 0.02)
    calls = [value_after(delay, delay) for delay in delays]
    return [await each for each in asyncio.as_completed(calls)]


async def completes_late() -> Any:
    calls = [value_after(delay, delay) for delay in (0, 5, 6)]
    return [await caught(e) for e in asyncio.as_completed(calls, timeout=0.01)]


async def completes_with_errors() -> Any:
    calls: list[Any] = [error_after(0.002), value_after(1, 0.001)]
    return [await caught(each) for each in asyncio.as_completed(calls)]


async def completes_what_is_done() -> Any:
    done = asyncio.get_running_loop().create_future()
    done.set_result(1)
    found = [await each for each in asyncio.as_completed([done, done])]
    nothing: list[Any] = []
    return found, [await each for each in asyncio.as_completed(nothing)]


async def completes_nothing_single() -> Any:
    try:
        for each in asyncio.as_completed(asyncio.get_running_loop().create_future()):
            await each
    except TypeError:
        return "TypeError"
    return None


PROGRAMS: list[Program] = [
    wait_for_in_time,
    wait_for_without_timeout,
    wait_for_late,
    wait_for_nothing_left,
    wait_for_is_cancelled,
    wait_first,
    wait_first_exception,
    wait_cancelled_is_no_exception,
    wait_with_timeout,
    wait_is_cancelled,
    wait_refuses,
    completes_in_order,
    completes_late,
    completes_with_errors,
    completes_what_is_done,
    completes_nothing_single,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
async def test_results_are_those_of_asyncio(program: Program) -> None:
    """The same program gives the same on a plain loop and on the durable one."""
    assert on_durable_loop(program) == await program()


def test_a_swallowed_timeout_returns_the_value() -> None:
    """As since Python 3.12, on every version: the awaitable's own value wins."""
    assert on_durable_loop(wait_for_swallowing_task) == "value swallowed"


@pytest.mark.parametrize("name", ["wait_for", "wait", "as_completed"])
async def test_elsewhere_the_originals_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any other loop the functions are asyncio's own."""
    patched = getattr(asyncio, name)
    assert patched is getattr(tasks, name)
    original = inspect.unwrap(patched)
    assert original.__module__ == "asyncio.tasks"
    assert original.__code__.co_filename == tasks.__file__
    monkeypatch.setattr(waiting, "_wait", None)
    monkeypatch.setattr(waiting, "_wait_for", None)
    monkeypatch.setattr(waiting, "_AsCompleted", None)
    done = asyncio.get_running_loop().create_future()
    done.set_result(4)
    if name == "wait_for":
        assert await asyncio.wait_for(done, 1) == 4
    elif name == "wait":
        assert await asyncio.wait([done]) == ({done}, set())
    else:
        assert [await each for each in asyncio.as_completed([done])] == [4]


def test_installing_twice_patches_once() -> None:
    """A second install leaves the first in place."""
    before = asyncio.wait
    waiting.install()
    assert asyncio.wait is before


def test_wait_for_makes_no_task_of_its_own() -> None:
    """Its awaitable runs in the caller's task, so lineages are version independent."""

    async def program() -> tuple[bool, bool]:
        async def inner() -> Any:
            return asyncio.current_task()

        outer = asyncio.current_task()
        return (
            await asyncio.wait_for(inner(), 1) is outer,
            await asyncio.wait_for(inner(), None) is outer,
        )

    assert on_durable_loop(program) == (True, True)


def test_as_completed_iterates_asynchronously_everywhere() -> None:
    """``async for`` yields the given futures, on 3.11 too."""

    async def program() -> bool:
        futures = [asyncio.create_task(value_after(i, 1 - i / 10)) for i in range(3)]
        completed: Any = asyncio.as_completed(futures)
        found = [each async for each in completed]
        return found == futures[::-1]

    assert on_durable_loop(program)


def test_as_completed_wakes_another_when_a_waiter_is_cancelled() -> None:
    """A consumer cancelled in the moment of its wake-up takes no result along."""

    async def program() -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        iterator: Any = iter(asyncio.as_completed([future, loop.create_future()]))
        first = asyncio.create_task(next(iterator))
        second = asyncio.create_task(next(iterator))
        await asyncio.sleep(0)
        future.set_result("value")
        future.add_done_callback(lambda _: first.cancel())
        await asyncio.wait([first])
        return await second

    assert on_durable_loop(program) == "value"


def test_gather_and_scopes_have_a_stable_order() -> None:
    """What libraries keep in sets is ordered by its making."""

    async def program() -> list[int]:
        loop: Any = asyncio.get_running_loop()
        gathered = [asyncio.gather(loop.create_future()) for _ in range(20)]
        hashes = [hash(each) for each in gathered]
        for each in gathered:
            each.cancel()
        return hashes

    first = on_durable_loop(program)
    assert first == on_durable_loop(program)
    assert first == sorted(first)


def test_all_tasks_keep_their_order() -> None:
    """Whatever other tasks the process has: only those of the loop, the same way."""

    async def program() -> list[str]:
        waiting = [
            asyncio.create_task(value_after(n, 5), name=str(n)) for n in range(64)
        ]
        await asyncio.sleep(0)
        found = [task.get_name() for task in asyncio.all_tasks()]
        for task in waiting:
            task.cancel()
        return found

    async def disturbed() -> list[str]:
        others = [asyncio.create_task(asyncio.sleep(0)) for _ in range(50)]
        found = on_durable_loop(program)
        await asyncio.gather(*others)
        return list(found)

    alone = on_durable_loop(program)
    assert len(alone) == 65
    for _ in range(5):
        assert asyncio.run(disturbed()) == alone


@pytest.mark.parametrize("timeout", [float("-inf"), -1e300])
def test_a_timeout_long_ago_is_due(timeout: float) -> None:
    """As it is under asyncio."""

    async def program() -> int:
        done, _ = await asyncio.wait(
            [asyncio.create_task(value_after(1, 5))], timeout=timeout
        )
        return len(done)

    assert on_durable_loop(program) == 0
