"""Whether closing a suspended coroutine would run code of its user.

Closing raises ``GeneratorExit`` where the coroutine waits. A ``finally``, a bare
``except`` or a ``with`` around that place then runs. That is read from the byte code,
once per function; an approximation that only decides what is closed first.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

_HANDLER_ENDS = {"RERAISE", "POP_EXCEPT", "RETURN_VALUE", "RETURN_CONST"}
_CATCHES_ALL = {"BaseException", "GeneratorExit"}
_EFFECTS = {
    "CALL",
    "CALL_FUNCTION_EX",
    "CALL_KW",
    "STORE_ATTR",
    "STORE_SUBSCR",
    "STORE_GLOBAL",
    "DELETE_SUBSCR",
}


def cleans_up(
    coroutine: Any, *, ignoring: Callable[[str], bool] = lambda _file: False
) -> bool:
    """True if code would run where ``coroutine``, or what it awaits, is suspended.

    Args:
        coroutine: A coroutine or an async generator.
        ignoring: Whether code of a file is not the user's.
    """
    return any(
        start <= frame.f_lasti < end
        for frame in _frames(coroutine)
        if not ignoring(frame.f_code.co_filename)
        for start, end in _guarded(frame.f_code)
    )


def _frames(coroutine: Any) -> Iterator[FrameType]:
    """Frames from the outermost to what waits; a future has none."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(
            coroutine, "ag_frame", None
        )
        if frame is None:
            return
        yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(
            coroutine, "ag_await", None
        )


@functools.lru_cache(maxsize=4096)
def _guarded(code: CodeType) -> tuple[tuple[int, int], ...]:
    """Ranges of byte code offsets that are left through a handler with effects."""
    bytecode = dis.Bytecode(code)
    instructions = list(bytecode)
    ranges: dict[int, tuple[int, int]] = {}
    for entry in bytecode.exception_entries:  # type: ignore[attr-defined] # since 3.11
        start, end = ranges.get(entry.target, (entry.start, entry.end))
        ranges[entry.target] = min(start, entry.start), max(end, entry.end)
    return tuple(
        guarded
        for target, guarded in ranges.items()
        if _has_effects(i for i in instructions if i.offset >= target)
    )


def _has_effects(handler: Iterable[dis.Instruction]) -> bool:
    """Whether a handler does anything when ``GeneratorExit`` comes."""
    instructions = iter(handler)
    if next(instructions).opname != "PUSH_EXC_INFO":
        # Written by the compiler: the end of an await, of a comprehension, of a name.
        return False
    names: set[object] = set()
    for instruction in instructions:
        match instruction.opname:
            case "CHECK_EXC_MATCH" | "CHECK_EG_MATCH":
                return bool(names & _CATCHES_ALL)
            case "WITH_EXCEPT_START":
                # Not of ``async with``: what that runs is mostly asyncio's own.
                return next(instructions).opname != "GET_AWAITABLE"
            case name if name in _EFFECTS:
                return True
            case name if name in _HANDLER_ENDS:
                return False
            case _:
                names.add(instruction.argval)
    return False
