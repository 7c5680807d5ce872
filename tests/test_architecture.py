"""The structure of the code, checked on its syntax trees: layers, bans, facade."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stent"
FACADE = "stent"

# Top to bottom. A unit (a module of stent or a package with all its modules) imports
# only units of lower layers; inside a package modules import each other without cycles.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__main__"}),
    frozenset({"cli", "web", "testing"}),
    frozenset({"batch"}),
    frozenset({"app"}),
    frozenset(
        {
            "dispatching",
            "doctor",
            "worker",
            "outcomes",
            "history",
            "sqlalchemy",
            "worker_states",
            "limit_settings",
        }
    ),
    frozenset({"services"}),
    frozenset({"store", "replay"}),
    frozenset({"pages"}),
    frozenset({"calls", "waiting"}),
    frozenset({"loop"}),
    frozenset({"context"}),
    frozenset({"registry", "hooks"}),
    frozenset({"mapping"}),
    frozenset({"codec", "retry", "log", "kinds"}),
    frozenset({"rate"}),
    frozenset({"duration", "settings"}),
    frozenset({"journal"}),
    frozenset({"model", "clock", "result", "cleanups"}),
    frozenset({"errors", "version"}),
)

# Their asyncio is that of the deterministic loop, where a bare gather is the user's
# program itself; they never see the worker's real loop.
INSIDE_THE_DURABLE_LOOP = {
    "loop.py",
    "waiting.py",
    "calls.py",
    "pages.py",
    "context.py",
    "replay.py",
}
# (file under stent/, banned name) -> the decision record that allows it.
UNSTRUCTURED_ALLOWED: dict[tuple[str, str], str] = {
    ("app.py", "create_task"): "0006-bare-tasks.md",
    ("dispatching.py", "create_task"): "0006-bare-tasks.md",
    ("outcomes.py", "create_task"): "0006-bare-tasks.md",
    ("services/activities.py", "create_task"): "0006-bare-tasks.md",
    ("services/page_items.py", "create_task"): "0006-bare-tasks.md",
}
UNSTRUCTURED = {"create_task", "ensure_future", "gather", "shield", "wait_for"}

# Loaded by the commands that need them, never by `import stent`.
HEAVY = {"rich", "sqlalchemy"}

EXECUTES_DATA = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
# The facade looks up its own constant names; the command line imports what its user
# named. A process of a pool imports what its worker has imported, which names it by its
# own functions. Nothing that was stored is ever imported.
IMPORTS_BY_NAME = {"__init__.py", "cli/", "services/process_child.py"}

# Tests whose programs run under the virtual clock, where a sleep takes no time.
VIRTUAL_TIME = (
    "histories/*",
    "programs*",
    "unit/programs*",
    "unit/test_loop*",
    "unit/test_replay*",
    "unit/test_waiting*",
    "unit/test_context*",
)

SQL = re.compile(
    r"^\s*(--[^\n]*\n\s*)*("
    r"select\b.+\bfrom\b|insert\s+into\s|update\s+\S+\s+set\s|delete\s+from\s"
    r"|truncate\s|with\s+(recursive\s+)?\w+\s+as\s*\(|alter\s+(table|role|system)\s"
    r"|(create|drop)\s+(unlogged\s+)?(table|schema|index|role|database)\s"
    r"|(un)?listen\s+\S+$|notify\s+\S+$"
    r")",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """A line that imports a module of stent, by its full dotted name."""

    importer: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.importer.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def nodes_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(tree_of(path))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of stent's modules, wherever in the file they stand."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [*_imported_modules(path, node)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == FACADE:
                yield Import(importer=path, line=node.lineno, module=name)


def _imported_modules(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        package = dotted(path).split(".")
        above = node.level - (path.name == "__init__.py")
        package = package[: len(package) - above]
        base = ".".join([*package, base] if base else package)
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        yield inner if base.split(".")[0] == FACADE and is_module(inner) else base


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from stent import errors", ["stent.errors"]),
        ("from stent import Result", ["stent"]),
        ("from stent.errors import UsageError", ["stent.errors"]),
        ("from . import errors", ["stent.errors"]),
        ("from .errors import UsageError", ["stent.errors"]),
        ("from .store import embedded", ["stent.store.embedded"]),
    ],
)
def test_imports_are_resolved(code: str, expected: list[str]) -> None:
    """However an import is written, the module it loads is the one that is judged."""
    node = ast.parse(code).body[0]
    assert isinstance(node, ast.ImportFrom)
    assert list(_imported_modules(PACKAGE / "result.py", node)) == expected


def unit_of(module: str) -> str:
    """The layer member a module belongs to; the facade itself is ''."""
    return module.partition(".")[2].partition(".")[0]


def depth_of(unit: str) -> int | None:
    for depth, layer in enumerate(LAYERS):
        if unit in layer:
            return depth
    return None


def test_every_module_has_its_layer() -> None:
    """A new module of stent is placed among the layers when it is written."""
    units = {unit_of(dotted(path)) for path in sources(PACKAGE)} - {""}
    assert {unit for unit in units if depth_of(unit) is None} == set()


def test_imports_go_downwards_only() -> None:
    """No module imports a higher layer or a neighbour, the facade least of all."""
    problems = []
    for path in sources(PACKAGE):
        importer = unit_of(dotted(path))
        if not importer:
            continue
        for found in imports_of(path):
            imported = unit_of(found.module)
            if imported == importer:
                continue
            above, below = depth_of(importer), depth_of(imported)
            if above is None or below is None or above >= below:
                problems.append(str(found))
    assert problems == []


@pytest.mark.parametrize(
    "package",
    [path for path in sorted(PACKAGE.iterdir()) if (path / "__init__.py").exists()],
    ids=lambda path: path.name,
)
def test_modules_of_a_package_have_no_cycles(package: Path) -> None:
    """Inside a package modules may import each other, but never in a circle."""
    graph = {
        dotted(path): {
            found.module
            for found in imports_of(path)
            if found.module.startswith(f"{FACADE}.{package.name}.")
        }
        for path in sources(package)
    }
    assert find_cycle(graph) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one cycle in order, the first again at the end; or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for successor in sorted(graph.get(node, ())):
            cycle = visit(successor, [*trail, node])
            if cycle:
                return cycle
        done.add(node)
        return []

    for node in sorted(graph):
        cycle = visit(node, [])
        if cycle:
            return cycle
    return []


def test_a_cycle_is_found() -> None:
    """The search for cycles finds one that does not begin at the first node."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}
    assert find_cycle(graph) == ["b", "c", "d", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_workers_use_the_facade_only() -> None:
    """Programs and benchmarks' subjects import `stent` and names of its `__all__`."""
    public = set(getattr(importlib.import_module(FACADE), "__all__", ()))
    problems = []
    for path in sources(ROOT / "workers"):
        problems += [str(found) for found in imports_of(path) if found.module != FACADE]
        for line, name in facade_names(path):
            if name not in public:
                problems.append(f"{path.relative_to(ROOT)}:{line} uses stent.{name}")
    assert problems == []


def facade_names(path: Path) -> Iterator[tuple[int, str]]:
    for node in nodes_of(path):
        match node:
            case ast.ImportFrom(module="stent", names=names, lineno=line):
                yield from ((line, alias.name) for alias in names)
            case ast.Attribute(value=ast.Name(id="stent"), attr=name, lineno=line):
                yield line, name


def test_the_facade_is_complete_and_documented() -> None:
    """Every name of `__all__` exists; functions, classes, methods have docstrings."""
    facade = importlib.import_module(FACADE)
    problems = []
    for name in getattr(facade, "__all__", ()):
        value = getattr(facade, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not value.__doc__:
            problems.append(name)
        if inspect.isclass(value) and not issubclass(value, BaseException):
            problems += [f"{name}.{member}" for member in undocumented_members(value)]
    assert problems == []


def undocumented_members(owner: type) -> Iterator[str]:
    described = (classmethod, staticmethod, property)
    for name, member in vars(owner).items():
        if name.startswith("_"):
            continue
        callable_ = inspect.isfunction(member) or isinstance(member, described)
        if callable_ and not member.__doc__:
            yield name


def test_only_settings_read_the_environment() -> None:
    """`os.environ` is read in one place, where defaults and bounds are."""
    problems = []
    for path in sources(PACKAGE):
        if path == PACKAGE / "settings.py":
            continue
        for node in nodes_of(path):
            match node:
                case (
                    ast.Attribute(
                        value=ast.Name(id="os"),
                        attr="environ" | "environb" | "getenv" | "putenv",
                    )
                    | ast.ImportFrom(module="os", names=[ast.alias(name="environ")])
                    | ast.ImportFrom(module="os", names=[ast.alias(name="getenv")])
                ):
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert problems == []


def test_sql_lives_in_the_store() -> None:
    """No statement stands outside `store/` and `history.py`."""
    problems = []
    for path in sources(PACKAGE):
        if PACKAGE / "store" in path.parents or path == PACKAGE / "history.py":
            continue
        documentation = set(docstrings(tree_of(path)))
        problems += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in nodes_of(path)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in documentation
            and SQL.match(node.value)
        ]
    assert problems == []


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that stand alone as a statement."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant() as text):
                yield text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("select task_id from tasks", True),
        ("-- why\nwith ready as (select 1)", True),
        ("insert into tasks values ($1)", True),
        ("Update workers\n set flush = 1", True),
        ("select one of them", False),
        ("update the settings", False),
        ("with a deadline", False),
        ("listen to it", False),
    ],
)
def test_sql_is_told_from_prose(text: str, expected: bool) -> None:
    """The pattern recognises statements and leaves messages alone."""
    assert bool(SQL.match(text)) is expected


