"""A durable call: a future that is also a coroutine, issued when it is made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

from stent.errors import ExecutionFailedError
from stent.loop import DurableFuture, DurableLoop
from stent.model import Kind
from stent.registry import DurableFunction, Options

T = TypeVar("T")


class Issuer(Protocol):
    """Who must know that a call was cancelled by the code that made it."""

    def settle(self, call: DurableCall[Any]) -> None:
        """The call was cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFunction:
    """An undecorated function given to ``stent.run``; lives only in this process."""

    function: Callable[..., Any]
    args: Sequence[object]
    kwargs: Mapping[str, object]


class DurableCall(DurableFuture[T]):
    """One call at one address; awaitable, and accepted wherever a coroutine is.

    Attributes:
        address: (lineage, function, digest of the arguments, occurrence) as text.
        function: Name of what is called.
        target: The durable function, a local function, or None for a page of a map.
        arguments: Encoded arguments.
        turn: The turn whose deliveries made the code issue it; -1 at the start.
        line: ``file:line`` of the call while replaying, else empty.
        child: It is an execution of its own, not an activity of this one.
    """

    family = "call"

    def __init__(  # noqa: PLR0913 - a record of the call, made in one place
        self,
        *,
        loop: DurableLoop,
        issuer: Issuer,
        address: str,
        function: str,
        target: DurableFunction[Any, Any] | LocalFunction | None,
        arguments: bytes,
        options: Options,
    ) -> None:
        super().__init__(loop=loop)
        self.issuer = issuer
        self.address = address
        self.function = function
        self.target = target
        self.arguments = arguments
        self.options = options
        self.turn = -1
        self.line = ""
        self.child = (
            isinstance(target, DurableFunction) and target.kind is Kind.WORKFLOW
        )
        self._steps: Iterator[Any] | None = None
        # Read by asyncio, anyio and our own labels, as of a coroutine.
        self.__qualname__ = self.__name__ = function

    def cancel(self, msg: Any = None) -> bool:
        """Cancel at once; the address is settled and a later result not delivered."""
        if not super().cancel(msg):
            return False
        self.issuer.settle(self)
        return True

    def send(self, value: Any, /) -> Any:
        """One step, as of a coroutine."""
        if self._steps is None:
            self._steps = iter(self)
            return next(self._steps)
        return self._generator().send(value)

    def throw(self, *exception: Any) -> Any:
        """Raise inside; before the first step this cancels the call."""
        if self._steps is None:
            self._steps = iter(())
            self.cancel()
            _raise(*exception)
        return self._generator().throw(*exception)

    def close(self) -> None:
        """Nothing to clean up."""
        if self._steps is not None and hasattr(self._steps, "close"):
            self._steps.close()

    def _generator(self) -> Generator[Any, Any, Any]:
        steps: Any = self._steps
        return steps  # type: ignore[no-any-return]

    @property
    def cr_running(self) -> bool:
        """Never while anybody can look; read by ``inspect``."""
        return False

    @property
    def cr_suspended(self) -> bool:
        """True once a task waits for it; read by ``inspect`` for anyio."""
        return self._steps is not None and not self.done()

    @property
    def cr_frame(self) -> object | None:
        """Something until the first step; read by ``inspect``."""
        return self if self._steps is None else None


def _raise(kind: Any, value: Any = None, _traceback: Any = None) -> NoReturn:
    error = value if value is not None else kind
    raise error() if isinstance(error, type) else error


Coroutine.register(DurableCall)


def fail_call(call: DurableCall[Any], error: BaseException) -> None:
    """Let a call raise ``error``, as far as a future can."""
    if isinstance(error, StopIteration):
        # A future cannot carry it; asyncio would raise a TypeError here.
        wrapped = RuntimeError("the activity raised StopIteration")
        wrapped.__cause__ = error
        error = wrapped
    if isinstance(error, asyncio.CancelledError | SystemExit | KeyboardInterrupt):
        error = ExecutionFailedError(f"{type(error).__name__}: {error}")
    call.set_exception(error)
