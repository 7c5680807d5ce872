"""Code that forks its process: the copy ends where the code does, and does no more.

It has the connections, the event loop and the tasks of the worker, and would go on as
if it were one.
"""

from __future__ import annotations

import os
from types import TracebackType


class EndingWithTheCode:
    """Run code of the user in this; in a process that it has forked, end after it.

    No generator: contextlib assigns to exceptions, and frozen ones refuse that.
    """

    __slots__ = ("_process",)

    def __init__(self, process: int) -> None:
        """``process``: the id of the one in which the code begins."""
        self._process = process

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """End the copy, as ``sys.exit`` in it would."""
        if os.getpid() == self._process:
            return
        if isinstance(error, SystemExit):
            code = error.code
            os._exit(code if isinstance(code, int) else int(bool(code)))
        os._exit(0 if error is None else 1)
