"""Storages that stages hand on count once in plans, as they do when plans are run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import ChainDp, RunDp, Solution
from ckptsched.solvers.chain import shared_storages as chain_storages
from ckptsched.solvers.chain.shared_storages import Holders
from ckptsched.solvers.chain.sizes import chain_sizes
from ckptsched.solvers.chain.tables import Table
from ckptsched.solvers.runs.solver import takes
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage, StageLedger, StageParts
from tests.oracles.brute_force import cheapest_of, persistent_frontier
from tests.support.strategies import parted_chains, parted_chains_with_tapes, parted_runs

Pair = tuple[Tensor, Tensor]


class Open(nn.Module):
    """The input, handed on, and its normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Pair:
        return x, self.norm(x)


class Inside(nn.Module):
    """A module that works beside what is handed on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Pair) -> Pair:
        x, h = state
        return x, self.inner(h)


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        attended: Tensor = self.inner(h, h, h, need_weights=False)[0]
        return attended


class Close(nn.Module):
    def forward(self, state: Pair) -> Tensor:
        x, h = state
        return x + h


class Whole(nn.Module):
    """The same modules as one stage."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def mlp(width: int) -> list[nn.Module]:
    inner = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    return [Open(width), *map(Inside, inner), Close()]


def layer(width: int) -> list[nn.Module]:
    return [Open(width), Inside(Attend(width)), Close(), *mlp(width)]


CUTS = {"mlp": (mlp, (32, 16), 4), "transformer": (layer, (2, 16, 16), 3)}


def cut(name: str) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """Residual blocks, each one stage, and the same modules as a stage each; a batch."""
    torch.manual_seed(0)
    make, shape, depth = CUTS[name]
    blocks = [make(shape[-1]) for _ in range(depth)]
    finer = nn.Sequential(*(nn.Sequential(*parts) for parts in blocks))
    return nn.Sequential(*map(Whole, blocks)), finer, torch.randn(shape)


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


def with_seconds(chain: Chain, seconds: Sequence[float]) -> Chain:
    stages = tuple(
        replace(stage, forward_seconds=x, backward_seconds=2 * x)
        for stage, x in zip(chain.stages, seconds, strict=True)
    )
    return replace(chain, stages=stages, loss_seconds=0.0)


