"""Programs in the shape people write them: batches, rounds, stages, progress."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import stent
from stent import Result, Stent

logger = logging.getLogger(__name__)
attempts: dict[int, int] = {}
cleaned: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    attempts.clear()
    cleaned.clear()


class RejectedItemError(ValueError):
    """Raised by the activities of this module."""


@Stent.durable(retry=1)
async def process_item(item_id: int, factor: int = 2) -> dict[str, Any]:
    if item_id % 10 == 3:
        raise RejectedItemError(f"item {item_id} is bad")
    return {"id": item_id, "value": item_id * factor}


@Stent.durable
async def process_all(item_ids: list[int]) -> dict[str, Any]:
    tasks = []
    for item_id in item_ids:
        tasks.append(process_item(item_id, factor=3))  # noqa: PERF401 - as people write it
    results = await asyncio.gather(*tasks, return_exceptions=True)
    succeeded, errors = [], []
    for item_id, result in zip(item_ids, results, strict=True):
        if isinstance(result, Exception):
            errors.append(
                {
                    "id": item_id,
                    "error": str(result),
                    "error_type": type(result).__name__,
                }
            )
        else:
            succeeded.append(result)
    return {
        "total": len(item_ids),
        "succeeded": len(succeeded),
        "failed": len(errors),
        "results": succeeded,
        "errors": errors,
    }


@Stent.durable()
async def process_in_chunks(
    item_ids: list[int], chunk_size: int = 4, delay_between_batches: str = "10ms"
) -> Result[dict[str, Any], str]:
    total_chunks = (len(item_ids) + chunk_size - 1) // chunk_size
    done: list[Any] = []
    failed = 0
    for chunk_num in range(total_chunks):
        chunk = item_ids[chunk_num * chunk_size : (chunk_num + 1) * chunk_size]
        logger.info(
            "chunk", extra={"operation": "batch_start", "batch_size": len(chunk)}
        )
        results = await asyncio.gather(
            *[process_item(i) for i in chunk], return_exceptions=True
        )
        failed += sum(isinstance(r, Exception) for r in results)
        done += [r for r in results if not isinstance(r, Exception)]
        logger.info("Progress: %d/%d", len(done) + failed, len(item_ids))
        if chunk_num < total_chunks - 1:
            await Stent.sleep(delay_between_batches)
    success_rate = len(done) / len(item_ids)
    if success_rate < 0.5:
        return Result.Error(f"Too many failures: {failed}/{len(item_ids)}")
    return Result.Ok({"total": len(item_ids), "succeeded": len(done)})


@Stent.durable
async def parse(number: int) -> int:
    return number + 1


@Stent.durable
async def map_many(count: int) -> list[int]:
    return await Stent.map(parse, list(range(count)))


@Stent.durable(retry=1)
async def flaky(item: int) -> int:
    attempts[item] = attempts.get(item, 0) + 1
    if attempts[item] <= item % 4:
        raise ConnectionError(f"{item} is not there yet")
    return item


@Stent.durable
async def with_retry_rounds(
    items: list[int], max_retries: int = 2, wait: str = "10ms"
) -> dict[str, Any]:
    left, results = list(items), {}
    for attempt in range(max_retries + 1):
        outcomes = await asyncio.gather(
            *[flaky(item) for item in left], return_exceptions=True
        )
        failed = []
        for item, outcome in zip(left, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failed.append(item)
            else:
                results[item] = outcome
        left = failed
        if not left or attempt == max_retries:
            break
        await Stent.sleep(wait)
    return {
        "results": results,
        "errors": [{"id": i, "error": "Max retries exceeded"} for i in left],
    }


@Stent.durable(retry=1)
async def extract(source: int) -> dict[str, int]:
    if source == 2:
        raise OSError("no such source")
    return {"source": source}


@Stent.durable
async def transform(record: dict[str, int]) -> dict[str, int]:
    return {**record, "square": record["source"] ** 2}


@Stent.durable
async def load(record: dict[str, int]) -> str:
    return f"loaded {record['source']}={record['square']}"


@Stent.durable
async def summarize(lines: list[str]) -> str:
    return "; ".join(lines)


@Stent.durable
async def etl(sources: list[int]) -> Result[dict[str, Any], str]:
    extracted = [
        r
        for r in await asyncio.gather(
            *[extract(s) for s in sources], return_exceptions=True
        )
        if not isinstance(r, BaseException)
    ]
    if not extracted:
        return Result.Error("All extractions failed")
    transformed = await asyncio.gather(*[transform(r) for r in extracted])
    loaded = await asyncio.gather(*[load(r) for r in transformed])
    return Result.Ok(
        {
            "original_count": len(sources),
            "extracted": len(extracted),
            "transformed": len(transformed),
            "loaded": len(loaded),
            "summary": await summarize(list(loaded)),
        }
    )


@Stent.durable
async def clean_up(name: str) -> str:
    cleaned.append(name)
    return name


@Stent.durable(retry=1)
async def work(fail: bool) -> str:
    if fail:
        raise RejectedItemError("no")
    return "done"


@Stent.durable
async def with_cleanup(name: str, fail: bool, sleep: str | None = None) -> str:
    try:
        if sleep is not None:
            await Stent.sleep(sleep)
        return await work(fail)
    finally:
        try:
            await clean_up(name)
            await work(fail=True)
        except RejectedItemError:
            logger.warning("clean-up failed")


async def test_gather_returns_exceptions_in_place(database_url: str) -> None:
    """Failures keep their place, class name and message."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        ids = list(range(25))
        outcome = await app.wait_for(await app.dispatch(process_all, ids), "15s")
    report = outcome.unwrap()
    assert (report["total"], report["succeeded"], report["failed"]) == (25, 22, 3)
    assert report["errors"][0] == {
        "id": 3,
        "error": "item 3 is bad",
        "error_type": "RejectedItemError",
    }
    assert [r["id"] for r in report["results"]] == [i for i in ids if i % 10 != 3]
    assert report["results"][4] == {"id": 5, "value": 15} or report["results"][4] == {
        "id": 4,
        "value": 12,
    }


