"""The program of one worker process: a worker, and where it is to be hit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import stent
from stent import Settings, Stent
from stent.worker import QUEUES
from tests.e2e.harness import workload
from tests.e2e.harness.killpoints import (
    KillPoint,
    KillPoints,
    Position,
    die,
    freeze,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a worker process does; travels as JSON.

    Attributes:
        ledger: File that gets the evidence.
        log: File that gets the log lines, as JSON.
        url: The database; None: the embedded server below ``home``.
        direct_url: Around a pooler.
        home: See ``url``.
        queues: Served.
        slots: Attempts at the same time.
        lease: Seconds.
        drain: Seconds that running attempts get when it is stopped.
        number: Of the kill point; 0: none.
        position: Of the kill point.
        victim: What happens there: ``self`` is killed, ``frozen`` stops, or the server
            dies by ``kill`` or ``immediate``.
    """

    ledger: str
    log: str
    url: str | None = None
    direct_url: str | None = None
    home: str | None = None
    queues: tuple[str, ...] = QUEUES
    slots: int = 4
    lease: float = 10.0
    drain: float = 30.0
    number: int = 0
    position: str = Position.BEFORE_SEND
    victim: str = "self"

    def settings(self) -> Settings:
        """Of the process; the times around the lease shrink with it."""
        return Settings(
            database_url=self.url,
            direct_url=self.direct_url,
            home=Path(self.home or ".stent"),
            lease=timedelta(seconds=self.lease),
            lease_margin=timedelta(seconds=self.lease / 5),
            lease_renew_every=timedelta(seconds=self.lease / 5),
            drain_timeout=timedelta(seconds=self.drain),
        )

    def as_json(self) -> dict[str, Any]:
        """The inverse of ``of_json``."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``as_json`` wrote."""
        known = {field.name for field in fields(cls)}
        assert set(values) == known
        return cls(**values | {"queues": tuple(values["queues"])})


def run(plan: Plan) -> None:
    """Serve until SIGTERM; writes ``ready`` and ``stopped`` into the ledger."""
    descriptor = os.open(plan.log, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    stent.install_structured_logging(json=True)
    logging.getLogger("stent").setLevel(logging.INFO)
    workload.write_to(Path(plan.ledger))
    asyncio.run(_serve(plan))


async def _serve(plan: Plan) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    app = Stent.bootstrap(
        serve=True,
        settings=plan.settings(),
        max_concurrency=plan.slots,
        queues=plan.queues,
    )

    def hit_server() -> None:
        _hit_server(app, plan.victim)

    acts = {"self": die, "frozen": freeze}
    survives = plan.victim not in acts
    point = KillPoint(plan.number, Position(plan.position)) if plan.number else None
    KillPoints(
        workload.ledger,
        point,
        acts.get(plan.victim, hit_server),
        survives=survives,
    ).install()
    async with app:
        (worker,) = app._workers
        workload.ledger.write("ready", worker=str(worker.worker_id))
        await stop.wait()
    workload.ledger.write("stopped")


def _hit_server(app: Stent, how: str) -> None:
    """Kill the postmaster, or tell it to shut down at once."""
    server = app._server
    assert server is not None
    pid = server.cluster.running_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGQUIT)
