"""The deterministic loop: what it refuses, orders, names, bounds and closes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
import pytest

from stent import loop as loop_module
from stent import waiting
from stent.errors import LivelockError, UsageError, WorkflowIOError
from stent.loop import DurableHandle, DurableLoop, DurableTask

waiting.install()
NOW = 1_700_000_000_000_000


def fresh(now: int = NOW) -> DurableLoop:
    return DurableLoop(salt=5, now=now)


def run(coroutine: Coroutine[Any, Any, Any], loop: DurableLoop | None = None) -> Any:
    """Run a coroutine that needs no delivery to its end."""
    loop = loop or fresh()
    task = loop.create_task(coroutine)
    assert loop.drain()
    return task.result()


def advance(loop: DurableLoop) -> int | None:
    """Fire the next timers; the deadline they had."""
    deadline = loop.next_deadline()
    if deadline is not None:
        loop.begin_delivery()
        loop.set_time(deadline)
        loop.fire_timers()
        assert loop.drain()
    return deadline


REFUSED: list[Callable[[], Coroutine[Any, Any, Any]]] = [
    lambda: asyncio.open_connection("localhost", 1),
    lambda: asyncio.start_server(lambda *_: None, "localhost", 1),
    lambda: asyncio.create_subprocess_exec("true"),
    lambda: asyncio.create_subprocess_shell("true"),
    lambda: asyncio.to_thread(print),
    lambda: anyio.to_thread.run_sync(print),
    lambda: anyio.connect_tcp("127.0.0.1", 1),
    lambda: anyio.run_process(["true"]),
    lambda: anyio.Path("x").read_text(),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_io_is_refused_with_line_and_fix(number: int) -> None:
    """Real I/O raises at once, names the user's line and what to do; nothing hangs."""

    async def program() -> None:
        try:
            await REFUSED[number]()
        except* WorkflowIOError as group:
            refused.extend(group.exceptions)

    refused: list[BaseException] = []
    run(program())
    (error,) = refused
    # anyio connects in a task of its own, where no line of the user runs.
    assert f"at {__file__}:" in str(error) or "unknown line" in str(error)
    assert "@durable" in str(error)
    assert "stent.run" in str(error)


def test_the_line_is_that_of_the_call() -> None:
    """The frames of asyncio and of the engine are skipped."""

    async def program() -> None:
        await asyncio.to_thread(print)

    line = program.__code__.co_firstlineno + 1
    with pytest.raises(WorkflowIOError, match=f"{__file__}:{line}"):
        run(program())


def test_descriptors_and_signals_are_refused() -> None:
    """The loop's own doors to the outside are shut too."""

    async def program() -> None:
        loop = asyncio.get_running_loop()
        for refused in (
            lambda: loop.add_reader(0, print),
            lambda: loop.add_signal_handler(1, print),
            lambda: loop.run_in_executor(None, print),
        ):
            with pytest.raises(WorkflowIOError):
                refused()
        for control in (loop.stop, loop.run_forever):
            with pytest.raises(UsageError, match="belongs to the engine"):
                control()
        with pytest.raises(UsageError, match="set_task_factory"):
            loop.set_task_factory(None)
        with pytest.raises(UsageError, match="debug"):
            loop.set_debug(True)

    run(program())


def test_callbacks_from_other_threads_are_refused() -> None:
    """Another thread's callback would have no place in the order."""
    loop = fresh()
    refused: list[BaseException] = []
    called: list[int] = []

    def call() -> None:
        try:
            loop.call_soon_threadsafe(called.append, 1)
        except WorkflowIOError as error:
            refused.append(error)

    async def program() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        loop.call_soon_threadsafe(called.append, 2)

    run(program(), loop)
    assert len(refused) == 1
    assert called == [2]


def test_eager_tasks_are_refused() -> None:
    """A task that starts inside its creator's step would have no label."""

    async def program() -> None:
        loop: Any = asyncio.get_running_loop()
        coroutine = asyncio.sleep(0)
        try:
            with pytest.raises(UsageError, match="eager"):
                loop.create_task(coroutine, eager_start=True)  # noqa: RUF006 - refused
        finally:
            coroutine.close()

    run(program())


