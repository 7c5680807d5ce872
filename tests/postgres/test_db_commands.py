"""``stent db`` on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from stent.cli.db import db, without_password
from stent.errors import ConfigurationError, StoreError
from stent.settings import Settings
from stent.store.embedded import EmbeddedServer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def settings(server_home: Path) -> Settings:
    return Settings(home=server_home)


def run(settings: Settings, *words: str) -> Result:
    return CliRunner().invoke(db, words, obj=settings, catch_exceptions=False)


def state_of(settings: Settings) -> str:
    result = run(settings, "status", "--json")
    assert result.exit_code == 0
    return str(json.loads(result.output)["state"])


def test_up_and_down(settings: Settings) -> None:
    """Up leaves a server running, down ends it; the status follows."""
    assert state_of(settings) == "absent"
    started = run(settings, "up")
    assert started.exit_code == 0
    assert "***@" in started.output
    assert state_of(settings) == "running"
    assert run(settings, "down").output == "stopped\n"
    assert state_of(settings) == "stopped"


def test_down_spares_a_server_in_use(settings: Settings) -> None:
    """Down tells that others use the server; down --now stops it all the same."""
    user = EmbeddedServer(settings.home)
    user.start_blocking()
    assert "in use" in run(settings, "down").output
    assert state_of(settings) == "running"
    assert run(settings, "down", "--now").output == "stopped\n"
    assert state_of(settings) == "stopped"
    user.leave_blocking()


def test_status_for_people_hides_the_password(settings: Settings) -> None:
    """Every fact has a line and none is the password."""
    run(settings, "up")
    output = run(settings, "status").output
    password = EmbeddedServer(settings.home).cluster.password_file.read_text().strip()
    assert "state" in output
    assert "running" in output
    assert password not in output


def test_psql_runs_on_the_embedded_server(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client connects without asking, and the server does not outlive it."""
    run(settings, "migrate")
    capfd.readouterr()
    result = run(settings, "psql", "-XAtc", "select 6 * 7")
    assert result.exit_code == 0
    assert capfd.readouterr().out == "42\n"
    assert state_of(settings) == "stopped"


def test_psql_failure_is_exit_code_one(settings: Settings) -> None:
    """What psql refuses is a failure of the command."""
    run(settings, "migrate")
    assert run(settings, "psql", "-Xqc", "select wrong").exit_code == 1


def test_migrate_can_be_repeated(settings: Settings) -> None:
    """The first call names what it applied, the second has nothing to do."""
    first, second = run(settings, "migrate"), run(settings, "migrate")
    assert first.exit_code == second.exit_code == 0
    assert "applied" in first.output
    assert "applied" not in second.output
    assert state_of(settings) == "stopped"


def test_url_is_not_the_embedded_server() -> None:
    """With a URL there is no server to start or stop."""
    settings = Settings(database_url="postgresql://user:secret@nowhere.invalid/x")
    with pytest.raises(ConfigurationError, match="STENT_DATABASE_URL is set"):
        run(settings, "up")


def test_status_of_a_url(database_url: str) -> None:
    """A URL is connected to and shown without its password."""
    result = run(Settings(database_url=database_url), "status", "--json")
    facts = json.loads(result.output)
    assert (facts["database"], facts["state"]) == ("external", "running")
    assert "***@" in facts["url"]


def test_unreachable_url_is_told_without_password(tmp_path: Path) -> None:
    """The error of a failed connection names the place and masks the password."""
    url = f"postgresql://user:secret@/x?host={tmp_path}"
    with pytest.raises(StoreError) as caught:
        run(Settings(database_url=url), "status")
    assert str(tmp_path) in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "place", "password"),
    [
        ("postgresql://u:p%40x@h:1/d", "postgresql://u@h:1/d", "p@x"),
        ("postgresql://u@h/d", "postgresql://u@h/d", None),
        ("postgresql://u:p@/d?host=/s", "postgresql://u@/d?host=/s", "p"),
        ("postgresql:///d?user=u&password=p", "postgresql:///d?user=u", "p"),
    ],
)
def test_password_is_split_off(url: str, place: str, password: str | None) -> None:
    """What stands on psql's command line has no password in it."""
    assert without_password(url) == (place, password)


def test_prune(settings: Settings) -> None:
    """It says what it deleted, and wants to be told how old."""
    run(settings, "migrate")
    result = run(settings, "prune", "--older-than", "30d", "--json")
    assert json.loads(result.output) == {"executions": 0, "rows": 0, "partitions": 0}
    assert "deleted 0 executions" in run(settings, "prune", "--older-than", "1h").output
    assert run(settings, "prune").exit_code == 2
