"""Plain JSON typed by a person, converted to what an annotation asks for."""

from __future__ import annotations

import enum
import types
import typing
from pathlib import PurePath
from typing import Any, cast

import msgspec

from stent.errors import PayloadError
from stent.result import Result


def convert_plain(
    value: object,
    annotation: object,
    *,
    path: str = "value",
) -> Any:
    """Convert plain JSON by annotation; unlike decoding, constructors do run.

    Dicts become dataclasses, Structs, TypedDicts; lists become tuples, sets,
    NamedTuples; text becomes datetime, UUID, Decimal, Path, bytes (base64); Enums are
    given by value or name. A union takes its first member that fits.

    Args:
        value: None, bool, int, float, str, list or dict with str keys.
        annotation: A type; one that cannot be resolved leaves the value as it is.
        path: What the value is called in an error.

    Raises:
        PayloadError: The value does not fit; the path says where (``args[0].size``).
    """
    if annotation is Any or isinstance(annotation, (str, typing.TypeVar)):
        return value
    members = _members(annotation)
    if members:
        return _convert_union(value, members, annotation, path)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _convert_enum(value, annotation, path)
    try:
        return msgspec.convert(value, cast("Any", annotation), dec_hook=_convert_other)
    except msgspec.ValidationError as error:
        message = f"{path}{_place(str(error))}"
        raise PayloadError(message) from error
    except NameError:
        return value
    except Exception as error:
        # msgspec has no rule for this annotation, or a constructor raised.
        message = f"{path}: cannot be converted to {_shown(annotation)}: {error}"
        raise PayloadError(message) from error


def _members(annotation: object) -> tuple[object, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return ()


def _convert_union(
    value: object, members: tuple[object, ...], annotation: object, path: str
) -> object:
    if value is None and type(None) in members:
        return None
    # What is already of a member's type stays, whatever comes first in the union.
    if type(value) in members:
        return value
    refusals: list[PayloadError] = []
    for member in members:
        if member is type(None):
            continue
        try:
            return convert_plain(value, member, path=path)
        except PayloadError as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    message = f"{path}: fits no member of {_shown(annotation)}"
    raise PayloadError(message) from ExceptionGroup(message, refusals)


def _convert_enum(value: object, cls: type[enum.Enum], path: str) -> enum.Enum:
    try:
        return cls(value)
    except ValueError as error:
        if type(value) is str and value in cls.__members__:
            return cls.__members__[value]
        message = f"{path}: {value!r} is not one of {', '.join(cls.__members__)}"
        raise PayloadError(message) from error


def _convert_other(annotation: Any, value: object) -> object:
    """For msgspec: types it does not know itself."""
    kind = typing.get_origin(annotation) or annotation
    if kind is Result:
        return _convert_result(annotation, value)
    if isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if issubclass(kind, PurePath) and type(value) is str:
            return kind(value)
        if kind is complex and type(value) in (int, float):
            return complex(cast("float", value))
    message = f"Expected `{_shown(annotation)}`, got `{type(value).__name__}`"
    raise ValueError(message)


def _convert_result(annotation: object, value: object) -> Result[Any, Any]:
    ok, error = typing.get_args(annotation) or (Any, Any)
    match value:
        case {"ok": content, **rest} if not rest:
            return Result.Ok(convert_plain(content, ok, path="ok"))
        case {"error": content, **rest} if not rest:
            return Result.Error(convert_plain(content, error, path="error"))
        case _:
            message = 'Expected {"ok": ...} or {"error": ...}'
            raise ValueError(message)


def _place(text: str) -> str:
    """A reason such as ``Expected ... - at `$.a[0]` `` as ``.a[0]: Expected ...``."""
    reason, separator, place = text.rpartition(" - at `")
    if not separator:
        return f": {text}"
    return f"{place.rstrip('`').removeprefix('$')}: {reason}"


def _shown(annotation: object) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__qualname__
    return str(annotation)
