"""Shares of processors: who is in a group has its limit, and nothing of it stays."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.shares import ROOT, Share, SharesUnavailableError

BURNS = """\
import sys, time
sys.stdin.readline()
while time.process_time() < 0.5: pass
sys.stdin.read()
"""


@pytest.fixture
def quarter() -> Iterator[Share]:
    try:
        made = Share(0.25)
    except SharesUnavailableError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def groups_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")


def test_a_process_is_in_the_group_until_it_is_closed(quarter: Share) -> None:
    """What it uses is counted; closing lets it go on without the limit."""
    with subprocess.Popen(
        [sys.executable, "-c", BURNS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        before = groups_of(process.pid)
        quarter.add([process.pid])
        (name,) = set(re.findall(r"stent-bench-\w+", groups_of(process.pid)))
        used = quarter.used_seconds
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None and quarter.used_seconds - used < 0.04:
            continue
        quarter.close()
        assert groups_of(process.pid) == before
        process.stdin.close()
        assert process.wait() == 0
    assert not list(ROOT.glob(f"**/{name}"))


def test_where_groups_may_not_be_made_it_says_so(tmp_path: Path) -> None:
    """Nobody is limited by half."""
    with pytest.raises(SharesUnavailableError, match="no control groups"):
        Share(0.25, root=tmp_path / "nowhere")
