"""Why an execution is not done: sentences from rows, without a database."""

from __future__ import annotations

import datetime as dt
from typing import Any
from uuid import UUID

import pytest

from stent.codec import encode, encode_exception
from stent.errors import UsageError
from stent.history.filters import Filter
from stent.history.limits import Held, Limits
from stent.history.waits import NO_WORKER, Pending, Workers, waits_of
from stent.model import Status

NOW = dt.datetime(2026, 5, 1, 12, 0, tzinfo=dt.UTC)
WORKER = UUID("ab12cd34-0000-4000-8000-000000000000")
CALL = UUID(int=77)
LIVE = Workers(frozenset({"default"}), frozenset({WORKER}))
ABLE = Workers(
    frozenset({"default", "gpu"}),
    frozenset({WORKER}),
    {"default": {"tests.fetch"}, "gpu": {"tests.scan"}},
)
UNSURE = Workers.of(
    [
        {"worker_id": WORKER, "state": "running", "queues": queues, "holds": True}
        for queues in (["default"], ["slow"])
    ],
    [
        {"queues": ["default"], "functions": ["tests.fetch"]},
        {"queues": ["slow"], "functions": ["tests.fetch"]},
        {"queues": ["slow"], "functions": None},
    ],
)
NOBODY = Workers(frozenset(), frozenset())


def execution(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "status": "running",
        "kind": "workflow",
        "function": "tests.crawl",
        "queue": "default",
        "attempts": 1,
        "worker_id": WORKER,
        "wake_at": None,
        "wake_is_due": False,
        "deadline_at": None,
        "cancel_reason": None,
        "cancel_by": None,
        "created_at": NOW,
        "blocked_reason": None,
        "limit_key": None,
    }
    return row | changes


def pending(**changes: Any) -> dict[str, Any]:
    return execution(status="pending", worker_id=None, wake_is_due=True, **changes)


def task(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "call_id": CALL,
        "address": ":tests.fetch#00.0",
        "function": "tests.fetch",
        "queue": "default",
        "available_at": NOW,
        "worker_id": None,
        "attempt": 1,
        "limit_key": None,
        "last_error": None,
    }
    return row | changes


def group(count: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "function": "tests.fetch",
        "queue": "default",
        "worker_id": None,
        "retries": False,
        "count": count,
    }
    return row | changes


def waits(
    row: dict[str, Any], found: Pending | None = None, workers: Workers = LIVE
) -> tuple[str, ...]:
    return waits_of(row, found or Pending(), workers, NOW)


def one_task(**changes: Any) -> Pending:
    return Pending(groups=[group(1)], tasks=[task(**changes)])


@pytest.mark.parametrize("status", [s for s in Status if s.terminal])
def test_what_has_ended_waits_for_nothing(status: Status) -> None:
    """Also if rows of it are still around."""
    assert waits(execution(status=status), one_task()) == ()


@pytest.mark.parametrize(
    ("row", "workers", "expected"),
    [
        (pending(), NOBODY, NO_WORKER),
        (pending(queue="gpu"), LIVE, "no worker serves queue 'gpu'"),
        (pending(), LIVE, "a worker of queue 'default'"),
        (
            pending(wake_at=NOW - dt.timedelta(seconds=12)),
            LIVE,
            (
                "a worker of queue 'default' that knows function 'tests.crawl' "
                "and has room, for 12 s"
            ),
        ),
        (
            pending(wake_at=NOW + dt.timedelta(hours=1)),
            LIVE,
            "start at 2026-05-01 13:00:00 UTC",
        ),
        (
            pending(),
            ABLE,
            "no running worker has the function tests.crawl",
        ),
        (
            pending(function="tests.scan"),
            ABLE,
            "no running worker of queue 'default' has the function tests.scan",
        ),
        (pending(function="tests.scan", queue="gpu"), ABLE, "a worker of queue 'gpu'"),
        (pending(queue="slow"), UNSURE, "a worker of queue 'slow'"),
        (
            pending(),
            UNSURE,
            "no running worker of queue 'default' has the function tests.crawl",
        ),
        (pending(cancel_reason="cancel"), LIVE, "asked to stop before it started"),
    ],
)
def test_what_has_not_started(
    row: dict[str, Any], workers: Workers, expected: str
) -> None:
    """It is told whether anybody is there to start it."""
    assert waits(row, workers=workers) == (expected,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "activity tests.fetch (queued)"),
        (
            {"available_at": NOW - dt.timedelta(minutes=5)},
            "activity tests.fetch (queued for 5 min)",
        ),
        (
            {"queue": "gpu"},
            "activity tests.fetch (queued; no worker serves queue 'gpu')",
        ),
        ({"worker_id": WORKER}, "activity tests.fetch (running on worker ab12cd34)"),
        (
            {
                "attempt": 2,
                "available_at": NOW + dt.timedelta(seconds=3),
                "last_error": encode_exception(ValueError("x")),
            },
            "activity tests.fetch (attempt 2 in 3 s; last error ValueError: x)",
        ),
        (
            {
                "attempt": 3,
                "worker_id": WORKER,
                "last_error": encode_exception(ValueError("x")),
            },
            (
                "activity tests.fetch (running on worker ab12cd34, attempt 3; "
                "last error ValueError: x)"
            ),
        ),
        (
            {"address": ":map:tests.fetch#.0[40]#00ff"},
            "page from item 40 of map tests.fetch (queued)",
        ),
    ],
)
def test_a_task_is_named(changes: dict[str, Any], expected: str) -> None:
    """Where it is, which attempt comes when, and what went wrong last."""
    assert waits(execution(), one_task(**changes)) == (expected,)


