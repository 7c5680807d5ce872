"""The one place that changes durable state: a method per named query."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from stent.errors import LeaseLostError, StoreError
from stent.journal import Turn, decode_turn
from stent.model import KEEP, Keep, QueueDepth, Recorded
from stent.rate import Rate
from stent.store.flush import Flush, Flushed
from stent.store.queries import load
from stent.store.session import Session

NIL = UUID(int=0)
"""Call id of an execution's own result and arguments."""
BELOW_ALL = -(2**15) - 1
"""Below every priority."""
_FENCED = "ST001"


@dataclass(frozen=True, slots=True)
class Fence:
    """Where a worker's two fence rows stand."""

    incarnation: int
    flush: int
    claim: int
    flushed: Flushed
    """What the last flush did not do."""


@dataclass(frozen=True, slots=True)
class Boot:
    """One life of the server; locks taken in another one prove nothing."""

    name: str
    booted_at: dt.datetime
    now: dt.datetime


@dataclass(frozen=True, slots=True)
class Suspect:
    """Another worker that may be dead."""

    worker_id: UUID
    incarnation: int
    expired: bool
    unlocked: bool
    renewed_at: dt.datetime
    """Of its lease: the last sign of life."""


class Arrival(NamedTuple):
    """One row of an inbox, with the result it announces."""

    inbox_id: int
    execution_id: UUID
    kind: str
    reason: str | None
    address: str | None
    recorded: Recorded | None


@dataclass(frozen=True, slots=True)
class Stored:
    """What the database knows of an execution, to restore it."""

    turns: list[Turn]
    results: dict[str, Recorded]
    issued: frozenset[str]
    heartbeats: dict[UUID, bytes] = field(default_factory=dict)
    """What attempts of its calls have said last, by call."""


