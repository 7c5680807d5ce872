"""Type checkers accept right uses of map and report wrong ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "tests" / "typing" / "maps.py"
PYRIGHTS = ("pyright", "basedpyright")


def wrong_lines() -> set[int]:
    lines = SAMPLE.read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if "# wrong:" in line}


@pytest.mark.timeout(180)
def test_mypy_tells_right_from_wrong(tmp_path: Path) -> None:
    """Under --strict it finds every mistake of the sample, and nothing else."""
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict"]
    command += ["--python-version=3.11", f"--cache-dir={tmp_path}"]
    command += ["--ignore-missing-imports", "--follow-imports=silent"]
    command += ["--no-error-summary", "--hide-error-context", str(SAMPLE)]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert found.returncode == 1, found.stdout + found.stderr
    lines = {
        int(line.split(":")[1])
        for line in found.stdout.splitlines()
        if ": error:" in line
    }
    assert lines == wrong_lines(), found.stdout


@pytest.mark.timeout(180)
def test_pyright_tells_right_from_wrong(tmp_path: Path) -> None:
    """The same of pyright, where it is installed."""
    commands = (shutil.which(name, path=_path()) for name in PYRIGHTS)
    command = next((command for command in commands if command), None)
    if command is None:
        pytest.skip(f"none of {', '.join(PYRIGHTS)} is installed")
    config = {
        "include": [str(SAMPLE)],
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
        "typeCheckingMode": "standard",
    }
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(config))
    found = subprocess.run(
        [command, "--outputjson", "--project", str(project)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    report = json.loads(found.stdout)["generalDiagnostics"]
    errors = [each for each in report if each["severity"] == "error"]
    lines = {each["range"]["start"]["line"] + 1 for each in errors}
    assert lines == wrong_lines(), [each["message"] for each in errors]


def _path() -> str:
    """Beside this interpreter, too: its environment need not be active."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
