"""Texts made safe for a terminal: nothing stored can move a cursor or fake a line."""

from __future__ import annotations

import re

# Controls (C0, DEL, C1), line and paragraph separators, marks that reorder text, and
# lone surrogates, which no stream can encode.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escaped(text: str, *, keep: str = "") -> str:
    r"""The text with control characters written out, as ``\x1b``.

    Args:
        text: From anywhere.
        keep: Characters that may stay, such as a newline.
    """
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text
    )


def shortened(text: str, characters_max: int) -> str:
    """The beginning of a text that is too long, with an ellipsis."""
    if len(text) <= characters_max:
        return text
    return text[: max(0, characters_max - 1)] + "…"


def shortened_name(name: str, characters_max: int) -> str:
    """The end of a dotted name that is too long: the function is what counts."""
    if len(name) <= characters_max:
        return name
    return "…" + name[len(name) - characters_max + 1 :]
