"""The dynamic program on the same chain in other units, or in smaller stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError
from ckptsched.solvers import Baseline, ChainDp
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage
from tests.oracles.brute_force import (
    persistent_frontier,
)
from tests.solvers.chain.answers import seconds_of
from tests.support.strategies import (
    chains,
    scaled_chains,
)


def scaled(chain: Chain, *, seconds: float = 1.0, size: int = 1) -> Chain:
    """The same chain in other units."""
    data = chain.to_json()
    for key in ("u_f", "u_b"):
        data[key] = [seconds * x for x in data[key]]
    for key in ("w_a", "w_t", "w_g", "o_f", "o_b", "w_p"):
        data[key] = [size * x for x in data[key]]
    data |= {"u_loss": seconds * data["u_loss"]}
    return Chain.from_json(data | {key: size * data[key] for key in ("o_loss", "w_held")})


@settings(max_examples=40, deadline=None)
@given(
    scaled_chains(most_stages=8),
    st.integers(-50, 50),
    st.sampled_from([None, 20]),
    st.floats(0, 1),
)
def test_scaling_all_times_leaves_the_schedule_unchanged(
    chain: Chain, exponent: int, slots: int | None, share: float
) -> None:
    budget = budget_between(chain, share)
    first = ChainDp(slots).solve(chain, budget)
    second = ChainDp(slots).solve(scaled(chain, seconds=2.0**exponent), budget)
    assert first.schedule == second.schedule
    # A bound that is the plan's own seconds differs from them in the last digits.
    assert second.lower_bound_seconds == pytest.approx(
        2.0**exponent * first.lower_bound_seconds, rel=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=8), st.integers(2, 10**6), st.floats(0, 1))
def test_scaling_all_bytes_leaves_the_schedule_unchanged(
    chain: Chain, factor: int, share: float
) -> None:
    budget = budget_between(chain, share)
    first = ChainDp().solve(chain, budget)
    for spare in (0, factor - 1):
        second = ChainDp().solve(scaled(chain, size=factor), factor * budget + spare)
        assert first.schedule == second.schedule
        assert first.lower_bound_seconds == second.lower_bound_seconds


def budget_between(chain: Chain, share: float) -> int:
    """A budget between the least and that of storing everything."""
    most = Baseline("store_all").solve(chain, 10**15).trace.peak_bytes
    (none,) = ChainDp().solve_each(chain, [-1])
    assert isinstance(none, InfeasibleBudgetError)
    assert none.least_budget_bytes is not None
    return none.least_budget_bytes + int(share * (most - none.least_budget_bytes))


@st.composite
def chains_to_split(draw: st.DrawFn) -> tuple[Chain, Chain]:
    """A chain, and the same with one stage in two.

    Every schedule of the first is one of the second: the two parts run one after the other, the
    state between them goes at once, and what it takes comes off the overheads.
    """
    chain = draw(chains(most_stages=4))
    k = draw(st.integers(0, len(chain) - 1))
    stage = chain.stages[k]
    tape = draw(st.integers(0, stage.tape_bytes - stage.state_bytes))
    between = draw(st.integers(0, min(stage.forward_overhead_bytes, tape)))
    most = min(stage.backward_overhead_bytes, stage.tape_bytes - tape)
    gradient = draw(st.integers(0, most))
    parameters = draw(st.integers(0, stage.parameter_gradient_bytes))
    share = draw(st.integers(0, 9))
    first = Stage(
        forward_seconds=min(float(share), stage.forward_seconds),
        backward_seconds=min(float(share), stage.backward_seconds),
        state_bytes=between,
        tape_bytes=tape,
        gradient_bytes=gradient,
        forward_overhead_bytes=stage.forward_overhead_bytes - between,
        backward_overhead_bytes=stage.backward_overhead_bytes,
        parameter_gradient_bytes=parameters,
    )
    second = replace(
        stage,
        forward_seconds=stage.forward_seconds - first.forward_seconds,
        backward_seconds=stage.backward_seconds - first.backward_seconds,
        tape_bytes=stage.tape_bytes - tape,
        forward_overhead_bytes=stage.forward_overhead_bytes - between,
        backward_overhead_bytes=stage.backward_overhead_bytes - gradient,
        parameter_gradient_bytes=stage.parameter_gradient_bytes - parameters,
    )
    stages = (*chain.stages[:k], first, second, *chain.stages[k + 1 :])
    return chain, replace(chain, stages=stages)


@settings(max_examples=200, deadline=None)
@given(chains_to_split())
def test_splitting_a_stage_in_two_is_never_worse(pair: tuple[Chain, Chain]) -> None:
    whole, parts = pair
    budgets = [peak for peak, _ in persistent_frontier(whole)]
    one, two = (ChainDp().solve_each(chain, budgets) for chain in pair)
    for before, after in zip(one, two, strict=True):
        assert seconds_of(after) <= seconds_of(before) + 1e-9
    assert parts.store_all_seconds == pytest.approx(whole.store_all_seconds)
