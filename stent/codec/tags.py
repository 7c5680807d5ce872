"""Python values <-> JSON trees in which every type but JSON's own carries a tag.

JSON's own are None, bool, int of 64 bits, finite float, str without lone surrogates,
list, and dict with str keys. Everything else is an object with one key that begins with
``$``, such as ``{"$tuple": [1, 2]}``; a user's dict of that look is written as
``$dict``, a list of pairs. So a text without ``{"$`` holds only JSON's own types, and
reads back exactly without any walk. The tags are journaled: they may be added to and
never change their meaning. Two references to one object come back as two objects.
"""

from __future__ import annotations

import binascii
import dataclasses
import enum
import itertools
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import cached_property
from pathlib import (
    Path,
    PosixPath,
    PurePath,
    PurePosixPath,
    PureWindowsPath,
    WindowsPath,
)
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from stent.codec import failure
from stent.codec.names import (
    Classes,
    MissingTypeError,
    Shape,
    name_of,
    remembered,
    shape_of,
)
from stent.codec.refusal import Refused, segment_of
from stent.errors import PayloadError
from stent.result import Result

Tree = Any
"""What JSON can say: None, bool, int, float, str, list, dict with str keys."""

DEPTH_MAX = 200
SHORT_TEXT_MAX = 100
FEW = 8
TAG_BYTES_MIN = len('{"$ok":}')
ENCODER = msgspec.json.Encoder()

_INT_MIN = -(2**63)
_INT_END = 2**64
_NUMBERS = frozenset({int, float, bool})
_SCALARS = _NUMBERS | {str, type(None)}
_OWN = _SCALARS | {list, dict}
_ZONE_KEY = re.compile(r"[A-Za-z0-9_+\-]+(/[A-Za-z0-9_+\-]+){0,4}")
_FACTORIES: dict[str, Callable[[], object]] = {
    factory.__name__: factory
    for factory in (list, dict, set, tuple, int, float, str, bytes, bool)
}
_PATHS: dict[str, type[PurePath]] = {
    "Path": Path,
    "PurePosixPath": PurePosixPath,
    "PureWindowsPath": PureWindowsPath,
}


class Oversized(Refused):
    """The value has more parts than its limit has bytes."""

    oversized = True

    def __init__(self) -> None:
        super().__init__("larger than the limit")


def are_short(values: Iterable[object]) -> bool:
    """True when all are None or short: ints of 64 bits, ASCII, finite floats.

    These need no tag and no limit. A loop over few values beats :func:`is_own`.
    """
    for value in values:
        kind = type(value)
        if kind is int:
            if not _INT_MIN <= cast("int", value) < _INT_END:
                return False
        elif kind is str:
            text = cast("str", value)
            if len(text) > SHORT_TEXT_MAX or not text.isascii():
                return False
        elif kind is float:
            if not math.isfinite(cast("float", value)):
                return False
        elif value is not None and kind is not bool:
            return False
    return True


def is_own(value: object, size_max: int) -> bool:
    """True when the value consists of JSON's own types, so that it needs no tags.

    Goes level by level, so that nearly all work is done by C loops over many values.

    Raises:
        Oversized: It surely takes more than ``size_max`` bytes.
    """
    level: list[Any] = [value]
    size = 0
    for _ in range(DEPTH_MAX):
        types: set[type] = set(map(type, level))
        if not types <= _OWN:
            return False
        size += len(level)
        if str in types:
            texts = level if len(types) == 1 else [v for v in level if type(v) is str]
            size += sum(map(len, texts))
        if size > size_max:
            raise Oversized
        if not (types & _NUMBERS <= {bool} or _are_own_numbers(level, types)):
            return False
        if types <= _SCALARS:
            return True
        dicts = [v for v in level if type(v) is dict]
        if dicts and not _have_own_keys(dicts):
            return False
        lists = [v for v in level if type(v) is list]
        size += sum(map(len, lists)) + sum(map(len, dicts))
        if size > size_max:
            raise Oversized
        level = list(itertools.chain(*lists, *map(dict.values, dicts)))
    return False


