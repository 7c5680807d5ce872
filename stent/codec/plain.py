"""Payloads shown to people: plain JSON in which tags are readable, nothing is built."""

from __future__ import annotations

import binascii
from collections.abc import Callable
from typing import Any

from stent.codec.payload import read_tree

INT_BITS_SHOWN_MAX = 4096
Plain = Any


def to_plain(payload: bytes) -> object:
    """What a payload says, for display only; no class of the user is looked up.

    Tuples and sets become lists, dataclasses dicts, dates text, an Enum
    ``Color.RED``, an exception ``ValueError: message``, bytes their ``repr``.

    Returns:
        None, bool, int, float, str, list, or dict with str keys; valid as strict JSON.

    Raises:
        PayloadError: The payload is damaged or of an unknown codec.
    """
    return _show(read_tree(payload))


def _show(tree: Plain) -> Plain:
    if type(tree) is list:
        return [_show(item) for item in tree]
    if type(tree) is not dict:
        return tree
    if len(tree) == 1:
        [(tag, content)] = tree.items()
        show = _SHOWN.get(tag)
        if show is not None:
            try:
                return show(content)
            except Exception:  # noqa: BLE001 - malformed: shown as it is
                return tree
    return {key: _show(value) for key, value in tree.items()}


def _show_int(text: str) -> Plain:
    number = int(text, 16)
    return number if number.bit_length() <= INT_BITS_SHOWN_MAX else text


def _show_bytes(text: str) -> Plain:
    return repr(binascii.a2b_base64(text))


def _show_str(text: str) -> Plain:
    raw = binascii.a2b_base64(text).decode("utf-8", "surrogatepass")
    return raw.encode("utf-8", "backslashreplace").decode()


def _show_pairs(pairs: list[Any]) -> Plain:
    shown = [(_show(key), _show(value)) for key, value in pairs]
    by_text = {key if type(key) is str else repr(key): value for key, value in shown}
    if len(by_text) == len(shown):
        return by_text
    return [list(pair) for pair in shown]


def _show_clock(content: Plain) -> Plain:
    if type(content) is str:
        return content
    text, zone, _ = content
    if zone is None:
        return text
    return f"{text} {zone if type(zone) is str else zone[0]}"


def _show_timedelta(content: Plain) -> Plain:
    days, seconds, microseconds = content
    hours, rest = divmod(seconds, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    fraction = f".{microseconds:06}" if microseconds else ""
    return f"{days} days, {clock}{fraction}" if days else clock + fraction


def _show_fields(content: Plain) -> Plain:
    _, fields, *extra = content
    shown = dict(fields)
    for part in extra:
        shown.update(part)
    return {key: _show(value) for key, value in shown.items()}


def _show_enum(content: Plain) -> Plain:
    name, key = content
    cls = name.rpartition(":")[2].rpartition(".")[2]
    return f"{cls}.{key}" if type(key) is str else f"{cls}({_show(key)})"


def _show_exception(content: Plain) -> Plain:
    cls = content["class"].rpartition(":")[2].rpartition(".")[2]
    return f"{cls}: {_show(content['message'])}"


_SHOWN: dict[str, Callable[[Any], Plain]] = {
    "$int": _show_int,
    "$float": str,
    "$str": _show_str,
    "$bytes": _show_bytes,
    "$bytearray": _show_bytes,
    "$tuple": _show,
    "$set": _show,
    "$frozenset": _show,
    "$deque": lambda content: _show(content[1]),
    "$dict": _show_pairs,
    "$ordereddict": _show_pairs,
    "$counter": _show_pairs,
    "$defaultdict": lambda content: _show_pairs(content[1]),
    "$date": str,
    "$datetime": _show_clock,
    "$time": _show_clock,
    "$timedelta": _show_timedelta,
    "$decimal": str,
    "$uuid": str,
    "$path": lambda content: _show(content[1]),
    "$complex": lambda content: f"{_show(content[0])} + {_show(content[1])}j",
    "$range": lambda content: f"range({', '.join(str(_show(n)) for n in content)})",
    "$ok": lambda content: {"ok": _show(content)},
    "$error": lambda content: {"error": _show(content)},
    "$unset": lambda _: "UNSET",
    "$data": _show_fields,
    "$struct": _show_fields,
    "$named": _show_fields,
    "$enum": _show_enum,
    "$exception": _show_exception,
}
