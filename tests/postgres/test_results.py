"""What wait_for, result_of and handles answer, and what crosses as a result."""

from __future__ import annotations

import asyncio
import pickle
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

import stent
from stent import Result, Stent, durable

if TYPE_CHECKING:
    from asyncpg import Connection

UNKNOWN = "01890000-0000-7000-8000-000000000000"


class UpstreamError(Exception):
    """Raised by the activities of this module."""

    def __init__(self, code: int, *, url: str) -> None:
        super().__init__(f"{code} from {url}")
        self.code = code
        self.url = url


@durable
async def echo(value: Any) -> Any:
    return value


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return exploded.append, ("boom",)


exploded: list[str] = []


@durable
async def nap(duration: str) -> str:
    await stent.sleep(duration)
    return "awake"


@durable(retry=1)
async def upstream() -> None:
    try:
        raise KeyError("token")
    except KeyError as error:
        failure = UpstreamError(503, url="http://example.test")
        failure.add_note("while calling upstream")
        raise failure from error


@durable
async def relay() -> str:
    try:
        await upstream()
    except UpstreamError as error:
        return f"{error.code} {error.url} {error.__notes__} {error.__cause__!r}"
    return "nothing"


@durable(retry=1)
async def grouped() -> None:
    raise ExceptionGroup("several", [ValueError("one"), UpstreamError(1, url="u")])


@durable
async def relay_group() -> list[str]:
    found: list[str] = []
    try:
        await grouped()
    except* ValueError as values:
        found = [repr(e) for e in values.exceptions]
    except* UpstreamError as errors:
        found = [repr(e) for e in errors.exceptions]
    return found


@durable
async def business(ok: bool) -> Result[int, str]:
    return Result.Ok(1) if ok else Result.Error("not today")


@durable(retry=3)
async def open_socket(count: int) -> Any:
    opened.append(count)
    left, right = socket.socketpair()
    left.close()
    right.close()
    return {"rows": [1, left]}


opened: list[int] = []


async def test_plain_values_and_results(database_url: str) -> None:
    """A plain value is Ok, a returned Result is itself."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        assert await app.wait_for(await app.dispatch(echo, {"a": (1, None)})) == (
            Result.Ok({"a": (1, None)})
        )
        assert await app.wait_for(await app.dispatch(business, True)) == Result.Ok(1)
        denied = await app.dispatch(business, False)
        assert await app.wait_for(denied) == Result.Error("not today")
        assert await business(False) == Result.Error("not today")
        assert await echo(3) == 3


@pytest.mark.parametrize("codec", [b"", b"\x01", b"\x07"])
async def test_unreadable_outcome_is_an_answer(
    database_url: str, connection: Connection, codec: bytes
) -> None:
    """An outcome that cannot be decoded is an Error, never a hang, never executed."""
    exploded.clear()
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(echo, 1)
        await app.wait_for(identifier, "10s")
        await connection.execute(
            "update stent.results set payload = $1", codec + pickle.dumps(Exploding())
        )
        outcome = await app.wait_for(identifier, "10s")
        assert isinstance(outcome.error, stent.PayloadError)
        assert await echo("others are answered") == "others are answered"
    assert exploded == []


async def test_exceptions_keep_cause_notes_and_attributes(database_url: str) -> None:
    """Across an activity and across a workflow."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        text = (await app.wait_for(await app.dispatch(relay), "10s")).unwrap()
        assert text == (
            "503 http://example.test ['while calling upstream'] KeyError('token')"
        )
        outcome = await app.wait_for(await app.dispatch(upstream), "10s")
        assert isinstance(outcome.error, UpstreamError)
        assert outcome.error.code == 503
        assert isinstance(outcome.error.__cause__, KeyError)


async def test_exception_groups_keep_their_structure(database_url: str) -> None:
    """`except*` sees the members."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(relay_group), "10s")
        assert "UpstreamError" in outcome.unwrap()[0]
        plain = await app.wait_for(await app.dispatch(grouped), "10s")
        assert isinstance(plain.error, ExceptionGroup)
        assert [type(e) for e in plain.error.exceptions] == [ValueError, UpstreamError]


async def test_result_that_cannot_be_stored_names_its_path(database_url: str) -> None:
    """It fails once, not retried, and says where the value is."""
    opened.clear()
    async with Stent.bootstrap(database_url, serve=True) as app:
        outcome = await app.wait_for(await app.dispatch(open_socket, 1), "10s")
    assert isinstance(outcome.error, stent.PayloadError)
    assert "result" in str(outcome.error)
    assert "rows" in str(outcome.error)
    assert opened == [1]


async def test_argument_that_cannot_be_stored_leaves_no_row(
    database_url: str, connection: Connection
) -> None:
    """It is refused at the call site."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        with pytest.raises(stent.PayloadError, match=r"args\[0\]"):
            await app.dispatch(echo, lambda: None)
    assert await connection.fetchval("select count(*) from stent.executions") == 0


