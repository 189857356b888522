"""Files: whole or not at all, sealed, never hanging, and nothing in them reaches a terminal."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptsched as cs
from ckptsched.base.errors import CkptschedError, PlanMismatchError, WorkloadError
from ckptsched.base.json_files import (
    checksum,
    parse_json,
    printable,
    read_regular,
    write_atomically,
)
from ckptsched.fitting.planning import plan
from ckptsched.planner.disk_cache import PlanCache
from ckptsched.planner.plan import Plan
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage
from tests.support.small_chains import mixed_chain

SAVED: dict[str, Callable[[Path], Any]] = {
    "chain": lambda path: mixed_chain().save(path),
    "plan": lambda path: plan(mixed_chain(), budget="60%", cache=False).save(path),
    "graph": lambda path: Graph.from_chain(mixed_chain()).save(path),
}
LOADS: dict[str, Callable[[Path], Any]] = {
    "chain": Chain.load,
    "plan": lambda path: Plan.load(path, certify=False),
    "graph": Graph.load,
}


def measured_chain() -> Chain:
    """One of a model, which a budget is kept by."""
    import torch
    from torch import nn

    return cs.profile(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), torch.randn(2, 4))


@pytest.mark.parametrize("kind", SAVED)
def test_threads_and_readers_never_meet_a_part(tmp_path: Path, kind: str) -> None:
    path, faults = tmp_path / "file.json", list[BaseException]()
    SAVED[kind](path)
    start = threading.Barrier(5)

    def work(act: Callable[[Path], Any]) -> None:
        start.wait()
        try:
            for _ in range(10):
                act(path)
        except BaseException as error:
            faults.append(error)

    jobs = [SAVED[kind]] * 3 + [LOADS[kind]] * 2
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_draft_follows_no_link_and_takes_no_file(tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "plan.json", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    # The name that drafts once had, which anybody could foresee.
    (tmp_path / f".plan.json.{os.getpid()}.draft").symlink_to(elsewhere)
    target.symlink_to(elsewhere)
    write_atomically(target, "new")
    assert elsewhere.read_text() == "mine"
    assert (target.read_text(), target.is_symlink()) == ("new", False)


def test_modes_stay_and_are_the_users(tmp_path: Path) -> None:
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.touch()
    write_atomically(path, "one")
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    write_atomically(path, "two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["n" * 255, "\u5c64" * 85, "\U0001f600" * 63, "n" * 128])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    for text in ("one", "two"):
        write_atomically(tmp_path / name, text)
        assert (tmp_path / name).read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(OSError, match="no regular file") as caught:
            mixed_chain().save(path)
        assert caught.value.filename == str(path)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match="no regular file"):
        read_regular(pipe)
    for load in (Chain.load, Plan.load):
        for path in (pipe, Path("/dev/zero")):
            with pytest.raises(CkptschedError, match="is no file but a pipe or device"):
                load(path)


def test_a_pipe_in_the_cache_hangs_no_plan(tmp_path: Path) -> None:
    shelf, one = PlanCache(tmp_path), plan(mixed_chain(), budget="60%", cache=False)
    request = {"fingerprint": one.fingerprint, "budget_bytes": one.budget_bytes}
    shelf.keep(request, one)
    [entry] = tmp_path.iterdir()
    kept = tmp_path / "kept"
    entry.rename(kept)
    os.mkfifo(entry)
    assert shelf.find(request, one.chain) is None
    entry.unlink()
    entry.symlink_to(kept)
    assert shelf.find(request, one.chain) is None
    entry.unlink()
    kept.rename(entry)
    assert shelf.find(request, one.chain) == one


def change(path: Path, act: Callable[[dict[str, Any]], object], *, seal: bool = False) -> None:
    data = json.loads(path.read_text())
    act(data)
    if seal:
        data["checksum"] = checksum(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("kind", SAVED)
def test_a_changed_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.json"
    SAVED[kind](path)
    change(path, lambda data: data.update(name="another"))
    with pytest.raises(CkptschedError, match="checksum"):
        LOADS[kind](path)


def test_a_measured_chain_needs_its_checksum(tmp_path: Path) -> None:
    path, chain = tmp_path / "chain.json", measured_chain()
    chain.save(path)
    assert Chain.load(path) == chain

    def lighten(data: dict[str, Any]) -> None:
        del data["checksum"]
        data["w_t"] = [x // 2 for x in data["w_t"]]

    change(path, lighten)
    with pytest.raises(WorkloadError, match=r"changed after it was saved.*make it anew"):
        Chain.load(path)
    # Figures of somebody's own are no model's.
    own = {**mixed_chain().to_json(), "signature": None}
    path.write_text(json.dumps(own))
    assert Chain.load(path) == mixed_chain()


@pytest.mark.parametrize("budget", ["45%", "60%", "80%", "100%"])
@pytest.mark.parametrize(
    "lie",
    [
        {"least_budget_bytes": 1},
        {"store_all_bytes": 10**12},
        {"store_all_bytes": 1},
        {"rounding_unit_bytes": 2**20},
        {"schedule_class": "all schedules"},
        {"budget_text": "5%"},
        "bound",
    ],
    ids=str,
)
def test_a_certificate_is_worked_out_again(tmp_path: Path, budget: str, lie: Any) -> None:
    path, made = tmp_path / "plan.json", plan(mixed_chain(), budget=budget, cache=False)
    made.save(path)
    assert Plan.load(path) == made
    lies = {"lower_bound_seconds": made.seconds} if lie == "bound" else lie
    change(path, lambda data: data["certificate"].update(lies), seal=True)
    found = Plan.load(path)
    text = {"budget_text": f"{made.budget_bytes} bytes"} if "budget_text" in lies else {}
    assert found == (plan_with(made, **text) if text else made)
    careful = Plan.load(path, certify=False)
    assert careful.schedule == made.schedule
    assert careful.lower_bound_seconds == made.chain.store_all_seconds
    assert careful.least_budget_bytes == made.peak_bytes
    assert careful.store_all_bytes == made.store_all_bytes


def plan_with(made: Plan, **changes: Any) -> Plan:
    from dataclasses import replace

    return replace(made, **changes)


def test_a_solver_that_there_is_not(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    SAVED["plan"](path)
    change(path, lambda data: data["certificate"].update(solver="magic"), seal=True)
    with pytest.raises(PlanMismatchError, match="magic"):
        Plan.load(path)


ABSURD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON data, by the keys on the way to it."""
    inside = data.items() if isinstance(data, dict) else enumerate(data)
    found = [path] if path else []
    for key, value in inside:
        here = (*path, key)
        found += places(value, here) if isinstance(value, (dict, list)) else [here]
    return found


