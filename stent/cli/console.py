"""What people see: colours where they help, and nothing that needs a wide screen.

Nothing here is parsed as markup; all texts pass ``escaped``.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import sys
from typing import TextIO, cast

from rich.console import Console
from rich.text import Text

from stent.cli.text import escaped, shortened
from stent.model import ExecutionState, Status

PIPED_COLUMNS = 160
"""Width where there is no terminal to ask."""

STYLES = {
    Status.PENDING: "yellow",
    Status.RUNNING: "cyan",
    Status.PAUSED: "yellow",
    Status.BLOCKED: "bold magenta",
    Status.CANCELLING: "yellow",
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.CANCELLED: "bright_black",
    Status.TIMED_OUT: "red",
}


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or as COLUMNS says; NO_COLOR is obeyed."""
    width = shutil.get_terminal_size((PIPED_COLUMNS, 40)).columns
    stream = sys.stderr if stderr else sys.stdout
    file = stream if stream.isatty() else cast("TextIO", _Trimmed(stream))
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


class _Trimmed:
    """A stream that is no terminal: lines end where their text does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        *lines, rest = text.split("\n")
        self._stream.write("".join(f"{line.rstrip(' ')}\n" for line in lines) + rest)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def status_text(status: Status) -> Text:
    """A status in its colour."""
    return Text(status.value, style=STYLES[status])


def text(value: str, style: str = "") -> Text:
    """A text that came from anywhere."""
    return Text(escaped(value), style=style)


def value_text(value: object, characters_max: int) -> str:
    """A plain value as compact JSON, not too long."""
    return shortened(escaped(json.dumps(value, ensure_ascii=False)), characters_max)


def age(at: dt.datetime) -> str:
    """How long ago, in two or three characters and a unit."""
    return duration(dt.datetime.now(dt.UTC) - at)


def duration(passed: dt.timedelta) -> str:
    """How long, in two or three characters and a unit."""
    seconds = max(0.0, passed.total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def took(state: ExecutionState) -> str | None:
    """How long a finished execution took, from its start."""
    times = state.times
    if times.started_at is None or times.finished_at is None:
        return None
    seconds = max(0.0, (times.finished_at - times.started_at).total_seconds())
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
