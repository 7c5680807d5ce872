"""A map: its items are pulled a page at a time, called in pages, collected in order.

A ``MapCall`` pulls from the iterable only as far as it may look ahead, and goes on as
results are delivered; so a million items of a generator are never in memory at once.
Everything it does follows from the deliveries. With the result of a page it is told
how long the page took, which is journaled with the delivery, and chooses the size of
later pages from that. The size is part of a page's address, so that a replay pulls the
same pages, whatever chooses sizes then, and compares their items by the digest that
the address ends with.

The limits below take part in what a replay repeats: under others, running maps would
pull at other moments and diverge.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import re
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableSequence,
    ValuesView,
)
from collections.abc import (
    Set as AbstractSet,
)
from dataclasses import dataclass
from typing import Any, Protocol, cast

from stent.calls import DurableCall, Issuer, fail_call
from stent.codec import (
    decode_many,
    digest,
    encode_arguments,
    encode_many,
)
from stent.errors import ExecutionClosedError, PayloadError
from stent.loop import DurableLoop, user_line
from stent.mapping import MapForm
from stent.model import Effects, Kind, Recorded
from stent.registry import DurableFunction, Items

PAGE_ITEMS_MAX = 2000
"""Items of a page whose size is chosen; ``chunk=`` may ask for more."""
PAGE_BYTES_MAX = 1024 * 1024
"""A page that has reached this gets no more items."""
_FORMER_PAGE_ITEMS_MAX = 1000
PAGE_SECONDS = 1.0
"""What a page should take."""
LAST_PAGE_SECONDS = 0.02
"""The last pages of a bounded map are shared out until they take only that."""
PAGES_PER_MAP = 64
"""Pages aimed at where the number of items is known, so that a fleet can share them."""
FIRST_ITEMS_AHEAD = 1024
"""Items ahead before any page has told how long its items take."""
FIRST_PAGE_ITEMS_MAX = 32
GROWTH_MAX = 16
"""How much larger than the last one a page may be."""
PAGES_AHEAD_MAX = 1000
ITEMS_AHEAD_MAX = 100_000
BYTES_AHEAD_MAX = 16 * 1024 * 1024
"""A map looks no further ahead once as much is pulled and has no result."""
_FIRST_STRIDE_ITEMS = 8
"""Items are encoded in strides that double, to notice early that they are large."""
_LONG_ITEMS = 64
_LONG_BYTES = 64 * 1024
"""A page from here on took long enough to let others run."""

_PAGE_ADDRESS = re.compile(
    r"(?P<map>.*)\[(?P<start>\d+)(?:\+(?P<size>\d+))?\]#[0-9a-f]+", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ItemFailed:
    """Stands in a page's result for an item that has failed and has attempts left.

    Attributes:
        number: Of the attempt that failed; 0: it only asked to be tried later.
        retry_at_us: When the next one may begin, microseconds since 1970.
        payload: The encoded exception; empty if it only asked.
    """

    number: int
    retry_at_us: int
    payload: bytes


_ITEM_FAILED = ItemFailed.__name__.encode()


@dataclass(frozen=True, slots=True)
class KnownPage:
    """A page that the journal knows.

    Attributes:
        size: Its items; None in journals of before sizes were kept.
    """

    address: str
    size: int | None


KnownPages = dict[int, KnownPage]
"""Of one map, by the index of their first item."""


def known_pages(addresses: Iterable[str]) -> dict[str, KnownPages]:
    """The pages among known addresses, by the address of their map."""
    found: dict[str, KnownPages] = {}
    for address in addresses:
        if not address.endswith("]", 0, address.rfind("#")):
            continue
        page = _PAGE_ADDRESS.fullmatch(address)
        if page is not None:
            size = None if page["size"] is None else int(page["size"])
            of_map = found.setdefault(page["map"], {})
            of_map[int(page["start"])] = KnownPage(address, size)
    return found


class Host(Issuer, Protocol):
    """The run that a map belongs to."""

    @property
    def closed(self) -> bool:
        """No more calls may be made."""
        ...

    @property
    def restoring(self) -> bool:
        """What is done now was done before."""
        ...

    def register(self, call: DurableCall[Any]) -> None:
        """Issue a call of the map."""
        ...

    def diverge(self, expected: str, actual: str | None, line: str, why: str) -> None:
        """The map does not repeat what the journal knows."""
        ...


class Pace:
    """How many items a page should have, from how long those before took."""

    def __init__(self, form: MapForm, count: int | None) -> None:
        """Begin without knowing.

        Args:
            form: Of the map.
            count: Its items, if known.
        """
        self._fixed = form.chunk
        self._count = count
        self._at_once = None if form.concurrency is None else _shares(form)[1]
        self._most = PAGE_ITEMS_MAX
        if count is not None:
            self._most = max(1, min(PAGE_ITEMS_MAX, -(-count // PAGES_PER_MAP)))
        # A map of bounded concurrency runs the items of a page one after the other.
        first = 1 if form.concurrency is not None else FIRST_PAGE_ITEMS_MAX
        self._last = min(self._most, first)
        self._item_us: float | None = None

    def observe(self, items: int, took_us: int) -> None:
        """A page of ``items`` took so long."""
        item_us = max(took_us, 1) / items
        if self._item_us is not None:
            item_us = (item_us + self._item_us) / 2
        self._item_us = item_us

    def repeat(self, size: int) -> None:
        """In another life a page had this size."""
        self._last = size

    def next_size(self, start: int) -> int:
        """Items of the next page, which begins with item ``start``.

        What is left of a map of bounded concurrency is for all that may run at once:
        else the last pages would run their items one after the other, and beside them
        nothing.
        """
        if self._fixed is not None:
            return self._fixed
        if self._item_us is not None:
            wanted = round(PAGE_SECONDS * 1e6 / self._item_us)
            most = min(self._most, self._last * GROWTH_MAX)
            self._last = max(1, min(most, wanted))
        if self._at_once is None or self._count is None:
            return self._last
        share = -(-max(1, self._count - start) // self._at_once)
        if self._item_us is not None:
            share = max(share, round(LAST_PAGE_SECONDS * 1e6 / self._item_us))
        return min(self._last, share)


class _Draft:
    """A page that is being filled; encoded on the way."""

    def __init__(self, form: MapForm, start: int, size: int, *, exact: bool) -> None:
        """Begin an empty one.

        Args:
            form: Of the map.
            start: Index of its first item.
            size: Items it may have.
            exact: It had so many before: never mind its bytes.
        """
        self.start = start
        self.count = 0
        self._form = form
        self._size = size
        self._exact = exact
        self._fresh: list[object] = []
        self._encoded = 0
        self._stride = _FIRST_STRIDE_ITEMS
        self._parts: list[bytes] = []
        self._bytes = 0

    @property
    def full(self) -> bool:
        """It takes no more items."""
        if self.count >= self._size:
            return True
        return not self._exact and self._bytes >= PAGE_BYTES_MAX

    def fill(self, ahead: list[object], rest: Iterator[object], limit: int) -> None:
        """Take ``ahead``, then items of ``rest``, until it is full or they end."""
        while not self.full:
            wanted = min(self._stride, self._size - self.count)
            items = [*ahead, *itertools.islice(rest, wanted - len(ahead))]
            ahead.clear()
            self._fresh += items
            self.count += len(items)
            self._encode(limit)
            if len(items) < wanted:
                return

    def add(self, item: object, limit: int) -> None:
        """Take one item."""
        self._fresh.append(item)
        self.count += 1
        if len(self._fresh) >= self._stride:
            self._encode(limit)

    def _encode(self, limit: int) -> None:
        items = self._fresh
        if not items:
            return
        if self._form.star:
            items = [tuple(cast("Iterable[object]", item)) for item in items]
        first = self.start + self._encoded
        part = encode_many(items, path="items", first=first, bytes_max_each=limit)
        self._encoded += len(items)
        self._stride = max(self._stride, self._encoded)
        self._fresh = []
        self._parts.append(part)
        self._bytes += len(part)

    def payload(self, limit: int) -> bytes:
        """All its items, encoded."""
        self._encode(limit)
        if len(self._parts) == 1:
            return self._parts[0]
        return self._parts[0][:2] + b",".join(p[2:-1] for p in self._parts) + b"]"


class PageCall(DurableCall[None]):
    """One page of a map: a slice of its items, claimed as one task.

    Attributes:
        start: Index of its first item.
        size: Number of its items.
        form: Of the map.
        share: How many of its items may run at the same time; None: any number.
    """

    def __init__(
        self, owner: MapCall, *, start: int, size: int, share: int | None, **call: Any
    ) -> None:
        super().__init__(**call)
        self.form = owner.form
        self.start = start
        self.size = size
        self.share = share
        self._owner = owner

    def accept(self, values: list[Any], recorded: Recorded) -> None:
        """Its result is there."""
        self.set_result(None)
        self._owner.page_done(self, values, recorded)

    def set_exception(self, exception: Any, /) -> None:
        """It has failed, so the map has."""
        self.set_result(None)
        self._owner.fail(exception)


class ItemCall(DurableCall[Any]):
    """One item of a map that is a call of its own.

    Attributes:
        index: Of the item.
        failed: Its last attempt, which was made in a page; None: there was none.
    """

    def __init__(
        self, owner: MapCall, *, index: int, failed: ItemFailed | None, **call: Any
    ) -> None:
        super().__init__(**call)
        self.index = index
        self.failed = failed
        self._owner = owner

    def set_result(self, result: Any, /) -> None:
        """It has succeeded."""
        super().set_result(None)
        self._owner.item_done(self, result)

    def set_exception(self, exception: Any, /) -> None:
        """It is out of attempts."""
        super().set_result(None)
        self._owner.item_failed(self, exception)


class MapCall(DurableCall[list[Any]]):
    """A map; done when all its items are, or one has failed for good."""

    def __init__(
        self,
        host: Host,
        items: Items,
        form: MapForm,
        *,
        known: KnownPages,
        payload_bytes_max: int,
        target: DurableFunction[Any, Any],
        **call: Any,
    ) -> None:
        """Begin to pull; see ``DurableCall`` for the rest.

        Raises:
            TypeError: ``items`` cannot be iterated.
        """
        super().__init__(target=target, arguments=b"", issuer=_NobodyAsks(), **call)
        self.form = form
        self._function = target
        self._host = host
        self._known = known
        self._bytes_max = payload_bytes_max
        self._durable_loop = cast("DurableLoop", self.get_loop())
        if host.restoring:
            self.line = user_line()
        count = len(items) if isinstance(items, Collection) else None
        self._pace = Pace(form, count)
        # These run as a task or an execution each: they commit by themselves, or wait
        # for others of their key.
        self._apart = (
            target.kind is Kind.WORKFLOW
            or target.effects is Effects.TRANSACTIONAL
            or self.options.concurrency_key is not None
        )
        self._share, self._pages_max = _shares(form)
        self._count = 0
        self._results: list[Any] = []
        self._open: dict[DurableCall[Any], int] = {}
        self._open_items = self._open_bytes = self._in_flight = 0
        self._again: deque[ItemCall] = deque()
        self._answered = form.chunk is not None or form.concurrency is not None
        self._exhausted = False
        self._pulling = False
        self._ahead: list[object] = []
        self._draft: _Draft | None = None
        self._iterator: Iterator[object] = iter(())
        self._source: Any = None
        self._room: Any = None
        self._idle = False
        self._timers: dict[ItemCall, Any] = {}
        # Whoever delivers what makes it go on, the items are pulled for this caller.
        self._context = contextvars.copy_context()
        if isinstance(items, AsyncIterable):
            self._source = self._durable_loop.create_task(
                self._pull_async(aiter(items)), name=f"map-{target.name}"
            )
            self._source.add_done_callback(self._source_ended)
        else:
            self._iterator = iter(_snapshot(items))
            self._pull()

    # Pulling.

    def _may_pull(self) -> bool:
        if self._exhausted or self.done() or self._host.closed:
            return False
        known = self._known.get(self._count)
        if known is not None and known.size is None and not self._apart:
            return True  # All pages were issued at once then.
        if self._again:
            return False
        concurrency = self.form.concurrency
        if concurrency is not None and self._in_flight + self._share > concurrency:
            return False
        items_max = ITEMS_AHEAD_MAX if self._answered else FIRST_ITEMS_AHEAD
        return (
            len(self._open) < self._pages_max
            and self._open_items + len(self._timers) < items_max
            and self._open_bytes < BYTES_AHEAD_MAX
        )

    def _go_on(self) -> None:
        """Something has changed: issue what may be, or be done."""
        if self.done() or self._host.closed:
            return
        while self._again and self._fits():
            self._open_item(self._again.popleft())
        if self._may_pull():
            if self._source is None:
                self._pull_soon()
            elif self._room is not None and not self._room.done():
                self._room.set_result(None)
            elif self._draft is not None:
                self._issue_when_idle()
        self._finish_if_done()

    def _fits(self) -> bool:
        concurrency = self.form.concurrency
        return concurrency is None or self._in_flight < concurrency

    def _finish_if_done(self) -> None:
        if self._exhausted and not (self._open or self._again or self._timers):
            results, self._results = self._results, []
            self.set_result(results)

    def _pull_soon(self) -> None:
        if not self._pulling:
            self._pulling = True
            self._durable_loop.call_soon(self._pull, context=self._context)

    def _pull(self) -> None:
        """Pull one page, and look one item further: whether there is another."""
        self._pulling = False
        if not self._may_pull():
            return
        try:
            draft = self._new_draft()
            draft.fill(self._ahead, self._iterator, self._bytes_max)
            self._ahead += itertools.islice(self._iterator, 1)
            self._exhausted = not self._ahead
            if draft.count:
                self._issue(draft)
            if self._exhausted:
                self._compare_end()
        except ExecutionClosedError:
            return
        except BaseException as error:  # noqa: BLE001 - the user's iterable
            self.fail(error)
            return
        self._go_on()

    async def _pull_async(self, source: AsyncIterator[object]) -> None:
        """The same for an asynchronous source, which may have to wait.

        What it has given by then is issued, so that nothing waits for a page to fill.
        A source that is left before its end is closed.
        """
        try:
            async for item in source:
                if self._draft is not None and self._draft.full:
                    await self._wait_for_room()
                    self._issue_draft()
                if self._draft is None:
                    self._draft = self._new_draft()
                self._draft.add(item, self._bytes_max)
                self._issue_when_idle()
            if self._draft is not None:
                await self._wait_for_room()
                self._issue_draft()
        except BaseException:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()
            raise

    def _source_ended(self, source: asyncio.Task[None]) -> None:
        if self.done() or self._host.closed:
            return
        if source.cancelled():
            self.cancel("the iterable given to map was cancelled")
            return
        error = source.exception()
        if error is not None:
            self.fail(error)
            return
        self._exhausted = True
        self._compare_end()
        self._finish_if_done()

    async def _wait_for_room(self) -> None:
        while not self._may_pull() and self._draft is not None:
            self._room = self._durable_loop.create_future()
            try:
                await self._room
            finally:
                self._room = None

    def _issue_when_idle(self) -> None:
        if not self._idle:
            self._idle = True
            self._durable_loop.call_soon(self._issue_idle, context=self._context)

    def _issue_idle(self) -> None:
        self._idle = False
        if self._draft is not None and self._may_pull():
            try:
                self._issue_draft()
            except BaseException as error:  # noqa: BLE001 - such as items of no form
                self.fail(error)

    def _issue_draft(self) -> None:
        draft, self._draft = self._draft, None
        if draft is not None:
            self._issue(draft)

    def _new_draft(self) -> _Draft:
        start = self._count
        if self._apart:
            return _Draft(self.form, start, 1, exact=True)
        known = self._known.get(start)
        if known is None:
            size = self._pace.next_size(start)
            return _Draft(self.form, start, size, exact=False)
        size = known.size or self._former_size(start)
        self._pace.repeat(size)
        return _Draft(self.form, start, size, exact=True)

    def _former_size(self, start: int) -> int:
        """Before sizes were kept: up to the next page; the last one takes the rest."""
        later = [other for other in self._known if other > start]
        if later:
            return min(later) - start
        return self.form.chunk or _FORMER_PAGE_ITEMS_MAX

    # Issuing.

    def _issue(self, draft: _Draft) -> None:
        payload = draft.payload(self._bytes_max)
        self._count += draft.count
        self._results += [None] * draft.count
        if self._apart:
            self._issue_apart(draft.start, payload)
        else:
            self._issue_page(draft, payload)
        if draft.count >= _LONG_ITEMS or len(payload) >= _LONG_BYTES:
            self._durable_loop.pause_soon()

    def _issue_page(self, draft: _Draft, payload: bytes) -> None:
        start, size = draft.start, draft.count
        known = self._known.get(start)
        with_size = "" if known is not None and known.size is None else f"+{size}"
        page = PageCall(
            self,
            start=start,
            size=size,
            share=None if self.form.concurrency is None else self._share,
            loop=self._durable_loop,
            issuer=self._host,
            address=f"{self.address}[{start}{with_size}]#{digest(payload)}",
            function=self._function.name,
            target=self._function,
            arguments=payload,
            options=self.options,
        )
        self._compare(page, start, size)
        self._host.register(page)
        self._opened(page, items=size, bytes_=len(payload), in_flight=self._share)

    def _issue_apart(self, index: int, payload: bytes) -> None:
        args = self._args_of(payload, 0)
        arguments = encode_arguments(args, {}, bytes_max=self._bytes_max)
        item = ItemCall(
            self,
            index=index,
            failed=None,
            loop=self._durable_loop,
            issuer=self._host,
            address=f"{self.address}[{index}]#{digest(arguments)}",
            function=self._function.name,
            target=self._function,
            arguments=arguments,
            options=self._function.keyed(self.options, args, {}),
        )
        self._compare(item, index, 1)
        self._open_item(item)

    def _args_of(self, payload: bytes, place: int) -> tuple[object, ...]:
        item = decode_many(payload)[place]
        return tuple(item) if self.form.star else (item,)

    def _open_item(self, item: ItemCall) -> None:
        self._host.register(item)
        self._opened(item, items=1, bytes_=len(item.arguments), in_flight=1)

    def _opened(
        self, call: DurableCall[Any], *, items: int, bytes_: int, in_flight: int
    ) -> None:
        self._open[call] = bytes_
        self._open_items += items
        self._open_bytes += bytes_
        self._in_flight += in_flight

    def _closed(self, call: PageCall | ItemCall) -> None:
        page = isinstance(call, PageCall)
        self._open_bytes -= self._open.pop(call)
        self._open_items -= call.size if isinstance(call, PageCall) else 1
        self._in_flight -= self._share if page else 1
        # Who replays keeps the call until the end, and nobody needs these any more.
        call.arguments = b""

    # What the journal knows.

    def _compare(self, call: DurableCall[Any], start: int, size: int) -> None:
        known = self._known.pop(start, None)
        if known is None or known.address == call.address or not self._host.restoring:
            return
        what = f"item {start}" if size == 1 else f"items {start} to {start + size - 1}"
        self._host.diverge(
            known.address,
            call.address,
            self.line,
            f"{what} of the map of {self._function.name} differ from those of the "
            "journal: what is given to map must give the same items in every replay",
        )

    def _compare_end(self) -> None:
        if not self._known or not self._host.restoring:
            return
        start = min(self._known)
        self._host.diverge(
            self._known[start].address,
            None,
            self.line,
            f"the map of {self._function.name} has ended after {self._count} items, "
            f"and the journal knows item {start}: what is given to map must give the "
            "same items in every replay",
        )

    # What arrives.

    def page_done(self, page: PageCall, values: list[Any], recorded: Recorded) -> None:
        """The result of a page was delivered."""
        if self.done():
            return
        if len(values) != page.size:
            message = f"{page.address} has {len(values)} results for {page.size} items"
            self.fail(PayloadError(message))
            return
        arguments = page.arguments
        self._closed(page)
        self._results[page.start : page.start + page.size] = values
        self._answered = True
        if recorded.took_us is not None:
            self._pace.observe(page.size, recorded.took_us)
        if _ITEM_FAILED in recorded.payload:
            for place, value in enumerate(values):
                if isinstance(value, ItemFailed):
                    self._try_again(page, place, value, arguments)
        self._go_on()

    def _try_again(
        self, page: PageCall, place: int, failed: ItemFailed, arguments: bytes
    ) -> None:
        """The item becomes a call of its own, for its next attempt."""
        index = page.start + place
        self._results[index] = None
        item = ItemCall(
            self,
            index=index,
            failed=failed,
            loop=self._durable_loop,
            issuer=self._host,
            address=f"{page.address}/{index}",
            function=self._function.name,
            target=self._function,
            arguments=encode_arguments(
                self._args_of(arguments, place), {}, bytes_max=self._bytes_max
            ),
            options=self.options,
        )
        if self.form.concurrency is None:
            self._open_item(item)
            return
        # What only waits for its time must not count as running.
        self._timers[item] = self._durable_loop.call_at(
            failed.retry_at_us / 1e6, self._due, item, context=self._context
        )

    def _due(self, item: ItemCall) -> None:
        del self._timers[item]
        self._again.append(item)
        self._go_on()

    def item_done(self, item: ItemCall, value: object) -> None:
        """The result of a call of its own was delivered."""
        if self.done():
            return
        self._closed(item)
        self._results[item.index] = value
        self._go_on()

    def item_failed(self, item: ItemCall, error: BaseException) -> None:
        """It has failed for good."""
        if self.form.return_exceptions:
            self.item_done(item, error)
        else:
            self.fail(error)

    # The end.

    def fail(self, error: BaseException) -> None:
        """Raise it; what has not begun is dropped, what runs is cancelled."""
        if self.done():
            return
        fail_call(self, error)
        self._drop()

    def cancel(self, msg: Any = None) -> bool:
        """Cancel what is not done."""
        if not super(DurableCall, self).cancel(msg):
            return False
        self._drop()
        return True

    def _drop(self) -> None:
        for call in list(self._open):
            call.cancel()
        self._open.clear()
        self._again.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._results = []
        self._draft = None
        iterator, self._iterator = self._iterator, iter(())
        if self._source is not None:
            self._source.cancel()
        elif hasattr(iterator, "close"):
            self._durable_loop.call_soon(_close, iterator, context=self._context)


class _NobodyAsks:
    """A map is not issued itself, only its pages are."""

    def settle(self, call: DurableCall[Any]) -> None:
        """Its pages settle themselves."""


def _shares(form: MapForm) -> tuple[int, int]:
    """Items of a page that run at once, and pages ahead."""
    if form.concurrency is None:
        return 1, PAGES_AHEAD_MAX
    share = max(1, form.concurrency // PAGES_AHEAD_MAX)
    return share, min(form.concurrency, PAGES_AHEAD_MAX)


def _snapshot(items: Iterable[object]) -> Iterable[object]:
    """What the caller could change while it is pulled is copied."""
    changing = (
        MutableSequence,
        AbstractSet,
        Mapping,
        KeysView,
        ValuesView,
        ItemsView,
    )
    return list(items) if isinstance(items, changing) else items


def _close(iterator: Any) -> None:
    try:
        iterator.close()
    except ValueError:
        # It is running: it has raised, or cancelled its own map.
        return
