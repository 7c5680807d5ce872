"""Payloads: bytes that cross the durable boundary, and their limits.

A payload is one byte that names the codec (0x01: canonical tagged JSON, the only one so
far; others are free for compression and encryption) and the text in UTF-8. Equal values
of equal types give equal bytes in every process. Plain values, and that is nearly all
of them, are written and read by one C call each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import msgspec

from stent.codec import failure
from stent.codec.names import classes_of, classes_of_parameters
from stent.codec.refusal import Refused
from stent.codec.tags import ENCODER, FEW, Packer, Tree, Unpacker, are_short, is_own
from stent.errors import ActivityFailedError, PayloadError

PAYLOAD_BYTES_MAX = 2 * 1024 * 1024
"""Default limit of one argument list or result."""

JSON_ID = 1
_PREFIX = bytes([JSON_ID])
_TAG = b'{"$'
_encode_json = ENCODER.encode
_decode_json = msgspec.json.Decoder().decode


def encode(
    value: object, *, path: str = "value", bytes_max: int = PAYLOAD_BYTES_MAX
) -> bytes:
    """The payload of one value; the same bytes for the same value everywhere.

    Args:
        value: None, a number, text, bytes, a builtin container, a date or time, a
            Decimal, UUID, path, Enum, dataclass, msgspec Struct, NamedTuple, Result,
            exception, or anything built from these.
        path: What the value is called in an error.
        bytes_max: Limit of the payload.

    Raises:
        PayloadError: Some part has no stored form (``args[0].rows[3]: ...``), or the
            payload is larger than its limit.
    """
    try:
        if are_short((value,)) or is_own(value, bytes_max):
            return _checked(_PREFIX + _encode_json(value), path, bytes_max)
    except UnicodeEncodeError:
        pass  # A lone surrogate; the packer tags it.
    except Refused as refusal:
        _raise_refused(refusal, path, bytes_max)
    return _write(lambda packer: packer.pack(value), path, bytes_max)


def decode(payload: bytes, annotation: object = Any) -> Any:
    """The value of a payload that :func:`encode` made, equal and of the same type.

    Args:
        payload: As written by :func:`encode`.
        annotation: Where to look first for dataclasses, Structs, NamedTuples and
            Enums, before all modules imported so far. It never converts: the value's
            own type wins over a sloppy annotation.

    Raises:
        MissingTypeError: A class is not known here; it names the module.
        PayloadError: The payload is damaged or of a newer version.
    """
    tree = _read(payload)
    if _TAG not in payload:
        return tree
    classes = {} if annotation is Any else classes_of(annotation)
    return _unpack(lambda unpacker: unpacker.unpack(tree), classes)


def encode_arguments(
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    bytes_max: int = PAYLOAD_BYTES_MAX,
) -> bytes:
    """The payload of an argument list: the JSON ``[[args...], {kwargs}]``.

    Raises:
        PayloadError: As :func:`encode`; the path begins with ``args[0]`` or the name
            of a keyword.
    """
    values = [*args, *kwargs.values()] if kwargs else args
    try:
        if (len(values) <= FEW and are_short(values)) or is_own(
            list(values), bytes_max
        ):
            payload = _PREFIX + _encode_json((args, dict(kwargs)))
            return _checked(payload, "arguments", bytes_max)
    except UnicodeEncodeError:
        pass  # A lone surrogate; the packer tags it.
    except Refused as refusal:
        _raise_refused(refusal, "arguments", bytes_max)
    return _write(lambda packer: _pack_arguments(packer, args, kwargs), "", bytes_max)


def _pack_arguments(
    packer: Packer, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Tree:
    try:
        positional = packer.pack_all(args)
    except Refused as refusal:
        refusal.within("args")
        raise
    return [positional, packer.pack_named(kwargs, form="{}")]


def decode_arguments(
    payload: bytes, function: Callable[..., object]
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for a call of ``function``.

    The classes that the function's annotations name are looked at first.

    Raises:
        MissingTypeError: A class is not known here; it names the module.
        PayloadError: The payload is damaged, of a newer version, or no argument list.
    """
    tree = _read(payload)
    try:
        args, kwargs = tree
    except (TypeError, ValueError) as error:
        _raise_damaged("not an argument list", error)
    if type(args) is not list or type(kwargs) is not dict:
        _raise_damaged("not an argument list")
    if _TAG not in payload:
        return args, kwargs
    return cast(
        "tuple[list[Any], dict[str, Any]]",
        _unpack(
            lambda unpacker: (unpacker.unpack_all(args), unpacker.unpack_named(kwargs)),
            classes_of_parameters(function),
        ),
    )


