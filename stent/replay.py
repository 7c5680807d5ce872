"""Advance a workflow over deliveries; replay it over a journal. Pure.

``WorkflowRun`` holds one execution of a workflow function on a ``DurableLoop``. Its
owner hands over deliveries one at a time and drains in between; the run collects what
the code decided. No clock, no I/O, no store: the worker, the test kit and the command
line share it.

The model. A *delivery* is a result, an advance of time or a cancellation. Between two
deliveries the code runs until nothing is ready. Everything it can observe follows from
the head of the journal and the deliveries so far, so handing over the same deliveries
again brings it to the same place. Calls are matched by address, not by position; a call
the code made before the last journaled turn must be known to the journal, and what the
journal knows must have been called again, or the replay has diverged.
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import hashlib
import inspect
import random as random_module
import uuid as uuid_module
from collections.abc import (
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, cast

from stent import waiting
from stent.calls import DurableCall, LocalFunction, fail_call
from stent.clock import child_execution_id
from stent.codec import (
    PAYLOAD_BYTES_MAX,
    MissingTypeError,
    decode,
    decode_arguments,
    decode_exception,
    decode_many,
    digest,
    encode,
    encode_arguments,
    encode_exception,
)
from stent.context import Current, context_scope
from stent.errors import (
    DeterminismError,
    ExecutionClosedError,
    LivelockError,
    PayloadError,
    StopSignal,
    UsageError,
)
from stent.journal import (
    CancelDelivered,
    CancelReason,
    Delivery,
    Head,
    Journal,
    ResultDelivered,
    TimeAdvanced,
    Turn,
)
from stent.log import LogScope, get_logger, log_scope
from stent.loop import DurableLoop, DurableTask, user_line
from stent.mapping import MapForm
from stent.model import DEPTH_MAX, Kind, Recorded
from stent.pages import KnownPages, MapCall, PageCall, known_pages
from stent.registry import DurableFunction, Items, Options, context_caller

R = TypeVar("R")

waiting.install()
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a replay diverged.

    Attributes:
        expected: What the journal knows, or None when it knows nothing there.
        actual: What the code did, or None when it did nothing there.
        line: ``file:line`` of the code, if it did something.
    """

    expected: str | None
    actual: str | None
    line: str
    reason: str

    def __str__(self) -> str:
        if self.expected is None and self.actual is None:
            return self.reason
        where = f" at {self.line}" if self.line else ""
        known, made = self.expected, self.actual
        if known is None:
            what = f"the code calls {_callee(made)}{where}, of which it knows nothing"
        elif made is None:
            what = f"it has a call of {_callee(known)} that the code does not make"
        elif _stem(known) == _stem(made):
            what = f"the code calls {_callee(made)}{where} with other arguments"
        else:
            what = (
                f"the code calls {_callee(made)}{where} where it has a call "
                f"of {_callee(known)}"
            )
        addresses = f"journal {known or 'nothing'}, code {made or 'nothing'}"
        return f"{self.reason}: {what} ({addresses})"


