"""Waits for outcomes on behalf of an application: one poll for all that wait."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from stent.codec import MissingTypeError, decode, decode_exception, describe_exception
from stent.errors import (
    ExecutionCancelledError,
    ExecutionFailedError,
    ExecutionNotFoundError,
    PayloadError,
    StoreError,
    UsageError,
)
from stent.log import EXECUTION_BLOCKED, WORKER_ABSENT, get_logger
from stent.model import Status
from stent.registry import catalogue
from stent.result import Result
from stent.services.turn_items import Ending
from stent.store.store import Store

log = get_logger(__name__)

HINTED_POLL_SECONDS = 1.0
"""How often to look for what a hint should have told."""
UNHINTED_POLL_SECONDS_MIN = 0.02
UNHINTED_POLL_SECONDS_MAX = 0.5
IDS_PER_QUERY_MAX = 5000
ABSENCE_SECONDS = 3.0
"""For how long something has to wait until it is asked whether there are workers."""
FIRST_LOOK_SECONDS = 0.02
"""When what was dispatched here is looked at although no hint has come."""
REMEMBERED_MAX = 100_000
"""Executions dispatched here that are known to be ours."""
REMEMBERED_BYTES_MAX = 64 * 1024 * 1024
"""Outcomes told by a worker of this process that nobody has asked for yet."""

Outcome = Result[Any, Any]


class Outcomes:
    """Everything one process waits for."""

    def __init__(self, store: Store, client_id: UUID) -> None:
        """Create it; ``client_id`` is how executions name this process."""
        self._store = store
        self._client_id = client_id
        self._waiters: dict[UUID, list[asyncio.Future[Outcome]]] = {}
        self._own: set[UUID] = set()
        self._hinted: set[UUID] = set()
        self._looked_for: set[UUID] = set()
        """Own ones whose first look comes next."""
        self._first_look = FIRST_LOOK_SECONDS
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._pause = UNHINTED_POLL_SECONDS_MIN
        self._warned: set[UUID] = set()
        self._unserved = self._absence_told = False
        """Something waits for a worker; that there is none was said."""
        self._dispatched: dict[UUID, None] = {}
        self._ended: dict[UUID, tuple[str, Ending]] = {}
        self._ended_bytes = 0

    def told(self, client_id: UUID, execution_id: UUID) -> bool:
        """A worker in this process has ended something; False: not for us."""
        if client_id != self._client_id:
            return False
        self.hint(execution_id)
        return True

    def hint(self, execution_id: UUID) -> None:
        """It has probably ended."""
        if execution_id in self._waiters:
            self._hinted.add(execution_id)
            self._wake.set()

    def dispatched(self, execution_ids: Iterable[UUID]) -> None:
        """These are ours: their ends are told to us."""
        for execution_id in execution_ids:
            self._dispatched[execution_id] = None
        while len(self._dispatched) > REMEMBERED_MAX:
            del self._dispatched[next(iter(self._dispatched))]

    def is_own(self, execution_id: UUID) -> bool:
        """Whether this process dispatched it, not too long ago."""
        return execution_id in self._dispatched

    def ended(self, execution_id: UUID, function: str, ending: Ending) -> None:
        """A worker in this process has committed an outcome."""
        if execution_id not in self._dispatched:
            return
        self._ended[execution_id] = (function, ending)
        self._ended_bytes += len(ending.recorded.payload)
        while (
            self._ended_bytes > REMEMBERED_BYTES_MAX
            or len(self._ended) > REMEMBERED_MAX
        ) and next(iter(self._ended)) != execution_id:
            self._forget(next(iter(self._ended)))
        if execution_id in self._waiters:
            self._resolve(execution_id, self._recall(execution_id))

    def _recall(self, execution_id: UUID) -> Outcome:
        function, ending = self._ended[execution_id]
        self._forget(execution_id)
        return read_outcome(
            {
                "execution_id": execution_id,
                "function": function,
                "ok": ending.recorded.ok,
                "payload": ending.recorded.payload,
            }
        )

    def _forget(self, execution_id: UUID) -> None:
        _, ending = self._ended.pop(execution_id)
        self._ended_bytes -= len(ending.recorded.payload)

    async def wait(self, execution_id: UUID) -> Outcome:
        """Until it has an outcome.

        Raises:
            ExecutionNotFoundError: There is no such execution.
        """
        if execution_id in self._ended:
            return self._recall(execution_id)
        own = self.is_own(execution_id)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(execution_id, [])
        waiters.append(future)
        if own:
            self._own.add(execution_id)
        else:
            self._pause = UNHINTED_POLL_SECONDS_MIN
        # It may have ended before anybody waited: most of ours have not, unless one
        # after the other is waited for.
        asyncio.get_running_loop().call_later(
            self._first_look if own else 0.0, self._look_first, execution_id
        )
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._poll())
        try:
            return await future
        finally:
            if future in waiters:
                waiters.remove(future)
            if not waiters:
                self._waiters.pop(execution_id, None)
                self._own.discard(execution_id)
                self._looked_for.discard(execution_id)

    def _look_first(self, execution_id: UUID) -> None:
        """Without a hint."""
        if execution_id in self._own:
            self._looked_for.add(execution_id)
        self.hint(execution_id)

    async def _poll(self) -> None:
        """As long as anybody waits."""
        now = asyncio.get_running_loop().time
        began = looked_at_all = now()
        while self._waiters:
            only_own = len(self._own) == len(self._waiters)
            pause = HINTED_POLL_SECONDS if only_own else self._pause
            # Hints for some must not keep the others from being looked at.
            left = looked_at_all + pause * (0.8 + 0.4 * random.random()) - now()  # noqa: S311
            hinted = bool(self._hinted) or await self._wait_for_hint(left)
            self._wake.clear()
            ids = self._hinted & set(self._waiters)
            if not hinted or left <= 0:
                ids = set(self._waiters)
                looked_at_all = now()
                if not only_own:
                    self._pause = min(self._pause * 1.5, UNHINTED_POLL_SECONDS_MAX)
            self._hinted, self._unserved = set(), False
            try:
                await self._look(list(ids))
                if self._unserved and now() - began > ABSENCE_SECONDS:
                    await self._tell_absence()
            except StoreError as error:
                if not error.retryable:
                    self._fail_all(error)
                    return
                self._hinted |= ids
                await asyncio.sleep(0.1)

    async def _wait_for_hint(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def _look(self, ids: list[UUID]) -> None:
        for start in range(0, len(ids), IDS_PER_QUERY_MAX):
            some = ids[start : start + IDS_PER_QUERY_MAX]
            rows = await self._store.outcomes(some)
            found = set()
            for row in rows:
                found.add(row["execution_id"])
                self._take(row)
            for execution_id in set(some) - found:
                message = f"there is no execution {execution_id}"
                self._resolve(execution_id, ExecutionNotFoundError(message))

    async def _tell_absence(self) -> None:
        """The likeliest mistake of all: nobody has started a worker."""
        if self._absence_told:
            return
        self._absence_told = True
        if not await self._store.list_workers(host=None, ended=False, count=1):
            log.warning(
                WORKER_ABSENT,
                advice="start one with `stent worker MODULE`, or open the app with "
                "serve=True",
            )

    def _take(self, row: Any) -> None:
        execution_id = row["execution_id"]
        status = Status(row["status"])
        if execution_id in self._looked_for:
            self._looked_for.discard(execution_id)
            self._first_look = 0.0 if status.terminal else FIRST_LOOK_SECONDS
        if status.terminal:
            self._resolve(execution_id, read_outcome(row))
        elif status is Status.PENDING:
            self._unserved = True
        elif status is Status.BLOCKED and execution_id not in self._warned:
            self._warned.add(execution_id)
            log.warning(
                EXECUTION_BLOCKED,
                execution_id=str(execution_id),
                reason=row["blocked_reason"],
            )

    def _resolve(self, execution_id: UUID, outcome: Outcome | Exception) -> None:
        for future in self._waiters.get(execution_id, ()):
            if future.done():
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _fail_all(self, error: Exception) -> None:
        for execution_id in list(self._waiters):
            self._resolve(execution_id, error)

    async def close(self) -> None:
        """Stop polling."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._fail_all(UsageError("the app was closed while somebody waited for it"))


