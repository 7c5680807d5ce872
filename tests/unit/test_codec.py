"""Values through the codec: equal and of the same type, or refused with a path."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import math
import socket
import sys
import threading
import types
import typing
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stent.codec import (
    MissingTypeError,
    convert_plain,
    decode,
    decode_arguments,
    decode_many,
    digest,
    encode,
    encode_arguments,
    encode_many,
    to_plain,
)
from stent.errors import PayloadError
from stent.result import Result

T = TypeVar("T")


class Color(enum.Enum):
    RED = 1
    GREEN = "green"
    CRIMSON = 1  # noqa: PIE796 - an alias


class Level(enum.IntEnum):
    LOW = 1


class Name(str, enum.Enum):  # noqa: UP042 - the older spelling users have
    A = "a"


class Permission(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


@dataclasses.dataclass
class Item:
    name: str
    data: Any = None
    made_of: list[Item] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    size: int
    color: Color = Color.RED


@dataclasses.dataclass
class Indexed:
    names: list[str]
    seed: dataclasses.InitVar[int] = 0

    def __post_init__(self, seed: int) -> None:
        self.index = {name: seed + i for i, name in enumerate(self.names)}

    @cached_property
    def total(self) -> int:
        return len(self.names)


@dataclasses.dataclass
class Box(Generic[T]):
    content: T


class Point(NamedTuple):
    x: int
    y: float = 0.5


class Row(msgspec.Struct, frozen=True):
    id: int
    tags: tuple[str, ...] = ()


STRUCTS_CHECKED: list[int] = []


class Checked(msgspec.Struct):
    id: int

    def __post_init__(self) -> None:
        STRUCTS_CHECKED.append(self.id)
        self.id += 1


@dataclasses.dataclass
class Leveled:
    id: int
    level: Level


class Page(TypedDict):
    url: str
    size: int


class Text(str):
    __slots__ = ()


class TupleChild(tuple[int, ...]):
    __slots__ = ()


def same(left: Any, right: Any) -> bool:
    """Equal in value and type all the way down; NaN equals NaN, -0.0 not 0.0."""
    if type(left) is not type(right):
        return False
    match left, right:
        case float(), float():
            return repr(left) == repr(right)
        case complex(), complex():
            return repr(left) == repr(right)
        case dict(), dict():
            return same(list(left.items()), list(right.items()))
        case (list(), list()) | (tuple(), tuple()) | (deque(), deque()):
            return len(left) == len(right) and all(map(same, left, right))
        case (set(), set()) | (frozenset(), frozenset()):
            ordered = (sorted(left, key=repr), sorted(right, key=repr))
            return all(map(same, *ordered)) and len(left) == len(right)
        case datetime(), datetime():
            return (
                left.replace(tzinfo=None) == right.replace(tzinfo=None)
                and left.fold == right.fold
                and repr(left.tzinfo) == repr(right.tzinfo)
            )
        case Decimal(), Decimal():
            return str(left) == str(right)
        case Result(), Result():
            contents = [(r.ok, r.value, r.error) for r in (left, right)]
            return same(*contents)
    if dataclasses.is_dataclass(left) and not isinstance(left, type):
        names = [field.name for field in dataclasses.fields(left)]
        return all(same(getattr(left, n), getattr(right, n)) for n in names)
    return bool(left == right)


def assert_round_trip(value: object) -> None:
    payload = encode(value)
    back = decode(payload)
    assert same(back, value), (back, value, payload)
    assert encode(back) == payload
    to_plain(payload)


any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates included
hashables = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(-(2**200), 2**200)
        | st.floats(allow_nan=False)
        | any_text
        | st.binary()
        | st.decimals(allow_nan=False)
        | st.uuids()
        | st.dates()
        | st.datetimes(timezones=st.none() | st.timezones(), allow_imaginary=True)
        | st.timedeltas()
        | st.times()
        | st.sampled_from([*Color, *Level, *Name, Permission(3), Point(1)])
    )
)
values: st.SearchStrategy[Any] = st.recursive(
    hashables
    | st.floats()
    | st.complex_numbers()
    | st.decimals()
    | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(any_text, inner)
        | st.dictionaries(st.sampled_from(["$tuple", "$x", "a"]), inner)
        | st.dictionaries(hashables, inner)
        | st.dictionaries(hashables, inner).map(OrderedDict)
        | st.sets(hashables)
        | st.frozensets(hashables)
        | st.builds(Item, any_text, inner)
        | st.builds(Box, inner)
        | inner.map(Result.Ok)
        | inner.map(Result.Error)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_values_come_back_equal_and_of_the_same_type(value: object) -> None:
    """Whatever is built from storable types round-trips, and twice to equal bytes."""
    assert_round_trip(value)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=4), st.dictionaries(st.text(max_size=5), values))
def test_arguments_round_trip(args: list[object], kwargs: dict[str, object]) -> None:
    """Argument lists keep values, keyword names and their order."""
    back = decode_arguments(encode_arguments(tuple(args), kwargs), takes_item)
    assert same(back, (args, kwargs))


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=6))
def test_many_values_round_trip(many: list[object]) -> None:
    """Values written together read back one by one as alone."""
    assert same(decode_many(encode_many(many)), many)


@pytest.mark.parametrize(
    "value",
    [
        [math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 1e308, 0.1],
        [2**63, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 1.5, "x"],
        [1e300, 10**400],
        "NUL \x00 and \u2028 and 😀",
        "\ud800 lone",
        "\ud83d\ude00",
        {"\udfff": 1, "b": {"\ud800": 2}},
        {1: "a", "1": "b", (1, 2): None, None: True, 1.5: [], b"x": 0},
        {"$tuple": [1]},
        {"$unknown": 1},
        {"$a": 1, "b": 2},
        {"$": {"$": {"$dict": []}}},
        {"": {}, "a.b": [[], {}, ()]},
        (1, (2, [3, (4,)])),
        {1, 2, 3},
        frozenset({"a", ("b", 1)}),
        bytearray(b"\x00\xff"),
        datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        datetime(2024, 10, 27, 2, 30, fold=1),  # noqa: DTZ001 - naive on purpose
        datetime(2024, 1, 1, tzinfo=UTC),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=1), "CET")),
        datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")),
        datetime.max,  # noqa: DTZ901 - naive on purpose
        time(1, 2, 3, 4, tzinfo=UTC),
        time(1, 2, tzinfo=ZoneInfo("Asia/Tokyo"), fold=1),
        timedelta(days=-1, microseconds=1),
        [Decimal("1.10"), Decimal("-0"), Decimal("NaN"), Decimal("1E+500")],
        [Path("/tmp/x"), PurePosixPath("a"), PureWindowsPath("c:\\x"), Path("\udc80")],
        [complex(-0.0, math.inf), range(1, 10, 3), range(10**30)],
        [Color.GREEN, Color.CRIMSON, Level.LOW, Name.A, Permission(3), Permission(0)],
        {Level.LOW: 1, Name.A: 2, Color.RED: 3},
        [Item("a", made_of=[Item("b")]), Frozen(size=1), Box({1: 2}), Box[int](3)],
        [Point(1), Row(1, ("a",)), Row(2), msgspec.UNSET],
        [OrderedDict(a=1), Counter("aab"), deque([1, 2], 3), deque([()])],
        defaultdict(list, {"a": [1]}),
        defaultdict(None, {"a": (1,)}),
        [Result.Ok((1,)), Result.Error("no"), Result.Ok(Result.Error(None))],
    ],
    ids=lambda value: type(value).__name__,  # a set has no order to show
)
def test_difficult_values_round_trip(value: object) -> None:
    """The values that JSON, jsonb or pickle are known to lose."""
    assert_round_trip(value)


def test_huge_int_round_trips() -> None:
    """An int far beyond the digits that ``int(text)`` accepts comes back."""
    assert_round_trip([7**120_000, -(10**10_000)])


def test_attributes_made_by_a_constructor_survive_without_running_it() -> None:
    """What ``__post_init__`` added is stored; cached properties are made again."""
    value = Indexed(["a", "b"], seed=5)
    assert value.total == 2
    back = decode(encode(value))
    assert back == value
    assert back.index == {"a": 5, "b": 6}
    assert "total" not in vars(back)
    assert back.total == 2


def test_struct_is_built_without_its_post_init() -> None:
    """A Struct that changes itself when made is not changed again when read."""
    value = Checked(1)
    STRUCTS_CHECKED.clear()
    back = decode(encode(value))
    assert type(back) is Checked
    assert (back.id, STRUCTS_CHECKED) == (2, [])


def test_result_of_a_driver_becomes_the_builtin_uuid() -> None:
    """The UUID class of the database driver is stored as ``uuid.UUID``."""
    pgproto = pytest.importorskip("asyncpg.pgproto.pgproto")
    value = uuid4()
    back = decode(encode([pgproto.UUID(str(value))]))
    assert type(back[0]) is UUID
    assert back == [value]


def test_equal_values_give_equal_bytes() -> None:
    """Sets are sorted, so that a digest does not depend on the process."""
    words = [f"word {i}" for i in range(50)]
    assert encode(set(words)) == encode({*words[25:], *words[:25]})
    assert encode({(2, "b"), (1, "a")}) == (
        b'\x01{"$set":[{"$tuple":[1,"a"]},{"$tuple":[2,"b"]}]}'
    )


def test_the_format_is_fixed() -> None:
    """Bytes that are in journals; they may never change."""
    value = {
        "a": [None, True, 1, 1.0, "ü"],
        "b": (2**64, math.nan, b"x", bytearray(b"y")),
        "c": {1: date(2024, 1, 2)},
        "d": [datetime(2024, 1, 2, 3, tzinfo=UTC), timedelta(1, 2, 3), Decimal("1.0")],
        "e": [Color.RED, Item("x"), Point(1), Row(1), Result.Ok(1), Path("p")],
        "f": [UUID(int=1), "\ud800", range(3), 1j, frozenset({1})],
        "g": datetime(2024, 1, 2, tzinfo=ZoneInfo("Europe/Berlin")),
    }
    here = __name__
    assert encode(value).decode() == (
        '\x01{"a":[null,true,1,1.0,"ü"],'
        '"b":{"$tuple":[{"$int":"0x10000000000000000"},{"$float":"nan"},'
        '{"$bytes":"eA=="},{"$bytearray":"eQ=="}]},'
        '"c":{"$dict":[[1,{"$date":"2024-01-02"}]]},'
        '"d":[{"$datetime":"2024-01-02T03:00:00+00:00"},{"$timedelta":[1,2,3]},'
        '{"$decimal":"1.0"}],'
        f'"e":[{{"$enum":["{here}:Color","RED"]}},'
        f'{{"$data":["{here}:Item",{{"name":"x","data":null,"made_of":[]}}]}},'
        f'{{"$named":["{here}:Point",{{"x":1,"y":0.5}}]}},'
        f'{{"$struct":["{here}:Row",{{"id":1,"tags":{{"$tuple":[]}}}}]}},'
        '{"$ok":1},{"$path":["Path","p"]}],'
        '"f":[{"$uuid":"00000000-0000-0000-0000-000000000001"},{"$str":"7aCA"},'
        '{"$range":[0,3,1]},{"$complex":[0.0,1.0]},{"$frozenset":[1]}],'
        '"g":{"$datetime":["2024-01-02T00:00:00+01:00","Europe/Berlin",0]}}'
    )
    assert encode_arguments((1, "a"), {"k": (2,)}) == (
        b'\x01[[1,"a"],{"k":{"$tuple":[2]}}]'
    )
    assert encode_arguments((), {}) == b"\x01[[],{}]"
    assert encode_many([1, "a"]) == b'\x01[1,"a"]'
    assert digest(encode_arguments((1,), {})) == "c9b221bf1e91333a"


class Refusal(NamedTuple):
    value: object
    path: str
    reason: str


def refusals() -> list[Refusal]:
    @dataclasses.dataclass
    class Local:
        x: int

    unfinished: Item = object.__new__(Item)
    return [
        Refusal({"rows": [0, {"conn": threading.Lock()}]}, ".rows[1].conn", "lock"),
        Refusal((str(i) for i in range(2)), "", "generator"),
        Refusal([lambda: 1], "[0]", "function"),
        Refusal({"a b": object()}, "['a b']", "object"),
        Refusal({(1, 2): object()}, "[...]", "object"),
        Refusal({3: object()}, "[3]", "object"),
        Refusal(Item("x", data=[print]), ".data[0]", "builtin_function"),
        Refusal(Result.Ok({1: {2: int}}), "[1][2]", "type"),
        Refusal(Text("x"), "", "subclass of str"),
        Refusal([TupleChild((1,))], "[0]", "subclass of tuple"),
        Refusal(UserDict(), "", "UserDict"),
        Refusal(defaultdict(lambda: 1), "", "factory"),
        Refusal([Local(1)], "[0]", "local to a function"),
        Refusal(types.SimpleNamespace(), "", "SimpleNamespace"),
        Refusal(unfinished, "", "no value for 'name'"),
        Refusal({}.keys(), "", "dict_keys"),
        Refusal(memoryview(b"x"), "", "memoryview"),
        Refusal(sys, "", "module"),
    ]


@pytest.mark.parametrize("refusal", refusals(), ids=lambda r: r.reason)
def test_what_cannot_be_stored_is_refused_with_its_path(refusal: Refusal) -> None:
    """The error says where it sits and what it is, at every entry point."""
    with pytest.raises(PayloadError) as caught:
        encode(refusal.value, path="result")
    assert str(caught.value).startswith(f"result{refusal.path}: ")
    assert refusal.reason in str(caught.value)
    with pytest.raises(PayloadError) as caught:
        encode_arguments((1, refusal.value), {})
    assert str(caught.value).startswith(f"args[1]{refusal.path}: ")
    with pytest.raises(PayloadError) as caught:
        encode_arguments((), {"rows": refusal.value})
    assert str(caught.value).startswith(f"rows{refusal.path}: ")
    with pytest.raises(PayloadError) as caught:
        encode_many([1, (2,), refusal.value])
    assert str(caught.value).startswith(f"items[2]{refusal.path}: ")


def test_a_socket_deep_inside_is_named() -> None:
    """The path leads through dataclasses and lists to the type."""
    with (
        socket.socket() as connection,
        pytest.raises(PayloadError, match=r"^args\[0\]\.data\[3\]: socket\.socket "),
    ):
        encode_arguments((Item("x", data=[1, 2, 3, connection]),), {})


def test_a_coroutine_is_refused() -> None:
    """A forgotten await is an error where it happens."""

    async def forgotten() -> None: ...

    coroutine = forgotten()
    with pytest.raises(PayloadError, match="coroutine"):
        encode(coroutine)
    coroutine.close()


def nest(depth: int, wrap: Callable[[object], object]) -> object:
    value: object = 0
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: [v],
        lambda v: {"k": v},
        lambda v: (v,),
        lambda v: Item("x", v),
        lambda v: {1: v},
        Result.Ok,
        lambda v: Frozen(size=v),
    ],
)
def test_depth_has_a_limit(wrap: Callable[[object], object]) -> None:
    """150 levels round-trip, far more is a PayloadError and no RecursionError."""
    value = nest(150, wrap)
    assert encode(decode(encode(value))) == encode(value)
    with pytest.raises(PayloadError, match=r"levels deep"):
        encode(nest(5_000, wrap))
    with pytest.raises(PayloadError, match=r"items\[1\].*levels deep"):
        encode_many([1, nest(5_000, wrap)])


def test_cycles_are_refused() -> None:
    """A value that contains itself, also twice, ends quickly in a PayloadError."""
    single: list[object] = []
    single.append(single)
    double: list[object] = []
    double += [double, double]
    mapping: dict[str, object] = {}
    mapping["self"] = [mapping, (mapping,)]
    item = Item("x")
    item.made_of.append(item)
    for value in (single, double, mapping, item, [item, single]):
        with pytest.raises(PayloadError, match=r"contain itself|limit"):
            encode(value)


def test_shared_parts_cannot_explode() -> None:
    """A small object graph that unfolds to 2**100 parts is refused quickly."""
    plain = nest(100, lambda v: [v, v])
    tagged = nest(100, lambda v: (v, v))
    for value in (plain, tagged):
        with pytest.raises(PayloadError, match="limit"):
            encode(value)


def test_limit_counts_encoded_bytes() -> None:
    """Exactly the limit passes, one byte more does not; the error names both."""
    assert len(encode("x" * 97, bytes_max=100)) == 100
    with pytest.raises(PayloadError, match=r"^r: 101 bytes encoded, the limit is 100"):
        encode("x" * 98, path="r", bytes_max=100)
    with pytest.raises(PayloadError, match="limit"):
        encode(b"x" * 100, bytes_max=100)
    with pytest.raises(PayloadError, match=r"^arguments: .*limit"):
        encode_arguments(("x" * 50, "y" * 50), {}, bytes_max=100)
    with pytest.raises(PayloadError, match="limit"):
        encode_arguments((("x" * 50, "y" * 50),), {}, bytes_max=100)
    encode("x" * 1_990_000)
    with pytest.raises(PayloadError, match="limit"):
        encode({"data": ["x" * 2_200_000, (1,)]})


def test_each_of_many_obeys_the_limit() -> None:
    """Together they may be larger; the one that is too large is named."""
    assert len(encode_many(["x" * 90] * 50, bytes_max_each=100)) > 4_000
    assert len(encode_many([("x" * 70,)] * 50, bytes_max_each=100)) > 3_500
    with pytest.raises(PayloadError, match=r"items\[2\].*limit"):
        encode_many(["x", "y", "z" * 100, "w"], bytes_max_each=100)
    with pytest.raises(PayloadError, match=r"rows\[1\].*limit"):
        encode_many([(1,), ("z" * 95,)], path="rows", bytes_max_each=100)


def test_empty_batches_round_trip() -> None:
    """No values are an empty array."""
    assert decode_many(encode_many([])) == []
    assert decode_many(encode_many(())) == []


def takes_item(item: Item, *rest: Row, color: Color = Color.RED) -> Page:
    raise NotImplementedError


class Outer:
    @dataclasses.dataclass
    class Inner:
        x: int


def test_nested_classes_are_found() -> None:
    """A class within a class is stored by its qualified name."""
    assert_round_trip(Outer.Inner(1))


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ((1, 2), list[int]),
        ([1], tuple[int, ...]),
        (1, float),
        (Item("x"), Row),
        ({"name": "x"}, Item),
        ("2024-01-01", datetime),
        (Color.RED, int),
        ({"url": "u", "size": 1}, Page),
        (None, int),
        ([Row(1)], "list[Unknown]"),
        (Result.Ok(Item("x")), Result[Item, str]),
        ({"a": Frozen(size=1)}, dict[str, Frozen | None]),
        (Row(1), typing.Annotated[Row, []]),
        (Point(1), T),
    ],
)
def test_the_value_wins_over_its_annotation(value: object, annotation: object) -> None:
    """What came from Python comes back as it was, however sloppy the annotation."""
    assert same(decode(encode(value), annotation), value)


def renamed(payload: bytes, old: str, new: str) -> bytes:
    assert old.encode() in payload
    return payload.replace(old.encode(), new.encode())


def test_an_annotation_finds_a_class_that_moved() -> None:
    """A stored class whose module is gone is taken from the annotation."""
    payload = renamed(encode([Item("x"), Row(1)]), __name__, "old_module")
    assert decode(payload, list[Item | Row]) == [Item("x"), Row(1)]
    nested = renamed(encode(Box(Frozen(size=1))), __name__, "old_module")
    with pytest.raises(MissingTypeError):
        decode(nested, Box[int])
    assert decode(nested, Box[Frozen]) == Box(Frozen(size=1))
    arguments = encode_arguments((Item("x"), Row(1)), {"color": Color.GREEN})
    moved = renamed(arguments, __name__, "old_module")
    assert decode_arguments(moved, takes_item) == (
        [Item("x"), Row(1)],
        {"color": Color.GREEN},
    )


def test_unresolvable_annotations_do_not_hide_the_others() -> None:
    """One bad annotation leaves the other parameters typed."""

    def function(item: Item, other: NotDefinedAnywhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    payload = renamed(encode_arguments((Item("x"), 1), {}), __name__, "old_module")
    assert decode_arguments(payload, function) == ([Item("x"), 1], {})


def test_a_missing_class_is_told_apart() -> None:
    """The error carries the module, so that a replay can park naming it."""
    payload = renamed(encode(Item("x")), __name__, "shop.orders")
    with pytest.raises(MissingTypeError, match=r"import shop\.orders") as caught:
        decode(payload)
    assert (caught.value.module, caught.value.name) == ("shop.orders", "Item")
    assert "shop.orders" not in sys.modules
    with pytest.raises(MissingTypeError):
        decode(renamed(encode(Item("x")), ":Item", ":Gone"))


def test_fields_may_come_and_go() -> None:
    """A new field takes its default, a removed one is ignored, else it is an error."""
    name = f"{__name__}:"
    assert decode(
        plain(f'{{"$data":["{name}Item",{{"name":"x","removed":[1]}}]}}')
    ) == Item("x")
    assert decode(plain(f'{{"$struct":["{name}Row",{{"id":1,"gone":2}}]}}')) == Row(1)
    assert decode(plain(f'{{"$named":["{name}Point",{{"x":1,"gone":2}}]}}')) == Point(1)
    for shape, cls in (("data", "Item"), ("struct", "Row"), ("named", "Point")):
        with pytest.raises(PayloadError, match="no default"):
            decode(plain(f'{{"${shape}":["{name}{cls}",{{}}]}}'))
    with pytest.raises(PayloadError, match="no member 'BLUE'"):
        decode(plain(f'{{"$enum":["{name}Color","BLUE"]}}'))


def plain(text: str) -> bytes:
    return b"\x01" + text.encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"$data":["os:system",{}]}',
        '{"$data":["builtins:object",{}]}',
        '{"$data":["builtins:eval",{}]}',
        '{"$data":["subprocess:Popen",{"args":"id"}]}',
        '{"$data":["os:environ",{}]}',
        '{"$data":["sys:modules",{}]}',
        '{"$data":["os.path:",{}]}',
        '{"$data":[":",{}]}',
        '{"$data":["os",{}]}',
        '{"$data":[1,{}]}',
        '{"$data":[]}',
        '{"$data":{}}',
        '{"$enum":["os:system","x"]}',
        '{"$enum":["re:RegexFlag","__class__"]}',
        '{"$enum":["http:HTTPStatus",200]}',
        '{"$struct":["builtins:dict",{}]}',
        '{"$named":["builtins:tuple",{}]}',
        '{"$exception":{"class":"os:system","mro":[],"real":true,"message":"","args":[]}}',
        '{"$exception":{"class":"builtins:int","mro":[],"real":true,"message":"","args":[]}}',
        '{"$exception":{"class":"a:\\u0000","mro":[],"real":false,"message":"","args":[]}}',
        '{"$exception":{}}',
        '{"$exception":[]}',
        '{"$datetime":["2024-01-01T00:00:00","../../etc/passwd",0]}',
        '{"$datetime":["2024-01-01T00:00:00","os.path",0]}',
        '{"$datetime":7}',
        '{"$int":12}',
        '{"$int":"zz"}',
        '{"$float":"1.5"}',
        '{"$float":"infinity"}',
        '{"$bytes":"*"}',
        '{"$bytes":1}',
        '{"$str":"/w=="}',
        '{"$tuple":"abc"}',
        '{"$set":[[1]]}',
        '{"$dict":[[1]]}',
        '{"$dict":[[[],1]]}',
        '{"$defaultdict":["eval",[]]}',
        '{"$path":["str","x"]}',
        '{"$decimal":"x"}',
        '{"$timedelta":[1e300]}',
        '{"$range":[1,2,0]}',
        '{"$deque":[-1,[]]}',
        '{"$import":"os"}',
        '{"$":1}',
    ],
)
def test_malicious_and_malformed_trees_are_refused(text: str) -> None:
    """Data can name nothing but data classes, and never imports a module."""
    before = set(sys.modules)
    with pytest.raises(PayloadError):
        decode(plain(text))
    assert not {"os.path:", "antigravity"} & (set(sys.modules) - before)
    to_plain(plain(text))


def test_nothing_is_imported_for_data() -> None:
    """A module that exists but was not imported stays so, lazy attributes included."""
    with pytest.raises(MissingTypeError):
        decode(plain('{"$data":["antigravity:X",{}]}'))
    lazy = types.ModuleType("lazy_module")
    asked: list[str] = []
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    sys.modules["lazy_module"] = lazy
    try:
        with pytest.raises(MissingTypeError):
            decode(plain('{"$data":["lazy_module:X",{}]}'))
    finally:
        del sys.modules["lazy_module"]
    assert "antigravity" not in sys.modules
    assert asked == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x01",
        b"\x02{}",
        b"{}",
        b"\x01[1,2",
        b'\x01{"a"',
        b"\x01\xff",
        b'\x01"\xff"',
        b"\x01NaN",
        b"\x01[1]]",
        b"\x01" + b"[" * 100_000,
        b'\x01{"$tuple":[' * 3,
    ],
)
def test_damaged_payloads_are_refused(payload: bytes) -> None:
    """Empty, truncated, of an unknown codec: one class of error for every reader."""
    readers: tuple[Callable[[bytes], object], ...] = (
        decode,
        decode_many,
        to_plain,
        lambda damaged: decode_arguments(damaged, takes_item),
    )
    for read in readers:
        with pytest.raises(PayloadError):
            read(payload)


@settings(max_examples=200, deadline=None)
@given(values, st.data())
def test_any_flipped_byte_is_harmless(value: object, data: st.DataObject) -> None:
    """A damaged payload is read as something or refused, it never breaks."""
    payload = bytearray(encode([value]))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    for read in (decode, to_plain):
        try:
            read(bytes(payload))
        except PayloadError:
            continue


@pytest.mark.parametrize("text", ["1", "[]", "[1,2]", "[[],{},1]", '[{"a":1},[]]'])
def test_other_payloads_are_no_argument_lists(text: str) -> None:
    """Only ``[[...], {...}]`` is read as arguments."""
    with pytest.raises(PayloadError, match="argument list"):
        decode_arguments(plain(text), takes_item)


def test_keywords_are_no_tags() -> None:
    """A keyword that looks like a tag is a keyword."""
    payload = encode_arguments((), {"$tuple": [1]})
    assert decode_arguments(payload, takes_item) == ([], {"$tuple": [1]})


def test_digest_names_the_value() -> None:
    """16 hex digits, equal for equal values only; an unknown codec has none."""
    assert digest(encode([1, 2])) == digest(encode([1, 2]))
    assert digest(encode([1, 2])) != digest(encode((1, 2)))
    assert len(digest(encode(None))) == 16
    with pytest.raises(PayloadError):
        digest(b"\x07x")


def test_the_running_script_is_stored_by_its_import_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class of ``__main__`` is found by a worker that imports the script."""
    script = types.ModuleType("__main__")
    script.__file__ = "/somewhere/orders.py"

    @dataclasses.dataclass
    class Order:
        id: int

    Order.__module__, Order.__qualname__ = "__main__", "Order"
    vars(script)["Order"] = Order
    monkeypatch.setitem(sys.modules, "__main__", script)
    payload = encode(Order(1))
    assert b'"orders:Order"' in payload
    assert decode(payload) == Order(1)
    imported = types.ModuleType("orders")
    vars(imported)["Order"] = dataclasses.make_dataclass("Order", [("id", int)])
    monkeypatch.setitem(sys.modules, "orders", imported)
    monkeypatch.delitem(sys.modules, "__main__")
    assert type(decode(payload)) is vars(imported)["Order"]


