"""The modules and functions that are named on the command line."""

from __future__ import annotations

import sys
import traceback
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stent.errors import StentError, UsageError

if TYPE_CHECKING:
    from stent.registry import DurableFunction


def load_module(name: str) -> ModuleType:
    """Import a module as a program started in the current directory would.

    Raises:
        UsageError: There is none, or its code is wrong; says where.
        StentError: It raises something else when it is imported.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if not all(part.isidentifier() for part in name.split(".")):
        guess = name.partition(":")[0].removesuffix(".py").strip("./")
        guess = guess.replace("/", ".")
        hint = f": did you mean {guess}?" if guess != name else ""
        message = f"{name!r} is not the name of a module{hint}"
        raise UsageError(message)
    try:
        return import_module(name)
    except StentError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            message = f"there is no module {error.name!r} in {here} or on Python's path"
            raise UsageError(message) from error
        raise UsageError(_import_failed(name, error)) from error
    except (Exception, SystemExit) as error:
        message = _import_failed(name, error)
        if _may_pass(error):
            raise StentError(message) from error
        raise UsageError(message) from error


def _may_pass(error: BaseException) -> bool:
    """Whether what the import needed may be there when it is tried again.

    What Python itself raises but for the system's errors, it raises tomorrow, too.
    """
    return isinstance(error, OSError) or type(error).__module__ != "builtins"


def _import_failed(name: str, error: BaseException) -> str:
    what = f"cannot import {name}: {type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return what  # which says where
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    if not frames:
        return what
    return f"{what} ({frames[-1].filename}:{frames[-1].lineno})"


def load_functions(name: str) -> list[str]:
    """Import a module; the durable names it brings.

    Raises:
        UsageError: It cannot be imported, has no durable function, or one with options
            that it cannot have.
    """
    from stent.registry import DurableFunction, catalogue

    before = set(catalogue.names())
    module = load_module(name)
    brought = set(catalogue.names()) - before
    brought |= {
        value.name
        for value in vars(module).values()
        if isinstance(value, DurableFunction)
    }
    brought |= {known for known in before if known.startswith(f"{name}.")}
    if not brought:
        message = f"module {name} has no durable function: decorate one with @durable"
        raise UsageError(message)
    for durable_name in brought:
        function = catalogue.find(durable_name)
        if function is not None:
            function.refuse_activity_options()
    return sorted(brought)


def load_function(target: str) -> DurableFunction[Any, Any]:
    """The durable function that ``MODULE:FUNCTION`` names.

    Raises:
        UsageError: There is no such module or function, or it is not durable.
    """
    from stent.registry import DurableFunction, catalogue

    name, separator, path = target.partition(":")
    if not separator or not path:
        message = f"{target!r} names no function: write MODULE:FUNCTION"
        raise UsageError(message)
    found: Any = load_module(name)
    for part in path.split("."):
        found = getattr(found, part, None)
    found = found or catalogue.find(f"{name}.{path}") or catalogue.find(path)
    if isinstance(found, DurableFunction):
        return found
    reason = "is not durable" if found is not None else "does not exist"
    known = [
        one.removeprefix(f"{name}.")
        for one in catalogue.names()
        if one.startswith(f"{name}.")
    ]
    durable = f"; durable there: {', '.join(known[:20])}" if known else ""
    close = get_close_matches(path, known, 1)
    hint = f": did you mean {name}:{close[0]}?" if close else ""
    message = f"{target} {reason}{hint or durable}"
    raise UsageError(message)
