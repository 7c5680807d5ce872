"""Exceptions through the codec: name, message, class and structure always survive."""

# ruff: noqa: N818, PLW0108, PYI034 - a corpus of exceptions as odd as users' own

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stent.codec import (
    PAYLOAD_BYTES_MAX,
    MissingTypeError,
    decode,
    decode_exception,
    describe_exception,
    encode,
    encode_exception,
    to_plain,
)
from stent.errors import (
    ActivityFailedError,
    ExecutionCancelledError,
    PayloadError,
    StoreError,
    UnwrapError,
)


class OddConstructor(Exception):
    def __init__(self, code: int, *, host: str) -> None:
        super().__init__(f"{host} answered {code}")
        self.code = code
        self.host = host


class NoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b = a, b

    def __str__(self) -> str:
        return f"{self.a} and {self.b}"


class OwnNew(Exception):
    def __new__(cls, required: int) -> OwnNew:
        return super().__new__(cls, required)


class Connected(Exception):
    """Its text depends on something that cannot be stored."""

    def __init__(self, connection: object) -> None:
        super().__init__("lost")
        self.connection = connection

    def __str__(self) -> str:
        return f"lost {type(self.connection).__name__}"


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Slotted(OSError):
    __slots__ = ("extra",)
    extra: int


class Sealed(Exception):
    """Refuses subclasses, and its text needs what cannot be stored."""

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("no subclasses")

    def __str__(self) -> str:
        return f"sealed {self.thing}"

    thing: object = None


@dataclasses.dataclass
class DataError(Exception):
    code: int
    why: str = "x"


class Failures(ExceptionGroup[Exception]):
    def __new__(cls, failures: list[Exception], batch: int) -> Failures:
        made = super().__new__(cls, f"batch {batch}", failures)
        made.batch = batch
        return made

    batch: int


class Several(LookupError, OSError):
    pass


def caught(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the corpus raises anything
        return error
    raise AssertionError("nothing was raised")


def slotted() -> Slotted:
    error = Slotted(2, "gone", "/f")
    error.extra = 7
    return error


CORPUS: list[Callable[[], Exception]] = [
    lambda: ValueError(),
    lambda: ValueError("NUL \x00 and 😀", (1, 2), {"a": b"x"}),
    lambda: ValueError("\ud800"),
    lambda: KeyError("a 'key'"),
    lambda: KeyError(("a", 1)),
    lambda: caught(lambda: open("/nope")),  # noqa: SIM115, PTH123 - it is not there
    lambda: OSError("only text"),
    lambda: OSError(2, "a", "b", None, "c"),
    lambda: BlockingIOError(11, "later", 5),
    lambda: ConnectionRefusedError(111, "refused"),
    lambda: caught(lambda: b"a\xff".decode()),
    lambda: caught(lambda: "\ud800".encode()),
    lambda: StopIteration((1, 2)),
    lambda: StopAsyncIteration(),
    lambda: caught(lambda: compile("a b", "f.py", "exec")),
    lambda: caught(lambda: __import__("no_such_module")),
    lambda: caught(lambda: (1).nothing),  # type: ignore[attr-defined]
    lambda: caught(lambda: undefined),  # type: ignore[name-defined]  # noqa: F821
    lambda: caught(lambda: 1 // 0),
    lambda: caught(lambda: json.loads("{")),
    lambda: caught(lambda: msgspec.json.decode(b"1", type=str)),
    lambda: TimeoutError("30s"),
    lambda: concurrent.futures.BrokenExecutor("x"),
    lambda: asyncio.IncompleteReadError(b"ab", 5),
    lambda: asyncio.QueueFull(),
    lambda: subprocess.CalledProcessError(3, ["ls"], b"out"),
    lambda: OddConstructor(503, host="h"),
    lambda: NoArguments(1, 2),
    lambda: OwnNew(5),
    lambda: DataError(7),
    lambda: Several(5, "both"),
    slotted,
    lambda: StoreError("away", retryable=True),
    lambda: UnwrapError({"a": 1}),
    lambda: MissingTypeError("m", "C"),
    lambda: RecursionError("deep"),
]


@pytest.mark.parametrize("make", CORPUS)
def test_exceptions_survive_whole(make: Callable[[], Exception]) -> None:
    """Class, args, text and attributes are equal; as an outcome and as a value."""
    error = make()
    payload = encode_exception(error)
    for back in (decode_exception(payload), decode(encode(error))):
        assert type(back) is type(error)
        assert back.args == error.args
        assert str(back) == str(error)
        vars(back).pop("remote_traceback", None)
        assert vars(back) == vars(error)
        for name in ("errno", "filename", "filename2", "start", "object", "value"):
            assert getattr(back, name, None) == getattr(error, name, None)
        for name in ("lineno", "offset", "text", "name", "extra", "retryable"):
            assert getattr(back, name, None) == getattr(error, name, None)
    assert describe_exception(payload)[0] == type(error).__name__
    assert encode(decode(encode(error))) == encode(error)
    msgspec.json.encode(to_plain(payload))


def test_driver_errors_survive() -> None:
    """The errors of the database driver keep class, code and details."""
    asyncpg = pytest.importorskip("asyncpg")
    error = asyncpg.UniqueViolationError("duplicate key")
    error.detail = "Key (id)=(1) already exists."
    back = decode_exception(encode_exception(error))
    assert type(back) is asyncpg.UniqueViolationError
    assert (str(back), vars(back)["detail"]) == (str(error), error.detail)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.none() | st.integers() | st.text(st.characters(exclude_categories=())))
)
def test_any_arguments_survive(args: list[object]) -> None:
    """Whatever plain values an exception carries come back."""
    error = RuntimeError(*args)
    back = decode_exception(encode_exception(error))
    assert (type(back), back.args, str(back)) == (RuntimeError, error.args, str(error))


