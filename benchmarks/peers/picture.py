"""Bars on a logarithmic scale, as SVG by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Bar = tuple[str, float | None, str]
"""Name, value or None, and what stands at the end of the bar."""

WIDTH, NAMES, VALUES, MARGIN = 860, 210, 130, 16
BAR, GAP, TITLE, BETWEEN = 18, 6, 30, 22
OWN_COLOR, OTHER_COLOR, GRID_COLOR = "#1f6feb", "#9aa4b2", "#e3e7ec"
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b2430}"
    ".title{font-weight:600}.small{font-size:11px;fill:#5b6673}"
)
_CAPTION = "Each step of the grid is ten times as much. Measured in one call."


def draw(panels: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """A panel of bars for each title; the first bar is ours.

    Args:
        panels: Titles with their bars, values above zero.
    Returns:
        The text of an SVG file.
    """
    parts: list[str] = []
    top = MARGIN
    for title, bars in panels:
        parts += _panel(title, bars, top)
        top += TITLE + len(bars) * (BAR + GAP) + BETWEEN
    height = top + MARGIN
    parts.append(_text(MARGIN, height - MARGIN, _CAPTION, "small"))
    size = f'width="{WIDTH}" height="{height}"'
    frame = f'{size} viewBox="0 0 {WIDTH} {height}" role="img"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>',
        "<title>stent beside others</title>",
        f"<style>{_STYLE}</style>",
        f'<rect {size} fill="#ffffff"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _panel(title: str, bars: Sequence[Bar], top: int) -> list[str]:
    low, high = _decades([value for _, value, _ in bars if value is not None])
    left, room = MARGIN + NAMES, WIDTH - 2 * MARGIN - NAMES - VALUES
    first = top + TITLE
    bottom = first + len(bars) * (BAR + GAP)
    parts = [_text(MARGIN, top + 14, title, "title")]
    for decade in range(low, high + 1):
        x = left + room * (decade - low) / (high - low)
        parts.append(
            f'<line x1="{x:.1f}" y1="{first - 4}" x2="{x:.1f}" y2="{bottom}" '
            f'stroke="{GRID_COLOR}"/>'
        )
    for index, (name, value, label) in enumerate(bars):
        y = first + index * (BAR + GAP)
        parts.append(_text(MARGIN, y + 13, name))
        end = float(left)
        if value is not None:
            width = room * (math.log10(value) - low) / (high - low)
            end = left + width
            color = OWN_COLOR if index == 0 else OTHER_COLOR
            parts.append(
                f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{BAR}" '
                f'rx="2" fill="{color}"/>'
            )
        parts.append(_text(end + 6, y + 13, label))
    return parts


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten below and above all values; a bar is never without length."""
    if not values:
        return 0, 1
    low = math.ceil(math.log10(min(values))) - 1
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}>{escape(text)}</text>'
