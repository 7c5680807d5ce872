"""The documentation is true: its programs run, its names, links and tests exist.

Fenced blocks of ``README.md`` and ``docs/``: ``python`` is a program and runs;
``python name.py`` is part of that file, which runs once it is complete;
``python fragment`` compiles; ``shell`` holds commands of ``stent`` that parse.
"""

from __future__ import annotations

import ast
import datetime as dt
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import stent

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference"
TUTORIAL = ROOT / "docs" / "tutorial.md"
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")
PROGRAM_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its info string's words, its text, the line it begins at."""

    language: str
    form: str
    text: str
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(content):
        language, _, form = found[1].partition(" ")
        line = content.count("\n", 0, found.start()) + 1
        yield Block(language, form, found[2], line)


def files_of(page: Path) -> dict[str, str]:
    """The programs of a page by file name, in order of their first block."""
    files: dict[str, str] = {}
    for block in blocks_of(page):
        if block.language != "python" or block.form == "fragment":
            continue
        stem = re.sub(r"\W", "_", page.stem)
        name = block.form or f"{stem}_line_{block.line}.py"
        files[name] = files.get(name, "") + block.text
    return files


def environment(**changes: str) -> dict[str, str]:
    """Of a new user: nothing of stent is set, and stent is importable from anywhere."""
    own = {name: v for name, v in os.environ.items() if not name.startswith("STENT_")}
    return {**own, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **changes}


def run(file: str, directory: Path, **changes: str) -> str:
    """Run a program like a new user; its output."""
    done = subprocess.run(
        [sys.executable, file],
        cwd=directory,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{file}:\n{done.stdout}{done.stderr}"
    return done.stdout


PROGRAMS = [
    (page, name)
    for page in PAGES
    for name in files_of(page)
    if page not in (TUTORIAL, ROOT / "README.md")
]


@pytest.mark.timeout(PROGRAM_SECONDS)
@pytest.mark.parametrize(
    ("page", "name"), PROGRAMS, ids=[f"{page.stem}-{name}" for page, name in PROGRAMS]
)
def test_programs_run(page: Path, name: str, tmp_path: Path, database_url: str) -> None:
    """Every program of the documentation ends without error."""
    (tmp_path / name).write_text(files_of(page)[name], encoding="utf-8")
    run(name, tmp_path, STENT_DATABASE_URL=database_url)


@pytest.mark.timeout(60)
def test_the_first_program_runs_with_nothing_else(
    tmp_path: Path, server_home: Path
) -> None:
    """The program of the README prints what it says, on an embedded Postgres."""
    ((name, text),) = files_of(ROOT / "README.md").items()
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert sum(1 for line in text.splitlines() if line.strip()) <= 12
    assert run(name, tmp_path, STENT_HOME=str(server_home)) == "328350\n"


@pytest.mark.timeout(90)
def test_the_tutorial_works(tmp_path: Path, database_url: str) -> None:
    """Its programs run, a worker is killed in the middle, and the figures agree."""
    files = files_of(TUTORIAL)
    # People need time to find the process and kill it.
    assert "asyncio.sleep(0.5)" in files["words.py"]
    files["words.py"] = files["words.py"].replace("sleep(0.5)", "sleep(0.1)")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    url = {"STENT_DATABASE_URL": database_url}
    (plain,) = set(files) - {"words.py", "once.py", "dispatch.py", "result.py"}
    run(plain, tmp_path, **url)
    assert run("once.py", tmp_path, **url) == "{'texts': 3, 'words': 10}\n"
    (tmp_path / "work.log").unlink()
    (command,) = [c for c in commands_of(TUTORIAL) if c[:2] == ["stent", "worker"]]
    workers = [start(command, tmp_path, url) for _ in range(2)]
    try:
        run("dispatch.py", tmp_path, **url)
        wait_for_lines(tmp_path / "work.log", {worker.pid for worker in workers})
        os.kill(workers[0].pid, signal.SIGKILL)
        expected = "{'texts': 200, 'words': 2800}\n"
        assert run("result.py", tmp_path, **url) == expected
    finally:
        for worker in workers:
            worker.terminate()
        codes = [worker.wait(timeout=20) for worker in workers]
    assert codes == [-signal.SIGKILL, 0]
    counted = [
        line.split(" counted ")[1]
        for line in (tmp_path / "work.log").read_text().splitlines()
    ]
    assert len(set(counted)) == 200
    assert len(counted) - 200 <= 4


def start(
    command: list[str], directory: Path, changes: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command of stent as the installed script would."""
    program = "import sys; from stent.cli.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *command[1:]],
        cwd=directory,
        env=environment(**changes, PYTHONPATH=f"{ROOT}{os.pathsep}{directory}"),
        stderr=subprocess.DEVNULL,
    )


def wait_for_lines(file: Path, process_ids: set[int]) -> None:
    """Until each process has written at least one line."""
    give_up = time.monotonic() + PROGRAM_SECONDS
    seen: set[int] = set()
    while not process_ids <= seen:
        assert time.monotonic() < give_up, f"only {seen} of {process_ids} have worked"
        time.sleep(0.02)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        seen = {int(pid) for pid in re.findall(r"process (\d+) ", text)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_compiles(page: Path) -> None:
    """Fragments too; they may await outside of a function."""
    for block in blocks_of(page):
        if block.language == "python":
            where = f"{page.name}:{block.line}"
            compile(block.text, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def commands_of(page: Path) -> list[list[str]]:
    """The commands of ``stent`` in shell blocks, as words."""
    lines = [
        line
        for block in blocks_of(page)
        if block.language == "shell"
        for line in block.text.splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command[:1] == ["stent"]]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page: Path) -> None:
    """The command line knows every command, option and argument that is shown."""
    from stent.cli.main import main

    for words in commands_of(page):
        command: click.Command = main
        context, rest = click.Context(main, info_name="stent"), words[1:]
        while isinstance(command, click.Group) and not acts_alone(command, rest):
            found = command.get_command(context, rest[0])
            assert found is not None, words
            command, rest = found, rest[1:]
        command.make_context(" ".join(words), rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link inside the repository has its file, and its heading."""
    for link in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {link}"


def anchors_of(page: Path) -> set[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def test_every_page_is_linked() -> None:
    """A reader gets to every page from the README."""
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = link.partition("#")[0]
            if target:
                left.append((page.parent / target).resolve())
    assert set(PAGES) - reached == set()


def test_every_public_name_is_in_the_reference() -> None:
    """``docs/reference/api.md`` mentions all of ``stent.__all__``."""
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"`(?:stent\.)?(\w+)", text))
    assert set(stent.__all__) - mentioned == set()


def test_every_method_of_the_app_is_in_the_reference() -> None:
    """So are all public names of ``Stent``, ``Handle`` and ``Result``."""
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text))
    internal = {"dispatch_call"}
    for owner in (stent.Stent, stent.Handle, stent.Result, stent.RetryPolicy):
        names = {name for name in vars(owner) if not name.startswith("_")}
        assert names - words - internal == set(), owner


