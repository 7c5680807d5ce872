"""The package itself: names arrive when they are used, and not before."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stent

ROOT = Path(__file__).parent.parent.parent


def loaded_by(program: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after a program."""
    completed = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint('>', *sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return set(completed.stdout.rpartition(">")[2].split())


def test_import_loads_the_facade_only() -> None:
    """`import stent` loads no other module of it."""
    loaded = loaded_by("import stent")
    assert {name for name in loaded if name.split(".")[0] == "stent"} == {"stent"}


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("from stent import Result", {"asyncpg", "msgspec", "structlog"}),
        ("from stent import durable", {"asyncpg", "sqlalchemy", "structlog", "rich"}),
        ("from stent import Stent", {"sqlalchemy", "click"}),
    ],
)
def test_a_name_loads_what_it_needs(program: str, absent: set[str]) -> None:
    """Importing one name does not pay for the others."""
    loaded = loaded_by(program)
    assert "stent" in loaded
    assert loaded & absent == set()


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "--help"], ["--version"]])
def test_help_needs_no_library_of_commands(arguments: list[str]) -> None:
    """Help and version answer without database driver, SQLAlchemy, rich, structlog."""
    loaded = loaded_by(
        f"from stent.cli.main import main\nmain({arguments!r}, standalone_mode=False)"
    )
    assert "click" in loaded
    assert loaded & {"asyncpg", "sqlalchemy", "rich", "structlog"} == set()


def test_every_name_has_a_home_and_a_type() -> None:
    """The lazy table, `__all__` and what type checkers see name the same things."""
    source = Path(stent.__file__).read_text(encoding="utf-8")
    seen = {
        (node.module, alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {(home, name) for name, home in stent._HOMES.items()} == seen
    assert set(stent.__all__) == set(stent._HOMES)
    assert set(stent.__all__) <= set(dir(stent))


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that does not exist is told as by any module."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stent.nothing