def _are_own_numbers(level: list[Any], types: set[type]) -> bool:
    numbers = level if types <= _NUMBERS else [v for v in level if type(v) in _NUMBERS]
    if float in types:
        try:
            if not all(map(math.isfinite, numbers)):
                return False
        except OverflowError:  # an int beyond every float
            return False
    return int not in types or (min(numbers) >= _INT_MIN and max(numbers) < _INT_END)


def _have_own_keys(dicts: list[dict[Any, Any]]) -> bool:
    if not set(map(type, itertools.chain.from_iterable(dicts))) <= {str}:
        return False
    return not any(len(d) == 1 and next(iter(d)).startswith("$") for d in dicts)


class Packer:
    """Turns one value into a tree.

    Args:
        budget: How many parts and characters it may have; about bytes.
    """

    __slots__ = ("active", "budget", "depth", "details")

    def __init__(self, budget: int, details: failure.Detail = failure.VALUE) -> None:
        self.budget = budget
        self.depth = 0
        self.details = details
        self.active: set[int] = set()

    def pack(self, value: object) -> Tree:
        """The tree of one value.

        Raises:
            Refused: Some part has no stored form, or there is too much of it.
        """
        kind = type(value)
        self.budget -= 1
        if self.budget < 0:
            raise Oversized
        if value is None or kind is bool:
            return value
        packer = _PACKERS.get(kind) or _packer_of(kind)
        if kind not in _SCALARS:
            self.budget -= 1 if kind in _OWN else TAG_BYTES_MIN
        self.depth += 1
        if self.depth > DEPTH_MAX and kind not in _SCALARS:
            message = f"more than {DEPTH_MAX} levels deep (does it contain itself?)"
            raise Refused(message)
        tree = packer(self, value)
        self.depth -= 1
        return tree

    def pack_all(self, values: Iterable[object]) -> list[Tree]:
        """The trees of many values, in their order; a refusal names the position."""
        trees: list[Tree] = []
        try:
            # When ``pack`` raises, ``extend`` keeps what came before it.
            trees.extend(map(self.pack, values))
        except Refused as refusal:
            refusal.within(f"[{len(trees)}]")
            raise
        return trees

    def pack_named(self, values: Mapping[str, object], form: str = ".{}") -> Tree:
        """An object that is not a tag, whatever its keys."""
        if are_short(values.values()):
            # Not counted text by text: the limit is checked again on what is written.
            self.budget -= len(values)
            return dict(values)
        trees: dict[str, Tree] = {}
        for name, value in values.items():
            try:
                trees[name] = self.pack(value)
            except Refused as refusal:
                refusal.within(form.format(name))
                raise
        return trees

    def attempt(self, value: object, bytes_max: int) -> Tree:
        """The tree of a part that may be left out; leaves this packer usable.

        Raises:
            Refused: It has no stored form or takes more than about ``bytes_max``.
        """
        part = Packer(min(bytes_max, self.budget))
        part.active, part.depth = self.active, self.depth
        allowance = part.budget
        try:
            tree = part.pack(value)
        finally:
            self.budget -= allowance - max(part.budget, 0)
        if len(ENCODER.encode(tree)) > bytes_max:
            raise Oversized
        return tree


_PackOne = Callable[[Packer, Any], Tree]


def _pack_int(_: Packer, value: int) -> Tree:
    return value if _INT_MIN <= value < _INT_END else {"$int": hex(value)}


def _pack_float(_: Packer, value: float) -> Tree:
    return value if math.isfinite(value) else {"$float": repr(value)}


def _pack_str(packer: Packer, value: str) -> Tree:
    packer.budget -= len(value)
    if packer.budget < 0:
        raise Oversized
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"$str": _base64(value.encode("utf-8", "surrogatepass"))}
    return value


