"""Imports go down only, each library stays in its modules, classes are abstract or final.

The source is read, not run, so that imports inside functions count as well. `check` takes
sources as text: the last tests feed it bad ones, to show that it can fail.
"""

import ast
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ckptsched"

# A folder imports from itself and from folders before it. The list stands in docs/architecture.md
# too, where it says why. The first six know no torch: they are arithmetic on figures.
FOLDERS = (
    *("base", "schedule", "workload", "simulator", "solvers", "planner"),
    *("tensors", "torch_state", "memory", "recompute", "capture", "profiler", "executor"),
    *("ode", "report", "fitting", "cli"),
)
WITHOUT_TORCH = FOLDERS[:6]
MOST_ENTRIES, MOST_FILES = 20, 12  # in the package, and of Python in a folder

# The one way up: a method that is as much as the name of a function from higher up, which it
# imports when it is called.
LATE = {("planner.plan", "planner.explanation"), ("planner.plan", "planner.planner")}

# Solvers belong to the planner. What measures and runs models works with chains and plans,
# whoever made them. An adaptive solve has no plan: where its states are kept is decided on the way.
SOLVER_USERS = {"planner", "ode.adaptive"}

# Who may import what comes from outside the standard library.
THIRD_PARTY = {
    "click": {"cli"},
    "highspy": {"solvers"},
    "lightning": {"fitting.trainers.lightning"},
    "matplotlib": {"base.plot"},
    "networkx": {
        "capture.stage_discovery",
        "recompute.lean_tape",
        "solvers.graph",
        "workload.graph",
    },
    "numba": {"solvers", "simulator", "base.jit"},
    "numpy": {""},  # any module
    "platformdirs": {"base.cache_folder"},
    "pulp": {"solvers.graph"},
    "rich": {"base.progress_bar", "report"},
    "transformers": {"fitting.trainers.hugging_face"},
    # A budget may be what a device has free: torch is imported when it is asked for.
    "torch": set(FOLDERS) - set(WITHOUT_TORCH) | {"base.device_memory"},
}
# Modules that import what need not be there: `ckptsched.__getattr__` alone imports them.
NEVER_IMPORTED = {"fitting.trainers.hugging_face", "fitting.trainers.lightning"}
ONLY_INSIDE_FUNCTIONS = {"matplotlib"}  # an extra: the package must import without it


@dataclass(frozen=True)
class Import:
    """One import of one module, by its full name."""

    target: str
    line: int
    late: bool
    """Whether it is inside a function, or for the type checker alone."""


def read_package() -> dict[str, str]:
    """Sources by dotted name below the package; "" is the package itself."""
    folder = ROOT / PACKAGE
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in the source, those inside functions and by `import_module` too."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(node, module, is_package)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, late)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("import_module", "__import__") and node.args:
                target = node.args[0]
                if isinstance(target, ast.Constant) and isinstance(target.value, str):
                    yield Import(target.value, node.lineno, late)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            late = True
        if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            late = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    return visit(ast.parse(source), False)