@dataclass(slots=True)
class StoredRows:
    """The rows of ``Stored``, not read yet."""

    turns: list[bytes] = field(default_factory=list)
    results: list[asyncpg.Record] = field(default_factory=list)
    issued: list[str] = field(default_factory=list)
    heartbeats: dict[UUID, bytes] = field(default_factory=dict)

    def read(self) -> Stored:
        """Decode them.

        Raises:
            msgspec.MsgspecError: They are no journal.
        """
        return Stored(
            [decode_turn(payload) for payload in self.turns],
            {row["address"]: _recorded(row) for row in self.results},
            frozenset(self.issued),
            self.heartbeats,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewExecution:
    """A root execution to insert."""

    execution_id: UUID
    function: str
    kind: str
    queue: str
    priority: int
    delay: dt.timedelta
    duration: dt.timedelta | None
    seed: bytes
    dispatch_key: str | None
    digest: str
    options: bytes | None
    arguments: bytes
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeclaredLimit:
    """What the code says about one function."""

    name: str
    max_concurrent: int | None
    per_second: float | None
    burst: int | None
    keyed: bool


@dataclass(frozen=True, slots=True)
class StoredLimit:
    """What holds now."""

    name: str
    max_concurrent: int | None
    per_second: float | None
    burst: int | None
    keyed: bool
    paused: bool


@dataclass(frozen=True, slots=True)
class GrantAsk:
    """What a worker uses and wants of one limit; ``wanted`` includes ``used``."""

    name: str
    used: int
    wanted: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Granted:
    """What a worker may use of one limit.

    Attributes:
        slots: In all; None: the limit has none, or they are of keys.
        tokens: New ones, spent by now.
        tokens_in: Seconds until asking for more makes sense.
        waiters: Workers that want slots, when some are free again.
    """

    name: str
    slots: int | None
    tokens: int
    tokens_in: float
    waiters: list[UUID]


class Store:
    """Named queries over one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._queries = load()

    async def _fetch(self, name: str, **binds: Any) -> list[asyncpg.Record]:
        return await self.session.fetch(self._queries[name], **binds)

    async def flush(
        self, worker_id: UUID, incarnation: int, number: int, flush: Flush
    ) -> Flushed:
        """Write everything in ``flush``, in one transaction.

        Raises:
            LeaseLostError: The fence did not match: read ``fence_state``.
            StoreError: The outcome is unknown if ``retryable``, else nothing happened.
        """
        rows = await self._fetch(
            "flush",
            worker_id=worker_id,
            incarnation=incarnation,
            flush=number,
            **flush.binds(),
        )
        row = rows[0]
        if row["fenced"]:
            message = f"flush {number} of worker {worker_id} was fenced out"
            raise LeaseLostError(message)
        return Flushed(
            frozenset(row["lost"]),
            frozenset(row["busy"]),
            frozenset(row["lost_tasks"]),
            frozenset(row["busy_tasks"]),
            tuple(row["workers"]),
            tuple(zip(row["clients"], row["ended"], strict=True)),
            tuple(row["queues"]),
        )

    async def fence_state(self, worker_id: UUID) -> Fence:
        """Where the worker's fences stand; settles what an unknown outcome was.

        Raises:
            LeaseLostError: There is no such worker any more.
        """
        rows = await self._fetch("fence_state", worker_id=worker_id)
        if not rows:
            message = f"worker {worker_id} is not registered"
            raise LeaseLostError(message)
        row = rows[0]
        skipped = json.loads(row["skipped"]) if row["skipped"] else {}

        def ids(name: str) -> frozenset[UUID]:
            return frozenset(UUID(item) for item in skipped.get(name, ()))

        flushed = Flushed(
            lost=ids("lost"),
            busy=ids("busy"),
            lost_tasks=ids("lost_tasks"),
            busy_tasks=ids("busy_tasks"),
        )
        return Fence(row["incarnation"], row["flush"], row["claim"], flushed)

    async def register_worker(self, **lease: Any) -> dt.datetime:
        """Insert a worker; returns database time."""
        rows = await self._fetch("register_worker", **lease)
        now: dt.datetime = rows[0]["now"]
        return now

    async def renew_lease(
        self,
        worker_id: UUID,
        incarnation: int,
        lease: dt.timedelta,
        *,
        running: int = 0,
        residents: int = 0,
        lag_ms: int = 0,
    ) -> dt.datetime:
        """Extend the lease by ``lease`` from now; returns database time.

        The other figures are for people to look at.

        Raises:
            LeaseLostError: The worker was taken over.
        """
        rows = await self._fetch(
            "renew_lease",
            worker_id=worker_id,
            incarnation=incarnation,
            lease=lease,
            running=running,
            residents=residents,
            lag_ms=lag_ms,
        )
        if not rows:
            message = f"worker {worker_id} was taken over"
            raise LeaseLostError(message)
        now: dt.datetime = rows[0]["now"]
        return now

    async def current_boot(self) -> Boot:
        """Which life of the server this is."""
        rows: list[asyncpg.Record] = []
        while not rows:
            # None when somebody else has just written the first row of this life: it
            # stood in the way of ours and is younger than what our statement sees.
            rows = await self._fetch("current_boot")
        row = rows[0]
        return Boot(row["boot"], row["booted_at"], row["now"])

    async def record_boot(self, worker_id: UUID, boot: str | None) -> None:
        """Say under which boot the liveness lock is held."""
        await self._fetch("record_boot", worker_id=worker_id, boot=boot)

    async def set_worker_state(self, worker_id: UUID, state: str) -> None:
        """Say ``running``, ``draining`` or ``stopped``."""
        await self._fetch("set_worker_state", worker_id=worker_id, state=state)

    async def tell_functions(self, worker_id: UUID, functions: Sequence[str]) -> None:
        """Say what the worker can run, in place of what it said before."""
        await self._fetch(
            "tell_functions", worker_id=worker_id, functions=list(functions)
        )

    async def ask_worker(self, worker_id: UUID, asked: str) -> bool:
        """Ask a living worker to ``drain`` or ``stop``; False: it does not live."""
        rows = await self._fetch("ask_worker", worker_id=worker_id, asked=asked)
        return bool(rows)

    async def asked_of(self, worker_id: UUID) -> str | None:
        """What the worker was asked to do, if anything."""
        rows = await self._fetch("asked_of", worker_id=worker_id)
        return rows[0]["asked"] if rows else None

    async def worker_exists(self, worker_id: UUID) -> bool:
        """Whether there is a worker of this id, or was one until a day ago."""
        return bool(await self._fetch("worker_exists", worker_id=worker_id))

    async def list_workers(
        self, *, host: str | None, ended: bool, count: int
    ) -> list[asyncpg.Record]:
        """Workers that live, or with ``ended`` all that are remembered."""
        return await self._fetch("list_workers", host=host, ended=ended, count=count)

    async def suspects(
        self, worker_id: UUID, boot: Boot, lease: dt.timedelta, *, alone: bool
    ) -> list[Suspect]:
        """All other workers, and what speaks against each."""
        rows = await self._fetch(
            "suspects",
            worker_id=worker_id,
            boot=boot.name,
            booted_at=boot.booted_at,
            lease=lease,
            alone=alone,
        )
        return [Suspect(*row.values()) for row in rows]

    async def take_over(
        self, worker_id: UUID, incarnation: int, state: str = "lost"
    ) -> tuple[int, int] | None:
        """Free what a worker held; None when somebody else did.

        Returns:
            Numbers of executions and tasks freed.
        """
        rows = await self._fetch(
            "take_over", worker_id=worker_id, incarnation=incarnation, state=state
        )
        return (rows[0]["executions"], rows[0]["tasks"]) if rows else None

    async def forget_workers(self) -> None:
        """Delete rows of workers that ended a day ago."""
        await self._fetch("forget_workers")

    async def claim_executions(self, **claim: Any) -> list[asyncpg.Record]:
        """Take executions; raises LeaseLostError when the fence does not match."""
        return await self._claim("claim_executions", claim)

    async def claim_tasks(self, **claim: Any) -> list[asyncpg.Record]:
        """Take tasks, in the order in which they should begin.

        Args:
            **claim: Of the statement; ``above``: only of a higher priority than that;
                ``waited``: only what has been ready for so many seconds.

        Raises:
            LeaseLostError: The fence does not match.
        """
        rows = await self._claim(
            "claim_tasks", {"above": BELOW_ALL, "waited": 0.0} | claim
        )
        # Claimed in order of priority and age, but returned as they lie on the disk.
        rows.sort(key=lambda row: (-row["priority"], row["available_at"]))
        return rows

    async def _claim(self, name: str, claim: dict[str, Any]) -> list[asyncpg.Record]:
        try:
            return await self._fetch(name, **claim)
        except StoreError as error:
            if getattr(error.__cause__, "sqlstate", None) == _FENCED:
                message = f"claim {claim['claim']} was fenced out"
                raise LeaseLostError(message) from error
            raise

    async def held_executions(
        self, worker_id: UUID, incarnation: int
    ) -> list[asyncpg.Record]:
        """Executions this incarnation owns."""
        return await self._fetch(
            "held_executions", worker_id=worker_id, incarnation=incarnation
        )

    async def held_tasks(
        self, worker_id: UUID, incarnation: int
    ) -> list[asyncpg.Record]:
        """Tasks this incarnation holds."""
        return await self._fetch(
            "held_tasks", worker_id=worker_id, incarnation=incarnation
        )

    async def load_stored(
        self, execution_ids: Sequence[UUID]
    ) -> dict[UUID, StoredRows]:
        """Everything needed to restore executions, once their epochs are ours."""
        found = {execution_id: StoredRows() for execution_id in execution_ids}
        ids = list(execution_ids)
        for row in await self._fetch("load_turns", execution_ids=ids):
            found[row["execution_id"]].turns.append(row["payload"])
        # In this order: a call that is settled in between has its task in the first
        # answer and its result in the second. The other way round it would be in
        # neither, and replay would take it for one that was never made.
        for row in await self._fetch("load_issued", execution_ids=ids):
            found[row["execution_id"]].issued.append(row["address"])
        for row in await self._fetch("load_results", execution_ids=ids):
            found[row["execution_id"]].results.append(row)
        for row in await self._fetch("load_execution_heartbeats", execution_ids=ids):
            beats = found[row["execution_id"]].heartbeats
            beats[row["call_id"]] = row["payload"]
        return found

    async def load_issued(self, execution_ids: Sequence[UUID]) -> dict[UUID, list[str]]:
        """Addresses of calls that have a task or are children, by execution."""
        found: dict[UUID, list[str]] = {each: [] for each in execution_ids}
        ids = list(execution_ids)
        for row in await self._fetch("load_issued", execution_ids=ids):
            found[row["execution_id"]].append(row["address"])
        return found

    async def load_blocked_reasons(
        self, execution_ids: Sequence[UUID]
    ) -> dict[UUID, str | None]:
        """Why executions were blocked, as far as they were."""
        ids = list(execution_ids)
        rows = await self._fetch("load_blocked_reasons", execution_ids=ids)
        return {row["execution_id"]: row["blocked_reason"] for row in rows}

    async def load_segments(self, execution_id: UUID, call_id: UUID) -> list[bytes]:
        """Finished items of a page, in parts."""
        rows = await self._fetch(
            "load_segments", execution_id=execution_id, call_id=call_id
        )
        return [row["payload"] for row in rows]

    async def undelivered(
        self, worker_id: UUID, known: Iterable[int], count: int
    ) -> list[Arrival]:
        """Inbox rows of this worker's executions that are not among ``known``."""
        rows = await self._fetch(
            "undelivered", worker_id=worker_id, known=list(known), count=count
        )
        return [_arrival(row) for row in rows]

    async def tasks_gone(
        self, worker_id: UUID, tasks: Sequence[tuple[UUID, UUID, int]]
    ) -> set[tuple[UUID, int]]:
        """Those among ``tasks`` (execution, call, epoch) that are not ours now.

        Returns:
            Call and epoch of each.
        """
        rows = await self._fetch("tasks_gone", worker_id=worker_id, **_columns(tasks))
        return {(row["call_id"], row["epoch"]) for row in rows}

    async def give_back(
        self, worker_id: UUID, tasks: Sequence[tuple[UUID, UUID, int]]
    ) -> None:
        """Let others claim those of ``tasks`` that are this worker's."""
        await self._fetch("give_back", worker_id=worker_id, **_columns(tasks))

    async def drop_ended_tasks(
        self, worker_id: UUID, tasks: Sequence[tuple[UUID, UUID, int]]
    ) -> None:
        """Delete those among ``tasks`` of this worker whose execution has ended."""
        await self._fetch("drop_ended_tasks", worker_id=worker_id, **_columns(tasks))

    async def drop_tasks_of(self, execution_id: UUID, count: int) -> None:
        """Delete what an execution that has ended left to be claimed."""
        await self._fetch("drop_tasks_of", execution_id=execution_id, count=count)

    async def declare_limits(
        self, worker_id: UUID, limits: Sequence[DeclaredLimit]
    ) -> None:
        """Write what the code of a worker says of all its functions."""
        await self._fetch(
            "declare_limits",
            worker_id=worker_id,
            names=[limit.name for limit in limits],
            max_concurrent=[limit.max_concurrent for limit in limits],
            rates=[limit.per_second for limit in limits],
            bursts=[limit.burst for limit in limits],
            keyed=[limit.keyed for limit in limits],
        )

    async def settle_declared_limits(self) -> None:
        """Make what is declared what the living workers say, the strictest of them."""
        await self._fetch("settle_declared_limits")

    async def load_limits(self) -> list[StoredLimit]:
        """Every limit that limits anything."""
        return [StoredLimit(*row.values()) for row in await self._fetch("load_limits")]

    async def adjust_grants(
        self, worker_id: UUID, incarnation: int, asks: Sequence[GrantAsk]
    ) -> list[Granted]:
        """Say what this worker uses and wants, learn what it may use.

        Raises:
            LeaseLostError: The worker was taken over.
            StoreError: The outcome is unknown if ``retryable``: ask again.
        """
        try:
            rows = await self._fetch(
                "adjust_grants",
                worker_id=worker_id,
                incarnation=incarnation,
                names=[ask.name for ask in asks],
                used=[ask.used for ask in asks],
                wanted=[ask.wanted for ask in asks],
                tokens=[ask.tokens for ask in asks],
            )
        except StoreError as error:
            if getattr(error.__cause__, "sqlstate", None) == _FENCED:
                message = f"worker {worker_id} was taken over"
                raise LeaseLostError(message) from error
            raise
        return [Granted(*row.values()) for row in rows]

    async def release_later(
        self,
        worker_id: UUID,
        execution_id: UUID,
        call_id: UUID,
        epoch: int,
        delay: dt.timedelta,
    ) -> bool:
        """Give a task back for ``delay``, its attempt not counted; False: not ours."""
        return bool(
            await self._fetch(
                "release_later",
                worker_id=worker_id,
                execution_id=execution_id,
                call_id=call_id,
                epoch=epoch,
                delay=delay,
            )
        )

    async def close_buckets(self, names: Sequence[str], delay: dt.timedelta) -> None:
        """No tokens for ``delay``."""
        await self._fetch("close_buckets", names=list(names), delay=delay)

    async def ready_lanes(
        self,
        lanes: Sequence[tuple[str, str, dt.datetime]],
        priorities: Sequence[int],
    ) -> set[tuple[str, str]]:
        """Which (queue, function) have a task that could be claimed.

        Args:
            lanes: Queue, function and the mark below which nothing is looked at.
            priorities: Looked at by name; the others are looked for.
        """
        rows = await self._fetch(
            "ready_lanes",
            queues=[queue for queue, _, _ in lanes],
            functions=[function for _, function, _ in lanes],
            lows=[low for _, _, low in lanes],
            priorities=list(priorities),
        )
        return {(row["queue"], row["function"]) for row in rows}

    async def claim_keyed_tasks(self, **claim: Any) -> list[asyncpg.Record]:
        """See ``claim_keyed_tasks_after`` in the schema."""
        return await self._claim("claim_keyed_tasks", claim)

    async def claim_stopping_executions(self, **claim: Any) -> list[asyncpg.Record]:
        """See the function of this name in the schema."""
        return await self._claim("claim_stopping_executions", claim)

    async def claim_limited_executions(self, **claim: Any) -> list[asyncpg.Record]:
        """See ``claim_limited_executions_after`` in the schema."""
        return await self._claim("claim_limited_executions", claim)

    async def set_limit(
        self, name: str, max_concurrent: int | Keep | None, rate: Rate | Keep | None
    ) -> None:
        """Set a limit over what the code declares."""
        given = rate if isinstance(rate, Rate) else None
        await self._fetch(
            "set_limit",
            limit_name=name,
            keep_slots=max_concurrent is KEEP,
            max_concurrent=None if max_concurrent is KEEP else max_concurrent,
            keep_rate=rate is KEEP,
            rate=None if given is None else given.per_second,
            burst=None if given is None else given.burst,
        )

    async def reset_limit(self, name: str) -> bool:
        """Back to what the code declares; False: there is no such limit."""
        return bool(await self._fetch("reset_limit", limit_name=name))

    async def set_paused(self, name: str, *, paused: bool) -> None:
        """Start nothing of a function or queue, or start it again."""
        await self._fetch("set_paused", limit_name=name, paused=paused)

    async def list_limits(self, count: int) -> list[asyncpg.Record]:
        """Limits with what is in use."""
        return await self._fetch("list_limits", count=count)

    async def dispatch(
        self, new: Sequence[NewExecution], client_id: UUID | None
    ) -> set[UUID]:
        """Insert root executions, all or none; a taken dispatch key leaves one out.

        Returns:
            Ids of those inserted.
        """
        query = self._queries["dispatch"]
        binds = {
            "execution_ids": [n.execution_id for n in new],
            "functions": [n.function for n in new],
            "kinds": [n.kind for n in new],
            "queues": [n.queue for n in new],
            "priorities": [n.priority for n in new],
            "delays": [n.delay for n in new],
            "durations": [n.duration for n in new],
            "seeds": [n.seed for n in new],
            "dispatch_keys": [n.dispatch_key for n in new],
            "digests": [n.digest for n in new],
            "options": [n.options for n in new],
            "arguments": [n.arguments for n in new],
            "client_id": client_id,
        }
        tagged = [n for n in new if n.tags]
        if not tagged:
            rows = await self._fetch("dispatch", **binds)
            return {row["execution_id"] for row in rows}
        tag = self._queries["set_tags"]

        async def insert(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                rows = await connection.fetch(query.sql, *query.arguments(binds))
                await connection.executemany(
                    tag.sql,
                    [
                        tag.arguments(
                            {"tags": list(n.tags), "execution_id": n.execution_id}
                        )
                        for n in tagged
                    ],
                )
                return list(rows)

        inserted = await self.session.run(insert, "dispatch")
        return {row["execution_id"] for row in inserted}

    async def find_dispatch_keys(self, keys: list[str]) -> list[asyncpg.Record]:
        """Who has these keys: function, digest of the arguments, execution id."""
        return await self._fetch("find_dispatch_keys", dispatch_keys=keys)

    async def ensure_partitions(self, instants: Sequence[dt.datetime]) -> None:
        """Create the partitions that contain these instants."""
        await self._fetch("ensure_partitions", instants=list(instants))

    async def end_unstarted(self, execution_id: UUID, payload: bytes) -> bool:
        """Cancel an execution that never started; False if it has."""
        rows = await self._fetch(
            "end_unstarted", execution_id=execution_id, payload=payload
        )
        return bool(rows)

    async def ask_to_stop(
        self, execution_id: UUID, grace: dt.timedelta
    ) -> tuple[UUID | None, str] | None:
        """Put a cancellation into the inbox.

        Returns:
            Its owner and its queue; None if it has finished, or does not exist.
        """
        rows = await self._fetch("ask_to_stop", execution_id=execution_id, grace=grace)
        return (rows[0]["worker_id"], rows[0]["queue"]) if rows else None

    async def tidy(self, count: int) -> int:
        """Delete up to ``count`` rows of each kind that outlived their execution."""
        deleted: int = (await self._fetch("tidy", count=count))[0]["count"]
        return deleted

    async def suspects_among(
        self, claimed: Sequence[tuple[UUID, UUID]]
    ) -> dict[tuple[UUID, UUID], int]:
        """Which (execution, call) were lost with a worker, and how often."""
        rows = await self._fetch(
            "suspects_among",
            execution_ids=[one[0] for one in claimed],
            call_ids=[one[1] for one in claimed],
        )
        return {(row["execution_id"], row["call_id"]): row["lost"] for row in rows}

    async def mark_suspects(self, begun: Sequence[tuple[UUID, UUID, int]]) -> None:
        """Say that these (execution, call, epoch) begin now."""
        await self._fetch(
            "mark_suspects",
            execution_ids=[one[0] for one in begun],
            call_ids=[one[1] for one in begun],
            epochs=[one[2] for one in begun],
        )

    async def withdraw_marks(self, marks: Sequence[tuple[UUID, UUID, int]]) -> None:
        """What is lost now of these (execution, call, epoch) does not count."""
        await self._fetch(
            "withdraw_marks",
            execution_ids=[one[0] for one in marks],
            call_ids=[one[1] for one in marks],
            epochs=[one[2] for one in marks],
        )

    async def clear_suspects(self, cleared: Sequence[tuple[UUID, UUID]]) -> None:
        """These (execution, call) are not suspected any more."""
        await self._fetch(
            "clear_suspects",
            execution_ids=[one[0] for one in cleared],
            call_ids=[one[1] for one in cleared],
        )

    async def tidy_suspects(self, count: int) -> int:
        """Delete rows about what is not there any more; returns their number."""
        deleted: int = (await self._fetch("tidy_suspects", count=count))[0]["count"]
        return deleted

    async def take_duty(self, duty: str, every: dt.timedelta) -> bool:
        """True for one caller every ``every``."""
        taken: bool = (await self._fetch("take_duty", duty=duty, every=every))[0][0]
        return taken

    async def forget(
        self, older_than: dt.timedelta, after: UUID, count: int
    ) -> tuple[int, UUID | None]:
        """Delete the rows of finished executions, among ``count`` from ``after`` on.

        Returns:
            How many are gone, and where to go on; None: there are no more.
        """
        rows = await self._fetch(
            "forget", older_than=older_than, after=after, count=count
        )
        return rows[0]["forgotten"], rows[0]["next_after"]

    async def erase(self, count: int) -> int | None:
        """Delete up to ``count`` rows of forgotten executions; None: none left."""
        erased: int | None = (await self._fetch("erase", count=count))[0]["erased"]
        return erased

    async def drop_partition(self, older_than: dt.timedelta) -> str | None:
        """Drop a partition without executions; None: there is none, or it is used."""
        rows = await self._fetch("drop_partition", older_than=older_than)
        dropped: str | None = rows[0]["dropped"]
        return dropped

    async def write_heartbeats(
        self, worker_id: UUID, incarnation: int, items: Sequence[tuple[Any, ...]]
    ) -> None:
        """Keep details of running attempts; those of others' work are left out.

        Args:
            worker_id: Who runs them.
            incarnation: Under which it does.
            items: As of ``stent.heartbeat_item``, in ascending order of their keys.
        """
        await self._fetch(
            "write_heartbeats",
            worker_id=worker_id,
            incarnation=incarnation,
            items=list(items),
        )

    async def load_heartbeats(
        self, calls: Sequence[tuple[UUID, UUID]], pages: Sequence[tuple[UUID, UUID]]
    ) -> dict[UUID, dict[UUID, bytes]]:
        """What earlier attempts of tasks have said.

        Args:
            calls: (execution, call) of tasks that are one call.
            pages: The same of pages of maps.
        Returns:
            Details by call, those of items by the calls they may become, by task.
        """
        tasks = [*calls, *pages]
        rows = await self._fetch(
            "load_heartbeats",
            execution_ids=[execution_id for execution_id, _ in tasks],
            call_ids=[call_id for _, call_id in tasks],
            are_pages=[False] * len(calls) + [True] * len(pages),
        )
        found: dict[UUID, dict[UUID, bytes]] = {}
        for row in rows:
            found.setdefault(row["asked_id"], {})[row["call_id"]] = row["payload"]
        return found

    async def tidy_heartbeats(self, count: int) -> int:
        """Delete up to ``count`` heartbeats that nobody will read."""
        rows = await self._fetch("tidy_heartbeats", count=count)
        deleted: int = rows[0]["count"]
        return deleted

    async def status_of(self, execution_id: UUID) -> asyncpg.Record | None:
        """Status in short; None when there is no such execution."""
        rows = await self._fetch("status_of", execution_id=execution_id)
        return rows[0] if rows else None

    async def outcomes(self, execution_ids: Sequence[UUID]) -> list[asyncpg.Record]:
        """Status, and the outcome where there is one."""
        return await self._fetch("outcomes", execution_ids=list(execution_ids))

    async def queue_depth(self, queue: str | None, rows_max: int) -> list[QueueDepth]:
        """How much waits and runs, counted up to ``rows_max`` rows a line."""
        rows = await self._fetch("queue_depth", queue=queue, rows_max=rows_max)
        return [_depth(row) for row in rows]

    async def sweep(
        self, count: int, grace: dt.timedelta, cancelled: bytes, timed_out: bytes
    ) -> list[asyncpg.Record]:
        """End executions whose time is over and whose owner does not."""
        return await self._fetch(
            "sweep", count=count, grace=grace, cancelled=cancelled, timed_out=timed_out
        )

    async def result_of_call(
        self, execution_id: UUID, call_id: UUID
    ) -> Recorded | None:
        """The committed result of a call."""
        rows = await self._fetch(
            "result_of_call", execution_id=execution_id, call_id=call_id
        )
        return Recorded(rows[0]["ok"], rows[0]["payload"]) if rows else None

    async def transaction_has_ended(self, transaction_id: str) -> bool:
        """Whether a lost connection's transaction is committed or rolled back."""
        rows = await self._fetch("transaction_ended", transaction_id=transaction_id)
        ended: bool = rows[0]["ended"]
        return ended

    async def notify(self, hints: Sequence[tuple[str, str]]) -> None:
        """Send wake-up hints: (channel, payload)."""
        await self._fetch(
            "notify",
            channels=[channel for channel, _ in hints],
            payloads=[payload for _, payload in hints],
        )


def _columns(tasks: Sequence[tuple[UUID, UUID, int]]) -> dict[str, list[Any]]:
    return {
        "execution_ids": [task[0] for task in tasks],
        "call_ids": [task[1] for task in tasks],
        "epochs": [task[2] for task in tasks],
    }


def _arrival(row: asyncpg.Record) -> Arrival:
    recorded = None
    if row["payload"] is not None:
        recorded = _recorded(row, took(row["started_at"], row["finished_at"]))
    return Arrival(
        row["inbox_id"],
        row["execution_id"],
        row["kind"],
        row["reason"],
        row["address"],
        recorded,
    )


def _recorded(row: asyncpg.Record, took_us: int | None = None) -> Recorded:
    if not row["segments"] or not row["ok"]:
        return Recorded(row["ok"], row["payload"], took_us)
    parts = merge_parts([*row["segments"], row["payload"]])
    return Recorded(ok=True, payload=parts, took_us=took_us)


def took(started_at: dt.datetime | None, ended_at: dt.datetime | None) -> int | None:
    """Microseconds between two instants, if both are known."""
    if started_at is None or ended_at is None:
        return None
    delta = ended_at - started_at
    seconds = delta.days * 86_400 + delta.seconds
    return max(0, seconds * 1_000_000 + delta.microseconds)


_parts = msgspec.json.Decoder(tuple[list[int], list[msgspec.Raw]])
_encoder = msgspec.json.Encoder()


def part_of_page(indexes: Sequence[int], values: bytes) -> bytes:
    """Some items of a page: their indexes, and their encoded list."""
    return b"[" + _encoder.encode(list(indexes)) + b"," + values[1:] + b"]"


def part_indexes(part: bytes) -> list[int]:
    """Which items of its page a part holds."""
    return _parts.decode(part)[0]


def merge_parts(parts: Iterable[bytes]) -> bytes:
    """The encoded list of a whole page, from its parts."""
    items: dict[int, msgspec.Raw] = {}
    for part in parts:
        items.update(zip(*_parts.decode(part), strict=True))
    return b"\x01" + _encoder.encode([items[index] for index in sorted(items)])


def _depth(row: asyncpg.Record) -> QueueDepth:
    facts = dict(row)
    seconds = facts.pop("oldest_ready_seconds")
    age = None if seconds is None else dt.timedelta(seconds=seconds)
    return QueueDepth(**facts, oldest_ready=age)
