"""Plans against oracles: published packages, closed forms, brute force, and laws of scaling."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
from checkpoint_schedules import EndReverse, Forward, MultistageCheckpointSchedule
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.planner import chains as made
from benchmarks.planner.peers import PEERS
from benchmarks.planner.rotor import Rotor
from ckptsched.base.errors import InfeasibleBudgetError
from ckptsched.fitting.planning import plan
from ckptsched.planner.plan import Plan
from ckptsched.planner.tradeoff import tradeoff
from ckptsched.schedule.language import Code, Schedule
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import get_solver
from ckptsched.solvers.binomial.revolve import advances, revolve_schedule
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage
from tests.oracles.brute_force import cheapest, cheapest_of, persistent_frontier
from tests.support.shared_chains import instance, uniform
from tests.support.strategies import chains, scaled_chains

# Sums of the same seconds in another order may differ in their last digits.
SAME = 1 + 1e-12


def runs_of_multistage(n: int, s: int) -> int:
    """Forward runs of checkpoint-schedules' binomial schedule."""
    total = 0
    for action in MultistageCheckpointSchedule(n, s, 0):
        if isinstance(action, Forward):
            total += action.n1 - action.n0
        if isinstance(action, EndReverse):
            return total
    raise AssertionError("the actions have no end")


@functools.cache
def peer_schedule(name: str, n: int, s: int) -> Schedule:
    """A peer's plan in our language."""
    peer = PEERS[name]
    return peer.schedule(n, peer.actions(n, s))


def store_all_peak(chain: Chain) -> int:
    """Bytes of storing everything."""
    return get_solver("store_all").solve(chain, 2**62).trace.peak_bytes


def try_plan(chain: Chain, budget: int) -> Plan | None:
    """The plan of "auto", or None where nothing fits."""
    try:
        return plan(chain, budget=budget)
    except InfeasibleBudgetError:
        return None


# ---- Uniform chains: the binomial optimum


def test_the_closed_form_is_the_optimum_of_the_recurrence() -> None:
    # t(l, s) = min over i of i + t(i, s) + t(l - i, s - 1), Griewank and Walther 2000.
    longest, most = 300, 30
    lengths = range(1, longest + 1)
    above = np.array([n * (n - 1) // 2 for n in (0, *lengths)])  # s = 1
    assert [advances(n, 1) for n in lengths] == above[1:].tolist()
    for s in range(2, most + 1):
        found = np.zeros(longest + 1, dtype=np.int64)
        for n in lengths[1:]:
            i = np.arange(1, n)
            found[n] = (i + found[i] + above[n - i]).min()
        assert [advances(n, s) for n in lengths] == found[1:].tolist()
        above = found


@pytest.mark.parametrize("s", [1, 2, 3, 5, 10, 30, 64, 100])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 200])
def test_short_uniform_chains_run_as_often_as_the_published_packages(n: int, s: int) -> None:
    assert advances(n, s) + n == runs_of_multistage(n, s)
    assert simulate(uniform(n), revolve_schedule(n, s)).forwards == advances(n, s) + n


@pytest.mark.parametrize(
    ("n", "s"), [(1_000, 3), (1_000, 100), (4_321, 17), (10_000, 5), (10_000, 30), (10_000, 100)]
)
def test_long_uniform_chains_run_as_often_as_the_published_packages(n: int, s: int) -> None:
    runs = int((revolve_schedule(n, s).codes <= Code.TAPED_FORWARD).sum())
    assert runs == advances(n, s) + n == runs_of_multistage(n, s)


@pytest.mark.parametrize(("n", "s"), [(2, 1), (56, 5), (300, 12), (10_000, 100)])
def test_the_solver_keeps_as_many_states_as_fit(n: int, s: int) -> None:
    chain = uniform(n, state=2, tape=2 * n)
    peak = simulate(chain, revolve_schedule(n, s)).peak_bytes
    solution = get_solver("revolve").solve(chain, peak + 1)  # one more byte is no state
    assert solution.trace.forwards == advances(n, s) + n


