"""Classes by name: ``module:qualname``, found again without importing anything."""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from stent.codec.refusal import Refused
from stent.errors import PayloadError

CLASSES_PER_ANNOTATION_MAX = 1000
ANSWERS_REMEMBERED_MAX = 4096

Function = TypeVar("Function", bound=Callable[..., object])


def remembered(function: Function) -> Function:
    """Keep the latest answers of a function of classes or names."""
    # The cast keeps the signature, which lru_cache loses: to a type checker, classes
    # of some metaclass might not be hashable.
    return cast("Function", lru_cache(maxsize=ANSWERS_REMEMBERED_MAX)(function))


class MissingTypeError(PayloadError):
    """A stored value needs a class that this process has not imported.

    Args:
        module: Import name of the module to import, also the attribute ``module``.
        name: Qualified name of the class within it, also the attribute ``name``.
    """

    def __init__(self, module: str, name: str) -> None:
        super().__init__(module, name)
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return (
            f"the stored class {self.module}:{self.name} is not known here; "
            f"import {self.module} in this process, or restore the class if it moved"
        )


class Shape(enum.Enum):
    """How instances of a user's class are taken apart."""

    DATA = "dataclass"
    STRUCT = "msgspec Struct"
    ENUM = "Enum"
    NAMED = "NamedTuple"
    EXCEPTION = "exception"


@remembered
def shape_of(cls: type) -> Shape | None:
    """The shape of a class, None when its instances have no stored form."""
    if issubclass(cls, enum.Enum):
        return Shape.ENUM
    if issubclass(cls, BaseException):
        return Shape.EXCEPTION
    if issubclass(cls, msgspec.Struct):
        return Shape.STRUCT
    if issubclass(cls, tuple):
        return Shape.NAMED if _is_named_tuple(cls) else None
    if dataclasses.is_dataclass(cls) and not _has_builtin_content(cls):
        return Shape.DATA
    return None


def _is_named_tuple(cls: type) -> bool:
    names = getattr(cls, "_fields", None)
    return isinstance(names, tuple) and all(type(name) is str for name in names)


def _has_builtin_content(cls: type) -> bool:
    """True for a dataclass that is also a list, a dict, a str, beside its fields."""
    return any(
        base.__module__ == "builtins" and base is not object for base in cls.__mro__
    )


def main_name() -> str:
    """Import name of the running program: of ``python -m a.b``, or its file's stem."""
    module = sys.modules.get("__main__")
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    return _stem(getattr(module, "__file__", None) or "__main__")


@lru_cache(maxsize=16)
def _stem(file: str) -> str:
    return Path(file).stem


def import_name(module: str) -> str:
    """The module's name as another process imports it; only ``__main__`` differs.

    >>> import_name("json")
    'json'
    """
    return main_name() if module == "__main__" else module


@remembered
def name_of(cls: type) -> str:
    """The name that leads to ``cls`` in every process that imported its module.

    Returns:
        ``module:qualname``, with ``__main__`` replaced by its import name.

    Raises:
        Refused: The class is local to a function, or the name leads to
            something else.
    """
    name = full_name(cls)
    if "<locals>" in cls.__qualname__:
        message = f"{name} is local to a function; define the class in a module"
        raise Refused(message)
    if _walk(cls.__module__, cls.__qualname__) is not cls:
        message = f"{name} does not lead to this class; was it replaced or renamed?"
        raise Refused(message)
    return name


def full_name(cls: type) -> str:
    """``module:qualname``, whether or not it leads to the class."""
    return f"{import_name(cls.__module__)}:{cls.__qualname__}"


