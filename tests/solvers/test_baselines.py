"""The plain strategies: their schedules word by word, their counts, their errors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.errors import InfeasibleBudgetError, WorkloadError
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import SOLVER_NAMES, Baseline, ChainDp, Revolve, baselines_for, get_solver
from ckptsched.solvers.base import infeasible
from ckptsched.solvers.baselines import INPUT_ONLY_STAGES, every_k_grid, fitting_every_k
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block
from tests.support.shared_chains import exact_stage, uniform
from tests.support.strategies import chains, ledger_chains, uniform_chains

PLENTY = 10**12
BLOCKS = (
    Block(name="stem", first=1, last=1),
    Block(name="ode1", first=2, last=3),
    Block(name="ode2", first=4, last=6),
    Block(name="head", first=7, last=7),
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("store_all", "T1 T2 T3 T4 T5 turn B5 B4 B3 B2 B1 -x0"),
        (
            "every_2",
            "F1 F2 -x1 F3 F4 -x3 T5 turn B5 -x4 T3 T4 B4 B3 -x2 T1 T2 B2 B1 -x0",
        ),
        ("every_4", "F1 F2 -x1 F3 -x2 F4 -x3 T5 turn B5 -x4 T1 T2 T3 T4 B4 B3 B2 B1 -x0"),
        (
            "every_stage",
            "F1 F2 F3 F4 T5 turn B5 -x4 T4 B4 -x3 T3 B3 -x2 T2 B2 -x1 T1 B1 -x0",
        ),
        ("every_1", "F1 F2 F3 F4 T5 turn B5 -x4 T4 B4 -x3 T3 B3 -x2 T2 B2 -x1 T1 B1 -x0"),
        (
            "sqrt",
            "F1 F2 -x1 F3 F4 -x3 T5 turn B5 -x4 T3 T4 B4 B3 -x2 T1 T2 B2 B1 -x0",
        ),
        ("every_9", "T1 T2 T3 T4 T5 turn B5 B4 B3 B2 B1 -x0"),
        ("anode", "T1 T2 T3 T4 T5 turn B5 B4 B3 B2 B1 -x0"),
        (
            "input_only",
            "F1 F2 -x1 F3 -x2 F4 -x3 T5 turn B5 -x4 F1 F2 -x1 F3 -x2 T4 B4 -x3 "
            "F1 F2 -x1 T3 B3 -x2 F1 T2 B2 -x1 T1 B1 -x0",
        ),
    ],
)
def test_schedules_of_five_stages(name: str, text: str) -> None:
    chain = uniform(5)
    solution = Baseline(name).solve(chain, PLENTY)
    assert solution.schedule.to_text() == text
    assert solution.schedule_class == "fixed schedule"
    assert solution.lower_bound_seconds == solution.trace.seconds
    assert solution.least_budget_bytes == solution.trace.peak_bytes


def test_anode_runs_blocks_of_several_stages_again() -> None:
    solution = Baseline("anode").solve(uniform(7, blocks=BLOCKS), PLENTY)
    assert solution.schedule.to_text() == (
        "T1 F2 F3 -x2 F4 F5 -x4 F6 -x5 T7 turn B7 -x6 T4 T5 T6 B6 B5 B4 -x3 T2 T3 B3 B2 B1 -x0"
    )


def test_anode_tapes_a_last_block_of_several_stages_at_once() -> None:
    blocks = (Block(name="a", first=1, last=2), Block(name="b", first=3, last=4))
    solution = Baseline("anode").solve(uniform(4, blocks=blocks), PLENTY)
    assert solution.schedule.to_text() == "F1 F2 -x1 T3 T4 turn B4 B3 -x2 T1 T2 B2 B1 -x0"


def test_memory_law_of_anode() -> None:
    # L blocks of N steps, tape 5 states: storing all is O(L N), a restart a block O(L) + O(N).
    for blocks, steps in ((4, 4), (8, 4), (4, 16), (16, 16)):
        spans = tuple(
            Block(name=f"b{k}", first=k * steps + 1, last=(k + 1) * steps) for k in range(blocks)
        )
        chain = uniform(blocks * steps, tape=5, blocks=spans)
        peaks = {
            name: Baseline(name).solve(chain, PLENTY).trace.peak_bytes
            for name in ("store_all", "anode")
        }
        assert peaks == {"store_all": 5 * blocks * steps + 3, "anode": 5 * steps + blocks + 2}
        trace = Baseline("anode").solve(chain, PLENTY).trace
        assert trace.forwards == (2 * blocks - 1) * steps


@settings(max_examples=60, deadline=None)
@given(chains(most_stages=9) | ledger_chains(most_stages=9, noise=True))
def test_every_baseline_is_valid_and_refuses_one_byte_less(chain: Chain) -> None:
    for baseline in baselines_for(chain):
        solution = baseline.solve(chain, PLENTY)
        peak = solution.trace.peak_bytes
        assert simulate(chain, solution.schedule) == solution.trace
        assert baseline.solve(chain, peak).schedule == solution.schedule
        with pytest.raises(InfeasibleBudgetError) as caught:
            baseline.solve(chain, peak - 1)
        assert caught.value.least_budget_bytes == peak


def test_the_message_names_baseline_budget_need_and_stage() -> None:
    chain = uniform(4, state=2**20, tape=2**22)
    with pytest.raises(InfeasibleBudgetError) as caught:
        Baseline("store_all").solve(chain, 2**23)
    assert str(caught.value) == (
        "no store_all schedule fits a budget of 8.000 MiB (8388608 bytes); the least that works "
        "is 19.000 MiB (19922944 bytes), limited by the backward of stage 4"
    )
    assert caught.value.budget_bytes == 2**23
    assert caught.value.stage == "stage 4"


@pytest.mark.parametrize(
    ("operation", "stage", "words"),
    [
        ("-x3", "stage 3", "the output of stage 3"),
        ("B3", "stage 3", "the backward of stage 3"),
        ("F2", "stage 2", "the forward of stage 2"),
        ("T2", "stage 2", "the forward, kept for its backward, of stage 2"),
        ("turn", "the loss", "the loss"),
        ("-x0", "the input", "the input"),
    ],
)
def test_the_message_names_the_stage_whatever_the_operation(
    operation: str, stage: str, words: str
) -> None:
    chain = uniform(4)
    trace = replace(Baseline("store_all").solve(chain, PLENTY).trace, peak_operation=operation)
    error = infeasible(chain, 3, trace, "such")
    assert error.stage == stage
    assert str(error).endswith(f", limited by {words}")


@settings(max_examples=40, deadline=None)
@given(uniform_chains(), st.integers(0, 5), st.integers(0, 200))
def test_the_closed_form_finds_the_cheapest_every_k(chain: Chain, new: int, budget: int) -> None:
    last = replace(chain.stages[-1], parameter_gradient_bytes=new)
    chain = replace(chain, stages=(*chain.stages[:-1], last))
    every = {k: Baseline(f"every_{k}").solve(chain, PLENTY).trace for k in range(1, len(chain))}
    fitting = [trace.forwards for trace in every.values() if trace.peak_bytes <= budget]
    named = [every[int(rule.name[6:])] for rule in fitting_every_k(chain, budget)]
    found = [trace.forwards for trace in named if trace.peak_bytes <= budget]
    assert min(found, default=0) == min(fitting, default=0)


@pytest.mark.parametrize("n", [1, 2, 3, 50, 8008, 100_000])
def test_the_grid_of_k(n: int) -> None:
    numbers = sorted(int(guess.rule.name[6:]) for guess in every_k_grid(uniform(n)))
    assert len(numbers) == len(set(numbers))
    assert all(1 <= k < n for k in numbers)
    assert len(numbers) * n <= 1_500_000 or len(numbers) <= 10
    if n == 8008:
        assert len(numbers) > 35
        assert all(b <= 1.5 * a for a, b in itertools.pairwise(numbers) if a > 3)


@settings(max_examples=40, deadline=None)
@given(chains(most_stages=9) | ledger_chains(most_stages=9, noise=True))
def test_guesses_of_the_grid_bound_the_peak_and_know_the_seconds(chain: Chain) -> None:
    for guess in every_k_grid(chain):
        trace = guess.rule.solve(chain, PLENTY).trace
        assert guess.least_bytes <= trace.peak_bytes
        assert guess.seconds == pytest.approx(trace.seconds)


def test_the_list_to_compare() -> None:
    def names(chain: Chain) -> list[str]:
        return [baseline.name for baseline in baselines_for(chain)]

    assert names(uniform(1)) == ["store_all", "every_stage", "sqrt", "input_only"]
    assert names(uniform(9)) == [
        *("store_all", "every_2", "every_4", "every_8", "every_stage", "sqrt", "input_only")
    ]
    assert names(uniform(7, blocks=BLOCKS))[:2] == ["store_all", "anode"]
    assert "input_only" not in names(uniform(1000))


def test_input_only_refuses_long_chains() -> None:
    with pytest.raises(WorkloadError, match="too many for 2001 stages"):
        Baseline("input_only").solve(uniform(INPUT_ONLY_STAGES + 1), PLENTY)


@pytest.mark.parametrize("name", ["every_0", "every_", "every_-2", "every_4x", "", "revolver"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(WorkloadError, match="store_all, anode"):
        Baseline(name)
    with pytest.raises(WorkloadError) as caught:
        get_solver(name)
    assert repr(name) in str(caught.value)
    for known in SOLVER_NAMES:
        assert known in str(caught.value)


def test_solvers_by_name() -> None:
    assert get_solver("chain_dp") == ChainDp()
    assert get_solver("revolve") == Revolve()
    assert get_solver("every_4") == Baseline("every_4")
    for name in SOLVER_NAMES:
        assert get_solver(name.replace("<k>", "3")).name == name.replace("<k>", "3")


def test_a_baseline_is_charged_by_the_ledger() -> None:
    chain = Chain(stages=(exact_stage(),) * 3, held_bytes=10)
    trace = Baseline("store_all").solve(chain, PLENTY).trace
    assert trace.ledger_peak_bytes == trace.peak_bytes < trace.planning_peak_bytes


@given(chain=st.one_of(chains(6), ledger_chains(4, noise=True)))
def test_guesses_of_all_rules(chain: Chain) -> None:
    for rule in baselines_for(chain):
        guess, trace = rule.guess(chain), rule.solve(chain, 2**40).trace
        assert guess.rule == rule
        assert guess.seconds == pytest.approx(trace.seconds)
        assert guess.least_bytes <= trace.peak_bytes
