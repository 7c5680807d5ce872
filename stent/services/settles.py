"""What a worker writes about the tasks it has claimed, and with which flush."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from uuid import UUID

from stent.codec import encode_exception, join_payloads
from stent.errors import ActivityFailedError, PayloadError, StoreError
from stent.log import get_logger
from stent.model import Recorded
from stent.services.attempts import Attempt, Failed
from stent.services.identity import make_call_ids
from stent.services.writer import task_missed
from stent.store.flush import Flush, Flushed
from stent.store.store import merge_parts, part_indexes, part_of_page, took

log = get_logger(__name__)


class Owners(Protocol):
    """Knows which executions this worker owns, and takes their results."""

    def expect_local(self, execution_id: UUID) -> bool:
        """True if the execution is here and will take the result from memory."""
        ...

    def arrive(self, execution_id: UUID, address: str, recorded: Recorded) -> None:
        """A committed result of a call."""
        ...

    def expect_no_more(self, execution_id: UUID) -> None:
        """An expected result will not come after all."""
        ...


Held = set[Attempt]
"""Attempts whose task a worker holds, until its row is gone or somebody else's.

By attempt, not by call: a task that was given back may be claimed again, for its next
attempt, before the worker hears that its giving back was committed.
"""


class TaskItem:
    """Base of the writer's items about one task."""

    def __init__(self, attempt: Attempt, size: int, held: Held) -> None:
        """Create it.

        Args:
            attempt: Whose task it is.
            size: Payload bytes, about.
            held: Tasks this worker holds; the task leaves it when its row is gone.
        """
        self.attempt = attempt
        self.size = size
        self.rows = 1
        self._held = held
        self._too_early = False

    def missed(self, flushed: Flushed) -> str | None:
        """By the task's row; one that is not written yet is not lost."""
        missed = task_missed(self.attempt.call_id, flushed)
        return "busy" if missed == "lost" and self._too_early else missed

    def committed(self) -> None:
        """The row is not ours any more."""
        self._held.discard(self.attempt)
        self.attempt.tell_settled()

    def lost(self) -> None:
        """Somebody else runs it, or nobody wants it."""
        self._held.discard(self.attempt)

    def refused(self, error: StoreError) -> None:
        """The row stays ours until it is taken over or dropped."""
        log.error("task.write_refused", address=self.attempt.address, error=str(error))


class _Reported(TaskItem):
    """Base of items whose result the execution takes from memory if it is here."""

    def __init__(self, attempt: Attempt, size: int, held: Held, owners: Owners) -> None:
        """See ``TaskItem``; ``owners`` knows which executions are here."""
        super().__init__(attempt, size, held)
        self._owners = owners
        self._local = False

    def missed(self, flushed: Flushed) -> str | None:
        """By the task's row; until the next try the execution may have left."""
        missed = super().missed(flushed)
        if missed == "busy":
            self._expect_no_more()
        return missed

    def lost(self) -> None:
        """Nobody gets it from here."""
        super().lost()
        self._expect_no_more()

    def refused(self, error: StoreError) -> None:
        """Nobody gets it from here either."""
        super().refused(error)
        self._expect_no_more()

    def _expect(self) -> bool:
        self._local = self._local or self._owners.expect_local(
            self.attempt.execution_id
        )
        return self._local

    def _announce(self, flush: Flush) -> None:
        if not self._local:
            flush.reached.add(self.attempt.execution_id)

    def _expect_no_more(self) -> None:
        if self._local:
            self._local = False
            self._owners.expect_no_more(self.attempt.execution_id)


class Settle(_Reported):
    """The task is done: its result, and the end of its row."""

    def __init__(
        self,
        attempt: Attempt,
        held: Held,
        recorded: Recorded,
        owners: Owners,
        submit: Callable[[Settle], None],
    ) -> None:
        """See ``TaskItem``.

        Args:
            attempt: Whose task it is.
            held: Tasks this worker holds.
            recorded: The outcome.
            owners: Knows which executions are here.
            submit: To write again, should the database refuse the outcome.
        """
        super().__init__(attempt, len(recorded.payload), held, owners)
        self._recorded = recorded
        self._submit = submit
        self._refused = False

    def contribute(self, flush: Flush) -> None:
        """One row, and what the attempt told."""
        attempt, recorded = self.attempt, self._recorded
        self._too_early = attempt.row_pending
        flush.settles.append(
            (
                attempt.execution_id,
                attempt.call_id,
                attempt.epoch,
                attempt.address,
                recorded.ok,
                recorded.payload,
                attempt.number,
                attempt.started_at,
                attempt.ended_at,
                self._expect(),
            )
        )
        self._announce(flush)
        if attempt.told:
            flush.tells.extend(told_rows(attempt))

    def committed(self) -> None:
        """The owner may see it."""
        super().committed()
        if self._local:
            attempt = self.attempt
            self._owners.arrive(attempt.execution_id, attempt.address, self._recorded)

    def refused(self, error: StoreError) -> None:
        """The outcome is the problem: the call fails with that instead."""
        super().refused(error)
        if self._refused:
            return
        self._refused = True
        self.attempt.told.clear()
        failure = PayloadError(f"the database refuses the outcome: {error}")
        self._recorded = Recorded(ok=False, payload=encode_exception(failure))
        self._submit(self)


def told_rows(attempt: Attempt) -> list[tuple[Any, ...]]:
    """Rows of what an attempt told; call ids as of addresses of their own."""
    call_id = make_call_ids(attempt.execution_id)
    return [
        (attempt.execution_id, call_id(address), address, payload)
        for address, payload in attempt.told
    ]


