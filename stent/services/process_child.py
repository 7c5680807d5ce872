"""The program of a process of ``pool="process"``: runs one call after the other.

It is started with the worker's path for imports and one end of a socket pair. The main
thread reads calls and runs the functions; a second one only waits for the worker's end
to be closed. When it is, because the worker was killed, this process kills itself and
all that its code has started.
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import importlib
import importlib.util
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, cast

from stent import hooks
from stent.codec import (
    MissingTypeError,
    decode_arguments,
    encode,
    encode_exception,
)
from stent.context import HEARTBEAT_BYTES_MAX, Current, context_scope
from stent.errors import RetryLaterSignal, UsageError
from stent.log import LogScope, bound_fields, log_scope, use_stdlib_logging
from stent.model import Kind
from stent.registry import (
    DurableFunction,
    Process,
    catalogue,
    context_caller,
)
from stent.services.activity_code import ActivityCode
from stent.services.forks import EndingWithTheCode
from stent.services.process_frames import (
    LENGTH,
    Beat,
    Call,
    Ended,
    FromChild,
    Logged,
    Main,
    Setup,
    Started,
    Stop,
    ToChild,
    Told,
    framed,
    to_child,
)

BEAT_SECONDS = 0.1
"""Heartbeats are sent no more often."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(descriptor: int) -> None:
    """Serve the worker at the other end until it says stop, or is gone."""
    for number in _IGNORED:
        # What is sent to a whole terminal or service is for the worker, which drains.
        # A handler, unlike SIG_IGN, is not inherited by programs started from here.
        signal.signal(number, _ignore)
    link = Link(socket.socket(fileno=descriptor))
    threading.Thread(target=link.watch, name="stent-watch", daemon=True).start()
    _Child(link).serve()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the user's code must not keep it alive.
    os._exit(0)


def _ignore(_number: int, _frame: object) -> None:
    """Nothing."""


