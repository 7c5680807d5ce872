"""Logging: one structure for stdlib and structlog, safe to read, silent in replay."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import io
import json
import logging
import re
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ParamSpec

import pytest
import structlog

import stent.log
from stent.log import (
    ACTIVITY_COMPLETED,
    LogScope,
    drop_replayed,
    get_logger,
    install_structured_logging,
    is_muted,
    log_scope,
    silence_replay,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Parameters = ParamSpec("Parameters")

ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x9b0m\u202egnp\ud800"


def in_fresh_process(test: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Run a test with the logging state of a fresh process; put the old one back.

    Root has no handlers and the level WARNING, and stderr is the test's ``stream``, if
    it has one. Not a fixture: the test runner sets its own handlers and streams anew
    between the fixtures and the test.
    """

    @functools.wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        gc.collect()  # what tests before left may log when it goes
        root = logging.getLogger()
        handlers, level, stderr = root.handlers[:], root.level, sys.stderr
        handle, logger_class = logging.Logger.handle, logging.getLoggerClass()
        sys.stderr = kwargs.get("stream", stderr)
        root.handlers.clear()
        root.setLevel(logging.WARNING)
        structlog.reset_defaults()
        try:
            test(*args, **kwargs)
        finally:
            structlog.reset_defaults()
            structlog.contextvars.clear_contextvars()
            logging.Logger.handle = handle  # type: ignore[method-assign]  # what silence_replay wraps
            logging.setLoggerClass(logger_class)
            root.handlers[:] = handlers
            root.setLevel(level)
            sys.stderr = stderr

    return run


@pytest.fixture
def stream() -> io.StringIO:
    """Return what is written to stderr, which is no terminal."""
    return io.StringIO()


@pytest.fixture
def bare_root() -> logging.Logger:
    """Return the root logger."""
    return logging.getLogger()


class Recorder(logging.Handler):
    """A foreign handler that keeps the records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@contextmanager
def scope(**options: Any) -> Iterator[LogScope]:
    """Enter a scope as the engine does, and leave it."""
    entered = LogScope(**options)
    token = log_scope.set(entered)
    try:
        yield entered
    finally:
        log_scope.reset(token)


def fail_beside_a_secret() -> None:
    """Fail with a local variable that must not be printed."""
    secret = "hunter" + "2"
    raise ValueError(len(secret))


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Read back the JSON lines."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_are_distinct_and_named_noun_past_verb() -> None:
    """Event names are API: two words of lower case letters with a dot, each once."""
    events = [
        value
        for name, value in vars(stent.log).items()
        if re.fullmatch(r"[A-Z][A-Z_]+", name) and isinstance(value, str)
        if name != "TYPE_CHECKING"
    ]
    assert ACTIVITY_COMPLETED in events
    assert len(set(events)) == len(events)
    assert [e for e in events if not re.fullmatch(r"[a-z]+\.[a-z_]+", e)] == []


@in_fresh_process
def test_stdlib_extra_becomes_fields(stream: io.StringIO) -> None:
    """A plain stdlib call comes out as one JSON object with its extra as fields."""
    install_structured_logging(logging.getLogger())
    logging.getLogger("shop").info("Saved %d", 3, extra={"rows": 3, "batch": "a"})
    (line,) = lines(stream)
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() == UTC.utcoffset(
        None
    )
    assert line == {
        "level": "info",
        "logger": "shop",
        "event": "Saved 3",
        "rows": 3,
        "batch": "a",
    }


@in_fresh_process
def test_all_ways_to_log_give_the_same_line(stream: io.StringIO) -> None:
    """stdlib, structlog and the library's own loggers differ in nothing."""
    install_structured_logging()
    logging.getLogger("shop").warning("Saved", extra={"rows": 3})
    structlog.get_logger("shop").warning("Saved", rows=3)
    get_logger("shop").warning("Saved", rows=3)
    first, *others = [{**line, "timestamp": None} for line in lines(stream)]
    assert others == [first, first]


@in_fresh_process
def test_bound_ids_are_on_every_line_and_the_call_wins(stream: io.StringIO) -> None:
    """Scope, then structlog's contextvars, then what the call itself states."""
    install_structured_logging()
    loggers: list[Callable[[], None]] = [
        lambda: logging.getLogger("shop").info("x", extra={"attempt": 3}),
        lambda: structlog.get_logger("shop").info("x", attempt=3),
        lambda: get_logger("shop").info("x", attempt=3),
    ]
    with (
        scope(execution_id="e1", workflow="w", attempt=1),
        structlog.contextvars.bound_contextvars(workflow="inner", worker_id="k"),
    ):
        for log in loggers:
            log()
    logging.getLogger("shop").info("outside")
    for line in lines(stream)[:3]:
        assert (line["execution_id"], line["worker_id"]) == ("e1", "k")
        assert (line["workflow"], line["attempt"]) == ("inner", 3)
    assert "execution_id" not in lines(stream)[3]