async def test_chunked_loop_with_pauses(database_url: str) -> None:
    """Chunks with durable pauses from a str parameter; the Result is the outcome."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        good = await app.dispatch(process_in_chunks, list(range(10)), chunk_size=3)
        bad = await app.dispatch(
            process_in_chunks, [3, 13, 23], delay_between_batches="1ms"
        )
        assert (await app.wait_for(good, "15s")) == Result.Ok(
            {"total": 10, "succeeded": 9}
        )
        assert (await app.wait_for(bad, "15s")) == Result.Error(
            "Too many failures: 3/3"
        )


async def test_map_keeps_the_order_of_its_items(database_url: str) -> None:
    """Results stand where their items stood, over several pages."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(map_many, 3000), "15s")
    assert outcome.unwrap() == list(range(1, 3001))


async def test_rounds_retry_only_what_failed(database_url: str) -> None:
    """Each round takes the survivors of the last one; the rest is reported."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(
            await app.dispatch(with_retry_rounds, [0, 1, 2, 3, 4]), "15s"
        )
    report = outcome.unwrap()
    assert report["results"] == {0: 0, 1: 1, 2: 2, 4: 4}
    assert report["errors"] == [{"id": 3, "error": "Max retries exceeded"}]
    assert attempts == {0: 1, 1: 2, 2: 3, 3: 3, 4: 1}


async def test_stages_pass_on_what_succeeded(database_url: str) -> None:
    """Extract, transform, load and a fan-in over the results."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        report = (
            await app.wait_for(await app.dispatch(etl, [1, 2, 3]), "15s")
        ).unwrap()
        assert report == {
            "original_count": 3,
            "extracted": 2,
            "transformed": 2,
            "loaded": 2,
            "summary": "loaded 1=1; loaded 3=9",
        }
        nothing = await app.wait_for(await app.dispatch(etl, [2]), "15s")
        assert nothing == Result.Error("All extractions failed")


@pytest.mark.parametrize("fail", [False, True])
async def test_finally_may_await_durable_calls(database_url: str, fail: bool) -> None:
    """Clean-up runs after success and failure; what it swallows stays swallowed."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(with_cleanup, "a", fail), "15s")
    assert cleaned == ["a"]
    if fail:
        assert isinstance(outcome.error, RejectedItemError)
    else:
        assert outcome == Result.Ok("done")


async def test_finally_runs_after_a_cancel(database_url: str) -> None:
    """A cancelled workflow still cleans up, and ends as cancelled."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(with_cleanup, "b", False, "1h")
        await _until_running(app, identifier)
        assert await app.cancel(identifier)
        outcome = await app.wait_for(identifier, "10s")
    assert isinstance(outcome.error, stent.ExecutionCancelledError)
    assert cleaned == ["b"]


async def test_finally_runs_after_a_timeout(database_url: str) -> None:
    """So does one that ran longer than max_duration."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(
            with_cleanup, "c", False, "1h", max_duration="200ms"
        )
        outcome = await app.wait_for(identifier, "10s")
    assert isinstance(outcome.error, stent.ExecutionTimedOutError)
    assert cleaned == ["c"]


async def _until_running(app: Stent, execution_id: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(app.url)
    try:
        sql = "select status from stent.executions where execution_id = $1"
        while await connection.fetchval(sql, execution_id) != "running":  # noqa: ASYNC110 - the state of others
            await asyncio.sleep(0.01)
    finally:
        await connection.close()
