"""Replay: divergence, edits, closing, cancellation, golden journals."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from stent import context as stent
from stent.codec import decode, decode_exception, encode, encode_exception
from stent.errors import DeterminismError, ExecutionCancelledError, UsageError
from stent.journal import (
    CancelDelivered,
    Head,
    Journal,
    ResultDelivered,
    TimeAdvanced,
    Turn,
    decode_turn,
    encode_turn,
)
from stent.model import Kind, Recorded
from stent.registry import DurableFunction, durable
from stent.replay import Diverged, Finished, Parked, WorkflowRun, replay
from tests import programs
from tests.factories import STARTED_AT, World, begun, head, saw

HISTORIES = Path(__file__).parent.parent / "histories"
GOLDEN_SEED = 11


@durable(name="replay.fetch")
async def fetch(value: int) -> int:
    return value


@durable(name="replay.other")
async def other(value: int) -> int:
    return value


@durable(name="replay.third")
async def third(value: int) -> int:
    return value


def workflow(function: Callable[..., Any], digest: str = "one") -> Any:
    """A durable workflow whose module has the given digest."""
    made: DurableFunction[..., Any] = DurableFunction(
        function, "replay.flow", fetch.settings, Kind.WORKFLOW
    )
    made.code_digest = digest
    return made


async def original() -> list[int]:
    first = await fetch(1)
    second = await fetch(2)
    both = await asyncio.gather(fetch(3), other(4))
    return [first, second, *both]


async def removed_call() -> list[int]:
    first = await fetch(1)
    return [first, *await asyncio.gather(fetch(3), other(4))]


async def removed_other() -> list[int]:
    return [await fetch(1), await fetch(2), await fetch(3)]


async def added_call() -> list[int]:
    await third(77)
    return await original()


async def added_unawaited() -> list[int]:
    _call: Any = third(78)
    return await original()


async def changed_arguments() -> list[int]:
    first = await fetch(1)
    second = await fetch(22)
    return [first, second, *await asyncio.gather(fetch(3), other(4))]


async def swapped() -> list[int]:
    second_call, first_call = fetch(2), fetch(1)
    first, second = await first_call, await second_call
    other_call, fetch_call = other(4), fetch(3)
    return [first, second, await fetch_call, await other_call]


def recorded_journals(function: Any = original) -> list[Journal]:
    """The journal after each turn, the last one at the end."""
    world = World(workflow(function), chance=random.Random(3))
    assert isinstance(world.live(), Finished)
    return world.journals


def test_the_same_code_replays_to_the_same_end() -> None:
    """And a shorter journal to an earlier place."""
    *earlier, journal = recorded_journals()
    outcome = replay(workflow(original), journal)
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == [1, 2, 3, 4]
    for each in earlier:
        assert isinstance(replay(workflow(original), each), Parked)


async def awaits_a_set() -> list[int]:
    handles = {await programs.child.start(number) for number in range(20)}
    return [await handle.result() for handle in handles]


def test_a_set_of_handles_keeps_its_order() -> None:
    """They are not ordered by where they happen to lie in memory."""
    journal = recorded_journals(awaits_a_set)[-1]
    first = replay(workflow(awaits_a_set), journal)
    in_the_way = []
    for size in range(10):
        in_the_way.append([object() for _ in range(size * 1000 + 7)])
        again = replay(workflow(awaits_a_set), journal)
        assert isinstance(first, Finished)
        assert isinstance(again, Finished)
        assert decode(again.recorded.payload) == decode(first.recorded.payload)


@pytest.mark.parametrize(
    ("edited", "expected", "actual", "said"),
    [
        (removed_call, ":replay.fetch#", None, "replay.fetch that the code does not"),
        (removed_other, ":replay.other#", None, "replay.other that the code does not"),
        (added_call, ":replay.fetch#", ":replay.third#", "where it has a call of"),
        (added_unawaited, None, ":replay.third#", "of which it knows nothing"),
        (changed_arguments, ":replay.fetch#", ":replay.fetch#", "with other arguments"),
    ],
)
def test_divergence_is_explained(
    edited: Callable[..., Any], expected: str | None, actual: str | None, said: str
) -> None:
    """What the journal knows, what the code did, and where."""
    outcome = replay(workflow(edited), recorded_journals()[-1])
    assert isinstance(outcome, Diverged)
    difference = outcome.difference
    assert (difference.expected or "").startswith(expected or "")
    assert (difference.expected is None) == (expected is None)
    assert (difference.actual or "").startswith(actual or "")
    assert (difference.actual is None) == (actual is None)
    assert said in str(difference)
    if actual is not None:
        first = edited.__code__.co_firstlineno
        file, _, line = difference.line.rpartition(":")
        assert file == __file__
        assert first < int(line) < first + 5
        assert difference.line in str(difference)


def test_reordered_calls_are_no_divergence() -> None:
    """Matching is by address, not by position."""
    outcome = replay(workflow(swapped), recorded_journals()[-1])
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == [1, 2, 3, 4]


def restored(function: Any, journal: Journal) -> WorkflowRun:
    run = WorkflowRun(function, journal.head)
    for _ in run.restore(journal, strict=False):
        continue
    return run


@pytest.mark.parametrize("edited", [removed_other, added_call, added_unawaited])
def test_edited_code_is_accepted_around_finished_calls(
    edited: Callable[..., Any],
) -> None:
    """Under another digest, a call more or less is an edit, and journaled as one."""
    run = restored(workflow(edited, "two"), recorded_journals()[-1])
    assert not isinstance(run.outcome(), Diverged)
    assert run.take().edited == "two"
    run.close()


def test_a_changed_call_blocks_edited_code_too() -> None:
    """The same function in the same place with other arguments is no edit around."""
    run = restored(workflow(changed_arguments, "two"), recorded_journals()[-1])
    outcome = run.outcome()
    assert isinstance(outcome, Diverged)
    assert str(outcome.difference.expected).startswith(":replay.fetch#")
    assert str(outcome.difference.actual).startswith(":replay.fetch#")
    run.close()


def test_left_over_results_are_handed_over_live() -> None:
    """Edited code that asks later for what is there gets it at once."""

    async def later() -> list[int]:
        await other(99)
        return [await fetch(1), await fetch(2)]

    async def before() -> list[int]:
        return [await fetch(1), await fetch(2), await fetch(3)]

    journal = recorded_journals(before)[-2]
    run = restored(workflow(later, "two"), journal)
    (call,) = run.take().calls
    assert call.function == "replay.other"
    run.deliver(
        ResultDelivered(call.address, run.now_us + 1),
        Recorded(ok=True, payload=encode(0)),
    )
    assert run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == [1, 2]


def test_calls_after_the_last_turn_are_issued() -> None:
    """What was decided and not yet journaled when the owner died is no divergence."""
    run = begun(workflow(original))
    (first,) = run.take().calls
    turn = Turn(deliveries=(ResultDelivered(first.address, STARTED_AT + 5),))
    journal = Journal(
        head=run.head,
        code_digest="one",
        turns=(turn,),
        results={first.address: Recorded(ok=True, payload=encode(1))},
        issued=frozenset({first.address}),
    )
    again = restored(workflow(original), journal)
    outcome = again.outcome()
    assert isinstance(outcome, Parked)
    assert [c.address for c in again.take().calls if not c.done()] == [*outcome.calls]
    assert len(outcome.calls) == 1
    # Once a later turn is there, the same call must be known.
    longer = dataclasses.replace(
        journal, turns=(turn, Turn(deliveries=(TimeAdvanced(STARTED_AT + 6),)))
    )
    assert isinstance(replay(workflow(original), longer), Diverged)
    run.close()
    again.close()


def test_a_restored_run_pauses_and_is_silent() -> None:
    """Replay gives way to others, and logs again only when it is through."""
    journal = recorded_journals()[-2]
    run = WorkflowRun(workflow(original), journal.head)
    pauses = 0
    for _ in run.restore(journal, strict=True):
        assert run.log_scope.muted
        pauses += 1
    assert pauses == len(journal.turns)
    assert not run.log_scope.muted
    run.close()
    assert run.log_scope.muted


def test_told_values_are_told_once() -> None:
    """A replay tells again only what the journal does not know."""

    async def telling() -> None:
        stent.tell("first")
        await fetch(1)
        stent.tell("second")
        await fetch(2)

    run = begun(workflow(telling))
    decisions = run.take()
    (told, _), call = decisions.told[0], decisions.calls[0]
    journal = Journal(
        head=run.head,
        code_digest="one",
        turns=(
            Turn(
                deliveries=(ResultDelivered(call.address, STARTED_AT + 1),),
                told=(told,),
            ),
        ),
        results={call.address: Recorded(ok=True, payload=encode(1))},
        issued=frozenset({call.address}),
    )
    again = restored(workflow(telling), journal)
    assert [decode(payload) for _, payload in again.take().told] == ["second"]
    run.close()
    again.close()


def test_a_missing_exception_class_parks() -> None:
    """The first run knew the class; a replay that does not must not choose another."""
    module = types.ModuleType("stent_test_vanishing")
    sys.modules[module.__name__] = module
    try:
        exec("class VanishingError(Exception): ...", module.__dict__)
        recorded = Recorded(
            ok=False, payload=encode_exception(module.VanishingError("x"))
        )
    finally:
        del sys.modules[module.__name__]
    run = begun(workflow(original))
    (call,) = run.take().calls
    run.deliver(ResultDelivered(call.address, STARTED_AT + 1), recorded)
    run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Diverged)
    assert "stent_test_vanishing" in str(outcome.difference)
    run.close()


def test_a_livelock_parks() -> None:
    """Code that never waits is stopped and named, not retried."""

    async def spinning() -> None:
        while True:  # noqa: ASYNC110 - the fault
            await asyncio.sleep(0)

    run = WorkflowRun(workflow(spinning), head(workflow(spinning)))
    run.begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stent.loop.CALLBACKS_MAX", 500)
        assert run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Diverged)
    said = str(outcome.difference)
    assert "callbacks without waiting" in said
    assert "expected" not in said
    run.close()


def test_a_delivery_needs_its_outcome() -> None:
    """A journal that names a result it does not have is damaged."""
    run = begun(workflow(original))
    with pytest.raises(DeterminismError, match="no recorded outcome"):
        run.deliver(ResultDelivered("nowhere", STARTED_AT + 1))
    run.close()


def test_a_result_that_cannot_be_encoded_is_a_failure() -> None:
    """The execution fails with the path of the value."""

    async def odd() -> object:
        return {"deep": [open]}

    outcome = begun(workflow(odd)).outcome()
    assert isinstance(outcome, Finished)
    assert not outcome.recorded.ok
    assert "result" in str(decode_exception(outcome.recorded.payload))


def test_arguments_that_cannot_be_decoded_are_a_failure() -> None:
    """The head's arguments must fit the function."""

    async def strict(value: int) -> int:
        return value

    outcome = begun(workflow(strict)).outcome()
    assert isinstance(outcome, Finished)
    assert not outcome.recorded.ok


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, StopIteration])
def test_exits_of_the_root_are_outcomes(error: type[BaseException]) -> None:
    """They end the execution, not the worker."""

    async def exits() -> None:
        raise error

    outcome = begun(workflow(exits)).outcome()
    assert isinstance(outcome, Finished)
    assert not outcome.recorded.ok
    assert isinstance(decode_exception(outcome.recorded.payload), Exception)