SIGNATURE = re.compile(r"^### `stent\.([\w.]+)(\(.*\))`$", re.MULTILINE)
SIGNATURES = SIGNATURE.findall((REFERENCE / "api.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "shown"), SIGNATURES, ids=[n for n, _ in SIGNATURES])
def test_signatures_are_those_of_the_code(name: str, shown: str) -> None:
    """A heading of the reference has the parameters and defaults of its object."""
    path, _, last = f"stent.{name}".rpartition(".")
    owner: object = stent
    for part in path.split(".")[1:]:
        owner = getattr(owner, part)
    found = getattr(owner, last)
    assert plain_signature(found, of_class=isinstance(owner, type)) == shown


def plain_signature(function: Callable[..., object], *, of_class: bool) -> str:
    """The signature without annotations, and without ``self``."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in signature.parameters.values()
        if not (of_class and parameter.name == "self")
    ]
    plain = signature.replace(parameters=parameters, return_annotation=signature.empty)
    return str(plain)


def literals_of(call: ast.Call, constants: dict[str, str]) -> Iterator[str]:
    """Event names in the first argument of a log call."""
    for node in ast.walk(call.args[0]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name) and node.id in constants:
            yield constants[node.id]


def event_constants() -> dict[str, str]:
    tree = ast.parse((ROOT / "stent" / "log.py").read_text(encoding="utf-8"))
    return {
        node.target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and re.fullmatch(r"\w+\.\w+", node.value.value)
    }


def logged_events(constants: dict[str, str]) -> set[str]:
    """What the code logs, by constants or by literals."""
    events: set[str] = set()
    for file in (ROOT / "stent").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                    args=[_, *_],
                ) if level in ("debug", "info", "warning", "error", "exception"):
                    events.update(literals_of(node, constants))
                case ast.Dict(values=values):
                    # A table from statuses to events.
                    names = [v.id for v in values if isinstance(v, ast.Name)]
                    events.update(constants[n] for n in names if n in constants)
    return events


def test_every_event_is_in_the_reference() -> None:
    """``docs/reference/events.md`` has what is logged, and what is not yet logged."""
    table, _, later = (
        (REFERENCE / "events.md")
        .read_text(encoding="utf-8")
        .partition("not written by this version")
    )
    constants = event_constants()
    logged = logged_events(constants)
    assert set(re.findall(r"^\| `(\w+\.\w+)` \|", table, re.MULTILINE)) == logged
    assert set(re.findall(r"`(\w+\.\w+)`", later)) == set(constants.values()) - logged


def test_every_setting_is_in_the_reference() -> None:
    """``docs/reference/settings.md`` has a row for each field of ``Settings``."""
    text = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    assert rows == set(stent.Settings.__slots__)


SETTING = re.compile(
    r"^\| `(?P<name>\w+)` \| `(?P<variable>\w+)` \| [^|]+"
    r" \| (?P<default>[^|]+) \| (?P<bounds>[^|]+) \|$",
    re.MULTILINE,
)
SETTINGS = {
    row["name"]: row
    for row in SETTING.finditer((REFERENCE / "settings.md").read_text("utf-8"))
}
# Their default is not the same everywhere.
OF_THE_MACHINE = {"process_pool_size"}


@pytest.mark.parametrize("name", stent.Settings.__slots__)
def test_settings_are_those_of_the_code(name: str) -> None:
    """Variable, default and bounds of the reference hold."""
    from stent.settings import variable_of

    assert name in SETTINGS, "no row, or not of five columns"
    row = SETTINGS[name]
    assert row["variable"] == variable_of(name)
    default = getattr(stent.Settings(), name)
    if name not in OF_THE_MACHINE:
        assert setting_of(row["default"]) == default
    lowest, separator, highest = row["bounds"].partition(" to ")
    if separator:
        for allowed in (setting_of(lowest), setting_of(highest)):
            stent.Settings(**{name: allowed})
        for refused in (setting_of(lowest) - 1, setting_of(highest) + 1):
            with pytest.raises(stent.ConfigurationError, match=name):
                stent.Settings(**{name: refused})
    elif isinstance(default, dt.timedelta):
        assert row["bounds"].startswith("above 0")
        with pytest.raises(stent.ConfigurationError, match=name):
            stent.Settings(**{name: dt.timedelta(0)})  # type: ignore[arg-type]


def setting_of(text: str) -> Any:
    """A value as people write it: `10 000`, `2 MiB`, `10 s`, a name in back quotes."""
    if text == "none":
        return None
    if text.startswith("`"):
        return Path(text.strip("`"))
    digits, unit = re.fullmatch(r"([\d ]+?)( MiB| s)?", text).groups()  # type: ignore[union-attr]
    count = int(digits.replace(" ", ""))
    match unit:
        case " MiB":
            return count * 1024 * 1024
        case " s":
            return dt.timedelta(seconds=count)
        case _:
            return count


def test_every_command_is_in_the_reference() -> None:
    """``docs/reference/cli.md`` has each command with its options."""
    from stent.cli.main import main

    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(
            r"^## `(stent[ \w]*?)(?: [A-Z\[][^\n]*)?`\n(.*?)(?=^## |\Z)",
            text,
            re.MULTILINE | re.DOTALL,
        )
    )
    commands = dict(commands_below(main, "stent"))
    assert set(sections) == set(commands)
    for name, command in commands.items():
        options = {
            option
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.hidden
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--")
        }
        missing = {option for option in options if option not in sections[name]}
        assert missing - {"--help", "--version"} == set(), name


def commands_below(
    group: click.Group, path: str
) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands_below(command, f"{path} {name}")
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield f"{path} {name}", command


def acts_alone(group: click.Group, words: list[str]) -> bool:
    """Whether a group is used as a command, without one of its commands."""
    return group.invoke_without_command and not any(w in group.commands for w in words)


TEST_ID = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("page", ["guarantees.md", "requirements.md"])
def test_named_tests_exist(page: str) -> None:
    """A test that a page names as proof is there."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    named = TEST_ID.findall(text)
    assert named
    missing = [
        f"{file}::{name}" for file, name in named if not has_test(ROOT / file, name)
    ]
    assert missing == []


def has_test(file: Path, name: str) -> bool:
    if not file.exists():
        return False
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return not name or name in functions


def test_every_promise_and_requirement_has_its_line() -> None:
    """P1 to P12, and the requirements that this version claims."""
    promises = (REFERENCE / "guarantees.md").read_text(encoding="utf-8")
    found = re.findall(r"^## P(\d+)", promises, re.MULTILINE)
    assert [int(number) for number in found] == list(range(1, 13))
    requirements = (REFERENCE / "requirements.md").read_text(encoding="utf-8")
    numbers = {int(n) for n in re.findall(r"^\| (\d+) \|", requirements, re.MULTILINE)}
    assert {*range(1, 11), *range(13, 20), *range(23, 28)} <= numbers


def test_decisions_are_listed_and_cited_by_their_names() -> None:
    """The list has every record, and code cites records that exist."""
    records = {path.name for path in (ROOT / "docs" / "decisions").glob("0*.md")}
    listing = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((0\d+-[\w-]+\.md)\)", listing)) == records
    cited = {
        name
        for file in (*ROOT.glob("stent/**/*.py"), *ROOT.glob("stent/**/*.sql"))
        for name in re.findall(
            r"docs/decisions/(\d{4}[\w.-]*)", file.read_text("utf-8")
        )
    }
    unknown = {
        name for name in cited if not any(r.startswith(name[:-3]) for r in records)
    }
    assert cited
    assert unknown == set()


def test_names_not_in_this_version_are_refused() -> None:
    """The limits that README states are real: these raise what it says."""
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    later = text.partition("## Not in this version")[2]
    names = re.findall(r"`stent\.(\w+)`", later)
    refused = {
        name
        for name in stent.__all__
        if (getattr(stent, name).__doc__ or "").startswith("Not available in this")
    }
    assert set(names) == refused
    assert refused
    for name in names:
        with pytest.raises(stent.ConfigurationError, match="not available"):
            getattr(stent, name)()
