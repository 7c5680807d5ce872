"""A worker's thresholds of the garbage collector are there while it runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from stent.services.collector import THRESHOLDS, rare_full_collections


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_they_are_raised_until_the_last_worker_ends() -> None:
    with rare_full_collections():
        with rare_full_collections():
            assert gc.get_threshold() == THRESHOLDS
        assert gc.get_threshold() == THRESHOLDS
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("chosen", [(50_000, 20, 500), (0, 10, 100)])
def test_what_somebody_chose_is_never_lowered(chosen: tuple[int, int, int]) -> None:
    """Zero: switched off."""
    gc.set_threshold(*chosen)
    with rare_full_collections():
        assert gc.get_threshold() == chosen
    assert gc.get_threshold() == chosen


def test_what_is_set_while_a_worker_runs_stays() -> None:
    with rare_full_collections():
        gc.set_threshold(9_000, 5, 5)
    assert gc.get_threshold() == (9_000, 5, 5)
