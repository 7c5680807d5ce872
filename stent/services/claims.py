"""Takes tasks and executions that are ready, as many as there is room for."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

import anyio
import msgspec

from stent.errors import LeaseLostError, PayloadError, StoreError
from stent.log import get_logger
from stent.model import Kind
from stent.registry import DurableFunction, catalogue
from stent.services.activities import Activities
from stent.services.attempts import Attempt
from stent.services.claimed_tasks import ClaimedTasks
from stent.services.identity import Identity
from stent.services.lanes import Lane
from stent.services.limits import Limits
from stent.services.low_mark import ALWAYS, Look, LowMark
from stent.services.outage import Outage
from stent.services.settles import Held
from stent.services.suspects import (
    LOST_MAX,
    Suspected,
    Suspects,
    is_killer,
    killed_too_often,
)
from stent.services.turns import Executions
from stent.services.writer import Writer
from stent.store.store import BELOW_ALL, NIL, Store, StoredRows

log = get_logger(__name__)

EXECUTIONS_PER_CLAIM_MAX = 200
RESTORED_TOGETHER = 20
"""Executions whose journals are in memory at once as rows, before they are read."""
ROOM_SHARE = 4
"""While work waits in memory, no less than this part of the slots is claimed for."""
THOROUGH_SHARE = 10
"""Looking through all inboxes takes no more than one part in so many of the time."""
THOROUGH_PAUSE_SECONDS_MAX = 3.0
URGENT_PAUSE_SECONDS = 0.1
"""A worker without a slot leaves what is more urgent than its pages to others first."""
KEYS_PAUSE_SECONDS = 0.05
"""Between two looks at the keys of a function, of which the first found none free."""


class Claimer:
    """Claims for one worker, over one connection."""

    def __init__(  # noqa: PLR0913 - composed in one place
        self,
        store: Store,
        identity: Identity,
        executions: Executions,
        activities: Activities,
        writer: Writer,
        limits: Limits[Any],
        *,
        queues: frozenset[str],
    ) -> None:
        """Create the claimer; ``queues`` are those it serves."""
        self._limits = limits
        self._store = store
        self._identity = identity
        self._executions = executions
        self._activities = activities
        self._queues = sorted(queues)
        self._wake = anyio.Event()
        self._doubtful = False
        self._poll_at = 0.0
        self.tasks_hinted = True
        self.executions_hinted = True
        self._urgent_hinted, self._urgent_last, self._urgent_at = True, 0.0, 0.0
        """There may be tasks that the pages which have all slots should let pass; from
        when, by the monotonic clock, others have had the time to claim them."""
        self._processes_hinted = False
        """There are tasks of ``pool="process"`` that have to wait for a process."""
        self._thorough = True
        self._thorough_at = 0.0
        self._look_planned = False
        self._low_mark = LowMark(identity.clock)
        self._lane_marks: dict[tuple[str, str], LowMark] = {}
        self._left = BELOW_ALL
        """The most urgent that the claim now being made may leave."""
        self._key_reached: dict[str, str] = {}
        """Of each limited workflow with keys, the last key that was looked at."""
        self.accepting = True
        self.on_key_free: Callable[[str], None] = lambda _queue: None
        self._suspects = Suspects(store)
        self._tasks = ClaimedTasks(
            store,
            identity,
            executions,
            activities,
            writer,
            self._suspects,
            ready_in=self.hint_tasks_after,
            wake=lambda: self._wake.set(),  # noqa: PLW0108 - another one each time
            on_key_free=self._key_free,
        )
        self._held_back: deque[Any] = deque()
        activities.on_free = self._slot_free
        limits.on_hungry = self.hint_tasks
        executions.on_inline_kept = self._tasks.keep_inline
        executions.on_proven = self._execution_proven
        executions.on_room = self.hint_if_idle
        executions.on_left_behind = self.hint_inboxes

    @property
    def held(self) -> Held:
        """Tasks whose row is ours."""
        return self._tasks.held

    def release_waiting(self) -> None:
        """Give back claimed tasks that have not begun."""
        self._tasks.release_waiting()

    def release_overdue(self) -> int:
        """Give back claimed tasks that wait for long; returns their number."""
        return self._tasks.release_overdue()

    def hint(self) -> None:
        """There may be something to claim."""
        self.executions_hinted = self._thorough = True
        self.hint_tasks()

    def hint_if_idle(self) -> None:
        """Wake it up if it waits although there may be something."""
        if self._can_claim():
            self._wake.set()

    def hint_executions(self) -> None:
        """There may be an execution to claim."""
        self.executions_hinted = True
        self._wake.set()

    def hint_inboxes(self) -> None:
        """There may be an execution to claim that its inbox wakes."""
        self._thorough = True
        self.hint_executions()

    def hint_tasks(self) -> None:
        """There may be a task to claim."""
        self.tasks_hinted = True
        self._hint_urgent()
        self._wake.set()

    def _hint_urgent(self) -> None:
        self._urgent_last = time.monotonic()
        if not self._urgent_hinted or self._activities.least_urgent_page is None:
            self._urgent_hinted = True
            self._urgent_at = self._urgent_last + URGENT_PAUSE_SECONDS

    def doubt(self) -> None:
        """Rows that are ours may have nobody who runs them: take them in."""
        self._doubtful = True
        self.hint()

    def _key_free(self, attempt: Attempt) -> None:
        """A slot of a key is free, here or elsewhere."""
        self.hint_tasks()
        self.on_key_free(attempt.queue)

    def _slot_free(self) -> None:
        hinted = self.tasks_hinted or self._processes_hinted or self._urgent_hinted
        if hinted and not self._wake.is_set():
            self._wake.set()

    async def run(self) -> None:
        """Claim whenever there may be something and there is room.

        Raises:
            LeaseLostError: The worker was taken over.
        """
        outage = Outage("claimer")
        while True:
            if time.monotonic() >= self._poll_at:
                # However busy it is: a hint may have been lost, or there are none.
                self._poll_at = time.monotonic() + self._poll_seconds()
                self.hint()
            try:
                if self._doubtful:
                    await self._recover_claim()
                await self.run_once()
            except LeaseLostError:
                raise
            except StoreError as error:
                if not error.retryable:
                    raise
                outage.note(error)
                self._doubtful = True
                await anyio.sleep(0.05 + random.random() * 0.4)  # noqa: S311
                continue
            outage.end()
            if self._can_claim():
                continue
            self._wake = anyio.Event()
            if self.executions_hinted and self.accepting:
                self._executions.make_room()
            poll_in = max(0.0, self._poll_at - time.monotonic())
            with anyio.move_on_after(min(poll_in, self._urgent_in())):
                await self._wake.wait()

    def _poll_seconds(self) -> float:
        """How long until it looks without a hint; not all workers at once."""
        poll = self._identity.settings.poll_every.total_seconds()
        return poll * (0.9 + 0.2 * random.random())  # noqa: S311

    def _can_claim(self) -> bool:
        return self.accepting and (
            (self.tasks_hinted and self._task_or_turn_room() > 0)
            or (self._processes_hinted and self._process_room() > 0)
            or self._urgent_room() > 0
            or (self.executions_hinted and self._executions.room > 0)
        )

    async def run_once(self) -> int:
        """One claim of each kind at most; returns how much was taken."""
        taken = 0
        await self._tasks.give_back_postponed()
        await self._suspects.write_cleared()
        if not self.accepting:
            return taken
        if self._held_back:
            await self._adopt([self._held_back.popleft()])
        if self.executions_hinted and self._executions.make_room() > 0:
            taken += await self._claim_executions()
        if self._processes_hinted and self._process_room() > 0:
            self.tasks_hinted = True
        room = self._task_or_turn_room()
        if self.tasks_hinted and room > 0:
            taken += await self._claim_tasks(room)
        elif (urgent_room := self._urgent_room()) > 0:
            taken += await self._claim_urgent(urgent_room)
        return taken

    def _task_room(self) -> int:
        """How many tasks to claim; many at once, or none while there is work."""
        activities = self._activities
        room = activities.room
        if activities.waiting and room < activities.slots // ROOM_SHARE:
            return 0
        return room

    def _task_or_turn_room(self) -> int:
        """Also one while what is limited has all slots: they take turns with others."""
        room, activities = self._task_room(), self._activities
        if room <= 0 and activities.waiting == 0 and activities.limited_may_begin:
            return 1
        return room

    def _urgent_room(self) -> int:
        """How many tasks to claim although there is no slot; see ``_claim_urgent``."""
        if not self._urgent_hinted or time.monotonic() < self._urgent_at:
            return 0
        page = self._activities.least_urgent_page
        if page is None or self._task_room() > 0:
            return 0
        return self._activities.room_above(page)

    def _urgent_in(self) -> float:
        """Seconds until ``_urgent_room`` may be another."""
        if not self._urgent_hinted or self._activities.least_urgent_page is None:
            return math.inf
        pause = self._urgent_at - time.monotonic()
        return pause if pause > 0 else math.inf

    def _process_room(self) -> int:
        """How many tasks of ``pool="process"`` to claim."""
        return min(self._task_room(), self._activities.process_room)

    async def _claim_executions(self) -> int:
        known = _functions()
        self.executions_hinted = False
        thorough = self._thorough and time.monotonic() >= self._thorough_at
        self._thorough = self._thorough and not thorough
        if self._thorough:
            self._look_again_later()
        limited = [f for f in known if self._limits.holds_executions(f)]
        functions = [f for f in known if f not in limited]
        taken = 0
        for function in limited:
            taken += await self._claim_limited_executions(function, thorough=thorough)
        if thorough:
            taken += await self._claim_stopping(known)
        if not functions:
            return taken
        queues = self._open_queues()
        count = min(EXECUTIONS_PER_CLAIM_MAX, self._executions.room)
        if not queues or count <= 0:
            self._thorough = self._thorough or thorough
            return taken
        began = time.monotonic()
        rows = await self._store.claim_executions(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            claim=self._identity.claim + 1,
            queues=queues,
            functions=[function.name for function in functions],
            digests=[function.code_digest for function in functions],
            count=count,
            thorough=thorough,
        )
        self._identity.claim += 1
        if thorough:
            now = time.monotonic()
            pause = THOROUGH_SHARE * (now - began)
            self._thorough_at = now + min(THOROUGH_PAUSE_SECONDS_MAX, pause)
        if len(rows) >= count:
            self.executions_hinted = True
            self._thorough = self._thorough or thorough
        await self._adopt(rows)
        return taken + len(rows)

    def _look_again_later(self) -> None:
        """A look through the inboxes was asked for too soon after another."""
        if not self._look_planned:
            self._look_planned = True
            pause = max(0.0, self._thorough_at - time.monotonic())
            asyncio.get_running_loop().call_later(pause, self._look_now)

    def _look_now(self) -> None:
        self._look_planned = False
        self.hint_executions()

    def _open_queues(self) -> list[str]:
        """Those that are not paused."""
        return [queue for queue in self._queues if not self._limits.queue_paused(queue)]

    async def _claim_stopping(self, known: list[DurableFunction[Any, Any]]) -> int:
        """What is paused may clean up all the same when it has been asked to stop."""
        any_queue = any(self._limits.queue_paused(queue) for queue in self._queues)
        functions = [f for f in known if any_queue or self._limits.paused(f)]
        room = self._executions.room
        if not functions or room <= 0:
            return 0
        rows = await self._store.claim_stopping_executions(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            claim=self._identity.claim + 1,
            queues=self._queues,
            functions=[function.name for function in functions],
            digests=[function.code_digest for function in functions],
            count=min(EXECUTIONS_PER_CLAIM_MAX, room),
        )
        self._identity.claim += 1
        await self._adopt(rows)
        return len(rows)

    async def _claim_limited_executions(
        self, function: DurableFunction[Any, Any], *, thorough: bool
    ) -> int:
        """Executions of one workflow, as far as it has slots and tokens for them."""
        queues, room = self._open_queues(), self._executions.room
        if not queues or room <= 0:
            return 0
        after = self._key_reached.get(function.name, "")
        rows = await self._store.claim_limited_executions(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            claim=self._identity.claim + 1,
            queues=queues,
            function=function.name,
            digest=function.code_digest,
            count=min(EXECUTIONS_PER_CLAIM_MAX, room),
            after=after,
            thorough=thorough,
        )
        self._identity.claim += 1
        last = rows.pop() if rows else None  # none: it is paused
        await self._adopt(rows)
        if last is None:
            return 0
        reached = self._key_reached[function.name] = last["reached"]
        if last["tokens_in"] is not None:
            # Not for each of thousands: as many as there are come in a moment's time.
            pause = max(KEYS_PAUSE_SECONDS, last["tokens_in"])
            asyncio.get_running_loop().call_later(pause, self.hint_executions)
        elif rows:
            self.executions_hinted = True
        elif reached or after:
            # Keys are left that were not looked at.
            asyncio.get_running_loop().call_later(
                KEYS_PAUSE_SECONDS, self.hint_executions
            )
        return len(rows)

    async def _adopt(self, rows: list[Any]) -> None:
        claimed = [(row["execution_id"], NIL) for row in rows]
        lost = await self._suspects.losses(rows, claimed)
        killers = await self._killers(rows, lost)
        if killers:
            rows = [row for row in rows if row["execution_id"] not in killers]
            await self._stop(list(killers.values()))
        if lost:
            rows = [row for row in rows if self._may_replay(row, lost)]
            await self._suspects.write_marks()
        again = [row for row in rows if row["epoch"] != 1]
        for row in rows:
            if row["epoch"] == 1:
                self._adopt_one(row, None)
        for start in range(0, len(again), RESTORED_TOGETHER):
            some = again[start : start + RESTORED_TOGETHER]
            stored = await self._store.load_stored([r["execution_id"] for r in some])
            for row in some:
                self._adopt_one(row, stored.pop(row["execution_id"]))
        if again:
            # What woke them may be in their inboxes.
            self._executions.read_inboxes()

    async def _killers(
        self, rows: list[Any], lost: dict[Suspected, int]
    ) -> dict[UUID, Any]:
        """What has killed too often, or was blocked for that and is to be cancelled.

        What was blocked is claimed again by other code, which may try it.
        """
        killers = {
            row["execution_id"]: row
            for row in rows
            if lost.get((row["execution_id"], NIL), 0) >= LOST_MAX
        }
        blocked = {row["execution_id"]: row for row in rows if _is_blocked_here(row)}
        if blocked:
            reasons = await self._store.load_blocked_reasons(list(blocked))
            for execution_id, reason in reasons.items():
                if is_killer(reason):
                    killers[execution_id] = blocked[execution_id]
        return killers

    async def _stop(self, killers: Sequence[Any]) -> None:
        """Run nothing of them any more, not even to clean up."""
        reason = killed_too_often(f"{LOST_MAX} replays of it")
        issued = await self._store.load_issued([r["execution_id"] for r in killers])
        for row in killers:
            execution_id = row["execution_id"]
            self._suspects.clear((execution_id, NIL))
            calls = issued.get(execution_id, ())
            if row["cancel_reason"]:
                self._executions.end_by_force(row, calls, reason)
            else:
                self._executions.refuse(row, reason, calls)

    def _may_replay(self, row: Any, lost: dict[Suspected, int]) -> bool:
        """Mark a replay after a loss."""
        suspected = row["execution_id"], NIL
        times = lost.get(suspected, 0)
        if not self._suspects.may_begin(times):
            self._held_back.append(row)
            return False
        if times:
            self._suspects.begin(suspected, row["epoch"], times)
        return True

    def _execution_proven(self, execution_id: UUID, harmless: bool) -> None:  # noqa: FBT001 - called back
        if self._suspects.end((execution_id, NIL), cleared=harmless):
            self.hint()

    def _adopt_one(self, row: Any, stored: StoredRows | None) -> None:
        suspect = self._suspects.is_running((row["execution_id"], NIL))
        try:
            read = None if stored is None else stored.read()
            self._executions.adopt(row, read, suspect=suspect)
        except (msgspec.MsgspecError, PayloadError) as error:
            reason = f"its record cannot be read: {error}"
            issued = () if stored is None else stored.issued
            if row["cancel_reason"] is None:
                self._executions.refuse(row, reason, issued)
            else:
                self._executions.end_by_force(row, issued, reason)

    async def _claim_tasks(self, room: int) -> int:
        precedence = self._activities.precedence
        precedence.begin_claim()
        self._left = BELOW_ALL
        activities = [f for f in _functions() if f.kind is Kind.ACTIVITY]
        self.tasks_hinted = self._processes_hinted = self._urgent_hinted = False
        unlimited, lanes = self._limits.split(activities)
        taken = await self._claim_lanes(lanes, room) if lanes else 0
        taken += await self._claim_computing([f for f in unlimited if f.in_process])
        functions = [f for f in unlimited if not f.in_process]
        if not functions:
            precedence.end_claim(self._left)
            return taken
        room = self._task_or_turn_room()
        if room <= 0:
            self.tasks_hinted = True
            return taken
        count = min(self._identity.settings.claim_items_max, room)
        names = [function.name for function in functions]
        look = self._low_mark.next((self._queues, names))
        began = time.monotonic()
        rows = await self._fetch_tasks(
            queues=self._queues,
            functions=names,
            count=count,
            low=look.low,
            priorities=look.priorities,
        )
        more = self._low_mark.claimed(look, rows, count, time.monotonic() - began)
        if more:
            self.tasks_hinted = True
            self._leave(rows)
        precedence.end_claim(self._left)
        await self._tasks.take(rows)
        return taken + len(rows)

    async def _fetch_tasks(self, **claim: Any) -> list[Any]:
        """One claim of ``Store.claim_tasks``, under our fence."""
        identity = self._identity
        rows = await self._store.claim_tasks(
            worker_id=identity.worker_id,
            incarnation=identity.incarnation,
            claim=identity.claim + 1,
            **claim,
        )
        identity.claim += 1
        return rows

    async def _claim_urgent(self, count: int) -> int:
        """Tasks that pages let pass, while these have all slots.

        A page takes seconds and more, so the slots are not waited for. What is limited,
        or runs in processes, waits for its own slots in any case.
        """
        at = self._urgent_last + URGENT_PAUSE_SECONDS
        # What has come since is not old enough yet: look again when it is.
        self._urgent_hinted, self._urgent_at = at > time.monotonic(), at
        above = self._activities.least_urgent_page
        if above is None:
            return 0
        groups = self._unlimited_by_queue()
        alone = len(groups) == 1 and list(groups.values()) == [self._queues]
        taken = 0
        for names, queues in groups.items():
            if taken >= count:
                break
            look = None
            if alone:
                look = self._low_mark.next((self._queues, list(names)))
            rows = await self._fetch_tasks(
                queues=queues,
                functions=list(names),
                count=count - taken,
                low=ALWAYS if look is None else look.low,
                priorities=() if look is None else look.priorities,
                above=above,
                waited=0.9 * URGENT_PAUSE_SECONDS,
            )
            taken += len(rows)
            await self._tasks.take(rows)
        if taken >= count:
            self._hint_urgent()
        return taken

    def _unlimited_by_queue(self) -> dict[tuple[str, ...], list[str]]:
        """Names of what nothing limits, each with the queues in which that is so."""
        activities = [
            f for f in _functions() if f.kind is Kind.ACTIVITY and not f.in_process
        ]
        found: dict[tuple[str, ...], list[str]] = {}
        for queue in self._queues:
            names = tuple(f.name for f in activities if self._is_free(queue, f.name))
            if names:
                found.setdefault(names, []).append(queue)
        return found

    def _is_free(self, queue: str, function: str) -> bool:
        lane = self._limits.lane(queue, function)
        return lane is None or not lane.limited

    def _leave(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A full claim may have left more of the last priority."""
        if rows:
            self._left = max(self._left, min(row["priority"] for row in rows))

    async def _claim_lanes(self, lanes: list[Lane[Any]], room: int) -> int:
        """Tasks of limited functions, lane by lane; those that wait for slots, too.

        They do not count against what is fetched of the others.
        """
        looks = {lane: self._look(lane) for lane in lanes if not lane.paused}
        waiting = await self._ready_lanes(looks)
        taken = 0
        try:
            await self._limits.want(waiting, max(1, room))
            for lane in waiting:
                taken += await self._claim_some(lane, room, looks[lane])
        finally:
            self._limits.claimed()
        for lane in lanes:
            if lane not in waiting:
                lane.backlog = False
        return taken

    async def _claim_some(self, lane: Lane[Any], room: int, look: Look) -> int:
        """As many as may start, and a little ahead."""
        count = min(
            self._limits.room(lane, max(1, room)),
            self._identity.settings.claim_items_max,
        )
        lane.backlog = True
        if _in_process(lane):
            count = min(count, self._process_room())
            self._processes_hinted = self._processes_hinted or count <= 0
        return await self._claim_lane(lane, count, look) if count > 0 else 0

    def _look(self, lane: Lane[Any]) -> Look:
        key = lane.queue, lane.function
        if key not in self._lane_marks:
            self._lane_marks[key] = LowMark(self._identity.clock)
        return self._lane_marks[key].next(key)

    async def _ready_lanes(self, looks: Mapping[Lane[Any], Look]) -> list[Lane[Any]]:
        """Those that have a task which could be claimed."""
        marks = {lane: self._lane_marks[lane.queue, lane.function] for lane in looks}
        priorities = {p for look in looks.values() for p in look.priorities}
        began = time.monotonic()
        ready = await self._store.ready_lanes(
            [(lane.queue, lane.function, look.low) for lane, look in looks.items()],
            sorted(priorities),
        )
        seconds = time.monotonic() - began
        waiting = []
        for lane, look in looks.items():
            if (lane.queue, lane.function) in ready:
                marks[lane].looked(look, seconds)
                waiting.append(lane)
            elif marks[lane].claimed(look, (), 1, seconds):
                self.tasks_hinted = True
        return waiting

    async def _claim_lane(self, lane: Lane[Any], count: int, look: Look) -> int:
        fence = {
            "worker_id": self._identity.worker_id,
            "incarnation": self._identity.incarnation,
            "claim": self._identity.claim + 1,
        }
        if lane.keyed:
            rows = await self._store.claim_keyed_tasks(
                **fence,
                queue=lane.queue,
                function=lane.function,
                count=count,
                after=lane.after,
            )
            last = rows.pop() if rows else None  # none: it is paused
            lane.backlog = True
            if last is not None:
                lane.after = last["reached"]
                if lane.after and not rows:
                    # Keys are left that were not looked at.
                    self.hint_tasks_after(KEYS_PAUSE_SECONDS)
        else:
            began = time.monotonic()
            rows = await self._store.claim_tasks(
                **fence,
                queues=[lane.queue],
                functions=[lane.function],
                count=count,
                low=look.low,
                priorities=look.priorities,
            )
            mark = self._lane_marks[lane.queue, lane.function]
            seconds = time.monotonic() - began
            lane.backlog = mark.claimed(look, rows, count, seconds)
            if lane.backlog and not lane.limited:
                self._leave(rows)
        self._identity.claim += 1
        await self._tasks.take(rows, lane.queue)
        return len(rows)

    async def _claim_computing(self, functions: list[DurableFunction[Any, Any]]) -> int:
        """Tasks of ``pool="process"``: no more than would begin at once.

        They compute, so they wait where any worker may take them.
        """
        if not functions:
            return 0
        count = min(self._process_room(), self._identity.settings.claim_items_max)
        if count <= 0:
            self._processes_hinted = True
            return 0
        rows = await self._fetch_tasks(
            queues=self._queues,
            functions=[function.name for function in functions],
            count=count,
            low=ALWAYS,
            priorities=(),
        )
        self._processes_hinted = self._processes_hinted or len(rows) >= count
        await self._tasks.take(rows)
        return len(rows)

    def hint_tasks_after(self, seconds: float) -> None:
        """Look for tasks in a while."""
        if seconds <= 0:
            self.hint_tasks()
        else:
            asyncio.get_running_loop().call_later(seconds, self.hint_tasks)

    async def _recover_claim(self) -> None:
        """Take in what a lost answer brought, or what was claimed and not taken in.

        What was known before the question or is known after it needs nothing: it may
        have left us in between.

        Raises:
            LeaseLostError: The worker was taken over.
            StoreError: The database is away again; nothing is lost by that.
        """
        identity = self._identity
        fence = await self._store.fence_state(identity.worker_id)
        if fence.incarnation != identity.incarnation:
            message = f"worker {identity.worker_id} was taken over"
            raise LeaseLostError(message)
        identity.claim = fence.claim
        self._suspects.keep(
            {(attempt.execution_id, attempt.call_id) for attempt in self.held}
            | {(execution_id, NIL) for execution_id in self._executions.residents}
        )
        self._low_mark.reset()
        self._lane_marks.clear()
        known = self._known()
        executions = await self._store.held_executions(
            identity.worker_id, identity.incarnation
        )
        tasks = await self._store.held_tasks(identity.worker_id, identity.incarnation)
        known |= self._known()
        self.hint()
        await self._adopt(
            [r for r in executions if (r["execution_id"], r["epoch"]) not in known]
        )
        await self._tasks.take(
            [row for row in tasks if (row["call_id"], row["epoch"]) not in known]
        )
        self._doubtful = False

    def _known(self) -> set[tuple[UUID, int | None]]:
        """What is here, each with the epoch under which it was taken."""
        residents = self._executions.residents.values()
        return {
            *((resident.execution_id, resident.epoch) for resident in residents),
            *self._tasks.known(),
            *((row["execution_id"], row["epoch"]) for row in self._held_back),
        }

    def drop_all(self) -> None:
        """The worker was taken over: nothing here is ours any more."""
        self._tasks.drop_all()
        self._held_back.clear()
        self._suspects.drop_all()


def _is_blocked_here(row: Any) -> bool:
    """It was blocked under our code, and is claimed because it is to be cancelled."""
    function = catalogue.find(row["function"])
    return (
        function is not None
        and row["cancel_reason"] is not None
        and row["blocked_digest"] == function.code_digest
    )


def _in_process(lane: Lane[Any]) -> bool:
    function = catalogue.find(lane.function)
    return function is not None and function.in_process


def _functions() -> list[DurableFunction[Any, Any]]:
    found = (catalogue.find(name) for name in catalogue.names())
    return [function for function in found if function is not None]