@dataclass(frozen=True, slots=True)
class Parked:
    """It waits: for calls, and at the latest until ``wake_at`` (microseconds)."""

    calls: tuple[str, ...]
    wake_at: int | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The root has returned or raised."""

    recorded: Recorded
    cancelled: CancelReason | None


@dataclass(frozen=True, slots=True)
class Diverged:
    """It cannot go on under this code."""

    difference: Difference


Outcome = Parked | Finished | Diverged


@dataclass(slots=True)
class Decisions:
    """What the code decided since they were last taken.

    Attributes:
        calls: Issued and not cancelled again, in order.
        settled: Earlier calls that were cancelled.
        told: (address, payload) of ``tell``.
        edited: Digest of edited code accepted in a replay.
    """

    calls: list[DurableCall[Any]] = field(default_factory=list)
    settled: list[DurableCall[Any]] = field(default_factory=list)
    told: list[tuple[str, bytes]] = field(default_factory=list)
    edited: str | None = None

    def __bool__(self) -> bool:
        return bool(self.calls or self.settled or self.told or self.edited)


class WorkflowRun:
    """One execution of a workflow function in this process."""

    def __init__(
        self,
        function: DurableFunction[Any, Any],
        head: Head,
        *,
        payload_bytes_max: int = PAYLOAD_BYTES_MAX,
    ) -> None:
        """Prepare a run; ``begin`` starts it.

        Args:
            function: The workflow.
            head: Of the execution.
            payload_bytes_max: Limit of each argument list and result.
        """
        self.function = function
        self.head = head
        self._payload_bytes_max = payload_bytes_max
        self.pending: dict[str, DurableCall[Any]] = {}
        self.log_scope = LogScope(
            execution_id=str(head.execution_id), workflow=function.name
        )
        self._loop = DurableLoop(
            salt=hash_salt(head.seed), now=head.started_at, enter=self._enter
        )
        self._root: DurableTask[Any] | None = None
        self._decisions = Decisions()
        self._occurrences: dict[str, int] = {}
        self._keys: set[tuple[str, str]] = set()
        self._randoms: dict[str, random_module.Random] = {}
        self._aside: dict[str, Recorded] = {}
        self._cancelled: CancelReason | None = None
        self._returned = False
        self._dropped = False
        self._turn = -1
        self._made: dict[str, DurableCall[Any]] = {}
        self._restoring = False
        self._known_tells: frozenset[str] = frozenset()
        self._known_pages: dict[str, KnownPages] = {}
        self._finished: Finished | None = None
        self.made: frozenset[str] = frozenset()
        """Addresses of the calls that a replay made."""
        self._difference: Difference | None = None

    # What the owner calls: begin, deliver, drain, take, outcome, close.

    def begin(self) -> None:
        """Create the root task; drain next."""
        context = self._loop.adopt_context(contextvars.Context())
        self._loop.begin_delivery()
        self._root = context.run(self._create_root, context)

    def _enter(self) -> None:
        context_caller.set(cast("Any", self))
        context_scope.set(cast("Any", self))
        log_scope.set(self.log_scope)

    def _create_root(self, context: contextvars.Context) -> DurableTask[Any]:
        root: DurableTask[Any] = DurableTask(
            self._run_root(), loop=self._loop, name="workflow", context=context
        )
        root.lineage = ""
        self._loop.adopt(root)
        return root

    async def _run_root(self) -> Any:
        args, kwargs = decode_arguments(self.head.arguments, self.function.function)
        value = self.function.function(*args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    def deliver(self, delivery: Delivery, recorded: Recorded | None = None) -> None:
        """Hand over one delivery; drain next.

        Args:
            delivery: What happens.
            recorded: The outcome that belongs to a ``ResultDelivered``.
        """
        self._loop.begin_delivery()
        self._loop.set_time(delivery.at)
        match delivery:
            case ResultDelivered(address=address):
                if recorded is None:
                    message = f"no recorded outcome for {address}"
                    raise DeterminismError(message)
                self._hand_over(address, recorded)
            case TimeAdvanced():
                self._loop.fire_timers()
            case CancelDelivered(reason=reason):
                self._cancelled = self._cancelled or reason
                if self._root is not None:
                    self._root.cancel(f"execution: {reason}")

    def _hand_over(self, address: str, recorded: Recorded) -> None:
        call = self.pending.pop(address, None)
        if call is None:
            if address not in self._made:
                self._aside[address] = recorded
            return
        if call.done():
            return
        try:
            if not recorded.ok:
                fail_call(call, decode_exception(recorded.payload))
            elif isinstance(call, PageCall):
                call.accept(self._decode(call, recorded.payload), recorded)
            else:
                call.set_result(self._decode(call, recorded.payload))
        except MissingTypeError as error:
            self.pending[address] = call
            self._difference = Difference(address, None, "", str(error))
        except PayloadError as error:
            fail_call(call, error)

    def _decode(self, call: DurableCall[Any], payload: bytes) -> Any:
        target = call.target
        if not isinstance(target, DurableFunction):
            return decode(payload)
        if isinstance(call, PageCall):
            return decode_many(payload, target.return_annotation)
        return decode(payload, target.return_annotation)

    def drain(self, until: float | None = None) -> bool:
        """Run the code until nothing is ready.

        Returns:
            True when quiescent, False when paused at ``until``.
        """
        try:
            while True:
                if not self._loop.drain(until):
                    return False
                if self._difference is not None or not self._hand_over_aside():
                    break
        except LivelockError as error:
            self._difference = Difference(None, None, "", str(error))
            return True
        root = self._root
        if root is not None and root.done() and self._finished is None:
            self._returned = True
            self._finished = Finished(self._record(root), self._cancelled)
            self._finish_loop()
        return True

    def _finish_loop(self) -> None:
        try:
            self._loop.finish()
        except LivelockError as error:
            # The outcome stands; only what outlived the root is stuck.
            log.warning("workflow.cleanup_livelocked", error=str(error))

    def _hand_over_aside(self) -> bool:
        """Deliver the oldest set-aside result whose call is there by now."""
        for address in self._aside:
            if address in self.pending:
                recorded = self._aside.pop(address)
                self._hand_over(address, recorded)
                return True
        return False

    def _record(self, root: DurableTask[Any]) -> Recorded:
        try:
            value = root.result()
        except asyncio.CancelledError as error:
            return Recorded(ok=False, payload=encode_exception(error))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
            return Recorded(ok=False, payload=encode_exception(error))
        if asyncio.isfuture(value) or inspect.iscoroutine(value):
            message = "result: a call that was not awaited; did you forget await?"
            return Recorded(ok=False, payload=encode_exception(PayloadError(message)))
        try:
            payload = encode(value, path="result", bytes_max=self._payload_bytes_max)
            return Recorded(ok=True, payload=payload)
        except BaseException as error:  # noqa: BLE001 - a value's class may do anything
            return Recorded(ok=False, payload=encode_exception(error))

    def take(self) -> Decisions:
        """What the code decided since the last call."""
        decisions, self._decisions = self._decisions, Decisions()
        decisions.calls = [call for call in decisions.calls if not call.cancelled()]
        return decisions

    def outcome(self) -> Outcome:
        """Where the run stands; call it when quiescent."""
        if self._difference is not None:
            return Diverged(self._difference)
        if self._finished is not None:
            return self._finished
        return Parked(tuple(self.pending), self._loop.next_deadline())

    @property
    def now_us(self) -> int:
        """Time of the last delivery, microseconds since 1970."""
        return round(self._loop.time() * 1e6)

    @property
    def next_deadline(self) -> int | None:
        """When the earliest timer is due, microseconds since 1970."""
        return self._loop.next_deadline()

    @property
    def cancelled(self) -> CancelReason | None:
        """Why it was asked to stop, if it was."""
        return self._cancelled

    def cleans_up(self) -> bool:
        """Whether ``close`` would run code of the workflow."""
        return self._loop.cleans_up()

    def close(self) -> None:
        """Drop the run: nothing it does from now on has an effect."""
        self._dropped = True
        self.log_scope.muted = True
        self._loop.close()

    def restore(
        self,
        journal: Journal,
        *,
        strict: bool,
        pause_at: Callable[[], float | None] = lambda: None,
    ) -> Iterator[None]:
        """Replay ``journal``; yields now and then, so that others get a turn.

        Args:
            journal: Of this execution.
            strict: Compare as if the code were unchanged, whatever its digest.
            pause_at: The ``until`` of each drain.
        """
        self._restoring = True
        self.log_scope.muted = True
        self._known_tells = frozenset(a for turn in journal.turns for a in turn.told)
        known = _known(journal)
        self._known_pages = known_pages(known)
        self.begin()
        while not self.drain(pause_at()):
            yield
        for number, turn in enumerate(journal.turns):
            self._turn = number
            for delivery in turn.deliveries:
                recorded = None
                if isinstance(delivery, ResultDelivered):
                    recorded = _as_delivered(journal, turn, delivery.address)
                self.deliver(delivery, recorded)
                while not self.drain(pause_at()):
                    yield
                if self._difference is not None:
                    return
            yield
        self._compare(journal, known, strict=strict)
        self._restoring = False
        self.log_scope.muted = False
        self.made = frozenset(self._made)
        self._made = {}

    def _compare(self, journal: Journal, known: set[str], *, strict: bool) -> None:
        """Find calls the journal does not know, and known ones not made again."""
        last = len(journal.turns) - 1
        new = [
            call
            for address, call in self._made.items()
            if call.turn < last and address not in known and not call.cancelled()
        ]
        # Results that only the journal's readers know (pages of a map) count as made.
        left_over = [a for a in self._aside if a not in self._made]
        left_over += [
            a for a in sorted(known - set(self._aside)) if a and a not in self._made
        ]
        if not new and not left_over:
            return
        if strict or self.function.code_digest == journal.code_digest:
            self._difference = _divergence(left_over, new)
            return
        changed = {_stem(a) for a in left_over} & {_stem(c.address) for c in new}
        if changed:
            stem = min(changed)
            self._difference = _divergence(
                [a for a in left_over if _stem(a) == stem],
                [c for c in new if _stem(c.address) == stem],
            )
            return
        self._decisions.edited = self.function.code_digest

    # What the code inside calls: it is the caller and the scope.

    def call(
        self,
        function: DurableFunction[Any, R],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, R]:
        """Issue a call; see ``registry.Caller``."""
        check_arguments(function, args, kwargs)
        self._check_options(function)
        arguments = encode_arguments(
            tuple(args), kwargs, bytes_max=self._payload_bytes_max
        )
        options = function.keyed(function.settings, args, kwargs)
        return self._issue(function.name, function, arguments, options)

    def _check_options(self, function: DurableFunction[Any, Any]) -> None:
        if function.given:
            function.refuse_activity_options()
        if function.settings.dispatch_key is not None:
            message = "dispatch_key belongs to dispatch; inside a workflow use key="
            raise UsageError(message)
        if function.kind is Kind.WORKFLOW and self.head.depth >= DEPTH_MAX:
            message = f"{function.name}: executions nest deeper than {DEPTH_MAX}"
            raise UsageError(message)

    def start(
        self,
        function: DurableFunction[Any, R],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, Any]:
        """Start a child; the handle is there at once, its result is a call."""
        call = cast("DurableCall[R]", self.call(function, args, kwargs))
        call.child = True
        if function.settings.detached:
            # Nobody is told how a detached execution ends.
            del self.pending[call.address]
        return _started(ChildHandle(call, self.head))

    def map(
        self,
        function: DurableFunction[Any, R],
        items: Items,
        form: MapForm,
    ) -> Coroutine[Any, Any, list[Any]]:
        """Issue a map, which issues its pages one after the other."""
        self._check_options(function)
        if function.settings.detached:
            message = "a map waits for its items; start detached executions one by one"
            raise UsageError(message)
        name = f"map:{function.name}"
        address = self._address(name, "", function.settings.key)
        return MapCall(
            self,
            items,
            form,
            known=self._known_pages.pop(address, {}),
            payload_bytes_max=self._payload_bytes_max,
            loop=self._loop,
            address=address,
            function=name,
            target=function,
            options=function.settings,
        )

    async def sleep(self, duration: dt.timedelta) -> None:
        """A timer of the loop."""
        await asyncio.sleep(duration.total_seconds())

    def now(self) -> dt.datetime:
        """Time of the last delivery."""
        return dt.datetime.fromtimestamp(0, dt.UTC) + dt.timedelta(
            microseconds=self.now_us
        )

    def random(self) -> random_module.Random:
        """The generator of the calling task."""
        return self._random("random")

    def uuid(self) -> uuid_module.UUID:
        """The next UUID of the calling task."""
        return uuid_module.UUID(int=self._random("uuid").getrandbits(128), version=4)

    def _random(self, use: str) -> random_module.Random:
        name = f"{use}{self._loop.lineage()}"
        known = self._randoms.get(name)
        if known is None:
            seed = hashlib.blake2b(name.encode(), key=self.head.seed).digest()
            known = self._randoms[name] = random_module.Random(seed)  # noqa: S311
        return known

    def run(
        self,
        function: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Coroutine[Any, Any, Any]:
        """Issue a call of a function that only this process has."""
        if isinstance(function, DurableFunction):
            return function(*args, **kwargs)
        name = getattr(function, "__qualname__", type(function).__name__)
        arguments = encode_arguments(
            tuple(args), kwargs, bytes_max=self._payload_bytes_max
        )
        return self._issue(
            f"run:{name}",
            LocalFunction(function, args, kwargs),
            arguments,
            _RUN_OPTIONS,
        )

    def tell(self, value: object) -> None:
        """Record a value once."""
        self._refuse_closed()
        payload = encode(value, path="told value", bytes_max=self._payload_bytes_max)
        address = self._address("tell", digest(payload), None)
        if address not in self._known_tells:
            self._decisions.told.append((address, payload))

    def current(self) -> Current:
        """This execution."""
        parent = self.head.parent_id
        return Current(
            execution_id=str(self.head.execution_id),
            root_id=str(self.head.root_id),
            parent_id=None if parent is None else str(parent),
            function=self.function.name,
            kind=Kind.WORKFLOW,
            attempt=1,
            address="",
            tags=self.head.tags,
        )

    def idempotency_key(self) -> NoReturn:
        """Belongs to activities."""
        message = (
            "idempotency_key() belongs into an activity: workflows have no effects"
        )
        raise UsageError(message)

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Belongs to activities."""
        message = "transaction() belongs into an activity: move the SQL into one"
        raise UsageError(message)

    def heartbeat(self, details: object) -> None:
        """Belongs to activities."""
        del details
        message = "heartbeat() belongs into an activity: a workflow has its journal"
        raise UsageError(message)

    def raise_if_cancelled(self, wait: dt.timedelta | None) -> None:
        """Belongs to activities."""
        del wait
        message = (
            "raise_if_cancelled() belongs into an activity: a workflow is cancelled "
            "at its next await"
        )
        raise UsageError(message)

    @property
    def restoring(self) -> bool:
        """Whether what the code does now is what it did before."""
        return self._restoring

    @property
    def closed(self) -> bool:
        """Whether the code may make no more calls."""
        root = self._root
        # The root may have returned in this very drain, before a sibling's turn.
        return self._dropped or self._returned or (root is not None and root.done())

    def diverge(self, expected: str, actual: str | None, line: str, why: str) -> None:
        """What the code does differs from what it did before."""
        if self._difference is None:
            self._difference = Difference(expected, actual, line, why)

    def settle(self, call: DurableCall[Any]) -> None:
        """The code cancelled a call it had made."""
        self.pending.pop(call.address, None)
        if not self._returned:
            self._decisions.settled.append(call)

    def _issue(
        self,
        name: str,
        target: DurableFunction[Any, Any] | LocalFunction,
        arguments: bytes,
        options: Options,
    ) -> DurableCall[Any]:
        call: DurableCall[Any] = DurableCall(
            loop=self._loop,
            issuer=self,
            address=self._address(name, digest(arguments), options.key),
            function=name,
            target=target,
            arguments=arguments,
            options=options,
        )
        self.register(call)
        return call

    def register(self, call: DurableCall[Any]) -> None:
        """Issue a call; its address is known by now."""
        self._refuse_closed()
        call.turn = self._turn
        if self._restoring:
            call.line = user_line()
            self._made[call.address] = call
        self.pending[call.address] = call
        self._decisions.calls.append(call)

    def _address(self, name: str, argument_digest: str, key: str | None) -> str:
        self._refuse_closed()
        lineage = self._loop.lineage()
        if key is None:
            base = f"{lineage}:{name}#{argument_digest}"
        else:
            base = f"{lineage}:{name}#={key}"
            if base in self._occurrences:
                message = f"key {key!r} was used before for {name} in this task"
                raise UsageError(message)
        occurrence = self._occurrences.get(base, 0)
        self._occurrences[base] = occurrence + 1
        return f"{base}.{occurrence}"

    def _refuse_closed(self) -> None:
        if self._dropped:
            raise StopSignal
        if self.closed:
            message = "the execution has returned: durable calls are over"
            raise ExecutionClosedError(message)


