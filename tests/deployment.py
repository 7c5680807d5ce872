"""The files that run stent elsewhere, as their programs would read them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from stent.cli.main import main

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "workers" / "Dockerfile"
UNIT = ROOT / "workers" / "systemd" / "stent-worker@.service"
UNIT_ENVIRONMENT = ROOT / "workers" / "systemd" / "orders.env.example"
KUBERNETES = ROOT / "workers" / "kubernetes"

_VARIABLE = re.compile(
    r"\$\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<word>[^}]*))?\}|\$\$"
)
_UNITS = {"s": 1, "m": 60, "h": 3600}


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """A text of a compose file with its variables.

    Raises:
        KeyError: One that has no default is not set; says what the file says.
    """

    def replace(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        value = variables.get(found["name"])
        if value or (value is not None and found["operator"] is None):
            return value
        if found["operator"] == ":-":
            return found["word"]
        raise KeyError(found["word"] or found["name"])

    return _VARIABLE.sub(replace, text)


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The compose file as `docker compose` would take it."""

    def walk(node: object) -> object:
        match node:
            case dict():
                return {key: walk(value) for key, value in node.items()}
            case list():
                return [walk(value) for value in node]
            case str():
                return interpolated(node, variables)
            case _:
                return node

    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return {name: walk(part) for name, part in document.items()}


def seconds(text: str) -> int:
    """A duration of a compose file or a unit: `90s`, `1m30s`."""
    parts = re.findall(r"(\d+)([smh])", text)
    assert "".join(number + unit for number, unit in parts) == text, text
    return sum(int(number) * _UNITS[unit] for number, unit in parts)


@dataclass(frozen=True, slots=True)
class Instruction:
    """A line of a Dockerfile; `stage` counts its FROM lines."""

    stage: int
    name: str
    words: str

    @property
    def exec_form(self) -> list[str]:
        """The words of an instruction that runs without a shell."""
        words: list[str] = json.loads(self.words)
        return words


def dockerfile() -> list[Instruction]:
    """The instructions of the worker's image, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    stage, found = -1, []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        name, _, words = line.partition(" ")
        stage += name == "FROM"
        found.append(Instruction(stage, name, words))
    return found


def unit() -> dict[str, dict[str, str]]:
    """The unit's sections; no key of it may be given twice."""
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
            continue
        key, separator, value = line.partition("=")
        assert separator, line
        assert key not in section, line
        section[key] = value
    return sections


def unit_environment() -> dict[str, str]:
    """What the example's environment file sets."""
    lines = UNIT_ENVIRONMENT.read_text(encoding="utf-8").splitlines()
    named = (line.partition("=") for line in lines if line and line[0] != "#")
    return {name: value for name, _, value in named}


def unit_command(environment: Mapping[str, str]) -> list[str]:
    """ExecStart as systemd splits it: a bare $NAME becomes words."""
    words: list[str] = []
    for word in shlex.split(unit()["Service"]["ExecStart"]):
        if word.startswith("$"):
            words += shlex.split(environment[word[1:]])
        else:
            words.append(word)
    return words


def manifests() -> Iterator[dict[str, Any]]:
    """Every object of the Kubernetes manifests, the kustomization left out."""
    for file in sorted(KUBERNETES.glob("*.yaml")):
        if file.name != "kustomization.yaml":
            yield from yaml.safe_load_all(file.read_text(encoding="utf-8"))


def manifest(kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = [one for one in manifests() if one["kind"] == kind]
    return found


def container(kind: str) -> dict[str, Any]:
    """The one container of a Deployment or a Job."""
    (found,) = manifest(kind)["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def parse(words: list[str]) -> None:
    """Let the command line read the arguments of `stent`, without running them.

    Raises:
        click.UsageError: It does not know the command, an option or an argument.
    """
    command: click.Command = main
    context, rest = click.Context(main, info_name="stent"), words
    while isinstance(command, click.Group):
        found = command.get_command(context, rest[0])
        if found is None:
            message = f"there is no command {rest[0]}"
            raise click.UsageError(message)
        command, rest = found, rest[1:]
    command.make_context(" ".join(words), rest, parent=context)
