"""Stent: dispatch, wait, cancel, inspect and serve, from application code."""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, cast
from uuid import UUID, uuid4

import anyio

from stent import context, hooks
from stent.clock import DatabaseClock
from stent.codec import encode_exception
from stent.dispatching import DISPATCH_ITEMS_MAX, Dispatcher
from stent.duration import Duration, parse_duration
from stent.errors import (
    ConfigurationError,
    ExecutionCancelledError,
    ExecutionNotFinishedError,
    ExecutionNotFoundError,
    UsageError,
)
from stent.limit_settings import LimitSettings, LimitState
from stent.log import get_logger
from stent.mapping import MapForm
from stent.model import (
    KEEP,
    Entry,
    ExecutionState,
    Health,
    Keep,
    Order,
    QueueDepth,
    Status,
    WorkerState,
)
from stent.outcomes import Outcomes, read_outcome
from stent.registry import (
    DISPATCH_OPTIONS,
    DurableFunction,
    Items,
    Options,
    Process,
    context_caller,
    durable,
    each_item,
    read_options,
)
from stent.result import Result
from stent.settings import Settings, masked
from stent.store.embedded import EmbeddedServer
from stent.store.listen import (
    LIMITS_CHANNEL,
    Hinter,
    Listener,
    client_channel,
    queue_channel,
)
from stent.store.listen import worker_channel as worker_channel_of
from stent.store.migrate import apply_migrations, check_schema
from stent.store.session import Session
from stent.store.store import NewExecution, Store
from stent.worker import EXECUTIONS, INBOX, ORDER, QUEUES, Worker
from stent.worker_states import ask, parse_worker_id, read_workers

if TYPE_CHECKING:
    from contextvars import Token

    from stent.history import History

R = TypeVar("R")

log = get_logger(__name__)

QUEUE_ROWS_MAX, QUEUE_ROWS_HIGHEST = 10_000, 1_000_000
"""Where ``queue_depth`` stops counting: the default, as in its view, and the bound."""
HINT_SECONDS_MAX = 0.2
CLOSE_SECONDS_MAX = 30.0
HINTS_SECONDS_MAX = 1.0
"""How long closing may take beside the draining of workers."""


class Handle(Generic[R]):
    """An execution somebody can wait for, look at and cancel.

    Attributes:
        id: Of the execution.
    """

    def __init__(self, app: Stent, execution_id: str) -> None:
        self._app = app
        self.id = execution_id

    async def result(self, timeout: Duration | None = None) -> R:
        """Wait for it; its value, or its exception raised.

        Raises:
            TimeoutError: It takes longer than ``timeout``.
        """
        outcome = await self._app.wait_for(self.id, timeout)
        return cast("R", outcome.unwrap())

    async def status(self) -> Status:
        """Where it stands."""
        return (await self._app.state_of(self.id)).status

    async def cancel(self) -> bool:
        """Ask it to stop; False when it has ended."""
        return await self._app.cancel(self.id)

    async def signal(self, name: str, payload: object = None) -> NoReturn:
        """Not available in this release."""
        del name, payload
        _not_yet("Handle.signal")

    async def events(self) -> NoReturn:
        """Not available in this release."""
        _not_yet("Handle.events")

    def __repr__(self) -> str:
        return f"<Handle {self.id}>"


def _not_yet(name: str) -> NoReturn:
    message = f"{name} is not available in this release"
    raise ConfigurationError(message)


