"""Settings: where they come from, their bounds, and what they never show."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from stent import Stent
from stent.errors import ConfigurationError
from stent.settings import Settings, masked, variable_of


def test_defaults_are_within_bounds() -> None:
    """Nothing has to be configured, and no URL means the embedded server."""
    settings = Settings.from_env({})
    assert settings == Settings()
    assert settings.database_url is None
    assert settings.home == Path(".stent")


def test_environment_is_read() -> None:
    """The variables that say where the database is."""
    settings = Settings.from_env(
        {
            "STENT_DATABASE_URL": "postgresql://pooler/d",
            "STENT_DIRECT_URL": "postgresql://server/d",
            "STENT_HOME": "/srv/stent",
        }
    )
    assert settings.database_url == "postgresql://pooler/d"
    assert settings.direct_url == "postgresql://server/d"
    assert settings.home == Path("/srv/stent")


def test_every_setting_has_its_variable() -> None:
    """Texts and counts as they are, durations in seconds, with their unit."""
    settings = Settings.from_env(
        {
            "STENT_MAX_CONCURRENCY": " 20 ",
            "STENT_LEASE_SECONDS": "20",
            "STENT_POLL_EVERY_SECONDS": "0.5",
            "STENT_LEASE": "nobody reads this",
        }
    )
    assert settings == Settings(
        max_concurrency=20,
        lease=timedelta(seconds=20),
        poll_every=timedelta(milliseconds=500),
    )
    names = [variable_of(name) for name in Settings.__slots__]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("STENT_MAX_CONCURRENCY", "many"),
        ("STENT_MAX_CONCURRENCY", "1.5"),
        ("STENT_LEASE_SECONDS", "10s"),
        ("STENT_LEASE_SECONDS", "nan"),
        ("STENT_LEASE_SECONDS", "1e300"),
    ],
)
def test_unusable_variables_are_named(variable: str, text: str) -> None:
    """Nothing is guessed and nothing ignored."""
    with pytest.raises(ConfigurationError, match=f"{variable} must be"):
        Settings.from_env({variable: text})


def test_bounds_hold_for_the_environment() -> None:
    """What is refused in code is refused there."""
    with pytest.raises(ConfigurationError, match=r"STENT_MAX_CONCURRENCY\)$"):
        Settings.from_env({"STENT_MAX_CONCURRENCY": "0"})
    with pytest.raises(ConfigurationError, match=r"STENT_LEASE_SECONDS\)$"):
        Settings.from_env({"STENT_LEASE_SECONDS": "1", "STENT_MAX_CONCURRENCY": "3"})


def test_empty_variable_counts_as_absent() -> None:
    """A variable set to nothing, as compose files do, changes nothing."""
    assert Settings.from_env({"STENT_DATABASE_URL": "", "STENT_HOME": ""}) == Settings()


def test_a_direct_url_belongs_to_the_url_beside_it() -> None:
    """To the one that is given, unless the environment names another database."""
    direct, mine = "postgresql://direct/d", "postgresql://mine/d"
    alone = {"STENT_DIRECT_URL": direct}
    assert Settings.from_env(alone, url=mine).direct_url == direct
    assert Settings.from_env(alone, home="here").direct_url is None
    beside = {**alone, "STENT_DATABASE_URL": mine}
    assert Settings.from_env(beside, url=mine).direct_url == direct
    other = {**alone, "STENT_DATABASE_URL": "postgresql://other/d"}
    given = Settings.from_env(other, url=mine)
    assert (given.database_url, given.direct_url) == (mine, None)


@pytest.mark.parametrize("name", ["max_concurrency", "payload_bytes_max"])
@pytest.mark.parametrize("count", [0, -1, 10**12])
def test_counts_are_bounded(name: str, count: int) -> None:
    """A count outside its bounds is refused by name."""
    with pytest.raises(ConfigurationError, match=name):
        Settings(**{name: count})  # type: ignore[arg-type]


def test_durations_are_above_zero() -> None:
    """A duration of nothing is refused by name."""
    with pytest.raises(ConfigurationError, match="poll_every"):
        Settings(poll_every=timedelta(0))


@pytest.mark.parametrize("version", ["x" * 201, "1.0\n", "1\0"])
def test_the_version_of_the_program_can_be_shown(version: str) -> None:
    """What would not fit a line of a table is refused by name."""
    with pytest.raises(ConfigurationError, match="app_version"):
        Settings(app_version=version)
    assert Settings.from_env({"STENT_APP_VERSION": "1.0 a"}).app_version == "1.0 a"


def test_lease_outlives_its_renewal() -> None:
    """A lease that cannot be renewed in time would be lost by healthy workers."""
    with pytest.raises(ConfigurationError, match="lease_renew_every"):
        Settings(lease=timedelta(seconds=4))


def test_direct_url_needs_a_url() -> None:
    """A way around a pooler makes no sense for the embedded server."""
    with pytest.raises(ConfigurationError, match="direct_url"):
        Settings(direct_url="postgresql://server/d")


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "u:secret@h"])
def test_other_schemes_are_refused_without_their_password(url: str) -> None:
    """The message about a wrong URL does not repeat what is in it."""
    with pytest.raises(ConfigurationError, match="postgresql://") as caught:
        Settings(database_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:secret@host/d",
        "postgresql://user:se%40secret@host/d?x=1",
        "postgresql://user:a@secret@host/d",
        "postgres:///d?user=u&password=secret&port=5",
        "host=h password=secret user=u",
        "host=h password='a secret \\' word' user=u",
        "could not reach postgresql://user:secret@host/d, giving up",
    ],
)
def test_passwords_are_masked(text: str) -> None:
    """Every form in which a connection string carries a password is covered."""
    assert "secret" not in masked(text)
    assert "***" in masked(text)


def test_text_without_password_is_left_alone() -> None:
    """Masking changes nothing else."""
    text = "postgresql://user@host:5432/d?host=/tmp/a@b"
    assert masked(text) == text


def test_repr_masks_both_urls() -> None:
    """Settings may be logged."""
    url = "postgresql://user:secret@host/d"
    assert "secret" not in repr(Settings(database_url=url, direct_url=url))


def test_a_home_given_in_code_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes before a URL of the environment, and beside a URL it is refused."""
    monkeypatch.setenv("STENT_DATABASE_URL", "postgresql://elsewhere/app")
    settings = Stent(home="here").settings
    assert (settings.home, settings.database_url) == (Path("here"), None)
    with pytest.raises(ConfigurationError, match="exclude each other"):
        Stent("postgresql://elsewhere/app", home="here")


def test_retention_may_be_for_ever() -> None:
    """In the environment that is a word; None in code."""
    assert Settings.from_env({"STENT_RETENTION_SECONDS": "never"}).retention is None
    one_hour = Settings.from_env({"STENT_RETENTION_SECONDS": "3600"}).retention
    assert one_hour == timedelta(hours=1)
    with pytest.raises(ConfigurationError, match="STENT_RETENTION_SECONDS"):
        Settings.from_env({"STENT_RETENTION_SECONDS": "for ever"})
    with pytest.raises(ConfigurationError, match="retention"):
        Settings(retention=timedelta(0))
