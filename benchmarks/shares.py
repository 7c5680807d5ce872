"""A share of a processor for some processes, by the control groups of Linux.

Where there are few processors, more workers soon fill them all, and whether they help
each other cannot be seen. With a quarter of a processor for each of them there are
eight of these on two real ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import asyncpg

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 10_000
REMOVE_SECONDS_MAX = 5.0


class SharesUnavailableError(Exception):
    """This machine, or this user, cannot limit processes."""


class Share:
    """Processes that have no more than a share of a processor, together."""

    def __init__(self, processors: float, root: Path = ROOT) -> None:
        """Make the group; ``close`` removes it.

        Args:
            processors: How much they have: 0.25 is a quarter of one.
            root: Where the control groups are.

        Raises:
            SharesUnavailableError: There are none here, or they may not be changed.
        """
        self.processors = processors
        self._groups: list[Path] = []
        name = f"stent-bench-{uuid4().hex[:8]}"
        # In the first version limits and counts may be hierarchies of their own.
        unified = not (root / "cpu").exists()
        places = [root] if unified else sorted({root / "cpu", root / "cpuacct"})
        try:
            if unified:
                (root / "cgroup.subtree_control").write_text("+cpu")
            for place in places:
                group = place / name
                group.mkdir()
                self._groups.append(group)
            limited = self._groups[0]
            quota = int(processors * PERIOD_US)
            if unified:
                (limited / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            else:
                (limited / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (limited / "cpu.cfs_quota_us").write_text(str(quota))
        except OSError as error:
            self.close()
            message = f"no control groups that may be changed: {error}"
            raise SharesUnavailableError(message) from error
        self._unified = unified

    def add(self, pids: Iterable[int]) -> None:
        """Limit these processes, their threads, and what they start from now on."""
        for pid in pids:
            for group in self._groups:
                # One that has ended meanwhile needs no limit.
                with suppress(ProcessLookupError):
                    (group / "cgroup.procs").write_text(str(pid))

    @property
    def used_seconds(self) -> float:
        """Of processor time, so far."""
        if not self._unified:
            text = (self._groups[-1] / "cpuacct.usage").read_text(encoding="ascii")
            return int(text) / 1e9
        lines = (self._groups[0] / "cpu.stat").read_text(encoding="ascii").split("\n")
        counts = dict(line.split(" ", 1) for line in lines if line)
        return int(counts["usage_usec"]) / 1e6

    def close(self) -> None:
        """Let them have what they want again, and remove the group."""
        for group in self._groups:
            _empty(group)
            deadline = time.monotonic() + REMOVE_SECONDS_MAX
            while True:
                try:
                    group.rmdir()
                    break
                except OSError:
                    # What has just left it is still counted for a moment.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        self._groups.clear()


def _empty(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text(encoding="ascii").split():
        with suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(pid)


@contextmanager
def share(processors: float) -> Iterator[Share]:
    """A group that is removed at the end; see ``Share``."""
    made = Share(processors)
    try:
        yield made
    finally:
        made.close()


async def server_pids(url: str) -> list[int]:
    """All processes of the server of ``url``, which runs on this machine."""
    connection = await asyncpg.connect(url)
    try:
        backend: int = await connection.fetchval("select pg_backend_pid()")
        parents = dict(_parents())
    finally:
        await connection.close()
    server = parents.get(backend)
    if server is None or not _is_postgres(server):
        message = "the server is not on this machine"
        raise SharesUnavailableError(message)
    return [server, *(pid for pid, parent in parents.items() if parent == server)]


def _is_postgres(pid: int) -> bool:
    name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8")
    return name.startswith("postgres")


def _parents() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of them
        with suppress(OSError):
            if name.isdigit():
                stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8")
                yield int(name), int(stat.rpartition(")")[2].split()[1])