def test_stored_data_is_never_executed() -> None:
    """No pickle, no eval, and no import by a name that did not come from the user."""
    problems = []
    for path in sources(PACKAGE):
        relative = path.relative_to(PACKAGE).as_posix()
        by_name = any(
            relative == allowed
            or (allowed.endswith("/") and relative.startswith(allowed))
            for allowed in IMPORTS_BY_NAME
        )
        for node in nodes_of(path):
            if executes_data(node) or (imports_by_name(node) and not by_name):
                assert isinstance(node, (ast.stmt, ast.expr))
                problems.append(f"{relative}:{node.lineno} {ast.unparse(node)}")
    assert problems == []


def executes_data(node: ast.AST) -> bool:
    match node:
        case ast.Import(names=names):
            return any(alias.name.split(".")[0] in EXECUTES_DATA for alias in names)
        case ast.ImportFrom(module=str(module)):
            return module.split(".")[0] in EXECUTES_DATA
        case ast.Call(func=ast.Name(id="eval" | "exec" | "compile")):
            return True
    return False


def imports_by_name(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="__import__" | "import_module")):
            return True
        case ast.Attribute(value=ast.Name(id="importlib"), attr="import_module"):
            return True
        case ast.Import(names=names):
            return any(alias.name == "runpy" for alias in names)
        case ast.ImportFrom(module="importlib", names=names):
            return any(alias.name == "import_module" for alias in names)
    return False


