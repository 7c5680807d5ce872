"""Maps as pure functions: what they pull, how far ahead, and what a replay compares."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from stent import context as stent
from stent.codec import (
    decode,
    decode_exception,
    decode_many,
    encode_exception,
    encode_many,
)
from stent.journal import Journal, ResultDelivered
from stent.mapping import MapForm
from stent.model import Kind, Recorded
from stent.pages import (
    BYTES_AHEAD_MAX,
    FIRST_ITEMS_AHEAD,
    GROWTH_MAX,
    ITEMS_AHEAD_MAX,
    PAGE_BYTES_MAX,
    PAGE_ITEMS_MAX,
    PAGES_AHEAD_MAX,
    Pace,
    PageCall,
)
from stent.registry import DurableFunction, durable
from stent.replay import Diverged, Finished, Parked, WorkflowRun, replay
from tests.factories import STARTED_AT, World, begun, outcome_of


@durable(name="pages.echo", retry=1)
async def echo(value: Any) -> Any:
    return value


@durable(name="pages.length", retry=1)
async def length(value: str) -> int:
    return len(value)


@durable(name="pages.doubled")
async def doubled(value: int) -> int:
    return 2 * int(await echo(value))


def workflow(function: Callable[..., Any]) -> Any:
    made: DurableFunction[..., Any] = DurableFunction(
        function, "pages.flow", echo.settings, Kind.WORKFLOW
    )
    made.code_digest = "one"
    return made


class Counted:
    """An iterable that knows how far it was pulled."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items
        self.pulled = 0
        self.closed = False

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.items:
                self.pulled += 1
                yield item
        finally:
            self.closed = True


def open_pages(run: WorkflowRun) -> list[PageCall]:
    return [call for call in run.pending.values() if isinstance(call, PageCall)]


def answer(run: WorkflowRun, page: PageCall, took_us: int = 1000) -> None:
    """Deliver the result of a page: its own items."""
    recorded = Recorded(ok=True, payload=page.arguments, took_us=took_us)
    run.deliver(ResultDelivered(page.address, run.now_us + 1), recorded)
    assert run.drain()


def finish(run: WorkflowRun, most: Callable[[], None] = lambda: None) -> Any:
    """Answer page after page; the value of the workflow."""
    while pages := open_pages(run):
        answer(run, pages[0])
        most()
    outcome = run.outcome()
    assert isinstance(outcome, Finished), outcome
    if not outcome.recorded.ok:
        return decode_exception(outcome.recorded.payload)
    return decode(outcome.recorded.payload)


def test_looks_ahead_no_further_than_the_limits() -> None:
    """In items; of a million of a generator few are ever there at the same time."""
    source = Counted(range(1_000_000))

    async def flow() -> int:
        return sum(await echo.map(source))

    run = begun(workflow(flow))
    assert source.pulled == FIRST_ITEMS_AHEAD + 1
    done = 0
    while pages := open_pages(run):
        assert len(pages) <= PAGES_AHEAD_MAX
        done += pages[0].size
        answer(run, pages[0])
        assert source.pulled - done <= ITEMS_AHEAD_MAX + PAGE_ITEMS_MAX + 1
    assert source.pulled == 1_000_000
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == sum(range(1_000_000))


