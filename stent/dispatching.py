"""Inserts executions: in batches, each of them once, whatever answers are lost."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import anyio

from stent.clock import DatabaseClock, new_execution_id
from stent.codec import digest, encode_arguments
from stent.errors import IdempotencyConflictError, StoreError, UsageError
from stent.registry import DurableFunction, Options
from stent.replay import check_arguments
from stent.services.options import store_options
from stent.store.store import NewExecution, Store

DISPATCH_ITEMS_MAX = 2000
"""Executions of one transaction."""
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.02, 1.0
"""Between two tries while the database is away."""
_NO_PARTITION = "23514"
_DUPLICATE_ID = "23505"


@dataclass(slots=True)
class _Dispatch:
    new: NewExecution
    done: asyncio.Future[str]


class Dispatcher:
    """Dispatches for one app, over its connection."""

    def __init__(
        self,
        store: Store,
        client_id: UUID,
        clock: DatabaseClock,
        *,
        payload_bytes_max: int,
        on_inserted: Callable[[Sequence[NewExecution]], None],
    ) -> None:
        """Create it.

        Args:
            store: Over the app's connection.
            client_id: Told of the ends of what is dispatched.
            clock: Of the database, for ids.
            payload_bytes_max: Of an argument list.
            on_inserted: Told what is stored.
        """
        self._store = store
        self._client_id = client_id
        self._clock = clock
        self._payload_bytes_max = payload_bytes_max
        self._on_inserted = on_inserted
        self._queue: list[_Dispatch] = []
        self._task: asyncio.Task[None] | None = None

    def prepare(
        self,
        function: DurableFunction[Any, Any],
        options: Options,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        execution_id: UUID | None = None,
    ) -> NewExecution:
        """The row of a call.

        Raises:
            PayloadError: An argument cannot be stored; names its path.
            UsageError: The arguments do not fit the function.
        """
        if function.given:
            function.refuse_activity_options()
        check_arguments(function, args, kwargs)
        arguments = encode_arguments(
            tuple(args), kwargs, bytes_max=self._payload_bytes_max
        )
        options = function.keyed(options, args, kwargs)
        return NewExecution(
            execution_id=execution_id or new_execution_id(self._clock.timestamp()),
            function=function.name,
            kind=function.kind,
            queue=options.queue,
            priority=options.priority,
            delay=options.delay or dt.timedelta(0),
            duration=options.max_duration,
            seed=os.urandom(16),
            dispatch_key=options.dispatch_key,
            digest=digest(arguments),
            options=store_options(options, function),
            arguments=arguments,
            tags=options.tags,
        )

    async def dispatch(self, new: NewExecution) -> str:
        """Join the next batch: concurrent dispatches share one transaction.

        Returns:
            The execution's id; that of an earlier one with the same dispatch key.

        Raises:
            IdempotencyConflictError: The dispatch key was used for something else.
            StoreError: The database refuses it, or is away.
        """
        loop = asyncio.get_running_loop()
        entry = _Dispatch(new, loop.create_future())
        self._queue.append(entry)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._insert_batches())
        return await entry.done

    async def _insert_batches(self) -> None:
        while self._queue:
            batch = self._queue[:DISPATCH_ITEMS_MAX]
            del self._queue[:DISPATCH_ITEMS_MAX]
            try:
                await self._insert_batch(batch)
            except asyncio.CancelledError:
                _fail(batch, UsageError("the app was closed during the dispatch"))
                raise
            except Exception as error:  # noqa: BLE001 - each dispatcher gets it
                if len(batch) == 1 or getattr(error, "retryable", False):
                    _fail(batch, error)
                else:
                    # One is to blame: the others shall not share its error.
                    await self._insert_each(batch)

    async def _insert_each(self, batch: list[_Dispatch]) -> None:
        for entry in batch:
            try:
                await self._insert_batch([entry])
            except Exception as error:  # noqa: BLE001 - its dispatcher gets it
                _fail([entry], error)

    async def _insert_batch(self, batch: list[_Dispatch]) -> None:
        inserted = await self.insert([entry.new for entry in batch])
        taken = [entry for entry in batch if entry.new.execution_id not in inserted]
        for entry in batch:
            if entry.new.execution_id in inserted and not entry.done.done():
                entry.done.set_result(str(entry.new.execution_id))
        if taken:
            await self._resolve_keys(taken)

    async def insert(self, new: list[NewExecution]) -> set[UUID]:
        """Insert; find out what happened when the answer is lost."""
        pause = PAUSE_SECONDS_MIN
        wanted = new
        known: set[UUID] = set()
        while True:
            try:
                inserted = await self._store.dispatch(wanted, self._client_id)
            except StoreError as error:
                state = getattr(error.__cause__, "sqlstate", None)
                if state == _NO_PARTITION:
                    await self._store.ensure_partitions([self._clock.now()])
                    continue
                if not error.retryable and state != _DUPLICATE_ID:
                    raise
                await anyio.sleep(pause)
                pause = min(pause * 2, PAUSE_SECONDS_MAX)
                try:
                    rows = await self._store.outcomes([one.execution_id for one in new])
                except StoreError as again:
                    if not again.retryable:
                        raise
                    continue
                known = {row["execution_id"] for row in rows}
                wanted = [one for one in new if one.execution_id not in known]
                if not wanted:
                    inserted = set()
                    break
                continue
            break
        found = inserted | known
        self._on_inserted([one for one in new if one.execution_id in found])
        return found

    async def _resolve_keys(self, entries: list[_Dispatch]) -> None:
        """A dispatch key that exists leads to its execution, or is a conflict."""
        keys = [cast("str", entry.new.dispatch_key) for entry in entries]
        rows = {
            row["dispatch_key"]: row
            for row in await self._store.find_dispatch_keys(keys)
        }
        for entry in entries:
            if entry.done.done():
                continue
            new, row = entry.new, rows.get(cast("str", entry.new.dispatch_key))
            if row is None:
                message = f"dispatch of {new.function} was not stored"
                entry.done.set_exception(StoreError(message, retryable=True))
            elif (row["function"], row["digest"]) == (new.function, new.digest):
                entry.done.set_result(str(row["execution_id"]))
            else:
                message = (
                    f"dispatch key {new.dispatch_key!r} belongs to execution "
                    f"{row['execution_id']} of {row['function']} with other arguments"
                )
                entry.done.set_exception(IdempotencyConflictError(message))

    async def close(self) -> None:
        """Fail what has not been inserted."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        queue, self._queue = self._queue, []
        _fail(queue, UsageError("the app was closed during the dispatch"))


def _fail(entries: Iterable[_Dispatch], error: Exception) -> None:
    for entry in entries:
        if not entry.done.done():
            entry.done.set_exception(error)
