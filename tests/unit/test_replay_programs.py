"""No point of a program ever sees two different pasts, however often it is killed."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from stent.codec import decode
from stent.replay import Finished, replay
from tests import programs
from tests.factories import World, saw

KILLS = (0.0, 0.03, 0.2)
"""Probabilities of a kill at each moment of a turn."""
COUNT = 4


def live_and_replay(world: World) -> Finished:
    """Live to the end, then replay the journal once more; both must agree."""
    outcome = world.live()
    assert isinstance(outcome, Finished), outcome
    seen = max(world.lives, key=len)
    saw.log = []
    assert replay(world.function, world.journal()) == outcome
    assert saw.log[: len(seen)] == seen
    return outcome


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("function", programs.CORPUS, ids=lambda f: f.name)
def test_corpus_sees_one_past(function: Any, seed: int, kill: float) -> None:
    """Every kind of concurrent code finishes with a result of an undisturbed run."""
    world = World(
        function,
        (COUNT,),
        chance=random.Random(seed),
        kill=kill,
        slice_drains=seed % 2 == 1,
    )
    recorded = live_and_replay(world).recorded
    if function is programs.failing_group:
        assert not recorded.ok
        assert b"ExceptionGroup" in recorded.payload
        assert b"NoLuckError" in recorded.payload
    else:
        assert recorded.ok, recorded
        check = programs.CORPUS[function]
        assert check(decode(recorded.payload), COUNT), decode(recorded.payload)


@pytest.mark.parametrize("reason", ["cancel", "timeout"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("function", programs.CORPUS, ids=lambda f: f.name)
def test_cancelled_corpus_cleans_up(function: Any, seed: int, reason: Any) -> None:
    """A cancel in the middle, kills included, ends every program in order."""
    chance = random.Random(seed)
    world = World(
        function,
        (COUNT,),
        chance=chance,
        kill=0.05,
        cancel_at_us=chance.randrange(2_500_000),
        cancel_reason=reason,
    )
    outcome = live_and_replay(world)
    assert outcome.cancelled in {None, reason}
    if function is programs.cleanup and outcome.cancelled:
        seen = max(world.lives, key=len)
        assert seen[-3] == "('cleaning',)"
        assert seen[-1] == "('cleaned',)"


@pytest.mark.parametrize("seed", range(250))
def test_random_programs_see_one_past(seed: int) -> None:
    """Trees of groups, races, timeouts, scopes and cleanup; random kills, cancels."""
    chance = random.Random(seed)
    spec = programs.random_program(chance)
    world = World(
        programs.interpret,
        (spec,),
        chance=chance,
        kill=KILLS[seed % 3],
        slice_drains=seed % 2 == 1,
        cancel_at_us=chance.randrange(5_000_000) if seed % 5 == 0 else None,
    )
    live_and_replay(world)


TIMELESS = {"call", "sequence", "gather", "settled", "group", "map", "failing", "catch"}


@pytest.mark.parametrize("seed", range(60))
async def test_timeless_programs_return_what_asyncio_returns(seed: int) -> None:
    """Without races and clocks, the durable result is that of plain asyncio."""
    chance = random.Random(seed)
    spec = programs.random_program(chance, names=TIMELESS)
    saw.log = []
    try:
        expected = await programs.interpret.function(spec)
    except Exception as error:  # noqa: BLE001 - its class is compared
        expected = type(error)
    world = World(programs.interpret, (spec,), chance=chance, kill=0.05)
    recorded = live_and_replay(world).recorded
    if recorded.ok:
        assert decode(recorded.payload) == expected
    else:
        assert isinstance(expected, type)
        assert expected.__name__.encode() in recorded.payload
    await asyncio.sleep(0)


def test_completed_rows_never_run_again() -> None:
    """What has a committed result is not run again after a kill."""
    for seed in range(30):
        world = World(programs.branches, (6,), chance=random.Random(seed), kill=0.1)
        live_and_replay(world)
        assert len(world.attempts) == 12
        kills = len(world.lives) - 1
        assert sum(world.attempts.values()) - 12 <= kills * 6


def test_an_execution_is_the_same_in_any_order_of_replay() -> None:
    """Two executions with one journal are equal, whatever ran in between."""
    first = World(programs.primitives, (3,), chance=random.Random(1))
    outcome = first.live()
    other = World(programs.primitives, (3,), chance=random.Random(2))
    assert other.live() != outcome
    assert replay(programs.primitives, first.journal()) == outcome
