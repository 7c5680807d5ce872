"""Exceptions as records: taken apart without loss of name or message, built again.

A record is a JSON object: ``class`` (``module:qualname``), ``mro`` (such names),
``real`` (the class could be found by that name when it was stored), ``message``
(``str()`` of the exception), ``args`` or for groups ``group`` (message and members),
and, where there is something to say, ``fields`` (what a class keeps outside
``__dict__``), ``state`` (``__dict__``), ``notes``, ``cause``, ``context``, ``suppress``
and ``traceback`` (text). No constructor of a user's class is ever called.
"""

from __future__ import annotations

import asyncio
import builtins
import re
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from stent.codec.names import Classes, Shape, full_name, name_of, remembered
from stent.codec.refusal import Refused
from stent.errors import ActivityFailedError, ExecutionCancelledError

Record = dict[str, Any]

REMOTE_TRACEBACK = "remote_traceback"
"""Attribute of a rebuilt exception: the traceback's text where it was raised."""

ARGUMENTS_MAX = 100
_MESSAGE = "_stent_message"
_ORIGIN = "__stent_origin__"
_HIDDEN = frozenset({"__notes__", "__orig_class__", REMOTE_TRACEBACK, _MESSAGE})
_HEAP_TYPE = 1 << 9
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ARGS = cast("types.GetSetDescriptorType", vars(BaseException)["args"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How much of an exception is kept."""

    text_bytes_max: int
    part_bytes_max: int
    chain_max: int
    members_max: int
    with_context: bool
    with_traceback: bool

    def inner(self) -> Detail:
        """For a cause or member, whose traceback the outer text already contains."""
        return replace(self, chain_max=self.chain_max - 1, with_traceback=False)


VALUE = Detail(
    text_bytes_max=64 * 1024,
    part_bytes_max=64 * 1024,
    chain_max=16,
    members_max=10_000,
    with_context=False,
    with_traceback=False,
)
"""An exception passed as a value. Without traceback and context: they differ between
replays and Python versions, and a value's bytes decide the address of a call."""
OUTCOMES = (
    replace(VALUE, with_context=True, with_traceback=True),
    replace(
        VALUE,
        text_bytes_max=8 * 1024,
        part_bytes_max=1024,
        chain_max=4,
        members_max=20,
        with_traceback=True,
    ),
    replace(VALUE, text_bytes_max=1024, part_bytes_max=0, chain_max=1, members_max=5),
)
"""An exception that ended a call: the first detail that fits the limit is used."""


class Packing(Protocol):
    """What a record needs from the value codec."""

    active: set[int]

    def attempt(self, value: object, bytes_max: int) -> object:
        """The stored form of one part, at most about this long; raises Refused."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The class an exception had where it was first stored."""

    name: str
    lineage: tuple[str, ...]
    real: bool


def outcome_of(error: BaseException) -> Exception:
    """The exception that stands for ``error`` as the outcome of a call.

    ``Exception`` stays as it is. What stops a task or a process never is an outcome: a
    cancellation becomes an ExecutionCancelledError, anything else an
    ActivityFailedError whose message says what it was; groups keep their structure.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, BaseExceptionGroup):
        members = [outcome_of(member) for member in error.exceptions]
        outcome: Exception = ExceptionGroup(error.message, members)
    else:
        name, text = type(error).__name__, _text_of(error)
        message = f"the call ended with {name}" + (f": {text}" if text else "")
        cancelled = isinstance(error, asyncio.CancelledError)
        outcome = (ExecutionCancelledError if cancelled else ActivityFailedError)(
            message
        )
    for note in getattr(error, "__notes__", ()):
        outcome.add_note(str(note))
    outcome.__cause__ = error.__cause__
    outcome.__context__ = error.__context__
    outcome.__suppress_context__ = error.__suppress_context__
    return outcome.with_traceback(error.__traceback__)


def record_of(error: BaseException, packing: Packing, detail: Detail) -> Record:
    """Take an exception apart.

    Raises:
        Refused: It contains itself.
    """
    if id(error) in packing.active:
        message = f"{type(error).__name__} contains itself"
        raise Refused(message)
    packing.active.add(id(error))
    try:
        return _Recorder(packing, detail).record(error)
    finally:
        packing.active.discard(id(error))


class _Recorder:
    def __init__(self, packing: Packing, detail: Detail) -> None:
        self.packing = packing
        self.detail = detail

    def record(self, error: BaseException) -> Record:
        origin = _origin(type(error))
        record: Record = {
            "class": origin.name,
            "mro": list(origin.lineage),
            "real": origin.real,
            "message": self._text(_text_of(error)),
        }
        group = isinstance(error, BaseExceptionGroup) and self.detail.chain_max > 0
        if group:
            record["group"] = self._group(cast("BaseExceptionGroup[Any]", error))
        else:
            record["real"] = origin.real and not isinstance(error, BaseExceptionGroup)
            record["args"] = [
                self._part(part) for part in _ARGS.__get__(error)[:ARGUMENTS_MAX]
            ]
        for key, part in (
            ("fields", self._parts(_fields_of(error))),
            ("state", self._parts(_state_of(error))),
            ("notes", self._notes(error)),
            *self._chain(error),
        ):
            if part:
                record[key] = part
        if self.detail.with_traceback:
            record["traceback"] = self._text(_traceback_of(error, self.detail))
        return record

    def _text(self, text: str) -> object:
        short = shorten(text, self.detail.text_bytes_max)
        # Room for what JSON escapes; a text of control characters grows sixfold.
        return self.packing.attempt(short, 8 * self.detail.text_bytes_max)

    def _part(self, part: object) -> object:
        """One argument; what cannot be stored is replaced by what it looked like."""
        if type(part) is str:
            return self._text(part)
        try:
            return self.packing.attempt(part, self.detail.part_bytes_max)
        except Refused:
            return self._text(_appearance(part))

    def _parts(self, parts: Mapping[str, object]) -> Record:
        """Attributes by name; what cannot be stored is left out."""
        kept: Record = {}
        for name, part in parts.items():
            try:
                kept[name] = self.packing.attempt(part, self.detail.part_bytes_max)
            except Refused:
                continue
        return kept

    def _group(self, error: BaseExceptionGroup[Any]) -> list[object]:
        members = error.exceptions[: self.detail.members_max]
        inner = self.detail.inner()
        return [
            self._text(error.message),
            [record_of(member, self.packing, inner) for member in members],
        ]

    def _notes(self, error: BaseException) -> list[object]:
        notes = list(getattr(error, "__notes__", None) or ())
        if isinstance(error, BaseExceptionGroup):
            more = len(error.exceptions) - self.detail.members_max
            if more > 0 and self.detail.chain_max > 0:
                notes.append(f"{more} more exceptions of this group were not stored")
        return [self._text(str(note)) for note in notes[:ARGUMENTS_MAX]]

    def _chain(self, error: BaseException) -> list[tuple[str, object]]:
        cause, context = error.__cause__, error.__context__
        suppress = error.__suppress_context__
        follow = self.detail.chain_max > 0
        chain: list[tuple[str, object]] = []
        if cause is not None and follow:
            chain.append(("cause", self._linked(cause)))
        elif (
            context is not None and follow and self.detail.with_context and not suppress
        ):
            chain.append(("context", self._linked(context)))
        if suppress and cause is None:
            chain.append(("suppress", True))
        return chain

    def _linked(self, error: BaseException) -> Record | None:
        try:
            return record_of(error, self.packing, self.detail.inner())
        except Refused:
            return None


def _origin(cls: type[BaseException]) -> Origin:
    stored = vars(cls).get(_ORIGIN)
    return stored if isinstance(stored, Origin) else _live_origin(cls)


@remembered
def _live_origin(cls: type[BaseException]) -> Origin:
    mro = tuple(full_name(base) for base in cls.__mro__ if base is not object)
    try:
        return Origin(name_of(cls), mro, real=True)
    except Refused:
        return Origin(full_name(cls), mro, real=False)


def _text_of(error: BaseException) -> str:
    try:
        # Not ``str()`` of a subclass of str: its own methods would follow along.
        return str.__str__(str(error))
    except Exception as failure:  # noqa: BLE001 - any user code may run in __str__
        return f"<str() of this exception raised {type(failure).__name__}>"


def _appearance(part: object) -> str:
    try:
        return _ADDRESS.sub("", repr(part)[:1024])
    except Exception:  # noqa: BLE001 - any user code may run in __repr__
        return f"<{type(part).__name__}>"


def _traceback_of(error: BaseException, detail: Detail) -> str:
    earlier = vars(error).get(REMOTE_TRACEBACK)
    if type(earlier) is str and error.__traceback__ is None:
        return earlier
    here = _formatted(error, detail)
    return f"{earlier}\nRaised again:\n\n{here}" if type(earlier) is str else here


def _formatted(error: BaseException, detail: Detail) -> str:
    try:
        if len(_text_of(error)) > detail.text_bytes_max:
            return "".join(traceback.format_tb(error.__traceback__))
        return "".join(traceback.format_exception(error))
    except Exception as failure:  # noqa: BLE001 - sources may be unreadable
        return f"<the traceback could not be formatted: {type(failure).__name__}>"


def shorten(text: str, bytes_max: int) -> str:
    """The text, or its beginning and end when its UTF-8 form is too long."""
    if 4 * len(text) <= bytes_max:
        return text
    # A character takes one to four bytes, so this much of each end suffices.
    ends = text if len(text) <= bytes_max else text[:bytes_max] + text[-bytes_max:]
    raw = ends.encode("utf-8", "surrogatepass")
    if ends is text and len(raw) <= bytes_max:
        return text
    gap = " ... shortened ... "
    half = (bytes_max - len(gap)) // 2
    start = raw[:half].decode("utf-8", "ignore")
    return start + gap + raw[-half:].decode("utf-8", "ignore")


def _state_of(error: BaseException) -> dict[str, object]:
    return {
        name: part
        for name, part in vars(error).items()
        if type(name) is str and name not in _HIDDEN
    }


def _fields_of(error: BaseException) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, descriptor in _descriptors(type(error)).items():
        try:
            part = descriptor.__get__(error)
        except AttributeError:
            continue
        if part is not None:
            found[name] = part
    return found


_Descriptor = types.MemberDescriptorType | types.GetSetDescriptorType


@remembered
def _descriptors(cls: type[BaseException]) -> Mapping[str, _Descriptor]:
    """What the class keeps outside ``__dict__``: ``errno``, ``start``, slots ..."""
    found: dict[str, _Descriptor] = {}
    for base in reversed(cls.__mro__):
        if base in (object, BaseException, BaseExceptionGroup):
            continue
        found |= {
            name: descriptor
            for name, descriptor in vars(base).items()
            if isinstance(descriptor, _Descriptor) and not name.startswith("__")
        }
    # The object that lacked an attribute is big, private and no part of the message.
    if issubclass(cls, AttributeError):
        found.pop("obj", None)
    return found


def rebuild(
    record: Record, unpack: Callable[[Any], Any], classes: Classes
) -> BaseException:
    """Build an exception from its record, running no constructor.

    Raises:
        MissingTypeError: Its class was real when stored and is not imported here.
        PayloadError: The name in the record is not an exception class.
    """
    origin = Origin(record["class"], tuple(record["mro"]), record["real"])
    message = unpack(record["message"])
    if origin.real:
        cls = cast("type[BaseException]", classes.find(origin.name, Shape.EXCEPTION))
    else:
        cls = _stand_in(origin, group="group" in record)
    parts = _Parts(record, unpack, classes)
    error = parts.fill(cls)
    if type(error) is cls and not origin.real:
        vars(error)[_MESSAGE] = message
    elif not _says(error, message):
        error = parts.fill(_retelling(type(error), origin))
        vars(error)[_MESSAGE] = message
    return error


def _says(error: BaseException, message: str) -> bool:
    try:
        return str(error) == message
    except Exception:  # noqa: BLE001 - any user code may run in __str__
        return False


class _Parts:
    """The decoded content of a record, ready to be put into an instance."""

    def __init__(
        self, record: Record, unpack: Callable[[Any], Any], classes: Classes
    ) -> None:
        self.args = tuple(unpack(part) for part in record.get("args", ()))
        self.group: tuple[str, list[BaseException]] | None = None
        if "group" in record:
            message, members = record["group"]
            built = [rebuild(member, unpack, classes) for member in members]
            self.group = (unpack(message), built)
        self.fields = {k: unpack(v) for k, v in record.get("fields", {}).items()}
        self.state = {k: unpack(v) for k, v in record.get("state", {}).items()}
        self.notes = [unpack(note) for note in record.get("notes", ())]
        links = [record.get("cause"), record.get("context")]
        self.cause, self.context = (
            rebuild(link, unpack, classes) if link else None for link in links
        )
        self.suppress = bool(record.get("suppress"))
        text = record.get("traceback")
        self.traceback = None if text is None else unpack(text)

    def fill(self, cls: type[BaseException]) -> BaseException:
        error = self._blank(cls)
        descriptors = _descriptors(type(error))
        for name, part in self.fields.items():
            if name in descriptors:
                _set_field(error, descriptors[name], part)
            else:
                vars(error)[name] = part
        vars(error).update(self.state)
        if self.notes:
            vars(error)["__notes__"] = list(self.notes)
        # Past a __setattr__ of the class: that of a frozen dataclass refuses.
        _set_link(error, "__cause__", self.cause)
        _set_link(error, "__context__", self.context)
        suppress = self.suppress or self.cause is not None
        _set_link(error, "__suppress_context__", suppress)
        if self.traceback is not None:
            vars(error)[REMOTE_TRACEBACK] = self.traceback
        return error

    def _blank(self, cls: type[BaseException]) -> BaseException:
        # The first base that is not written in Python has the ``__new__`` that lays
        # out the memory; a user's own ``__new__`` is not called.
        base: type = cls
        while base.__flags__ & _HEAP_TYPE:
            base = cast("type", base.__base__)
        make: Callable[..., BaseException] = base.__new__
        if self.group is not None:
            return make(cls, *self.group)
        error = make(cls)
        _ARGS.__set__(error, self.args)
        return error


def _set_link(error: BaseException, name: str, value: object) -> None:
    BaseException.__setattr__(error, name, value)


def _set_field(error: BaseException, descriptor: _Descriptor, part: object) -> None:
    try:
        descriptor.__set__(error, part)
    except (AttributeError, TypeError):
        # Read-only or of a narrower type in this version; the message is kept anyway.
        return


def _stored_message(self: BaseException) -> str:
    return str(vars(self).get(_MESSAGE, ""))


@remembered
def _stand_in(origin: Origin, *, group: bool) -> type[BaseException]:
    """An ActivityFailedError that has the name of a class that nobody can find."""
    builtin = _first_builtin(origin.lineage, group=group)
    plain = builtin is None or issubclass(ActivityFailedError, builtin)
    bases = (ActivityFailedError,) if plain else (ActivityFailedError, builtin)
    return _new_class(origin, cast("tuple[type[BaseException], ...]", bases))


@remembered
def _retelling(cls: type[BaseException], origin: Origin) -> type[BaseException]:
    """A subclass whose ``str()`` is the stored message.

    For classes whose own ``__str__`` cannot say it again from what was stored.
    """
    try:
        return _new_class(origin, (cls,))
    except Exception:  # noqa: BLE001 - a user's __init_subclass__ or metaclass objects
        unreal = Origin(origin.name, origin.lineage, real=False)
        return _stand_in(unreal, group=issubclass(cls, BaseExceptionGroup))


def _new_class(
    origin: Origin, bases: tuple[type[BaseException], ...]
) -> type[BaseException]:
    module, _, qualname = origin.name.partition(":")
    namespace = {
        "__module__": module,
        "__qualname__": qualname,
        "__str__": _stored_message,
        _ORIGIN: origin,
    }
    name = qualname.rpartition(".")[2]
    return types.new_class(name, bases, exec_body=lambda made: made.update(namespace))


def _first_builtin(mro: tuple[str, ...], *, group: bool) -> type[Exception] | None:
    for name in mro:
        module, _, qualname = name.partition(":")
        cls = vars(builtins).get(qualname) if module == "builtins" else None
        if not (isinstance(cls, type) and issubclass(cls, Exception)):
            continue
        if group or not issubclass(cls, BaseExceptionGroup):
            return cls
    return None


def describe(record: Record) -> tuple[str, object]:
    """Class name and packed message, for display; builds nothing."""
    return str(record["class"]).rpartition(":")[2].rpartition(".")[2], record["message"]