class Retry(TaskItem):
    """The attempt failed; the task waits for its next one."""

    def __init__(
        self,
        attempt: Attempt,
        held: Held,
        failed: Failed,
        on_wait: Callable[[Any], None],
    ) -> None:
        super().__init__(attempt, len(failed.payload), held)
        self._failed = failed
        self._on_wait = on_wait

    def contribute(self, flush: Flush) -> None:
        """One row, and what the attempt told."""
        attempt = self.attempt
        self._too_early = attempt.row_pending
        flush.retries.append(
            (
                attempt.execution_id,
                attempt.call_id,
                attempt.epoch,
                attempt.address,
                attempt.number,
                self._failed.payload,
                attempt.started_at,
                self._failed.retry_at,
            )
        )
        if attempt.told:
            flush.tells.extend(told_rows(attempt))

    def committed(self) -> None:
        """Somebody should look for it when its time comes."""
        super().committed()
        self._on_wait(self._failed.retry_at)


class Release(TaskItem):
    """Give a task back that has not begun."""

    def __init__(self, attempt: Attempt, held: Held) -> None:
        super().__init__(attempt, 0, held)

    def contribute(self, flush: Flush) -> None:
        """One row."""
        attempt = self.attempt
        flush.releases.append((attempt.execution_id, attempt.call_id, attempt.epoch))


class Page(_Reported):
    """The growing outcome of a page of a map.

    Finished items are written with whatever flush comes next, as a segment; with the
    last of them the page is settled. There is one such item in the writer at a time.
    """

    def __init__(
        self,
        attempt: Attempt,
        held: Held,
        owners: Owners,
        submit: Callable[[Page], None],
        segments: list[bytes],
    ) -> None:
        super().__init__(attempt, 0, held, owners)
        self._submit = submit
        self._segments = segments
        self._fresh: dict[int, bytes] = {}
        self._seen: set[int] = set()
        self._written = {i for segment in segments for i in part_indexes(segment)}
        self._submitted = False
        self._taken: tuple[bytes, bool] | None = None
        self._complete = False
        self._failure: bytes | None = None

    def done_already(self) -> set[int]:
        """Items of earlier attempts."""
        return self._written

    def add(self, index: int, payload: bytes) -> None:
        """An item is done."""
        self._fresh[index] = payload
        if self._failure is None:
            self.size += len(payload)
        self._seen.add(index)
        if not self._submitted:
            self._submitted = True
            self._submit(self)

    def complete(self) -> None:
        """All items are done; should one be missing, the page fails."""
        form = self.attempt.options.page
        done = len(self._written | self._seen)
        if form is not None and done != form.size:
            message = f"{done} of {form.size} items of {self.attempt.address} are done"
            self.fail(encode_exception(ActivityFailedError(message)))
            return
        self._complete = True
        self._submit_once()

    def fail(self, payload: bytes) -> None:
        """An item is out of attempts; what is done and not written does not count."""
        self._failure = payload
        self.size = len(payload)
        self._submit_once()

    def _submit_once(self) -> None:
        if not self._submitted:
            self._submitted = True
            self._submit(self)

    def refused(self, error: StoreError) -> None:
        """The outcome is the problem: the page fails with that instead."""
        super().refused(error)
        self._taken, self._submitted = None, False
        if self._failure is None:
            failure = PayloadError(f"the database refuses the outcome: {error}")
            self.attempt.told.clear()
            self.attempt.ended_at = self.attempt.ended_at or self.attempt.started_at
            self.attempt.stop()
            self.fail(encode_exception(failure))

    def contribute(self, flush: Flush) -> None:
        """What is there by now: a segment, or the end of the page."""
        if self._taken is None:
            self._taken = self._take()
        payload, last = self._taken
        attempt = self.attempt
        key = (attempt.execution_id, attempt.call_id, attempt.epoch)
        if not last:
            flush.segments.append((*key, len(self._segments), payload))
            return
        ok = self._failure is None
        flush.settles.append(
            (
                *key,
                attempt.address,
                ok,
                payload,
                attempt.number,
                attempt.started_at,
                attempt.ended_at,
                self._expect(),
            )
        )
        self._announce(flush)
        if attempt.told:
            flush.tells.extend(told_rows(attempt))

    def _take(self) -> tuple[bytes, bool]:
        if self._failure is not None:
            return self._failure, True
        fresh, self._fresh = self._fresh, {}
        if self._complete and not self._segments and not self._written:
            return join_payloads(fresh[index] for index in sorted(fresh)), True
        part = part_of_page(list(fresh), join_payloads(fresh.values()))
        return part, self._complete

    def committed(self) -> None:
        """Go on with what has come in the meantime, or hand over the page."""
        if self._taken is None:
            return
        payload, last = self._taken
        self._taken = None
        self._submitted = False
        if self._failure is None:
            self.size = sum(map(len, self._fresh.values()))
        if not last:
            self._segments.append(payload)
            if self._fresh or self._complete or self._failure is not None:
                self._submit_once()
            return
        super().committed()
        if self._local:
            attempt = self.attempt
            if self._failure is not None:
                recorded = Recorded(ok=False, payload=payload)
            else:
                if self._segments:
                    payload = merge_parts([*self._segments, payload])
                took_us = took(attempt.started_at, attempt.ended_at)
                recorded = Recorded(ok=True, payload=payload, took_us=took_us)
            self._owners.arrive(attempt.execution_id, attempt.address, recorded)
