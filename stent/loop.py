"""The deterministic event loop: ready queue, virtual time, task lineage.

One ``DurableLoop`` per execution. It never waits: its owner hands over one delivery,
drains it to quiescence, and hands over the next. Everything that could differ between
two runs of the same deliveries is fixed here: the order of callbacks (first in, first
out), time (that of the last delivery), hashes of tasks and futures (sets are iterated
by the standard library), and names of tasks (their lineage).

It is drained from a plain callback of the real loop, with the running loop swapped.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
import heapq
import math
import os
import re
import sys
import threading
import time
from asyncio import events, futures
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import FrameType, MethodType
from typing import Any, NoReturn, TypeVar

import anyio
from anyio._backends._asyncio import CancelScope

from stent.cleanups import cleans_up
from stent.errors import LivelockError, UsageError, WorkflowIOError
from stent.log import get_logger

T = TypeVar("T")

CALLBACKS_MAX = 2_000_000
"""Callbacks in one delivery before a workflow counts as livelocked."""
LINEAGE_CHARACTERS_MAX = 160
CLOSE_ATTEMPTS_MAX = 100
"""How often a coroutine that goes on awaiting while it is closed is closed again."""
DEADLINE_MAX_S = 253_402_300_799
"""End of the year 9999: what is due later never is; databases store no later time."""
REDELIVERIES_MAX = 32
"""How often in one delivery anyio may cancel again what awaits again.

anyio repeats a scope's cancellation in every iteration of the loop until the scope is
left. A ``TaskGroup`` that waits for its children's cleanup swallows each of them, so
without a bound such a scope would never be quiescent; cleanup code nested deeper than
the bound is cancelled on by the next delivery.
"""
_SLICE_CALLBACKS = 64
_SAFE_LABEL = re.compile(r"^[\w.<>\-]{1,80}$")
_ANYIO_MESSAGE = re.compile(
    r"^(Cancelled (?:via|by) cancel scope )[0-9a-f]+(?: by .*?)?(; reason: .*)?$",
    re.DOTALL,
)
_DELIVER_CANCELLATION = CancelScope._deliver_cancellation  # noqa: SLF001

log = get_logger(__name__)

current_lineage: contextvars.ContextVar[str] = contextvars.ContextVar(
    "stent_lineage", default=""
)
_current_loop: contextvars.ContextVar[DurableLoop | None] = contextvars.ContextVar(
    "stent_loop", default=None
)


def _io_refuser(name: str) -> Callable[..., NoReturn]:
    def refuse(_self: object, *_args: object, **_kwargs: object) -> NoReturn:
        refuse_io(f"loop.{name}")

    refuse.__name__ = name
    return refuse


def _control_refuser(name: str) -> Callable[..., NoReturn]:
    def refuse(_self: object, *_args: object, **_kwargs: object) -> NoReturn:
        message = f"loop.{name} belongs to the engine, not to a workflow's code"
        raise UsageError(message)

    refuse.__name__ = name
    return refuse


class DurableHandle:
    """A scheduled callback; what ``call_soon`` and ``call_at`` return."""

    __slots__ = ("_arguments", "_callback", "_cancelled", "_context", "_loop", "_when")

    def __init__(
        self,
        loop: DurableLoop,
        callback: Callable[..., object],
        arguments: tuple[object, ...],
        context: contextvars.Context,
        when: float | None = None,
    ) -> None:
        self._loop = loop
        self._callback = callback
        self._arguments = arguments
        self._context = context
        self._cancelled = False
        self._when = when

    def cancel(self) -> None:
        """Never call it."""
        if not self._cancelled:
            self._cancelled = True
            self._arguments = ()
            if self._when is not None:
                self._loop.count_cancelled_timer()

    def cancelled(self) -> bool:
        """True after ``cancel``."""
        return self._cancelled

    def when(self) -> float:
        """Loop time at which a timer is due."""
        return self._when or 0.0

    def get_context(self) -> contextvars.Context:
        """The context it runs in."""
        return self._context

    def run(self) -> None:
        """Call it in its context."""
        self._context.run(self._callback, *self._arguments)

    @property
    def is_redelivery(self) -> bool:
        """True for anyio's cancellation, which posts itself again until it is heard."""
        callback = self._callback
        return type(callback) is MethodType and (
            callback.__func__ is _DELIVER_CANCELLATION
        )


