"""Functions that a worker process calls before its first claim and after its last work.

They are recorded like durable functions, process-wide, when their module is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import anyio

from stent.errors import ConfigurationError, WorkerHookError
from stent.log import WORKER_HOOK_FAILED, get_logger
from stent.model import Pool

log = get_logger(__name__)

Hook = TypeVar("Hook", bound=Callable[[], Any])

STOP_SECONDS_MAX = 10.0
"""How long the stop hooks of a process may take, all together."""


@dataclass(slots=True)
class Hooks:
    """Hooks by ``module.qualname``, so that a reloaded module replaces its own."""

    start: dict[str, Callable[[], Any]] = field(default_factory=dict)
    stop: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def modules(self) -> set[str]:
        """Where they are defined."""
        hooks = (*self.start.values(), *self.stop.values())
        return {hook.__module__ for hook in hooks}


of_workers = Hooks()
of_children = Hooks()
"""Of the processes of ``pool="process"``."""


class _HookDecorator:
    """Records a function; an object, so that classes may offer it as it is."""

    _when = ""

    @overload
    def __call__(self, hook: Hook, /) -> Hook: ...
    @overload
    def __call__(self, *, pool: str | None = None) -> Callable[[Hook], Hook]: ...
    def __call__(  # type: ignore[misc] # "hook" may be left out
        self, hook: Any = None, /, *, pool: str | None = None
    ) -> Any:
        """Record ``hook``; see the class."""
        if pool not in (None, Pool.PROCESS):
            message = f'pool is {pool!r}; a hook has pool="process" or none'
            raise ConfigurationError(message)
        hooks = of_workers if pool is None else of_children

        def record(hook: Hook) -> Hook:
            _check(hook, pool)
            getattr(hooks, self._when)[_name(hook)] = hook
            return hook

        return record if hook is None else record(hook)


class OnWorkerStart(_HookDecorator):
    """Call a function when a worker process starts, before anything is claimed.

    The place to open clients and fill caches; keep them in a global. Hooks run in the
    order of their definition, on the worker's event loop, once however many workers
    the process has. One that raises stops the worker with a ``WorkerHookError``.

    Args:
        hook: ``def`` or ``async def``, without parameters.
        pool: ``"process"``: call it in each process of ``pool="process"`` instead,
            before its first call; a plain ``def``. One that raises fails the call.

    Raises:
        ConfigurationError: It is no function, or cannot run there.
    """

    _when = "start"


class OnWorkerStop(_HookDecorator):
    """Call a function when a worker process stops, after the last activity has ended.

    In the opposite order of their definition; one that raises is logged and the others
    still run, for ten seconds all together. A killed process runs none.

    Args:
        hook: ``def`` or ``async def``, without parameters.
        pool: ``"process"``: call it in each idle process of ``pool="process"`` when it
            is stopped; a plain ``def``.

    Raises:
        ConfigurationError: It is no function, or cannot run there.
    """

    _when = "stop"


on_worker_start = OnWorkerStart()
on_worker_stop = OnWorkerStop()


def _check(hook: Any, pool: str | None) -> None:
    if not inspect.isroutine(hook) or inspect.isclass(hook):
        message = f"a worker hook is a function without parameters, not {hook!r}"
        raise ConfigurationError(message)
    needed = [
        parameter.name
        for parameter in inspect.signature(hook).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        message = f"the worker hook {_name(hook)} is called without {needed[0]!r}"
        raise ConfigurationError(message)
    if pool is not None and inspect.iscoroutinefunction(hook):
        message = (
            f"the worker hook {_name(hook)} is async def: a process of "
            'pool="process" has no event loop, write def'
        )
        raise ConfigurationError(message)


def _name(hook: Any) -> str:
    return f"{hook.__module__}.{hook.__qualname__}"


class _Process:
    """How many workers of this process are between their hooks."""

    def __init__(self) -> None:
        self.workers = 0
        self.lock: anyio.Lock | None = None
        self.stopping = ""
        """The hook that is being called at the end."""


_process = _Process()


@asynccontextmanager
async def worker_hooks() -> AsyncIterator[None]:
    """Around the life of a worker: the first one starts, the last one stops.

    Raises:
        WorkerHookError: A start hook failed; the worker must not work.
    """
    lock = _process.lock = _process.lock or anyio.Lock()
    async with lock:
        if _process.workers == 0:
            for name, hook in list(of_workers.start.items()):
                await _start(name, hook)
        _process.workers += 1
    try:
        yield
    finally:
        with anyio.move_on_after(STOP_SECONDS_MAX, shield=True) as scope:
            async with lock:
                _process.workers -= 1
                if _process.workers == 0:
                    await _stop(reversed(list(of_workers.stop.items())))
        if scope.cancelled_caught:
            log.error(
                WORKER_HOOK_FAILED,
                hook=_process.stopping,
                error=f"the stop hooks took longer than {STOP_SECONDS_MAX:g} s",
            )


async def _start(name: str, hook: Callable[[], Any]) -> None:
    try:
        started = hook()
        if inspect.isawaitable(started):
            await started
    except Exception as error:
        raise start_failed(name, error) from error


async def _stop(hooks: Iterable[tuple[str, Callable[[], Any]]]) -> None:
    for name, hook in hooks:
        _process.stopping = name
        try:
            stopped = hook()
            if inspect.isawaitable(stopped):
                await stopped
        except Exception as error:
            log.exception(WORKER_HOOK_FAILED, hook=name, error=str(error))


def call_stop(name: str, hook: Callable[[], Any]) -> None:
    """Call one plain stop hook."""
    try:
        hook()
    except Exception as error:
        log.exception(WORKER_HOOK_FAILED, hook=name, error=str(error))


def start_failed(name: str, error: Exception) -> WorkerHookError:
    """What a failing start hook raises."""
    return WorkerHookError(
        f"the on_worker_start hook {name} failed: {type(error).__name__}: {error}"
    )