@pytest.mark.parametrize("name", ["Multistage", "Revolve", "HRevolve"])
def test_binomial_plans_of_the_published_packages_need_what_ours_need(name: str) -> None:
    for n, s in [(2, 1), (5, 1), (10, 3), (20, 4), (56, 5), (40, 12)]:
        ours = simulate(uniform(n), revolve_schedule(n, s))
        theirs = simulate(uniform(n), peer_schedule(name, n, s))
        assert (theirs.peak_bytes, theirs.forwards) == (ours.peak_bytes, ours.forwards)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 30))
def test_where_one_tape_fits_the_optimum_is_binomial(n: int, s: int) -> None:
    # Two tapes take more than all states and one tape: what is left to choose are the states.
    chain = uniform(n, state=1, tape=4 * n)
    peak = simulate(chain, revolve_schedule(n, s)).peak_bytes
    for solver in ("auto", "chain_dp"):
        found = plan(chain, budget=peak, solver=solver)
        assert found.trace.forwards == advances(n, s) + n
        assert found.lower_bound_seconds == found.seconds


# ---- Uniform chains: a tape kept instead of a state ("Mixed")
#
# Maddison (J. Comput. Sci. 82, 2024, 102405): each of s slots keeps the state before a step, or
# what the step's backward needs, at equal sizes; beside them a working place holds the running
# state and the tape of the last step. Our model says the same for w_a = w_t = 1 and w_g = o = 0:
#
# - "What the backward of step i needs" is our tape i together with state i - 1, which stays while
#   the tape does. Tape i has the size of state i and contains it, so the tapes of k steps from i
#   on keep state i - 1 and k tapes: k slots of Mixed, and the last tape in its working place.
# - The slots count the input, as our budget does. The working place is two units of ours: a
#   sweep holds the state that it comes from and the one that it makes, the last step its input
#   and its tape.
#
# So s slots of Mixed are s + 2 units. Both recurrences are then the same: with
# C(n, s) = P(1, n, s + 1), tape: 1 + C(n-1, s-1), split: i + C(i, s) + C(n-i, s-1), and n runs
# where n <= s + 1. (Mixed leaves out the split at i = 1, which the tape is never worse than.)


def unit_chain(n: int) -> Chain:
    """Equal stages whose tape is their output, and nothing else takes memory."""
    stage = Stage(
        forward_seconds=1.0, backward_seconds=0.0, state_bytes=1, tape_bytes=1, gradient_bytes=0
    )
    return Chain(stages=(stage,) * n, input_bytes=1)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 21, 34])
def test_mixed_counts_are_the_optimum_of_unit_chains(n: int) -> None:
    chain = unit_chain(n)
    for s in range(1, n + 1):
        theirs = simulate(chain, peer_schedule("Mixed", n, s))
        assert theirs.peak_bytes <= min(s, n - 1) + 2
        ours = get_solver("chain_dp").solve(chain, s + 2)
        assert ours.trace.forwards == theirs.forwards
        assert ours.lower_bound_seconds == ours.trace.seconds


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_no_schedule_at_all_beats_mixed_on_unit_chains(n: int) -> None:
    for s in range(1, n):
        theirs = simulate(unit_chain(n), peer_schedule("Mixed", n, s))
        assert cheapest(unit_chain(n), s + 2) == theirs.forwards


@pytest.mark.parametrize(("n", "s"), [(100, 3), (100, 10), (100, 30), (1000, 10), (1000, 30)])
@pytest.mark.parametrize("tape", [1, 2, 4])
def test_auto_is_never_costlier_than_mixed(n: int, s: int, tape: int) -> None:
    chain = made.uniform(n, tape)
    theirs = simulate(chain, peer_schedule("Mixed", n, s))
    assert plan(chain, budget=theirs.peak_bytes).trace.forwards <= theirs.forwards