def encode_many(
    values: Sequence[object],
    *,
    path: str = "items",
    first: int = 0,
    bytes_max_each: int = PAYLOAD_BYTES_MAX,
) -> bytes:
    """One payload, a JSON array, of many values, each within the limit.

    Args:
        values: What to write.
        path: What they are called in an error.
        first: Index of the first one in an error.
        bytes_max_each: Limit of each.

    Raises:
        PayloadError: As :func:`encode`; the path begins with ``items[3]``.
    """
    items = values if type(values) is list else list(values)
    try:
        if is_own(items, bytes_max_each * max(1, len(items))):
            payload = _PREFIX + _encode_json(items)
            if len(payload) > bytes_max_each:
                _check_each(items, path, first, bytes_max_each)
            return payload
    except (UnicodeEncodeError, Refused):
        pass  # Found again below, where the item is known.
    trees = [
        _pack_item(item, f"{path}[{index}]", bytes_max_each)
        for index, item in enumerate(items, first)
    ]
    payload = _PREFIX + _encode_json(trees)
    if len(payload) > bytes_max_each:
        _check_each(trees, path, first, bytes_max_each)
    return payload


def join_payloads(payloads: Iterable[bytes]) -> bytes:
    """What :func:`encode_many` makes of values that were encoded one by one."""
    return _PREFIX + b"[" + b",".join(payload[1:] for payload in payloads) + b"]"


def _pack_item(item: object, path: str, bytes_max: int) -> Tree:
    try:
        return Packer(bytes_max).pack(item)
    except Refused as refusal:
        _raise_refused(refusal, path, bytes_max)
    except RecursionError as error:
        _raise_too_deep(path, error)


def _check_each(trees: Sequence[Tree], path: str, first: int, bytes_max: int) -> None:
    for index, tree in enumerate(trees, first):
        _check(1 + len(_encode_json(tree)), f"{path}[{index}]", bytes_max)


def decode_many(payload: bytes, annotation: object = Any) -> list[Any]:
    """The values of a payload that :func:`encode_many` made.

    Args:
        payload: As written by :func:`encode_many`.
        annotation: Of one value, see :func:`decode`.

    Raises:
        MissingTypeError: A class is not known here; it names the module.
        PayloadError: The payload is damaged, of a newer version, or no array.
    """
    values = decode(payload, annotation)
    if type(values) is not list:
        _raise_damaged("not an array of values")
    return values


def digest(payload: bytes) -> str:
    """16 hex digits that name the value: of equal values equal, in every process.

    Raises:
        PayloadError: The payload is empty or of an unknown codec.
    """
    return hashlib.blake2b(_text(payload), digest_size=8).hexdigest()


def encode_exception(error: BaseException) -> bytes:
    """The payload of an exception that ended a call; it never fails.

    What is no ``Exception`` is changed into one: cancellation into
    ExecutionCancelledError, the rest into ActivityFailedError. Long texts are
    shortened, parts without stored form are replaced by their ``repr``, and more is
    left out where it would not fit PAYLOAD_BYTES_MAX.
    """
    try:
        return _encode_exception(error)
    except BaseException as unexpected:  # noqa: BLE001 - a class may do anything when asked
        name = type.__getattribute__(type(error), "__name__")
        message = f"{name}: it cannot be stored ({type(unexpected).__name__})"
        packer = Packer(PAYLOAD_BYTES_MAX, failure.OUTCOMES[-1])
        return _PREFIX + _encode_json(packer.pack(ActivityFailedError(message)))


def _encode_exception(error: BaseException) -> bytes:
    outcome = failure.outcome_of(error)
    for detail in failure.OUTCOMES:
        packer = Packer(PAYLOAD_BYTES_MAX, detail)
        try:
            payload = _PREFIX + _encode_json(packer.pack(outcome))
        except (Refused, RecursionError, UnicodeEncodeError):
            continue
        if len(payload) <= PAYLOAD_BYTES_MAX:
            return payload
    name = type(outcome).__name__
    message = f"{name}: this exception is too large or too deep to be stored"
    packer = Packer(PAYLOAD_BYTES_MAX, failure.OUTCOMES[-1])
    return _PREFIX + _encode_json(packer.pack(ActivityFailedError(message)))


