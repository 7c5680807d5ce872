"""What a worker and the processes of its pool say to each other.

Over one socket pair: four bytes of length, then a msgpack array that begins with the
name of the frame. Arguments, results and details are payloads of the codec; nothing
that arrives is ever executed or imported, except the names that the worker itself
takes from its own functions.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

LENGTH = struct.Struct("!I")


class Setup(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The worker's first frame.

    Attributes:
        main: The program: a module's name (``python -m``) or a file, and the name
            under which others import it; None where it cannot be imported.
        modules: To import at once: where hooks are.
        log_level: Below it nothing is sent.
        structured: structlog is configured to use stdlib logging.
        payload_bytes_max: Limit of a result.
    """

    main: Main | None
    modules: tuple[str, ...]
    log_level: int
    structured: bool
    payload_bytes_max: int


class Main(msgspec.Struct, array_like=True, frozen=True):
    """The program that the worker runs."""

    name: str
    file: str | None


class Call(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Run a function.

    Attributes:
        module: That defines it.
        function: Its durable name.
        arguments: Encoded.
        now: Database time in seconds, and ``time.monotonic()`` then: the clock is the
            same in all processes of a machine.
        heartbeat: Of an earlier attempt.
        announce: Say when the function begins: its module may have to be imported.
    """

    module: str
    function: str
    arguments: bytes
    now: tuple[float, float]
    key: str
    execution_id: str
    root_id: str
    parent_id: str | None
    attempt: int
    address: str
    tags: tuple[str, ...]
    heartbeat: bytes | None
    announce: bool = True


class Stop(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """End in an orderly way."""


class Started(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The function's own code begins."""


class Told(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """It called ``tell``."""

    payload: bytes


class Beat(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """It called ``heartbeat``."""

    payload: bytes


class Logged(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A log record, as the worker shall handle it."""

    record: dict[str, Any]


class Ended(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The outcome: an encoded value, or an encoded exception.

    Attributes:
        retry_later_seconds: It called ``retry_later``: there is no outcome.
    """

    ok: bool
    payload: bytes
    retry_later_seconds: float | None = None


ToChild = Setup | Call | Stop
FromChild = Started | Told | Beat | Logged | Ended

_encoder = msgspec.msgpack.Encoder()
to_child = msgspec.msgpack.Decoder(ToChild)
from_child = msgspec.msgpack.Decoder(FromChild)


def framed(frame: ToChild | FromChild) -> bytes:
    """The bytes of a frame, length first."""
    body = _encoder.encode(frame)
    return LENGTH.pack(len(body)) + body
