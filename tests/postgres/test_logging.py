"""Lines of workflow code: once each although replayed, with their execution."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import pytest

import stent
from stent import Result, Stent, durable, install_structured_logging

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("programs.batch")
ran: list[int] = []


@durable
async def step(x: int) -> int:
    logger.info("working", extra={"item": x})
    ran.append(x)
    return x


@durable
async def batch(pause: str) -> int:
    logger.info("Progress: %d/%d (%.1f%%)", 1, 3, 33.3, extra={"progress_pct": 33.3})
    first = await step(1)
    logger.info("between")
    await stent.sleep(pause)
    logger.warning("after the pause")
    return first + await step(2)


@pytest.fixture
def _structured() -> Iterator[None]:
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.propagate = [], False
    logger.setLevel(logging.INFO)
    install_structured_logging(logger, json=True)
    ran.clear()
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.usefixtures("_structured")
async def test_lines_appear_once_over_a_hand_over(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second worker replays what the first one logged, in silence."""
    text = ""
    async with Stent.bootstrap(database_url, serve=True) as first:
        identifier = await first.dispatch(batch, "500ms")
        while "between" not in text:
            await asyncio.sleep(0.01)
            text += capsys.readouterr().err
    async with Stent.bootstrap(database_url, serve=True) as second:
        assert await second.wait_for(identifier, "10s") == Result.Ok(3)
    text += capsys.readouterr().err
    written = [json.loads(line) for line in text.splitlines()]
    events = [line["event"] for line in written]
    assert events == [
        "Progress: 1/3 (33.3%)",
        "working",
        "between",
        "after the pause",
        "working",
    ]
    assert all(line["execution_id"] == identifier for line in written)
    assert written[0]["progress_pct"] == 33.3
    assert written[1]["item"] == 1
    assert written[1]["activity"].endswith("step")
    assert written[0]["workflow"].endswith("batch")
