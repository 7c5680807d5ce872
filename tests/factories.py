"""An in-memory world that drives one workflow execution, and kills it.

It does what the engine does, with chance in the place of machines: calls finish after
random latencies and in random order, each turn is journaled before its deliveries are
handed over, several deliveries may share a turn, and at any moment the run may be
thrown away and another one restored from what was journaled.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from stent.calls import DurableCall, LocalFunction
from stent.codec import (
    decode_arguments,
    decode_many,
    encode,
    encode_arguments,
    encode_exception,
    encode_many,
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
from stent.model import Recorded
from stent.pages import ItemFailed, PageCall
from stent.registry import DurableFunction
from stent.replay import Decisions, Finished, Outcome, Parked, WorkflowRun

STARTED_AT = 1_700_000_000_000_000
TURNS_MAX = 5_000
RETRY_US = 700_000


class Witness:
    """What the code of the present life has seen, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, *what: object) -> None:
        self.log.append(repr(what))


saw = Witness()


def head(function: DurableFunction[Any, Any], *args: object, **changes: Any) -> Head:
    """The head of an execution of ``function``."""
    execution_id = changes.pop("execution_id", UUID(int=7))
    values: dict[str, Any] = {
        "execution_id": execution_id,
        "function": function.name,
        "arguments": encode_arguments(args, {}),
        "started_at": STARTED_AT,
        "seed": b"a seed of tests",
        "key_seed": execution_id,
        "root_id": execution_id,
    }
    return Head(**(values | changes))


def begun(function: DurableFunction[Any, Any], *args: object) -> WorkflowRun:
    """A run that has made its first step."""
    run = WorkflowRun(function, head(function, *args))
    run.begin()
    assert run.drain()
    return run


def drive(step: Coroutine[Any, Any, Any]) -> Any:
    """The value of a coroutine that never waits."""
    try:
        step.send(None)
    except StopIteration as stop:
        return stop.value
    message = "this activity waits; those of tests may not"
    raise AssertionError(message)


def perform(call: DurableCall[Any], now: int = STARTED_AT) -> Recorded:
    """Run what a call stands for, at ``now`` in microseconds."""
    target = call.target
    try:
        if isinstance(call, PageCall):
            return Recorded(ok=True, payload=encode_many(_perform_page(call, now)))
        if isinstance(target, LocalFunction):
            value = target.function(*target.args, **target.kwargs)
        else:
            assert isinstance(target, DurableFunction)
            args, kwargs = decode_arguments(call.arguments, target.function)
            value = target.function(*args, **kwargs)
        value = drive(value) if inspect.iscoroutine(value) else value
        return Recorded(ok=True, payload=encode(value))
    except Exception as error:  # noqa: BLE001 - user code
        return Recorded(ok=False, payload=encode_exception(error))


def _perform_page(call: PageCall, now: int) -> list[Any]:
    """What a worker does: a failed item with attempts left is given up."""
    assert isinstance(call.target, DurableFunction)
    results: list[Any] = []
    for item in decode_many(call.arguments):
        try:
            value = call.target.function(*(item if call.form.star else (item,)))
            results.append(drive(value) if inspect.iscoroutine(value) else value)
        except Exception as error:
            if call.options.retry.retries(error, 1):
                retry_at_us = now + RETRY_US
                results.append(ItemFailed(1, retry_at_us, encode_exception(error)))
            elif call.form.return_exceptions:
                results.append(error)
            else:
                raise
    return results


class KilledError(Exception):
    """The life ends here."""