@pytest.mark.parametrize("name", CUTS)
def test_a_finer_cut_is_never_worse(name: str) -> None:
    coarse, fine, x = cut(name)
    lengths = [len(list(block)) for block in fine]
    parts, whole = cs.profile(fine, x, loss=loss), cs.profile(coarse, x, loss=loss)
    seconds = [1.0 + k % 3 for k in range(len(parts))]
    ends = [0, *itertools.accumulate(lengths)]
    sums = [sum(seconds[a:b]) for a, b in itertools.pairwise(ends)]
    parts, whole = with_seconds(parts, seconds), with_seconds(whole, sums)
    [most] = ChainDp().solve_each(whole, [2**50])
    assert isinstance(most, Solution)
    low, high = most.least_budget_bytes, most.trace.peak_bytes
    budgets = [low + (high - low) * k // 8 for k in range(9)]
    gained = 0.0
    one, two = (ChainDp().solve_each(chain, budgets) for chain in (whole, parts))
    for before, after in zip(one, two, strict=True):
        assert isinstance(before, Solution)
        assert isinstance(after, Solution)
        assert after.trace.seconds <= before.trace.seconds * (1 + 1e-9)
        # Nothing is lost between the sizes and the ledger: what is found is the optimum.
        assert after.trace.seconds == pytest.approx(after.lower_bound_seconds, rel=1e-9)
        gained += before.trace.seconds - after.trace.seconds
    assert gained > 0


@pytest.mark.parametrize("name", CUTS)
def test_what_is_handed_on_takes_the_bytes_that_are_projected(name: str) -> None:
    _, fine, x = cut(name)
    chain = cs.profile(fine, x, loss=loss)
    most = cs.plan(chain, budget="100%", solver="chain_dp")
    for share in (0, 1, 2):
        least, top = most.least_budget_bytes, most.peak_bytes
        plan = cs.plan(chain, budget=least + (top - least) * share // 3, solver="chain_dp")
        result = cs.verify(fine, plan, x, loss=loss)
        assert result.ok, str(result)
        assert result.max_gradient_difference == 0.0
        assert plan.peak_bytes - 128 <= result.measured_peak_bytes <= plan.peak_bytes


def test_an_output_that_shares_storages_refuses_no_budget_that_works() -> None:
    """Counted from the loss on and not before, 18 and 19 bytes were refused here."""
    parts = StageParts(
        inputs=2,
        output_bytes=(0, 3),
        output_sources=(1, -1),
        saved_inputs=(1,),
        saved_outputs=(),
        backward_peak_bytes=(1, 2, 1, 2),
    )
    ledger = StageLedger(
        state_bytes=3,
        output_is_view=False,
        tape_bytes=2,
        input_saved=False,
        output_saved=False,
        forward_peak_bytes=3,
        taped_peak_bytes=10,
        backward_peak_bytes=(0,) * 8,
        parts=parts,
    )
    stage = Stage(
        forward_seconds=0.0,
        backward_seconds=0.0,
        state_bytes=6,
        tape_bytes=8,
        gradient_bytes=1,
        forward_overhead_bytes=13,
        backward_overhead_bytes=2,
        ledger=ledger,
    )
    chain = Chain(stages=(stage,) * 3, input_gradient_bytes=1, held_bytes=6)
    least = persistent_frontier(chain)[0][0]
    for result in ChainDp().solve_each(chain, [least, least + 1]):
        assert isinstance(result, Solution)
        assert result.least_budget_bytes == least


@settings(max_examples=40, deadline=None)
@given(parted_chains(most_stages=4, to_output=True))
def test_the_least_budget_works_where_the_output_shares_storages(chain: Chain) -> None:
    """Such bounds are not exact, but the least budget of a plan is one that works."""
    frontier = persistent_frontier(chain)
    [most] = ChainDp().solve_each(chain, [frontier[-1][0]])
    if isinstance(most, Solution):
        [again] = ChainDp().solve_each(chain, [most.least_budget_bytes])
        assert isinstance(again, Solution)
        assert simulate(chain, again.schedule).peak_bytes <= most.least_budget_bytes


@settings(max_examples=60, deadline=None)
@given(parted_chains() | parted_chains_with_tapes())
def test_equal_to_enumeration(chain: Chain) -> None:
    frontier = persistent_frontier(chain)
    budgets = sorted({peak + d for peak, _ in frontier for d in (-1, 0)})
    for budget, result in zip(budgets, ChainDp().solve_each(chain, budgets), strict=True):
        assert isinstance(result, Solution) == (budget >= frontier[0][0])
        if isinstance(result, Solution):
            assert simulate(chain, result.schedule).peak_bytes <= budget
            assert result.trace.seconds == cheapest_of(frontier, budget)
            assert result.lower_bound_seconds == result.trace.seconds
            assert result.least_budget_bytes == frontier[0][0]


@settings(max_examples=60, deadline=None)
@given(
    parted_chains(to_output=True) | parted_chains_with_tapes(to_output=True),
    st.sampled_from([0, 2, 4]),
)
def test_sizes_bound_the_ledger_however_many_storages_are_told_apart(
    chain: Chain, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_storages, "_MOST_ENTRIES", most)
        sizes, frontier = chain_sizes(chain), persistent_frontier(chain)
        table = Table(sizes, 1, max(0, frontier[-1][0] - sizes.fixed), exact=True)
        budgets = [peak for peak, _ in frontier]
        found = ChainDp().solve_each(chain, budgets)
    for (budget, optimum), result in zip(frontier, found, strict=True):
        assert table.extra_seconds(budget - sizes.fixed) + chain.store_all_seconds <= optimum
        if isinstance(result, Solution):
            assert simulate(chain, result.schedule).peak_bytes <= budget
            assert result.lower_bound_seconds <= optimum <= result.trace.seconds


@settings(max_examples=10, deadline=None)
@given(parted_chains(most_stages=6, to_output=True))
def test_there_are_no_more_entries_than_are_told_apart(chain: Chain) -> None:
    entries, after = Holders(chain).entries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_storages, "_MOST_ENTRIES", 0)
        fewest, _ = Holders(chain).entries
    assert len(fewest) <= len(entries) == len(after)
    # One more a stage: what the stage before alone has made.
    assert len(fewest) <= 2 * (len(chain) + 2)


@settings(max_examples=20, deadline=None)
@given(parted_runs(), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_runs_of_stages_that_hand_storages_on(chain: Chain, shares: list[int]) -> None:
    assume(takes(chain))
    solution = RunDp().solve(chain, 2**40)
    least, top = solution.least_budget_bytes, solution.trace.peak_bytes
    budgets = [least + max(0, top - least) * share // 8 for share in shares]
    found, optima = (solver.solve_each(chain, budgets) for solver in (RunDp(), ChainDp()))
    for budget, mine, other in zip(budgets, found, optima, strict=True):
        assert isinstance(mine, Solution)
        assert isinstance(other, Solution)
        assert simulate(chain, mine.schedule).peak_bytes <= budget
        assert mine.lower_bound_seconds <= other.trace.seconds * (1 + 1e-9)