def test_items_are_forgotten() -> None:
    """Once a page is written nothing refers to its items."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Row:
        def __init__(self, number: int) -> None:
            self.number = number

        def __iter__(self) -> Iterator[int]:
            return iter((self.number,))

    def rows() -> Iterator[Any]:
        for number in range(20_000):
            row = Row(number)
            alive.add(row)
            yield row

    async def flow() -> int:
        return sum(number for (number,) in await echo.starmap(rows()))

    def few() -> None:
        gc.collect(0)
        assert len(alive) <= 2

    assert finish(begun(workflow(flow)), few) == sum(range(20_000))


def test_large_items_end_a_page() -> None:
    """A page stops growing at its limit of bytes; so does what is pulled ahead."""
    source = Counted("x" * 100_000 for _ in range(1000))

    async def flow() -> list[int]:
        return await length.map(source, chunk=1000)

    run = begun(workflow(flow))
    pages = open_pages(run)
    assert all(PAGE_BYTES_MAX <= len(p.arguments) < 2 * PAGE_BYTES_MAX for p in pages)
    assert sum(len(page.arguments) for page in pages) < 1.2 * BYTES_AHEAD_MAX
    assert source.pulled < 1.2 * BYTES_AHEAD_MAX / 100_000


@pytest.mark.parametrize("concurrency", [1, 4, 2500])
def test_concurrency_bounds_what_is_in_flight(concurrency: int) -> None:
    """Whatever the pages: their shares together are never more."""

    async def flow() -> int:
        return sum(await echo.map(range(6000), concurrency=concurrency))

    run = begun(workflow(flow))
    most = 0

    def check() -> None:
        nonlocal most
        in_flight = sum(min(p.share or p.size, p.size) for p in open_pages(run))
        assert in_flight <= concurrency
        most = max(most, in_flight)

    check()
    assert finish(run, check) == sum(range(6000))
    assert most >= min(concurrency, PAGES_AHEAD_MAX)


def test_pace_aims_at_a_second() -> None:
    """It begins small, grows by bounded steps, and shrinks at once."""
    pace = Pace(MapForm(), None)
    first = pace.next_size(0)
    assert pace.next_size(0) == first
    pace.observe(first, 10)
    assert pace.next_size(0) == first * GROWTH_MAX
    assert pace.next_size(0) == PAGE_ITEMS_MAX
    for _ in range(20):
        pace.observe(10, 1_000_000)
    assert pace.next_size(0) == 10
    pace.observe(1, 10**10)
    assert pace.next_size(0) == 1


def test_pace_leaves_pages_for_a_fleet() -> None:
    """Of few items it makes many pages; a given size stays."""
    few = Pace(MapForm(), 640)
    few.observe(10, 1)
    assert few.next_size(0) == 10
    fixed = Pace(MapForm(chunk=7), None)
    fixed.observe(7, 10**9)
    assert fixed.next_size(0) == 7
    assert Pace(MapForm(concurrency=3), None).next_size(0) == 1


def test_the_last_pages_of_bounded_concurrency_are_shared_out() -> None:
    """No page runs its items one by one when nothing is left for the others."""
    pace, start, sizes = Pace(MapForm(concurrency=10), 1000), 0, []
    pace.observe(1, 50_000)
    while start < 1000:
        sizes.append(pace.next_size(start))
        start += sizes[-1]
    assert start == 1000
    assert sizes[0] == max(sizes) == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-9:] == [1] * 9
    short = Pace(MapForm(concurrency=500), 10_000)
    short.observe(1, 1000)
    assert short.next_size(9_990) == 16  # of a millisecond each
    unknown = Pace(MapForm(concurrency=10), None)
    unknown.observe(1, 100_000)
    assert unknown.next_size(990) == unknown.next_size(0) == 10


def recorded_journals(function: Any, **world: Any) -> list[Journal]:
    made = World(workflow(function), chance=random.Random(5), **world)
    assert isinstance(made.live(), Finished)
    return made.journals


def flow_of(source: Callable[[], Any]) -> Callable[..., Any]:
    async def flow() -> list[Any]:
        return list(await echo.map(source(), chunk=10))

    return flow


def test_other_items_are_a_divergence() -> None:
    """The message names the items, the function and the line."""
    journal = recorded_journals(flow_of(lambda: range(45)))[-1]
    outcome = replay(
        workflow(flow_of(lambda: (-n if n == 23 else n for n in range(45)))), journal
    )
    assert isinstance(outcome, Diverged)
    message = str(outcome.difference)
    assert "items 20 to 29 of the map of pages.echo differ" in message
    assert "[20+10]" in (outcome.difference.expected or "")
    assert __file__ in message


def test_fewer_and_more_items_are_a_divergence() -> None:
    """It ended too early, or goes on where it had ended."""
    journal = recorded_journals(flow_of(lambda: range(45)))[-1]
    early = replay(workflow(flow_of(lambda: range(40))), journal)
    assert isinstance(early, Diverged)
    assert "ended after 40 items, and the journal knows item 40" in str(early)
    late = replay(workflow(flow_of(lambda: range(46))), journal)
    assert isinstance(late, Diverged)


def test_unordered_items_are_noticed() -> None:
    """A set in another order is another list of items."""
    journal = recorded_journals(flow_of(lambda: ["a", "b", "c"]))[-1]
    outcome = replay(workflow(flow_of(lambda: ["b", "a", "c"])), journal)
    assert isinstance(outcome, Diverged)


def test_sizes_come_from_the_journal() -> None:
    """Whatever chooses sizes later: without its measures the same pages are pulled."""

    async def flow() -> int:
        return sum(await echo.map(iter(range(3000))))

    for journal in recorded_journals(flow, page_us=50_000):
        unmeasured = [replace_took(turn) for turn in journal.turns]
        same = replay(workflow(flow), replace(journal, turns=unmeasured))
        assert isinstance(same, Parked | Finished), same


def replace_took(turn: Any) -> Any:
    return type(turn)(
        turn.deliveries, turn.inline, turn.settled, turn.told, turn.edited, None
    )


def test_what_the_iterable_raises_the_map_raises() -> None:
    """And what was issued is dropped."""

    def broken() -> Iterator[int]:
        yield from range(15)
        message = "no more"
        raise OSError(message)

    async def broken_stream() -> AsyncIterator[int]:
        for number in broken():
            yield number

    async def flow(streamed: bool) -> str:
        try:
            await echo.map(broken_stream() if streamed else broken(), chunk=10)
        except OSError as error:
            return f"{error}"
        return "nothing"

    for streamed in (False, True):
        run = begun(workflow(flow), streamed)
        assert finish(run) == "no more"
        assert not run.pending


def test_wrong_items_fail_the_map() -> None:
    """By the number of the item; what cannot be iterated fails at the call."""

    async def flow(items: Any) -> Any:
        return await echo.map(items)

    async def unstorable() -> Any:
        return await echo.map([*range(100), object()], chunk=40)

    error = finish(begun(workflow(flow), 5))
    assert isinstance(error, TypeError)
    assert "items[100]" in str(finish(begun(workflow(unstorable))))


def test_cancelling_closes_the_source() -> None:
    """A generator's cleanup runs; nothing is pulled any more."""
    source = Counted(range(10**9))

    async def flow() -> str:
        mapped: Any = echo.map(source)
        await stent.sleep(1)
        mapped.cancel()
        await stent.sleep(1)
        return "done"

    outcome = outcome_of(workflow(flow), endless=frozenset({"pages.echo"}))
    assert decode(outcome.recorded.payload) == "done"
    assert source.closed
    assert source.pulled <= FIRST_ITEMS_AHEAD + 1


