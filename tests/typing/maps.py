"""Read by type checkers only: each line that says so is wrong, all others are right."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

import stent
from stent import Stent, durable


@durable
async def fetch(number: int) -> str:
    return str(number)


@durable(retry=3)
def resize(path: str, width: int = 100) -> float:
    return width / len(path)


@durable
async def store(name: str, size: int, tags: list[str]) -> None: ...


@durable
async def child(number: int) -> str:
    return await fetch(number)


async def plain(number: int) -> str:
    return str(number)


def numbers() -> Iterator[int]:
    yield 1


async def stream() -> AsyncIterator[int]:
    yield await child(1) == ""


@durable
async def right() -> None:
    assert_type(await stent.map(fetch, [1, 2]), list[str])
    assert_type(await stent.map(fetch, range(3), concurrency=5), list[str])
    assert_type(await stent.map(fetch, numbers(), chunk=10), list[str])
    assert_type(await stent.map(fetch, stream(), chunk="auto"), list[str])
    assert_type(await stent.map(fetch, {1: "a"}.keys()), list[str])
    assert_type(await Stent.map(fetch, [True]), list[str])
    assert_type(await fetch.map(n for n in range(3)), list[str])
    assert_type(await fetch.options(queue="slow").map({1, 2}), list[str])
    assert_type(await resize.map(["a"]), list[float])
    assert_type(await child.map([1], concurrency=None), list[str])
    kept = await fetch.map([1], return_exceptions=True)
    assert_type(kept, list[str | BaseException])
    assert_type(
        await stent.map(fetch, [1], return_exceptions=True), list[str | BaseException]
    )
    assert_type([k for k in kept if not isinstance(k, BaseException)], list[str])
    assert_type(await stent.starmap(resize, [("a", 1)]), list[float])
    assert_type(await resize.starmap([("a", 1)], concurrency=2), list[float])
    assert_type(await store.starmap([("a", 1, ["b"])]), list[None])
    pairs = resize.starmap([("a", 1)], return_exceptions=True)
    assert_type(await pairs, list[float | BaseException])


@durable
async def mistaken() -> None:
    await stent.map(fetch, ["a"])  # wrong: an item
    await stent.map(plain, [1])  # wrong: not durable
    await stent.map(fetch, 5)  # wrong: nothing to iterate
    await stent.map(store, ["a"])  # wrong: more parameters than one
    await stent.map(fetch, [1], concurrency="5")  # wrong: a number
    await fetch.map(["a"])  # wrong: an item
    await fetch.map(stream(), concurrency=2.5)  # wrong: a whole number
    await fetch.map([1], chunk="some")  # wrong: a number or "auto"
    await fetch.map([None])  # wrong: an item
    await stent.starmap(resize, [("a", "b")])  # wrong: the second argument
    await resize.starmap([("a", 1, 2)])  # wrong: one too many
    await store.starmap([("a", 1)])  # wrong: one is missing
    await resize.starmap(["a"])  # wrong: no tuple
    numbers_of: list[int] = await fetch.map([1])  # wrong: the result
    texts: list[str] = await fetch.map([1], return_exceptions=True)  # wrong: exceptions
    del numbers_of, texts