# ---- The rotor recurrence


def test_rotor_finds_the_values_known_of_it() -> None:
    # By the published implementation, for budgets 11 to 30; the least budget is 12.
    data = {"u_f": [2, 3, 1, 4, 2], "u_b": [4, 6, 2, 8, 4], "w_t": [6, 5, 4, 7, 4]}
    chain = Chain.from_json(data | {"w_a": [2, 3, 1, 2, 1, 2]})
    rotor = Rotor(chain, 30, slots=30)
    known = [51, 48, 46, 45, 45, 44, 42, 42, 41, 41, 41, 40, 40, 39, 39, 38, 37, 37, 36]
    assert rotor.least == 12 - 2
    assert [rotor.seconds(budget - 2) for budget in range(12, 31)] == known
    for budget, seconds in zip(range(12, 31), known, strict=True):
        assert simulate(chain, rotor.schedule(budget - 2)).seconds == seconds


def assert_never_costlier_than_rotor(chain: Chain, slots: int, trials: int) -> int:
    """Ours at the exact peaks of rotor's plans; returns how many were compared."""
    compared = 0
    for share in (1.0, 0.6, 0.4, 0.25):
        rotor = Rotor(chain, int(share * store_all_peak(chain)), slots)
        if rotor.least > rotor.top:
            continue
        for m in np.unique(np.linspace(rotor.least, rotor.top, trials).astype(int)):
            theirs = simulate(chain, rotor.schedule(int(m)))
            ours = plan(chain, budget=theirs.peak_bytes)
            assert ours.seconds <= theirs.seconds * SAME
            compared += 1
    return compared


@settings(max_examples=30, deadline=None)
@given(scaled_chains(most_stages=5))
def test_auto_is_never_costlier_than_rotor_on_small_chains(chain: Chain) -> None:
    assume(store_all_peak(chain) > 0)
    assert_never_costlier_than_rotor(chain, slots=50, trials=3)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("n", [9, 14, 24])
@pytest.mark.parametrize("shape", [made.generator, made.convolutional, made.unet])
def test_auto_is_never_costlier_than_rotor(shape: made.Maker, n: int, seed: int) -> None:
    assert assert_never_costlier_than_rotor(shape(n, seed), slots=500, trials=4) >= 4


# ---- Brute force


@settings(max_examples=60, deadline=None)
@given(chains(most_stages=4), st.data())
def test_bound_optimum_and_plan_are_in_order(chain: Chain, data: st.DataObject) -> None:
    frontier = persistent_frontier(chain)
    assume(frontier[-1][0] > 0)  # a budget is positive
    budget = data.draw(st.integers(max(frontier[0][0], 1), frontier[-1][0]))
    persistent, every = cheapest_of(frontier, budget), cheapest(chain, budget)
    found = plan(chain, budget=budget)
    optimum = every if found.schedule_class == "all schedules" else min(persistent, found.seconds)
    assert found.lower_bound_seconds <= optimum * SAME
    assert every <= found.seconds * SAME
    assert found.seconds <= persistent * SAME


# ---- Laws


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=6), st.integers(1, 60), st.sampled_from([0.25, 4.0, 1024.0]))
def test_scaling_all_times_changes_nothing(chain: Chain, budget: int, factor: float) -> None:
    scaled = dataclasses.replace(
        chain,
        loss_seconds=chain.loss_seconds * factor,
        stages=tuple(
            dataclasses.replace(
                stage,
                forward_seconds=stage.forward_seconds * factor,
                backward_seconds=stage.backward_seconds * factor,
            )
            for stage in chain.stages
        ),
    )
    found, other = try_plan(chain, budget), try_plan(scaled, budget)
    assert (found is None) == (other is None)
    if found is not None and other is not None:
        assert other.schedule == found.schedule
        assert other.seconds == found.seconds * factor
        assert other.lower_bound_seconds == found.lower_bound_seconds * factor


