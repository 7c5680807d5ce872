"""The command's frame: options, errors as exit codes, what is printed about them."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from stent.cli import main as frame
from stent.cli import worker
from stent.cli.main import main
from stent.errors import (
    ConfigurationError,
    ExecutionNotFoundError,
    PayloadError,
    StoreError,
)
from stent.settings import Settings


def run(*words: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, words)


class Given:
    """What the command `probe` does."""

    error: Exception | None = None
    settings: Settings | None = None


@click.command()
@click.pass_context
def probe(context: click.Context) -> None:
    """For these tests."""
    Given.settings = context.find_object(Settings)
    if Given.error is not None:
        raise Given.error


@pytest.fixture(autouse=True)
def _probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "probe", probe, raising=False)
    monkeypatch.setitem(frame._COMMANDS, "probe", "stent.cli.main:probe")
    Given.error = Given.settings = None


def test_help_names_every_command() -> None:
    """The overview has all commands, and the exit codes in two lines."""
    output = run("--help").output
    for name in [name for name in frame._COMMANDS if name != "probe"]:
        assert f"\n  {name} " in output
    assert "\n  Exit codes: 0 ok, 1 failure, 2 usage" in output


@pytest.mark.parametrize("name", [n for n in frame._COMMANDS if n != "probe"])
def test_every_command_explains_itself(name: str) -> None:
    """Each has a help text of its own."""
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: main {name}" in result.output


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ConfigurationError("x"), 2),
        (PayloadError("x"), 2),
        (ExecutionNotFoundError("x"), 3),
        (TimeoutError("x"), 5),
        (StoreError("x"), 1),
        (ExceptionGroup("y", [ExceptionGroup("z", [StoreError("x")])]), 1),
    ],
)
def test_errors_are_exit_codes(error: Exception, exit_code: int) -> None:
    """What stent raises on purpose is one line on stderr and a code."""
    Given.error = error
    result = run("probe")
    assert result.exit_code == exit_code
    assert result.stderr == "Error: x\n"
    assert result.stdout == ""


def test_mistakes_of_ours_are_not_hidden() -> None:
    """An unexpected exception keeps its traceback, alone or in a group."""
    Given.error = ZeroDivisionError()
    assert isinstance(run("probe").exception, ZeroDivisionError)
    Given.error = ExceptionGroup("", [StoreError("x"), ZeroDivisionError()])
    assert isinstance(run("probe").exception, ExceptionGroup)


def test_errors_cannot_drive_the_terminal() -> None:
    """Control sequences in a message are written out, passwords masked."""
    Given.error = StoreError("\x1b]0;owned\x07 at postgresql://u:secret@h/d\nnext")
    shown = run("probe").stderr
    assert shown == ("Error: \\x1b]0;owned\\x07 at postgresql://u:***@h/d\nnext\n")


def test_unknown_command_is_a_usage_error() -> None:
    """A mistyped command is exit code 2."""
    assert run("wroker").exit_code == 2


def settings_of(*words: str, **environment: str) -> Settings:
    run(*words, "probe", **environment)
    assert Given.settings is not None
    return Given.settings


def test_settings_come_from_the_environment() -> None:
    """Without options the variables count."""
    given = settings_of(STENT_DATABASE_URL="postgresql://h/d", STENT_HOME="elsewhere")
    assert given.database_url == "postgresql://h/d"
    assert given.home == Path("elsewhere")


def test_options_win_over_the_environment() -> None:
    """--url and --home choose the database; a direct URL of another one is dropped."""
    variables = {
        "STENT_DATABASE_URL": "postgresql://h/d",
        "STENT_DIRECT_URL": "postgresql://direct/d",
    }
    by_url = settings_of("--url", "postgresql://other/d", **variables)
    assert (by_url.database_url, by_url.direct_url) == ("postgresql://other/d", None)
    by_home = settings_of("--home", "here", **variables)
    assert (by_home.database_url, by_home.home) == (None, Path("here"))


def test_two_databases_at_once_are_refused() -> None:
    """--url and --home exclude each other."""
    assert run("--url", "postgresql://h/d", "--home", "x", "probe").exit_code == 2


@pytest.mark.parametrize(
    "command", ["ls", "db doctor", "db prune --older-than 3d", "db psql"]
)
def test_looking_makes_no_database(tmp_path: Path, command: str) -> None:
    """A look at an embedded database that is not there creates none."""
    home = tmp_path / "none"
    result = run("--home", str(home), *command.split())
    assert result.exit_code == 1
    assert "there is no database in" in result.stderr
    assert not home.exists()


def test_errors_of_activities_have_no_context_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That uvloop is not installed is no part of anybody's traceback."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    seen: list[BaseException | None] = []

    async def work() -> None:
        try:
            raise ValueError
        except ValueError as error:
            seen.append(error.__context__)

    worker._run(work)
    assert seen == [None]