def test_to_plain_is_readable() -> None:
    """Tags are shown as a person would write them; strict JSON comes out."""
    value = {
        "tuple": (1, 2),
        "item": Item(
            "x",
            {
                Color.RED,
            },
        ),
        "when": datetime(2024, 1, 2, tzinfo=UTC),
        "raw": b"ab",
        "big": 2**70,
        "nan": math.nan,
        "keys": {1: "a", (2,): "b"},
        "bad": "a\ud800",
        "result": Result.Error(ValueError("no")),
        "span": timedelta(hours=1, seconds=2),
        "unknown": {"$later": (1,)},
    }
    shown = to_plain(encode(value))
    assert shown == {
        "tuple": [1, 2],
        "item": {"name": "x", "data": ["Color.RED"], "made_of": []},
        "when": "2024-01-02T00:00:00+00:00",
        "raw": "b'ab'",
        "big": 2**70,
        "nan": "nan",
        "keys": {"1": "a", "[2]": "b"},
        "bad": "a\\ud800",
        "result": {"error": "ValueError: no"},
        "span": "1:00:02",
        "unknown": {"$later": [1]},
    }
    msgspec.json.encode(shown)


def test_to_plain_builds_no_class() -> None:
    """A payload of classes that are not known here can still be shown."""
    payload = renamed(encode([Item("x"), Color.RED]), __name__, "shop.orders")
    assert to_plain(payload) == [
        {"name": "x", "data": None, "made_of": []},
        "Color.RED",
    ]