_SIZES = ("w_a", "w_t", "w_g", "o_f", "o_b", "w_p")


def scale_bytes(chain: Chain, factor: int) -> Chain:
    """The chain with every size so many times as large."""
    data = chain.to_json()
    for key in _SIZES:
        data[key] = [factor * value for value in data[key]]
    for key in ("o_loss", "w_held"):
        data[key] *= factor
    return Chain.from_json(data)


@settings(max_examples=40, deadline=None)
@given(st.one_of(chains(most_stages=6), scaled_chains(4)), st.data(), st.sampled_from([2, 3, 1000]))
def test_scaling_all_bytes_changes_nothing(chain: Chain, data: st.DataObject, factor: int) -> None:
    budget = data.draw(st.integers(1, store_all_peak(chain) + 1))
    found, other = try_plan(chain, budget), try_plan(scale_bytes(chain, factor), factor * budget)
    assert (found is None) == (other is None)
    if found is not None and other is not None:
        assert other.schedule == found.schedule
        assert other.peak_bytes == found.peak_bytes * factor
        assert other.lower_bound_seconds == found.lower_bound_seconds


@settings(max_examples=60, deadline=None)
@given(chains(most_stages=4), st.data())
def test_splitting_a_stage_never_makes_the_optimum_worse(chain: Chain, data: st.DataObject) -> None:
    split = split_stage(chain, data.draw(st.integers(1, len(chain))), data)
    budget = data.draw(st.integers(1, store_all_peak(chain) + 1))
    assert cheapest(split, budget) <= cheapest(chain, budget)
    found = try_plan(chain, budget)
    if found is not None:
        assert plan(split, budget=budget).seconds <= found.seconds * SAME


def split_stage(chain: Chain, i: int, data: st.DataObject) -> Chain:
    """Stage i as two that do the same in no more bytes.

    What the two need while a part of them runs is at most what the stage needed: the state
    between them is taken from the overheads, and the tapes are parts of the tape.
    """
    stage = chain.stages[i - 1]
    most = min(
        stage.forward_overhead_bytes,
        stage.backward_overhead_bytes,
        stage.tape_bytes - stage.state_bytes,
    )
    between = data.draw(st.integers(0, most))
    tape = data.draw(st.integers(between, stage.tape_bytes - stage.state_bytes))
    seconds = data.draw(st.integers(0, int(stage.forward_seconds)))
    first = Stage(
        forward_seconds=float(seconds),
        backward_seconds=0.0,
        state_bytes=between,
        tape_bytes=tape,
        gradient_bytes=between,
        forward_overhead_bytes=stage.forward_overhead_bytes - between,
        backward_overhead_bytes=stage.backward_overhead_bytes - between,
    )
    second = dataclasses.replace(
        stage,
        forward_seconds=stage.forward_seconds - seconds,
        tape_bytes=stage.tape_bytes - tape,
        forward_overhead_bytes=stage.forward_overhead_bytes - between,
        backward_overhead_bytes=stage.backward_overhead_bytes - between,
    )
    stages = (*chain.stages[: i - 1], first, second, *chain.stages[i:])
    return dataclasses.replace(chain, stages=stages)


@pytest.mark.parametrize("name", ["random_n20_s0", "resnet50_b32"])
def test_every_row_of_the_frontier_is_the_plan_at_its_budget(name: str) -> None:
    chain = instance(name)
    rows = tradeoff(chain, 8).rows
    assert len(rows) >= 2
    before = math.inf
    for row in rows:
        assert row.plan.seconds <= before
        assert plan(chain, budget=row.plan.budget_bytes).seconds == row.plan.seconds
        before = row.plan.seconds


@pytest.mark.parametrize("steps", [16, 64])
def test_made_networks_are_the_instances(steps: int) -> None:
    assert made.ode_network(8, steps).fingerprint == instance(f"ode_L8_Nt{steps}").fingerprint