def test_tasks_of_the_real_loop_are_structured() -> None:
    """Outside the deterministic loop nobody starts a task that no group waits for."""
    problems = []
    used = set()
    for path in sources(PACKAGE):
        relative = path.relative_to(PACKAGE).as_posix()
        if relative in INSIDE_THE_DURABLE_LOOP:
            continue
        for line, name in unstructured_calls(tree_of(path)):
            if (relative, name) in UNSTRUCTURED_ALLOWED:
                used.add((relative, name))
            else:
                problems.append(f"{relative}:{line} {name}: use an anyio task group")
    assert problems == []
    assert used == set(UNSTRUCTURED_ALLOWED), "an exception that nobody needs"


def test_exceptions_have_their_decisions() -> None:
    """What the allow-list permits is justified by decision records that exist."""
    decisions = ROOT / "docs" / "decisions"
    records = set(UNSTRUCTURED_ALLOWED.values())
    assert {name for name in records if not (decisions / name).is_file()} == set()


def unstructured_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Uses of asyncio's bare functions, and `create_task` on anything but a group."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="asyncio" | "asyncio.tasks", names=names):
                yield from (
                    (node.lineno, alias.name)
                    for alias in names
                    if alias.name in UNSTRUCTURED
                )
            case ast.Attribute(value=ast.Name(id="asyncio"), attr=name):
                if name in UNSTRUCTURED:
                    yield node.lineno, name
            case ast.Call(func=ast.Attribute(value=owner, attr="create_task")):
                text = ast.unparse(owner)
                if text != "asyncio" and not text.endswith("group"):
                    yield node.lineno, "create_task"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import asyncio\nasyncio.gather(a, b)", ["gather"]),
        ("import asyncio\nasyncio.create_task(a)", ["create_task"]),
        ("from asyncio import shield, sleep", ["shield"]),
        ("loop.create_task(a)", ["create_task"]),
        ("self.group.create_task(a)", []),
        ("app.wait_for(execution_id)", []),
        ("await stent.gather(a)", []),
    ],
)
def test_unstructured_calls_are_found(code: str, expected: list[str]) -> None:
    """The search tells asyncio's functions from stent's of the same name."""
    assert [name for _, name in unstructured_calls(ast.parse(code))] == expected