def decode_exception(payload: bytes) -> Exception:
    """The exception of a payload that :func:`encode_exception` made.

    Its class name, ``str()``, args, attributes, notes, cause and members are those it
    had. The text of its traceback is the attribute ``remote_traceback``.

    Raises:
        MissingTypeError: Its class could be found when it was stored and is not
            imported here.
        PayloadError: The payload is damaged, of a newer version, or no outcome.
    """
    error = decode(payload)
    if not isinstance(error, Exception):
        _raise_damaged("not an exception")
    return error


def describe_exception(payload: bytes) -> tuple[str, str]:
    """Class name and message, for display; builds no exception.

    Raises:
        PayloadError: The payload is damaged, of a newer version, or no exception.
    """
    tree = _read(payload)
    try:
        name, message = failure.describe(tree["$exception"])
    except (TypeError, KeyError) as error:
        _raise_damaged("not an exception", error)
    text = _unpack(lambda unpacker: unpacker.unpack(message), {})
    return name, str(text).encode("utf-8", "backslashreplace").decode()


def traceback_of(payload: bytes) -> str | None:
    """The text of the traceback that was stored with an exception, for display.

    Raises:
        PayloadError: The payload is damaged, of a newer version, or no exception.
    """
    tree = _read(payload)
    try:
        text = tree["$exception"].get("traceback")
    except (TypeError, KeyError, AttributeError) as error:
        _raise_damaged("not an exception", error)
    if text is None:
        return None
    found = _unpack(lambda unpacker: unpacker.unpack(text), {})
    return str(found).encode("utf-8", "backslashreplace").decode()


def read_tree(payload: bytes) -> Tree:
    """The JSON of a payload, tags as they are.

    Raises:
        PayloadError: The payload is damaged or of an unknown codec.
    """
    return _read(payload)


def _write(pack: Callable[[Packer], Tree], path: str, bytes_max: int) -> bytes:
    name = path or "arguments"
    try:
        payload = _PREFIX + _encode_json(pack(Packer(bytes_max)))
    except Refused as refusal:
        _raise_refused(refusal, path, bytes_max)
    except RecursionError as error:
        _raise_too_deep(name, error)
    except (UnicodeEncodeError, TypeError) as error:
        message = f"{name}: a name in it is no valid text: {error}"
        raise PayloadError(message) from error
    return _checked(payload, name, bytes_max)


def _checked(payload: bytes, path: str, bytes_max: int) -> bytes:
    _check(len(payload), path, bytes_max)
    return payload


def _check(length: int, path: str, bytes_max: int) -> None:
    if length > bytes_max:
        message = f"{path}: {length} bytes encoded, the limit is {bytes_max}"
        raise PayloadError(message)


def _raise_refused(refusal: Refused, path: str, bytes_max: int) -> NoReturn:
    message = refusal.sentence(path)
    if refusal.oversized:
        message = f"{path or 'arguments'}: over the limit of {bytes_max} bytes"
    raise PayloadError(message) from None


def _raise_too_deep(path: str, error: RecursionError) -> NoReturn:
    message = f"{path}: nested too deep for the stack of the calling code"
    raise PayloadError(message) from error


def _raise_damaged(reason: str, error: Exception | None = None) -> NoReturn:
    message = f"the payload is damaged: {reason}"
    raise PayloadError(message) from error


def _text(payload: bytes) -> bytes:
    if payload[:1] != _PREFIX:
        if not payload:
            _raise_damaged("it is empty")
        message = f"unknown payload codec {payload[0]}: written by a newer version?"
        raise PayloadError(message)
    return payload[1:]


def _read(payload: bytes) -> Tree:
    text = _text(payload)
    try:
        return _decode_json(text)
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode errors
        _raise_damaged(str(error), error)


def _unpack(
    unpack: Callable[[Unpacker], object], classes: Mapping[str, type]
) -> object:
    try:
        return unpack(Unpacker(classes))
    except PayloadError:
        raise
    except Exception as error:  # noqa: BLE001 - a malformed tree may lead to anything
        _raise_damaged(f"{type(error).__name__}: {error}", error)
