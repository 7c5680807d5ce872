"""Workers as operators see them, and what is asked of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from stent.errors import WorkerNotFoundError
from stent.model import Order, WorkerState
from stent.store.store import Store

WORKERS_MAX = 1_000
"""How many workers one look shows."""


async def read_workers(
    store: Store, *, host: str | None, ended: bool
) -> list[WorkerState]:
    """Workers in the order in which they started.

    Args:
        store: Of the database.
        host: Only those of this machine.
        ended: Also those that stopped or were lost, for about a day.

    Raises:
        StoreError: The database is away.
    """
    rows = await store.list_workers(host=host, ended=ended, count=WORKERS_MAX)
    return [_state(row) for row in rows]


async def ask(store: Store, worker_id: str, order: Order) -> bool:
    """Ask a worker to drain or stop; it obeys within about a second.

    Returns:
        False when it does not live any more: nothing happens.

    Raises:
        WorkerNotFoundError: There is no such worker.
        StoreError: The database is away.
    """
    identifier = parse_worker_id(worker_id)
    if await store.ask_worker(identifier, order):
        return True
    if await store.worker_exists(identifier):
        return False
    raise _not_found(worker_id)


def parse_worker_id(worker_id: str) -> UUID:
    """A whole id.

    Raises:
        WorkerNotFoundError: It is none.
    """
    try:
        return UUID(worker_id)
    except (ValueError, AttributeError, TypeError):
        raise _not_found(worker_id) from None


def _not_found(worker_id: str) -> WorkerNotFoundError:
    return WorkerNotFoundError(f"there is no worker {worker_id}")


def _state(row: Mapping[str, Any]) -> WorkerState:
    functions, now = row["functions"], row["now"]
    works = row["state"] in ("running", "draining")
    return WorkerState(
        id=str(row["worker_id"]),
        state=row["state"],
        alive=works and row["expires_at"] > now,
        host=row["host"],
        pid=row["pid"],
        version=row["version"],
        app_version=row["app_version"],
        slots=row["slots"],
        running=row["running"] if works else 0,
        residents=row["residents"] if works else 0,
        lag=dt.timedelta(milliseconds=row["lag_ms"]),
        lease_left=max(row["expires_at"] - now, dt.timedelta(0)),
        queues=tuple(row["queues"]),
        functions=None if functions is None else tuple(functions),
        asked=None if row["asked"] is None else Order(row["asked"]),
        started_at=row["started_at"].astimezone(dt.UTC),
        renewed_at=row["renewed_at"].astimezone(dt.UTC),
    )