def test_stream_is_called_as_it_comes() -> None:
    """What a waiting source has given is issued before the page is full."""

    async def stream() -> AsyncIterator[int]:
        for page in range(3):
            first = await doubled_call(page)
            for number in range(first, first + 5):
                yield number

    async def doubled_call(page: int) -> int:
        value: int = await length("x" * (page + 1))
        return 100 * value

    async def flow() -> list[int]:
        return await echo.map(stream(), chunk=1000)

    run = begun(workflow(flow))
    sizes = []
    while run.pending:
        pages = open_pages(run)
        sizes += [page.size for page in pages]
        for page in pages:
            answer(run, page)
        for call in list(run.pending.values()):
            args = decode_many(call.arguments)[0]
            payload = encode_many([len(args[0])])[2:-1]
            run.deliver(
                ResultDelivered(call.address, run.now_us + 1),
                Recorded(ok=True, payload=b"\x01" + payload),
            )
            assert run.drain()
    assert sizes == [5, 5, 5]
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == [
        number for first in (100, 200, 300) for number in range(first, first + 5)
    ]


def test_a_list_may_change_after_the_call() -> None:
    """What is changed while it is pulled was copied."""

    async def flow() -> list[int]:
        items = list(range(5000))
        mapped = echo.map(items)
        items.clear()
        return await mapped

    assert finish(begun(workflow(flow))) == list(range(5000))


def test_items_of_workflows_are_calls() -> None:
    """At the map's address and their index; a bounded number at a time."""

    async def flow() -> list[int]:
        return await doubled.map([7, 7, 8], concurrency=2)

    run = begun(workflow(flow))
    first, second = run.pending.values()
    assert first.child
    assert second.child
    assert ":map:pages.doubled#.0[0]#" in first.address
    assert ":map:pages.doubled#.0[1]#" in second.address


def test_failure_of_a_child_stops_the_others() -> None:
    """As with activities: what runs is cancelled, the rest is never issued."""

    async def flow() -> str:
        try:
            await doubled.map(range(10), concurrency=3)
        except ValueError:
            return "failed"
        return "?"

    run = begun(workflow(flow))
    run.take()
    victim, *siblings = run.pending.values()

    failure = Recorded(ok=False, payload=encode_exception(ValueError("no")))
    run.deliver(ResultDelivered(victim.address, STARTED_AT + 5), failure)
    assert run.drain()
    decided = run.take()
    assert [call.address for call in decided.settled] == [s.address for s in siblings]
    assert decided.calls == []
    assert isinstance(run.outcome(), Finished)


@pytest.mark.parametrize("seed", range(6))
def test_retried_items_count_as_in_flight(seed: int) -> None:
    """With a bound, an item's next attempt begins when it is due and there is room."""
    running: set[str] = set()
    most = 0

    @durable(name="pages.unlucky", retry=3)
    async def unlucky(value: int) -> int:
        raise OSError(value)

    async def flow() -> int:
        kept = await unlucky.map(range(12), concurrency=2, return_exceptions=True)
        return sum(isinstance(each, OSError) for each in kept)

    world = World(workflow(flow), chance=random.Random(seed), kill=0.05)
    fly = world._fly

    def watched(call: Any) -> None:
        nonlocal most
        fly(call)
        running.clear()
        running.update(a for a in world._run.pending)
        most = max(most, len(running))

    world._fly = watched  # type: ignore[method-assign]
    outcome = world.live()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == 12
    assert most == 2