@pytest.mark.parametrize(
    ("typed", "annotation", "expected"),
    [
        (1, int, 1),
        ({"name": "x"}, Item, Item("x")),
        ({"id": 1, "level": 1}, Leveled, Leveled(1, Level.LOW)),
        ("RED", Color, Color.RED),
        (1, Color, Color.RED),
        ("RED", Color | None, Color.RED),
        (None, Color | None, None),
        ("2024-01-02T00:00:00Z", datetime, datetime(2024, 1, 2, tzinfo=UTC)),
        ("2024-01-02", date, date(2024, 1, 2)),
        ("00000000-0000-0000-0000-000000000001", UUID, UUID(int=1)),
        ("1.50", Decimal, Decimal("1.50")),
        ("/tmp/x", Path, Path("/tmp/x")),
        ({"a": "p"}, dict[str, Path], {"a": Path("p")}),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, 2], set[int], {1, 2}),
        ([1], Point, Point(1)),
        ({"id": 1, "tags": ["a"]}, Row, Row(1, ("a",))),
        ({"url": "u", "size": 1}, Page, {"url": "u", "size": 1}),
        ({"id": 1}, Item | Row, Row(1)),
        ("1", int | str, "1"),
        ({"ok": {"name": "x"}}, Result[Item, str], Result.Ok(Item("x"))),
        ({"error": "no"}, Result[Item, str], Result.Error("no")),
        ([1, {"a": None}], Any, [1, {"a": None}]),
        ([1], "Unresolved", [1]),
        ("aGk=", bytes, b"hi"),
    ],
)
def test_typed_in_data_is_converted_by_annotation(
    typed: object, annotation: object, expected: object
) -> None:
    """Plain JSON becomes what the parameter asks for."""
    assert same(convert_plain(typed, annotation), expected)


