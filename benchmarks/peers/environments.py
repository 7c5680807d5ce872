"""A virtual environment for each peer, kept until what it needs changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.catalogue import Peer

INSTALL_SECONDS_MAX = 600
NEWEST_PYTHON = (3, 13)
_STAMP = "installed.json"


class NotInstalledError(Exception):
    """A peer cannot be installed here; the message says why, in one line."""


@dataclass(frozen=True)
class Environment:
    """An installed peer.

    Attributes:
        python: Its interpreter.
        version: Of that interpreter.
        server: Program of the server it needs.
    """

    python: Path
    version: str
    server: Path | None


def install(peer: Peer, directory: Path) -> Environment:
    """Install a peer below ``directory``, if it is not there already.

    Raises:
        NotInstalledError: It is not to be had here.
    """
    base, version = _find_python(peer.python)
    wanted = {
        "python": version,
        "requirements": list(peer.requirements),
        "npm": peer.npm[0] if peer.npm else None,
    }
    own = directory / peer.key
    stamp = own / _STAMP
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(own, ignore_errors=True)
        _run([str(base), "-m", "venv", str(own)])
        pip = [str(own / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        _run([*pip, "--disable-pip-version-check", *peer.requirements])
        if peer.npm is not None:
            _install_npm(peer.npm[0], own)
        stamp.write_text(json.dumps(wanted), encoding="utf-8")
    server = None
    if peer.npm is not None:
        server = own / "node_modules" / ".bin" / peer.npm[1]
        if not server.exists():
            message = f"{peer.npm[0]} has no program {peer.npm[1]}"
            raise NotInstalledError(message)
    return Environment(own / "bin" / "python", version, server)


def _install_npm(package: str, directory: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        message = f"its server is the npm package {package}, and npm is not installed"
        raise NotInstalledError(message)
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
    _run([npm, "install", "--prefix", str(directory), *quiet, package])


def _find_python(oldest: tuple[int, int]) -> tuple[Path, str]:
    """This interpreter if it will do, so that all run on the same; else a newer one."""
    if sys.version_info[:2] >= oldest:
        return Path(sys.executable), _dotted(sys.version_info[:2])
    for minor in range(oldest[1], NEWEST_PYTHON[1] + 1):
        version = f"3.{minor}"
        for candidate in _candidates(version):
            if _works(candidate):
                return candidate, version
    message = f"it needs Python {_dotted(oldest)} or newer, and none was found"
    raise NotInstalledError(message)


def _candidates(version: str) -> Iterator[Path]:
    found = shutil.which(f"python{version}")
    if found is not None:
        yield Path(found)
    yield from sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python"))


def _works(python: Path) -> bool:
    tried = subprocess.run(
        [python, "-c", "import venv, ensurepip"], capture_output=True, check=False
    )
    return tried.returncode == 0


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_SECONDS_MAX,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(str(error)) from error
    if done.returncode != 0:
        raise NotInstalledError(last_words(done.stderr or done.stdout))


def last_words(text: str) -> str:
    """The last line that says something, as a reason to show."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
