"""The most urgent first, then the oldest."""

from __future__ import annotations

from collections.abc import Callable

from stent.services.waiting_attempts import ByPriority


def every(_one: str) -> bool:
    return True


def filled() -> ByPriority[str]:
    waiting: ByPriority[str] = ByPriority()
    for one in ("b0", "c-5", "a9", "d0", "e9"):
        waiting.append(int(one[1:]), one)
    return waiting


def popped(waiting: ByPriority[str], eligible: Callable[[str], bool]) -> list[str]:
    out = []
    while (one := waiting.pop(eligible)) is not None:
        out.append(one)
    return out


def test_in_order_of_priority_then_of_age() -> None:
    """Iteration and removal agree."""
    waiting = filled()
    assert list(waiting) == ["a9", "e9", "b0", "d0", "c-5"]
    assert (len(waiting), waiting.count_above(0)) == (5, 2)
    assert popped(waiting, every) == ["a9", "e9", "b0", "d0", "c-5"]
    assert (len(waiting), waiting.highest(every), list(waiting)) == (0, None, [])


def test_who_may_not_go_holds_up_nobody() -> None:
    """What stays keeps its place."""
    waiting = filled()
    assert waiting.highest(lambda one: one[0] in "cd") == 0
    assert popped(waiting, lambda one: one[0] in "cde") == ["e9", "d0", "c-5"]
    assert list(waiting) == ["a9", "b0"]


def test_some_are_taken_out() -> None:
    """Whatever their priority; new ones of a priority that was empty are found."""
    waiting = filled()
    assert waiting.take(lambda one: one in {"e9", "c-5"}) == ["e9", "c-5"]
    assert waiting.take(lambda one: one == "nobody") == []
    waiting.append(-5, "f-5")
    assert (list(waiting), len(waiting)) == (["a9", "b0", "d0", "f-5"], 4)
