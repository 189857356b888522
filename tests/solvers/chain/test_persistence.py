"""When the persistent optimum is that of all pinned schedules: a theorem, and its conditions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.solvers import ChainDp
from ckptsched.solvers.chain.persistence import persistent_is_optimal
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import TapeOption
from tests.oracles.brute_force import cheapest_of, persistent_frontier
from tests.oracles.pinned import cheapest_pinned
from tests.support.strategies import (
    SECONDS,
    SMALL,
    ledger_chains,
    tape_options,
)


@st.composite
def shrinking_chains(draw: st.DrawFn, most_stages: int = 4) -> Chain:
    """Chains to which the theorem applies, at its edges too: the first and last state are free."""
    n = draw(st.integers(1, most_stages))
    states = sorted(draw(st.lists(SMALL, min_size=n, max_size=n)), reverse=True)
    states[-1] = draw(SMALL)
    later, gradients, parameters = 0, [0] * (n + 1), [0] * n
    for i in range(n, 0, -1):
        room = min(states[:i]) - later
        gradients[i] = draw(st.integers(0, max(room, 0)))
        least = min(states[: i - 1], default=9)
        parameters[i - 1] = draw(st.integers(0, max(least - later, 0)))
        later += parameters[i - 1]
    gradients[0] = draw(SMALL)
    column = st.lists(st.integers(0, 12), min_size=n, max_size=n)
    seconds = st.lists(SECONDS, min_size=n, max_size=n)
    more = draw(column)
    return Chain.from_json(
        {
            "u_f": draw(seconds),
            "u_b": draw(seconds),
            "w_a": [draw(SMALL), *states],
            "w_t": [a + t for a, t in zip(states, more, strict=True)],
            "w_g": gradients,
            "o_f": draw(column),
            "o_b": draw(column),
            "w_p": parameters,
            "u_loss": draw(SECONDS),
            "o_loss": draw(st.integers(0, 12)),
        }
    )


@given(shrinking_chains(), st.integers(0, 70))
@settings(max_examples=200, deadline=None)
def test_where_states_never_grow_nothing_beats_the_persistent_optimum(
    chain: Chain, budget: int
) -> None:
    assert persistent_is_optimal(chain)
    optimum = cheapest_pinned(chain, budget)
    assert cheapest_of(persistent_frontier(chain), budget) == optimum


@given(shrinking_chains(3), st.data(), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_nor_where_stages_offer_several_tapes(
    chain: Chain, data: st.DataObject, budget: int
) -> None:
    links = []
    for stage in chain.stages:
        other = data.draw(tape_options(stage.state_bytes))
        other = replace(  # no faster to make than the state, nor in fewer bytes
            other,
            forward_seconds=stage.forward_seconds + other.forward_seconds,
            forward_overhead_bytes=stage.forward_overhead_bytes + other.forward_overhead_bytes,
        )
        links.append(replace(stage, other_tapes=(other,)))
    chain = replace(chain, stages=tuple(links))
    assert persistent_is_optimal(chain)
    optimum = cheapest_pinned(chain, budget)
    assert cheapest_of(persistent_frontier(chain), budget) == optimum


# States, tapes, gradients, overheads and so on where one condition of the theorem is broken, and
# with a budget at which a schedule of two or three forward runs beats the persistent optimum.
_GROWING = {
    "u_f": [10, 4, 4, 8],
    "u_b": [6, 16, 11, 9],
    "w_a": [1, 1, 5, 5, 2],
    "w_t": [8, 12, 8, 8],
}
_LARGE_GRADIENT = {
    "u_f": [1, 1],
    "u_b": [0, 0],
    "w_a": [0, 1, 0],
    "w_t": [2, 0],
    "w_g": [0, 6, 0],
    "o_f": [3, 0],
    "o_loss": 8,
}
_PARAMETERS = {**_LARGE_GRADIENT, "w_g": [0, 1, 0], "o_f": [6, 0], "w_p": [0, 4]}


def test_not_even_for_one_stage_with_a_tape_that_is_made_fast() -> None:
    # Best is to make the fast tape for the loss, drop it, and make the other for the backward.
    data = {"u_f": [10], "u_b": [1], "w_a": [0, 1], "w_t": [10], "o_f": [0], "o_b": [0]}
    chain = Chain.from_json(data | {"w_g": [0, 0], "o_loss": 5})
    fast = TapeOption(name="fast", tape_bytes=1, forward_seconds=1.0, backward_seconds=100.0)
    chain = replace(chain, stages=(replace(chain.stages[0], other_tapes=(fast,)),))
    assert cheapest_pinned(chain, 10) == 12 < cheapest_of(persistent_frontier(chain), 10)
    assert not persistent_is_optimal(chain)


@pytest.mark.parametrize(
    ("data", "budget", "optimum", "persistent"),
    [(_GROWING, 24, 100, 110), (_LARGE_GRADIENT, 9, 3, 4), (_PARAMETERS, 9, 3, 4)],
)
def test_each_condition_is_needed(
    data: dict[str, list[int]], budget: int, optimum: int, persistent: int
) -> None:
    chain = Chain.from_json(data)
    assert not persistent_is_optimal(chain)
    assert cheapest_pinned(chain, budget) == optimum
    assert ChainDp().solve(chain, budget).trace.seconds == persistent


@given(ledger_chains(3))
@settings(max_examples=20, deadline=None)
def test_of_a_ledger_nothing_is_said(chain: Chain) -> None:
    assert not persistent_is_optimal(chain)