@pytest.mark.parametrize("kind", SAVED)
def test_what_does_not_fit_its_place_is_a_typed_error_or_can_be_shown(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "file.json"
    SAVED[kind](path)
    saved = path.read_text()
    for *way, last in places(json.loads(saved)):
        for value in ([], {}, [[]], "x", True, -1):
            content = json.loads(saved)
            spot: Any = content
            for key in way:
                spot = spot[key]
            spot[last] = value
            if last != "checksum":
                content["checksum"] = checksum(content)
            path.write_text(json.dumps(content))
            try:
                found = LOADS[kind](path)
            except CkptschedError:
                continue
            str(found)
            assert found.fingerprint


@pytest.mark.parametrize("kind", SAVED)
@given(data=st.data())
def test_absurd_files_are_typed_errors(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("absurd") / "file.json"
    SAVED[kind](path)
    content = json.loads(path.read_text())
    *way, last = data.draw(st.sampled_from(places(content)))
    spot: Any = content
    for key in way:
        spot = spot[key]
    spot[last] = data.draw(ABSURD)
    if last != "checksum":
        content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))
    try:
        found = LOADS[kind](path)
    except CkptschedError:
        return
    str(found)  # what is accepted can be shown
    assert found.fingerprint


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"u_f": ' * 70 + "1" + "}" * 70,
        '{"u_f": ' + "9" * 10_000 + "}",
        '{"u_f": [Infinity]}',
        '{"u_f": [1e999]}',
        '{"name": "\\u001b[2J"}',
        '{"\\u009b2J": 1}',
        "\x00",
        "\ufeff{}",
    ],
)
def test_absurd_texts_are_typed_errors(tmp_path: Path, kind: str, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CkptschedError):
        LOADS[kind](path)


