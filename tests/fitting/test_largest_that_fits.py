"""The least budget for an overhead, the largest batch, the most steps: each against trying all."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckptsched as cs
from ckptsched.base.errors import BudgetSyntaxError, InfeasibleBudgetError, WorkloadError
from ckptsched.fitting import largest_that_fits as inverse
from ckptsched.fitting.largest_that_fits import (
    Largest,
    largest,
    largest_batch,
    largest_steps,
    least_budget,
    parse_overhead,
)
from ckptsched.fitting.planning import plan
from ckptsched.solvers import SOLVERS, ChainDp
from ckptsched.workload.chain import Chain
from ckptsched.workload.scaling import with_batch, with_steps
from tests.support.shared_chains import WITHOUT_SEARCH
from tests.support.small_chains import MIB, mixed_chain, random_chains, uniform_chain


@given(chain=random_chains(4), share=st.floats(0, 0.6))
@settings(max_examples=40)
def test_the_least_budget_is_the_least_of_all(chain: Chain, share: float) -> None:
    # Small whole numbers are planned exactly, so that every budget can be tried.
    everything = plan(chain, budget=10**6)
    tried = [
        plan(chain, budget=budget)
        for budget in range(max(everything.least_budget_bytes, 1), everything.store_all_bytes + 1)
    ]
    if not tried:
        return
    expected = next(one for one in tried if one.overhead <= share + 1e-12)
    found = least_budget(chain, overhead=share)
    assert found.overhead <= share + 1e-12
    assert found.budget_bytes == found.peak_bytes == expected.budget_bytes
    exact = found.peak_bytes == everything.least_budget_bytes
    assert ("the least budget that works at all" in found.budget_text) == exact
    assert exact or "exact to the byte" in found.budget_text


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.15, 5])
def test_the_least_budget_where_sizes_are_rounded(share: float) -> None:
    found = least_budget(mixed_chain(), overhead=share)
    assert found.overhead <= share
    assert found.budget_bytes == found.peak_bytes
    # Nothing much below does: a grid of budgets finds none.
    for budget in range(found.least_budget_bytes, found.budget_bytes * 99 // 100, 2**19):
        assert plan(mixed_chain(), budget=budget).overhead > share
    assert found.budget_text.startswith(f"at most {100 * share:g}% overhead (")


def test_the_bound_excludes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # The search in exact bytes would leave nothing open.
    monkeypatch.setitem(SOLVERS, "chain_dp", partial(ChainDp, effort=WITHOUT_SEARCH))
    found = least_budget(mixed_chain(), overhead="10%")
    excluded = int(found.budget_text.split(" in ")[1].split(" bytes")[0])
    assert excluded < found.budget_bytes
    below = plan(mixed_chain(), budget=excluded)
    assert below.lower_bound_seconds > 1.1 * mixed_chain().store_all_seconds


def test_the_least_budget_of_a_model() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)])
    found = least_budget(model, torch.randn(16, 32), overhead=0.5)
    assert found.overhead <= 0.5
    assert cs.checkpointed(model, found)(torch.randn(16, 32)).shape == (16, 32)


@pytest.mark.parametrize(
    ("given", "share"), [(0, 0.0), (0.25, 0.25), ("10%", 0.1), (" 12.5 % ", 0.125), ("0.2", 0.2)]
)
def test_overheads_as_people_write_them(given: Any, share: float) -> None:
    assert parse_overhead(given) == pytest.approx(share)


@pytest.mark.parametrize("given", [-0.1, "-1%", math.nan, math.inf, "much", "", "%", True, None])
def test_overheads_that_cannot_be_read(given: Any) -> None:
    with pytest.raises(WorkloadError) as caught:
        least_budget(mixed_chain(), overhead=given)
    assert repr(given) in str(caught.value)
    assert '0.1 or "10%"' in str(caught.value)


def test_a_solver_that_always_recomputes() -> None:
    with pytest.raises(WorkloadError, match=r"every_stage takes \+24\.39% of time even where"):
        least_budget(mixed_chain(), overhead=0.1, solver="every_stage")
    found = least_budget(mixed_chain(), overhead=0.25, solver="every_stage")
    assert found.solver == "every_stage"
    assert found.budget_bytes == found.least_budget_bytes


def fits(chain: Chain, budget: int, share: float = math.inf) -> bool:
    try:
        return plan(chain, budget=budget).overhead <= share
    except InfeasibleBudgetError:
        return False


@given(limit=st.integers(0, 300), guess=st.integers(1, 400), most=st.integers(1, 320))
def test_the_search_finds_the_edge(limit: int, guess: int, most: int) -> None:
    made: list[int] = []

    def chain_at(size: int) -> Chain:
        made.append(size)
        return uniform_chain(1 if size <= limit else 2)

    # One stage fits its own need, two do not.
    budget = plan(uniform_chain(1), budget="100%").store_all_bytes
    if limit == 0:
        with pytest.raises(InfeasibleBudgetError):
            largest(chain_at, budget=budget, guess=guess, most=most, solver="store_all")
        return
    found = largest(chain_at, budget=budget, guess=guess, most=most, solver="store_all")
    assert found.size == min(limit, most)
    assert min(made) >= 1
    assert max(made) <= most
    assert len(made) <= 2 * math.log2(320) + 4
    if limit < most:
        assert limit + 1 in made
        assert found.why_no_more.startswith(f"at {limit + 1}: ")
        assert limit in made
    else:
        assert found.why_no_more == f"no more than {most} was tried (most={most})"


@pytest.mark.parametrize("share", [None, 0.05])
@pytest.mark.parametrize("budget", [200 * MIB, "1GiB"])
def test_the_largest_batch_of_a_chain(budget: Any, share: float | None) -> None:
    found = largest_batch(mixed_chain(), budget=budget, overhead=share)
    size = found.plan.budget_bytes
    limit = math.inf if share is None else share
    expected = [k for k in range(1, 60) if fits(with_batch(mixed_chain(), k), size, limit)]
    assert found.size == max(expected)
    assert found.plan.overhead <= limit
    assert found.plan.chain == with_batch(mixed_chain(), found.size)
    assert str(found).startswith(f"largest size: {found.size}; at {found.size + 1}: ")


def test_the_largest_batch_of_a_model_can_be_trained() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)])
    made: list[int] = []

    def make(batch: int) -> torch.Tensor:
        made.append(batch)
        return torch.randn(batch, 16)

    found = largest_batch(model, make, budget="64KiB", overhead="300%")
    sample = torch.randn(found.size, 16)
    result = cs.verify(model, found.plan, sample)
    assert result.ok
    assert {found.size, found.size + 1} <= set(made)
    assert not fits(cs.profile(model, make(found.size + 1)), 64 * 1024)
    # Lines through batches that were profiled say where to look.
    assert len(set(made[:-1])) <= 10


class Named(nn.Module):
    """Takes its batch by name, and gives what the default loss makes nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, *, values: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        for layer in self.layers:
            values = torch.tanh(layer(values)) * scale
        return {"prediction": values, "steps": 5}