@pytest.mark.parametrize(
    ("typed", "annotation", "message"),
    [
        ("x", int, "args[0]: Expected `int`, got `str`"),
        ({"name": 5}, Item, "args[0].name: Expected `str`, got `int`"),
        ([{"id": 1}, {"id": "x"}], list[Row], "args[0][1].id: Expected"),
        ("BLUE", Color, "args[0]: 'BLUE' is not one of RED, GREEN"),
        ({}, Item | Row, "args[0]: fits no member of"),
        ("x", int | None, "args[0]: Expected `int`"),
        ("yesterday", datetime, "args[0]: "),
        (1, Path, "args[0]: "),
        ([1], Result[int, str], "args[0]: "),
    ],
)
def test_typed_in_data_that_does_not_fit_names_the_place(
    typed: object, annotation: object, message: str
) -> None:
    """The error leads to the part that is wrong."""
    with pytest.raises(PayloadError) as caught:
        convert_plain(typed, annotation, path="args[0]")
    assert str(caught.value).startswith(message)


def test_encoding_is_safe_from_a_deep_stack() -> None:
    """Called near the recursion limit it is a PayloadError, not a RecursionError."""
    value = nest(150, lambda v: Item("x", v))
    errors: list[BaseException] = []

    def dive(payload: bytes) -> None:
        try:
            dive(payload)
        except RecursionError:
            for call in (lambda: encode(value), lambda: decode(payload)):
                try:
                    call()
                except PayloadError as error:
                    errors.append(error)

    dive(encode(value))
    assert errors