@given(st.text())
def test_what_is_printable_does_nothing_to_a_terminal(text: str) -> None:
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in printable(text))
    clean = printable(text)
    assert printable(clean) == clean
    assert parse_json(json.dumps(clean)) == clean


def test_names_of_modules_are_shown_as_escapes() -> None:
    import torch
    from torch import nn

    model = nn.Sequential()
    model.add_module("a\x1b[2J", nn.Linear(4, 4))
    model.add_module("b\u202e", nn.Linear(4, 4))
    made = plan(cs.profile(model, torch.randn(2, 4)), budget="100%", cache=False)
    for text in (str(made), str(made.explain()), made.chain.stage_name(1)):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert made.chain.stage_name(1) == "a\\x1b[2J"


@pytest.mark.parametrize("odd", ["a\nb", "\x1b[31m", "\u202e", "half \ud800"])
def test_models_with_odd_names_are_saved_and_loaded(tmp_path: Path, odd: str) -> None:
    class Hiding(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer(odd, torch.ones(4))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            counter = self._buffers[odd]
            assert counter is not None
            counter.add_(1.0)
            return super().forward(input) * counter

    model, x = torch.nn.Sequential(), torch.randn(3, 4)
    model.add_module(odd, Hiding())
    model.add_module("last", torch.nn.Tanh())
    chain = cs.profile(model, x)
    chain.save(tmp_path / "chain")
    assert Chain.load(tmp_path / "chain") == chain
    made = plan(chain, budget=10**9, solver="input_only", cache=False)
    made.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.chain == chain
    cs.checkpointed(model, loaded)(x).sum().backward()
    assert cs.verify(model, loaded, x).ok

    figures = {"state_bytes": 1, "tape_bytes": 1, "gradient_bytes": 1}
    stage = Stage(forward_seconds=1, backward_seconds=1, **figures, name=odd)
    mine = Chain(stages=(stage,), input_bytes=1, input_gradient_bytes=1, name=odd)
    mine.save(tmp_path / "mine")
    assert Chain.load(tmp_path / "mine").stages[0].name == printable(odd)
    Graph.from_chain(mine).save(tmp_path / "graph")
    assert Graph.load(tmp_path / "graph").names[1] == printable(odd)


def test_two_hidden_buffers_of_one_printed_name_are_refused() -> None:
    class Hiding(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("a\n", torch.ones(4))
            self.register_buffer("a\\n", torch.ones(4))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self._buffers["a\n"].add_(1.0)  # type: ignore[union-attr]
            return super().forward(input) * self._buffers["a\n"]  # type: ignore[operator]

    model, x = torch.nn.Sequential(Hiding(), torch.nn.Tanh()), torch.randn(3, 4)
    made = plan(cs.profile(model, x), budget=10**9, cache=False)
    with pytest.raises(PlanMismatchError, match=r"two buffers .* give it another name"):
        cs.checkpointed(model, made)


def test_planning_writes_nothing_to_standard_output() -> None:
    code = """
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage
import ckptsched as cs
kinds = [Stage(forward_seconds=k, backward_seconds=2 * k, state_bytes=10 + k, tape_bytes=30 + 5 * k,
               gradient_bytes=10 + k) for k in (1, 2, 3)]
chain = Chain(stages=tuple(s for s in kinds for _ in range(150)), input_bytes=10,
              input_gradient_bytes=10)
cs.plan(chain, budget="20%", cache=False, solver="run_dp")
from ckptsched.workload.graph import Graph
small = Chain(stages=tuple(kinds), input_bytes=10, input_gradient_bytes=10)
g = Graph.from_chain(small)
from ckptsched.solvers.graph.ilp_solver import GraphIlp
GraphIlp().solve_each(g, [10**6])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_first_profile_leaves_pythons_random_state() -> None:
    """A library that is imported on the way draws from it."""
    code = (
        "import random, torch, ckptsched as cs; before = random.getstate();"
        "cs.profile(torch.nn.Linear(2, 2), torch.randn(3, 2)); print(before == random.getstate())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