def read_outcome(row: Any) -> Outcome:
    """The Result of a finished execution: a row of ``Store.outcomes``."""
    payload: bytes | None = row["payload"]
    if payload is None:
        return Result.Error(_unwritten_error(row))
    if not row["ok"]:
        return Result.Error(_read_error(payload))
    function = catalogue.find(row["function"])
    annotation = Any if function is None else function.return_annotation
    try:
        value = decode(payload, annotation)
    except PayloadError as error:
        # This process cannot read it; whoever waits must hear of that, not hang.
        return Result.Error(error)
    return value if isinstance(value, Result) else Result.Ok(value)


def _unwritten_error(row: Any) -> Exception:
    """What was cancelled together with its parent, before it began, has no result."""
    if row["status"] == Status.CANCELLED:
        return ExecutionCancelledError("its parent ended before it began")
    message = f"execution {row['execution_id']} has ended without an outcome"
    return ExecutionFailedError(message)


def _read_error(payload: bytes) -> Exception:
    try:
        error = decode_exception(payload)
    except MissingTypeError as missing:
        name, message = describe_exception(payload)
        failure = ExecutionFailedError(f"{name}: {message}")
        failure.__cause__ = missing
        return failure
    except PayloadError as damaged:
        failure = ExecutionFailedError(f"its error cannot be read here: {damaged}")
        failure.__cause__ = damaged
        return failure
    return error
