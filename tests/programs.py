"""Workflows for tests of the loop and of replay: a corpus, and random programs.

Each logs what it sees with ``saw``; a later life must see the same past.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
)
from typing import Any

import anyio

from stent import context as stent
from stent.errors import ActivityError
from stent.registry import durable
from tests.factories import saw

Spec = list[Any]


class NoLuckError(Exception):
    """What failing activities of the corpus raise."""


@durable(name="programs.work")
async def work(value: int) -> int:
    return value * 10


@durable(name="programs.slow")
async def slow(value: int) -> int:
    return value


@durable(name="programs.fail")
async def fail(value: int) -> int:
    raise NoLuckError(value)


@durable(name="programs.fail_odd")
async def fail_odd(value: int) -> int:
    if value % 2:
        raise NoLuckError(value)
    return value


@durable(name="programs.child")
async def child(value: int) -> int:
    return await work(value) + 1


# The corpus: one workflow for each way of writing concurrent code.


@durable(name="programs.sequence")
async def sequence(count: int) -> int:
    total = 0
    for index in range(count):
        total += await work(index)
        saw("total", total)
    return total


@durable(name="programs.branches")
async def branches(count: int) -> list[int]:
    async def branch(index: int) -> int:
        first = await work(index)
        saw(index, first)
        second = await work(first)
        saw(index, second)
        return second

    return list(await asyncio.gather(*[branch(i) for i in range(count)]))


@durable(name="programs.completed")
async def completed(count: int) -> list[int]:
    found = []
    for each in asyncio.as_completed([branch_of(i) for i in range(count)]):
        found.append(await each)
        saw(found[-1])
    return found


@durable(name="programs.race")
async def race(count: int) -> list[int]:
    pending: set[Any] = {asyncio.create_task(branch_of(i)) for i in range(count)}
    winners: list[int] = []
    while len(winners) < 2:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            winners.append(task.result())
            saw("won", task.result(), task.get_name())
    for task in pending:
        task.cancel()
    lost = await asyncio.gather(*pending, return_exceptions=True)
    saw("lost", [type(error).__name__ for error in lost])
    return winners


async def branch_of(value: int) -> int:
    saw("start", value)
    first = await work(value)
    saw("half", value)
    return await work(first)


@durable(name="programs.first_exception")
async def first_exception(count: int) -> str:
    tasks = [asyncio.create_task(fail_odd(i), name=f"try-{i}") for i in range(count)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
    for task in done:
        saw(task.get_name(), type(task.exception()).__name__)
    return "failed" if any(t.exception() for t in done) else "passed"


@durable(name="programs.groups")
async def groups(count: int) -> list[int]:
    found: list[int] = []

    async def nested(value: int) -> None:
        async with asyncio.TaskGroup() as inner:
            tasks = [inner.create_task(work(value * 10 + i)) for i in range(2)]
        found.append(sum(t.result() for t in tasks))
        saw(value, found[-1])

    async with asyncio.TaskGroup() as outer:
        for index in range(count):
            outer.create_task(nested(index), name=f"nested {index}")
    return sorted(found)


@durable(name="programs.failing_group")
async def failing_group(count: int) -> None:
    async def careful(value: int) -> None:
        try:
            await branch_of(value)
        finally:
            saw("cleanup", value)
            saw("cleaned", await work(-value))

    async with asyncio.TaskGroup() as outer:
        for index in range(count):
            outer.create_task(careful(index))
        async with asyncio.TaskGroup() as inner:
            inner.create_task(fail(1))
            inner.create_task(careful(50))


@durable(name="programs.queue_pool")
async def queue_pool(count: int) -> list[int]:
    queue: asyncio.Queue[int] = asyncio.Queue(maxsize=3)
    found: list[int] = []

    async def consume(name: int) -> None:
        while True:
            value = await queue.get()
            found.append(await branch_of(value))
            saw("consumer", name, value)
            queue.task_done()

    consumers = [asyncio.create_task(consume(i)) for i in range(3)]
    for index in range(count):
        await queue.put(index)
    await queue.join()
    for consumer in consumers:
        consumer.cancel()
    await asyncio.gather(*consumers, return_exceptions=True)
    return sorted(found)


@durable(name="programs.timeouts")
async def timeouts(count: int) -> list[str]:
    found = []
    for index in range(count):
        try:
            async with asyncio.timeout(0.5):
                saw("in time", await work(index))
        except TimeoutError:
            saw("timed out", index)
        try:
            await asyncio.wait_for(branch_of(index), 1.5)
            found.append("quick")
        except TimeoutError:
            found.append("late")
        saw(found[-1])
    return found


@durable(name="programs.locks")
async def locks(count: int) -> list[int]:
    lock, semaphore = asyncio.Lock(), asyncio.Semaphore(2)
    condition, event = asyncio.Condition(), asyncio.Event()
    order: list[int] = []

    async def visit(value: int) -> None:
        await event.wait()
        async with semaphore:
            result = await work(value)
            async with lock:
                saw("locked", value)
                await work(result)
        async with condition:
            order.append(value)
            saw("order", value)
            condition.notify_all()

    tasks = [asyncio.create_task(visit(i)) for i in range(count)]
    await stent.sleep("10ms")
    event.set()
    async with condition:
        await condition.wait_for(lambda: len(order) == count)
    await asyncio.gather(*tasks)
    return sorted(order)


@durable(name="programs.anyio_groups")
async def anyio_groups(count: int) -> list[int]:
    found: list[int] = []
    send, receive = anyio.create_memory_object_stream[int](2)

    async def produce(value: int) -> None:
        async with send.clone() as sending:
            await sending.send(await work(value))
            saw("sent", value)

    async def consume() -> None:
        async with receive:
            async for value in receive:
                found.append(value)
                saw("received", value)
                await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        async with send, anyio.create_task_group() as producers:
            for index in range(count):
                producers.start_soon(produce, index)
            producers.start_soon(work, 99)
    return sorted(found)


@durable(name="programs.scopes")
async def scopes(count: int) -> list[str]:
    found = []

    async def careful(value: int) -> None:
        try:
            await branch_of(value)
        finally:
            with anyio.CancelScope(shield=True):
                saw("cleaned", await work(-value))

    for index in range(count):
        with anyio.move_on_after(0.7) as scope:
            async with asyncio.TaskGroup() as group:
                for each in range(3):
                    group.create_task(careful(index * 10 + each))
        saw("moved on", scope.cancelled_caught)
        try:
            with anyio.fail_after(0.7):
                async with anyio.create_task_group() as inner:
                    inner.start_soon(careful, index)
                    inner.start_soon(careful, index + 1)
            found.append("passed")
        except TimeoutError:
            found.append("late")
        saw(found[-1])
    return found


@durable(name="programs.swallowed")
async def swallowed(count: int) -> list[str]:
    found: list[str] = []

    async def stubborn(value: int) -> str:
        for attempt in range(3):
            try:
                await slow(value * 10 + attempt)
            except asyncio.CancelledError:
                saw("swallowed", value, attempt)
        return f"survived {value}"

    tasks = [asyncio.create_task(stubborn(i)) for i in range(count)]
    await work(1)
    for task in tasks:
        task.cancel()
    for task in tasks:
        found.append(await task)
        saw(found[-1])
    with anyio.move_on_after(0.2) as scope:
        found.append(await stubborn(77))
    saw(scope.cancel_called)
    return found


@durable(name="programs.generators")
async def generators(count: int) -> int:
    async def pages(first: int) -> AsyncIterator[int]:
        try:
            for index in range(first, first + 5):
                yield await work(index)
        finally:
            saw("closed", first)

    total = 0
    for first in range(count):
        async for value in pages(first * 100):
            total += value
            saw(value)
            if value % 3 == 1:
                break
    abandoned = pages(7_000)
    total += await anext(abandoned)
    return total


@durable(name="programs.shields")
async def shields(count: int) -> list[int]:
    found = []
    for index in range(count):
        inner = asyncio.create_task(branch_of(index))
        try:
            await asyncio.wait_for(asyncio.shield(inner), 0.3)
        except TimeoutError:
            saw("still going", index)
        found.append(await inner)
        saw(found[-1])
    return found


@durable(name="programs.primitives")
async def primitives(count: int) -> list[Any]:
    saw(stent.now().isoformat(), stent.uuid().hex, stent.random().random())

    async def each(value: int) -> float:
        await work(value)
        stent.tell({"value": value})
        await stent.sleep("150ms")
        number = stent.random().random() + stent.uuid().int % 97
        saw(value, number, stent.now().isoformat())
        return number

    def read() -> int:
        return 41

    numbers = await asyncio.gather(*[each(i) for i in range(count)])
    return [numbers, await stent.run(read), stent.now()]


@durable(name="programs.maps")
async def maps(count: int) -> list[Any]:
    values = await work.map(range(count), chunk=3)
    saw(values)
    mixed = await fail_odd.map(range(count), return_exceptions=True, chunk=2)
    saw([str(each) for each in mixed])
    try:
        await stent.map(fail_odd, range(count), chunk=1)
    except NoLuckError as error:
        saw("failed", str(error))
    with anyio.move_on_after(0.1):
        saw(await slow.map(range(count), chunk=1))
    pairs = await work.starmap([(i,) for i in range(count)])
    return [values, len(mixed), pairs]


@durable(name="programs.map_sources")
async def map_sources(count: int) -> list[Any]:
    """A generator that shares what it sees with the rest of the workflow."""
    pulled: list[int] = []

    def numbers(first: int) -> Iterator[int]:
        for number in range(first, first + 80 * count):
            pulled.append(number)
            if number % 20 == 0:
                saw("pulled", number, len(pulled), stent.random().random())
            yield number

    async def beside(value: int) -> int:
        saw("beside", len(pulled), stent.random().random())
        value = await work(value)
        saw("half", len(pulled))
        return await work(value)

    async with asyncio.TaskGroup() as group:
        first = group.create_task(_sum_of(numbers(0)))
        second = group.create_task(_sum_of(numbers(7), concurrency=3))
        others = [group.create_task(beside(n)) for n in range(count)]
    saw(len(pulled))
    return [first.result(), second.result(), [other.result() for other in others]]


async def _sum_of(numbers: Iterator[int], concurrency: int | None = None) -> int:
    return sum(await work.map(numbers, concurrency=concurrency))


@durable(name="programs.map_streams")
async def map_streams(count: int) -> list[Any]:
    """An asynchronous source that waits for calls and for time."""

    async def stream(name: str, rows: int) -> AsyncIterator[int]:
        try:
            for row in range(rows):
                first = await work(1000 * rows + row)
                saw(name, row, first)
                for number in range(first, first + 40):
                    yield number
                if row % 2:
                    await stent.sleep("300ms")
        finally:
            saw(name, "closed")

    both = await asyncio.gather(
        slow.map(stream("open", count)),
        slow.map(stream("bounded", count + 1), concurrency=2),
    )
    saw([len(each) for each in both])
    try:
        async with asyncio.timeout(1.5):
            saw(await slow.map(stream("timed", 3 * count), chunk=25))
    except TimeoutError:
        saw("late")
    return [sum(each) for each in both]


@durable(name="programs.map_again")
async def map_again(count: int) -> list[Any]:
    """Items that fail wait for their next attempt by themselves."""
    items = range(10 * count)
    kept = await fail_odd.map(items, return_exceptions=True, chunk=7)
    saw([type(each).__name__ for each in kept])
    bounded = await fail_odd.map(items, return_exceptions=True, concurrency=3)
    saw([type(each).__name__ for each in bounded])
    try:
        await fail_odd.map(items, chunk=9)
    except NoLuckError as error:
        saw("failed", str(error))
    return [len(kept), len(bounded)]


@durable(name="programs.map_children")
async def map_children(count: int) -> list[Any]:
    """Each item of a workflow is a call of its own."""
    saw(await child.map(range(count)))
    pairs = await child.options(key="again").starmap([(n,) for n in range(count)])
    saw(await child.map([1, 1, 1], concurrency=1))
    with anyio.move_on_after(0.7):
        saw(await child.map(range(20, 20 + count), concurrency=2))
    return pairs


@durable(name="programs.children")
async def children(count: int) -> list[int]:
    handles = [await child.start(i) for i in range(count)]
    saw([handle.id for handle in handles])
    direct = await asyncio.gather(*[child(100 + i) for i in range(count)])
    saw(direct)
    results = []
    for handle in handles:
        results.append(await handle.result())
        saw(results[-1])
    return results


_label = contextvars.ContextVar("label", default="none")


@durable(name="programs.contexts")
async def contexts(count: int) -> list[str]:
    found: list[str] = []

    async def each(value: int) -> None:
        _label.set(f"{_label.get()}-{value}")
        await work(value)
        found.append(_label.get())
        saw(_label.get())

    _label.set("root")
    empty = contextvars.Context()
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(each(index))
        group.create_task(each(1000), context=empty)
        group.create_task(each(1001), context=empty)
    loop = asyncio.get_running_loop()
    called: asyncio.Future[Any] = loop.create_future()

    def late() -> None:
        call: Any = work(5)
        call.add_done_callback(lambda done: called.set_result(done.result()))

    loop.call_later(0.1, late, context=contextvars.Context())
    saw(await called)
    return sorted(found)


@durable(name="programs.cleanup")
async def cleanup(count: int) -> int:
    total = 0
    try:
        for index in range(count):
            total += await branch_of(index)
            saw(total)
    finally:
        saw("cleaning")
        saw(await asyncio.gather(work(1), work(2)))
        saw("cleaned")
    return total


@durable(name="programs.return_exceptions")
async def return_exceptions(count: int) -> list[str]:
    calls = [fail_odd(i) for i in range(count)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    saw([repr(each) for each in results])
    try:
        await asyncio.gather(*[fail_odd(100 + i) for i in range(count)])
    except NoLuckError as error:
        saw("first", str(error))
    return [str(each) for each in results]


@durable(name="programs.retries")
async def retries(count: int) -> list[int]:
    async def once_more(value: int) -> int:
        for attempt in range(3):
            try:
                return await fail_odd(value + attempt)
            except NoLuckError:
                saw("again", value, attempt)
                await asyncio.sleep(0.1)
        raise AssertionError

    return list(await asyncio.gather(*[once_more(7) for _ in range(count)]))


def _streamed(rows: int) -> int:
    firsts = [10 * (1000 * rows + row) for row in range(rows)]
    return sum(sum(range(first, first + 40)) for first in firsts)


CORPUS: dict[Any, Callable[[Any, int], bool]] = {
    sequence: lambda value, count: value == sum(i * 10 for i in range(count)),
    branches: lambda value, count: value == [i * 100 for i in range(count)],
    completed: lambda value, count: sorted(value) == [i * 100 for i in range(count)],
    race: lambda value, count: len(value) >= 2,
    first_exception: lambda value, count: value == "failed",
    groups: lambda value, count: value == [i * 200 + 10 for i in range(count)],
    queue_pool: lambda value, count: value == [i * 100 for i in range(count)],
    timeouts: lambda value, count: set(value) <= {"quick", "late"},
    locks: lambda value, count: value == list(range(count)),
    anyio_groups: lambda value, count: value == [i * 10 for i in range(count)],
    scopes: lambda value, count: set(value) <= {"passed", "late"},
    swallowed: lambda value, count: value[0] == "survived 0",
    generators: lambda value, count: value >= 70_000,
    shields: lambda value, count: value == [i * 100 for i in range(count)],
    primitives: lambda value, count: value[1] == 41,
    maps: lambda value, count: value[0] == value[2] == [i * 10 for i in range(count)],
    map_sources: lambda value, count: (
        value[0] == sum(n * 10 for n in range(80 * count))
    ),
    map_streams: lambda value, count: value == [_streamed(count), _streamed(count + 1)],
    map_again: lambda value, count: value == [10 * count, 10 * count],
    map_children: lambda value, count: value == [n * 10 + 1 for n in range(count)],
    children: lambda value, count: value == [i * 10 + 1 for i in range(count)],
    contexts: lambda value, count: len(value) == count + 2,
    failing_group: lambda value, count: False,
    cleanup: lambda value, count: value == sum(i * 100 for i in range(count)),
    return_exceptions: lambda value, count: len(value) == count,
    retries: lambda value, count: value == [8] * count,
}
"""Workflow -> whether a value is one that an undisturbed run can return."""


# Random programs: a tree of nodes, each [name, argument, ...], and its interpreter.


@durable(name="programs.interpret", kind="workflow")
async def interpret(spec: Spec) -> Any:
    return await _node(spec)


async def _node(spec: Spec) -> Any:
    name, *arguments = spec
    saw("enter", name)
    try:
        value = await _NODES[name](*arguments)
    except BaseException as error:
        saw("left", name, type(error).__name__)
        raise
    saw("value", name, value)
    return value


async def _call(value: int) -> Any:
    return await work(value)


async def _failing(value: int) -> Any:
    return await fail_odd(value)


async def _sequence(*nodes: Spec) -> Any:
    return [await _node(node) for node in nodes]


async def _gather(*nodes: Spec) -> Any:
    return list(await asyncio.gather(*[_node(node) for node in nodes]))


async def _settled(*nodes: Spec) -> Any:
    found = await asyncio.gather(*[_node(n) for n in nodes], return_exceptions=True)
    return [repr(each) for each in found]


async def _named_group(*nodes: Spec) -> Any:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_node(node), name=f"part-{index}")
            for index, node in enumerate(nodes)
        ]
    return [task.result() for task in tasks]


async def _anyio_group(*nodes: Spec) -> Any:
    found: list[Any] = []

    async def each(node: Spec) -> None:
        found.append(await _node(node))

    async with anyio.create_task_group() as group:
        for node in nodes:
            group.start_soon(each, node)
    return found


async def _race(*nodes: Spec) -> Any:
    tasks = [asyncio.create_task(_node(node)) for node in nodes]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
    saw("race", [task.done() for task in tasks], len(done))
    return next(task.result() for task in tasks if task in done)


async def _as_completed(*nodes: Spec) -> Any:
    found = []
    for each in asyncio.as_completed([_node(node) for node in nodes]):
        found.append(await each)
        saw("completed", found[-1])
    return found


async def _timeout(seconds: float, node: Spec) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await _node(node)
    except TimeoutError:
        return "timed out"


async def _wait_for(seconds: float, node: Spec) -> Any:
    try:
        return await asyncio.wait_for(_node(node), seconds)
    except TimeoutError:
        return "timed out"


async def _move_on(seconds: float, node: Spec) -> Any:
    with anyio.move_on_after(seconds):
        return await _node(node)
    return "moved on"


async def _shielded(node: Spec) -> Any:
    with anyio.CancelScope(shield=True):
        return await _node(node)


async def _finally(node: Spec, after: Spec) -> Any:
    try:
        return await _node(node)
    finally:
        saw("finally", await _node(after))


async def _catch(node: Spec) -> Any:
    try:
        return await _node(node)
    except (NoLuckError, ActivityError, ExceptionGroup) as error:
        return type(error).__name__


async def _swallow(node: Spec) -> Any:
    try:
        return await _node(node)
    except asyncio.CancelledError:
        return await work(-1)


async def _pause(seconds: float) -> Any:
    await asyncio.sleep(seconds)
    return stent.now().isoformat()


async def _chance() -> Any:
    return [stent.random().random(), stent.uuid().hex]


async def _map(count: int) -> Any:
    return await work.map(range(count), chunk=2)


async def _pool(size: int, *nodes: Spec) -> Any:
    queue: asyncio.Queue[Spec] = asyncio.Queue()
    found: list[Any] = []
    for node in nodes:
        queue.put_nowait(node)

    async def consume() -> None:
        while not queue.empty():
            found.append(await _node(queue.get_nowait()))

    await asyncio.gather(*[consume() for _ in range(size)])
    return found


async def _stream(*nodes: Spec) -> Any:
    async def results() -> AsyncIterator[Any]:
        for node in nodes:
            yield await _node(node)

    async for value in results():
        return value
    return None


async def _discarded(value: int) -> Any:
    call: Any = work(value)
    return call.done()


_NODES: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
    "call": _call,
    "failing": _failing,
    "sequence": _sequence,
    "gather": _gather,
    "settled": _settled,
    "group": _named_group,
    "anyio_group": _anyio_group,
    "race": _race,
    "as_completed": _as_completed,
    "timeout": _timeout,
    "wait_for": _wait_for,
    "move_on": _move_on,
    "shielded": _shielded,
    "finally": _finally,
    "catch": _catch,
    "swallow": _swallow,
    "pause": _pause,
    "chance": _chance,
    "map": _map,
    "pool": _pool,
    "stream": _stream,
    "discarded": _discarded,
}


def random_program(
    chance: random.Random, depth: int = 4, names: Collection[str] = ()
) -> Spec:
    """A random tree of nodes, at most ``depth`` deep; ``names`` limits the nodes."""
    leaves = [name for name in _LEAVES if not names or name in names]
    inner = [name for name in _INNER if not names or name in names]

    def leaf() -> Spec:
        name = chance.choice(leaves)
        if name == "chance":
            return [name]
        if name == "pause":
            return [name, chance.choice((0, 0.2, 1.5))]
        return [name, chance.randrange(6)]

    def node(depth: int) -> Spec:
        if depth == 0 or chance.random() < 0.15:
            return leaf()
        name = chance.choice(inner)
        if name in {"timeout", "wait_for", "move_on"}:
            seconds = chance.choice((0, 0.001, 0.3, 1.0, 3.0))
            return [name, seconds, node(depth - 1)]
        if name in {"shielded", "catch", "swallow"}:
            return [name, node(depth - 1)]
        if name == "finally":
            return [name, node(depth - 1), leaf()]
        nodes = [node(depth - 1) for _ in range(chance.randint(1, 3))]
        return [name, 2, *nodes] if name == "pool" else [name, *nodes]

    return node(depth)


_LEAVES = (
    *("call", "call", "call", "call", "failing", "pause", "chance", "map"),
    "discarded",
)
_INNER = (
    *("sequence", "gather", "settled", "group", "anyio_group", "race", "as_completed"),
    *("timeout", "wait_for", "move_on", "shielded", "finally", "catch", "swallow"),
    *("pool", "stream"),
)