def test_a_text_that_cannot_be_said_again_is_kept() -> None:
    """A class whose ``str()`` needs lost state is retold by a subclass of its name."""
    back = decode_exception(encode_exception(Connected(object())))
    assert isinstance(back, Connected)
    assert type(back).__name__ == "Connected"
    assert str(back) == "lost object"
    assert back.args == ("lost",)
    again = decode_exception(encode_exception(back))
    assert isinstance(again, Connected)
    assert (str(again), type(again)) == ("lost object", type(back))
    assert encode(back) == encode(again)


def test_a_class_that_refuses_subclasses_is_retold_by_a_stand_in() -> None:
    """Name and text survive where no subclass can be made."""
    error = Sealed("x")
    error.thing = object
    back = decode_exception(encode_exception(error))
    assert isinstance(back, ActivityFailedError)
    assert (type(back).__name__, str(back)) == ("Sealed", f"sealed {object}")


def test_a_text_that_raises_does_not_harm() -> None:
    """An exception whose ``str()`` raises arrives with a text that says so."""
    payload = encode_exception(BrokenText("a"))
    back = decode_exception(payload)
    assert isinstance(back, BrokenText)
    assert "raised RuntimeError" in str(back)
    assert describe_exception(payload) == ("BrokenText", str(back))


def test_what_cannot_be_stored_is_replaced_by_its_looks() -> None:
    """Arguments without stored form become text, attributes are left out."""
    error = ValueError("a", object(), [print])
    error.lock = object()  # type: ignore[attr-defined]
    error.count = 3  # type: ignore[attr-defined]
    back = decode_exception(encode_exception(error))
    assert back.args[:2] == ("a", "<object object>")
    assert str(back) == str(error)
    assert "lock" not in vars(back)
    assert vars(back)["count"] == 3


def local_error() -> Exception:
    class Local(KeyError):
        pass

    error = Local("k", 1)
    error.attribute = "kept"  # type: ignore[attr-defined]
    return error


