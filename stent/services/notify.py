"""Tells systemd how the service is, over its datagram socket.

The protocol of ``sd_notify(3)``: lines of ``NAME=value`` in one datagram to the socket
that ``NOTIFY_SOCKET`` names; a leading ``@`` stands for the abstract name space.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import anyio

from stent.log import get_logger
from stent.settings import ServiceManager

log = get_logger(__name__)

CHECK_SECONDS = 0.2
"""How often it is looked whether the service has become ready."""


class Notifier:
    """Tells a service manager when the service is ready, alive and stopping."""

    def __init__(
        self, manager: ServiceManager, look: Callable[[], dict[str, Any]]
    ) -> None:
        """Create it.

        Args:
            manager: To be told.
            look: How things are now: as ``health_facts`` has it.
        """
        self._manager = manager
        self._look = look
        self._refused = False
        self.stopping = False

    async def run(self) -> None:
        """Say READY=1 once it is, and WATCHDOG=1 while it lives; until cancelled."""
        try:
            await self._tell()
        finally:
            # A drain with nothing to wait for is over before the next look.
            self.tell_stopping()

    async def _tell(self) -> None:
        watchdog = self._manager.watchdog
        beat_seconds = watchdog.total_seconds() / 2 if watchdog is not None else None
        ready, since_beat = False, 0.0
        while True:
            facts = self._look()
            if facts["ready"] and not ready:
                ready = True
                self.send("READY=1", "STATUS=working")
            elif ready and _is_ending(facts):
                self.tell_stopping()
            if beat_seconds is not None and since_beat <= 0:
                since_beat = beat_seconds
                if facts["live"]:
                    self.send("WATCHDOG=1")
            pause = min(CHECK_SECONDS, beat_seconds or CHECK_SECONDS)
            since_beat -= pause
            await anyio.sleep(pause)

    def tell_stopping(self) -> None:
        """Say STOPPING=1, the first time only."""
        if not self.stopping:
            self.stopping = True
            self.send("STOPPING=1", "STATUS=finishing what runs")

    def send(self, *lines: str) -> None:
        """Send one datagram; who does not listen is no reason to stop working."""
        address = self._manager.address
        if address.startswith("@"):
            address = "\0" + address[1:]
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
            ) as channel:
                channel.settimeout(0)
                channel.connect(address)
                channel.send("\n".join(lines).encode())
        except OSError as error:
            if not self._refused:
                log.warning("systemd.unreachable", error=str(error))
            self._refused = True


def _is_ending(facts: dict[str, Any]) -> bool:
    """Whether all workers drain: an operator may have asked them from afar."""
    states = {one["state"] for one in facts["workers"]}
    return bool(states) and states <= {"draining", "stopped"}