def test_cancelling_the_root_lets_it_clean_up() -> None:
    """Cleanup may await durable calls; the outcome is the cancellation."""

    async def careful() -> None:
        try:
            await fetch(1)
        finally:
            await other(2)

    run = begun(workflow(careful))
    (first,) = run.take().calls
    run.deliver(CancelDelivered("cancel", STARTED_AT + 1))
    run.drain()
    decisions = run.take()
    assert decisions.settled == [first]
    (cleanup,) = decisions.calls
    assert run.cancelled == "cancel"
    run.deliver(
        ResultDelivered(cleanup.address, STARTED_AT + 2),
        Recorded(ok=True, payload=encode(2)),
    )
    run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert outcome.cancelled == "cancel"
    error = decode_exception(outcome.recorded.payload)
    assert isinstance(error, ExecutionCancelledError)


def test_a_root_that_returns_after_a_cancel_keeps_its_value() -> None:
    """The value stays in history; the reason says how it ended."""

    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await fetch(1)
        return "value"

    run = begun(workflow(stubborn))
    run.deliver(CancelDelivered("timeout", STARTED_AT + 1))
    run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    assert decode(outcome.recorded.payload) == "value"
    assert outcome.cancelled == "timeout"
    run.close()


def test_time_never_goes_back() -> None:
    """A delivery from a slower clock shows the later time."""

    async def timed() -> list[str]:
        found = []
        for value in range(2):
            await fetch(value)
            found.append(stent.now().isoformat())
        return found

    run = begun(workflow(timed))
    for at in (50, 20):
        (call,) = run.take().calls
        run.deliver(
            ResultDelivered(call.address, STARTED_AT + at),
            Recorded(ok=True, payload=encode(1)),
        )
        run.drain()
    outcome = run.outcome()
    assert isinstance(outcome, Finished)
    first, second = decode(outcome.recorded.payload)
    assert first == second
    assert run.now_us == STARTED_AT + 50


