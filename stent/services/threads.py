"""Threads for plain functions: started when needed, reused, never joined.

Daemon threads of our own. Those of anyio and of asyncio are joined when the interpreter
ends, so that a worker told to stop would hang for as long as one function takes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stent.log import ACTIVITY_THREAD_LEFT, get_logger
from stent.services.attempts import Attempt

log = get_logger(__name__)

LEFT_SECONDS = 5.0
"""After which a thread that goes on although nobody waits for it is reported."""


@dataclass(slots=True, eq=False)
class _Job:
    """One function call.

    Attributes:
        done: Who waits for it; the result is (whether it returned, value or exception).
        left: Nobody waits any more, and it goes on.
    """

    attempt: Attempt
    work: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[tuple[bool, Any]]
    left: bool = False
    report: asyncio.TimerHandle | None = None


class Threads:
    """The threads of one worker; as many as there are calls at the same time."""

    def __init__(
        self,
        *,
        on_left: Callable[[Attempt], None],
        on_returned: Callable[[Attempt], None],
    ) -> None:
        """Create it.

        Args:
            on_left: A function goes on although its attempt has ended.
            on_returned: Such a function has come to its end.
        """
        self._on_left = on_left
        self._on_returned = on_returned
        self._idle: list[_Thread] = []
        self._closed = False

    async def run(
        self, work: Callable[[], Any], cancelled: threading.Event, attempt: Attempt
    ) -> Any:
        """Call ``work`` in a thread; its value, or what it raised.

        Args:
            work: Without arguments.
            cancelled: Set when the waiting is cancelled; the thread goes on, and its
                code may look.
            attempt: To which the call belongs.
        """
        loop = asyncio.get_running_loop()
        job = _Job(attempt, work, loop, loop.create_future())
        thread = self._idle.pop() if self._idle else _Thread(self._ended)
        thread.jobs.put(job)
        try:
            returned, value = await job.done
        except asyncio.CancelledError:
            cancelled.set()
            if job.done.cancelled():
                self._leave(job)
            raise
        del job
        if returned:
            return value
        raise value

    def _leave(self, job: _Job) -> None:
        job.left = True
        self._on_left(job.attempt)
        job.report = job.loop.call_later(LEFT_SECONDS, _report, job.attempt)

    def _ended(self, thread: _Thread, job: _Job, outcome: tuple[bool, Any]) -> None:
        """On the loop: a thread has done its job."""
        if self._closed:
            thread.jobs.put(None)
        else:
            self._idle.append(thread)
        if job.left:
            if job.report is not None:
                job.report.cancel()
            self._on_returned(job.attempt)
        elif not job.done.done():
            job.done.set_result(outcome)

    def close(self) -> None:
        """End the threads: idle ones now, the others after what they do."""
        self._closed = True
        while self._idle:
            self._idle.pop().jobs.put(None)


def _report(attempt: Attempt) -> None:
    log.warning(
        ACTIVITY_THREAD_LEFT,
        execution_id=str(attempt.execution_id),
        activity=attempt.function,
        attempt=attempt.number,
    )


class _Thread:
    def __init__(
        self, report: Callable[[_Thread, _Job, tuple[bool, Any]], None]
    ) -> None:
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._report = report
        threading.Thread(target=self._work, name="stent-activity", daemon=True).start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                outcome = (True, job.work())
            except BaseException as error:  # noqa: BLE001 - SystemExit too: the code's outcome
                outcome = (False, _raisable(error))
            try:
                job.loop.call_soon_threadsafe(self._report, self, job, outcome)
            except RuntimeError:
                # The loop was closed in between: there is nobody to tell.
                return
            del job, outcome


def _raisable(error: BaseException) -> BaseException:
    """What a coroutine can raise: these two would end it in another way."""
    if isinstance(error, StopIteration | GeneratorExit):
        failure = RuntimeError(f"the function raised {type(error).__name__}")
        failure.__cause__ = error
        return failure
    return error
