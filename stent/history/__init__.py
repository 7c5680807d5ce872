"""What executions look like from outside: states, lists and histories, read-only."""

from __future__ import annotations

from stent.history.inspector import History
from stent.history.waits import NO_WORKER

__all__ = ["NO_WORKER", "History"]