def test_many_tasks_are_counted() -> None:
    """By function: queued, running where, waiting for another attempt and why."""
    found = Pending(
        groups=[group(12), group(3, worker_id=WORKER), group(2, retries=True)],
        tasks=[task(attempt=2, last_error=encode_exception(ValueError("x")))],
    )
    assert waits(execution(), found) == (
        (
            "activity tests.fetch: 12 tasks queued, 3 running on worker ab12cd34, "
            "2 waiting for another attempt (last error ValueError: x)"
        ),
    )


def limit(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": "function:tests.fetch",
        "max_concurrent": None,
        "rate_per_second": None,
        "burst": None,
        "keyed": False,
        "paused": False,
        "tokens": 0.0,
        "refilled_at": None,
        "closed_until": None,
    }
    return row | changes


def limited(row: dict[str, Any], **changes: Any) -> Limits:
    return Limits(rows={row["name"]: row}, now=NOW, **changes)


WORKERS = [UUID(int=n << 96) for n in range(1, 6)]
FULL = limited(
    limit(max_concurrent=8),
    granted={
        "function:tests.fetch": {
            **{worker: n for n, worker in enumerate(WORKERS)},
            WORKER: 0,
        }
    },
    hosts={WORKERS[4]: "alpha"},
    claimed={("tests.fetch", "default", WORKER): 2},
)
HOLDERS = (
    "slot 10 of 8 held by worker 00000005 on alpha (4), worker 00000004 (3), "
    "worker 00000003 (2) and 1 more"
)
EMPTY = limit(rate_per_second=0.1, burst=2, refilled_at=NOW)
IN_TEN_SECONDS = "no token until 2026-05-01 12:00:10 UTC (6/m burst 2)"


@pytest.mark.parametrize(
    ("found", "limits", "expected"),
    [
        (one_task(), FULL, f"(queued; {HOLDERS})"),
        (
            one_task(worker_id=WORKER),
            FULL,
            f"(next on worker ab12cd34, which has 0 slots for 2 tasks; {HOLDERS})",
        ),
        (
            Pending(groups=[group(3), group(9, worker_id=WORKERS[4])]),
            FULL,
            f": 3 tasks queued, 9 running on worker 00000005, which is gone; {HOLDERS}",
        ),
        (one_task(), limited(EMPTY), f"(queued; {IN_TEN_SECONDS})"),
        (
            one_task(worker_id=WORKER),
            limited(EMPTY),
            f"(running or next on worker ab12cd34; {IN_TEN_SECONDS})",
        ),
        (
            one_task(),
            limited(EMPTY | {"tokens": 1.5}),
            "(queued; at most 6/m burst 2)",
        ),
        (
            one_task(),
            limited(EMPTY | {"refilled_at": NOW - dt.timedelta(seconds=9)}),
            "(queued; no token until 2026-05-01 12:00:01 UTC (6/m burst 2))",
        ),
        (
            one_task(),
            limited(EMPTY | {"closed_until": NOW + dt.timedelta(minutes=5)}),
            (
                "(queued; no token until 2026-05-01 12:05:00 UTC "
                "(an attempt was told to come back later))"
            ),
        ),
        (
            one_task(),
            limited(limit(name="queue:default", paused=True)),
            "(queued; queue 'default' is paused)",
        ),
        (
            one_task(),
            limited(limit(max_concurrent=2, keyed=True)),
            (
                "(queued; no worker claims it: it was called before its function had "
                "a concurrency_key)"
            ),
        ),
        (
            one_task(limit_key="ann"),
            limited(
                limit(max_concurrent=2, keyed=True),
                taken={
                    ("function:tests.fetch", "ann"): Held(
                        2, ("execution one", "execution two")
                    )
                },
            ),
            "(queued; slot 2 of 2 of key 'ann' held by execution one, execution two)",
        ),
    ],
)
def test_limits_are_why(found: Pending, limits: Limits, expected: str) -> None:
    """Who holds the slots, the most first; when there is a token; what is paused."""
    assert waits_of(execution(), found, LIVE, NOW, limits) == (
        f"activity tests.fetch{'' if expected[0] == ':' else ' '}{expected}",
    )


def test_unreadable_errors_are_told_as_such() -> None:
    """A damaged payload hides nothing else."""
    found = one_task(attempt=2, last_error=b"\xff junk")
    (sentence,) = waits(execution(), found)
    assert "activity tests.fetch (attempt 2; last error <unreadable: " in sentence


