"""Plans on disk: found again, checked, replaced where they are damaged, never in the way."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from ckptsched.base import progress
from ckptsched.base.errors import InfeasibleBudgetError, StorageError
from ckptsched.base.json_files import checksum
from ckptsched.fitting.planning import plan
from ckptsched.planner.disk_cache import PlanCache, open_cache, source_digest
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.solvers import get_solver
from ckptsched.solvers.base import Solution
from ckptsched.workload.chain import Chain
from tests.support.small_chains import mixed_chain, uniform_chain

REQUEST = {"fingerprint": mixed_chain().fingerprint, "budget_bytes": 0, "solver": "auto"}


def made(budget: str = "50%") -> Plan:
    return plan(mixed_chain(), budget=budget, cache=False)


def request(of: Plan, **changes: Any) -> dict[str, Any]:
    return REQUEST | {"budget_bytes": of.budget_bytes} | changes


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan counts as one that took long."""
    monkeypatch.setenv("CKPTSCHED_CACHE_SECONDS", "-inf")


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The budgets of every solve."""
    from ckptsched.planner.solver_choice import Portfolio

    found: list[list[int]] = []
    answers = Portfolio.answers

    def noted(self: Portfolio) -> Any:
        found.append(list(self.sizes))
        return answers(self)

    monkeypatch.setattr(Portfolio, "answers", noted)
    return found


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "plans").glob("*")) if folder.exists() else []


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    shelf, one = PlanCache(tmp_path / "deep" / "plans"), made()
    assert shelf.find(request(one), mixed_chain()) is None
    shelf.keep(request(one), one)
    assert shelf.find(request(one), mixed_chain()) == one
    assert shelf.find(request(one, solver="chain_dp"), mixed_chain()) is None
    assert shelf.find(request(one, budget_bytes=1), mixed_chain()) is None


def test_threads_that_keep_and_find_at_once_meet_whole_plans(tmp_path: Path) -> None:
    """The cache has room for one or two of the plans, so that entries go while others read them."""
    plans = [made(budget) for budget in ("100%", "70%", "50%")]
    size = max(len(json.dumps(one.to_json(with_chain=False))) for one in plans)
    shelf, start = PlanCache(tmp_path, most_bytes=5 * size // 2), threading.Barrier(4)

    def work(first: int) -> int:
        start.wait()
        hits = 0
        for k in range(first, first + 40):
            one = plans[k % len(plans)]
            shelf.keep(request(one), one)
            found = shelf.find(request(one), mixed_chain())
            assert found in (one, None)
            hits += found is not None
        return hits

    with ThreadPoolExecutor(4) as pool:
        hits = list(pool.map(work, range(4)))
    assert min(hits) > 0
    assert all(json.loads(path.read_text())["plan"] for path in tmp_path.glob("*.json"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= shelf.most_bytes


def test_a_plan_takes_the_name_of_the_chain_that_asks(tmp_path: Path) -> None:
    shelf, one = PlanCache(tmp_path), made()
    shelf.keep(request(one), one)
    found = shelf.find(request(one), mixed_chain("another name"))
    assert found is not None
    assert found.chain.name == "another name"


def change_certificate(entry: dict[str, Any]) -> None:
    entry["plan"]["certificate"]["solver"] = "magic"


def change_schedule(entry: dict[str, Any]) -> None:
    operations = get_solver("store_all").solve(mixed_chain(), 2**60).schedule.to_text()
    entry["plan"]["schedule"]["operations"] = operations
    entry["plan"]["checksum"] = checksum(entry["plan"])


def change_budget(entry: dict[str, Any]) -> None:
    entry["plan"]["certificate"]["budget_bytes"] += 1
    entry["plan"]["checksum"] = checksum(entry["plan"])


@pytest.mark.parametrize(
    "damage",
    [
        change_certificate,
        change_schedule,
        change_budget,
        lambda entry: entry.update(format="something else"),
        lambda entry: entry["request"].update(solver="chain_dp"),
        lambda entry: entry.pop("plan"),
        lambda entry: entry.clear(),
    ],
)
def test_an_entry_that_was_changed_is_removed(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    shelf, one = PlanCache(tmp_path), made()
    shelf.keep(request(one), one)
    [path] = tmp_path.iterdir()
    entry = json.loads(path.read_text())
    damage(entry)
    path.write_text(json.dumps(entry))
    assert shelf.find(request(one), mixed_chain()) is None
    assert not path.exists()
    shelf.keep(request(one), one)
    assert shelf.find(request(one), mixed_chain()) == one


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_an_entry_that_is_no_data_is_removed(tmp_path: Path, content: bytes) -> None:
    shelf, one = PlanCache(tmp_path), made()
    shelf.keep(request(one), one)
    [path] = tmp_path.iterdir()
    path.write_bytes(content)
    assert shelf.find(request(one), mixed_chain()) is None
    assert not path.exists()


def test_an_entry_of_another_chain_is_not_taken(tmp_path: Path) -> None:
    shelf, one = PlanCache(tmp_path), made()
    shelf.keep(request(one), one)
    assert shelf.find(request(one), uniform_chain()) is None


def test_what_was_used_least_lately_goes_first(tmp_path: Path) -> None:
    shelf = PlanCache(tmp_path)
    plans = [made(f"{percent}%") for percent in (40, 50, 60, 70)]
    for i, one in enumerate(plans[:3]):
        shelf.keep(request(one), one)
        for path in tmp_path.iterdir():
            if path.stat().st_mtime > 1e9:
                os.utime(path, (i, i))
    assert shelf.find(request(plans[0]), mixed_chain())  # now the one used last
    most = sum(path.stat().st_size for path in tmp_path.iterdir())
    small = replace(shelf, most_bytes=most)
    small.keep(request(plans[3]), plans[3])
    left = [one.budget_text for one in plans if small.find(request(one), mixed_chain())]
    assert left == ["40%", "60%", "70%"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= most


def test_a_plan_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    one = made()
    PlanCache(tmp_path / "plans", most_bytes=100).keep(request(one), one)
    assert not (tmp_path / "plans").exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    one, draft = made(), f".{'0' * 64}.json.1.draft"
    (tmp_path / "thesis.json").write_text("x" * 10_000)
    for name, age in ((draft, 1), (draft.replace("0", "1"), 2e9)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (age, age) if age == 1 else None)
    PlanCache(tmp_path, most_bytes=9_000).keep(request(one), one)
    assert (tmp_path / "thesis.json").exists()
    assert not (tmp_path / draft).exists()  # of a process that was killed long ago
    assert (tmp_path / draft.replace("0", "1")).exists()  # of one that may be writing


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    shelf, one = PlanCache(tmp_path / "file" / "plans"), made()
    shelf.keep(request(one), one)
    assert shelf.find(request(one), mixed_chain()) is None


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE", str(tmp_path))
    assert open_cache() == PlanCache(tmp_path / "plans")
    monkeypatch.setenv("CKPTSCHED_CACHE", " OFF ")
    assert open_cache() is None
    monkeypatch.delenv("CKPTSCHED_CACHE")
    assert open_cache() == PlanCache(Path(platformdirs.user_cache_dir("ckptsched")) / "plans")


def test_a_second_plan_is_read(slow: None, solves: list[list[int]], cache_of_its_own: Path) -> None:
    first = plan(mixed_chain(), budget="50%")
    assert plan(mixed_chain(), budget="50%") == first
    # The same bytes in other words: from the same entry.
    again = plan(mixed_chain(), budget=first.budget_bytes)
    assert again == replace(first, budget_text=f"{first.budget_bytes} bytes")
    assert len(solves) == len(entries(cache_of_its_own)) == 1
    plan(mixed_chain(), budget="50%", solver="chain_dp")
    plan(uniform_chain(), budget="50%")
    assert len(solves) == len(entries(cache_of_its_own)) == 3
    plan(mixed_chain(), budget="50%", cache=False)
    assert len(solves) == 4


def test_plans_of_one_solve_belong_together(slow: None, solves: list[list[int]]) -> None:
    # What a solve finds for a budget may depend on the others, so a plan alone is another.
    several = plan_each(mixed_chain(), ["40%", "60%"])
    assert plan_each(mixed_chain(), ["40%", "60%"]) == several
    assert len(solves) == 1
    plan(mixed_chain(), budget="60%")
    assert len(solves) == 2


def test_what_fails_is_not_kept(
    slow: None, solves: list[list[int]], cache_of_its_own: Path
) -> None:
    for _ in range(2):
        with pytest.raises(InfeasibleBudgetError):
            plan(mixed_chain(), budget=1)
    assert len(solves) == 2
    assert entries(cache_of_its_own) == []


def test_a_quick_plan_is_not_kept(monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE_SECONDS", "1e9")
    plan(mixed_chain(), budget="50%")
    assert entries(cache_of_its_own) == []


def test_seconds_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE_SECONDS", "soon")
    with pytest.raises(StorageError, match="'soon'; it may be a number of seconds"):
        plan(mixed_chain(), budget="50%")


def test_the_cache_can_be_turned_off(
    slow: None, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path
) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE", "off")
    plan(mixed_chain(), budget="50%")
    assert not (cache_of_its_own / "plans").exists()


def test_other_code_reads_no_plans_of_this(
    slow: None, solves: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(mixed_chain(), budget="50%")
    assert len(source_digest()) == 64
    monkeypatch.setattr("ckptsched.planner.planner.source_digest", lambda: "another")
    plan(mixed_chain(), budget="50%")
    assert len(solves) == 2


def test_an_interrupted_plan_leaves_nothing_behind(
    slow: None, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path
) -> None:
    class Endless:
        name = "endless"

        def solve_each(self, chain: Chain, budgets: list[int]) -> list[Solution]:
            while True:
                progress.report("endless", 0.5)

    def interrupt(what: str, share: float) -> None:
        assert (what, share) == ("endless", 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptsched.planner.solver_choice.get_solver", lambda name: Endless())
    with progress.listening(interrupt), pytest.raises(KeyboardInterrupt):
        plan(mixed_chain(), budget="50%", solver="endless")
    assert entries(cache_of_its_own) == []
    assert not progress.is_heard()


def test_an_interrupted_write_leaves_nothing_behind(
    slow: None, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path
) -> None:
    def interrupt(_: int) -> None:
        assert entries(cache_of_its_own)  # the draft
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan(mixed_chain(), budget="50%")
    assert entries(cache_of_its_own) == []
