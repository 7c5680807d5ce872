"""Workflow or activity? Found from byte code, without running anything.

A function is a workflow when it, a function nested in it or a plain helper it calls
calls a durable function or a primitive that only workflows may use. Globals are
resolved when asked, so the order of definition does not matter.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Self

from stent.model import Kind

MARK = "__stent_mark__"
"""Attribute that says what a call of its holder tells about the calling function."""
WORKFLOW = "workflow"
TRANSACTION = "transaction"
_METHODS = frozenset({"start", "map", "starmap", "options"})
_MISSING = object()


def find_kind(function: Callable[..., Any]) -> Kind:
    """The kind of ``function`` by what its code calls."""
    return Kind.WORKFLOW if WORKFLOW in _marks(function) else Kind.ACTIVITY


def uses_transaction(function: Callable[..., Any]) -> bool:
    """True when its code opens ``stent.transaction()``."""
    return TRANSACTION in _marks(function)


def _marks(function: Callable[..., Any]) -> set[str]:
    marks: set[str] = set()
    seen: set[CodeType] = set()
    layer: Any = function
    while layer is not None:
        inner = layer.__func__ if isinstance(layer, MethodType) else layer
        _collect(inner, marks, seen)
        layer = getattr(inner, "__wrapped__", None)
    return marks


def _collect(function: Any, marks: set[str], seen: set[CodeType]) -> None:
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or code in seen:
        return
    names = _Names.of(function)
    for called in _calls(code, names, seen):
        mark = _mark(called)
        if mark is not None:
            marks.add(mark)
            continue
        helper = _helper(called, _package(function))
        if helper is not None:
            _collect(helper, marks, seen)


def _mark(called: object) -> str | None:
    holder = called if isinstance(called, FunctionType) else type(called)
    mark = inspect.getattr_static(holder, MARK, None)
    return mark if isinstance(mark, str) else None


def _helper(called: object, package: str) -> FunctionType | None:
    """A plain function whose own code may decide.

    Of installed code only the package that asks is searched: reading all that a helper
    reaches in other libraries would take seconds and find nothing.
    """
    if isinstance(called, MethodType):
        called = called.__func__
    while isinstance(called, FunctionType):
        file = called.__code__.co_filename
        installed = any(folder in file for folder in _INSTALLED)
        own = not installed and not file.startswith(_STANDARD)
        if own or (installed and _package(called) == package):
            return called
        # A decorator of the standard library around the user's own function.
        called = getattr(called, "__wrapped__", None)
    return None


def _package(function: Any) -> str:
    return str(function.__module__).partition(".")[0]


_INSTALLED = ("site-packages", "dist-packages")
_STANDARD = (
    sysconfig.get_path("stdlib"),
    str(Path(__file__).parent) + os.sep,
    "<frozen",
)


@dataclass(frozen=True, slots=True)
class _Names:
    """What the names in a function, and in functions nested in it, stand for.

    Attributes:
        module: Its globals.
        outer: Variables of the functions around it.
        local: Variables of its own that are an alias of something known.
    """

    module: dict[str, object]
    outer: dict[str, object]
    local: dict[str, object]

    @classmethod
    def of(cls, function: Any) -> Self:
        outer: dict[str, object] = {}
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=False):
            try:
                outer[name] = cell.cell_contents
            except ValueError:
                continue  # the enclosing function has not bound it yet
        local: dict[str, object] = {}
        if function.__code__.co_argcount:
            # Of a method, the first parameter stands for its class.
            local[function.__code__.co_varnames[0]] = _owner(function)
        return cls(function.__globals__, outer, local)

    def nested(self) -> _Names:
        """As seen by a function defined inside."""
        return _Names(self.module, self.outer | self.local, {})

    def resolve(self, operation: str, name: object) -> object:
        """What a load instruction puts on the stack, where that is known."""
        if operation in {"LOAD_GLOBAL", "LOAD_NAME"}:
            found = self.module.get(str(name), _MISSING)
            return (
                getattr(builtins, str(name), _MISSING) if (found is _MISSING) else found
            )
        if operation.startswith("LOAD_FAST"):
            # 3.13 loads two variables at once; the second one ends up on top.
            last = name[-1] if isinstance(name, tuple) else name
            return self.local.get(str(last), _MISSING)
        if "DEREF" in operation and operation.startswith("LOAD"):
            known = self.local.get(str(name), _MISSING)
            return self.outer.get(str(name), _MISSING) if known is _MISSING else known
        return _MISSING


def _calls(code: CodeType, names: _Names, seen: set[CodeType]) -> Iterator[object]:
    """Every resolvable object that ``code`` or code nested in it calls.

    CPython marks a callable on the stack with a NULL beside it: pushed before it until
    3.12, after it since 3.13, or by the lowest bit of the load's argument.
    """
    seen.add(code)
    value, called = _MISSING, False
    null_before = False
    imported: object = _MISSING
    for instruction in dis.get_instructions(code):
        operation, argument = instruction.opname, instruction.argval
        if operation in {"EXTENDED_ARG", "CACHE", "NOP"}:
            continue
        if operation in {"LOAD_ATTR", "LOAD_METHOD"}:
            value = _attribute(value, argument)
            called = called or _pushes_null(instruction)
            continue
        if operation == "PUSH_NULL" and _NULL_AFTER:
            called = True
        if called and value is not _MISSING:
            yield value
        if operation.startswith("STORE_FAST") or operation == "STORE_DEREF":
            # 3.13 stores and loads, or stores twice, in one instruction.
            first, *second = argument if isinstance(argument, tuple) else (argument,)
            names.local[first] = _MISSING if called else value
            value, called = _MISSING, False
            if operation == "STORE_FAST_LOAD_FAST":
                value, called = names.local.get(second[0], _MISSING), null_before
            elif second:
                names.local[second[0]] = _MISSING
        elif operation == "IMPORT_NAME":
            value = imported = _imported(argument, names)
            called = False
        elif operation == "IMPORT_FROM":
            value, called = _attribute(imported, argument), False
        else:
            value = names.resolve(operation, argument)
            called = null_before or _pushes_null(instruction)
        null_before = operation == "PUSH_NULL" and not _NULL_AFTER
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant not in seen:
            yield from _calls(constant, names.nested(), seen)


_NULL_AFTER = sys.version_info >= (3, 13)


def _pushes_null(instruction: dis.Instruction) -> bool:
    """Whether a load says by itself that its value is about to be called."""
    if instruction.opname == "LOAD_METHOD":
        return True
    flagged = (
        {"LOAD_GLOBAL", "LOAD_ATTR"} if sys.version_info >= (3, 12) else {"LOAD_GLOBAL"}
    )
    return instruction.opname in flagged and bool((instruction.arg or 0) & 1)


def _imported(name: str, names: _Names) -> object:
    """A module that a function imports; nothing is imported to find out."""
    package = str(names.module.get("__package__") or "")
    return sys.modules.get(name) or sys.modules.get(f"{package}.{name}", _MISSING)


def _attribute(value: object, name: str) -> object:
    """Follow an attribute where that cannot run user code."""
    if value is _MISSING:
        return _MISSING
    if isinstance(value, ModuleType):
        return vars(value).get(name, _lazy(value, name))
    if _mark(value) == WORKFLOW and not isinstance(value, FunctionType):
        return value if name in _METHODS else _MISSING
    found = inspect.getattr_static(value, name, _MISSING)
    if isinstance(found, staticmethod | classmethod):
        return found.__func__
    return found


def _lazy(module: ModuleType, name: str) -> object:
    """Stent's own facade loads its names lazily; other modules are left alone."""
    return getattr(module, name, _MISSING) if module.__name__ == "stent" else _MISSING


def _owner(function: Any) -> object:
    """The class a method was defined in, when it can be found by its qualname."""
    path = function.__qualname__.split(".")[:-1]
    if not path or "<locals>" in path:
        return _MISSING
    found = function.__globals__.get(path[0], _MISSING)
    for part in path[1:]:
        found = _attribute(found, part)
    return found if isinstance(found, type) else _MISSING
