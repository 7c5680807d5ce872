"""Defaults and bounds of everything that can be configured, and how it is read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from stent.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

MEBIBYTE: Final = 1024 * 1024
PAYLOAD_BYTES_HIGHEST: Final = 256 * MEBIBYTE
APP_VERSION_CHARACTERS_MAX: Final = 200
NEVER: Final = "never"
"""In the environment, for a duration that may be ``None``."""
SCHEMES: Final = ("postgresql://", "postgres://")

_USERINFO_PASSWORD = re.compile(r"(?P<before>://[^/?#:@]*:)[^/?#]*(?P<after>@)")
_PASSWORD_FIELD = re.compile(
    r"(?P<name>\b(?:password|sslpassword)\s*=\s*)(?:'(?:\\.|[^'\\])*'|[^\s&'#]*)",
    re.IGNORECASE,
)


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one process of stent is configured with; built once, passed down.

    Every duration is a ``timedelta`` above zero and every bare number is a count of
    at least one. The connection strings are masked in ``repr``.

    Attributes:
        database_url: ``postgresql://`` URL; ``None`` means the embedded server.
        direct_url: URL that bypasses a transaction pooler, for the connections that
            hold a session lock and listen; ``None`` means ``database_url``.
        home: Directory of the embedded server's files.
        app_version: What ``stent workers`` shows as the version of the program.
        payload_bytes_max: Longest encoded argument list or result.
        max_concurrency: Attempts that one worker runs at the same time.
        resident_max: Executions whose live loop one worker keeps in memory.
        evict_after: How long an execution that only waits stays in memory.
        retention: How long after its end an execution is kept, with all that belongs
            to it; ``None`` means for ever.
        flush_items_max: Turns, new calls and settled attempts that one flush commits
            together.
        flush_bytes_max: Payload bytes after which a flush takes no further item.
        claim_items_max: Tasks or executions that one claim takes.
        transaction_pool_size: Connections for transactional activities.
        process_pool_size: Processes that one worker keeps for ``pool="process"``; by
            default the CPUs that it may use.
        lease: How long a worker that is neither seen dead nor heard of keeps its work.
        lease_margin: How long before the end of its lease a cut-off worker stops
            starting work.
        lease_renew_every: How often the lease is extended.
        cancel_grace: How long the cleanup of a cancelled execution may take.
        drain_timeout: How long a stopping worker waits for its running attempts.
        poll_every: How often work is looked for when no hint arrives.
        command_timeout: Longest wait for the answer to one statement.
    Raises:
        ConfigurationError: A value is out of its bounds; the message names it.
    """

    database_url: str | None = None
    direct_url: str | None = None
    home: Path = Path(".stent")
    app_version: str | None = None
    payload_bytes_max: int = 2 * MEBIBYTE
    max_concurrency: int = 100
    resident_max: int = 10_000
    flush_items_max: int = 2_000
    flush_bytes_max: int = 16 * MEBIBYTE
    claim_items_max: int = 500
    transaction_pool_size: int = 8
    process_pool_size: int = field(default_factory=available_cpus)
    lease: timedelta = timedelta(seconds=10)
    lease_margin: timedelta = timedelta(seconds=2)
    lease_renew_every: timedelta = timedelta(seconds=2)
    evict_after: timedelta = timedelta(seconds=60)
    retention: timedelta | None = timedelta(days=30)
    cancel_grace: timedelta = timedelta(seconds=30)
    drain_timeout: timedelta = timedelta(seconds=30)
    poll_every: timedelta = timedelta(seconds=1)
    command_timeout: timedelta = timedelta(seconds=30)

    def __post_init__(self) -> None:
        _check_url("database_url", self.database_url)
        _check_url("direct_url", self.direct_url)
        if self.direct_url is not None and self.database_url is None:
            message = "direct_url needs database_url: the embedded server has no pooler"
            raise ConfigurationError(message)
        _check_version("app_version", self.app_version)
        _check_count("payload_bytes_max", self.payload_bytes_max, PAYLOAD_BYTES_HIGHEST)
        _check_count("max_concurrency", self.max_concurrency, 100_000)
        _check_count("resident_max", self.resident_max, 10_000_000)
        _check_count("flush_items_max", self.flush_items_max, 100_000)
        _check_count("flush_bytes_max", self.flush_bytes_max, 512 * MEBIBYTE)
        _check_count("claim_items_max", self.claim_items_max, 100_000)
        _check_count("transaction_pool_size", self.transaction_pool_size, 1_000)
        _check_count("process_pool_size", self.process_pool_size, 1_000)
        _check_duration("lease", self.lease)
        _check_duration("lease_margin", self.lease_margin)
        _check_duration("lease_renew_every", self.lease_renew_every)
        _check_duration("evict_after", self.evict_after)
        if self.retention is not None:
            _check_duration("retention", self.retention)
        _check_duration("cancel_grace", self.cancel_grace)
        _check_duration("drain_timeout", self.drain_timeout)
        _check_duration("poll_every", self.poll_every)
        _check_duration("command_timeout", self.command_timeout)
        if self.lease_renew_every + self.lease_margin >= self.lease:
            message = (
                f"lease ({self.lease}) must be longer than lease_renew_every "
                f"({self.lease_renew_every}) and lease_margin ({self.lease_margin}) "
                "together, or a healthy worker would lose its work"
            )
            raise ConfigurationError(message)

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={_shown(getattr(self, name))}" for name in self.__slots__
        )
        return f"Settings({fields})"

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        url: str | None = None,
        home: str | Path | None = None,
    ) -> Settings:
        """Read the environment: see ``variable_of`` for the names.

        An empty variable counts as absent, and so does one of another name.

        Args:
            environ: Where to look; the environment of the process when not given.
            url: Goes before ``STENT_DATABASE_URL``; ``STENT_DIRECT_URL`` leads to the
                same database unless the environment names another one.
            home: Of an embedded server, whatever database the environment names.

        Raises:
            ConfigurationError: A variable holds something unusable; the message names
                it.
        """
        variables = os.environ if environ is None else environ
        kinds = get_type_hints(cls)
        given: dict[str, Any] = {}
        for name, kind in kinds.items():
            variable = variable_of(name)
            text = variables.get(variable, "").strip()
            if text:
                given[name] = _read(variable, text, kind)
        if home is not None:
            given["home"] = Path(home)
        if home is not None or (url and given.get("database_url", url) != url):
            given.pop("direct_url", None)
        if home is not None or url is not None:
            given["database_url"] = url
        try:
            return cls(**given)
        except ConfigurationError as error:
            words = re.findall(r"\w+", str(error))
            blamed = [
                variable_of(name)
                for name, value in given.items()
                if name in words and value is not url
            ]
            if not blamed:
                raise
            message = f"{error} (from {', '.join(blamed)})"
            raise ConfigurationError(message) from error