def _resolve(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    up = node.level - 1 if is_package else node.level
    parts = parts[: len(parts) - up]
    return ".".join([*parts, node.module] if node.module else parts)


def check(sources: dict[str, str], folders: Sequence[str]) -> list[str]:
    """Every breach of the architecture in these sources, as sentences."""
    packages = {""} | {name for name in sources if any(o.startswith(f"{name}.") for o in sources)}
    places = {folder: k for k, folder in enumerate(folders)}
    problems: list[str] = []
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for module, source in sources.items():
        if module in ("", "__main__"):
            continue
        shown, folder = f"{PACKAGE}.{module}", module.split(".")[0]
        if folder not in places:
            problems.append(f"{shown} is in no folder of FOLDERS")
            continue
        for found in imports_of(source, module, is_package=module in packages):
            where = f"{shown}, line {found.line}"
            library = found.target.split(".")[0]
            if library != PACKAGE:
                problems += _third_party_problems(found, module, where)
                continue
            target = _own_module(found.target, sources)
            if target == module or (found.late and (module, target) in LATE):
                continue
            graph[module].add(target)
            if target in NEVER_IMPORTED:
                problems.append(f"{where}: imports {target}, which not everyone can")
            there = target.split(".")[0]
            if places.get(there, len(places)) > places[folder]:
                problems.append(f"{where}: {folder} imports {there or PACKAGE}, which comes later")
            if there == "solvers" != folder and not _is_in(module, SOLVER_USERS):
                users = ", ".join(sorted(SOLVER_USERS))
                problems.append(f"{where}: solvers belong to {users} only")
    problems += _cycles(graph)
    return problems + _class_problems(sources)


def _is_in(module: str, places: Collection[str]) -> bool:
    """Whether a module is one of these, or in a folder of them; "" is the package."""
    return "" in places or any(f"{module}.".startswith(f"{place}.") for place in places)


def _own_module(target: str, sources: dict[str, str]) -> str:
    """The module that `from x import y` reads: x.y where that is a module, else x."""
    name = target.removeprefix(PACKAGE).removeprefix(".")
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name


def _third_party_problems(found: Import, module: str, where: str) -> list[str]:
    library = found.target.split(".")[0]
    if library in sys.stdlib_module_names:
        return []
    if library not in THIRD_PARTY:
        return [f"{where}: imports {library}, which is not a library of this package"]
    allowed = THIRD_PARTY[library]
    problems = []
    if not _is_in(module, allowed):
        problems.append(f"{where}: {library} belongs to {', '.join(sorted(allowed))} only")
    if library in ONLY_INSIDE_FUNCTIONS and not found.late:
        problems.append(f"{where}: {library} is an extra; import it inside a function")
    return problems


def _cycles(graph: dict[str, set[str]]) -> list[str]:
    """Cycles that the order of folders lets through: inside of one."""
    problems = []
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            problems.append(f"import cycle: {' -> '.join((*path[path.index(module) :], module))}")
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())
    return problems


def _class_problems(sources: dict[str, str]) -> list[str]:
    """A class is abstract, or nothing inherits from it; errors form an ordinary tree."""
    classes = [
        (module, node)
        for module, source in sources.items()
        if module != "base.errors"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    ]
    problems = []
    for module, node in classes:
        for base in map(_last_name, node.bases):
            named = [(owner, other) for owner, other in classes if other.name == base]
            named = [pair for pair in named if pair[0] == module] or named
            for _, other in named:
                if not _is_abstract(other):
                    problems.append(f"{module}: {node.name} inherits {base}, which is not abstract")
                elif not _is_abstract(node) and not _is_final(node):
                    problems.append(f"{module}: {node.name} implements {base}; mark it @final")
        if _is_abstract(node) and _is_final(node):
            problems.append(f"{module}: {node.name} is both abstract and final")
    return problems


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_abstract(node: ast.ClassDef) -> bool:
    bases = {_last_name(base) for base in node.bases}
    meta = {_last_name(keyword.value) for keyword in node.keywords if keyword.arg == "metaclass"}
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    marked = {_last_name(mark) for method in methods for mark in method.decorator_list}
    return bool(bases & {"ABC", "Protocol"} or meta & {"ABCMeta"} or "abstractmethod" in marked)


def _is_final(node: ast.ClassDef) -> bool:
    return any(_last_name(decorator) == "final" for decorator in node.decorator_list)


def test_the_package_keeps_the_architecture() -> None:
    assert check(read_package(), FOLDERS) == []


def test_no_folder_is_too_full() -> None:
    top = [p for p in (ROOT / PACKAGE).iterdir() if p.name != "__pycache__"]
    assert len(top) <= MOST_ENTRIES
    for folder in (p for p in (ROOT / PACKAGE).rglob("*") if p.is_dir()):
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_every_folder_is_there_and_says_what_it_is_for() -> None:
    sources = read_package()
    for folder in FOLDERS:
        assert ast.get_docstring(ast.parse(sources[folder])), folder


