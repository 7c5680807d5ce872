"""What the commands make of states and entries, without a database."""

from __future__ import annotations

import datetime as dt
import json

import pytest

from stent.cli.documents import entry_document, print_json, state_document
from stent.cli.history import sentence
from stent.cli.show import count_calls
from stent.model import Entry, ExecutionState, ExecutionTimes, Kind, Status

AT = dt.datetime(2026, 5, 1, 12, 0, tzinfo=dt.UTC)


def entry(kind: str, address: str | None = None, **detail: object) -> Entry:
    return Entry(position=0, kind=kind, at=AT, address=address, detail=detail)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            entry("call.issued", "a", function="f", arguments=[1, "x"]),
            'f(1, "x")',
        ),
        (entry("call.issued", "a", function="f", child="id"), "f → child id"),
        (
            entry("result.delivered", "a", function="f", ok=True, value={"k": None}),
            'f = {"k": null}',
        ),
        (
            entry("result.delivered", "a", function="f", ok=False, error="E: x"),
            "f ✗ E: x",
        ),
        (
            entry("result.delivered", "a", function="f", ok=True, value=1, attempt=2),
            "f = 1  attempt 2",
        ),
        (entry("told", value="hello"), '= "hello"'),
        (entry("cancel.delivered", reason="timeout"), "reason timeout"),
        (entry("execution.failed", error="E: \x1b[2J\nx"), "E: \\x1b[2J\\nx"),
        (entry("execution.started"), ""),
    ],
)
def test_entries_are_sentences(given: Entry, expected: str) -> None:
    """One line each, with nothing that could drive the terminal."""
    assert sentence(given).plain == expected


def test_long_values_are_cut() -> None:
    """A history stays readable whatever was passed around."""
    line = sentence(entry("told", value="x" * 10_000)).plain
    assert len(line) < 400
    assert line.endswith("…")


def test_calls_are_counted_by_function() -> None:
    """Done, failed, cancelled and open; what is an execution of its own is not here."""
    entries = [
        *(entry("call.issued", f"{n}", function="f") for n in range(5)),
        entry("call.issued", "child", function="g", child="id"),
        entry("result.delivered", "0", function="f", ok=True, value=1),
        entry("result.recorded", "1", function="f", ok=True, value=1),
        entry("result.delivered", "2", function="f", ok=False, error="E"),
        entry("call.settled", "3", function="f"),
        entry("result.delivered", "child", function="g", ok=True, value=1),
    ]
    (calls,) = count_calls(entries)
    assert (calls.function, calls.issued) == ("f", 5)
    assert (calls.done, calls.failed, calls.cancelled, calls.open) == (2, 1, 1, 1)


def test_items_of_maps_count_as_calls() -> None:
    """Those that failed in their page are done when their own call is."""
    pages = [f":map:f#.0[{start}+10]#ab{start}" for start in (0, 10, 20)]
    failed = [f"{pages[0]}/{index}" for index in (3, 4, 5)]
    entries = [entry("call.issued", page, function="f") for page in pages]
    entries += [
        entry("result.delivered", page, function="f", ok=True) for page in pages[:2]
    ]
    entries += [entry("call.issued", item, function="f") for item in failed]
    entries.append(entry("result.delivered", failed[0], function="f", ok=True))
    entries.append(entry("result.recorded", failed[1], function="f", ok=False))
    (calls,) = count_calls(entries)
    assert (calls.issued, calls.done, calls.failed, calls.open) == (30, 18, 1, 11)


def test_documents_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Every instant is ISO 8601, every control character written out."""
    state = ExecutionState(
        id="id",
        function="f\x1b",
        status=Status.RUNNING,
        attempts=1,
        waiting_for=("timer\x7f\x9b",),
        result=None,
        error=None,
        tags=("a",),
        times=ExecutionTimes(created_at=AT),
        kind=Kind.WORKFLOW,
        queue="default",
        priority=0,
    )
    print_json(state_document(state))
    line = capsys.readouterr().out
    assert line.endswith("\n")
    assert line[:-1].isascii()
    assert line[:-1].isprintable()
    document = json.loads(line)
    assert document["function"] == "f\x1b"
    assert document["waiting_for"] == ["timer\x7f\x9b"]
    assert document["created_at"] == "2026-05-01T12:00:00+00:00"
    assert document["finished_at"] is None
    shown = entry_document(entry("told", "a", value=1))
    assert shown["detail"] == {"value": 1}