def _base64(raw: bytes | bytearray) -> str:
    return binascii.b2a_base64(raw, newline=False).decode("ascii")


def _pack_bytes(packer: Packer, value: bytes | bytearray) -> Tree:
    packer.budget -= len(value)
    if packer.budget < 0:
        raise Oversized
    return {f"${type(value).__name__}": _base64(value)}


def _pack_list(packer: Packer, value: list[object]) -> Tree:
    return packer.pack_all(value)


def _pack_tuple(packer: Packer, value: tuple[object, ...]) -> Tree:
    return {"$tuple": packer.pack_all(value)}


def _pack_set(packer: Packer, value: set[object] | frozenset[object]) -> Tree:
    trees = packer.pack_all(value)
    # The order of a set differs between processes, that of the bytes does not.
    return {f"${type(value).__name__}": sorted(trees, key=ENCODER.encode)}


def _pack_dict(packer: Packer, value: dict[object, object]) -> Tree:
    if set(map(type, value)) <= {str}:
        trees = _pack_str_dict(packer, cast("dict[str, object]", value))
        if trees is not None:
            return trees
    return {"$dict": _pack_pairs(packer, value)}


def _pack_str_dict(packer: Packer, value: dict[str, object]) -> Tree | None:
    if len(value) == 1 and next(iter(value)).startswith("$"):
        return None
    trees: dict[str, Tree] = {}
    for key, item in value.items():
        if type(packer.pack(key)) is not str:  # a lone surrogate, which JSON lacks
            return None
        try:
            trees[key] = packer.pack(item)
        except Refused as refusal:
            refusal.within(segment_of(key))
            raise
    return trees


def _pack_pairs(packer: Packer, value: Mapping[Any, object]) -> list[list[Tree]]:
    pairs: list[list[Tree]] = []
    for key, item in value.items():
        try:
            pairs.append([packer.pack(key), packer.pack(item)])
        except Refused as refusal:
            refusal.within(segment_of(key) if type(key) in _SCALARS else "[...]")
            raise
    return pairs


def _pack_ordered(packer: Packer, value: OrderedDict[object, object]) -> Tree:
    return {"$ordereddict": _pack_pairs(packer, value)}


def _pack_counter(packer: Packer, value: Counter[object]) -> Tree:
    return {"$counter": _pack_pairs(packer, value)}


def _pack_defaultdict(packer: Packer, value: defaultdict[object, object]) -> Tree:
    factory = value.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        message = "a defaultdict whose factory is no builtin type; pass dict(it)"
        raise Refused(message)
    return {"$defaultdict": [name, _pack_pairs(packer, value)]}


def _pack_deque(packer: Packer, value: deque[object]) -> Tree:
    return {"$deque": [value.maxlen, packer.pack_all(value)]}


def _pack_date(_: Packer, value: date) -> Tree:
    return {"$date": value.isoformat()}


def _pack_datetime(_: Packer, value: datetime) -> Tree:
    return {"$datetime": _pack_clock(value)}


def _pack_time(_: Packer, value: time) -> Tree:
    return {"$time": _pack_clock(value)}


def _pack_clock(value: datetime | time) -> Tree:
    """ISO text; with the zone where the offset does not say it, and the fold if 1."""
    text = value.isoformat()
    zone = _zone_of(value.tzinfo)
    if zone is None and value.fold == 0:
        return text
    return [text, zone, value.fold]


def _zone_of(zone: tzinfo | None) -> Tree:
    """None: as in the text; a str: a zone's name; a list: the name of an offset."""
    if zone is None:
        return None
    if type(zone) is ZoneInfo:
        # typeshed says str, but ``ZoneInfo.from_file`` leaves None.
        if not _ZONE_KEY.fullmatch(zone.key or ""):
            message = "a ZoneInfo without a usable name"
            raise Refused(message)
        return zone.key
    if type(zone) is timezone:
        # A timezone without a name of its own prints as "UTC" or "UTC+hh:mm".
        name = zone.tzname(None)
        return None if name == timezone(zone.utcoffset(None)).tzname(None) else [name]
    message = f"{_class_text(type(zone))} as time zone; use zoneinfo or timezone.utc"
    raise Refused(message)


