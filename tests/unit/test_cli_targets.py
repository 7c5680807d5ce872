"""Modules and functions named on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import uuid4

import pytest

from stent.cli.targets import load_function, load_functions
from stent.errors import StentError, UsageError


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that a test writes into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return f"module_{uuid4().hex}"


def write(name: str, text: str) -> None:
    Path(f"{name}.py").write_text(text, encoding="utf-8")


DURABLE = """
from stent import durable

@durable
async def fetch(x: int) -> int:
    return x

class Tools:
    @durable
    @staticmethod
    async def cut(x: int) -> int:
        return x

def plain() -> None: ...
"""


def test_a_module_of_the_current_directory_is_loaded(name: str) -> None:
    """Its durable functions are known under their durable names."""
    write(name, DURABLE)
    assert f"{name}.fetch" in load_functions(name)
    assert load_function(f"{name}:fetch").name == f"{name}.fetch"
    assert load_function(f"{name}:Tools.cut").name == f"{name}.Tools.cut"


def test_functions_of_a_module_that_another_loaded_count(name: str) -> None:
    """Naming a module whose import has happened already is no mistake."""
    write(name, DURABLE)
    assert load_functions(name) == load_functions(name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("plain", "plain is not durable; durable there: .*fetch"),
        ("nothing", "nothing does not exist; durable there: .*fetch"),
        ("fetchh", ":fetchh does not exist: did you mean .*:fetch"),
        ("", "names no function"),
    ],
)
def test_what_is_no_durable_function_is_told(
    name: str, path: str, message: str
) -> None:
    """With the names that would have been right."""
    write(name, DURABLE)
    with pytest.raises(UsageError, match=message):
        load_function(f"{name}:{path}")


def test_missing_module_is_told(name: str) -> None:
    """Where it was looked for stands in the message."""
    with pytest.raises(UsageError, match=f"no module '{name}' in {Path.cwd()}"):
        load_functions(name)


def test_missing_module_within_a_module_is_told_apart(name: str) -> None:
    """The module is there; what it imports is not, and the line says so."""
    write(name, "\nimport absent_library_of_nobody\n")
    with pytest.raises(UsageError, match=rf"cannot import {name}.*absent.*{name}.py:2"):
        load_functions(name)


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(3)", "def"])
def test_failing_module_is_told(name: str, code: str) -> None:
    """Whatever its import raises is one sentence."""
    write(name, code)
    with pytest.raises(UsageError, match=f"cannot import {name}: "):
        load_functions(name)


def test_what_may_pass_is_no_mistake_of_use(name: str) -> None:
    """Whoever starts it again may have more luck."""
    write(name, "raise ConnectionRefusedError('redis')")
    with pytest.raises(StentError, match="redis") as raised:
        load_functions(name)
    assert not isinstance(raised.value, UsageError)


def test_options_that_are_ignored_are_refused_at_once(name: str) -> None:
    """Not at the first dispatch."""
    flow = "@durable(kind='workflow', max_concurrent_per_worker=1)\nasync def f(): 1"
    write(name, f"from stent import durable\n{flow}")
    with pytest.raises(UsageError, match="max_concurrent_per_worker= belongs to act"):
        load_functions(name)


def test_module_without_durable_function_is_told(name: str) -> None:
    """A worker of nothing would wait for ever."""
    write(name, "x = 1")
    with pytest.raises(UsageError, match="has no durable function"):
        load_functions(name)


def test_a_file_is_not_a_module(name: str) -> None:
    """A path leads to the name that was meant."""
    with pytest.raises(UsageError, match=r"did you mean pack\.flows"):
        load_functions("./pack/flows.py")
