"""What a worker holds, while its writer hears late of what is committed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from uuid import uuid4

import pytest

from stent import durable
from stent.services.attempts import Attempt, Failed
from stent.services.options import load_options
from stent.services.settles import Held, Release, Retry, TaskItem


@durable
async def fetch() -> None: ...


CALL_ID = uuid4()
FAILED = Failed(b"", dt.datetime(2026, 1, 1, tzinfo=dt.UTC))


def make_attempt(number: int, epoch: int) -> Attempt:
    return Attempt(
        execution_id=uuid4(),
        call_id=CALL_ID,
        address="fetch",
        target=fetch,
        arguments=b"",
        options=load_options(None, fetch),
        stored_options=None,
        number=number,
        epoch=epoch,
        key_seed=uuid4(),
        root_id=uuid4(),
        parent_id=None,
        tags=(),
    )


@pytest.mark.parametrize(
    "make_item",
    [
        lambda attempt, held: Retry(attempt, held, FAILED, lambda _at: None),
        Release,
    ],
)
@pytest.mark.parametrize("end", [TaskItem.committed, TaskItem.lost])
def test_the_next_attempt_stays_held_when_the_last_one_is_committed_late(
    make_item: Callable[[Attempt, Held], TaskItem], end: Callable[[TaskItem], None]
) -> None:
    """The task was claimed again before its giving back was known to be committed."""
    held: Held = set()
    first, second = make_attempt(1, 1), make_attempt(2, 2)
    held.add(first)
    item = make_item(first, held)
    held.add(second)
    end(item)
    assert held == {second}