class Stent:
    """One application's connection to a stent database.

    Use it as ``async with Stent() as app`` or ``app = await Stent.bootstrap(...)``.
    Entering it makes it current: durable functions called inside are dispatched.
    """

    durable = durable
    sleep = staticmethod(context.sleep)
    map = staticmethod(context.map)
    starmap = staticmethod(context.starmap)
    gather = staticmethod(context.gather)
    now = staticmethod(context.now)
    random = staticmethod(context.random)
    uuid = staticmethod(context.uuid)
    run = staticmethod(cast("Any", context.run))
    tell = staticmethod(context.tell)
    current = staticmethod(context.current)
    heartbeat = staticmethod(context.heartbeat)
    raise_if_cancelled = staticmethod(context.raise_if_cancelled)
    on_worker_start = hooks.on_worker_start
    on_worker_stop = hooks.on_worker_stop
    wait_for_signal = staticmethod(context.wait_for_signal)
    attempt = staticmethod(context.attempt)
    recover = staticmethod(context.recover)
    state = staticmethod(context.state)
    counters = staticmethod(context.counters)
    compensate = staticmethod(context.compensate)
    patched = staticmethod(context.patched)
    restart = staticmethod(context.restart)

    def __init__(
        self,
        url: str | None = None,
        *,
        home: str | Path | None = None,
        migrate: bool = True,
        settings: Settings | None = None,
    ) -> None:
        """Describe a connection; ``async with`` or ``await`` opens it.

        Args:
            url: A ``postgresql://`` URL. Default: ``STENT_DATABASE_URL``, else an
                embedded PostgreSQL below ``home``.
            home: Directory of the embedded server, which is used then whatever the
                environment says; default ``STENT_HOME`` or ``./.stent``.
            migrate: Bring the schema up to date when opening.
            settings: Replaces everything read from the environment.

        Raises:
            ConfigurationError: Both ``url`` and ``home`` are given, or a setting is
                wrong.
        """
        if home is not None and url is not None:
            message = "url and home exclude each other: one database at a time"
            raise ConfigurationError(message)
        # What is said here goes before what the environment says.
        if settings is None:
            settings = Settings.from_env(url=url, home=home)
        elif url is not None:
            settings = replace(settings, database_url=url)
        elif home is not None:
            settings = replace(
                settings, home=Path(home), database_url=None, direct_url=None
            )
        self.settings = settings
        self._migrate = migrate
        self._serve: dict[str, Any] | None = None
        self._server: EmbeddedServer | None = None
        self._url: str | None = None
        self._caller = OutsideCaller(self)
        self._client_id = uuid4()
        self._clock = DatabaseClock()
        self._session: Session | None = None
        self._store: Store | None = None
        self._process = os.getpid()
        self._outcomes: Outcomes | None = None
        self._dispatcher: Dispatcher | None = None
        self._background: list[asyncio.Task[None]] = []
        self._hinter: Hinter | None = None
        self._workers: dict[Worker, asyncio.Task[None]] = {}
        self._token: Token[Any] | None = None
        self._history: History | None = None
        self._listening = False
        self._cancelled_payload = encode_exception(
            ExecutionCancelledError("it was cancelled before it started")
        )

    @classmethod
    def bootstrap(
        cls,
        url: str | None = None,
        *,
        serve: bool = False,
        max_concurrency: int | None = None,
        queues: Iterable[str] = QUEUES,
        **options: Any,
    ) -> Stent:
        """A Stent that, once opened, also runs a worker in this process.

        Args:
            url: As of ``Stent``.
            serve: Run a worker.
            max_concurrency: Attempts at the same time.
            queues: That the worker serves.
            **options: ``home``, ``migrate``, ``settings`` as of ``Stent``.
        """
        app = cls(url, **options)
        if serve:
            app._serve = {"max_concurrency": max_concurrency, "queues": tuple(queues)}
        return app

    @classmethod
    async def use(cls, url: str | None = None, **options: Any) -> Stent:
        """Open a Stent and make it current for the whole process."""
        app = await cls(url, **options)
        Process.caller = app._caller  # noqa: SLF001 - our own class
        return app

    # Life.

    def __await__(self) -> Generator[Any, None, Self]:
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        await self._open()
        self._token = context_caller.set(self._caller)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._token is not None:
            context_caller.reset(self._token)
            self._token = None
        await self.close()

    async def _open(self) -> Self:
        if self._store is None:
            self._process = os.getpid()
        self._refuse_after_fork()
        if self._store is not None:
            return self
        if Process.importing is not None:
            message = (
                f"a process of a pool imports {Process.importing}, which opens Stent "
                'at once: begin the program with `if __name__ == "__main__":`'
            )
            raise UsageError(message)
        try:
            await self._connect()
            if self._serve is not None:
                await self._start_worker(**self._serve)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close()
            raise
        return self

    async def _connect(self) -> None:
        url = self.settings.database_url
        if url is None:
            self._server = EmbeddedServer(self.settings.home)
            url = (await self._server.start()).url
        self._url = url
        session = Session(
            url,
            "client",
            command_timeout=self.settings.command_timeout.total_seconds(),
            revive=self._revive if self._server is not None else None,
        )
        self._session = session
        if self._migrate:
            await session.run(apply_migrations, "migrating")
        else:
            await session.run(check_schema, "checking the schema")
        self._store = Store(session)
        boot = await self._store.current_boot()
        now = asyncio.get_running_loop().time
        self._clock = DatabaseClock(now)
        self._clock.observe(boot.now, now(), now())
        self._outcomes = Outcomes(self._store, self._client_id)
        self._dispatcher = Dispatcher(
            self._store,
            self._client_id,
            self._clock,
            payload_bytes_max=self.settings.payload_bytes_max,
            on_inserted=self._inserted,
        )
        self._hinter = Hinter(self._store)
        self._in_background(self._hinter.run())

    async def _revive(self) -> None:
        if self._server is not None:
            await self._server.restart_if_down()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.append(task)

    async def close(self) -> None:
        """Stop the workers of this app, close connections, leave the server.

        Who is cancelled meanwhile by a scope of anyio still waits for it, no longer
        than workers may take to drain and half a minute.
        """
        if Process.caller is self._caller:
            Process.caller = None
        if self._forked:
            # Connections, workers and the place at the server are the parent's.
            return
        seconds = self.settings.drain_timeout.total_seconds() + CLOSE_SECONDS_MAX
        with anyio.move_on_after(seconds, shield=True):
            try:
                await self.drain()
            finally:
                await self._disconnect()

    async def _disconnect(self) -> None:
        if self._hinter is not None:
            # Else what was dispatched last would wait for somebody's poll.
            with anyio.move_on_after(HINTS_SECONDS_MAX):
                await self._hinter.wait_until_sent()
        tasks, self._background = self._background, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._dispatcher is not None:
            await self._dispatcher.close()
        if self._outcomes is not None:
            await self._outcomes.close()
        if self._session is not None:
            await self._session.close()
        self._session = self._store = self._outcomes = self._hinter = None
        self._dispatcher = None
        if self._server is not None:
            await self._server.leave()
            self._server = None

    @property
    def url(self) -> str:
        """Full connection string, password included; asyncpg and psql take it."""
        if self._url is None:
            message = "the app is not open: use `async with` or await it"
            raise UsageError(message)
        return self._url

    def __repr__(self) -> str:
        return f"<Stent {masked(self._url) if self._url else 'not open'}>"

    # Serving.

    async def serve(
        self,
        max_concurrency: int | None = None,
        queues: Iterable[str] = QUEUES,
    ) -> None:
        """Run a worker in this process until cancelled, or until ``drain``.

        Args:
            max_concurrency: Attempts at the same time; default 100.
            queues: That the worker serves.
        """
        self._require_open()
        if self._session is not None:
            # A worker has connections of its own; most need no other one any more.
            await self._session.rest()
        worker = await self._start_worker(max_concurrency, tuple(queues))
        task = self._workers[worker]
        try:
            await asyncio.wait([task])
        finally:
            worker.stop()
            with anyio.CancelScope(shield=True):
                await self._join(worker)

    async def _start_worker(
        self, max_concurrency: int | None, queues: Sequence[str]
    ) -> Worker:
        self._require_open()
        if not queues or not all(queues):
            message = f"queues is {list(queues)!r}; each queue must have a name"
            raise ConfigurationError(message)
        worker = Worker(
            self.settings,
            self.url,
            start_execution=self._start_for_activity,
            queues=queues,
            slots=max_concurrency,
            revive=self._revive if self._server is not None else None,
            alone=self._alone,
            tell_client=self._told,
            listen_also={client_channel(self._client_id): self._hear},
            on_ended=self._outcomes.ended if self._outcomes is not None else None,
        )
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.get_running_loop().create_task(
            worker.run(task_status=cast("Any", _Started(started)))
        )
        task.add_done_callback(_log_failure)
        self._workers[worker] = task
        await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            del self._workers[worker]
            await task
        return worker

    def _alone(self) -> bool:
        return self._server is not None and self._server.alone()

    def _told(self, client_id: UUID, execution_id: UUID) -> bool:
        return self._outcomes is not None and self._outcomes.told(
            client_id, execution_id
        )

    async def drain(self) -> None:
        """Stop the workers of this app: hand over, finish what runs, end."""
        for worker in list(self._workers):
            worker.stop()
        for worker in list(self._workers):
            await self._join(worker)

    async def _join(self, worker: Worker) -> None:
        task = self._workers.get(worker)
        if task is None:
            return
        # It stays known until it has ended, so that hurry finds it while it drains.
        await asyncio.wait([task])
        if self._workers.pop(worker, None) is None:
            return
        if not task.cancelled() and task.exception() is not None:
            await task

    def hurry(self) -> None:
        """End the workers of this app without waiting for running attempts."""
        for worker in list(self._workers):
            worker.stop()
            worker.stop()

    def health(self) -> Health:
        """How the workers of this app are, without asking the database.

        Waits for nothing; any thread may call it, also while the loop is blocked.
        """
        workers = tuple(worker.health() for worker in list(self._workers))
        return Health(
            live=all(worker.live for worker in workers),
            ready=bool(workers) and all(worker.ready for worker in workers),
            workers=workers,
        )

    async def list_workers(
        self, *, host: str | None = None, ended: bool = False
    ) -> list[WorkerState]:
        """The workers of all processes, as of their last renewal of the lease.

        Args:
            host: Only those of this machine.
            ended: Also those that stopped or were lost, for about a day.
        """
        return await read_workers(self._require_open(), host=host, ended=ended)

    async def drain_worker(self, worker_id: str) -> bool:
        """Ask a worker, wherever it is, to hand over, finish what runs and end.

        It obeys within about a second. This does not wait for its end.

        Returns:
            False when it does not live any more: nothing happens.

        Raises:
            WorkerNotFoundError: There is no such worker.
        """
        return await self._ask(worker_id, Order.DRAIN)

    async def stop_worker(self, worker_id: str) -> bool:
        """As ``drain_worker``, without waiting for running attempts.

        What is cut off runs again elsewhere.
        """
        return await self._ask(worker_id, Order.STOP)

    async def _ask(self, worker_id: str, order: Order) -> bool:
        asked = await ask(self._require_open(), worker_id, order)
        if asked and self._hinter is not None:
            self._hinter.send(worker_channel_of(parse_worker_id(worker_id)), ORDER)
            # A command ends right after this; without the hint it takes a second.
            with anyio.move_on_after(HINT_SECONDS_MAX):
                await self._hinter.wait_until_sent()
        return asked

    # Dispatching.

    async def dispatch(
        self, function: DurableFunction[Any, Any], /, *args: Any, **kwargs: Any
    ) -> str:
        """Start an execution; it is durable when this returns.

        Args:
            function: Any durable function.
            *args: For the function.
            **kwargs: For the function, except ``max_duration delay dispatch_key queue
                priority tags``, which are options of the dispatch.

        Returns:
            The execution's id.

        Raises:
            PayloadError: An argument cannot be stored; names its path.
            IdempotencyConflictError: ``dispatch_key`` was used for something else.
            UsageError: It is not a durable function.
        """
        options = {n: kwargs.pop(n) for n in DISPATCH_OPTIONS if n in kwargs}
        settings = _with_options(function, options)
        dispatcher = self._require_dispatcher()
        new = dispatcher.prepare(function, settings, args, kwargs)
        return await dispatcher.dispatch(new)

    async def dispatch_many(
        self,
        function: DurableFunction[Any, Any],
        items: Iterable[Any],
        *,
        star: bool = False,
        **options: Any,
    ) -> list[str]:
        """Start one execution per item, in batches.

        Args:
            function: Any durable function.
            items: Each the one argument; with ``star``, the sequence of arguments.
            star: See ``items``.
            **options: ``max_duration delay queue priority tags``.

        Returns:
            Ids in the order of the items.
        """
        if "dispatch_key" in options:
            message = "dispatch_key belongs to one execution; use dispatch"
            raise UsageError(message)
        settings = _with_options(function, options)
        dispatcher = self._require_dispatcher()
        new = [
            dispatcher.prepare(function, settings, tuple(item) if star else (item,), {})
            for item in items
        ]
        for start in range(0, len(new), DISPATCH_ITEMS_MAX):
            await dispatcher.insert(new[start : start + DISPATCH_ITEMS_MAX])
        return [str(one.execution_id) for one in new]

    async def dispatch_call(
        self,
        function: DurableFunction[Any, Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> str:
        """Dispatch with the function's own options; all keywords are arguments."""
        dispatcher = self._require_dispatcher()
        new = dispatcher.prepare(function, function.settings, args, kwargs)
        return await dispatcher.dispatch(new)

    def _inserted(self, new: Sequence[NewExecution]) -> None:
        if self._outcomes is not None:
            self._outcomes.dispatched({one.execution_id for one in new})
        for queue in {one.queue for one in new}:
            local = [worker for worker in self._workers if queue in worker.queues]
            for worker in local:
                worker.claimer.hint_executions()
            if self._hinter is not None and not any(w.has_room for w in local):
                self._hinter.send(queue_channel(queue), EXECUTIONS)

    async def _start_for_activity(
        self,
        function: DurableFunction[Any, Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        execution_id: UUID,
    ) -> Handle[Any]:
        dispatcher = self._require_dispatcher()
        new = dispatcher.prepare(
            function, function.settings, args, kwargs, execution_id
        )
        await dispatcher.insert([new])
        return Handle(self, str(execution_id))

    # Looking and steering.

    async def wait_for(
        self,
        execution_id: str,
        timeout: Duration | None = None,
    ) -> Result[Any, Any]:
        """Wait for the outcome; never raises for it.

        Returns:
            ``Ok(value)``; a Result that the function returned, itself; or
            ``Error(exception)`` when it failed, was cancelled or timed out. A value
            that cannot be read here is ``Error(PayloadError)`` although the execution
            completed; of a class that is not imported, it names the module.

        Raises:
            TimeoutError: It takes longer than ``timeout``; it goes on.
            ExecutionNotFoundError: There is no such execution.
        """
        self._require_open()
        identifier = _parse_id(execution_id)
        outcomes = cast("Outcomes", self._outcomes)
        if outcomes.is_own(identifier) and not self._listening and not self._workers:
            self._listen()
        if timeout is None:
            return await outcomes.wait(identifier)
        seconds = parse_duration(timeout, name="timeout").total_seconds()
        try:
            async with asyncio.timeout(seconds):
                return await outcomes.wait(identifier)
        except TimeoutError:
            message = f"execution {execution_id} has not ended within {timeout}"
            raise TimeoutError(message) from None

    def _listen(self) -> None:
        self._listening = True
        session = Session(self.settings.direct_url or self.url, "client listener")
        listener = Listener(
            session,
            [client_channel(self._client_id)],
            lambda _channel, payload: self._hear(payload),
        )
        self._in_background(_listen_until_closed(listener, session))

    def _hear(self, payload: str) -> None:
        if self._outcomes is not None and payload:
            self._outcomes.hint(UUID(payload))

    async def result_of(self, execution_id: str) -> Result[Any, Any]:
        """The outcome of an execution that has ended.

        Raises:
            ExecutionNotFinishedError: It has not.
            ExecutionNotFoundError: There is no such execution.
        """
        rows = await self._require_open().outcomes([_parse_id(execution_id)])
        if not rows:
            raise _not_found(execution_id)
        if not Status(rows[0]["status"]).terminal:
            message = f"execution {execution_id} is {rows[0]['status']}"
            raise ExecutionNotFinishedError(message)
        return read_outcome(rows[0])

    async def cancel(self, execution_id: str) -> bool:
        """Ask an execution, and what it started, to stop.

        Workflows hear at once and may clean up for ``cancel_grace``.

        Returns:
            False when it has ended already: nothing happens.

        Raises:
            ExecutionNotFoundError: There is no such execution.
        """
        store, identifier = self._require_open(), _parse_id(execution_id)
        if await store.end_unstarted(identifier, self._cancelled_payload):
            if self._outcomes is not None:
                self._outcomes.hint(identifier)
            return True
        asked = await store.ask_to_stop(identifier, self.settings.cancel_grace)
        if asked is None:
            if await store.status_of(identifier) is None:
                raise _not_found(execution_id)
            return False
        owner, queue = asked
        for worker in self._workers:
            worker.inboxes.hint()
            worker.claimer.hint()
        if self._hinter is not None:
            if owner is None:
                self._hinter.send(queue_channel(queue), "")
            else:
                self._hinter.send(worker_channel_of(owner), INBOX)
        return True

    async def set_limit(
        self,
        function: DurableFunction[Any, Any] | str | None = None,
        *,
        queue: str | None = None,
        max_concurrent: int | Keep | None = KEEP,
        rate_limit: str | Keep | None = KEEP,
    ) -> None:
        """Limit a function or a queue from now on, whatever the code declares.

        What is not given stays as it is. What runs goes on; nothing more starts until
        there is room.

        Args:
            function: A durable function or its name.
            queue: Instead of a function.
            max_concurrent: At the same time over all workers; None: any number. For
                a function with a ``concurrency_key``, of each key.
            rate_limit: Starts, such as ``"200/s"`` or ``"10/s burst 50"``; None: any.

        Raises:
            UsageError: Neither a function nor a queue, or both; or no limit.
            ConfigurationError: A value makes no sense.
        """
        await self._limit_settings().set_limit(
            function, queue, max_concurrent, rate_limit
        )

    async def reset_limit(
        self,
        function: DurableFunction[Any, Any] | str | None = None,
        *,
        queue: str | None = None,
    ) -> bool:
        """Back to what the code declares; False: there is no such limit."""
        return await self._limit_settings().reset_limit(function, queue)

    async def limits(self) -> list[LimitState]:
        """Limits of functions and queues, with what is in use."""
        return await self._limit_settings().limits()

    async def pause(
        self,
        *,
        function: DurableFunction[Any, Any] | str | None = None,
        queue: str | None = None,
    ) -> None:
        """Start nothing more of a function or a queue; what runs goes on.

        Workers hear of it at once, and look every five seconds.
        """
        await self._limit_settings().set_paused(function, queue, paused=True)

    async def resume(
        self,
        *,
        function: DurableFunction[Any, Any] | str | None = None,
        queue: str | None = None,
    ) -> None:
        """Undo ``pause``."""
        await self._limit_settings().set_paused(function, queue, paused=False)

    def _limit_settings(self) -> LimitSettings:
        return LimitSettings(self._require_open(), self._limits_changed)

    def _limits_changed(self) -> None:
        for worker in self._workers:
            worker.limits.hint()
            worker.claimer.hint()
        if self._hinter is not None:
            self._hinter.send(LIMITS_CHANNEL)

    def handle(self, execution_id: str) -> Handle[Any]:
        """A handle on an execution by its id."""
        _parse_id(execution_id)
        return Handle(self, execution_id)

    async def state_of(self, execution_id: str) -> ExecutionState:
        """Everything about one execution at a glance.

        Raises:
            ExecutionNotFoundError: There is no such execution.
        """
        _parse_id(execution_id)
        return await self._inspect().state(execution_id)

    async def list_executions(self, **filters: Any) -> list[ExecutionState]:
        """Executions, newest first.

        Args:
            **filters: ``status`` (one or several), ``function``, ``tag``, ``queue``,
                ``parent``, ``root``, ``limit`` (100), ``before`` (an id).
        """
        return await self._inspect().list_executions(**filters)

    async def history(self, execution_id: str) -> list[Entry]:
        """What happened to an execution, in the order in which it saw it.

        Raises:
            ExecutionNotFoundError: There is no such execution.
        """
        _parse_id(execution_id)
        return await self._inspect().entries(execution_id)

    async def queue_depth(
        self, queue: str | None = None, *, rows_max: int = QUEUE_ROWS_MAX
    ) -> list[QueueDepth]:
        """How much waits and runs, per queue, function and kind, in that order.

        Cheap however much waits: nothing is counted beyond ``rows_max``.

        Args:
            queue: Only this one.
            rows_max: Where counting stops, for each priority of a function in a queue
                and each worker; 1 to 1 000 000.

        Raises:
            UsageError: ``rows_max`` is out of its bounds.
            StoreError: The database is away.
        """
        if not 1 <= rows_max <= QUEUE_ROWS_HIGHEST:
            message = f"rows_max must be between 1 and {QUEUE_ROWS_HIGHEST}"
            raise UsageError(f"{message}, not {rows_max}")
        return await self._require_open().queue_depth(queue, rows_max)

    def _inspect(self) -> History:
        store = self._require_open()
        if self._history is None or self._history.store is not store:
            from stent.history import History  # noqa: PLC0415 - loads SQLAlchemy

            self._history = History(store)
        return self._history

    @property
    def _forked(self) -> bool:
        """Whether this process is a child of the one that opened the app."""
        return self._store is not None and self._process != os.getpid()

    def _refuse_after_fork(self) -> None:
        if self._forked:
            message = (
                f"this app was opened by process {self._process}, which was forked: "
                "its connections cannot be shared, so open a Stent in this process"
            )
            raise UsageError(message)

    def _require_open(self) -> Store:
        self._refuse_after_fork()
        if self._store is None:
            message = "the app is not open: use `async with Stent(...)`, or await it"
            raise UsageError(message)
        return self._store

    def _require_dispatcher(self) -> Dispatcher:
        self._require_open()
        return cast("Dispatcher", self._dispatcher)


class OutsideCaller:
    """What durable calls mean in application code: see ``registry.Caller``."""

    def __init__(self, app: Stent) -> None:
        self._app = app

    async def call(
        self,
        function: DurableFunction[Any, R],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> R:
        """Dispatch, wait, return the value or raise."""
        handle = await self.start(function, args, kwargs)
        outcome = await self._app.wait_for(handle.id)
        if returns_result(function) and not isinstance(outcome.error, BaseException):
            return cast("R", outcome)
        return cast("R", outcome.unwrap())

    async def start(
        self,
        function: DurableFunction[Any, R],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Handle[R]:
        """Dispatch and return a handle."""
        return Handle(self._app, await self._app.dispatch_call(function, args, kwargs))

    async def map(
        self, function: DurableFunction[Any, Any], items: Items, form: MapForm
    ) -> list[Any]:
        """One execution per item; results in order."""
        async with aclosing(each_item(items)) as source:
            if form.concurrency is None:
                outcomes = await self._map_all(function, source, form)
            else:
                outcomes = await self._map_some(function, source, form)
        keep = form.return_exceptions
        return [o.error if o.is_err() and keep else o.unwrap() for o in outcomes]

    async def _map_all(
        self,
        function: DurableFunction[Any, Any],
        source: AsyncIterator[object],
        form: MapForm,
    ) -> list[Result[Any, Any]]:
        ids: list[str] = []
        batch: list[object] = []
        async for item in source:
            batch.append(item)
            if len(batch) == DISPATCH_ITEMS_MAX:
                ids += await self._app.dispatch_many(function, batch, star=form.star)
                batch.clear()
        ids += await self._app.dispatch_many(function, batch, star=form.star)
        outcomes: list[Result[Any, Any]] = []
        for execution_id in ids:
            outcomes.append(await self._app.wait_for(execution_id))
            if outcomes[-1].is_err() and not form.return_exceptions:
                break
        return outcomes

    async def _map_some(
        self,
        function: DurableFunction[Any, Any],
        source: AsyncIterator[object],
        form: MapForm,
    ) -> list[Result[Any, Any]]:
        """No more than so many at the same time."""
        found: dict[int, Result[Any, Any]] = {}
        turn = anyio.Lock()
        taken = 0

        async def take() -> None:
            nonlocal taken
            while True:
                async with turn:
                    item = await anext(source, _NO_MORE)
                    if item is _NO_MORE:
                        return
                    index, taken = taken, taken + 1
                args = tuple(cast("Iterable[Any]", item)) if form.star else (item,)
                execution_id = await self._app.dispatch_call(function, args, {})
                found[index] = await self._app.wait_for(execution_id)
                if found[index].is_err() and not form.return_exceptions:
                    group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for _ in range(min(form.concurrency or 1, DISPATCH_ITEMS_MAX)):
                group.start_soon(take)
        failed = [o for o in found.values() if o.is_err()]
        if failed and not form.return_exceptions:
            return failed[:1]
        return [found[index] for index in range(taken)]


_NO_MORE = object()


class _Started:
    """anyio's way to report a start, for a plain asyncio task."""

    def __init__(self, future: asyncio.Future[None]) -> None:
        self._future = future

    def started(self, value: object = None) -> None:
        """The worker claims."""
        del value
        if not self._future.done():
            self._future.set_result(None)


def returns_result(function: DurableFunction[Any, Any]) -> bool:
    """Whether the function is annotated to return a Result."""
    annotation = function.return_annotation
    return getattr(annotation, "__origin__", annotation) is Result


async def _listen_until_closed(listener: Listener, session: Session) -> None:
    try:
        await listener.run()
    finally:
        with anyio.move_on_after(2, shield=True):
            await session.close()


def _with_options(function: object, options: Mapping[str, object]) -> Options:
    if isinstance(function, Coroutine):
        function.close()
        message = "pass the function and its arguments, dispatch(f, x), not a call f(x)"
        raise UsageError(message)
    if not isinstance(function, DurableFunction):
        name = getattr(function, "__qualname__", repr(function))
        message = f"{name} is not durable: decorate it with @durable"
        raise UsageError(message)
    if not options:
        return function.settings
    allowed = frozenset(DISPATCH_OPTIONS)
    return replace(function.settings, **read_options(options, allowed))


def _log_failure(task: asyncio.Task[None]) -> None:
    """A worker that fails says so at once, not when the app is closed."""
    if not task.cancelled() and task.exception() is not None:
        log.error("worker.failed", exc_info=task.exception())


def _parse_id(execution_id: str) -> UUID:
    try:
        return UUID(execution_id)
    except (ValueError, AttributeError, TypeError):
        raise _not_found(str(execution_id)) from None


def _not_found(execution_id: str) -> ExecutionNotFoundError:
    return ExecutionNotFoundError(f"there is no execution {execution_id}")


def _later(name: str) -> Callable[..., NoReturn]:
    def refuse(_self: Stent, *_args: object, **_kwargs: object) -> NoReturn:
        _not_yet(f"Stent.{name}")

    refuse.__name__ = name
    refuse.__doc__ = "Not available in this release: raises ``ConfigurationError``."
    return refuse


for _name in (
    *("schedule", "schedules", "retry", "fork", "send_signal"),
    *("list_dead_letters", "requeue_dead_letter", "discard_dead_letter"),
):
    setattr(Stent, _name, _later(_name))
