"""The front of a trade-off: every step is a plan that holds, and the rows are not below it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings

from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_one
from ckptsched.planner.tradeoff import Tradeoff, tradeoff
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain
from tests.support.graphs import u_net
from tests.support.small_chains import mixed_chain, random_chains, uniform_chain


def check(found: Tradeoff) -> None:
    for step in found.front:
        assert step.peak_bytes == step.budget_bytes
        assert simulate(found.chain, step.schedule).peak_bytes == step.peak_bytes
        assert step.lower_bound_seconds <= step.seconds * (1 + 1e-9)
        assert Plan.from_json(step.to_json()).schedule == step.schedule
    for one, two in itertools.pairwise(found.front):
        assert one.peak_bytes < two.peak_bytes
        assert one.seconds > two.seconds
    for row in found.rows:
        under = [x for x in found.front if x.peak_bytes <= row.plan.budget_bytes]
        if len(found.rows) > 1:
            assert under[-1].seconds <= row.plan.seconds * (1 + 1e-9)


@pytest.mark.parametrize(
    "chain", [mixed_chain(), uniform_chain(12), u_net(2)], ids=lambda x: x.name
)
def test_the_front_holds(chain: Chain) -> None:
    check(tradeoff(chain, 5, cache=False))


@settings(max_examples=40, deadline=None)
@given(random_chains())
def test_the_front_of_any_chain_holds(chain: Chain) -> None:
    check(tradeoff(chain, 4, cache=False))


@settings(max_examples=25, deadline=None)
@given(random_chains(max_stages=5))
def test_the_front_has_every_step_of_an_exact_table(chain: Chain) -> None:
    found = tradeoff(chain, 4, cache=False)
    # Above the last but one no table was needed: the last budget is that of storing everything.
    low, high = (found.rows[k].plan.budget_bytes for k in (0, -2 if len(found.rows) > 1 else -1))
    for budget in range(low, high + 1):  # also those that nobody asked for
        alone = plan_one(chain, budget, cache=False, solver="chain_dp")
        under = [x for x in found.front if x.peak_bytes <= budget] or [found.rows[0].plan]
        assert under[-1].seconds <= alone.seconds * (1 + 1e-9)


def test_the_front_is_kept_with_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE", str(tmp_path))
    monkeypatch.setenv("CKPTSCHED_CACHE_SECONDS", "-1")
    first, second = (tradeoff(mixed_chain(), 4) for _ in range(2))
    assert list(tmp_path.rglob("*.json"))
    assert [x.schedule for x in first.front] == [x.schedule for x in second.front]
    assert len(first.front) > 1