class DurableFuture(futures.Future[T]):
    """A future whose hash is its ordinal in the execution."""

    family = "future"
    """What it is counted among."""

    def __init__(self, *, loop: DurableLoop) -> None:
        super().__init__(loop=loop)
        self._hash = loop.next_hash(self.family)

    def __hash__(self) -> int:
        return self._hash


class DurableTask(asyncio.Task[T]):
    """An asyncio task with an ordinal hash and a lineage."""

    lineage: str | None = None
    """Stable name of the task; fixed at its first step."""

    def __init__(
        self,
        coroutine: Any,
        *,
        loop: DurableLoop,
        context: contextvars.Context,
        name: str | None = None,
    ) -> None:
        self._hash = loop.next_hash("task")
        name = name or f"Task-{loop.tasks_made}"
        self.context = context
        super().__init__(coroutine, loop=loop, name=name, context=context)
        self.explicit_name: str | None = None

    def __hash__(self) -> int:
        return self._hash

    def set_name(self, value: object, /) -> None:
        """Name the task; before its first step this is also its label."""
        super().set_name(value)
        self.explicit_name = str(value)

    def cancel(self, msg: Any = None) -> bool:
        """As asyncio's; anyio's message loses the addresses that no replay repeats."""
        if isinstance(msg, str):
            msg = _ANYIO_MESSAGE.sub(r"\1of this workflow\2", msg)
        return super().cancel(msg)

    def silence(self) -> None:
        """Do not complain when it is dropped while pending."""
        self._log_destroy_pending = False


