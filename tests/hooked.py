"""Hooks of processes, and an activity that runs there."""

from __future__ import annotations

import os

import stent
from stent import durable
from tests.pools import write

loaded: list[str] = []


@stent.on_worker_start(pool="process")
def load() -> None:
    """Once in each process."""
    loaded.append("model")


@stent.on_worker_stop(pool="process")
def unload() -> None:
    """Before an idle process ends."""
    write(loaded[1], "unloaded", os.getpid())


@durable(pool="process")
def look(path: str) -> list[str]:
    """What the hook has loaded."""
    loaded[1:] = [path]
    write(path, "looked", os.getpid(), len(loaded))
    return loaded[:1]
