"""``stent worker``: run what modules define until told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from stent.cli.targets import load_functions
from stent.settings import Settings

if TYPE_CHECKING:
    from stent.app import Stent

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DRAIN_AGAIN_SECONDS = 0.05


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
@click.pass_context
def worker(
    context: click.Context,
    modules: tuple[str, ...],
    concurrency: int | None,
    queues: tuple[str, ...],
) -> None:
    """Run workflows and activities of MODULEs.

    Modules are imported from the current directory or Python's path. SIGTERM, SIGINT
    or SIGHUP ends the worker when what runs has finished, a second one at once; what
    it leaves goes on elsewhere. It logs to stderr.
    """
    from stent.log import install_structured_logging

    install_structured_logging()
    for module in modules:
        load_functions(module)
    settings: Settings = context.find_object(Settings) or Settings.from_env()
    _run(lambda: _serve(settings, concurrency, queues or ("default",)))


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work())


async def _serve(
    settings: Settings, concurrency: int | None, queues: tuple[str, ...]
) -> None:
    import anyio

    from stent.app import Stent

    async with (
        Stent(settings=settings) as app,
        anyio.create_task_group() as group,
    ):
        group.start_soon(_obey_signals, app)
        await app.serve(concurrency, queues)
        group.cancel_scope.cancel()


async def _obey_signals(app: Stent) -> None:
    """Drain at the first signal, hurry at every other."""
    import anyio

    with anyio.open_signal_receiver(*_SIGNALS) as signals:
        async with anyio.create_task_group() as group:
            asked = False
            async for _ in signals:
                if asked:
                    app.hurry()
                else:
                    asked = True
                    group.start_soon(_drain, app)


async def _drain(app: Stent) -> None:
    """Until it is over: the signal may have come before the worker was there."""
    import anyio

    while True:
        await app.drain()
        await anyio.sleep(_DRAIN_AGAIN_SECONDS)
