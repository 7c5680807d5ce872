"""The benchmarks run, on little work: a workload that breaks is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM_SECONDS = 100


def run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    # 1: a ratio was missed, which on a busy machine says nothing.
    assert done.returncode in {0, 1}, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.timeout(PROGRAM_SECONDS)
def test_small_workloads_run(tmp_path: Path, database_url: str) -> None:
    """A journal is replayed, sleepers are counted; every figure is there."""
    path = tmp_path / "figures.json"
    small = ["--runs", "1", "--entries", "50", "--sleepers", "30", "--idle", "0.5"]
    run(
        "benchmarks",
        *["--only", "W11,W12", *small, "--url", database_url, "--json", str(path)],
    )
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    assert {figure["id"] for figure in figures} == {"F1", "F2", "F3", "W11", "W12"}
    assert any("journal of 50 entries" in figure["what"] for figure in figures)
    assert all(figure["value"] > 0 for figure in figures)


@pytest.mark.timeout(PROGRAM_SECONDS)
def test_the_comparison_runs(tmp_path: Path, database_url: str) -> None:
    """The line of stent is measured in full, by the program that others have, too."""
    run(
        "benchmarks.peers",
        *["--only", "own", "--runs", "1", "--scale", "0.02", "--seconds", "5"],
        *["--results", str(tmp_path), "--url", database_url],
    )
    stored = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    (own,) = stored["peers"]
    assert own["problem"] == ""
    assert set(own["figures"]) == {"W1", "W3", "W4", "W5", "J1"}
    assert set(own["floors"]) == {"F1", "F2"}