class Link:
    """The connection to the worker; every thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._sending = threading.RLock()
        self._process = os.getpid()

    def send(self, frame: FromChild) -> None:
        """Send one frame; a process forked from this one stays silent."""
        if os.getpid() == self._process:
            with self._sending:
                self._connection.sendall(framed(frame))

    def receive(self) -> ToChild:
        """The next frame."""
        header = self._stream.read(LENGTH.size)
        if len(header) < LENGTH.size:
            self._end()
        (length,) = LENGTH.unpack(header)
        frame: ToChild = to_child.decode(self._stream.read(length))
        return frame

    def watch(self) -> None:
        """Wait for the worker to be gone, however busy the main thread is."""
        hang_up = select.poll()
        hang_up.register(self._connection, 0)
        hang_up.poll()
        self._end()

    def _end(self) -> None:
        """Whatever runs here is run by another worker."""
        os.killpg(self._process, signal.SIGKILL)


class _Child:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._hooked = False
        setup = link.receive()
        if not isinstance(setup, Setup):
            message = f"the first frame is {type(setup).__name__}"
            raise TypeError(message)
        self._setup = setup

    def serve(self) -> None:
        """One call after the other."""
        _send_logs(self._link, self._setup)
        while True:
            frame = self._link.receive()
            if isinstance(frame, Call):
                self._answer(frame)
            elif isinstance(frame, Stop):
                self._stop()
                return

    def _answer(self, call: Call) -> None:
        try:
            self._start()
            function = self._find(call)
            args, kwargs = self._decode(call, function)
        except BaseException as error:  # noqa: BLE001 - modules may raise anything
            self._link.send(Ended(ok=False, payload=encode_exception(error)))
            return
        scope = ChildScope(call, self._link)
        context = contextvars.Context()
        if call.announce:
            self._link.send(Started())
        ended = context.run(self._run, scope, function.function, args, kwargs)
        scope.close()
        self._link.send(ended)

    def _run(
        self,
        scope: ChildScope,
        function: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> Ended:
        context_caller.set(cast("Any", scope))
        context_scope.set(scope)
        log_scope.set(LogScope(**scope.log_fields()))
        try:
            with EndingWithTheCode(os.getpid()):
                value = function(*args, **kwargs)
            bytes_max = self._setup.payload_bytes_max
            payload = encode(value, path="result", bytes_max=bytes_max)
        except RetryLaterSignal as later:
            seconds = later.delay_seconds
            return Ended(ok=False, payload=b"", retry_later_seconds=seconds)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: the code's outcome
            return Ended(ok=False, payload=encode_exception(error))
        return Ended(ok=True, payload=payload)

    def _start(self) -> None:
        """Once: import where hooks are, and call them."""
        if self._hooked:
            return
        for name in self._setup.modules:
            self._import(name)
        for name, hook in list(hooks.of_children.start.items()):
            try:
                hook()
            except Exception as error:
                raise hooks.start_failed(name, error) from error
        self._hooked = True

    def _stop(self) -> None:
        if not self._hooked:
            return
        for name, hook in reversed(list(hooks.of_children.stop.items())):
            hooks.call_stop(name, hook)

    def _find(self, call: Call) -> DurableFunction[Any, Any]:
        known = catalogue.find(call.function)
        if known is None:
            self._import(call.module)
            known = catalogue.find(call.function)
        if known is None:
            message = (
                f"a process cannot find {call.function}: importing {call.module} does "
                "not define it (register instances where a module is imported)"
            )
            raise UsageError(message)
        return known

    def _decode(
        self, call: Call, function: DurableFunction[Any, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        try:
            return decode_arguments(call.arguments, function.function)
        except MissingTypeError:
            # A class of the program itself, for a function from elsewhere.
            if self._setup.main is None or self._setup.main.name in sys.modules:
                raise
            self._import("__main__")
            return decode_arguments(call.arguments, function.function)

    def _import(self, name: str) -> None:
        """Import a module as the worker did; the program under its import name."""
        Process.importing = name
        try:
            if name != "__main__":
                importlib.import_module(name)
            elif self._setup.main is None:
                message = (
                    "a process cannot import what was typed into an interactive "
                    'session: put functions of pool="process" into a file'
                )
                raise UsageError(message)
            else:
                _import_main(self._setup.main)
        finally:
            Process.importing = None


def _import_main(program: Main) -> ModuleType:
    if program.name in sys.modules:
        return sys.modules[program.name]
    if program.file is None:
        return importlib.import_module(program.name)
    spec = importlib.util.spec_from_file_location(program.name, program.file)
    if spec is None or spec.loader is None:
        message = f"a process cannot import the program {program.file}"
        raise UsageError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[program.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[program.name]
        raise
    return module


class ChildScope(ActivityCode):
    """What an activity's code may call in a process; see ``context.Scope``."""

    def __init__(self, call: Call, link: Link) -> None:
        self._call = call
        self._link = link
        self._beat: bytes | None = None
        self._beats = threading.Event()
        self._beating: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def log_fields(self) -> dict[str, Any]:
        """Of every line."""
        call = self._call
        return {
            "execution_id": call.execution_id,
            "activity": call.function,
            "attempt": call.attempt,
        }

    def current(self) -> Current:
        """This attempt."""
        call = self._call
        return Current(
            execution_id=call.execution_id,
            root_id=call.root_id,
            parent_id=call.parent_id,
            function=call.function,
            kind=Kind.ACTIVITY,
            attempt=call.attempt,
            address=call.address,
            tags=call.tags,
            heartbeat_payload=call.heartbeat,
        )

    def idempotency_key(self) -> str:
        """Made by the worker."""
        return self._call.key

    def now(self) -> dt.datetime:
        """Database time."""
        seconds, then = self._call.now
        now = seconds + time.monotonic() - then
        return dt.datetime.fromtimestamp(now, tz=dt.UTC)

    def tell(self, value: object) -> None:
        """Written by the worker, with the outcome."""
        self._link.send(Told(encode(value, path="told value")))

    def heartbeat(self, details: object) -> None:
        """Sent to the worker now, or a moment later."""
        payload = encode(
            details, path="heartbeat details", bytes_max=HEARTBEAT_BYTES_MAX
        )
        with self._lock:
            if self._closed:
                message = "the attempt has ended"
                raise asyncio.CancelledError(message)
            self._beat = payload
            if self._beating is None:
                self._beating = threading.Thread(target=self._send_beats, daemon=True)
                self._beating.start()
        self._beats.set()

    def _send_beats(self) -> None:
        while not self._closed:
            self._beats.wait()
            self._beats.clear()
            try:
                self._send_beat()
            except OSError:
                return  # the worker is gone, and this process ends for that, too
            time.sleep(BEAT_SECONDS)

    def _send_beat(self) -> None:
        with self._lock:
            payload, self._beat = self._beat, None
            if payload is not None:
                self._link.send(Beat(payload))

    def close(self) -> None:
        """The function has ended: send what is left."""
        self._send_beat()
        with self._lock:
            self._closed = True
        self._beats.set()

    def raise_if_cancelled(self, wait: dt.timedelta | None) -> None:
        """A process is killed instead."""
        if wait is not None:
            time.sleep(wait.total_seconds())

    def start(
        self,
        function: DurableFunction[Any, Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> NoReturn:
        """It has no connection to do so."""
        del args, kwargs
        self._refuse(f"starts {function.name}")

    def sleep(self, duration: dt.timedelta) -> NoReturn:
        """An activity waits by itself."""
        del duration
        self._refuse("calls stent.sleep; use time.sleep")

    def run(
        self,
        function: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> NoReturn:
        """An activity runs things directly."""
        del function, args, kwargs
        self._refuse("calls stent.run; call the function directly")

    def transaction(self) -> NoReturn:
        """It has no connection to the worker's database."""
        self._refuse("opens stent.transaction()")

    def _refuse(self, what: str) -> NoReturn:
        message = (
            f"the activity {self._call.function} {what}: a function of "
            'pool="process" only computes; do this in a workflow, or in an activity '
            "that is async def"
        )
        raise UsageError(message)


_SENT_AS_IT_IS = (str, int, float, bool, type(None))
_UNSENT = frozenset({"args", "exc_info", "msg"})


def _send_logs(link: Link, setup: Setup) -> None:
    """Let the worker handle the records, as it was configured to."""
    root = logging.getLogger()
    root.handlers[:] = [_Sender(link)]
    root.setLevel(setup.log_level)
    if setup.structured:
        use_stdlib_logging()


class _Sender(logging.Handler):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record with its message and traceback as text."""
        try:
            facts = {**bound_fields(), **vars(record)}
            sent = {
                name: value if isinstance(value, _SENT_AS_IT_IS) else repr(value)
                for name, value in facts.items()
                if name not in _UNSENT
            }
            sent["msg"] = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                sent["exc_text"] = self._formatter.formatException(record.exc_info)
            self._link.send(Logged(sent))
        except Exception:  # noqa: BLE001 - the way of all handlers
            self.handleError(record)
