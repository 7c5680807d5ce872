"""Stored things as people read them; nothing of the user's is built, nothing raises."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any
from uuid import UUID

from stent.codec import describe_exception, to_plain, traceback_of
from stent.errors import PayloadError

_PAGE = re.compile(r"\[(?P<start>\d+)(?:\+(?P<size>\d+))?\]#[0-9a-f]+(?P<item>/\d+)?$")
WORKER_ID_CHARACTERS = 8
DETAILS_CHARACTERS_MAX = 200


def shown_value(payload: bytes | None, length: int | None) -> object:
    """The value of a payload; a note in its place if it is large or unreadable."""
    if payload is None:
        return None if length is None else f"<{length} bytes>"
    try:
        return to_plain(payload)
    except PayloadError as error:
        return f"<unreadable: {error}>"
    except Exception as error:  # noqa: BLE001 - a look must show the rest
        return f"<unreadable: {type(error).__name__}: {error}>"


def shown_details(payload: bytes | None, length: int | None) -> str | None:
    """What a heartbeat said, on a line, its beginning if it is long; None: nothing."""
    value = shown_value(payload, length)
    if value is None:
        return None
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= DETAILS_CHARACTERS_MAX:
        return line
    return line[:DETAILS_CHARACTERS_MAX] + "…"


def shown_error(payload: bytes | None, length: int | None) -> str:
    """``ClassName: message`` of a stored exception."""
    if payload is None:
        return "<lost>" if length is None else f"<{length} bytes>"
    if not payload:
        return "<none recorded>"
    try:
        name, message = describe_exception(payload)
    except PayloadError as error:
        return f"<unreadable: {error}>"
    except Exception as error:  # noqa: BLE001 - a look must show the rest
        return f"<unreadable: {type(error).__name__}: {error}>"
    return f"{name}: {message}" if message else name


def shown_traceback(payload: bytes | None) -> str | None:
    """Where a stored exception was raised; None if that is not known."""
    if not payload:
        return None
    try:
        return traceback_of(payload)
    except Exception:  # noqa: BLE001 - what is wrong with it is told instead of the error
        return None


def shown_worker(worker_id: UUID) -> str:
    """The beginning of a worker's id: random, so enough to tell workers apart."""
    return worker_id.hex[:WORKER_ID_CHARACTERS]


def shown_instant(at: dt.datetime) -> str:
    """An instant in UTC, to the second."""
    return at.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def shown_seconds(duration: dt.timedelta) -> str:
    """A duration as ``3 s``, ``12 min``, ``5 h`` or ``3 days``."""
    seconds = duration.total_seconds()
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))} ms"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} days"


def function_of(address: str) -> str:
    """Name of what is called at an address, without ``map:`` and ``run:``."""
    name = address.partition(":")[2].partition("#")[0]
    for prefix in ("map:", "run:"):
        name = name.removeprefix(prefix)
    return name


def page_of(address: str) -> int | None:
    """Index of the first item, if the address is that of a page of a map."""
    found = _PAGE.search(address)
    if found is None or not address.partition(":")[2].startswith("map:"):
        return None
    return None if found["item"] else int(found["start"])


def items_at(address: str) -> int:
    """How many calls an address stands for: items of a page, else one.

    An item of a page that has a call of its own was counted with its page: none.
    """
    found = _PAGE.search(address)
    if found is None:
        return 1
    return 0 if found["item"] else int(found["size"] or 1)


def without_nothing(**facts: Any) -> dict[str, object]:
    """The facts that are known."""
    return {name: value for name, value in facts.items() if value is not None}
