"""The pages of the documentation: their code runs, their links lead somewhere, each is listed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import ckptsched as cs
from tests.docs.pages import (
    DOCS,
    PAGES,
    ROOT,
    SITE,
    anchors_of,
    libraries_of,
    name_of,
    prose_of,
    python_in,
)

WITH_CODE = [page for page in PAGES if python_in(page).strip()]
# Libraries with warnings of their own, and those that not every set-up has.
TRAINERS, OPTIONAL = {"accelerate", "lightning", "transformers"}, {"timm"}


def started(page: Path) -> Any:
    """A page as a parameter; warnings of trainers' libraries are theirs, ours remain errors."""
    libraries, marks = libraries_of(python_in(page)), []
    if libraries & (TRAINERS | OPTIONAL):
        marks.append(pytest.mark.slow)
    if libraries & TRAINERS:
        ours = "error::ckptsched.base.errors.BudgetWarning"
        marks += [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings(ours)]
    return pytest.param(page, id=name_of(page), marks=marks)


def readme_says_what_plans_take(names: dict[str, Any]) -> None:
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    plan = cs.plan_of(names["model"])
    assert plan.peak_bytes <= plan.budget_bytes < plan.store_all_bytes
    (said,) = re.findall(r"# storing everything takes (\d+) MiB", python_in(ROOT / "README.md"))
    assert round(plan.store_all_bytes / 2**20) == int(said)


def tour_is_kept_to(names: dict[str, Any]) -> None:
    assert names["result"].ok
    assert Path("tradeoff.png").exists()


# What a page's code comes to, beyond running.
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": readme_says_what_plans_take,
    "docs/tour.md": tour_is_kept_to,
}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What pages leave behind for the whole process is taken back."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()


@pytest.mark.parametrize("page", [started(page) for page in WITH_CODE])
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    code = python_in(page)
    for library in libraries_of(code) & OPTIONAL:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.stem}
    exec(compile(code, str(page), "exec"), names)
    CHECKS.get(name_of(page), lambda names: None)(names)


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_no_code_hides_from_the_tests(page: Path) -> None:
    """Python stands in blocks that say so: any other block is of a language that is not run."""
    text = page.read_text(encoding="utf-8")
    opened = re.findall(r"^ *```+(.*)$", text, re.MULTILINE)[::2]
    run = {"python", "sh", "text", "json", "{toctree}", "{figure}", "{eval-rst}"}
    assert {word.partition(" ")[0] for word in opened} <= run
    prose = prose_of(page)
    assert re.findall(r"^    (?:import|from|def|class) .*$", prose, re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose_of(page)):
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert lost == []


def listed_in(page: Path) -> set[Path]:
    """The pages that a page's tables of contents name."""
    text = page.read_text(encoding="utf-8")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    return {page.parent / f"{name}.md" for name in names}


def test_the_reference_describes_each_table_of_the_api() -> None:
    """`docs/conf.py` puts what docstrings say where a page of the reference names a table."""
    tables = re.split(r"^## ", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles = [table.partition("\n")[0] for table in tables if re.search(r"^\| `", table, re.M)]
    marks = re.compile(r"^<!-- described: (.*) -->$", re.MULTILINE)
    named = [title for page in SITE for title in marks.findall(page.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted([*titles, "ckptsched.ode"])


def test_each_page_is_in_one_table_of_contents() -> None:
    listed = [entry for page in SITE for entry in listed_in(page)]
    assert sorted(listed) == sorted(set(SITE) - {DOCS / "index.md"})