def test_chance_follows_the_seed_not_the_id() -> None:
    """A fork has another id and sees the same chance, order of sets included."""

    async def chancy() -> list[Any]:
        tasks = [asyncio.create_task(asyncio.sleep(0), name=f"t{i}") for i in range(9)]
        done, _ = await asyncio.wait(tasks)
        order = [task.get_name() for task in done]
        return [stent.random().random(), stent.uuid().hex, order]

    def value(**changes: Any) -> Any:
        run = WorkflowRun(workflow(chancy), head(workflow(chancy), **changes))
        run.begin()
        run.drain()
        outcome = run.outcome()
        assert isinstance(outcome, Finished)
        return decode(outcome.recorded.payload)

    assert value() == value(execution_id=UUID(int=99))
    assert value() != value(seed=b"another seed")


def test_effects_of_activities_are_refused() -> None:
    """A workflow has no idempotency key and no transaction."""

    async def confused() -> list[str]:
        found = []
        for use in (stent.idempotency_key, stent.transaction):
            try:
                use()
            except UsageError as error:
                found.append(str(error))
        return found

    outcome = begun(workflow(confused)).outcome()
    assert isinstance(outcome, Finished)
    messages = decode(outcome.recorded.payload)
    assert ["into" in each and "activity" in each for each in messages] == [True, True]