def test_a_local_class_becomes_a_stand_in() -> None:
    """It has the name, derives from the first builtin, and is made once."""
    error = local_error()
    payload = encode_exception(error)
    back = decode_exception(payload)
    assert isinstance(back, ActivityFailedError)
    assert isinstance(back, KeyError)
    assert type(back).__name__ == "Local"
    assert (str(back), back.args) == (str(error), error.args)
    assert vars(back)["attribute"] == "kept"
    assert type(decode_exception(payload)) is type(back)
    assert encode_exception(back) == payload
    plain = type("Plain", (Exception,), {"__module__": "nowhere"})("x")
    assert isinstance(decode_exception(encode_exception(plain)), ActivityFailedError)


def test_a_class_that_went_missing_parks() -> None:
    """A class that was real when stored is never replaced by another."""
    here = OddConstructor.__module__.encode()
    payload = encode_exception(OddConstructor(1, host="h"))
    moved = payload.replace(b'"class":"' + here, b'"class":"shop.errors')
    with pytest.raises(MissingTypeError, match=r"shop\.errors") as caught:
        decode_exception(moved)
    assert caught.value.module == "shop.errors"
    assert describe_exception(moved) == ("OddConstructor", "h answered 1")


def test_no_constructor_runs() -> None:
    """Rebuilding calls neither ``__new__`` nor ``__init__`` of the class."""
    calls: list[str] = []

    class Loud(Exception):
        def __new__(cls, *_: object) -> Loud:
            calls.append("new")
            return super().__new__(cls)

        def __init__(self, *args: object) -> None:
            calls.append("init")
            super().__init__(*args)

    module = types.ModuleType("loud_module")
    Loud.__module__, Loud.__qualname__ = "loud_module", "Loud"
    vars(module)["Loud"] = Loud
    sys.modules["loud_module"] = module
    try:
        error = Loud(1)
        calls.clear()
        back = decode_exception(encode_exception(error))
    finally:
        del sys.modules["loud_module"]
    assert type(back) is Loud
    assert (back.args, calls) == ((1,), [])


def test_chains_notes_and_tracebacks_survive() -> None:
    """Cause, context, ``from None`` and notes; the traceback is text for display."""

    def deepest() -> NoReturn:
        local_secret = "hunter2"
        raise OSError(5, "disk " + local_secret[:0])

    def fails() -> NoReturn:
        try:
            try:
                deepest()
            except OSError:
                raise KeyError("key")  # noqa: B904 - the context is the point
        except KeyError as error:
            raise ValueError("bad") from error

    error = caught(fails)
    error.add_note("see the manual")
    back = decode_exception(encode_exception(error))
    assert back.__notes__ == ["see the manual"]
    cause = back.__cause__
    assert type(cause) is KeyError
    assert cause.__cause__ is None
    assert type(cause.__context__) is OSError
    assert cause.__context__.errno == 5
    text = vars(back)["remote_traceback"]
    assert "in deepest" in text
    assert "ValueError: bad" in text
    assert decode(encode(error)).__cause__.__context__ is None

    def silent() -> NoReturn:
        try:
            deepest()
        except OSError:
            raise ValueError("bad") from None

    back = decode_exception(encode_exception(caught(silent)))
    assert (back.__suppress_context__, back.__context__) == (True, None)


def test_a_rebuilt_exception_raised_again_keeps_its_first_traceback() -> None:
    """What a workflow lets through shows where the activity raised it."""

    def in_the_activity() -> NoReturn:
        raise ValueError("first")

    back = decode_exception(encode_exception(caught(in_the_activity)))

    def in_the_workflow() -> NoReturn:
        raise back

    text = vars(decode_exception(encode_exception(caught(in_the_workflow))))[
        "remote_traceback"
    ]
    assert text.index("in in_the_activity") < text.index("in in_the_workflow")


