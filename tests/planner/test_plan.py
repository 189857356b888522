"""Plans: their figures, their table, and files that load again or say why not."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import PlanMismatchError
from ckptsched.base.json_files import write_atomically
from ckptsched.fitting.planning import plan
from ckptsched.planner.plan import Plan
from ckptsched.planner.plan_words import excess, words_of_class
from ckptsched.schedule.language import Schedule
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import get_solver
from ckptsched.workload.graph import Graph
from tests.support.graphs import graphs
from tests.support.small_chains import MIB, mixed_chain, random_chains, uniform_chain


@pytest.fixture
def tight() -> Plan:
    return plan(mixed_chain(), budget="50%")


@pytest.fixture
def saved(tight: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    tight.save(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(PlanMismatchError) as caught:
        Plan.load(path)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = False) -> None:
    """Change the data of a file; with a seal, its checksum is right again."""
    data = json.loads(path.read_text())
    change(data)
    if seal:
        rest = {key: value for key, value in data.items() if key != "checksum"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        data["checksum"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data))


def test_figures_are_those_of_the_simulation(tight: Plan) -> None:
    trace = simulate(tight.chain, tight.schedule)
    assert (tight.peak_bytes, tight.seconds, tight.forwards) == (
        trace.peak_bytes,
        trace.seconds,
        trace.forwards,
    )
    assert tight.least_budget_bytes <= tight.peak_bytes <= tight.budget_bytes
    assert tight.overhead == tight.seconds / tight.chain.store_all_seconds - 1 > 0
    assert 0 <= tight.gap == pytest.approx(tight.seconds / tight.lower_bound_seconds - 1)
    assert all(isinstance(x, int) for x in (tight.peak_bytes, tight.budget_bytes, tight.forwards))
    assert isinstance(tight.seconds, float)


@pytest.mark.parametrize(
    ("seconds", "least", "share"),
    [(3.0, 2.0, 0.5), (2.0, 2.0, 0.0), (0.1 + 0.2, 0.3, 0.0), (1.0, 2.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_excess_is_never_negative(seconds: float, least: float, share: float) -> None:
    assert excess(seconds, least) == share


def test_excess_over_nothing_is_infinite() -> None:
    assert excess(1.0, 0.0) == math.inf


def test_rounding_costs_nothing_where_the_unit_divides_all_sizes(tight: Plan) -> None:
    even = replace(plan(uniform_chain(), budget="50%"), lower_bound_seconds=0.1)
    assert even.gap > 0
    assert replace(even, rounding_unit_bytes=MIB).loss_to_rounding == 0
    assert replace(even, rounding_unit_bytes=1).loss_to_rounding == 0
    assert replace(even, rounding_unit_bytes=3 * MIB).loss_to_rounding == even.gap


def test_the_table_says_what_matters(tight: Plan) -> None:
    text = str(tight)
    figures = (
        tight.solver,
        "asked for as 50%",
        f"({tight.budget_bytes} bytes)",
        f"({tight.peak_bytes} bytes)",
        f"{tight.peak_bytes / tight.store_all_bytes:.1%} of store-all",
        f"{tight.overhead:+.2%}",
        f"{tight.forwards} of 12 stages",
        f"({tight.least_budget_bytes} bytes)",
        f"{words_of_class(tight)} takes less",
        f"{tight.gap:.2%}",
        f"operation {tight.trace.peak_position + 1} of {len(tight.schedule)}",
    )
    assert [figure for figure in figures if figure not in text] == []
    first = tight.trace.live_at_peak[0]
    assert first.name in text
    assert "block0.step[" in text
    assert text.isascii()


def test_the_table_adds_up_at_the_peak() -> None:
    everything = plan(mixed_chain(), budget="100%")
    hidden = everything.trace.live_at_peak[6:]
    assert f"and {len(hidden)} more" in str(everything)
    assert sum(x.bytes for x in everything.trace.live_at_peak) == everything.peak_bytes


def test_the_table_of_a_chain_without_names() -> None:
    chain = replace(mixed_chain(), name="", blocks=())
    assert str(plan(chain, budget="100%")).startswith("plan of a chain of 12 stages")


def test_repr_is_one_line(tight: Plan) -> None:
    assert repr(tight).count("\n") == 0
    assert str(tight.peak_bytes) in repr(tight)


@given(chain=random_chains(), share=st.integers(0, 100))
def test_json_round_trip(chain: Any, share: int) -> None:
    everything = plan(chain, budget=10**6)
    low, high = everything.least_budget_bytes, everything.store_all_bytes
    made = plan(chain, budget=max(1, low + (high - low) * share // 100))
    again = Plan.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert str(again) == str(made)
    assert made.gap >= 0
    assert made.overhead >= 0


def test_a_saved_plan_loads_again(tight: Plan, saved: Path) -> None:
    assert Plan.load(saved) == tight
    assert Plan.load(str(saved)) == tight
    assert [path.name for path in saved.parent.iterdir()] == ["plan.json"]


def test_the_file_is_readable(tight: Plan, saved: Path) -> None:
    lines = saved.read_text().splitlines()
    assert lines[1:3] == [' "format": "ckptsched plan",', ' "version": 1,']
    assert f'  "peak_bytes": {tight.peak_bytes},' in lines
    assert any(line.startswith('  "operations": "F1 ') or "T1 " in line for line in lines)
    assert len(lines) < 80


def test_the_layout_of_the_file_does_not_matter(tight: Plan, saved: Path) -> None:
    saved.write_text(json.dumps(json.loads(saved.read_text()), sort_keys=True, indent=4))
    assert Plan.load(saved) == tight


def test_a_missing_file(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere.json")
    assert "nowhere.json" in message
    assert "No such file" in message
    assert "plan.save(path)" in message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off(saved: Path, share: float) -> None:
    text = saved.read_text()
    saved.write_text(text[: int(len(text) * share)])
    message = refusal(saved)
    assert "is damaged: it is not JSON" in message
    assert "plan again" in message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 10**6, b"1" * 5000])
def test_a_file_of_something_else(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    message = refusal(saved)
    assert "plan.json" in message
    assert "not JSON" in message


def test_every_flipped_digit_is_noticed(saved: Path) -> None:
    text = saved.read_text()
    start = text.index('"certificate"')
    digits = [i for i, letter in enumerate(text) if letter.isdigit() and i > start]
    for i in digits[:: max(1, len(digits) // 60)]:
        saved.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
        message = refusal(saved)
        assert "damaged" in message
        assert "restore the file, or plan again" in message


def test_another_version(saved: Path) -> None:
    edit(saved, lambda data: data.update(version=7))
    assert "has version 7, this ckptsched reads 1: plan again" in refusal(saved)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("all schedules", "no schedule at all"),
        ("all pinned schedules", "no pinned schedule"),
        ("memory-persistent", "no memory-persistent schedule"),
        ("frontier-advancing schedules", "none of the frontier-advancing schedules"),
    ],
)
def test_classes_in_words(tight: Plan, name: str, words: str) -> None:
    assert words_of_class(replace(tight, schedule_class=name)) == words


@given(graph=graphs())
@settings(max_examples=25)
def test_plans_of_graphs_load_again(graph: Graph) -> None:
    made = plan(graph, budget="100%", solver="store_all")
    data = json.loads(json.dumps(made.to_json()))
    assert "graph" in data
    assert Plan.from_json(data) == made
    assert Plan.from_json(made.to_json(with_chain=False), chain=graph) == made
    with pytest.raises(PlanMismatchError):
        Plan.from_json(made.to_json(with_chain=False))
    assert f"{len(graph)} stages" in str(made)


def test_a_chain_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "chain.json"
    mixed_chain().save(path)
    message = refusal(path)
    assert "does not hold a plan but a chain" in message
    assert "ckptsched plan" in message


@pytest.mark.parametrize("data", [[], {}, None, 3, {"format": "something"}])
def test_other_data_are_no_plan(data: Any) -> None:
    with pytest.raises(PlanMismatchError, match="the data does not hold a plan"):
        Plan.from_json(data)


def test_a_foreign_fingerprint(saved: Path) -> None:
    foreign = replace(mixed_chain(), input_bytes=1).fingerprint
    edit(saved, lambda data: data.update(fingerprint=foreign), seal=True)
    message = refusal(saved)
    assert f"made for the chain {foreign[:16]}" in message
    assert f"comes with the chain {mixed_chain().fingerprint[:16]}" in message


def test_a_schedule_of_another_plan(saved: Path) -> None:
    other = get_solver("store_all").solve(mixed_chain(), 2**40)
    text = other.schedule.to_text()
    edit(saved, lambda data: data["schedule"].update(operations=text), seal=True)
    message = refusal(saved)
    assert f"its schedule takes {other.trace.peak_bytes} bytes" in message
    assert "plan again" in message


def test_a_schedule_that_breaks_a_rule(saved: Path) -> None:
    edit(saved, lambda data: data["schedule"].update(operations="F1 turn"), seal=True)
    assert "bad schedule: invalid schedule at operation 1 turn" in refusal(saved)


@pytest.mark.parametrize("words", ["F1 what", "F99999999999999999999"])
def test_a_schedule_that_cannot_be_read(saved: Path, words: str) -> None:
    edit(saved, lambda data: data["schedule"].update(operations=words), seal=True)
    assert "no plan that can be read" in refusal(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [("budget_bytes", 1.5), ("budget_bytes", "many"), ("solver", None), ("store_all_bytes", True)],
)
def test_a_certificate_of_wrong_types(saved: Path, key: str, value: Any) -> None:
    edit(saved, lambda data: data["certificate"].update({key: value}), seal=True)
    message = refusal(saved)
    assert key in message
    assert "plan again" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget_bytes": 3}, "bytes exceeds the budget of 3"),
        ({"rounding_unit_bytes": 0}, "rounding_unit_bytes is 0, it must be 1 or more"),
        ({"lower_bound_seconds": 1e9}, "the lower bound is 1000000000.0 s, the schedule takes"),
        ({"lower_bound_seconds": math.nan}, "NaN is no number"),
        ({"lower_bound_seconds": -math.inf}, "-Infinity is no number"),
        ({"peak_bytes": "many"}, "peak_bytes must be int, found 'many'"),
        ({"seconds": "long"}, "seconds must be float, found 'long'"),
        ({"seconds": None}, "seconds must be float, found None"),
        ({"lower_bound_seconds": True}, "lower_bound_seconds must be float, found True"),
    ],
)
def test_a_certificate_that_cannot_be_true(
    saved: Path, changes: dict[str, Any], words: str
) -> None:
    edit(saved, lambda data: data["certificate"].update(changes), seal=True)
    message = refusal(saved)
    assert words in message
    assert "plan again" in message


@pytest.mark.parametrize("key", ["certificate", "chain", "schedule"])
def test_a_part_is_missing(saved: Path, key: str) -> None:
    edit(saved, lambda data: data.pop(key), seal=True)
    assert key in refusal(saved)


def test_a_failed_save_leaves_the_old_file(tight: Plan, saved: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomically(saved, "half \ud800")
    assert Plan.load(saved) == tight
    assert [path.name for path in saved.parent.iterdir()] == ["plan.json"]


def test_saving_into_a_missing_folder_says_so(tight: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tight.save(tmp_path / "no" / "plan.json")


def test_plans_compare_by_value(tight: Plan) -> None:
    assert plan(mixed_chain(), budget="50%") == tight
    assert hash(plan(mixed_chain(), budget="50%")) == hash(tight)
    assert replace(tight, schedule=Schedule.of([])) != tight
