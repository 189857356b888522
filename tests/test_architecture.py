"""Imports go down only, each library stays in its modules, classes are abstract or final.

The source is read, not run, so that imports inside functions count as well. `check` takes
sources as text: the last tests feed it bad ones, to show that it can fail.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ckptsched"

# The rank of each module. A module imports from lower ranks only; inside a family folder it may
# import a sibling of its own rank as well, as long as no cycle arises. The table stands in
# docs/architecture.md too, where it says why.
RANKS = {
    "compiled": 0,
    "cache_folder": 0,
    "errors": 0,
    "advice": 2,
    "devices": 2,
    "turns": 0,
    "tensor_types": 0,
    "aliases": 1,
    "budget": 1,
    "checksums": 1,
    "context": 1,
    "files": 1,
    "foreign": 0,
    "holds": 1,
    "inventory": 2,
    "plots": 1,
    "memory_allocator": 1,
    "memory_trace": 1,
    "progress": 1,
    "settings": 1,
    "sharding": 1,
    "side_outputs": 1,
    "transforms": 1,
    "trees": 1,
    "wrappers": 1,
    "engine": 1,
    "tables": 1,
    "trace": 1,
    "stages": 1,
    "workload": 2,
    "growth": 3,
    "ode.tableaus": 1,
    "ode.methods": 1,
    "bar": 2,
    "ambient": 2,
    "saved_hooks": 0,
    "ambient_check": 3,
    "hidden": 2,
    "ledger_bound": 2,
    "tape_walk": 2,
    "memory": 2,
    "model_state": 2,
    "schedule": 2,
    "graph": 3,
    "liveness": 3,
    "tracing": 3,
    "graph_simulator": 4,
    "ledger": 4,
    "structure": 4,
    "stretches": 4,
    "tape": 3,
    "side_search": 4,
    "usage": 4,
    "overruns": 4,
    "ode.steps": 4,
    "ode.krylov": 4,
    "ode.implicit": 4,
    "ode.integrators": 4,
    "ode.grid": 4,
    "ode.closure": 4,
    "ode.places": 4,
    "ode.tolerances": 4,
    "ode.callbacks": 4,
    "ode.adjoint": 4,
    "ode.options": 4,
    "ode.separable": 4,
    "ode.attributes": 4,
    "ode.fingerprint": 4,
    "ode.solve": 4,
    "ode.backsolve": 4,
    "ode.slopes": 4,
    "ode.block": 4,
    "ode.control": 4,
    "ode.embedded": 4,
    "ode.parts": 4,
    "ode.problem": 4,
    "ode.carried": 4,
    "ode.integration": 4,
    "ode.environment": 4,
    "ode.footprint": 4,
    "ode.statistics": 4,
    "simulator_kernel": 4,
    "ledger_kernel": 1,
    "ledger_arrays": 3,
    "simulator": 5,
    "survey": 5,
    "assembly": 6,
    "timing": 6,
    "variations": 6,
    "weighing": 6,
    "solvers.base": 6,
    "estimate": 7,
    "solvers.baselines": 7,
    "solvers.revolve": 7,
    "solvers.revolve_kernel": 7,
    "solvers.periodic": 7,
    "solvers.chain_storages": 7,
    "solvers.chain_sizes": 7,
    "solvers.chain_kernel": 7,
    "solvers.chain_walk": 7,
    "solvers.chain_table": 7,
    "solvers.chain_lowering": 7,
    "solvers.chain_search": 7,
    "solvers.chain_dp": 7,
    "solvers.run_structure": 7,
    "solvers.run_kernel": 7,
    "solvers.run_table": 7,
    "solvers.run_lowering": 7,
    "solvers.run_groups": 7,
    "solvers.run_bound_kernel": 7,
    "solvers.quiet_highs": 7,
    "solvers.run_bound": 7,
    "solvers.run_dp": 7,
    "solvers.pinned_sizes": 7,
    "solvers.pinned_table": 7,
    "solvers.pinned_bound": 7,
    "solvers.pinned_heap": 7,
    "solvers.pinned_moves": 7,
    "solvers.pinned_space": 7,
    "solvers.pinned_least": 7,
    "solvers.exact_search": 7,
    "solvers.persistence": 7,
    "solvers.sliding_table": 7,
    "solvers.sliding_lowering": 7,
    "solvers.beyond_persistent": 7,
    "solvers.graph_runs": 7,
    "solvers.graph_cuts": 7,
    "solvers.graph_orders": 7,
    "solvers.graph_model": 7,
    "solvers.graph_milp": 7,
    "solvers.graph_ilp": 7,
    "solvers.online": 7,
    "ode.replay": 8,
    "ode.bounded": 8,
    "plans": 8,
    "profiler": 8,
    "plan_cache": 9,
    "portfolio": 9,
    "program": 9,
    "certify": 10,
    "planner": 11,
    "surroundings": 10,
    "gathering": 11,
    "higher": 11,
    "run": 12,
    "executor": 13,
    "explain": 12,
    "frontier": 12,
    "inverse": 12,
    "fitting": 14,
    "ode.kept": 14,
    "ode.measuring": 14,
    "ode.output_loss": 14,
    "ode.adaptive": 14,
    "ode.planned": 14,
    "ode.odeint": 14,
    "ode.adaptively": 14,
    "verifier": 14,
    "report": 15,
    "targets": 15,
    "cli_inputs": 16,
    "cli": 17,
    "__main__": 18,
}
FAMILIES = ("ode", "solvers")

# The one way up: a method that is as much as the name of a function from higher up, which it
# imports when it is called.
LATE = {("plans", "explain"), ("plans", "planner")}

# Solvers belong to the planner. What measures and runs models works with chains and plans,
# whoever made them. An adaptive solve has no plan: where its states are kept is decided on the way.
SOLVER_USERS = {"certify", "planner", "portfolio", "ode.replay", "ode.bounded"}

# Who may import what comes from outside the standard library.
TORCH_SIDE = {
    "advice",
    "ambient",
    "saved_hooks",
    "settings",
    "aliases",
    "assembly",
    "checksums",
    "context",
    "devices",
    "estimate",
    "executor",
    "fitting",
    "gathering",
    "hidden",
    "higher",
    "holds",
    "inventory",
    "memory",
    "memory_allocator",
    "memory_trace",
    "ode",
    "model_state",
    "profiler",
    "program",
    "run",
    "structure",
    "survey",
    "engine",
    "tape",
    "tensor_types",
    "sharding",
    "side_outputs",
    "side_search",
    "surroundings",
    "targets",
    "timing",
    "transforms",
    "trees",
    "turns",
    "tracing",
    "verifier",
    "variations",
    "overruns",
    "tape_walk",
    "usage",
    "weighing",
    "wrappers",
}
THIRD_PARTY = {
    "click": {"cli", "cli_inputs"},
    "highspy": {"solvers.graph_milp", "solvers.quiet_highs", "solvers.run_bound"},
    "matplotlib": {"plots"},
    "networkx": {"graph", "solvers.graph_orders", "tracing"},
    "numba": {"solvers", "simulator_kernel", "ledger_kernel", "compiled"},
    "numpy": None,  # any module
    "platformdirs": {"cache_folder"},
    "pulp": {"solvers.graph_model", "solvers.graph_milp"},
    "rich": {"bar", "report"},
    "torch": TORCH_SIDE,
}
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


def family(module: str) -> str:
    """The folder of alternatives that a module belongs to; empty outside of one."""
    head = module.split(".")[0]
    return head if head in FAMILIES else ""


def check(sources: dict[str, str], ranks: dict[str, int]) -> list[str]:
    """Every breach of the architecture in these sources, as sentences."""
    packages = {""} | {name for name in sources if any(o.startswith(f"{name}.") for o in sources)}
    packages |= set(FAMILIES) & set(sources)
    top = max(ranks.values(), default=0)

    def rank_of(module: str) -> int | None:
        if module == "":
            return top + 1
        if module in packages:  # it re-exports: as high as the highest of its modules
            inner = [rank for name, rank in ranks.items() if name.startswith(f"{module}.")]
            return max(inner, default=None)
        return ranks.get(module)

    problems: list[str] = []
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for module, source in sources.items():
        shown = f"{PACKAGE}.{module}" if module else PACKAGE
        rank = rank_of(module)
        if rank is None:
            problems.append(f"{shown} has no rank: add it to RANKS and to docs/architecture.md")
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
            target_rank = rank_of(target)
            inside = family(module) and family(module) == family(target)
            if family(target) == "solvers" and not inside and module not in SOLVER_USERS | {""}:
                problems.append(
                    f"{where}: solvers belong to {', '.join(sorted(SOLVER_USERS))} only"
                )
            if target_rank is None:
                problems.append(f"{where}: imports {target}, which has no rank: add it to RANKS")
            elif target_rank > rank or (target_rank == rank and not inside):
                direction = "up" if target_rank > rank else "sideways"
                problems.append(
                    f"{where}: imports {direction}, from rank {rank} {target or PACKAGE} "
                    f"of rank {target_rank}"
                )
    problems += _cycles(graph)
    return problems + _class_problems(sources)


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
    if allowed is not None and module not in allowed and family(module) not in allowed:
        problems.append(f"{where}: {library} belongs to {', '.join(sorted(allowed))} only")
    if library in ONLY_INSIDE_FUNCTIONS and not found.late:
        problems.append(f"{where}: {library} is an extra; import it inside a function")
    return problems


def _cycles(graph: dict[str, set[str]]) -> list[str]:
    """Cycles that the ranks let through: between siblings of a family."""
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
        if module != "errors"
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
    assert check(read_package(), RANKS) == []


def test_every_rank_belongs_to_a_module() -> None:
    assert sorted(set(RANKS) - set(read_package())) == [], "take these out of RANKS"


def test_the_documentation_lists_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    ranked = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            ranked |= {name.strip(" `"): int(cells[0]) for name in cells[1].split(",")}
    assert ranked == RANKS


GOOD = {
    "": "from .low import thing as thing\n",
    "low": "import math\nimport numpy as np\n",
    "high": "from .low import thing\n",
    "solvers": "from .base import Base as Base\n",
    "solvers.base": "import abc\nclass Base(abc.ABC): ...\n",
    "solvers.one": (
        "from typing import final\nfrom .base import Base\n@final\nclass One(Base): ...\n"
    ),
}
GOOD_RANKS = {"low": 0, "high": 1, "solvers.base": 1, "solvers.one": 2}


def test_good_sources_pass() -> None:
    assert check(GOOD, GOOD_RANKS) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("low", "from .high import x", "low, line 1: imports up, from rank 0 high of rank 1"),
        ("low", "from ckptsched.high import x", "imports up"),
        ("low", "import ckptsched.high", "imports up"),
        ("low", "from . import high", "imports up"),
        ("low", "from ckptsched import thing", "imports up, from rank 0 ckptsched"),
        ("low", "def f():\n    from .high import x", "low, line 2: imports up"),
        ("low", "class A:\n    def f(self):\n        from . import high", "line 3: imports up"),
        ("low", "if TYPE_CHECKING:\n    from .high import x", "imports up"),
        ("low", "importlib.import_module('ckptsched.high')", "imports up"),
        ("high", "from .solvers.base import Base", "imports sideways"),
        ("high", "from .solvers import Base", "imports up, from rank 1 solvers of rank 2"),
        ("solvers.base", "from .one import One", "imports up"),
        ("solvers.base", "from ..high import x", "imports sideways"),
        ("high", "from .solvers.one import One", "solvers belong to certify, ode.bounded"),
        ("low", "import torch", "torch belongs to"),
        ("low", "def f():\n    from torch import nn", "torch belongs to"),
        ("low", "import matplotlib.pyplot", "inside a function"),
        ("low", "import pandas", "not a library of this package"),
        ("solvers.one", "from .base import Base\nclass One(Base): ...", "mark it @final"),
        ("high", "class A: ...\nclass B(A): ...", "B inherits A, which is not abstract"),
        ("extra", "", "ckptsched.extra has no rank: add it to RANKS"),
    ],
)
def test_bad_sources_are_found(module: str, source: str, problem: str) -> None:
    problems = check({**GOOD, module: source}, GOOD_RANKS)
    assert any(problem in found for found in problems), problems


def test_the_one_way_up_is_for_late_imports_alone() -> None:
    sources = {"plans": "def f():\n    from .explain import x", "explain": "from .plans import y"}
    ranks = {"plans": 1, "explain": 2}
    assert check(sources, ranks) == []
    assert check({**sources, "plans": "from .explain import x"}, ranks) != []


def test_a_cycle_between_siblings_is_found() -> None:
    sources = {
        **GOOD,
        "solvers.one": "from . import two\n",
        "solvers.two": "from .one import One\n",
    }
    problems = check(sources, {**GOOD_RANKS, "solvers.two": 2})
    assert problems == ["import cycle: solvers.one -> solvers.two -> solvers.one"]