def _pack_timedelta(_: Packer, value: timedelta) -> Tree:
    return {"$timedelta": [value.days, value.seconds, value.microseconds]}


def _pack_decimal(packer: Packer, value: Decimal) -> Tree:
    return {"$decimal": packer.pack(str(value))}


def _pack_uuid(_: Packer, value: UUID) -> Tree:
    return {"$uuid": str(value)}


def _pack_path(packer: Packer, value: PurePath) -> Tree:
    name = "Path" if isinstance(value, Path) else type(value).__name__
    return {"$path": [name, packer.pack(str(value))]}


def _pack_complex(packer: Packer, value: complex) -> Tree:
    return {"$complex": [packer.pack(value.real), packer.pack(value.imag)]}


def _pack_range(packer: Packer, value: range) -> Tree:
    return {"$range": packer.pack_all((value.start, value.stop, value.step))}


def _pack_result(packer: Packer, value: Result[object, object]) -> Tree:
    if value.ok:
        return {"$ok": packer.pack(value.value)}
    return {"$error": packer.pack(value.error)}


def _pack_unset(_: Packer, __: object) -> Tree:
    return {"$unset": 1}


_PACKERS: dict[type, _PackOne] = {
    int: _pack_int,
    float: _pack_float,
    str: _pack_str,
    bytes: _pack_bytes,
    bytearray: _pack_bytes,
    list: _pack_list,
    tuple: _pack_tuple,
    set: _pack_set,
    frozenset: _pack_set,
    dict: _pack_dict,
    OrderedDict: _pack_ordered,
    Counter: _pack_counter,
    defaultdict: _pack_defaultdict,
    deque: _pack_deque,
    datetime: _pack_datetime,
    date: _pack_date,
    time: _pack_time,
    timedelta: _pack_timedelta,
    Decimal: _pack_decimal,
    UUID: _pack_uuid,
    PosixPath: _pack_path,
    WindowsPath: _pack_path,
    PurePosixPath: _pack_path,
    PureWindowsPath: _pack_path,
    complex: _pack_complex,
    range: _pack_range,
    Result: _pack_result,
    msgspec.UnsetType: _pack_unset,
}


@remembered
def _packer_of(kind: type) -> _PackOne:
    """The packer of a user's class; one that refuses when it has no stored form."""
    # asyncpg's UUID stands in for the builtin one and must not change with the driver.
    if issubclass(kind, UUID) and kind.__module__.startswith("asyncpg."):
        return _pack_uuid
    match shape_of(kind):
        case Shape.DATA:
            return _pack_data
        case Shape.STRUCT:
            return _pack_struct
        case Shape.ENUM:
            return _pack_enum
        case Shape.NAMED:
            return _pack_named_tuple
        case Shape.EXCEPTION:
            return _pack_exception
        case None:
            return _refuse


def _refuse(_: Packer, value: object) -> Tree:
    kind = type(value)
    builtin = next((base for base in kind.__mro__ if base in _PACKERS), None)
    text = f"{_class_text(kind)} has no stored form"
    if builtin is not None:
        text += f" (its class is a subclass of {builtin.__name__})"
    raise Refused(text + "; pass plain data or a dataclass")


def _class_text(kind: type) -> str:
    module = kind.__module__
    return (
        kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
    )


def _pack_data(packer: Packer, value: object) -> Tree:
    name = name_of(type(value))
    fields, hidden = _data_fields(type(value))
    try:
        values = {field: getattr(value, field) for field in fields}
    except AttributeError as error:
        message = f"{_class_text(type(value))} has no value for {error.name!r}"
        raise Refused(message) from None
    content = [name, packer.pack_named(values)]
    # Attributes set beside the fields, in __post_init__ say: no constructor makes
    # them again.
    extra = {
        key: part
        for key, part in getattr(value, "__dict__", {}).items()
        if key not in values and key not in hidden
    }
    if extra:
        content.append(packer.pack_named(extra))
    return {"$data": content}


