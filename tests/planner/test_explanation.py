"""plan.explain(): what binds, what other budgets buy, how baselines compare."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.budget import format_bytes, format_seconds
from ckptsched.fitting.planning import plan
from ckptsched.planner.explanation import Explanation, explain_plan
from ckptsched.planner.plan_words import label_of
from ckptsched.planner.planner import compare_baselines
from ckptsched.workload.chain import Chain
from tests.support.small_chains import mixed_chain, random_chains, uniform_chain


@pytest.fixture(scope="module")
def found() -> Explanation:
    return plan(mixed_chain(), budget="40%", cache=False).explain()


def test_what_binds_is_the_peak_of_the_trace(found: Explanation) -> None:
    trace = found.plan.trace
    assert found.live == trace.live_at_peak
    assert sum(item.bytes for item in found.live) == trace.peak_bytes
    assert f"operation {trace.peak_position + 1} of {len(found.plan.schedule)}" in found.binding
    text = str(found)
    assert found.binding in text
    largest = found.live[0]
    assert label_of(largest, found.plan.chain) in text
    assert f"{largest.bytes / trace.peak_bytes:.1%}" in text


def test_other_budgets_are_planned(found: Explanation) -> None:
    budget = found.plan.budget_bytes
    sizes = [item.budget_bytes for item in found.alternatives]
    assert sizes == [budget * 9 // 10, budget * 101 // 100, budget * 11 // 10]
    for item in found.alternatives:
        alone = plan(mixed_chain(), budget=item.budget_bytes)
        assert item.plan is not None
        assert item.plan.seconds <= alone.seconds * (1 + 1e-12)
        assert item.plan.peak_bytes <= item.budget_bytes
        saved = found.saved_seconds(item)
        assert saved == found.plan.seconds - item.plan.seconds
        assert (saved >= 0) == (item.factor > 1)
        change = "nothing" if not saved else format_seconds(abs(saved))
        assert change in str(found)


def test_a_faster_plan_for_the_same_budget_is_said() -> None:
    made = plan(mixed_chain(), budget="60%", solver="every_stage")
    same = made.explain().alternatives[1]
    best = plan(mixed_chain(), budget="60%").seconds
    assert same.budget_bytes == made.budget_bytes
    assert same.plan is not None
    assert same.plan.seconds <= best * (1 + 1e-12) < made.seconds
    assert "the same" in str(made.explain())
    assert len(explain_plan(made, solver="every_stage").alternatives) == 3


def test_baselines_stand_beside_the_plan(found: Explanation) -> None:
    assert found.baselines == compare_baselines(mixed_chain())
    lines = {line.split()[0]: line for line in str(found).splitlines() if line.strip()}
    for item in found.baselines:
        fits = item.peak_bytes <= found.plan.budget_bytes
        assert ("does not fit" in lines[item.name]) == (not fits)
        assert format_bytes(item.peak_bytes) in lines[item.name]
        if fits:
            assert f"{item.seconds / found.plan.seconds - 1:+.2%}" in lines[item.name]


def test_the_certificate_in_words(found: Explanation) -> None:
    text = str(found)
    assert text.startswith(f"Found by {found.plan.solver}: ")
    assert "schedule takes less" in text.splitlines()[1]
    missing = found.plan.store_all_bytes - found.plan.budget_bytes
    assert f"{format_bytes(missing)} more than the budget" in text
    assert text.isascii()
    assert repr(found) == f"<Explanation of {found.plan!r}>"


def test_a_budget_for_everything() -> None:
    found = plan(uniform_chain(), budget="100%").explain()
    text = str(found)
    assert "No schedule at all takes less time in this budget." in text
    assert "which the budget has room for" in text
    assert [found.saved_seconds(item) for item in found.alternatives[1:]] == [0, 0]


def test_the_least_budget_has_nothing_below() -> None:
    least = plan(mixed_chain(), budget="50%").least_budget_bytes
    found = plan(mixed_chain(), budget=least).explain()
    below = found.alternatives[0]
    assert below.plan is found.saved_seconds(below) is None
    assert below.least_budget_bytes == least
    line = next(line for line in str(found).splitlines() if line.startswith("-10%"))
    assert "nothing fits" in line
    assert format_bytes(least) in line


def test_a_gap_is_said() -> None:
    made = plan(mixed_chain(), budget="60%", solver="every_2")
    assert f"the gap is {made.gap:.2%}" in str(made.explain())


@given(chain=random_chains(), share=st.integers(30, 120))
@settings(max_examples=25)
def test_every_plan_can_be_explained(chain: Chain, share: int) -> None:
    everything = plan(chain, budget=10**6)
    budget = max(everything.store_all_bytes * share // 100, everything.least_budget_bytes, 1)
    found = explain_plan(plan(chain, budget=budget))
    assert str(found)
    for item in found.alternatives:
        if item.factor > 1:
            assert item.plan is not None
            assert item.plan.seconds <= found.plan.seconds