class ChildHandle:
    """A started child, seen from inside its parent.

    Attributes:
        address: Of the call that started it; the child's id derives from it.
    """

    def __init__(self, call: DurableCall[Any], head: Head) -> None:
        self._call = call
        self.address = call.address
        self._head = head

    def __hash__(self) -> int:
        """Not by its place in memory: sets of handles keep their order in a replay."""
        return hash(self._call)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def id(self) -> str:
        """The child's execution id."""
        return str(child_execution_id(self._head.execution_id, self.address))

    async def result(self) -> Any:
        """Wait for the child; its value, or its exception raised.

        Raises:
            UsageError: The child is detached: it reports to nobody.
        """
        if self._call.options.detached:
            message = "a detached execution reports to nobody: ask Stent.wait_for"
            raise UsageError(message)
        return await asyncio.shield(self._call)

    def cancel(self) -> bool:
        """Cancel the child; False when it is done."""
        return self._call.cancel()


async def _started(handle: ChildHandle) -> ChildHandle:
    return handle


_RUN_OPTIONS = Options()


def _as_delivered(journal: Journal, turn: Turn, address: str) -> Recorded | None:
    recorded = journal.results.get(address)
    if recorded is None:
        return None
    took_us = None if turn.took is None else turn.took.get(address)
    return Recorded(recorded.ok, recorded.payload, took_us)