class DurableLoop(asyncio.AbstractEventLoop):
    """See the module."""

    def __init__(
        self, *, salt: int, now: int, enter: Callable[[], None] = lambda: None
    ) -> None:
        """Create the loop of one execution.

        Args:
            salt: Base of all hashes; equal for every run of the same execution and
                different between executions, so that global weak sets stay fast.
            now: Microseconds since 1970.
            enter: Sets the execution's context variables; called once in every
                context that code of the execution runs in and that lacks them.
        """
        self._ready: deque[DurableHandle] = deque()
        self._redeliveries: list[DurableHandle] = []
        self._timers: list[tuple[float, int, DurableHandle]] = []
        self._timers_cancelled = 0
        self._sequence = 0
        # The low bits differ between executions (their tasks meet in asyncio's global
        # weak sets) and still order the tasks of one small set by their creation.
        self._salt = (salt & 0xFFFF_FFFF_FFFF) << 6
        self._enter = enter
        self._ordinals: dict[str, int] = {}
        self._now = now / 1e6
        self._labels: dict[tuple[str, str], int] = {}
        self._tasks: list[DurableTask[Any]] = []
        self._tasks_pruned = 256
        self._generators: list[Any] = []
        self._generators_pruned = 256
        self._callbacks = 0
        self._redelivered = 0
        self._thread: int | None = None
        self._closed = False

    def next_hash(self, family: str) -> int:
        """The hash of the next task, future or call.

        Each family has its own ordinals: how many futures asyncio makes for its own use
        differs between versions, and must not change the order of a set of tasks.
        """
        ordinal = self._ordinals.get(family, 0) + 1
        self._ordinals[family] = ordinal
        return self._salt + ordinal

    @property
    def tasks_made(self) -> int:
        """How many tasks there have been, the root included."""
        return self._ordinals.get("task", 0)

    def time(self) -> float:
        """Seconds since 1970: database time of the last delivery."""
        return self._now

    def set_time(self, now: int) -> None:
        """Move time forward to ``now``, in microseconds; never backwards."""
        self._now = max(self._now, now / 1e6)

    def adopt_context(
        self, context: contextvars.Context | None = None
    ) -> contextvars.Context:
        """The context for a callback or task: the given one, or a copy of the current.

        A context from elsewhere, an empty one for example, is given the execution's
        variables: without them a durable call in it would be a plain one.
        """
        if context is None:
            context = contextvars.copy_context()
        if context.get(_current_loop) is not self:
            context.run(self._enter_context, self.lineage())
        return context

    def _enter_context(self, lineage: str) -> None:
        _current_loop.set(self)
        current_lineage.set(lineage)
        self._enter()

    def _own_context(self) -> contextvars.Context:
        return self.adopt_context(contextvars.Context())

    def lineage(self) -> str:
        """Stable name of the task, or of the callback's registrar, that runs now."""
        task = asyncio.current_task(self)
        if task is not None:
            return getattr(task, "lineage", None) or ""
        return current_lineage.get()

    def call_soon(  # type: ignore[override] # our own handles
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Run a callback after those that are ready."""
        handle = DurableHandle(self, callback, args, self.adopt_context(context))
        if type(callback) is MethodType and handle.is_redelivery:
            self._redeliveries.append(handle)
        else:
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override] # our own handles
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Only from the workflow itself; another thread's callback has no order."""
        if self._thread != threading.get_ident():
            refuse_io("a callback from another thread")
        return self.call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override] # our own handles
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Run a callback once time was advanced to ``when``, in seconds since 1970."""
        if math.isnan(when):
            message = "a timer needs a time, not NaN"
            raise ValueError(message)
        when = max(when, 0.0)  # minus infinity is due, too, and has no microseconds
        handle = DurableHandle(self, callback, args, self.adopt_context(context), when)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, handle))
        return handle

    def call_later(  # type: ignore[override] # our own handles
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """Run a callback ``delay`` seconds from now."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def count_cancelled_timer(self) -> None:
        """Drop cancelled timers once they are the majority."""
        self._timers_cancelled += 1
        if self._timers_cancelled > max(100, len(self._timers) // 2):
            self._timers = [t for t in self._timers if not t[2].cancelled()]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def next_deadline(self) -> int | None:
        """Microseconds since 1970 at which the earliest timer is due, if any."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        if not self._timers or self._timers[0][0] > DEADLINE_MAX_S:
            return None
        when = self._timers[0][0]
        deadline = math.ceil(when * 1e6)
        # Multiplying may round down; a timer must be due at its own deadline.
        return deadline if deadline / 1e6 >= when else deadline + 1

    def fire_timers(self) -> None:
        """Make the timers that are due ready, in the order of their deadlines."""
        while self._timers and self._timers[0][0] <= self._now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                self._ready.append(handle)

    def create_future(self) -> DurableFuture[Any]:
        """A future with an ordinal hash."""
        return DurableFuture(loop=self)

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        eager_start: bool | None = None,
    ) -> Any:
        """An asyncio task that belongs to this execution."""
        if self._closed:
            coro.close()
            message = "the execution has ended: no new tasks"
            raise RuntimeError(message)
        if eager_start:
            message = "eager tasks are not supported inside a workflow"
            raise UsageError(message)
        context = self.adopt_context(context)
        birth = _Birth(self.lineage())
        # Runs just before the first step: by then every version has set the name.
        self._ready.append(DurableHandle(self, self._label, (birth,), context))
        task: DurableTask[Any] = DurableTask(coro, loop=self, context=context)
        if name is not None:
            task.set_name(name)
        birth.task = task
        self.adopt(task)
        return task

    def _label(self, birth: _Birth) -> None:
        task = birth.task
        if task is None:
            return
        label = task.explicit_name
        if label is None:
            coroutine = task.get_coro()
            label = getattr(coroutine, "__qualname__", type(coroutine).__name__)
        if not _SAFE_LABEL.match(label):
            label = f"~{_short(label)}"
        occurrence = self._labels.get((birth.parent, label), 0)
        self._labels[birth.parent, label] = occurrence + 1
        lineage = f"{birth.parent}/{label}.{occurrence}"
        if len(lineage) > LINEAGE_CHARACTERS_MAX:
            lineage = f"~{_short(birth.parent)}/{label}.{occurrence}"
        task.lineage = lineage
        current_lineage.set(lineage)

    def adopt(self, task: DurableTask[Any]) -> None:
        """Remember a task until it is done."""
        self._tasks.append(task)
        if len(self._tasks) > self._tasks_pruned:
            self._tasks = [t for t in self._tasks if not t.done()]
            self._tasks_pruned = max(256, 2 * len(self._tasks))

    def live_tasks(self) -> list[DurableTask[Any]]:
        """Tasks that are not done, in the order of their creation."""
        return [task for task in self._tasks if not task.done()]

    def cleans_up(self) -> bool:
        """Whether ``close`` would run code of the workflow."""
        suspended = [task.get_coro() for task in self.live_tasks()]
        return any(
            cleans_up(coroutine, ignoring=_is_engine)
            for coroutine in (*suspended, *self._generators)
        )

    def drain(self, until: float | None = None) -> bool:
        """Run everything that is ready, until nothing is.

        Args:
            until: ``time.perf_counter()`` at which to pause; None never pauses.

        Returns:
            True when quiescent, False when paused: call it again.

        Raises:
            LivelockError: More than ``CALLBACKS_MAX`` callbacks since the delivery.
        """
        if not self._ready and not self._redeliveries:
            return True
        return self._as_running(lambda: self._run_ready(until))

    def _as_running(self, run: Callable[[], T]) -> T:
        """Be the thread's running loop while ``run`` runs."""
        previous = events._get_running_loop()  # noqa: SLF001
        hooks = sys.get_asyncgen_hooks()
        events._set_running_loop(self)  # noqa: SLF001
        sys.set_asyncgen_hooks(self._hold_generator, None)
        self._thread = threading.get_ident()
        try:
            return run()
        finally:
            self._thread = None
            sys.set_asyncgen_hooks(*hooks)
            events._set_running_loop(previous)  # noqa: SLF001

    def _hold_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Keep a generator until it is exhausted: collection has no fixed moment."""
        self._generators.append(generator)
        if len(self._generators) > self._generators_pruned:
            self._generators = [g for g in self._generators if g.ag_frame is not None]
            self._generators_pruned = max(256, 2 * len(self._generators))

    def pause_soon(self) -> None:
        """This callback was a long one: look at the time before the next."""
        self._callbacks += _SLICE_CALLBACKS - 1 - self._callbacks % _SLICE_CALLBACKS

    def begin_delivery(self) -> None:
        """Reset the budgets; the owner calls it before each delivery."""
        self._callbacks = 0
        self._redelivered = 0

    def _run_ready(self, until: float | None) -> bool:
        ready = self._ready
        while True:
            while ready:
                self._callbacks += 1
                if self._callbacks % _SLICE_CALLBACKS == 0:
                    self._check_budget()
                    if until is not None and time.perf_counter() >= until:
                        return False
                self._run_handle(ready.popleft())
            if not self._redeliveries or self._redelivered == REDELIVERIES_MAX:
                return True
            self._redelivered += 1
            redeliveries, self._redeliveries = self._redeliveries, []
            for handle in redeliveries:
                self._callbacks += 1
                self._run_handle(handle)
            self._check_budget()
            if not ready:
                return True

    def _run_handle(self, handle: DurableHandle) -> None:
        if handle._cancelled:  # noqa: SLF001
            return
        try:
            handle.run()
        except (SystemExit, KeyboardInterrupt) as error:
            # asyncio lets these through after it has stored them in the task, which
            # would tear down the worker; the task already carries the exception.
            self.call_exception_handler(
                {"message": "a task asked the process to exit", "exception": error}
            )
        except BaseException as error:  # noqa: BLE001 - as every event loop: report, go on
            self.call_exception_handler(
                {"message": "exception in a callback", "exception": error}
            )

    def _check_budget(self) -> None:
        if self._callbacks > CALLBACKS_MAX:
            names = [
                f"{task.get_name()} ({task.lineage or '/'}) at {_line_of(task)}"
                for task in self.live_tasks()
            ]
            message = (
                f"it livelocks: more than {CALLBACKS_MAX} callbacks without waiting "
                f"for anything; live tasks: {', '.join(names[-3:]) or 'none'}"
            )
            raise LivelockError(message)

    @property
    def idle(self) -> bool:
        """True when nothing is ready."""
        return not self._ready

    def finish(self) -> None:
        """Cancel what is still alive, let it clean up, close generators in order."""
        for task in self.live_tasks():
            task.cancel("the workflow has returned")
        self.drain()
        for generator in self._generators:
            if generator.ag_frame is not None:
                self.call_soon(
                    self._close_generator, generator, context=self._own_context()
                )
        self.drain()

    def _close_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self.create_task(generator.aclose()).add_done_callback(self._generator_closed)

    def _generator_closed(self, task: DurableTask[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.debug(
                "generator.close_failed", error_type=type(task.exception()).__name__
            )

    def close(self) -> None:
        """Drop everything: close the coroutines in reverse, inside this loop."""
        if self._closed:
            return
        self._closed = True
        self._forget_callbacks()
        self._as_running(self._close_coroutines)
        self._forget_callbacks()
        self._tasks.clear()
        self._generators.clear()

    def _close_coroutines(self) -> None:
        # The same contexts as before: a durable call made by a ``finally`` must meet
        # its own execution, not what is current in the worker.
        own_context = self._own_context()
        for task in reversed(self.live_tasks()):
            task.silence()
            task.context.run(self._close_coroutine, task.get_coro())
        for generator in reversed(self._generators):
            if generator.ag_frame is not None:
                own_context.run(_close_now, generator.aclose())

    def _forget_callbacks(self) -> None:
        self._ready.clear()
        self._redeliveries.clear()
        self._timers.clear()

    def _close_coroutine(self, coroutine: Any) -> None:
        if isinstance(coroutine, futures.Future):
            coroutine.close()  # type: ignore[attr-defined] # a durable call
        elif getattr(coroutine, "cr_frame", None) is not None:
            _close_now(coroutine)

    def is_running(self) -> bool:
        """True while it is drained."""
        return self._thread is not None

    def is_closed(self) -> bool:
        """True after ``close``."""
        return self._closed

    def get_debug(self) -> bool:
        """Debug mode does not exist here."""
        return False

    def set_debug(self, enabled: bool) -> NoReturn:  # noqa: ARG002, FBT001 - asyncio's
        """Refused."""
        message = "a workflow's loop has no debug mode"
        raise UsageError(message)

    def get_task_factory(self) -> None:
        """There is none."""

    def set_task_factory(self, factory: object) -> NoReturn:  # noqa: ARG002 - asyncio's
        """Refused: identity of tasks depends on our own."""
        message = "set_task_factory is refused inside a workflow"
        raise UsageError(message)

    def get_exception_handler(self) -> None:
        """There is none."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log what asyncio could not deliver to anybody."""
        if self._closed:
            return
        error = context.get("exception")
        # In the execution's own context, so that it is silent during replay.
        self._own_context().run(
            log.warning,
            "workflow.exception_unhandled",
            detail=context.get("message"),
            error_type=type(error).__name__ if error else None,
            error=str(error) if error else None,
        )

    default_exception_handler = call_exception_handler

    async def shutdown_asyncgens(self) -> None:
        """Generators are closed when the execution ends."""

    run_in_executor = _io_refuser("run_in_executor")  # type: ignore[assignment]
    set_default_executor = _io_refuser("set_default_executor")
    getaddrinfo = _io_refuser("getaddrinfo")
    getnameinfo = _io_refuser("getnameinfo")
    create_connection = _io_refuser("create_connection")
    create_server = _io_refuser("create_server")
    start_tls = _io_refuser("start_tls")
    create_unix_connection = _io_refuser("create_unix_connection")
    create_unix_server = _io_refuser("create_unix_server")
    sendfile = _io_refuser("sendfile")
    connect_accepted_socket = _io_refuser("connect_accepted_socket")
    create_datagram_endpoint = _io_refuser("create_datagram_endpoint")
    connect_read_pipe = _io_refuser("connect_read_pipe")
    connect_write_pipe = _io_refuser("connect_write_pipe")
    subprocess_shell = _io_refuser("subprocess_shell")
    subprocess_exec = _io_refuser("subprocess_exec")
    add_reader = _io_refuser("add_reader")  # type: ignore[assignment]
    remove_reader = _io_refuser("remove_reader")
    add_writer = _io_refuser("add_writer")  # type: ignore[assignment]
    remove_writer = _io_refuser("remove_writer")
    sock_recv = _io_refuser("sock_recv")
    sock_recv_into = _io_refuser("sock_recv_into")
    sock_recvfrom = _io_refuser("sock_recvfrom")
    sock_recvfrom_into = _io_refuser("sock_recvfrom_into")
    sock_sendall = _io_refuser("sock_sendall")
    sock_sendto = _io_refuser("sock_sendto")
    sock_connect = _io_refuser("sock_connect")
    sock_accept = _io_refuser("sock_accept")
    sock_sendfile = _io_refuser("sock_sendfile")
    add_signal_handler = _io_refuser("add_signal_handler")  # type: ignore[assignment]
    remove_signal_handler = _io_refuser("remove_signal_handler")
    run_forever = _control_refuser("run_forever")
    run_until_complete = _control_refuser("run_until_complete")
    stop = _control_refuser("stop")
    set_exception_handler = _control_refuser("set_exception_handler")
    shutdown_default_executor = _control_refuser("shutdown_default_executor")


def refuse_io(what: str) -> NoReturn:
    """Raise for ``what``, naming the line of the user's code and the fix.

    Raises:
        WorkflowIOError: Always.
    """
    message = (
        f"{what} is real I/O and cannot be replayed (at {user_line()}): move it "
        "into a function decorated with @durable, or wrap it in stent.run(...)"
    )
    raise WorkflowIOError(message)


_closing_refused: list[Any] = []
"""Coroutines that cannot be closed; collecting them would run their code again."""


def _close_now(coroutine: Any) -> None:
    """Close a coroutine, or a generator's ``aclose()``, without ever waiting.

    What awaits again is closed again: left suspended, the garbage collector would do
    it at an arbitrary moment, in an arbitrary context.
    """
    for _ in range(CLOSE_ATTEMPTS_MAX):
        try:
            coroutine.throw(GeneratorExit)
        except BaseException as error:  # noqa: BLE001 - user code in finally; we drop it
            if not isinstance(error, GeneratorExit | StopIteration):
                log.debug("task.close_failed", error_type=type(error).__name__)
            return
    _closing_refused.append(coroutine)
    log.warning("task.close_refused", task=getattr(coroutine, "__qualname__", "?"))


class _Birth:
    """A task between its creation and its first step."""

    __slots__ = ("parent", "task")

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.task: DurableTask[Any] | None = None


def _short(text: str) -> str:
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=6
    ).hexdigest()


def user_line() -> str:
    """``file:line`` of the innermost frame that belongs to the user."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code is DurableHandle.run.__code__:
            break  # Further out is whoever drains the loop.
        file = frame.f_code.co_filename
        if not _is_engine(file):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"


def _line_of(task: DurableTask[Any]) -> str:
    """``file:line`` of the innermost of its coroutines that belongs to the user."""
    line = "unknown line"
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if isinstance(frame, FrameType) and not _is_engine(frame.f_code.co_filename):
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        coroutine = getattr(coroutine, "cr_await", None)
    return line


_ENGINE_PATHS = (
    *(str(Path(str(m.__file__)).parent) + os.sep for m in (asyncio, anyio)),
    str(Path(__file__).parent) + os.sep,
    str(contextlib.__file__),
    "<frozen",
)


@functools.lru_cache(maxsize=4096)
def _is_engine(file: str) -> bool:
    return file.startswith(_ENGINE_PATHS)