def test_a_busy_workflow_is_a_livelock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless work without waiting is stopped, and the task is named."""
    monkeypatch.setattr(loop_module, "CALLBACKS_MAX", 1_000)

    async def spin() -> None:
        while True:  # noqa: ASYNC110 - the fault
            await asyncio.sleep(0)

    loop = fresh()
    loop.create_task(spin(), name="spinner")
    with pytest.raises(
        LivelockError, match=r"spinner \(/spinner.0\) at .*test_loop.py:"
    ):
        loop.drain()
    loop.close()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_exits_stay_inside_the_task(error: BaseException) -> None:
    """A task that wants to end the process ends only itself."""
    loop = fresh()

    async def exits() -> None:
        raise error

    async def others() -> str:
        await asyncio.sleep(0)
        return "done"

    exiting = loop.create_task(exits())
    other = loop.create_task(others())
    assert loop.drain()
    assert exiting.exception() is error
    assert other.result() == "done"


def test_a_failing_callback_stops_nobody() -> None:
    """Whatever a callback raises, CancelledError included, the loop goes on."""
    loop = fresh()
    called: list[BaseException] = []

    def failing(error: BaseException) -> None:
        raise error

    for error in (ValueError("x"), asyncio.CancelledError(), GeneratorExit()):
        loop.call_soon(failing, error)
        loop.call_soon(called.append, error)
    assert loop.drain()
    assert len(called) == 3


def test_a_drain_pauses_between_callbacks() -> None:
    """With a moment that has passed, a drain gives way and loses nothing."""
    loop = fresh()
    seen: list[int] = []

    async def each(value: int) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        seen.append(value)

    for value in range(50):
        loop.create_task(each(value))
    pauses = 0
    while not loop.drain(until=0.0):
        pauses += 1
    assert pauses > 3
    assert seen == list(range(50))


def test_timers_fire_in_order_and_only_when_time_advances() -> None:
    """By deadline, then by creation; time alone fires none."""
    loop = fresh()
    seen: list[str] = []
    for name, delay in (("c", 3), ("a", 1), ("b", 1), ("d", 3)):
        loop.call_later(delay, seen.append, name)
    cancelled = loop.call_later(2, seen.append, "x")
    cancelled.cancel()
    loop.set_time(NOW + 10_000_000)
    assert loop.drain()
    assert seen == []
    loop.fire_timers()
    assert loop.drain()
    assert seen == ["a", "b", "c", "d"]
    assert loop.next_deadline() is None


@pytest.mark.parametrize("delay", [1e-9, 1e-7, 0.1, 1 / 3, 2.000001, 86_400.7])
def test_a_timer_is_due_at_its_deadline(delay: float) -> None:
    """Deadlines in whole microseconds never come a moment too early."""
    for now in range(NOW, NOW + 50):
        loop = fresh(now)
        fired: list[float] = []
        timer = loop.call_later(delay, lambda _l=loop, _f=fired: _f.append(_l.time()))
        deadline = advance(loop)
        assert deadline is not None
        assert fired
        assert fired[0] >= timer.when()
        assert deadline - now <= delay * 1e6 + 2


def test_endless_timers_are_no_deadline() -> None:
    """Sleeping for ever is waiting for nothing; NaN is refused."""
    loop = fresh()
    task = loop.create_task(asyncio.sleep(math.inf))
    loop.create_task(anyio.sleep_forever())
    assert loop.drain()
    assert loop.next_deadline() is None
    with pytest.raises(ValueError, match="NaN"):
        loop.call_at(math.nan, print)
    assert not task.done()
    loop.close()


def test_cancelled_timers_are_forgotten() -> None:
    """Ten thousand timeouts that did not happen leave nothing behind."""
    loop = fresh()
    for _ in range(10_000):
        loop.call_later(60, print).cancel()
    assert len(loop._timers) < 200
    assert loop.next_deadline() is None


def lineages(loop: DurableLoop) -> list[str | None]:
    return [task.lineage for task in loop.live_tasks()]


def test_lineage_is_label_and_occurrence() -> None:
    """Explicit names win over qualnames; equal labels are counted per parent."""
    loop = fresh()

    async def leaf() -> None:
        await asyncio.Event().wait()

    async def root() -> None:
        tasks = [
            asyncio.create_task(leaf(), name="mine"),
            asyncio.create_task(leaf(), name="mine"),
            asyncio.create_task(leaf()),
            asyncio.create_task(leaf(), name="odd name / with: signs"),
        ]
        tasks[2].set_name("late but before its first step")
        async with anyio.create_task_group() as group:
            group.start_soon(leaf)
            group.start_soon(leaf)

    loop.create_task(root(), name="root")
    assert loop.drain()
    found = lineages(loop)
    assert found[:3] == ["/root.0", "/root.0/mine.0", "/root.0/mine.1"]
    assert len({*found}) == len(found)
    assert all(each is not None and each.startswith("/root.0") for each in found)
    assert all(str(each).isascii() and " " not in str(each) for each in found)
    loop.close()


def test_a_name_given_later_changes_no_lineage() -> None:
    """The label is fixed at the first step."""
    loop = fresh()

    async def leaf() -> None:
        await asyncio.Event().wait()

    task: Any = loop.create_task(leaf(), name="first")
    loop.drain()
    task.set_name("second")
    assert task.lineage == "/first.0"
    loop.close()


def test_deep_lineages_stay_short_and_distinct() -> None:
    """Recursion of tasks does not make addresses grow without bound."""
    loop = fresh()

    async def deeper(depth: int) -> None:
        if depth:
            await asyncio.gather(deeper(depth - 1), deeper(depth - 1))
        else:
            await asyncio.Event().wait()

    loop.create_task(deeper(7))
    assert loop.drain()
    found = lineages(loop)
    assert len(set(found)) == len(found) == 255
    assert max(len(str(each)) for each in found) <= 160
    loop.close()


def test_callbacks_inherit_the_lineage_of_their_registrar() -> None:
    """Also timers, done callbacks and callbacks in a context of their own."""
    loop = fresh()
    seen: list[str] = []

    async def registrar() -> None:
        own = asyncio.get_running_loop()
        own.call_soon(lambda: seen.append(loop.lineage()))
        own.call_later(1, lambda: seen.append(loop.lineage()))
        own.call_soon(
            lambda: seen.append(loop.lineage()), context=contextvars.Context()
        )
        future = own.create_future()
        future.add_done_callback(lambda _: seen.append(loop.lineage()))
        future.set_result(None)

    loop.create_task(registrar(), name="me")
    loop.drain()
    advance(loop)
    assert seen == ["/me.0"] * 4


def test_tasks_in_one_shared_context_keep_their_lineages() -> None:
    """The last label in a shared context does not rename the others."""
    loop = fresh()
    shared = contextvars.Context()
    seen: list[str] = []

    async def each() -> None:
        await asyncio.sleep(0)
        seen.append(loop.lineage())

    for name in ("a", "b"):
        loop.create_task(each(), name=name, context=shared)
    loop.drain()
    assert seen == ["/a.0", "/b.0"]


def test_sets_of_tasks_are_iterated_alike() -> None:
    """Two loops of one salt iterate equal sets in the same order."""

    async def done_order() -> list[str]:
        tasks = [asyncio.create_task(asyncio.sleep(0), name=f"t{i}") for i in range(40)]
        done, _ = await asyncio.wait(tasks)
        return [task.get_name() for task in done]

    assert run(done_order()) == run(done_order())


def test_finish_cancels_and_closes_generators_in_order() -> None:
    """What outlives the root is cancelled, then generators end by creation."""
    loop = fresh()
    seen: list[str] = []

    async def numbers(name: str) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            seen.append(name)

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("cancelled")

    async def root() -> None:
        asyncio.create_task(background())  # noqa: RUF006
        for name in "abc":
            async for _ in numbers(name):
                break

    loop.create_task(root())
    loop.drain()
    loop.finish()
    assert seen == ["cancelled", "a", "b", "c"]
    loop.close()


def test_exhausted_generators_are_not_held() -> None:
    """A long workflow does not collect every generator it has used."""
    loop = fresh()

    async def numbers() -> AsyncIterator[int]:
        yield 1

    async def root() -> None:
        for _ in range(2_000):
            async for _ in numbers():
                pass

    run(root(), loop)
    assert len(loop._generators) < 600


def test_close_runs_finally_blocks_in_their_own_context() -> None:
    """Dropped code cleans up synchronously, last task first, where it belongs."""
    loop = fresh()
    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[str] = []

    async def careful(name: str) -> None:
        variable.set(name)
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(f"{name} in {variable.get()} on {loop.is_running()}")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            seen.append("generator")

    async def abandons() -> None:
        async for _ in numbers():
            break

    for name in ("first", "second"):
        loop.create_task(careful(name))
    loop.create_task(abandons())
    loop.drain()
    loop.create_task(careful("never started"))
    loop.close()
    assert seen == [
        "second in second on True",
        "first in first on True",
        "generator",
    ]
    assert loop.is_closed()
    loop.close()


@pytest.mark.filterwarnings("error")
def test_close_ends_code_that_goes_on_awaiting() -> None:
    """Awaiting in finally, or swallowing GeneratorExit, does not survive a close."""
    loop = fresh()
    seen: list[str] = []

    async def awaits_again() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(RuntimeError):
                await asyncio.sleep(1)
            seen.append("not reached")

    async def swallows() -> None:
        for _ in range(5):
            with contextlib.suppress(GeneratorExit):
                await asyncio.Event().wait()
        seen.append("swallowed")

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(awaits_again())
            await asyncio.Event().wait()

    async def generates() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(1)
            seen.append("not reached")

    async def abandons() -> None:
        async for _ in generates():
            await asyncio.Event().wait()

    for function in (awaits_again, swallows, grouped, abandons):
        loop.create_task(function())
    loop.drain()
    loop.close()
    assert seen == ["swallowed"]
    assert loop_module._closing_refused == []


def test_close_gives_up_on_code_that_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cannot be closed is kept, so that collecting it runs nothing."""
    kept: list[Any] = []
    monkeypatch.setattr(loop_module, "_closing_refused", kept)
    loop = fresh()
    stop = False

    async def stubborn() -> None:
        while not stop:
            with contextlib.suppress(GeneratorExit):
                await asyncio.Event().wait()

    loop.create_task(stubborn())
    loop.drain()
    loop.close()
    assert len(kept) == 1
    stop = True
    kept.pop().close()


