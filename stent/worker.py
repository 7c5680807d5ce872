"""A worker: claims, advances and runs, until it is told to stop.

Composes the services in one task group. It uses four connections (writer, claimer,
lease, listener) and those of transactional activities.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import anyio
from anyio import to_thread
from anyio.abc import TaskStatus

from stent.clock import DatabaseClock
from stent.errors import LeaseLostError, StoreError
from stent.hooks import worker_hooks
from stent.log import (
    LEASE_LOST,
    WORKER_DRAIN_STARTED,
    WORKER_DRAINED,
    WORKER_STARTED,
    WORKER_STOPPED,
    get_logger,
    silence_replay,
)
from stent.model import Order, WorkerHealth
from stent.registry import catalogue
from stent.services.activities import Activities
from stent.services.attempts import Starter
from stent.services.claims import Claimer
from stent.services.collector import rare_full_collections
from stent.services.heartbeats import Heartbeats
from stent.services.identity import Identity
from stent.services.limits import Limits
from stent.services.liveness import (
    LAG_SECONDS_MAX,
    Figures,
    LeaseKeeper,
    Reports,
    take_liveness_lock,
)
from stent.services.orders import Orders
from stent.services.retention import Retention
from stent.services.transactions import TransactionPool
from stent.services.turn_items import Ending
from stent.services.turns import Executions, OnEnded
from stent.services.wakeups import Duties, Inboxes
from stent.services.writer import Writer
from stent.settings import Settings
from stent.store.flush import Flushed
from stent.store.listen import (
    LIMITS_CHANNEL,
    Hinter,
    Listener,
    client_channel,
    queue_channel,
    worker_channel,
)
from stent.store.session import Revive, Session
from stent.store.store import Store
from stent.version import __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = get_logger(__name__)

QUEUES = ("default",)
"""What a worker serves unless told otherwise."""
LOCK_SECONDS_MAX = 5.0
"""How long a starting worker waits for its liveness lock; the lease holds without."""
LEASE_COMMAND_SECONDS = 3.0
"""How long a renewal may take; less than the lease by far."""
PAGES_LOOK_SECONDS = 0.05
"""How often a draining worker looks for pages whose items only wait."""
RELEASE_LOOK_SECONDS = 0.002
"""How often a draining worker looks whether all executions are handed over."""
NAMES_LOGGED_MAX = 10
"""Activities that a draining worker names."""
CLOSE_SECONDS_MAX = 25.0
"""How long closing may take: processes, threads, the keeper, connections."""
KEEPER_SECONDS_MAX = 30.0
"""A lease keeper that has not finished a look for this long is stuck."""
TASKS, EXECUTIONS, INBOX, ORDER, LIMITS = "t", "e", "i", "o", "l"
"""Payloads of hints to workers."""


@dataclass(frozen=True, slots=True)
class _Sessions:
    """The four connections of a worker."""

    writer: Session
    claimer: Session
    listener: Session
    lease: Session

    @classmethod
    def of(cls, settings: Settings, url: str, revive: Revive | None) -> _Sessions:
        """Describe them; the last two need a server, not a transaction pooler."""
        direct, seconds = settings.direct_url or url, settings.command_timeout
        timeout = seconds.total_seconds()

        def session(name: str, to: str, command_timeout: float = timeout) -> Session:
            return Session(to, name, command_timeout=command_timeout, revive=revive)

        return cls(
            writer=session("writer", url),
            claimer=session("claimer", url),
            listener=session("listener", direct),
            lease=session("lease", direct, LEASE_COMMAND_SECONDS),
        )

    async def close(self) -> None:
        """Close what the keeper's thread has not closed itself."""
        for session in (self.writer, self.claimer, self.listener):
            await session.close()