@dataclass
class World:
    """Everything outside of one execution.

    Attributes:
        function: The workflow.
        chance: Of latencies, orders and kills.
        kill: Probability of a kill at each of the moments of a turn.
        latency_us: Upper bound of what a call takes.
        page_us: Upper bound of what a worker measures.
        cancel_at_us: When the execution is cancelled, after its start.
        endless: Functions whose calls never finish.
    """

    function: DurableFunction[Any, Any]
    args: tuple[object, ...] = ()
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    kill: float = 0.0
    latency_us: int = 2_000_000
    page_us: int = 4_000_000
    cancel_at_us: int | None = None
    cancel_reason: CancelReason = "cancel"
    endless: frozenset[str] = frozenset()
    slice_drains: bool = False

    turns: list[Turn] = field(default_factory=list)
    results: dict[str, Recorded] = field(default_factory=dict)
    issued: set[str] = field(default_factory=set)
    lives: list[list[str]] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    journals: list[Journal] = field(default_factory=list)
    """As they were after each turn."""

    def __post_init__(self) -> None:
        self.head = head(self.function, *self.args)
        self.now = STARTED_AT
        self.cancel_sent = False
        self._decisions = Decisions()
        self._calls: dict[str, DurableCall[Any]] = {}
        self._ready_at: dict[str, int] = {}
        self._inline: dict[str, DurableCall[Any]] = {}
        self._unwritten: dict[str, Recorded] = {}

    def journal(self) -> Journal:
        """What has been committed so far."""
        return Journal(
            head=self.head,
            code_digest=self.function.code_digest,
            turns=tuple(self.turns),
            results=dict(self.results),
            issued=frozenset(self.issued),
        )

    def live(self) -> Outcome:
        """Live, die and live again, until there is an outcome."""
        while True:
            saw.log = []
            self._run = WorkflowRun(self.function, self.head)
            try:
                return self._live_once()
            except KilledError:
                continue
            finally:
                self._end_life()

    def _live_once(self) -> Outcome:
        if self.turns or self.issued:
            self._restore()
        else:
            self._run.begin()
            self._drain()
            self._collect()
        for _ in range(TURNS_MAX):
            outcome = self._run.outcome()
            if not isinstance(outcome, Parked):
                return outcome
            self._take_turn(outcome)
        message = f"not finished after {TURNS_MAX} turns"
        raise AssertionError(message)

    def _end_life(self) -> None:
        log = saw.log
        saw.log = []
        self._run.close()
        saw.log = []
        if self.lives:
            longest = max(self.lives, key=len)
            common = min(len(log), len(longest))
            assert log[:common] == longest[:common], "two different pasts"
        self.lives.append(log)
        # What ran inside the dead process is lost; rows are run by others meanwhile.
        for address in self._ready_at:
            if address in self.issued and self.chance.random() < 0.3:
                self._settle(address)
        self._decisions = Decisions()
        self._calls.clear()
        self._ready_at.clear()
        self._inline.clear()

    def _restore(self) -> None:
        before = max(self.lives, key=len)
        for _ in self._run.restore(self.journal(), strict=True, pause_at=self._pause):
            continue
        assert saw.log[: len(before)] == before, "a later life saw another past"
        taken = self._run.take()
        settled = {address for turn in self.turns for address in turn.settled}
        known = self.issued | set(self.results)
        self._decisions = Decisions(
            settled=[c for c in taken.settled if c.address not in settled],
            told=taken.told,
        )
        delivered = {
            delivery.address
            for turn in self.turns
            for delivery in turn.deliveries
            if isinstance(delivery, ResultDelivered)
        }
        for call in taken.calls:
            if call.address in self.issued and call.address not in delivered:
                self._fly(call)
            elif call.address not in known and not call.done():
                self._issue(call)

    def _issue(self, call: DurableCall[Any]) -> None:
        if self.chance.random() < 0.5:
            self._inline[call.address] = call
        else:
            self._decisions.calls.append(call)
        self._fly(call)

    def _fly(self, call: DurableCall[Any]) -> None:
        self._calls[call.address] = call
        if call.function not in self.endless:
            latency = self.chance.randrange(1, self.latency_us)
            self._ready_at[call.address] = self.now + latency

    def _collect(self) -> None:
        """Take over what the code has decided since the last time."""
        taken = self._run.take()
        for call in taken.settled:
            if call.address in self.issued and self.chance.random() < 0.3:
                self._settle(call.address)  # too late to stop it: kept for history
            self._ready_at.pop(call.address, None)
            self._inline.pop(call.address, None)
        self._decisions.settled += taken.settled
        self._decisions.told += taken.told
        for call in taken.calls:
            self._issue(call)

    def _insert_some(self) -> None:
        """Of many calls the first are inserted before the others, and their turn."""
        calls = self._decisions.calls
        if self.kill and calls and self.chance.random() < 0.3:
            count = self.chance.randint(1, len(calls))
            self.issued |= {call.address for call in calls[:count]}
            del calls[:count]
            self._die()

    def _take_turn(self, parked: Parked) -> None:
        self._die()
        self._insert_some()
        # A task row cannot run before the turn that inserts it is committed.
        rows = {call.address for call in self._decisions.calls}
        if rows and (rows >= self._ready_at.keys() or self.chance.random() < 0.5):
            self._commit([])
            self._die()
            rows = set()
        deliveries = self._next_deliveries(parked, rows)
        self._commit(deliveries)
        self._die()
        for delivery in deliveries:
            self._deliver(delivery)
            self._die()
        self._collect()

    def _next_deliveries(self, parked: Parked, rows: set[str]) -> list[Delivery]:
        cancel_at = self._cancel_at()
        ready = {a: at for a, at in self._ready_at.items() if a not in rows}
        moments = [*ready.values()]
        moments += [t for t in (parked.wake_at, cancel_at) if t is not None]
        assert moments, f"nothing can happen any more: {parked}"
        window = self.chance.choice((0, 0, 1_000, 500_000))
        self.now = max(self.now + 1, min(moments) + window)
        arrived = [a for a, at in ready.items() if at <= self.now]
        self.chance.shuffle(arrived)
        for address in arrived:
            del self._ready_at[address]
            self._settle(address)
        deliveries: list[Delivery] = [
            ResultDelivered(a, self.now) for a in arrived if a in self._run.pending
        ]
        if cancel_at is not None and cancel_at <= self.now:
            place = self.chance.randint(0, len(deliveries))
            deliveries.insert(place, CancelDelivered(self.cancel_reason, self.now))
        if parked.wake_at is not None and parked.wake_at <= self.now:
            deliveries.append(TimeAdvanced(self.now))
        return deliveries

    def _cancel_at(self) -> int | None:
        if self.cancel_at_us is None or self.cancel_sent:
            return None
        return STARTED_AT + self.cancel_at_us

    def _settle(self, address: str) -> None:
        """Run the call; a row's result is committed at once, an inline one's later."""
        if address in self.results or address in self._unwritten:
            return
        self.attempts[address] = self.attempts.get(address, 0) + 1
        recorded = perform(self._calls[address], self.now)
        if address in self._inline:
            self._unwritten[address] = recorded
        else:
            self.results[address] = recorded

    def _commit(self, deliveries: list[Delivery]) -> None:
        """One flush: results, decisions, deliveries."""
        for address, recorded in self._unwritten.items():
            self.results[address] = recorded
            self._inline.pop(address, None)
        self._unwritten.clear()
        decided, self._decisions = self._decisions, Decisions()
        self.issued |= {c.address for c in decided.calls}
        self.cancel_sent = self.cancel_sent or any(
            isinstance(d, CancelDelivered) for d in deliveries
        )
        self.turns.append(
            Turn(
                deliveries=tuple(deliveries),
                inline=tuple(self._inline),
                settled=tuple(c.address for c in decided.settled),
                told=tuple(address for address, _ in decided.told),
                took=self._measured(deliveries) or None,
            )
        )
        self.journals.append(self.journal())

    def _measured(self, deliveries: list[Delivery]) -> dict[str, int]:
        """No two lives measure the same."""
        return {
            delivery.address: self.chance.randrange(1, self.page_us)
            for delivery in deliveries
            if isinstance(delivery, ResultDelivered)
            and isinstance(self._calls.get(delivery.address), PageCall)
        }

    def _deliver(self, delivery: Delivery) -> None:
        recorded = None
        if isinstance(delivery, ResultDelivered):
            took_us = (self.turns[-1].took or {}).get(delivery.address)
            recorded = replace(self.results[delivery.address], took_us=took_us)
        self._run.deliver(delivery, recorded)
        self._drain()

    def _pause(self) -> float | None:
        return 0.0 if self.slice_drains else None

    def _drain(self) -> None:
        while not self._run.drain(self._pause()):
            continue

    def _die(self) -> None:
        if self.chance.random() < self.kill:
            self._unwritten.clear()
            raise KilledError


def outcome_of(
    function: DurableFunction[Any, Any], *args: object, **world: Any
) -> Finished:
    """Run ``function`` in an undisturbed world."""
    outcome = World(function, args, **world).live()
    assert isinstance(outcome, Finished), outcome
    return outcome
