"""What a turn with many calls writes before it is written itself."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from stent import durable
from stent.codec import encode, encode_arguments
from stent.journal import Turn
from stent.model import Recorded
from stent.services.residents import Arrived, Resident, resident_child
from stent.services.turn_items import NewCalls, TurnItem
from stent.store.flush import Flush

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PARENT, ID = UUID(int=1), UUID(int=2)


@durable(kind="workflow")
async def program() -> None:
    raise AssertionError


@pytest.fixture
def resident() -> Resident:
    arguments = encode_arguments((), {})
    row: tuple[object, ...] = (
        *(ID, PARENT, ":program#0.0", PARENT, program.name, program.kind),
        *("default", 0, 1, False, True, None, NOW, None, b"s" * 16, [], None),
        *(arguments, program.code_digest),
    )
    return resident_child(row, program, 1000)


class Told:
    """Who an item tells what becomes of it."""

    def __init__(self) -> None:
        self.taken = 0
        self.inserted: list[NewCalls] = []
        self.committed = 0

    def item(self, resident: Resident) -> TurnItem:
        def taken(_item: TurnItem) -> None:
            self.taken += 1

        def committed(_item: TurnItem) -> None:
            self.committed += 1

        ignored: Callable[..., None] = lambda *_: None  # noqa: E731 - not reached
        item = TurnItem(
            resident,
            committed,
            ignored,
            ignored,
            lambda _, calls: self.inserted.append(calls),
            taken,
        )
        item.turn = Turn()
        return item


def read(resident: Resident, number: int) -> Arrived:
    """A row of the inbox has been read."""
    one = Arrived(f":x#{number}.0", Recorded(ok=True, payload=encode(1)))
    one.inbox_id = number
    resident.inbox_known.add(number)
    resident.arrived.append(one)
    return one


def written(item: TurnItem) -> Flush:
    flush = Flush()
    item.contribute(flush)
    return flush


def test_results_leave_the_inbox_before_the_turn(resident: Resident) -> None:
    """Nobody reads their rows again; those that came later have theirs still."""
    told = Told()
    item = told.item(resident)
    item.begin_part()  # two flushes: the turn goes with the second
    first = read(resident, 1)
    resident.arrived.append(Arrived(":x#0.0", Recorded(ok=True, payload=encode(0))))
    flush = written(item)
    assert flush.inbox == [(ID, 1)]
    assert flush.turns == []
    second = read(resident, 2)
    item.committed()
    assert resident.inbox_known == {2}
    assert (first.inbox_id, second.inbox_id) == (None, 2)
    assert len(told.inserted) == 1
    assert told.committed == 0
    assert [turn[0] for turn in written(item).turns] == [ID]
    item.committed()
    assert told.committed == 1


def test_a_flush_that_is_tried_again_takes_what_came_since(resident: Resident) -> None:
    """Nothing was deleted when the row of the execution was locked."""
    item = Told().item(resident)
    item.begin_part()
    read(resident, 1)
    written(item)
    read(resident, 2)
    assert written(item).inbox == [(ID, 1), (ID, 2)]
    item.committed()
    assert resident.inbox_known == set()


def test_who_is_parked_is_awake_before_its_inbox_is_empty(resident: Resident) -> None:
    """Else, should its owner die now, nothing would wake it."""
    item = Told().item(resident)
    item.begin_part()
    resident.parked = True
    read(resident, 1)
    flush = written(item)
    assert flush.inbox == [(ID, 1)]
    assert len(flush.marks) == 1


def test_the_next_calls_are_asked_for_once_the_flush_is_put_together(
    resident: Resident,
) -> None:
    """Once for each flush, and not when there is another ready."""
    told = Told()
    item = told.item(resident)
    item.rest.append(object())  # type: ignore[arg-type] # not looked at
    written(item)
    assert told.taken == 1
    item.begin_part()
    written(item)
    assert told.taken == 1
    item.committed()
    assert len(item.calls) == 1