def test_tests_wait_for_conditions() -> None:
    """No test sleeps, but in a durable function, a `wait_` helper or virtual time."""
    problems = []
    for path in sources(ROOT / "tests"):
        relative = path.relative_to(ROOT / "tests").as_posix()
        if any(fnmatch.fnmatch(relative, pattern) for pattern in VIRTUAL_TIME):
            continue
        problems += [
            f"tests/{relative}:{line}" for line in sleeping_lines(tree_of(path))
        ]
    assert problems == []


def sleeping_lines(node: ast.AST, *, allowed: bool = False) -> Iterator[int]:
    """Lines that sleep for a time; `sleep(0)` only lets others run.

    A durable function is what is being tested and may take its time; a loop with a
    condition, or a function named `wait_<condition>`, polls, and every test has a
    deadline.
    """
    if isinstance(node, ast.While):
        allowed = allowed or not isinstance(node.test, ast.Constant)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        allowed = allowed or node.name.lstrip("_").startswith("wait_")
        allowed = allowed or any(
            "durable" in ast.unparse(decorator) for decorator in node.decorator_list
        )
    match node:
        case ast.Call(
            func=ast.Attribute(
                value=ast.Name(id="time" | "asyncio" | "anyio"), attr="sleep"
            )
            | ast.Name(id="sleep"),
            args=args,
        ):
            yields = [ast.unparse(argument) for argument in args] == ["0"]
            if not allowed and not yields:
                yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from sleeping_lines(child, allowed=allowed)


def test_sleeping_is_found() -> None:
    """A test's sleep is found; one of a durable function or a `wait_` helper is not."""
    code = """
async def test_it():
    await asyncio.sleep(1)
    await asyncio.sleep(0)
    time.sleep(0.1)
    while not done():
        await asyncio.sleep(0.01)
    while True:
        await asyncio.sleep(0.01)
    @durable(retry=1)
    async def slow():
        await asyncio.sleep(60)
async def wait_until_done():
    await anyio.sleep(0.01)
"""
    assert list(sleeping_lines(ast.parse(code))) == [3, 5, 9]


def loaded_modules(program: str) -> set[str]:
    """Top-level names of the modules a fresh interpreter has loaded after a program."""
    completed = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{program}\nimport sys\nprint('\\n'.join(['>', *sys.modules]))",
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    _, _, names = completed.stdout.rpartition(">\n")
    return {name.partition(".")[0] for name in names.split()}


def test_importing_stent_loads_nothing_heavy() -> None:
    """`import stent` is quick: it loads neither SQLAlchemy nor rich."""
    loaded = loaded_modules("import stent")
    assert "stent" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.skipif(
    not (PACKAGE / "cli" / "main.py").exists(), reason="there is no command line yet"
)
def test_help_loads_nothing_heavy() -> None:
    """`stent --help` answers without the libraries that only commands need."""
    loaded = loaded_modules(
        "from stent.cli.main import main\nmain(['--help'], standalone_mode=False)"
    )
    assert "click" in loaded
    assert loaded & HEAVY == set()