def _known(journal: Journal) -> set[str]:
    """Every address that the journal knows."""
    known = set(journal.issued) | set(journal.results)
    for turn in journal.turns:
        known.update(turn.inline, turn.settled)
    return known


def _divergence(
    left_over: Sequence[str], new: Sequence[DurableCall[Any]]
) -> Difference:
    return Difference(
        expected=left_over[0] if left_over else None,
        actual=new[0].address if new else None,
        line=new[0].line if new else "",
        reason="the replay diverged from the journal",
    )


def _callee(address: str | None) -> str:
    """What an address calls, as people name it."""
    return _stem(address or "").rpartition(":")[2] or "nothing"


def _stem(address: str) -> str:
    """(lineage, function) of an address."""
    return address.partition("#")[0]


def hash_salt(seed: bytes) -> int:
    """Deterministic base of the hashes of one execution's tasks.

    From the seed, not the id: a fork replays its origin's journal under a new id.
    """
    return int.from_bytes(hashlib.blake2b(seed, digest_size=6).digest(), "big")


def check_arguments(
    function: DurableFunction[Any, Any],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> None:
    """Raise TypeError where the call itself would.

    Raises:
        TypeError: Too many, too few or unknown arguments.
    """
    required, most = function.positional
    if not kwargs and required <= len(args) <= most:
        return
    inspect.signature(function.function).bind(*args, **kwargs)


def replay(function: DurableFunction[Any, Any], journal: Journal) -> Outcome:
    """Bring ``function`` to where ``journal`` ends, strictly; pure.

    Args:
        function: The workflow.
        journal: Of one of its executions.

    Returns:
        ``Finished`` with what it returned or raised, ``Parked`` with what it waits
        for, or ``Diverged`` with the first difference.

    Source: docs/explanation/how-it-works.md
    """
    run = WorkflowRun(function, journal.head)
    try:
        for _ in run.restore(journal, strict=True):
            continue
        return run.outcome()
    finally:
        run.close()