def test_children_timers_and_inline_calls_are_told() -> None:
    """Everything it waits for, each in a sentence of its own."""
    children = [
        {
            "child_id": UUID(int=n),
            "function": "tests.part",
            "status": "running",
            "total": 7,
        }
        for n in range(5)
    ]
    row = execution(wake_at=NOW + dt.timedelta(minutes=1))
    found = Pending(children=children, inline={CALL: ":tests.fetch#00.0"})
    sentences = waits(row, found)
    assert sentences[0] == "activity tests.fetch (running on worker ab12cd34)"
    assert sentences[1] == f"child {UUID(int=0)} tests.part (running)"
    assert sentences[-2] == "2 more children"
    assert sentences[-1] == "timer until 2026-05-01 12:01:00 UTC"


@pytest.mark.parametrize(
    ("details", "length", "told"),
    [
        (encode({"rows": 41}), 20, 'heartbeat 3 s ago: {"rows": 41}'),
        (encode(None), 1, "heartbeat 3 s ago"),
        (encode("é" * 300), 602, f'heartbeat 3 s ago: "{"é" * 199}…'),
        (None, 70_000, 'heartbeat 3 s ago: "<70000 bytes>"'),
    ],
)
def test_what_an_attempt_said_of_its_progress_is_told(
    details: bytes | None, length: int, told: str
) -> None:
    """Of tasks, of calls beside the workflow, and of an activity of its own."""
    at = NOW - dt.timedelta(seconds=3)
    beats = {CALL: {"recorded_at": at, "payload": details, "length": length}}

    def of_task(**changes: Any) -> str:
        found = Pending(groups=[group(1)], tasks=[task(**changes)], heartbeats=beats)
        (sentence,) = waits(execution(), found)
        return sentence

    running = of_task(worker_id=WORKER)
    assert running == f"activity tests.fetch (running on worker ab12cd34; {told})"
    assert of_task(attempt=2).endswith(f"; {told})")
    inline = {CALL: ":tests.fetch#00.0"}
    assert waits(execution(), Pending(inline=inline, heartbeats=beats)) == (running,)
    (own,) = waits(execution(kind="activity"), Pending(heartbeats=beats))
    assert own == f"its attempt 1, running on worker ab12cd34; {told}"


def test_deadline_is_not_a_timer() -> None:
    """An execution that is only woken for its deadline waits for something else."""
    by = NOW + dt.timedelta(minutes=1)
    (sentence,) = waits(execution(wake_at=by, deadline_at=by))
    assert sentence.startswith("nothing outside of its own code")
    assert sentence.endswith("it ends by 2026-05-01 12:01:00 UTC")


@pytest.mark.parametrize(
    ("row", "workers", "expected"),
    [
        (
            execution(status="blocked", worker_id=None, blocked_reason="no call f"),
            LIVE,
            "blocked until its code changes: no call f",
        ),
        (
            execution(),
            NOBODY,
            f"its worker ab12cd34 is gone; {NO_WORKER}",
        ),
        (
            execution(worker_id=None, wake_is_due=True),
            LIVE,
            "a worker that takes it over",
        ),
        (
            execution(
                status="cancelling",
                cancel_reason="timeout",
                cancel_by=NOW + dt.timedelta(seconds=30),
            ),
            LIVE,
            (
                "its cleanup after being asked to stop (timeout), "
                "until 2026-05-01 12:00:30 UTC at the latest"
            ),
        ),
        (
            execution(wake_is_due=True),
            LIVE,
            "its code, or an activity right beside it, on worker ab12cd34",
        ),
        (
            execution(kind="activity", attempts=2),
            LIVE,
            "its attempt 2, running on worker ab12cd34",
        ),
    ],
)
def test_how_it_stands_is_told(
    row: dict[str, Any], workers: Workers, expected: str
) -> None:
    """Blocked, orphaned, being cleaned up or just running."""
    assert waits(row, workers=workers)[0] == expected


@pytest.mark.parametrize(
    "given",
    [
        {"colour": "red"},
        {"status": "done"},
        {"status": ["running", "done"]},
        {"status": 3},
        {"limit": 0},
        {"limit": 501},
        {"limit": True},
        {"function": 3},
        {"tag": "a\0b"},
        {"before": "yesterday"},
        {"parent": "x' or true --"},
    ],
)
def test_filters_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    """Nothing is guessed and nothing ignored."""
    with pytest.raises(UsageError):
        Filter.read(given)


def test_filters_are_read() -> None:
    """One status or several; ids as text or UUID; None means any."""
    read = Filter.read({"status": ("failed", Status.RUNNING), "root": str(UUID(int=5))})
    assert read.status == (Status.FAILED, Status.RUNNING)
    assert read.root == UUID(int=5)
    assert Filter.read({"status": "failed"}).status == (Status.FAILED,)
    assert Filter.read({"function": None}) == Filter()
