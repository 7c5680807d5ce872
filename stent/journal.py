"""Entry types of the journal, and the journal of one execution.

A workflow advances in turns. The owner first commits what it is about to deliver
(results, time, cancellation) and only then hands it to the code, one delivery at a
time; what the code decides is committed with the next turn. So whatever a workflow has
ever seen can be handed over again, in the same order, by anyone.

Turn ``k`` therefore records the deliveries of step ``k`` and the decisions made by the
code while it consumed the deliveries of turn ``k - 1``. A later turn's presence proves
that the decisions of all earlier ones are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

import msgspec

from stent.model import Recorded

CancelReason = Literal["cancel", "timeout", "parent"]


class ResultDelivered(msgspec.Struct, array_like=True, tag="r", frozen=True, gc=False):
    """A result was handed over; its bytes are in ``results`` under ``address``."""

    address: str
    at: int
    """Owner's estimate of database time, microseconds since 1970, never decreasing."""


class TimeAdvanced(msgspec.Struct, array_like=True, tag="t", frozen=True, gc=False):
    """Timers due at or before ``at`` fired."""

    at: int


class CancelDelivered(msgspec.Struct, array_like=True, tag="x", frozen=True, gc=False):
    """The root task was cancelled."""

    reason: CancelReason
    at: int


Delivery = ResultDelivered | TimeAdvanced | CancelDelivered


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """One journal entry: decisions of the code so far, then the next deliveries.

    Attributes:
        deliveries: In the order in which the code sees them.
        inline: Addresses of calls the owner runs itself that have no result yet.
        settled: Addresses of calls cancelled by the code; never delivered.
        told: Addresses of ``tell`` records written.
        edited: The code digest under which an edited workflow was accepted.
        took: How long pages of maps took whose results are delivered, by address, in
            microseconds; the sizes of later pages follow from it.
    """

    deliveries: tuple[Delivery, ...] = msgspec.field(default=(), name="d")
    inline: tuple[str, ...] = msgspec.field(default=(), name="i")
    settled: tuple[str, ...] = msgspec.field(default=(), name="c")
    told: tuple[str, ...] = msgspec.field(default=(), name="l")
    edited: str | None = msgspec.field(default=None, name="e")
    took: dict[str, int] | None = msgspec.field(default=None, name="p")


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Turn)


def encode_turn(turn: Turn) -> bytes:
    """The bytes of a turn, plain JSON so that SQL can read it."""
    return _encoder.encode(turn)


def decode_turn(data: bytes) -> Turn:
    """The turn in ``data``; raises ``msgspec.ValidationError`` when it is corrupt."""
    return _decoder.decode(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is fixed when an execution starts."""

    execution_id: UUID
    function: str
    arguments: bytes
    started_at: int
    """Microseconds since 1970, database time of the first claim."""
    seed: bytes
    """Source of ``random`` and ``uuid``."""
    key_seed: UUID
    """Source of idempotency keys; the execution's id unless it is a fork."""
    root_id: UUID
    parent_id: UUID | None = None
    depth: int = 0
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Everything needed to bring an execution back to where it was.

    Attributes:
        head: What was fixed at the start.
        code_digest: Digest of the module under which the turns were recorded.
        turns: In order.
        results: Committed outcomes by address, delivered or not.
        issued: Addresses with a task row, a child execution or a result.
    """

    head: Head
    code_digest: str
    turns: Sequence[Turn] = ()
    results: Mapping[str, Recorded] = field(default_factory=dict)
    issued: frozenset[str] = frozenset()