def test_exceptions_travel_as_values() -> None:
    """Results of a gather that returns exceptions keep them in their places."""
    payload = encode([1, ValueError("bad", 2), asyncio.CancelledError("stop"), None])
    one, error, cancelled, none = decode(payload)
    assert (one, none) == (1, None)
    assert type(error) is ValueError
    assert error.args == ("bad", 2)
    assert type(cancelled) is asyncio.CancelledError
    assert encode([one, error, cancelled, none]) == payload


def test_an_exception_value_has_the_same_bytes_wherever_it_was_raised() -> None:
    """Traceback and context are no part of a value, whose digest addresses calls."""

    def raised(outer: Exception) -> ValueError:
        try:
            try:
                raise outer
            except Exception:  # noqa: BLE001 - whatever it is
                raise ValueError("x")  # noqa: B904 - the context is the point
        except ValueError as error:
            return error

    fresh = encode(ValueError("x"))
    assert encode(raised(KeyError("a"))) == encode(raised(OSError())) == fresh


def test_mappings_may_be_keywords() -> None:
    """Keywords are read from any Mapping."""
    keywords: Mapping[str, object] = types.MappingProxyType({"a": (1,)})
    payload = encode_arguments((), keywords)
    assert decode_arguments(payload, takes_item) == ([], {"a": (1,)})
    keywords = types.MappingProxyType({"a": 1})
    payload = encode_arguments((), keywords)
    assert decode_arguments(payload, takes_item) == ([], {"a": 1})