def test_batches_by_name_and_a_loss_of_their_own() -> None:
    model = Named()

    def make(batch: int) -> dict[str, torch.Tensor]:
        return {"values": torch.randn(batch, 16), "scale": torch.rand(batch, 1)}

    def loss(output: dict[str, Any]) -> torch.Tensor:
        return torch.stack([output["prediction"].square().mean() for _ in range(8)]).sum()

    batch = make(64)
    planned = plan(model, kwargs=batch, loss=loss, budget="90%")
    least = least_budget(model, kwargs=batch, loss=loss, overhead=5)
    assert least.chain.loss_overhead_bytes == planned.chain.loss_overhead_bytes > 0
    assert least.peak_bytes < least.store_all_bytes == planned.store_all_bytes
    most = largest_batch(model, make, loss=loss, budget=planned.store_all_bytes, overhead=5)
    assert most.size > 64
    found = cs.verify(model, most.plan, kwargs=make(most.size), loss=loss)
    assert found.ok


def test_a_model_that_grows_otherwise() -> None:
    # Attention: bytes grow with the square. The line through two sizes is wrong; the answer
    # is not.
    def chain_at(size: int) -> Chain:
        return with_batch(uniform_chain(4), size * size)

    found = largest(chain_at, budget="1GiB", guess=2)
    assert fits(chain_at(found.size), 2**30)
    assert not fits(chain_at(found.size + 1), 2**30)


def test_the_largest_batch_by_estimates() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 4))
    found = largest_batch(model, lambda n: (torch.randn(n, 16),), budget=50_000, fake=True)
    assert found.size > 8
    assert found.plan.chain.signature is None
    few = largest_batch(model, lambda n: torch.randn(n, 16), budget=50_000, most=3)
    assert few.size == 3


def test_most_steps() -> None:
    found = largest_steps(mixed_chain(), budget=40 * MIB, overhead=0.3)
    assert fits(with_steps(mixed_chain(), found.size), 40 * MIB, 0.3)
    assert not fits(with_steps(mixed_chain(), found.size + 1), 40 * MIB, 0.3)
    assert found.plan.chain == with_steps(mixed_chain(), found.size)


def test_most_steps_in_any_time() -> None:
    # Nearly any budget takes any number then: one plan, of the most that may be.
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverse, "with_steps", lambda *a: asked.append(a[1]) or with_steps(*a))
        assert largest_steps(uniform_chain(), budget="1GiB", most=50).size == 50
    assert asked == [50]


@pytest.mark.parametrize("ask", [largest_batch, largest_steps])
def test_what_cannot_be_asked(ask: Any) -> None:
    with pytest.raises(BudgetSyntaxError, match="'40%' is a share of a size"):
        ask(mixed_chain(), budget="40%")
    with pytest.raises(WorkloadError, match="an overhead of -1"):
        ask(mixed_chain(), budget="1GiB", overhead=-1)
    with pytest.raises(InfeasibleBudgetError, match="the least that works is"):
        ask(mixed_chain(), budget="1KiB")
    with pytest.raises(WorkloadError, match=r"more than the 0\.00% allowed"):
        ask(mixed_chain(), budget="1GiB", overhead=0, solver="every_stage")


def test_a_model_needs_a_maker_of_samples() -> None:
    for arguments in ((nn.Linear(2, 2),), (mixed_chain(), lambda n: torch.ones(n))):
        with pytest.raises(WorkloadError, match="a callable that makes a sample of a batch"):
            largest_batch(*arguments, budget="1GiB")


def test_a_result_is_data() -> None:
    found = largest_steps(uniform_chain(4), budget="1GiB", most=5)
    assert found == Largest(size=5, plan=found.plan, why_no_more=found.why_no_more)