def test_groups_keep_their_structure() -> None:
    """Members, nesting, subclasses and ``except*`` work as before."""
    inner = ExceptionGroup("inner", [KeyError("k"), local_error()])
    error = ExceptionGroup("outer", [ValueError("v"), inner, NoArguments(1, 2)])
    back = decode_exception(encode_exception(error))
    assert isinstance(back, ExceptionGroup)
    assert type(back) is ExceptionGroup
    assert (str(back), back.message) == (str(error), "outer")
    value, nested, odd = back.exceptions
    assert (type(value), type(odd), str(odd)) == (ValueError, NoArguments, "1 and 2")
    assert isinstance(nested, ExceptionGroup)
    assert [type(e).__name__ for e in nested.exceptions] == ["KeyError", "Local"]
    matched, rest = back.split(KeyError)
    assert matched is not None
    assert rest is not None

    batch = decode_exception(encode_exception(Failures([ValueError("x")], 7)))
    assert type(batch) is Failures
    assert (batch.message, vars(batch)["batch"]) == ("batch 7", 7)

    values = BaseExceptionGroup("b", [KeyboardInterrupt(), ValueError()])
    back = decode(encode(values))
    assert type(back) is BaseExceptionGroup
    assert [type(e) for e in back.exceptions] == [KeyboardInterrupt, ValueError]


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (asyncio.CancelledError(), ExecutionCancelledError, "CancelledError"),
        (asyncio.CancelledError("why"), ExecutionCancelledError, "CancelledError: why"),
        (SystemExit(3), ActivityFailedError, "SystemExit: 3"),
        (KeyboardInterrupt(), ActivityFailedError, "KeyboardInterrupt"),
        (GeneratorExit(), ActivityFailedError, "GeneratorExit"),
    ],
)
def test_what_stops_a_process_is_no_outcome(
    error: BaseException, expected: type[Exception], text: str
) -> None:
    """It arrives as an ordinary exception that says what it was."""
    error.add_note("noted")
    error.__cause__ = ValueError("cause")
    back = decode_exception(encode_exception(error))
    assert type(back) is expected
    assert str(back).endswith(text)
    assert back.__notes__ == ["noted"]
    assert type(back.__cause__) is ValueError
    group = BaseExceptionGroup("g", [error, ValueError("v")])
    [stopped, other] = decode_exception(encode_exception(group)).exceptions  # type: ignore[attr-defined]
    assert (type(stopped), type(other)) == (expected, ValueError)


def test_no_outcome_is_read_from_other_payloads() -> None:
    """A value, or an exception that is never an outcome, is refused."""
    for value in (1, "x", SystemExit(1), asyncio.CancelledError(), [ValueError()]):
        with pytest.raises(PayloadError, match="not an exception"):
            decode_exception(encode(value))
    for other in (1, {"a": 1}, None):
        with pytest.raises(PayloadError, match="not an exception"):
            describe_exception(encode(other))


def test_long_texts_are_shortened() -> None:
    """A message of 10 MB keeps beginning and end within 64 KiB."""
    error = ValueError("start " + "é" * 10_000_000 + " end")
    payload = encode_exception(error)
    assert len(payload) < 4 * 64 * 1024
    back = decode_exception(payload)
    assert type(back) is ValueError
    assert str(back).startswith("start é")
    assert str(back).endswith("é end")
    assert "shortened" in str(back)
    assert len(str(back).encode()) <= 64 * 1024
    key = decode_exception(encode_exception(KeyError("k" * 100_000)))
    assert isinstance(key, KeyError)
    assert type(key).__name__ == "KeyError"
    big = decode_exception(encode_exception(caught((b"a" * 10**7 + b"\xff").decode)))
    assert isinstance(big, UnicodeDecodeError)
    assert "position 10000000" in str(big)


