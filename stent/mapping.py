"""How a durable function is called once per item: the form of a map, and its types."""

from __future__ import annotations

from collections.abc import AsyncIterable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, TypeVarTuple, overload

from stent.errors import ConfigurationError

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

CHUNK_MAX = 10_000
"""Items of a page at most, whoever chooses."""


class TakesItem(Protocol[T_contra, R_co]):
    """A durable function that can be called with one positional argument."""

    @property
    def name(self) -> str:
        """Its durable name."""
        ...

    def __call__(self, item: T_contra, /) -> Coroutine[Any, Any, R_co]:
        """One call."""
        ...


class TakesItems(Protocol[*Ts, R_co]):
    """A durable function of these positional parameters."""

    @property
    def name(self) -> str:
        """Its durable name."""
        ...

    def __call__(self, *args: *Ts) -> Coroutine[Any, Any, R_co]:
        """One call."""
        ...


@dataclass(frozen=True, slots=True)
class MapForm:
    """How a map passes its items, treats failures, and how far it goes at once.

    Attributes:
        star: Each item is a sequence of positional arguments.
        return_exceptions: Exceptions take the place of results.
        chunk: Items of a page; None: measured.
        concurrency: Items in flight at most, over all workers; None: any number.
    """

    star: bool = False
    return_exceptions: bool = False
    chunk: int | None = None
    concurrency: int | None = None


def map_form(
    *,
    star: bool = False,
    return_exceptions: bool,
    chunk: int | str = "auto",
    concurrency: int | None = None,
) -> MapForm:
    """The checked form of a map.

    Raises:
        ConfigurationError: ``chunk`` is no number of items and not ``"auto"``, or
            ``concurrency`` is no number of items.
    """
    if concurrency is not None and not _is_count(concurrency):
        message = f"concurrency is {concurrency!r}; give a number of items above 0"
        raise ConfigurationError(message)
    if chunk == "auto":
        return MapForm(star, return_exceptions, None, concurrency)
    if isinstance(chunk, int) and _is_count(chunk) and chunk <= CHUNK_MAX:
        return MapForm(star, return_exceptions, chunk, concurrency)
    message = f"chunk is {chunk!r}; give 1 to {CHUNK_MAX} items, or 'auto'"
    raise ConfigurationError(message)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class MapMethods:
    """``map`` and ``starmap`` of a durable function."""

    @overload
    def map(
        self: TakesItem[T, R],
        items: Iterable[T] | AsyncIterable[T],
        *,
        return_exceptions: Literal[False] = False,
        chunk: int | Literal["auto"] = "auto",
        concurrency: int | None = None,
    ) -> Coroutine[Any, Any, list[R]]: ...
    @overload
    def map(
        self: TakesItem[T, R],
        items: Iterable[T] | AsyncIterable[T],
        *,
        return_exceptions: bool,
        chunk: int | Literal["auto"] = "auto",
        concurrency: int | None = None,
    ) -> Coroutine[Any, Any, list[R | BaseException]]: ...
    def map(
        self,
        items: Any,
        *,
        return_exceptions: bool = False,
        chunk: int | str = "auto",
        concurrency: int | None = None,
    ) -> Coroutine[Any, Any, list[Any]]:
        """Call it once per item, many at a time; see ``stent.map``."""
        form = map_form(
            return_exceptions=return_exceptions, chunk=chunk, concurrency=concurrency
        )
        return self._map(items, form)

    @overload
    def starmap(
        self: TakesItems[*Ts, R],
        items: Iterable[tuple[*Ts]] | AsyncIterable[tuple[*Ts]],
        *,
        return_exceptions: Literal[False] = False,
        chunk: int | Literal["auto"] = "auto",
        concurrency: int | None = None,
    ) -> Coroutine[Any, Any, list[R]]: ...
    @overload
    def starmap(
        self: TakesItems[*Ts, R],
        items: Iterable[tuple[*Ts]] | AsyncIterable[tuple[*Ts]],
        *,
        return_exceptions: bool,
        chunk: int | Literal["auto"] = "auto",
        concurrency: int | None = None,
    ) -> Coroutine[Any, Any, list[R | BaseException]]: ...
    def starmap(
        self,
        items: Any,
        *,
        return_exceptions: bool = False,
        chunk: int | str = "auto",
        concurrency: int | None = None,
    ) -> Coroutine[Any, Any, list[Any]]:
        """Like ``map`` with each item a sequence of positional arguments."""
        form = map_form(
            star=True,
            return_exceptions=return_exceptions,
            chunk=chunk,
            concurrency=concurrency,
        )
        return self._map(items, form)

    def _map(self, items: Any, form: MapForm) -> Coroutine[Any, Any, list[Any]]:
        raise NotImplementedError
