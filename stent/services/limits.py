"""What this worker may start of limited functions and queues.

What is limited waits in lanes (``lanes.py``), and lanes take turns. Slots and tokens
come from the database in bulk: see ``0002_limits.sql`` and ``0011_lowered_limits.sql``.
A worker asks for as many slots as it has claimed tasks for, keeps them while there is
more to start, and gives back idle ones. Who has several limits asks for them together:
docs/decisions/0016.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import anyio

from stent.errors import LeaseLostError, StoreError
from stent.log import get_logger
from stent.model import Kind
from stent.registry import DurableFunction, catalogue
from stent.services.attempts import Attempt
from stent.services.identity import Identity
from stent.services.lanes import (
    ItemTurn,
    Lane,
    Limit,
    Load,
    function_limit,
    queue_limit,
)
from stent.store.store import DeclaredLimit, GrantAsk, Granted, Store, StoredLimit

log = get_logger(__name__)

W = TypeVar("W")

IDLE_SECONDS = 0.05
"""A slot that nothing has used for this long is given back."""
RELOAD_SECONDS = 5.0
"""How often limits are read without any hint."""
ASK_SECONDS_MIN = 0.01
ASK_SECONDS_MAX = 0.5
"""How often a worker asks again for what it did not get."""
FORGET_SECONDS = 2.5
"""A wish for slots that is not repeated for this long is taken back, or for as long as
two looks for work take."""


class ItemBegins(enum.Enum):
    """What ``Limits.next`` started is an item of a page."""

    ITEM_BEGINS = enum.auto()


ITEM_BEGINS: Final = ItemBegins.ITEM_BEGINS


class Limits(Generic[W]):
    """The lanes of one worker.

    ``on_open`` is called when something that waits in a lane may start, ``on_hungry``
    when there may be more in the database; ``free`` says how many slots of the worker
    nothing uses.
    """

    def __init__(
        self,
        store: Store,
        identity: Identity,
        *,
        queues: Iterable[str],
        hint_worker: Callable[[UUID], None],
    ) -> None:
        """Create it.

        Args:
            store: Over the claimer's connection.
            identity: Of the worker.
            queues: Served by this worker.
            hint_worker: Tells a worker that slots it waits for are free.
        """
        self.on_open: Callable[[], None] = lambda: None
        self.on_hungry: Callable[[], None] = lambda: None
        self.free: Callable[[], int] = lambda: 1
        self._store = store
        self._identity = identity
        self._queues = sorted(queues)
        self._hint_worker = hint_worker
        self._limits: dict[str, Limit] = {}
        self._lanes: dict[tuple[str, str], Lane[W]] = {}
        self._loads: dict[str, Load] = {}
        self._closing: dict[str, dt.timedelta] = {}
        self._wake = anyio.Event()
        self._asking = anyio.Lock()
        poll = identity.settings.poll_every.total_seconds()
        self._forget_seconds = max(FORGET_SECONDS, 2 * poll + ASK_SECONDS_MAX)
        self._reload_at = 0.0
        self._turns = 0
        self._claiming: set[Limit] = set()
        self._keeps = True
        self._given_back = False
        self._slotless = False
        self._offered = 0
        self._queued = 0
        self.revision = 0
        """Grows whenever lanes may have other limits than before."""

    # What is limited.

    async def declare(self) -> None:
        """Say what the code of this worker says, and read what holds."""
        limits: list[DeclaredLimit] = []
        for name in catalogue.names():
            function = catalogue.find(name)
            if function is None:
                continue
            options = function.registered
            rate = options.rate_limit
            limit = DeclaredLimit(
                function_limit(name),
                options.max_concurrent,
                None if rate is None else rate.per_second,
                None if rate is None else rate.burst,
                options.concurrency_key is not None,
            )
            if limit.max_concurrent is not None or limit.per_second is not None:
                limits.append(limit)
        await self._store.declare_limits(self._identity.worker_id, limits)
        await self.reload()

    async def reload(self) -> None:
        """Read what holds now."""
        self._reload_at = time.monotonic() + RELOAD_SECONDS
        # Who said something else may have ended meanwhile.
        await self._store.settle_declared_limits()
        stored = {limit.name: limit for limit in await self._store.load_limits()}
        for name, limit in stored.items():
            if name not in self._limits:
                self._limits[name] = Limit(name)
            self._limits[name].update(limit)
        for name, known in list(self._limits.items()):
            if name not in stored:
                known.update(StoredLimit(name, None, None, None, False, False))  # noqa: FBT003
                if not (known.used or known.held or known.asked):
                    del self._limits[name]
        for lane in self._lanes.values():
            self._bind(lane)
        self._open()

    def lane(self, queue: str, function: str) -> Lane[W] | None:
        """The lane of a function in a queue; None when nothing limits it."""
        lane = self._lanes.get((queue, function))
        if lane is None:
            load = self._loads.setdefault(function, Load())
            lane = self._lanes[queue, function] = Lane(queue, function, load)
            self._bind(lane)
        return lane if lane.limited or lane.waiting else None

    def _bind(self, lane: Lane[W]) -> None:
        self.revision += 1
        names = (function_limit(lane.function), queue_limit(lane.queue))
        lane.limits = tuple(self._limits[n] for n in names if n in self._limits)
        function = catalogue.find(lane.function)
        options = None if function is None else function.registered
        lane.per_worker = None if options is None else options.max_concurrent_per_worker
        lane.keyed = any(limit.keyed for limit in lane.limits)

    def split(
        self, functions: Iterable[DurableFunction[Any, Any]]
    ) -> tuple[list[DurableFunction[Any, Any]], list[Lane[W]]]:
        """Functions that nothing limits in any queue served, and the other lanes.

        A function is limited in all queues, or unlimited ones are claimed lane by lane.
        """
        free: list[DurableFunction[Any, Any]] = []
        lanes: list[Lane[W]] = []
        for function in functions:
            own = [self._lane(queue, function.name) for queue in self._queues]
            if not any(lane.limited for lane in own):
                free.append(function)
            else:
                lanes += own
        return free, lanes

    def _lane(self, queue: str, function: str) -> Lane[W]:
        self.lane(queue, function)
        return self._lanes[queue, function]

    def holds_executions(self, function: DurableFunction[Any, Any]) -> bool:
        """Whether executions of a workflow need a slot or a token, or are paused."""
        limit = self._limits.get(function_limit(function.name))
        return function.kind is Kind.WORKFLOW and limit is not None

    def paused(self, function: DurableFunction[Any, Any]) -> bool:
        """Whether nothing of a function may start, in whatever queue."""
        limit = self._limits.get(function_limit(function.name))
        return limit is not None and limit.paused

    def queue_paused(self, queue: str) -> bool:
        """Whether nothing of a queue may start."""
        limit = self._limits.get(queue_limit(queue))
        return limit is not None and limit.paused

    def room(self, lane: Lane[W], free: int) -> int:
        """How many tasks of a lane to claim."""
        contended = any(
            other.wanted and other.shares(lane)
            for other in self._lanes.values()
            if other is not lane
        )
        return lane.room(free, contended=contended)

    # Starting and ending.

    @property
    def anyone_waits(self) -> bool:
        """Whether anything waits for its turn."""
        return self._offered > 0 or self._queued > 0

    def next_lane(self) -> Lane[W] | None:
        """The lane of which something may start now, if there is a slot for it.

        They take turns: it is the one that was served longest ago.
        """
        if not self.anyone_waits:
            return None
        for lane in self._lanes.values():
            while lane.items and lane.items[0].came.done():  # cancelled: see leave
                lane.items.popleft()
                self._queued -= 1
        ready = (lane for lane in self._lanes.values() if lane.wanted and lane.open)
        return min(ready, key=lambda lane: lane.served, default=None)

    def serve(self, lane: Lane[W]) -> W | ItemBegins:
        """Start what is first in ``next_lane``.

        An item has been told, and has its limits; an attempt takes them as it begins.
        """
        self._turns += 1
        lane.served = self._turns
        if lane.items:
            self._queued -= 1
            lane.items.popleft().came.set_result(lane.take())
            return ITEM_BEGINS
        self._offered -= 1
        return lane.waiting.popleft()

    def queue_item(self, lane: Lane[W], priority: int) -> ItemTurn:
        """Let an item of a page wait for its turn.

        Returns:
            ``came`` gets what ``end`` takes; ``leave`` it if that is not awaited.
        """
        turn = ItemTurn(priority, asyncio.get_running_loop().create_future())
        lane.items.append(turn)
        self._queued += 1
        self._wake.set()
        return turn

    def leave(self, lane: Lane[W], turn: ItemTurn) -> bool:
        """An item that was queued will not run; whether its turn had come."""
        if turn in lane.items:
            lane.items.remove(turn)
            self._queued -= 1
            return False
        if turn.came.cancelled():
            return False
        self.end(lane, turn.came.result())
        return True

    def offer(self, lane: Lane[W], waiting: W) -> None:
        """Let it wait for its turn."""
        lane.waiting.append(waiting)
        self._offered += 1
        self._wake.set()

    def end(self, lane: Lane[W], taken: tuple[Limit, ...]) -> None:
        """What was started has ended."""
        lane.running -= 1
        lane.load.running -= 1
        lane.pace.completed += 1
        for limit in taken:
            limit.used -= 1
        if lane.hungry or self._given_back:
            self._given_back = False
            self.on_hungry()
        self._wake.set()

    def slot_is_free(self) -> None:
        """The worker has a slot: there may be something for which to ask for tokens."""
        if self._slotless:
            self._wake.set()

    def waiting(self) -> Iterator[W]:
        """Everything that has not begun."""
        for lane in self._lanes.values():
            yield from lane.waiting

    def take_waiting(self, unwanted: Callable[[W], bool]) -> list[W]:
        """Take out what has not begun and is not wanted."""
        taken: list[W] = []
        for lane in self._lanes.values():
            out = [one for one in lane.waiting if unwanted(one)]
            if out:
                lane.waiting = deque(w for w in lane.waiting if not unwanted(w))
                taken += out
        self._offered -= len(taken)
        return taken

    def give_back(self, overdue: Callable[[W], bool]) -> list[W]:
        """Take out what others may begin earlier; it is looked for when one ends."""
        given = self.take_waiting(overdue)
        self._given_back = self._given_back or bool(given)
        return given

    def drop_all(self) -> None:
        """The worker was taken over: what it had is granted to others by now."""
        for name, limit in list(self._limits.items()):
            fresh = Limit(name, limit.max_concurrent, limit.per_second, limit.burst)
            fresh.keyed, fresh.paused = limit.keyed, limit.paused
            self._limits[name] = fresh
        for lane in self._lanes.values():
            self._bind(lane)

    def keep_nothing(self) -> None:
        """The worker drains: slots that become free are for others, at once."""
        self._keeps = False
        self._wake.set()

    async def give_up(self) -> None:
        """The worker ends: give back all slots, and tell who waits for them."""
        async with self._asking:
            self._keeps = False
            limits = self._limits.values()
            left = [m for m in limits if m.held or m.asked or m.unsure]
            if left:
                await self._ask(left)
        self._wake.set()

    def close(self, queue: str, function: str, delay: dt.timedelta) -> list[str]:
        """No tokens of a lane's limits for ``delay``; the database hears of it soon."""
        lane = self._lane(queue, function)
        rated = [limit for limit in lane.limits if limit.per_second is not None]
        for limit in rated:
            limit.tokens = 0
            limit.tokens_at = time.monotonic() + delay.total_seconds()
            self._closing[limit.name] = max(delay, self._closing.get(limit.name, delay))
        self._wake.set()
        return [limit.name for limit in rated]

    # Asking.

    def hint(self) -> None:
        """Slots may be free, or limits may have changed."""
        self._reload_at = 0.0
        for limit in self._limits.values():
            limit.ask_at = limit.tokens_at = 0.0
        self._wake.set()

    async def want(self, lanes: Collection[Lane[W]], free: int) -> None:
        """Ask for slots for tasks that are there to be claimed; ``claimed`` follows.

        What finds nothing to claim, as somebody else was faster, goes back as any idle
        slot does; what comes without another one that its lane needs does so at once.
        """
        async with self._asking:
            asking = self._note_wishes(lanes, free)
            if not asking:
                return
            self._claiming = asking
            await self._ask(asking)
        self._open()
        useful: set[Limit] = set()
        for lane in lanes:
            # Lanes that take turns hold theirs while the slots of others are in use.
            if all(limit.granted for limit in lane.limits if limit.counts):
                useful.update(lane.limits)
        for limit in asking - useful:
            limit.idle_since = -math.inf
        self._wake.set()

    def claimed(self) -> None:
        """What there was to claim is here: slots that it does not use are idle."""
        if self._claiming:
            self._claiming = set()
            self._wake.set()

    def _note_wishes(self, lanes: Iterable[Lane[W]], free: int) -> set[Limit]:
        """What to ask for so that tasks of these lanes may be claimed."""
        asking: set[Limit] = set()
        now = time.monotonic()
        for lane in lanes:
            room = min(free, lane.own_room)
            full = [limit for limit in lane.limits if limit.full]
            more = {m for m in full if now >= m.ask_at and m.may_get_more}
            if room <= 0 or any(m.granted == 0 and m not in more for m in full):
                continue  # without that one the others are of no use
            for limit in more:
                extra = min(room, lane.reach(limit, more) - lane.running)
                if extra > 0:
                    limit.extra = max(limit.extra, int(extra))
                    asking.add(limit)
        return asking

    async def run(self) -> None:
        """Ask for what waits, give back what is idle, for ever."""
        while True:
            with anyio.move_on_after(self._pause()):
                await self._wake.wait()
            self._wake = anyio.Event()
            try:
                await self.run_once()
            except LeaseLostError:
                raise
            except StoreError as error:
                if not error.retryable:
                    raise
                log.debug("limits.postponed", error=str(error))
                await anyio.sleep(ASK_SECONDS_MAX)

    async def run_once(self) -> int:
        """Everything that is due; returns how many limits were asked for."""
        now = time.monotonic()
        if now >= self._reload_at:
            await self.reload()
        for name, delay in list(self._closing.items()):
            await self._store.close_buckets([name], delay)
            if self._closing.get(name) == delay:  # not a longer one meanwhile
                del self._closing[name]
        lively = self._lively()
        usable = self._usable()
        for limit in lively:
            spared = limit in self._claiming and limit.idle_since > -math.inf
            if spared or not _idle(limit, usable):
                limit.idle_since = math.inf
            elif limit.idle_since == math.inf:
                limit.idle_since = now if self._keeps else -math.inf
        async with self._asking:  # an answer under way may be all there is to ask
            now = time.monotonic()
            lively = self._lively()
            usable = self._usable(self._askable(lively, now))
            due = [limit for limit in lively if self._due_at(limit, usable) <= now]
            if due:
                await self._ask(due)
        if due:
            self._open()
        return len(due)

    def _pause(self) -> float:
        """Until something is due."""
        now = time.monotonic()
        at = self._reload_at
        lively = self._lively()
        usable = self._usable()
        hoped = self._usable(self._askable(lively, math.inf))
        self._slotless = False
        for limit in lively:
            due_at = self._due_at(limit, hoped)
            spared = limit in self._claiming or limit.idle_since < math.inf
            if not spared and _idle(limit, usable):
                due_at = min(due_at, now + IDLE_SECONDS)
            if due_at < math.inf:
                at = min(at, max(due_at, now + ASK_SECONDS_MIN))
        return max(0.0, at - now)

    def _lively(self) -> list[Limit]:
        """Those that there may be something to do about: of many limits the few."""
        concerned = {
            limit
            for lane in self._lanes.values()
            if lane.wanted
            for limit in lane.limits
        }
        return [
            m
            for m in self._limits.values()
            if m.granted or m.used or m.held or m.asked or m.unsure or m in concerned
        ]

    def _usable(self, asked: Collection[Limit] = ()) -> Counter[Limit]:
        """How many more slots of each limit could be used; see ``Lane.usable``."""
        usable: Counter[Limit] = Counter()
        if not self._keeps:
            return usable
        for lane in self._lanes.values():
            if lane.wanted:
                for limit in lane.limits:
                    usable[limit] += lane.usable(limit, asked)
        return usable

    def _askable(self, limits: Iterable[Limit], now: float) -> set[Limit]:
        """Those that asking might bring more of."""
        return {m for m in limits if now >= m.ask_at and m.may_get_more}

    def _due_at(self, limit: Limit, usable: Mapping[Limit, int]) -> float:
        """From when on the database is to be asked; never, as far as is known."""
        shrinks = limit.counts and limit.lowered and limit.granted + limit.used > 0
        if limit.unsure or shrinks or limit.held > max(limit.used, limit.granted):
            return limit.ask_at
        at = math.inf
        if limit.idle_since < math.inf:
            at = limit.idle_since + IDLE_SECONDS
        if limit.asked > limit.granted:
            # What was to be claimed may be gone: somebody else has it.
            at = min(at, limit.asked_at + self._forget_seconds)
        if limit.open or not usable[limit]:
            return at
        if limit.lacks_token:
            if self._startable(limit, usable[limit]) > 0:
                return min(at, limit.tokens_at)
            self._slotless = True
        elif limit.full and limit.may_get_more:
            return min(at, limit.ask_at)
        return at

    def _startable(self, limit: Limit, waits: int) -> int:
        """How many could begin now if there were tokens."""
        startable = min(waits, self.free())
        return min(startable, limit.granted - limit.used) if limit.counts else startable

    async def _ask(self, limits: Iterable[Limit]) -> None:
        """Under the lock of ``_asking``."""
        asked = {limit.name: limit for limit in limits}
        usable = self._usable(set(asked.values()))
        asks = [self._make_ask(limit, usable[limit]) for limit in asked.values()]
        identity = self._identity
        answers = await self._store.adjust_grants(
            identity.worker_id, identity.incarnation, asks
        )
        now = time.monotonic()
        for granted in answers:
            limit = self._limits.get(granted.name)
            if limit is not None and limit is asked.get(granted.name):
                self._receive(limit, granted, now)

    def _make_ask(self, limit: Limit, waits: int) -> GrantAsk:
        wanted = limit.used + max(waits, limit.extra)
        limit.extra, limit.told, limit.lowered = 0, limit.used, False
        # More than there is nobody gets: that is no wish to be taken back.
        limit.asked = min(wanted, limit.max_concurrent or 0) if limit.counts else 0
        limit.asked_at = time.monotonic()
        # Tokens for what has a slot: who holds both starts no more than he may.
        startable = self._startable(limit, waits)
        # Nothing starts until the answer is there: it may be less than before.
        limit.granted, limit.unsure = min(limit.granted, limit.used), limit.counts
        limit.ask_at = time.monotonic() + ASK_SECONDS_MIN
        tokens = 0
        closing = limit.name in self._closing
        if not limit.paid and startable > 0 and not closing:
            tokens = min(startable, math.ceil(limit.per_second or 1))
        limit.asked_tokens = tokens
        return GrantAsk(
            limit.name,
            limit.used if limit.counts else 0,
            wanted if limit.counts else 0,
            tokens,
        )

    def _receive(self, limit: Limit, granted: Granted, now: float) -> None:
        pause, limit.unsure = ASK_SECONDS_MAX, False
        if granted.slots is None:
            limit.held = 0
        else:
            limit.granted = granted.slots
            limit.held = max(limit.told, granted.slots)
            if granted.slots >= limit.asked or limit.held > granted.slots:
                pause = ASK_SECONDS_MIN
            limit.idle_since = math.inf
        limit.pay(granted.tokens, now)
        if granted.tokens < limit.asked_tokens:
            limit.tokens_at = now + max(granted.tokens_in, ASK_SECONDS_MIN)
        limit.ask_at = now + pause
        for waiter in granted.waiters:
            self._hint_worker(waiter)

    def _open(self) -> None:
        """Start what may start."""
        self.on_open()

    def names_of(self, attempt: Attempt) -> list[str]:
        """Names of the limits that an attempt is under."""
        lane = self._lanes.get((attempt.queue, attempt.function))
        return [] if lane is None else [limit.name for limit in lane.limits]


def _idle(limit: Limit, usable: Mapping[Limit, int]) -> int:
    """Granted slots that nothing here is about to use."""
    return max(0, limit.granted - limit.used - usable[limit])