def test_every_exception_fits_the_limit() -> None:
    """However large or strange it is, a failure can always be recorded."""
    huge: list[Exception] = [
        ExceptionGroup("g", [ValueError("x" * 60_000) for _ in range(500)]),
        ExceptionGroup("g", [ValueError(i) for i in range(100_000)]),
        ValueError(*["\x00" * 60_000] * 200),
    ]
    deep: Exception = ValueError("0")
    for depth in range(1_000):
        outer = ValueError(str(depth))
        outer.__cause__ = deep
        deep = outer
    nested: Exception = ValueError("0")
    for _ in range(100):
        nested = ExceptionGroup("n", [nested])
    inside: Exception = ValueError("0")
    for _ in range(400):
        inside = ValueError(inside, "and")
    for error in (*huge, deep, nested, inside):
        payload = encode_exception(error)
        assert len(payload) <= PAYLOAD_BYTES_MAX
        back = decode_exception(payload)
        assert type(back).__name__ == type(error).__name__
        assert isinstance(back, (type(error), ActivityFailedError))


def test_cut_groups_say_so() -> None:
    """Members that were left out are counted in a note."""
    error = ExceptionGroup("g", [ValueError("x" * 60_000) for _ in range(500)])
    back = decode_exception(encode_exception(error))
    assert isinstance(back, ExceptionGroup)
    assert str(back) == "g (500 sub-exceptions)"
    assert f"{500 - len(back.exceptions)} more exceptions" in back.__notes__[-1]


def test_cycles_of_exceptions_end() -> None:
    """An exception that is its own argument, attribute or cause's cause."""
    argument = ValueError("a")
    argument.args = (argument, "b")
    attribute = ValueError("a")
    attribute.me = [attribute, attribute]  # type: ignore[attr-defined]
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    for error in (argument, attribute, first):
        back = decode_exception(encode_exception(error))
        assert type(back).__name__ == "ValueError"
        assert str(back) == str(error)
    assert str(decode_exception(encode_exception(first)).__cause__) == "2"


def test_strange_attributes_do_not_harm() -> None:
    """Attributes named like a tag, like internals, or not by text at all."""
    error = ValueError("x")
    state: dict[Any, Any] = {"$tuple": [1], "_stent_message": "y", "args2": (1,)}
    vars(error).update(state)
    back = decode_exception(encode_exception(error))
    assert (str(back), back.args) == ("x", ("x",))
    assert vars(back)["$tuple"] == [1]
    assert vars(back)["args2"] == (1,)


def test_the_format_of_a_record_is_fixed() -> None:
    """Bytes that are in journals; they may never change."""
    cause = OSError(2, "gone", "/f")
    error = ValueError("bad", (1,))
    error.code = 7  # type: ignore[attr-defined]
    error.__cause__ = cause
    error.add_note("n")
    os_names = (
        '"mro":["builtins:OSError","builtins:Exception","builtins:BaseException"]'
    )
    assert encode(error).decode() == (
        '\x01{"$exception":{"class":"builtins:ValueError","mro":["builtins:ValueError",'
        '"builtins:Exception","builtins:BaseException"],"real":true,'
        '"message":"(\'bad\', (1,))","args":["bad",{"$tuple":[1]}],'
        '"state":{"code":7},"notes":["n"],"cause":{"class":"builtins:FileNotFoundError",'
        '"mro":["builtins:FileNotFoundError",' + os_names.removeprefix('"mro":[') + ","
        '"real":true,"message":"[Errno 2] gone: \'/f\'","args":[2,"gone"],'
        '"fields":{"errno":2,"strerror":"gone","filename":"/f"}}}}'
    )
    group = ExceptionGroup("g", [KeyError("k")])
    assert encode(group).decode() == (
        '\x01{"$exception":{"class":"builtins:ExceptionGroup",'
        '"mro":["builtins:ExceptionGroup","builtins:BaseExceptionGroup",'
        '"builtins:Exception","builtins:BaseException"],"real":true,'
        '"message":"g (1 sub-exception)","group":["g",[{"class":"builtins:KeyError",'
        '"mro":["builtins:KeyError","builtins:LookupError","builtins:Exception",'
        '"builtins:BaseException"],"real":true,"message":"\'k\'","args":["k"]}]]}}'
    )
