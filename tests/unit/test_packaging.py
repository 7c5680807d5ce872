"""What an installed wheel carries."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The root of a wheel built from this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    # The backend itself, without an isolated environment: no network in tests.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    (built,) = directory.glob("stent_engine-*.whl")
    return zipfile.Path(built)


def files_of(wheel: zipfile.Path) -> set[str]:
    with zipfile.ZipFile(str(wheel.root.filename)) as archive:
        return set(archive.namelist())


def metadata(wheel: zipfile.Path, name: str) -> str:
    (info,) = (entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info"))
    return info.joinpath(name).read_text(encoding="utf-8")


def test_the_wheel_is_the_package_with_its_types_and_sql(wheel: zipfile.Path) -> None:
    """Every module, every SQL file and the typing marker are in it."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.sql", "py.typed")
        for path in (ROOT / "stent").rglob(pattern)
    }
    assert "stent/py.typed" in expected
    assert expected - files_of(wheel) == set()


def test_the_wheel_carries_nothing_else(wheel: zipfile.Path) -> None:
    """Tests, examples, data and documentation stay in the repository."""
    tops = {name.partition("/")[0] for name in files_of(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stent"}


def test_the_wheel_installs_the_command(wheel: zipfile.Path) -> None:
    """The one console script is `stent`."""
    entries = configparser.ConfigParser()
    entries.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"stent": "stent.cli.main:main"}


def test_the_wheel_describes_itself(wheel: zipfile.Path) -> None:
    """Name, licence and Python version are those that users rely on."""
    description = Parser().parsestr(metadata(wheel, "METADATA"))
    assert description["Name"] == "stent-engine"
    assert description["License-Expression"] == "MIT"
    assert description["Requires-Python"] == ">=3.11"
    assert set(description.get_all("Provides-Extra", [])) >= {"local", "uvloop"}
    assert "MIT License" in metadata(wheel, "licenses/LICENSE")
