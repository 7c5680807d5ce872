"""``stent worker``: run what modules define until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from stent.cli.durations import read_duration
from stent.cli.targets import load_functions
from stent.errors import ConfigurationError
from stent.model import Order
from stent.settings import (
    ServiceManager,
    Settings,
    environment_of,
    environment_with,
)

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from stent.app import Stent
    from stent.cli.watch import Service

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DRAIN_AGAIN_SECONDS = 0.05
PROCESSES_MAX = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What was typed."""

    settings: Settings
    modules: tuple[str, ...]
    concurrency: int | None
    queues: tuple[str, ...]
    health: str | None
    leash: int | None


@click.command()
@click.argument("modules", nargs=-1, required=True, metavar="MODULE...")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Activities at the same time; default 100.",
)
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME",
    help="A queue to serve, may be repeated; default 'default'.",
)
@click.option(
    "--drain-timeout",
    type=read_duration,
    metavar="DURATION",
    help="How long running activities get when it is to end; default 30s.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, PROCESSES_MAX),
    metavar="N",
    help="Worker processes; one that dies is started again.",
)
@click.option(
    "--health",
    metavar="[HOST:]PORT",
    help="Answer GET /live and /ready there; off by default, HOST is 127.0.0.1.",
)
@click.option("--leash", type=int, hidden=True, help="From the supervisor.")
@click.pass_context
def worker(  # noqa: PLR0913 - one parameter per option
    context: click.Context,
    *,
    modules: tuple[str, ...],
    concurrency: int | None,
    queues: tuple[str, ...],
    drain_timeout: timedelta | None,
    processes: int | None,
    health: str | None,
    leash: int | None,
) -> None:
    """Run workflows and activities of MODULEs.

    Modules are imported from the current directory or Python's path. SIGTERM, SIGINT
    or SIGHUP ends the worker when what runs has finished, a second one at once; what
    it leaves goes on elsewhere. It logs to stderr.
    """
    from stent.log import install_structured_logging

    if not all(queues):
        message = "the name of a queue is empty"
        raise click.BadParameter(message, param_hint="--queue")
    install_structured_logging()
    settings: Settings = context.find_object(Settings) or Settings.from_env()
    if drain_timeout is not None:
        settings = replace(settings, drain_timeout=drain_timeout)
    plan = _Plan(
        settings=settings,
        modules=modules,
        concurrency=concurrency,
        queues=queues or ("default",),
        health=health,
        leash=leash,
    )
    port = _open_port(health)
    if processes is not None:
        context.exit(asyncio.run(_supervise(plan, processes, port)))
    for module in modules:
        load_functions(module)
    _run(lambda: _serve(plan, port))


def _open_port(health: str | None) -> socket.socket | None:
    """Before anything else: a port that is taken is a mistake to be told at once."""
    if health is None:
        return None
    from stent.services.health import open_port, parse_address

    return open_port(*parse_address(health))


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On uvloop where it is installed."""
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    # Outside of any handler: it would be the context of every error of every activity.
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())


def _services(
    port: socket.socket | None, look: Callable[[], dict[str, object]]
) -> list[Service]:
    """Those that outsiders asked for."""
    from stent.services.health import HealthPort
    from stent.services.notify import Notifier

    services: list[Service] = []
    if port is not None:
        services.append(HealthPort(port, look).run)
    manager = ServiceManager.from_env()
    if manager is not None:
        services.append(Notifier(manager, look).run)
    return services


async def _supervise(plan: _Plan, count: int, port: socket.socket | None) -> int:
    """Run processes of this very command, each on a leash."""
    import anyio

    from stent.cli.supervisor import Supervisor

    command = [sys.executable, "-m", "stent", "worker", *plan.modules]
    if plan.concurrency is not None:
        command += ["--concurrency", str(plan.concurrency)]
    for queue in plan.queues:
        command += ["--queue", queue]
    supervisor = Supervisor(
        [*command, "--leash"],
        environment_with(environment_of(plan.settings)),
        count,
        plan.settings.drain_timeout,
    )
    async with anyio.create_task_group() as group:
        for service in _services(port, supervisor.health):
            group.start_soon(service)
        exit_code = await supervisor.run()
        group.cancel_scope.cancel()
    return exit_code


async def _serve(plan: _Plan, port: socket.socket | None) -> None:
    import anyio

    from stent.app import Stent
    from stent.cli.watch import Watch
    from stent.services.health import health_facts

    app = Stent(settings=plan.settings)

    def look() -> dict[str, object]:
        return health_facts(app.health())

    async with anyio.create_task_group() as group:
        ending = _Ending(app, group)
        services = _services(port, look)
        if plan.leash is not None:
            services.append(_leash(plan, plan.leash, look, ending).run)
        with Watch(services):
            group.start_soon(ending.obey_signals)
            async with app:
                ending.opened = True
                await app.serve(plan.concurrency, plan.queues)
        group.cancel_scope.cancel()


def _leash(
    plan: _Plan, descriptor: int, look: Callable[[], dict[str, object]], ending: _Ending
) -> Any:
    from stent.cli.leash import Leash

    loop = asyncio.get_running_loop()

    def obey(order: Order) -> None:
        loop.call_soon_threadsafe(ending.obey, order)

    try:
        return Leash(descriptor, look, obey, plan.settings.drain_timeout)
    except OSError as error:
        message = f"--leash is for the supervisor of --processes: {error}"
        raise ConfigurationError(message) from error


class _Ending:
    """How far this process has been told to end."""

    def __init__(self, app: Stent, group: TaskGroup) -> None:
        self._app = app
        self._group = group
        self._asked: Order | None = None
        self.opened = False

    async def obey_signals(self) -> None:
        """Drain at the first signal, hurry at every other."""
        import anyio

        with anyio.open_signal_receiver(*_SIGNALS) as signals:
            # Of the signals alone: a supervisor may have given the same order.
            order = Order.DRAIN
            async for _ in signals:
                self.obey(order)
                order = Order.STOP

    def obey(self, order: Order) -> None:
        """An order that is no more than the last one changes nothing."""
        if not self.opened:
            # There is nothing yet to drain, and the database may be away for long.
            self._group.cancel_scope.cancel()
        elif self._asked is None:
            self._group.start_soon(self._drain)
        if order is Order.STOP:
            self._app.hurry()
        self._asked = self._asked if self._asked is Order.STOP else order

    async def _drain(self) -> None:
        """Until it is over: the order may have come before the worker was there."""
        import anyio

        while True:
            if self._asked is Order.STOP:
                self._app.hurry()
            await self._app.drain()
            await anyio.sleep(_DRAIN_AGAIN_SECONDS)