@remembered
def _data_fields(cls: type) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of the fields, and attributes that are no part of the value."""
    fields = tuple(field.name for field in dataclasses.fields(cls))
    cached = {
        name
        for base in cls.__mro__
        for name, part in vars(base).items()
        if isinstance(part, cached_property)
    }
    return fields, frozenset(cached | {"__orig_class__"})


def _pack_struct(packer: Packer, value: msgspec.Struct) -> Tree:
    name = name_of(type(value))
    fields = type(value).__struct_fields__
    if getattr(value, "__dict__", None):
        message = f"{_class_text(type(value))} with attributes beside its fields"
        raise Refused(message)
    values = {field: getattr(value, field) for field in fields}
    return {"$struct": [name, packer.pack_named(values)]}


def _pack_named_tuple(packer: Packer, value: tuple[object, ...]) -> Tree:
    name = name_of(type(value))
    if getattr(value, "__dict__", None):
        message = f"{_class_text(type(value))} with attributes beside its fields"
        raise Refused(message)
    fields = cast("Any", type(value))._fields
    return {"$named": [name, packer.pack_named(dict(zip(fields, value, strict=True)))]}


def _pack_enum(packer: Packer, value: enum.Enum) -> Tree:
    cls = type(value)
    name = name_of(cls)
    if cls.__members__.get(value.name or "") is value:
        return {"$enum": [name, value.name]}
    if isinstance(value, enum.Flag):  # a combination has no member name of its own
        return {"$enum": [name, packer.pack(value.value)]}
    message = f"{_class_text(cls)} has no member {value.name!r}"
    raise Refused(message)


def _pack_exception(packer: Packer, value: BaseException) -> Tree:
    return {"$exception": failure.record_of(value, packer, packer.details)}


class Unpacker:
    """Turns trees back into values.

    Args:
        annotated: Classes by stored name that the reader's annotation names.
    """

    __slots__ = ("classes",)

    def __init__(self, annotated: Mapping[str, type]) -> None:
        self.classes = Classes(annotated)

    def unpack(self, tree: Tree) -> Any:
        """The value of one tree.

        Raises:
            MissingTypeError: It needs a class that is not imported.
            PayloadError: A tag is unknown, or names something that is never built.
            Exception: Whatever a malformed tree leads to; the caller translates it.
        """
        kind = type(tree)
        if kind is list:
            return self.unpack_all(tree)
        if kind is not dict:
            return tree
        if len(tree) == 1:
            [(tag, content)] = tree.items()
            if tag.startswith("$"):
                unpacker = _UNPACKERS.get(tag)
                if unpacker is None:
                    message = f"unknown tag {tag!r}: written by a newer version?"
                    raise PayloadError(message)
                return unpacker(self, content)
        return self.unpack_named(tree)

    def unpack_all(self, trees: list[Tree]) -> list[Any]:
        """The values of a list of trees."""
        return [
            tree if type(tree) in _SCALARS else self.unpack(tree)
            for tree in _as_list(trees)
        ]

    def unpack_named(self, trees: dict[str, Tree]) -> dict[str, Any]:
        """The values of an object that is not a tag."""
        return {
            key: tree if type(tree) in _SCALARS else self.unpack(tree)
            for key, tree in trees.items()
        }


_UnpackOne = Callable[[Unpacker, Tree], Any]


def _as_list(tree: Tree) -> list[Tree]:
    if type(tree) is not list:
        message = f"expected a list, found {type(tree).__name__}"
        raise TypeError(message)
    return tree


def _as_text(tree: Tree) -> str:
    if type(tree) is not str:
        message = f"expected text, found {type(tree).__name__}"
        raise TypeError(message)
    return tree


def _unpack_float(_: Unpacker, tree: Tree) -> float:
    if tree not in ("nan", "inf", "-inf"):
        message = f"no such float: {tree!r}"
        raise ValueError(message)
    return float(tree)


def _raw(tree: Tree) -> bytes:
    return binascii.a2b_base64(_as_text(tree), strict_mode=True)


def _pairs(unpacker: Unpacker, tree: Tree) -> list[tuple[Any, Any]]:
    return [
        (unpacker.unpack(key), unpacker.unpack(value)) for key, value in _as_list(tree)
    ]


def _unpack_counter(unpacker: Unpacker, tree: Tree) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, _pairs(unpacker, tree))
    return counter


def _unpack_defaultdict(unpacker: Unpacker, tree: Tree) -> defaultdict[Any, Any]:
    name, pairs = tree
    factory = None if name is None else _FACTORIES[name]
    return defaultdict(factory, _pairs(unpacker, pairs))


def _unpack_deque(unpacker: Unpacker, tree: Tree) -> deque[Any]:
    length, items = tree
    return deque(unpacker.unpack_all(items), length)


def _unpack_datetime(_: Unpacker, tree: Tree) -> datetime:
    if type(tree) is str:
        return datetime.fromisoformat(tree)
    text, zone, fold = tree
    instant = datetime.fromisoformat(text)
    return instant.replace(tzinfo=_zone(zone, instant.tzinfo), fold=fold)


def _unpack_time(_: Unpacker, tree: Tree) -> time:
    if type(tree) is str:
        return time.fromisoformat(tree)
    text, zone, fold = tree
    clock = time.fromisoformat(text)
    return clock.replace(tzinfo=_zone(zone, clock.tzinfo), fold=fold)


def _zone(zone: Tree, offset: tzinfo | None) -> tzinfo | None:
    if zone is None:
        return offset
    if type(zone) is list:
        return timezone(cast("timezone", offset).utcoffset(None), zone[0])
    if not _ZONE_KEY.fullmatch(zone):
        message = f"no such time zone: {zone!r}"
        raise ValueError(message)
    try:
        return ZoneInfo(zone)
    except ZoneInfoNotFoundError as error:
        raise MissingTypeError("tzdata", zone) from error


def _unpack_path(unpacker: Unpacker, tree: Tree) -> PurePath:
    name, text = tree
    return _PATHS[name](unpacker.unpack(text))


def _unpack_data(unpacker: Unpacker, tree: Tree) -> object:
    name, values, *extra = tree
    cls = unpacker.classes.find(name, Shape.DATA)
    instance: object = object.__new__(cls)
    values = unpacker.unpack_named(values)
    for field in _data_fields(cls)[0]:
        if field in values:
            object.__setattr__(instance, field, values[field])
        else:
            _set_default(instance, field, name)
    for part in extra:
        for key, value in unpacker.unpack_named(part).items():
            object.__setattr__(instance, key, value)
    return instance


def _set_default(instance: object, name: str, cls_name: str) -> None:
    field = next(f for f in dataclasses.fields(cast("Any", instance)) if f.name == name)
    if field.default is not dataclasses.MISSING:
        object.__setattr__(instance, name, field.default)
    elif field.default_factory is not dataclasses.MISSING:
        object.__setattr__(instance, name, field.default_factory())
    elif field.init:
        raise _no_value(cls_name, name)


def _no_value(name: str, field: str) -> PayloadError:
    message = f"{name}: the stored value has no {field!r} and the field no default"
    return PayloadError(message)


def _unpack_struct(unpacker: Unpacker, tree: Tree) -> object:
    name, values = tree
    cls = unpacker.classes.find(name, Shape.STRUCT)
    values = unpacker.unpack_named(values)
    fields = msgspec.structs.fields(cast("type[msgspec.Struct]", cls))
    for field in fields:
        if field.required and field.name not in values:
            raise _no_value(name, field.name)
    known = {f.name: values[f.name] for f in fields if f.name in values}
    instance = _constructor(cls)(**known)
    if type(instance) is not cls:
        msgspec.structs.force_setattr(instance, "__class__", cls)
    return instance


@remembered
def _constructor(cls: type) -> Callable[..., msgspec.Struct]:
    """The class, or its twin without ``__post_init__``: that ran when it was made.

    A Struct cannot be made without its constructor, which runs no user code but this.
    """
    if not hasattr(cls, "__post_init__"):
        return cast("Callable[..., msgspec.Struct]", cls)
    body: dict[str, object] = {
        "__post_init__": lambda _: None,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return cast("Callable[..., msgspec.Struct]", type(cls)(cls.__name__, (cls,), body))


def _unpack_named_tuple(unpacker: Unpacker, tree: Tree) -> object:
    name, values = tree
    cls = cast("Any", unpacker.classes.find(name, Shape.NAMED))
    values = {**cls._field_defaults, **unpacker.unpack_named(values)}
    for field in cls._fields:
        if field not in values:
            raise _no_value(name, field)
    return tuple.__new__(cls, [values[field] for field in cls._fields])


def _unpack_enum(unpacker: Unpacker, tree: Tree) -> enum.Enum:
    name, key = tree
    cls = cast("type[enum.Enum]", unpacker.classes.find(name, Shape.ENUM))
    if type(key) is str:
        if key not in cls.__members__:
            message = f"{name} has no member {key!r} any more"
            raise PayloadError(message)
        return cls.__members__[key]
    value = unpacker.unpack(key)
    if type(value) is not int or not issubclass(cls, enum.Flag):
        message = f"{name} cannot have the value {value!r}"
        raise PayloadError(message)
    return cls(value)


def _unpack_exception(unpacker: Unpacker, tree: Tree) -> BaseException:
    return failure.rebuild(tree, unpacker.unpack, unpacker.classes)


_UNPACKERS: dict[str, _UnpackOne] = {
    "$int": lambda _, tree: int(_as_text(tree), 16),
    "$float": _unpack_float,
    "$str": lambda _, tree: _raw(tree).decode("utf-8", "surrogatepass"),
    "$bytes": lambda _, tree: _raw(tree),
    "$bytearray": lambda _, tree: bytearray(_raw(tree)),
    "$tuple": lambda unpacker, tree: tuple(unpacker.unpack_all(tree)),
    "$set": lambda unpacker, tree: set(unpacker.unpack_all(tree)),
    "$frozenset": lambda unpacker, tree: frozenset(unpacker.unpack_all(tree)),
    "$dict": lambda unpacker, tree: dict(_pairs(unpacker, tree)),
    "$ordereddict": lambda unpacker, tree: OrderedDict(_pairs(unpacker, tree)),
    "$counter": _unpack_counter,
    "$defaultdict": _unpack_defaultdict,
    "$deque": _unpack_deque,
    "$date": lambda _, tree: date.fromisoformat(tree),
    "$datetime": _unpack_datetime,
    "$time": _unpack_time,
    "$timedelta": lambda _, tree: timedelta(*_as_list(tree)),
    "$decimal": lambda _, tree: Decimal(_as_text(tree)),
    "$uuid": lambda _, tree: UUID(_as_text(tree)),
    "$path": _unpack_path,
    "$complex": lambda unpacker, tree: complex(*unpacker.unpack_all(tree)),
    "$range": lambda unpacker, tree: range(*unpacker.unpack_all(tree)),
    "$ok": lambda unpacker, tree: Result.Ok(unpacker.unpack(tree)),
    "$error": lambda unpacker, tree: Result.Error(unpacker.unpack(tree)),
    "$unset": lambda _, __: msgspec.UNSET,
    "$data": _unpack_data,
    "$struct": _unpack_struct,
    "$named": _unpack_named_tuple,
    "$enum": _unpack_enum,
    "$exception": _unpack_exception,
}
