"""Branch and bound in exact bytes: the optimum where it ends, a lower bound wherever it stops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.simulator.simulator import simulate
from ckptsched.solvers.chain.branch_and_bound import search
from ckptsched.solvers.chain.sizes import chain_sizes
from ckptsched.solvers.chain.tables import Table, least_memory
from ckptsched.solvers.chain.to_schedule import outline
from ckptsched.workload.chain import Chain
from tests.oracles.brute_force import cheapest_of, persistent_frontier
from tests.support.strategies import chains_with_options, scaled_chains


@settings(max_examples=80)
@given(
    st.one_of(scaled_chains(), chains_with_options()),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from((1, 30, 100, 300, 10**6)),
)
def test_the_optimum_or_a_bound(chain: Chain, slots: int, share: float, looks: int) -> None:
    frontier = persistent_frontier(chain)
    least, most = frontier[0][0], frontier[-1][0]
    budget = int(least + share * (most - least))
    sizes = chain_sizes(chain)
    needs, m = least_memory(sizes), budget - sizes.fixed
    base, known = chain.store_all_seconds, outline(needs, m).extra_seconds
    optimum = cheapest_of(frontier, budget)
    table = Table(sizes, max(1, m // slots), max(m, 1))
    found = search(needs, table, m, known, looks)
    assert base + found.bound_seconds <= optimum + 1e-9
    is_proven = found.outline is not None or found.bound_seconds >= known * (1 - 1e-9)
    assert is_proven or looks < 10**6
    if found.outline is not None:
        trace = simulate(chain, found.outline.build())
        assert trace.peak_bytes <= budget
        assert trace.seconds == pytest.approx(optimum)
        assert trace.seconds < base + known
    elif is_proven:
        assert base + known == pytest.approx(optimum)
