"""Code that forks its process: the copy ends where the code does, and does no more.

It has the connections, the event loop and the tasks of the worker, and would go on as
if it were one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_with_the_code(process: int) -> Iterator[None]:
    """Run code of the user; in a process that it has forked, end after it.

    Args:
        process: The id of the one in which it began.
    """
    try:
        yield
    except SystemExit as error:
        if os.getpid() != process:
            os._exit(
                error.code if isinstance(error.code, int) else int(bool(error.code))
            )
        raise
    except BaseException:
        if os.getpid() != process:
            os._exit(1)
        raise
    if os.getpid() != process:
        os._exit(0)
