"""Python values <-> bytes at the durable boundary."""

from __future__ import annotations

from stent.codec.convert import convert_plain
from stent.codec.names import MissingTypeError, import_name
from stent.codec.payload import (
    PAYLOAD_BYTES_MAX,
    decode,
    decode_arguments,
    decode_exception,
    decode_many,
    describe_exception,
    digest,
    encode,
    encode_arguments,
    encode_exception,
    encode_many,
    join_payloads,
    traceback_of,
)
from stent.codec.plain import to_plain

__all__ = [
    "PAYLOAD_BYTES_MAX",
    "MissingTypeError",
    "convert_plain",
    "decode",
    "decode_arguments",
    "decode_exception",
    "decode_many",
    "describe_exception",
    "digest",
    "encode",
    "encode_arguments",
    "encode_exception",
    "encode_many",
    "import_name",
    "join_payloads",
    "to_plain",
    "traceback_of",
]
