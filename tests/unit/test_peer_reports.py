"""What a comparison with others says: figures, and reasons where there are none."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.figures import Table, percentile
from benchmarks.peers.catalogue import JOBS_ONLY, OWN, PEERS
from benchmarks.peers.environments import NotInstalledError, install
from benchmarks.peers.report import COLUMNS, Row, table, write

FLOORS = {"F1": 20_000.0, "F2": 0.5}
SVG = "{http://www.w3.org/2000/svg}"


def measured(value: float) -> dict[str, object]:
    return {"value": value, "unit": "/s", "runs": 3}


def own_row() -> Row:
    figures = {column.id: measured(1000.0) for column in COLUMNS}
    return Row(OWN, "3.11", FLOORS, figures)


def test_a_figure_stands_beside_its_floor() -> None:
    """A cell has the figure and its ratio to the floor of the same line."""
    line = table([own_row()]).splitlines()[2]
    assert "1,000 (0.05)" in line
    assert "20,000" in line
    assert "0.50" in line


def test_what_is_missing_is_told() -> None:
    """Without a figure there is a dash and a reason, never a number."""
    row = Row(PEERS[0], problem="it cannot be installed: no such thing")
    text = table([own_row(), row])
    line = next(one for one in text.splitlines() if one.startswith("| DBOS"))
    assert not any(cell.strip()[:1].isdigit() for cell in line.split("|")[2:])
    assert "not measured in full: it cannot be installed: no such thing" in text


def test_a_job_queue_has_no_workflows() -> None:
    """Its line says so where a workflow would be measured."""
    (peer,) = [peer for peer in PEERS if peer.key == "oban"]
    assert peer.note == JOBS_ONLY
    row = Row(peer, "3.12", FLOORS, {"J1": measured(2000.0)})
    line = table([row]).splitlines()[2]
    assert line.count("no workflows") == len(COLUMNS) - 1
    assert "2,000 (0.1)" in line


def test_the_files_hold_the_same_figures(tmp_path: Path) -> None:
    """The picture is well-formed and has a bar for each figure; JSON has the plan."""
    row = Row(PEERS[0], problem="it <broke> & stopped")
    write([own_row(), row], tmp_path, {"runs": 3})
    picture = ElementTree.parse(tmp_path / "peers.svg")
    bars = [bar for bar in picture.iter(f"{SVG}rect") if bar.get("rx")]
    assert len(bars) == len(COLUMNS)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts.count("not measured") == len(COLUMNS)
    stored = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert stored["plan"] == {"runs": 3}
    assert [peer["problem"] for peer in stored["peers"]] == ["", row.problem]


def test_a_peer_without_its_python_is_refused(tmp_path: Path) -> None:
    """Nothing is made for a peer whose Python is not there."""
    newest = (sys.version_info[0], 99)
    with pytest.raises(NotInstalledError, match=r"needs Python 3\.99 or newer"):
        install(replace(PEERS[0], python=newest), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_line_without_a_figure_is_never_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It neither passes nor fails, and says why it is empty."""
    lines = Table()
    lines.miss("W8", "two fleets through pgbouncer", "no pgbouncer here")
    lines.add("W1", "gather", 50.0, "/s", ("F1", 100.0), least=0.6)
    lines.print()
    assert lines.missed
    printed = capsys.readouterr().out
    assert "not measured: no pgbouncer here" in printed
    assert "0.5 of F1" in printed
    assert "MISSED" in printed


def test_nothing_measured_has_no_percentile() -> None:
    """An empty list is an error, not a zero."""
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    with pytest.raises(ValueError, match="nothing was measured"):
        percentile([], 0.99)
