"""Why a value has no stored form, and where in the outer value it sits."""

from __future__ import annotations

SEGMENTS_SHOWN_MAX = 12


class Refused(Exception):  # noqa: N818 - private control flow, never leaves the codec
    """One part of a value cannot be stored; the path grows on the way out."""

    oversized = False

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self._segments: list[str] = []

    def within(self, segment: str) -> None:
        """Note the step that leads from the next outer value to this part."""
        self._segments.append(segment)

    def sentence(self, root: str) -> str:
        """``args[0].rows[3]: reason``; a very deep path is shortened in its middle."""
        segments = self._segments[::-1]
        if len(segments) > SEGMENTS_SHOWN_MAX:
            half = SEGMENTS_SHOWN_MAX // 2
            segments = [*segments[:half], " ... ", *segments[-half:]]
        return f"{root}{''.join(segments)}: {self.reason}"


def segment_of(key: object) -> str:
    """The step into a dict: ``.rows`` for a name, ``[3]`` for any other key."""
    if type(key) is str and key.isidentifier():
        return f".{key}"
    return f"[{repr(key)[:40]}]"