def variable_of(name: str) -> str:
    """The environment variable of a setting: ``STENT_`` and its name in capitals.

    A duration is a number of seconds there, and its variable ends in ``_SECONDS``.
    """
    unit = "_SECONDS" if _is_duration(get_type_hints(Settings)[name]) else ""
    return f"STENT_{name.upper()}{unit}"


def _read(variable: str, text: str, kind: object) -> object:
    try:
        if kind is int:
            return int(text)
        if kind is timedelta or (_is_duration(kind) and text != NEVER):
            return timedelta(seconds=float(text))
    except (ValueError, OverflowError) as error:
        wanted = "a whole number" if kind is int else "a number of seconds"
        message = f"{variable} must be {wanted}, not {text!r}"
        raise ConfigurationError(message) from error
    if _is_duration(kind):
        return None
    return Path(text) if kind is Path else text


def _is_duration(kind: object) -> bool:
    return timedelta in (kind, *get_args(kind))


def masked(text: str) -> str:
    """Replace every password of a URL or of a ``key=value`` connection string.

    Works inside longer text too, so that messages of drivers can be shown.
    """
    text = _USERINFO_PASSWORD.sub(r"\g<before>***\g<after>", text)
    return _PASSWORD_FIELD.sub(r"\g<name>***", text)


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables that make ``from_env`` read these settings; an empty one: none.

    A service manager is not handed on: it hears from one process alone.
    """
    variables = {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "", "WATCHDOG_PID": ""}
    for name in settings.__slots__:
        value = getattr(settings, name)
        if isinstance(value, timedelta):
            text = repr(value.total_seconds())
        elif isinstance(value, Path):
            text = str(value.absolute())
        else:
            text = "" if value is None else str(value)
        variables[variable_of(name)] = text
    return variables


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """systemd, or who speaks like it, and wants to be told how the service is.

    Attributes:
        address: Of its socket, as ``NOTIFY_SOCKET`` gives it.
        watchdog: It ends the service when it hears nothing for this long; None: never.
    """

    address: str
    watchdog: timedelta | None = None

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None
    ) -> ServiceManager | None:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``.

        Returns:
            None if nobody wants to be told.
        Raises:
            ConfigurationError: ``WATCHDOG_USEC`` is no number.
        """
        variables = os.environ if environ is None else environ
        address = variables.get("NOTIFY_SOCKET", "")
        if not address:
            return None
        period, for_pid = variables.get("WATCHDOG_USEC"), variables.get("WATCHDOG_PID")
        if not period or (for_pid and for_pid != str(os.getpid())):
            return cls(address)
        if not period.isdecimal() or int(period) == 0:
            message = f"WATCHDOG_USEC must be a number of microseconds, not {period!r}"
            raise ConfigurationError(message)
        return cls(address, timedelta(microseconds=int(period)))


def environment_with(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process with some variables set, for a child process."""
    return {**os.environ, **changes}


def _shown(value: object) -> str:
    return repr(masked(value) if isinstance(value, str) else value)


def _check_url(name: str, url: str | None) -> None:
    if url is not None and not url.startswith(SCHEMES):
        scheme, separator, _ = url.partition("://")
        found = f"{scheme}://" if separator else "a text without ://"
        message = f"{name} must be a URL that starts with postgresql://, not {found}"
        raise ConfigurationError(message)


def _check_version(name: str, version: str | None) -> None:
    if version is None:
        return
    if len(version) > APP_VERSION_CHARACTERS_MAX or not version.isprintable():
        message = (
            f"{name} must be at most {APP_VERSION_CHARACTERS_MAX} printable "
            f"characters, not {version[:40]!r}"
        )
        raise ConfigurationError(message)


def _check_count(name: str, count: int, highest: int) -> None:
    if not 1 <= count <= highest:
        message = f"{name} must be between 1 and {highest}, not {count}"
        raise ConfigurationError(message)


def _check_duration(name: str, duration: timedelta) -> None:
    if duration <= timedelta(0):
        message = f"{name} must be longer than zero, not {duration}"
        raise ConfigurationError(message)
