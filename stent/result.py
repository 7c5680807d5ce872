"""Result: a value or a business error, returned instead of raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar, cast

from stent.errors import UnwrapError

T = TypeVar("T")
E = TypeVar("E")
U = TypeVar("U")


class Result(Generic[T, E]):
    """Either ``Result.Ok(value)`` or ``Result.Error(error)``.

    A durable function that returns ``Result.Error`` has *completed*: the error is a
    business outcome, not a failure. ``wait_for`` hands a returned Result on unchanged.
    Immutable; equal when both sides are equal. Usable in ``match``::

        match outcome:
            case Result(ok=True, value=value): ...
            case Result(error=error): ...
    """

    __slots__ = ("_content", "_ok")
    __match_args__ = ("ok", "value", "error")

    def __init__(self, *, ok: bool, content: object) -> None:
        object.__setattr__(self, "_ok", ok)
        object.__setattr__(self, "_content", content)

    _ok: bool
    _content: object

    @classmethod
    def Ok(cls, value: T) -> Result[T, E]:  # noqa: N802 - the name users type
        """A success that carries ``value``."""
        return cls(ok=True, content=value)

    @classmethod
    def Error(cls, error: E) -> Result[T, E]:  # noqa: N802 - the name users type
        """A business error that carries ``error``, an exception or any other value."""
        return cls(ok=False, content=error)

    @property
    def ok(self) -> bool:
        """True for ``Ok``."""
        return self._ok

    @property
    def value(self) -> T | None:
        """The value of an ``Ok``, None for an ``Error``."""
        return cast("T", self._content) if self._ok else None

    @property
    def error(self) -> E | None:
        """The error of an ``Error``, None for an ``Ok``."""
        return None if self._ok else cast("E", self._content)

    def is_ok(self) -> bool:
        """True for ``Ok``."""
        return self._ok

    def is_err(self) -> bool:
        """True for ``Error``."""
        return not self._ok

    def unwrap(self) -> T:
        """The value; raises the error itself if it is an exception.

        Raises:
            UnwrapError: The error is not an exception; it is the attribute ``error``.
        """
        if self._ok:
            return cast("T", self._content)
        if isinstance(self._content, BaseException):
            raise self._content
        raise UnwrapError(self._content)

    def unwrap_or(self, default: U) -> T | U:
        """The value, or ``default`` for an ``Error``."""
        return cast("T", self._content) if self._ok else default

    def map(self, function: Callable[[T], U]) -> Result[U, E]:
        """Apply ``function`` to the value of an ``Ok``; an ``Error`` stays as it is."""
        if self._ok:
            return Result.Ok(function(cast("T", self._content)))
        return cast("Result[U, E]", self)

    def flat_map(self, function: Callable[[T], Result[U, E]]) -> Result[U, E]:
        """Like ``map`` for a ``function`` that itself returns a Result."""
        if self._ok:
            return function(cast("T", self._content))
        return cast("Result[U, E]", self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        return self._ok == other._ok and self._content == other._content

    def __hash__(self) -> int:
        return hash((self._ok, self._content))

    def __repr__(self) -> str:
        return f"Result.{'Ok' if self._ok else 'Error'}({self._content!r})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        message = f"a Result is immutable: cannot set {name!r}"
        raise AttributeError(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._ok, self._content)


def _rebuild(ok: bool, content: object) -> Result[object, object]:  # noqa: FBT001 - the shape pickle calls
    return Result(ok=ok, content=content)