@pytest.mark.parametrize("timeout", ["50ms", 0.05, 1e-3])
async def test_wait_for_gives_up_and_the_execution_goes_on(
    database_url: str, timeout: str | float
) -> None:
    """Its timeout is a TimeoutError; the execution can be waited for again."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(nap, "400ms")
        with pytest.raises(TimeoutError, match=identifier):
            await app.wait_for(identifier, timeout)
        assert await app.wait_for(identifier, 10) == Result.Ok("awake")


async def test_result_of_before_and_after(database_url: str) -> None:
    """Without waiting: an error before, the outcome after."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        identifier = await app.dispatch(nap, "200ms")
        with pytest.raises(stent.ExecutionNotFinishedError):
            await app.result_of(identifier)
        await app.wait_for(identifier, "10s")
        assert await app.result_of(identifier) == Result.Ok("awake")


@pytest.mark.parametrize("identifier", [UNKNOWN, "not an id", ""])
async def test_unknown_ids(database_url: str, identifier: str) -> None:
    """Every question about an unknown execution says that there is none."""
    async with Stent(database_url) as app:
        for question in (app.wait_for, app.result_of, app.cancel):
            with pytest.raises(stent.ExecutionNotFoundError):
                await question(identifier)


async def test_many_wait_for_one(database_url: str) -> None:
    """Everybody who waits gets the same outcome, from this process or another."""
    async with (
        Stent.bootstrap(database_url, serve=True) as app,
        Stent(database_url) as other,
    ):
        identifier = await app.dispatch(nap, "100ms")
        outcomes = await asyncio.gather(
            *[
                one.wait_for(identifier, "10s")
                for one in (app, other)
                for _ in range(20)
            ]
        )
    assert set(map(repr, outcomes)) == {repr(Result.Ok("awake"))}


async def test_busy_client_also_hears_of_what_others_dispatched(
    database_url: str,
) -> None:
    """A stream of own hints does not keep a foreign execution from being noticed."""
    async with (
        Stent.bootstrap(database_url, serve=True) as worker,
        Stent(database_url) as client,
    ):
        foreign = await worker.dispatch(nap, "100ms")
        waiting = asyncio.ensure_future(client.wait_for(foreign, "10s"))
        while not waiting.done():
            await client.wait_for(await client.dispatch(echo, 1), "10s")
        assert await waiting == Result.Ok("awake")


async def test_closing_tells_those_who_wait(database_url: str) -> None:
    """Nobody hangs on an app that is closed."""
    app = await Stent(database_url)
    identifier = await app.dispatch(nap, "1h")
    waiting = asyncio.ensure_future(app.wait_for(identifier))
    while not app._outcomes or not app._outcomes._waiters:  # noqa: ASYNC110 - the state of others
        await asyncio.sleep(0)
    await app.close()
    with pytest.raises(stent.UsageError, match="closed"):
        await waiting


async def test_handle(database_url: str) -> None:
    """A handle answers for its execution."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        handle = await nap.start("50ms")
        assert await handle.result("10s") == "awake"
        assert await handle.status() is stent.Status.COMPLETED
        assert not await handle.cancel()
        same = app.handle(handle.id)
        assert await same.result() == "awake"


@dataclass(frozen=True)
class Refused(Exception):  # noqa: N818 - as users name them
    code: int


@durable(retry=1)
async def refuses(code: int) -> int:
    raise Refused(code)


@durable
async def meets_refusal(code: int) -> int:
    try:
        return await refuses(code)
    except Refused as error:
        return error.code


async def test_frozen_exceptions_are_met_as_they_are(database_url: str) -> None:
    """By the workflow and by who waits, while a worker runs in the same process."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        met = await app.wait_for(await app.dispatch(meets_refusal, 7), "15s")
        assert met.unwrap() == 7
        ended = await app.wait_for(await app.dispatch(refuses, 8), "15s")
        assert ended.error == Refused(8)
        assert len(app._workers) == 1


async def test_damaged_outcome_reaches_its_waiter_alone(
    database_url: str, connection: Connection
) -> None:
    """A client that waits for others goes on."""
    async with Stent.bootstrap(database_url, serve=True) as app:
        bad, good = [await app.dispatch(refuses, n) for n in (1, 2)]
        await app.wait_for(bad, "15s")
        await app.wait_for(good, "15s")
    await connection.execute(
        "update stent.results set payload = '\\x01ff' where execution_id = $1",
        UUID(bad),
    )
    async with Stent(database_url) as app:
        outcomes = await asyncio.gather(
            app.wait_for(bad, "15s"), app.wait_for(good, "15s")
        )
    assert "cannot be read" in str(outcomes[0].error)
    assert outcomes[1].error == Refused(2)
