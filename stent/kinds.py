"""Workflow or activity? Found from byte code, without running anything.

A function is a workflow when it, a function nested in it or a plain helper it calls
calls a durable function or a primitive that only workflows may use. Globals are
resolved when asked, so the order of definition does not matter.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

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
    function = inspect.unwrap(function)
    if isinstance(function, MethodType):
        function = function.__func__
    marks: set[str] = set()
    _collect(function, marks, set())
    return marks


def _collect(function: Any, marks: set[str], seen: set[CodeType]) -> None:
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or code in seen:
        return
    for called in _calls(code, function, _cells(function), seen):
        mark = _mark(called)
        if mark is not None:
            marks.add(mark)
            continue
        helper = _helper(called)
        if helper is not None:
            _collect(helper, marks, seen)


def _mark(called: object) -> str | None:
    holder = called if isinstance(called, FunctionType) else type(called)
    mark = inspect.getattr_static(holder, MARK, None)
    return mark if isinstance(mark, str) else None


def _helper(called: object) -> FunctionType | None:
    """A plain function whose own code may decide; installed code is not searched."""
    if isinstance(called, MethodType):
        called = called.__func__
    if not isinstance(called, FunctionType):
        return None
    file = called.__code__.co_filename
    return None if file.startswith(_INSTALLED) or "site-packages" in file else called


_INSTALLED = (
    sysconfig.get_path("stdlib"),
    str(Path(__file__).parent),
    "<frozen",
)


def _cells(function: Any) -> dict[str, object]:
    cells: dict[str, object] = {}
    for name, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=False
    ):
        try:
            cells[name] = cell.cell_contents
        except ValueError:
            continue  # the enclosing function has not bound it yet
    return cells


@dataclass(slots=True)
class _Chain:
    """An object reached by loads, and whether the code goes on to call it."""

    value: object
    called: bool


def _calls(
    code: CodeType, function: Any, cells: dict[str, object], seen: set[CodeType]
) -> Iterator[object]:
    """Every resolvable object that ``code`` or code nested in it calls.

    CPython marks a callable on the stack with a NULL beside it: pushed before it until
    3.12, after it since 3.13, or by a flag of the load itself.
    """
    seen.add(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant not in seen:
            yield from _calls(constant, function, cells, seen)
    null_before = False
    chain = _Chain(_MISSING, called=False)
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        marked = "NULL" in instruction.argrepr
        if operation in {"LOAD_ATTR", "LOAD_METHOD"}:
            chain.value = _attribute(chain.value, instruction.argval)
            chain.called = chain.called or marked or operation == "LOAD_METHOD"
            continue
        if operation == "PUSH_NULL" and _NULL_AFTER:
            chain.called = True
        if chain.called and chain.value is not _MISSING:
            yield chain.value
        value = _load(operation, instruction.argval, code, function, cells)
        chain = _Chain(value, called=marked or null_before)
        null_before = operation == "PUSH_NULL" and not _NULL_AFTER


_NULL_AFTER = sys.version_info >= (3, 13)


def _load(
    operation: str,
    argument: object,
    code: CodeType,
    function: Any,
    cells: dict[str, object],
) -> object:
    """What a load instruction puts on the stack, where that is known."""
    if operation in {"LOAD_GLOBAL", "LOAD_NAME"}:
        return _resolve(function, str(argument))
    if operation in {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}:
        return cells.get(str(argument), _MISSING)
    if operation == "LOAD_FAST" and argument == next(iter(code.co_varnames), None):
        return _owner(function)
    return _MISSING


def _resolve(function: Any, name: str) -> object:
    found = function.__globals__.get(name, _MISSING)
    return getattr(builtins, name, _MISSING) if found is _MISSING else found


def _attribute(value: object, name: str) -> object:
    """Follow an attribute where that cannot run user code."""
    if isinstance(value, ModuleType):
        return vars(value).get(name, _lazy(value, name))
    if isinstance(value, type):
        found = inspect.getattr_static(value, name, _MISSING)
        if isinstance(found, staticmethod | classmethod):
            return found.__func__
        return found
    if _mark(value) == WORKFLOW and not isinstance(value, FunctionType):
        return value if name in _METHODS else _MISSING
    return _MISSING


def _lazy(module: ModuleType, name: str) -> object:
    """stent's own facade loads its names lazily; other modules are left alone."""
    return getattr(module, name, _MISSING) if module.__name__ == "stent" else _MISSING


def _owner(function: Any) -> object:
    """The class a method was defined in, when it can be found by its qualname."""
    parts = function.__qualname__.split(".")[:-1]
    if not parts or parts[-1] == "<locals>":
        return _MISSING
    found: object = _MISSING
    for index, part in enumerate(parts):
        if part == "<locals>":
            return _MISSING
        found = (
            function.__globals__.get(part, _MISSING)
            if index == 0
            else _attribute(found, part)
        )
    return found if isinstance(found, type) else _MISSING