@in_fresh_process
def test_field_names_that_stdlib_or_the_line_itself_uses(stream: io.StringIO) -> None:
    """A record attribute keeps its name in the line; canonical keys are not forged."""
    recorder = Recorder()
    logging.getLogger().addHandler(recorder)
    install_structured_logging()
    structlog.get_logger("shop").error("x", filename="a.csv", name="n", level="forged")
    logging.getLogger("shop").error("x", extra={"event": "forged", "timestamp": 0})
    own, plain = lines(stream)
    assert (own["filename"], own["name"], own["logger"]) == ("a.csv", "n", "shop")
    assert (own["level"], own["level_"]) == ("error", "forged")
    assert (plain["event"], plain["event_"], plain["timestamp_"]) == ("x", "forged", 0)
    assert recorder.records[0].__dict__["filename_"] == "a.csv"


@in_fresh_process
def test_another_formatter_leaves_no_trace(stream: io.StringIO) -> None:
    """What a foreign handler's formatter stores in the record is no field."""
    other = logging.StreamHandler(io.StringIO())
    other.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(other)
    install_structured_logging()
    logging.getLogger("shop").warning("x")
    assert set(lines(stream)[0]) == {"timestamp", "level", "logger", "event"}


@in_fresh_process
def test_exception_has_its_traceback_without_locals(stream: io.StringIO) -> None:
    """The traceback is one text field; values of variables are not in it."""
    install_structured_logging(json=True)
    for log in (logging.getLogger("a"), structlog.get_logger("a"), get_logger("a")):
        try:
            fail_beside_a_secret()
        except ValueError:
            log.exception("failed")
    assert len(lines(stream)) == 3
    for line in lines(stream):
        assert "ValueError: 7" in line["exception"]
        assert "in fail_beside_a_secret" in line["exception"]
    assert "hunter2" not in stream.getvalue()


@in_fresh_process
def test_console_prints_no_locals_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The people's format takes a plain traceback, over several lines."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    install_structured_logging()
    try:
        fail_beside_a_secret()
    except ValueError:
        logging.getLogger("a").exception("failed")
    assert "ValueError: 7\n" in terminal.getvalue() + "\n"
    assert "Logging error" not in terminal.getvalue()
    assert "hunter2" not in terminal.getvalue()