# Golden journals: recorded once, by CPython 3.11, replayed by every version.
# ``python -m tests.unit.test_replay`` records them anew; do so only when the format
# changes on purpose, because journals like these are in databases.


def golden_path(function: Any) -> Path:
    return HISTORIES / f"{function.name.rpartition('.')[2]}.json"


def write_golden(function: Any) -> None:
    world = World(
        function,
        (4,),
        chance=random.Random(GOLDEN_SEED),
        kill=0.05,
        cancel_at_us=1_500_000 if function is programs.cleanup else None,
    )
    outcome = world.live()
    assert isinstance(outcome, Finished)
    journal = world.journal()
    document = {
        "head": json.loads(
            msgspec.json.encode(
                {
                    field.name: getattr(journal.head, field.name)
                    for field in dataclasses.fields(journal.head)
                }
            )
        ),
        "turns": [json.loads(encode_turn(turn)) for turn in journal.turns],
        "results": {
            address: [recorded.ok, _text(recorded.payload)]
            for address, recorded in sorted(journal.results.items())
        },
        "issued": sorted(journal.issued),
        "outcome": [outcome.recorded.ok, _shown(outcome), outcome.cancelled],
        "seen": max(world.lives, key=len),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    # Tracebacks name files; where the project lay does not matter.
    text = text.replace(f"{HISTORIES.parent.parent}/", "")
    golden_path(function).write_text(text + "\n")


def _shown(outcome: Finished) -> str:
    """A value as it is; of an exception its class, for the traceback has paths."""
    if outcome.recorded.ok:
        return _text(outcome.recorded.payload)
    return type(decode_exception(outcome.recorded.payload)).__name__


def _text(payload: bytes) -> str:
    return payload.decode("utf-8", "surrogateescape")


def read_golden(path: Path) -> tuple[Journal, dict[str, Any]]:
    document = json.loads(path.read_text())
    return (
        Journal(
            head=msgspec.convert(document["head"], Head, strict=False),
            code_digest="",
            turns=[
                decode_turn(json.dumps(each).encode()) for each in document["turns"]
            ],
            results={
                address: Recorded(ok, payload.encode("utf-8", "surrogateescape"))
                for address, (ok, payload) in document["results"].items()
            },
            issued=frozenset(document["issued"]),
        ),
        document,
    )


@pytest.mark.parametrize("function", programs.CORPUS, ids=lambda f: f.name)
def test_golden_journals_replay(function: Any) -> None:
    """Journals of an earlier release, on any Python: the same sights, the same end."""
    journal, document = read_golden(golden_path(function))
    saw.log = []
    outcome = replay(function, journal)
    assert isinstance(outcome, Finished), outcome
    ok, shown, cancelled = document["outcome"]
    assert [outcome.recorded.ok, outcome.cancelled] == [ok, cancelled]
    assert _shown(outcome) == shown
    assert saw.log[: len(document["seen"])] == document["seen"]


def test_every_golden_journal_is_tested() -> None:
    """No file without its program."""
    names = {golden_path(function).name for function in programs.CORPUS}
    assert {path.name for path in HISTORIES.glob("*.json")} == names


if __name__ == "__main__":
    HISTORIES.mkdir(exist_ok=True)
    for program in programs.CORPUS:
        write_golden(program)
