"""Hooks on what autograd saves: tapes are packed as they would be without a plan."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.profiler.profile import default_loss
from ckptsched.recompute.side_outputs import Look
from ckptsched.torch_state.saved_hooks import describe_hooks, hooks_now, no_hooks
from tests.support.networks import planned
from tests.support.surroundings import (
    CPU,
    SOLVERS,
    Around,
    Stage,
    chain_of,
    equal,
    gradients,
    lossy,
    sample,
)


def test_tapes_are_packed_as_in_the_forward() -> None:
    model, x = chain_of(Stage), sample(Stage)
    expected = gradients(model, model, x, lossy)
    assert not equal(expected, gradients(model, model, x, nullcontext))
    for solver in SOLVERS:
        with lossy():
            plan = planned(model, x, solver)
        found = gradients(cs.checkpointed(model, plan), model, x, lossy)
        assert equal(found, expected), solver
    assert hooks_now() is None


def test_hooks_that_were_not_planned_are_named_once() -> None:
    model, x = chain_of(Stage), sample(Stage)
    plan = planned(model, x, "every_stage")
    trained = cs.checkpointed(model, plan)
    expected = gradients(model, model, x, save_on_cpu)
    with pytest.warns(cs.BudgetWarning, match=rf"save_on_cpu.*peak of {plan.peak_bytes} bytes"):
        found = gradients(trained, model, x, save_on_cpu)
    assert equal(found, expected)
    gradients(trained, model, x, save_on_cpu)  # a warning would be an error here
    with save_on_cpu():
        there = planned(model, x, "every_stage")
    with pytest.warns(cs.BudgetWarning, match="and is not packed"):
        cs.checkpointed(model, there)(x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_bytes_among_hooks_that_were_planned(solver: str) -> None:
    model, x = chain_of(Stage), sample(Stage)
    with save_on_cpu():
        plan = planned(model, x, solver)
    trained, meter = cs.checkpointed(model, plan), default_meter(CPU)
    model.zero_grad()
    with save_on_cpu():
        trained(x).square().mean().backward()
        model.zero_grad()
        with meter.window() as window:
            default_loss(trained(x)).backward()
    assert window.phases[0].peak_bytes <= plan.peak_bytes


def test_the_input_is_kept_as_it_is_for_one_more_backward() -> None:
    model, x = chain_of(Stage), sample(Stage)
    with lossy():
        trained = cs.checkpointed(model, planned(model, x, "every_stage"))
        expected = model(x)
        y = trained(x)
    weights = list(model.parameters())
    right = torch.autograd.grad(expected.sum(), weights)
    torch.autograd.grad(y.sum(), weights, retain_graph=True)
    assert equal(list(torch.autograd.grad(y.sum(), weights)), list(right))


def test_hooks_are_described() -> None:
    assert describe_hooks(None) == ""
    with save_on_cpu():
        assert describe_hooks(hooks_now()) == "save_on_cpu.pack_to_cpu"


class Penalising(Stage):
    """Leaves a penalty on itself, as expert layers do."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.penalty = y.square().mean()
        return y


@pytest.mark.parametrize("solver", SOLVERS)
def test_stages_that_leave_something_besides_are_packed_alike(solver: str) -> None:
    model, x = chain_of(Penalising), sample(Stage)

    def step(run: nn.Module, around: Around) -> list[Tensor]:
        model.zero_grad()
        with around():
            y = run(x)
        (y.square().mean() + sum(stage.penalty for stage in model)).backward()  # type: ignore[misc]
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = step(model, lossy)
    assert not equal(expected, step(model, nullcontext))
    with lossy():
        plan = planned(model, x, solver)
    assert equal(step(cs.checkpointed(model, plan), lossy), expected)


def test_hooks_of_ckptsched_are_no_hooks() -> None:
    """A planned model inside a stage of another sees those that the user has set."""
    look = Look()
    with look.keeping_aliases():
        assert hooks_now() is None
    with save_on_cpu():
        with look.keeping_aliases():
            assert describe_hooks(hooks_now()) == "save_on_cpu.pack_to_cpu"
        with no_hooks():
            assert hooks_now() is None
        assert hooks_now() is not None