@in_fresh_process
def test_terminal_gets_the_console_and_anything_else_json(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream decides, the argument overrides, and no colours go into a file."""
    terminal = Terminal()
    install_structured_logging()
    logging.getLogger("a").info("x")
    assert lines(stream)[0]["event"] == "x"
    install_structured_logging(json=False)
    logging.getLogger("a").info("y", extra={"rows": 3})
    last = stream.getvalue().splitlines()[-1]
    assert re.search(r"\[info *\] y +\[a\] rows=3", last)
    monkeypatch.setattr(sys, "stderr", terminal)
    logging.getLogger().handlers.clear()
    install_structured_logging()
    logging.getLogger("a").info("z")
    assert "\x1b[" in terminal.getvalue()
    install_structured_logging(json=True)
    logging.getLogger("a").info("q")
    assert json.loads(terminal.getvalue().splitlines()[-1])["event"] == "q"


HOSTILE = {
    "text": ESCAPES,
    "nested": {"list": [ESCAPES, {"key" + ESCAPES: (ESCAPES,)}]},
    "object": type("Hostile", (), {"__repr__": lambda _: ESCAPES})(),
    "path": PurePosixPath("/a\x1b[0m"),
    "key\x1b[0m": 1,
}


@pytest.mark.parametrize("as_json", [True, False])
@in_fresh_process
def test_control_characters_become_visible_escapes(
    stream: io.StringIO,
    as_json: bool,
) -> None:
    """No escape sequence survives in message, name, key, value, object or error."""
    install_structured_logging(json=as_json)
    logging.getLogger(f"shop{ESCAPES}").info("x%s", ESCAPES, extra=HOSTILE)
    error = ValueError(ESCAPES)
    structlog.get_logger("shop").error("failed", exc_info=error, **HOSTILE)
    written = stream.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", written)
    assert "owned" in written
    if as_json:
        line = lines(stream)[0]
        assert line["text"].startswith("\\x1b]0;owned\\x07")
        assert line["nested"]["list"][0] == line["text"]
        assert line["object"] == line["text"]
        assert line["key\\x1b[0m"] == 1


@in_fresh_process
def test_line_breaks_cannot_forge_a_line(stream: io.StringIO) -> None:
    """On the console a value stays on its line; JSON keeps the break inside."""
    forged = "x\n2025-01-01 [info] forged"
    install_structured_logging(json=False)
    logging.getLogger("a").info(forged, extra={"field": forged})
    assert len(stream.getvalue().splitlines()) == 1
    install_structured_logging(json=True)
    logging.getLogger("a").info(forged)
    assert json.loads(stream.getvalue().splitlines()[1])["event"] == forged
    assert len(stream.getvalue().splitlines()) == 2


@in_fresh_process
def test_every_value_can_be_written(stream: io.StringIO) -> None:
    """What JSON lacks becomes text, bytes a length; no value breaks the line."""
    endless: list[object] = []
    endless.append(endless)
    install_structured_logging()
    logging.getLogger("a").info(
        "x",
        extra={
            "at": datetime(2025, 1, 1, tzinfo=UTC),
            "payload": b"secret",
            "infinite": float("inf"),
            "endless": endless,
            "many": {1, 2},
            "flag": True,
            "nothing": None,
            "keys": {(1, 2): 3},
        },
    )
    line = lines(stream)[0]
    assert line["at"] == "2025-01-01 00:00:00+00:00"
    assert line["payload"] == "<6 bytes>"
    assert line["infinite"] == "inf"
    assert sorted(line["many"]) == [1, 2]
    assert (line["flag"], line["nothing"]) == (True, None)
    assert line["keys"] == {"(1, 2)": 3}
    assert "[...]" in json.dumps(line["endless"])


@in_fresh_process
def test_installing_twice_changes_nothing(
    stream: io.StringIO, bare_root: logging.Logger
) -> None:
    """One handler, one line a call, and one wrapper around the stdlib method."""
    install_structured_logging()
    wrapped = logging.Logger.handle
    install_structured_logging()
    install_structured_logging()
    assert logging.Logger.handle is wrapped
    assert len(bare_root.handlers) == 1
    structlog.get_logger("a").info("once")
    assert len(lines(stream)) == 1


@in_fresh_process
def test_foreign_handlers_stay(
    stream: io.StringIO,
    bare_root: logging.Logger,
    tmp_path: Any,
) -> None:
    """A recorder and a file keep their places and formats, and still get the event."""
    recorder = Recorder()
    file = logging.FileHandler(tmp_path / "plain.log")
    file.setFormatter(logging.Formatter("plain %(message)s"))
    bare_root.handlers[:] = [recorder, file]
    bare_root.setLevel(logging.INFO)
    install_structured_logging()
    assert bare_root.handlers[:2] == [recorder, file]
    with scope(execution_id="e1"):
        structlog.get_logger("a").info("event", rows=3)
    file.close()
    assert (tmp_path / "plain.log").read_text() == "plain event\n"
    attributes = recorder.records[0].__dict__
    assert (attributes["rows"], attributes["execution_id"]) == (3, "e1")
    assert len(lines(stream)) == 1


@in_fresh_process
def test_console_handler_of_the_program_is_adopted(
    stream: io.StringIO, bare_root: logging.Logger
) -> None:
    """After basicConfig a line appears once, structured, not twice."""
    logging.basicConfig(level=logging.INFO, stream=stream)
    (before,) = bare_root.handlers
    install_structured_logging(bare_root)
    logging.getLogger("a").info("x", extra={"rows": 3})
    assert bare_root.handlers == [before]
    assert [line["rows"] for line in lines(stream)] == [3]


@in_fresh_process
def test_level_that_somebody_chose_stays(
    stream: io.StringIO, bare_root: logging.Logger
) -> None:
    """Only stdlib's untouched default is lowered to INFO."""
    bare_root.setLevel(logging.ERROR)
    install_structured_logging()
    logging.getLogger("a").warning("x")
    structlog.get_logger("a").warning("x")
    assert stream.getvalue() == ""
    bare_root.handlers[:] = [Recorder()]
    bare_root.setLevel(logging.WARNING)
    install_structured_logging()
    structlog.get_logger("a").info("x")
    assert stream.getvalue() == ""
    bare_root.handlers.clear()
    bare_root.setLevel(logging.DEBUG)
    install_structured_logging()
    structlog.get_logger("a").debug("y")
    assert [line["event"] for line in lines(stream)] == ["y"]


@in_fresh_process
def test_logger_class_of_the_program_stays() -> None:
    """Installing does not replace the class that the program gave its loggers."""

    class OwnLogger(logging.Logger):
        pass

    logging.setLoggerClass(OwnLogger)
    install_structured_logging()
    assert logging.getLoggerClass() is OwnLogger


@in_fresh_process
def test_record_names_its_caller(bare_root: logging.Logger) -> None:
    """The line number is that of the call, not of structlog, for every way to log."""
    recorder = Recorder()
    bare_root.addHandler(recorder)
    install_structured_logging(logging.getLogger("elsewhere"))
    logging.getLogger("a").warning("x")
    get_logger("a").warning("x")
    structlog.get_logger("a").warning("x")
    get_logger("a").exception("x")
    caller = "test_record_names_its_caller"
    assert [record.funcName for record in recorder.records] == [caller] * 4


@in_fresh_process
def test_library_logger_needs_no_configuration(
    bare_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unconfigured, nothing reaches stdout; configured, facts are attributes."""
    log = get_logger("stent.test")
    log.info(ACTIVITY_COMPLETED, attempt=1)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    recorder = Recorder()
    bare_root.addHandler(recorder)
    bare_root.setLevel(logging.INFO)
    log.bind(queue="default").info(ACTIVITY_COMPLETED, attempt=1)
    (record,) = recorder.records
    assert record.getMessage() == ACTIVITY_COMPLETED
    assert (record.__dict__["attempt"], record.__dict__["queue"]) == (1, "default")


@in_fresh_process
def test_replay_is_silent_in_loggers_the_program_configures(
    bare_root: logging.Logger,
) -> None:
    """Nothing is installed, and the handler is added after the engine has started."""
    silence_replay()
    recorder = Recorder()
    bare_root.addHandler(recorder)
    adapter = logging.LoggerAdapter(logging.getLogger("a"), {"key": 1})
    with scope(execution_id="e1", muted=True) as entered:
        logging.getLogger("a").error("replayed")
        adapter.error("replayed")
        get_logger("a").error("replayed")
        assert is_muted()
        entered.muted = False
        logging.getLogger("a").error("live")
        assert not is_muted()
    logging.getLogger("a").error("outside")
    assert [record.msg for record in recorder.records] == ["live", "outside"]


@in_fresh_process
def test_replay_is_silent_in_structlog_without_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Structlog's default prints to stdout itself; that is muted as well."""
    bound_before = structlog.get_logger().bind(rows=3)
    silence_replay()
    with scope(muted=True):
        structlog.get_logger().info("replayed")
        bound_before.info("replayed")
    structlog.get_logger().info("live")
    assert capsys.readouterr().out.count("replayed") == 0
    assert structlog.get_config()["processors"].count(drop_replayed) == 1


@in_fresh_process
def test_replay_is_silent_in_structlog_as_the_program_configured_it() -> None:
    """A pipeline of the program's own, given as a tuple, keeps its processors."""
    kept: list[str] = []

    def keep(_: object, __: str, event_dict: structlog.typing.EventDict) -> str:
        kept.append(event_dict["event"])
        return ""

    structlog.configure(processors=(keep,))
    silence_replay()
    silence_replay()
    with scope(muted=True):
        structlog.get_logger().info("replayed")
    structlog.get_logger().info("live")
    assert kept == ["live"]


@in_fresh_process
def test_replay_is_silent_once_installed(
    stream: io.StringIO, bare_root: logging.Logger
) -> None:
    """Installing alone is enough, whichever way the workflow logs."""
    install_structured_logging(bare_root)
    with scope(muted=True):
        logging.getLogger("a").info("replayed")
        structlog.get_logger("a").info("replayed")
        get_logger("a").info("replayed")
    assert stream.getvalue() == ""


@in_fresh_process
def test_muting_reaches_all_tasks_of_one_execution_and_nobody_else(
    bare_root: logging.Logger,
) -> None:
    """Contexts copied before the switch see it; other executions and threads do not."""
    silence_replay()
    recorder = Recorder()
    bare_root.addHandler(recorder)
    replayed, live = LogScope(execution_id="e1"), LogScope(execution_id="e2")

    async def child(name: str, switched: asyncio.Event) -> None:
        await switched.wait()
        logging.getLogger("a").error(name)

    async def main() -> None:
        switched = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name, entered in (("replayed", replayed), ("live", live)):
                context = contextvars.copy_context()
                context.run(log_scope.set, entered)
                group.create_task(child(name, switched), context=context)
            await asyncio.sleep(0)
            replayed.muted = True
            switched.set()

    asyncio.run(main())
    with scope(muted=True):
        thread = threading.Thread(target=logging.getLogger("a").error, args=("thread",))
        thread.start()
        thread.join()
    assert sorted(record.msg for record in recorder.records) == ["live", "thread"]