def test_no_tasks_after_close() -> None:
    """A closed loop starts nothing and complains about nothing."""
    loop = fresh()
    loop.close()
    with pytest.raises(RuntimeError, match="has ended"):
        loop.create_task(asyncio.sleep(1))


def test_unhandled_exceptions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What nobody awaited is reported once, by name."""
    loop = fresh()

    async def fails() -> None:
        raise ValueError("nobody looks")

    with caplog.at_level(logging.WARNING):
        task = loop.create_task(fails())
        loop.drain()
        loop._tasks.clear()
        del task
        gc.collect()
    (record,) = caplog.records
    assert record.message == "workflow.exception_unhandled"
    assert vars(record)["error"] == "nobody looks"


def test_anyio_messages_are_the_same_in_every_run() -> None:
    """A cancellation's text holds no memory addresses."""

    async def program() -> str:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                return str(error)
        return ""

    first = run(program())
    keep = [object() for _ in range(1_000)]
    assert first == run(program())
    assert keep
    assert "cancel scope of this workflow" in first


def test_repeated_cancellation_is_bounded() -> None:
    """A scope around a TaskGroup whose child cleans up becomes quiescent."""
    loop = fresh()

    async def child(event: asyncio.Event) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await event.wait()
        return ""

    async def program(event: asyncio.Event) -> bool:
        with anyio.move_on_after(1) as scope:
            async with asyncio.TaskGroup() as group:
                group.create_task(child(event))
        return scope.cancelled_caught

    event = asyncio.Event()
    task = loop.create_task(program(event))
    assert loop.drain()
    advance(loop)
    assert not task.done()
    loop.begin_delivery()
    loop.call_soon(event.set)
    assert loop.drain()
    assert task.result() is True


def test_handles_show_their_context_and_time() -> None:
    """What call_at returns has the shape of asyncio's TimerHandle."""
    loop = fresh()
    context = contextvars.Context()
    handle: DurableHandle = loop.call_at(NOW / 1e6 + 5, print, context=context)
    assert handle.get_context() is context
    assert handle.when() == NOW / 1e6 + 5
    handle.cancel()
    handle.cancel()
    assert handle.cancelled()


async def test_drains_inside_the_running_loop() -> None:
    """A drain in a callback of the worker's loop leaves that loop as it was."""
    outer = asyncio.get_running_loop()
    finished = outer.create_future()
    inner = fresh()
    tasks: list[DurableTask[Any]] = []

    async def program() -> tuple[bool, bool]:
        await asyncio.sleep(0)
        return asyncio.get_running_loop() is inner, asyncio.current_task() is tasks[0]

    def drain() -> None:
        tasks.append(inner.create_task(program()))
        inner.drain()
        finished.set_result(asyncio.get_running_loop() is outer)

    outer.call_soon(drain)
    assert await finished
    assert tasks[0].result() == (True, True)
    await asyncio.sleep(0)