class Classes:
    """Finds classes by stored name: those of an annotation first, then any imported.

    Args:
        annotated: Classes by name, of the annotation that reads the payload.
    """

    __slots__ = ("_annotated", "_found")

    def __init__(self, annotated: Mapping[str, type]) -> None:
        self._annotated = annotated
        self._found: dict[str, type] = {}

    def find(self, name: str, shape: Shape) -> type:
        """The class of this name and shape.

        Raises:
            MissingTypeError: No imported module has it.
            PayloadError: The name leads to something of another shape.
        """
        cls = self._found.get(name)
        if cls is None:
            cls = self._found[name] = self._search(name)
        if shape_of(cls) is not shape:
            message = f"{name} is not a class of shape {shape.value}; not built"
            raise PayloadError(message)
        return cls

    def _search(self, name: str) -> type:
        module, _, qualname = name.partition(":")
        cls = self._annotated.get(name) or find_imported(name)
        if cls is None:
            cls = self._moved(qualname)
        if cls is None:
            raise MissingTypeError(module, qualname)
        if not isinstance(cls, type):
            message = f"{name} is not a class; not built"
            raise PayloadError(message)
        return cls

    def _moved(self, qualname: str) -> type | None:
        """The annotation's class of the same name in another module, if only one."""
        moved = [
            cls
            for name, cls in self._annotated.items()
            if name.partition(":")[2] == qualname
        ]
        return moved[0] if len(moved) == 1 else None


def find_imported(name: str) -> object | None:
    """What a stored name leads to among the modules already imported, else None."""
    module, _, qualname = name.partition(":")
    if module == main_name():
        found = _walk("__main__", qualname)
        if found is not None:
            return found
    return _walk(module, qualname)


def _walk(module: str, qualname: str) -> object | None:
    # ``vars`` and not ``getattr``: a module's ``__getattr__`` may import, and a
    # metaclass may run code.
    owner: object = sys.modules.get(module)
    for part in qualname.split("."):
        if not isinstance(owner, (types.ModuleType, type)):
            return None
        owner = vars(owner).get(part)
    return owner


@remembered
def _classes_of_hashable(annotation: object) -> Mapping[str, type]:
    return _collect([annotation])


def classes_of(annotation: object) -> Mapping[str, type]:
    """Classes with a stored form that an annotation names, by stored name.

    Looks into generics, unions and the fields of classes. What cannot be resolved is
    left out.
    """
    try:
        return _classes_of_hashable(annotation)
    except TypeError:  # Annotated[int, []] and the like cannot be hashed.
        return _collect([annotation])


@remembered
def classes_of_parameters(function: Callable[..., object]) -> Mapping[str, type]:
    """Like :func:`classes_of` for all parameters and the result of a function."""
    return _collect(_hints(function))


def _collect(annotations: list[object]) -> Mapping[str, type]:
    found: dict[str, type] = {}
    waiting = list(annotations)
    seen: set[int] = set()
    while waiting and len(seen) < CLASSES_PER_ANNOTATION_MAX:
        annotation = waiting.pop()
        if id(annotation) in seen:
            continue
        seen.add(id(annotation))
        waiting.extend(_within(annotation))
        if isinstance(annotation, type) and shape_of(annotation) is not None:
            found[full_name(annotation)] = annotation
    return found


def _within(annotation: object) -> Iterator[object]:
    yield from typing.get_args(annotation)
    yield typing.get_origin(annotation)
    if isinstance(annotation, type) and annotation.__module__ != "builtins":
        yield from _hints(annotation)
    value = getattr(annotation, "__value__", None)  # type X = ..., from 3.12 on
    if value is not None and not isinstance(annotation, type):
        yield value


def _hints(owner: object) -> list[object]:
    """Resolved annotations of a class or function; one by one if some are not."""
    try:
        return list(typing.get_type_hints(owner).values())
    except Exception:  # noqa: BLE001 - resolving runs the annotations' own expressions
        return list(_resolvable(owner))


def _resolvable(owner: object) -> Iterator[object]:
    module = sys.modules.get(getattr(owner, "__module__", None) or "")
    names = getattr(owner, "__globals__", None) or getattr(module, "__dict__", {})
    for name, annotation in (getattr(owner, "__annotations__", None) or {}).items():
        single = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            yield from typing.get_type_hints(single, globalns=names).values()
        except Exception:  # noqa: BLE001, S112 - left out: decoded as tagged
            continue