def test_the_documentation_has_the_same_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " < ".join(FOLDERS) in " ".join(text.split())


def questions() -> list[tuple[str, str, str]]:
    """The rows of "Where is ...?" in docs/architecture.md: question, path, name."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$")
    return [found.groups() for line in text.splitlines() if (found := row.match(line))]  # type: ignore[misc]


def test_what_a_newcomer_asks_for_is_where_the_documentation_says() -> None:
    assert len(questions()) >= 25
    for question, path, name in questions():
        tree = ast.parse((ROOT / PACKAGE / path).read_text(encoding="utf-8"))
        for part in name.split("."):  # a class's method as Class.method
            body = [
                node
                for node in ast.iter_child_nodes(tree)
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part
            ]
            assert body, (question, path, name)
            tree = body[0]  # type: ignore[assignment]


GOOD = {
    "": "from .low.a import thing as thing\n",
    "low": "",
    "low.a": "import math\nimport numpy as np\n",
    "high": "",
    "high.b": "from ..low.a import thing\n",
    "solvers": "from .base import Base as Base\n",
    "solvers.base": "import abc\nclass Base(abc.ABC): ...\n",
    "solvers.one": (
        "from typing import final\nfrom .base import Base\n@final\nclass One(Base): ...\n"
    ),
}
ORDER = ("low", "solvers", "high")


def test_good_sources_pass() -> None:
    assert check(GOOD, ORDER) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("low.a", "from ..high.b import x", "low.a, line 1: low imports high, which comes later"),
        ("low.a", "from ckptsched.high import x", "low imports high"),
        ("low.a", "import ckptsched.high.b", "low imports high"),
        ("low.a", "from .. import high", "low imports high"),
        ("low.a", "from ckptsched import thing", "low imports ckptsched"),
        ("low.a", "def f():\n    from ..high.b import x", "low.a, line 2: low imports high"),
        ("low.a", "class A:\n    def f(self):\n        from .. import high", "line 3: low imports"),
        ("low.a", "if TYPE_CHECKING:\n    from ..high.b import x", "low imports high"),
        ("low.a", "importlib.import_module('ckptsched.high')", "low imports high"),
        ("solvers.base", "from .one import One", "import cycle"),
        ("high.b", "from ..solvers.one import One", "solvers belong to ode.adaptive"),
        ("low.a", "import torch", "torch belongs to"),
        ("low.a", "def f():\n    from torch import nn", "torch belongs to"),
        ("low.a", "import matplotlib.pyplot", "inside a function"),
        ("high.b", "from ..fitting.trainers.lightning import x", "which not everyone can"),
        ("low.a", "import pandas", "not a library of this package"),
        ("solvers.one", "from .base import Base\nclass One(Base): ...", "mark it @final"),
        ("high.b", "class A: ...\nclass B(A): ...", "B inherits A, which is not abstract"),
        ("extra.c", "", "ckptsched.extra.c is in no folder of FOLDERS"),
    ],
)
def test_bad_sources_are_found(module: str, source: str, problem: str) -> None:
    other = {"fitting.trainers.lightning": ""}
    problems = check({**GOOD, **other, module: source}, ORDER)
    assert any(problem in found for found in problems), problems


def test_the_one_way_up_is_for_late_imports_alone() -> None:
    other = {"planner": "", "planner.explanation": "from .plan import y"}
    late = {**other, "planner.plan": "def f():\n    from .explanation import x"}
    assert check(late, ("planner",)) == []
    assert check({**other, "planner.plan": "from .explanation import x"}, ("planner",)) != []


def test_a_cycle_between_siblings_is_found() -> None:
    sources = {
        **GOOD,
        "solvers.one": "from . import two\n",
        "solvers.two": "from .one import One\n",
    }
    problems = check(sources, ORDER)
    assert problems == ["import cycle: solvers.one -> solvers.two -> solvers.one"]