class Worker:
    """One worker in this process; ``run`` it once."""

    def __init__(  # noqa: PLR0913 - composed in one place
        self,
        settings: Settings,
        url: str,
        *,
        start_execution: Starter,
        queues: Iterable[str] = QUEUES,
        slots: int | None = None,
        revive: Revive | None = None,
        alone: Callable[[], bool] = lambda: False,
        tell_client: Callable[[UUID, UUID], bool] = lambda _client, _ended: False,
        on_ended: OnEnded | None = None,
        listen_also: Mapping[str, Callable[[str], None]] | None = None,
    ) -> None:
        """Describe a worker; nothing is opened before ``run``.

        Args:
            settings: Of the process.
            url: The database.
            start_execution: Starts executions for activities.
            queues: Served by this worker.
            slots: Attempts at the same time; default ``settings.max_concurrency``.
            revive: Starts an embedded server again.
            alone: Whether no other process can be using the server.
            tell_client: Told which client waited for which ended execution; True if
                that client is in this process.
            on_ended: Told the outcome of every execution that ends here.
            listen_also: Further channels for this worker's listening connection, and
                who takes their hints.
        """
        self.queues = frozenset(queues)
        self.slots = slots or settings.max_concurrency
        self.identity = Identity(uuid4(), settings, DatabaseClock())
        self._settings = settings
        self._listen_also = dict(listen_also or {})
        self._tell_client = tell_client
        self._liveness_key = secrets.randbits(62)
        self._sessions = _Sessions.of(settings, url, revive)
        self._store = Store(self._sessions.claimer)
        self._hinter = Hinter(self._store)
        self._listener = self._make_listener()
        self._keeper = self._make_keeper(alone)
        self._compose(
            start_execution,
            TransactionPool(
                url,
                self.identity,
                self._store,
                hint_owner=self._hint_owner,
                hint_inboxes=lambda queue: self.hint_queue(queue, INBOX),
            ),
        )
        self.orders = Orders(self._store, self.identity, self._obey)
        self._functions: tuple[str, ...] = ()
        self._lease_until = 0.0
        self._state = "starting"
        self._handing_over = self._leaving = False
        self._on_ended = on_ended
        self.executions.on_ended = self._ended
        self.claimer.on_key_free = lambda queue: self._hinter.send(
            queue_channel(queue), TASKS
        )
        self._stopped_limited = 0
        self._lost = anyio.Event()
        self._locked = anyio.Event()
        self._stop = anyio.Event()
        self._hurry = anyio.Event()

    def _compose(self, start: Starter, transactions: TransactionPool) -> None:
        """Create the services that act, and tell them of each other."""
        store, identity = self._store, self.identity
        self._transactions = transactions
        self.writer = Writer(Store(self._sessions.writer), identity, hint=self._flushed)
        self.limits: Limits[Any] = Limits(
            store,
            identity,
            queues=self.queues,
            hint_worker=lambda waiter: self._hinter.send(
                worker_channel(waiter), LIMITS
            ),
        )
        self.heartbeats = Heartbeats(store, identity)
        self.activities = Activities(
            identity,
            slots=self.slots,
            transactions=transactions,
            start=start,
            limits=self.limits,
            heartbeats=self.heartbeats,
        )
        self.executions = Executions(
            identity,
            self.writer,
            self.activities,
            queues=self.queues,
            hints=_QueueHints(self),
        )
        self.claimer = Claimer(
            store,
            identity,
            self.executions,
            self.activities,
            self.writer,
            self.limits,
            queues=self.queues,
        )
        self.inboxes = Inboxes(store, identity, self.executions)
        self.executions.read_inboxes = self.inboxes.hint
        self.retention = Retention(store, identity)
        self.duties = Duties(
            store,
            identity,
            self.executions,
            self.activities,
            self.claimer.held,
            release_overdue=self.claimer.release_overdue,
            hint_workers=self._hint_workers,
            hint_client=self._hint_client,
        )

    def _make_listener(self) -> Listener:
        channels = [
            worker_channel(self.identity.worker_id),
            *(queue_channel(queue) for queue in self.queues),
            LIMITS_CHANNEL,
            *self._listen_also,
        ]
        return Listener(
            self._sessions.listener,
            channels,
            self._heard,
            on_connected=self._lock_listener,
        )

    def _make_keeper(self, alone: Callable[[], bool]) -> LeaseKeeper:
        reports = Reports(
            renewed=self._keeper_renewed,
            lost=self._noticed_loss,
            took_over=self._took_over,
        )
        return LeaseKeeper(
            self._sessions.lease,
            self.identity,
            self._liveness_key,
            reports,
            figures=self._figures,
            alone=alone,
        )

    @property
    def has_room(self) -> bool:
        """Whether it can take on more at once."""
        return self.executions.room > 0 and self.activities.room > 0

    @property
    def worker_id(self) -> UUID:
        """Fresh per worker."""
        return self.identity.worker_id

    def stop(self) -> None:
        """Drain and end; a second call hurries."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _obey(self, order: Order) -> None:
        """An order is no second call: who drains already goes on draining."""
        self._stop.set()
        if order is Order.STOP:
            self._hurry.set()

    def health(self) -> WorkerHealth:
        """How it is now; waits for nothing and is safe in any thread."""
        now, lease = time.monotonic(), self._settings.lease.total_seconds()
        state = "draining" if self._stop.is_set() else "running"
        if self._state != "running":
            state = self._state
        lag = 0.0 if self._state == "starting" else self._keeper.lag_seconds
        # The worker's own figure is old while its loop is blocked.
        until = max(self._lease_until, self._keeper.renewed_at + lease)
        left = max(0.0, until - now) if self._state != "starting" else 0.0
        missed = lease - left >= 2 * self._settings.lease_renew_every.total_seconds()
        kept = now - self._keeper.looked_at < KEEPER_SECONDS_MAX
        return WorkerHealth(
            id=str(self.worker_id),
            pid=os.getpid(),
            state=state,
            live=self._state == "starting" or (lag < lease and kept),
            ready=state == "running"
            and self.claimer.accepting
            and not missed
            and left > 0
            and lag < LAG_SECONDS_MAX,
            running=self.activities.used,
            slots=self.slots,
            residents=len(self.executions.residents),
            lag=timedelta(seconds=round(lag, 3)),
            lease_left=timedelta(seconds=round(left, 3)),
        )

    async def run(
        self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Work until ``stop``; reports started once it claims.

        Raises:
            StoreError: The database refuses it.
            WorkerHookError: A hook of ``on_worker_start`` failed.
        """
        silence_replay()
        with rare_full_collections():
            async with worker_hooks():
                await self._run(task_status)

    async def _run(self, task_status: TaskStatus[None]) -> None:
        await self._register()
        await self.limits.declare()
        self._keeper.start()
        # From here on others notice within a second that this process was killed.
        with anyio.move_on_after(LOCK_SECONDS_MAX):
            await self._locked.wait()
        try:
            async with anyio.create_task_group() as group:
                for service in (
                    self._listener.run,
                    self._hinter.run,
                    self._work,
                    self._guard_lease,
                    self.orders.run,
                ):
                    group.start_soon(service)
                log.info(
                    WORKER_STARTED,
                    worker_id=str(self.worker_id),
                    slots=self.slots,
                    queues=sorted(self.queues),
                )
                self._state = "running"
                task_status.started()
                await self._stop.wait()
                await self._drain()
                group.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(CLOSE_SECONDS_MAX, shield=True):
                await self._close()

    async def _register(self) -> None:
        settings, identity = self._settings, self.identity
        self._functions = tuple(catalogue.names())
        sent = time.monotonic()
        now = await self._store.register_worker(
            worker_id=identity.worker_id,
            lease=settings.lease,
            liveness_key=self._liveness_key,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            app_version=settings.app_version or "",
            slots=self.slots,
            queues=sorted(self.queues),
            functions=self._functions,
        )
        identity.clock.observe(now, sent, time.monotonic())
        self._renewed(sent)

    async def _work(self) -> None:
        """Run the services that act; start over as a new incarnation when fenced."""
        while True:
            try:
                async with anyio.create_task_group() as group:
                    self._lost = anyio.Event()
                    group.start_soon(_until_lost, self.writer.run, self._noticed_loss)
                    group.start_soon(_until_lost, self.claimer.run, self._noticed_loss)
                    group.start_soon(_until_lost, self.limits.run, self._noticed_loss)
                    group.start_soon(self.inboxes.run)
                    group.start_soon(self.heartbeats.run)
                    group.start_soon(self.duties.run)
                    group.start_soon(self.retention.run)
                    await self._lost.wait()
                    group.cancel_scope.cancel()
            finally:
                if self._lost.is_set():
                    self._drop_everything()
            await self._rejoin()

    def _drop_everything(self) -> None:
        """Somebody took our work: cancel it all, write none of it."""
        log.error(LEASE_LOST, worker_id=str(self.worker_id))
        self.executions.drop_all()
        self.activities.stop_all()
        self.limits.drop_all()
        self.heartbeats.drop_all()
        self.claimer.drop_all()
        self.writer.drop_all()

    async def _rejoin(self) -> None:
        """Go on under the incarnation that the taker-over left us."""
        identity = self.identity
        while True:
            try:
                fence = await self._store.fence_state(identity.worker_id)
                if fence.incarnation == identity.incarnation:
                    # Nobody took it over: the server knows less than it has confirmed,
                    # as after a failover to a standby that lagged behind.
                    await self._store.take_over(
                        identity.worker_id, identity.incarnation, "running"
                    )
                    continue
                identity.incarnation = fence.incarnation
                identity.flush, identity.claim = fence.flush, fence.claim
                await self._renew_before_running()
                state = "draining" if self._stop.is_set() else "running"
                await self._store.set_worker_state(identity.worker_id, state)
                break
            except LeaseLostError:
                await self._register()
                identity.incarnation, identity.flush, identity.claim = 1, 0, 0
                break
            except StoreError as error:
                if not error.retryable:
                    raise
                await anyio.sleep(0.2)
        self._keeper.renew_soon()
        self.claimer.hint()

    async def _renew_before_running(self) -> None:
        """A running worker with the lease of its last incarnation is taken over again.

        Raises:
            StoreError: The database is away, or it was taken over in this moment: try
                again.
        """
        sent, identity = time.monotonic(), self.identity
        try:
            await self._store.renew_lease(
                identity.worker_id, identity.incarnation, self._settings.lease
            )
        except LeaseLostError as error:
            raise StoreError(str(error), retryable=True) from error
        self._renewed(sent)

    def _keeper_renewed(self, sent: float) -> None:
        self._locked.set()
        self._functions = tuple(catalogue.names())
        self._renewed(sent)

    def _figures(self) -> Figures:
        """For the lease; asked in the keeper's thread."""
        return Figures(
            self.activities.used,
            len(self.executions.residents),
            self._functions,
        )

    def _renewed(self, sent: float) -> None:
        self._lease_until = sent + self._settings.lease.total_seconds()
        margin = self._settings.lease_margin.total_seconds()
        self.activities.extend_lease(self._lease_until - margin)

    def _noticed_loss(self) -> None:
        # What it gave back itself when it left is not lost; it must not rejoin.
        if not self._leaving:
            self._lost.set()

    def _took_over(self) -> None:
        self.claimer.hint()
        for queue in self.queues:
            self._hinter.send(queue_channel(queue), EXECUTIONS)
            self._hinter.send(queue_channel(queue), TASKS)
        # The slots of who was lost are free, here and for others.
        self.limits.hint()
        self._hinter.send(LIMITS_CHANNEL)

    async def _guard_lease(self) -> None:
        """Start nothing while the lease is about to run out."""
        margin = self._settings.lease_margin.total_seconds()
        while True:
            left = self._lease_until - margin - time.monotonic()
            cut_off = left <= 0
            if cut_off is self.claimer.accepting and not self._stop.is_set():
                log.warning("lease.running_out" if cut_off else "lease.renewed_again")
            if not self._stop.is_set():
                self.claimer.accepting = not cut_off
                self.activities.set_accepting(not cut_off)
                self._stop_limited(cut_off=cut_off)
                if not cut_off:
                    self.claimer.hint_if_idle()
            await anyio.sleep(max(0.05, min(left, 0.5)))

    def _stop_limited(self, *, cut_off: bool) -> None:
        """Others may be granted our slots soon: leave them; take the work up again."""
        if cut_off:
            self._stopped_limited += self.activities.stop_limited()
        elif self._stopped_limited:
            self._stopped_limited = 0
            self.claimer.doubt()

    async def _lock_listener(self, session: Session) -> None:
        await take_liveness_lock(session, self._liveness_key)

    # Hints.

    def _heard(self, channel: str, payload: str) -> None:
        if channel in self._listen_also:
            self._listen_also[channel](payload)
        elif channel == worker_channel(self.worker_id):
            if payload == LIMITS:
                self.limits.hint()
                self.claimer.hint_tasks()
                return
            if payload != INBOX:
                self.orders.hint()
            if payload != ORDER:
                self._hint_own_inboxes()
        elif channel == LIMITS_CHANNEL:
            self.limits.hint()
            self.claimer.hint()
        elif payload == INBOX:
            self.claimer.hint_inboxes()
        elif payload == TASKS:
            self.claimer.hint_tasks()
        elif payload == EXECUTIONS:
            self.claimer.hint_executions()
        else:
            self.claimer.hint()

    def _flushed(self, flushed: Flushed) -> None:
        self._hint_workers(flushed.workers)
        for client_id, execution_id in flushed.ended:
            self._hint_client(client_id, execution_id)
        for queue in flushed.queues:
            self.hint_queue(queue, INBOX)
        if self._handing_over:
            self._hint_free_work()
            left = self.executions.residents or self.writer.backlog
            self._handing_over = bool(left)

    def _hint_free_work(self) -> None:
        """What this worker held may be claimed by others."""
        for queue in self.queues:
            self._hinter.send(queue_channel(queue), "")

    def _hint_own_inboxes(self) -> None:
        self.inboxes.hint()
        if self.executions.evicted_lately:
            # It may be for one that has left us in the meantime.
            self.claimer.hint_inboxes()

    def _hint_workers(self, worker_ids: Iterable[UUID]) -> None:
        for worker_id in worker_ids:
            if worker_id == self.worker_id:
                self._hint_own_inboxes()
            else:
                self._hinter.send(worker_channel(worker_id), INBOX)

    def _ended(self, execution_id: UUID, function: str, ending: Ending) -> None:
        found = catalogue.find(function)
        if found is not None and self.limits.holds_executions(found):
            # Its slot is free for another one, here or elsewhere.
            for queue in self.queues:
                self.hint_queue(queue, EXECUTIONS)
        if self._on_ended is not None:
            self._on_ended(execution_id, function, ending)

    def _hint_owner(self, owner: UUID) -> None:
        self._hint_workers((owner,))

    def _hint_client(self, client_id: UUID, execution_id: UUID) -> None:
        if not self._tell_client(client_id, execution_id):
            self._hinter.send(client_channel(client_id), execution_id.hex)

    def hint_queue(self, queue: str, what: str, seconds: float = 0.0) -> None:
        """Something was inserted; tell ourselves, and others if they may take it."""
        if queue in self.queues:
            if what == TASKS:
                self.claimer.hint_tasks_after(seconds)
            elif what == INBOX:
                self.claimer.hint_inboxes()
            else:
                self.claimer.hint_executions()
        if seconds == 0:
            self._hinter.send(queue_channel(queue), what)

    # Stopping.

    async def _drain(self) -> None:
        """Claim nothing, hand over what waits at once, finish what runs."""
        began = time.monotonic()
        log.info(
            WORKER_DRAIN_STARTED,
            worker_id=str(self.worker_id),
            count=len(self.activities.running),
            activities=self._names_of_running(),
        )
        self.claimer.accepting = False
        await self._tolerate(self._store.set_worker_state, self.worker_id, "draining")
        self.activities.set_accepting(accepting=False)
        self._handing_over = self.activities.handing_over = True
        self.limits.keep_nothing()
        self.executions.release_all()
        self.claimer.release_waiting()
        timeout = self._settings.drain_timeout.total_seconds()
        with anyio.move_on_after(timeout):
            async with anyio.create_task_group() as group:
                group.start_soon(self._hurry_up, group.cancel_scope)
                group.start_soon(self._give_up_waiting_pages)
                await self.activities.wait_until_idle()
                while self.executions.residents:  # noqa: ASYNC110 - until written
                    await anyio.sleep(RELEASE_LOOK_SECONDS)
                await self.writer.wait_until_idle()
                group.cancel_scope.cancel()
        cut_off = self._names_of_running()
        if self.activities.running:
            await self._tolerate(self.heartbeats.run_once)
            self.activities.stop_all()
        with anyio.move_on_after(2):
            await self.writer.wait_until_idle()
        self._leaving = True
        await self._tolerate(self.limits.give_up)
        # Whatever is left is given back in one statement, not after the lease.
        await self._tolerate(
            self._store.take_over,
            self.worker_id,
            self.identity.incarnation,
            "stopped",
        )
        self._hint_free_work()
        with anyio.move_on_after(0.2):
            await self._hinter.wait_until_sent()
        log.info(
            WORKER_DRAINED,
            worker_id=str(self.worker_id),
            duration_ms=round((time.monotonic() - began) * 1000),
            cut_off=cut_off,
        )

    def _names_of_running(self) -> list[str]:
        """What runs, with how many of each, the most first."""
        names = Counter(attempt.function for attempt in self.activities.running)
        return [
            name if count == 1 else f"{name} × {count}"
            for name, count in names.most_common(NAMES_LOGGED_MAX)
        ]

    async def _give_up_waiting_pages(self) -> None:
        """Others run the items that wait here for a limit."""
        while True:
            self.activities.stop_waiting_pages()
            await anyio.sleep(PAGES_LOOK_SECONDS)

    async def _hurry_up(self, scope: anyio.CancelScope) -> None:
        await self._hurry.wait()
        scope.cancel()

    async def _tolerate(
        self, call: Callable[..., Awaitable[object]], *args: object
    ) -> None:
        """While stopping, a database that is away is not waited for."""
        try:
            with anyio.move_on_after(5):
                await call(*args)
        except StoreError as error:
            log.warning("worker.stop_incomplete", error=str(error))

    async def _close(self) -> None:
        self.executions.drop_all()
        self.activities.stop_all()
        with anyio.move_on_after(2):
            await self.activities.wait_until_idle()
        await self.activities.close()
        await to_thread.run_sync(self._keeper.stop)
        await self._transactions.close()
        await self._sessions.close()
        self._state = "stopped"
        log.info(WORKER_STOPPED, worker_id=str(self.worker_id))


class _QueueHints:
    """See ``turns.Hints``."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def tasks(self, queue: str, seconds: float) -> None:
        """A task."""
        self._worker.hint_queue(queue, TASKS, seconds)

    def executions(self, queue: str) -> None:
        """An execution."""
        self._worker.hint_queue(queue, EXECUTIONS)


async def _until_lost(
    run: Callable[[], Awaitable[Any]], lost: Callable[[], None]
) -> None:
    try:
        await run()
    except LeaseLostError:
        lost()


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[Worker]:
    """Run a worker beside the body of ``async with``; drain it at the end."""
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        try:
            yield worker
        finally:
            worker.stop()
