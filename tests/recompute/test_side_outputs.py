"""What leaves a stage by another way than its output: it works, or it is refused by name."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from tests.recompute.side_outputs import (
    PROGRAMS,
    WIDTH,
    Notes,
    Step,
    X,
    all_aux,
    chain_of,
    equal,
    fresh,
    gradients,
    planned,
    plans,
    run_steps,
    set_aux,
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_those_of_plain_autograd_and_the_budget_is_kept(name: str) -> None:
    model, step = fresh(name)
    expected = run_steps(model, model, step)
    assert any(isinstance(g, Tensor) and g.dim() == 2 and bool(g.any()) for g in expected)
    meter = default_meter(torch.device("cpu"))
    for plan in plans(fresh(name)[0]):
        model, step = fresh(name)
        found = run_steps(model, cs.checkpointed(model, plan), step)
        assert all(map(equal, expected, found)), f"budget {plan.budget_bytes}"
        model, step = fresh(name)
        run = cs.checkpointed(model, plan)
        with meter.window() as window:
            step(run).backward()
            window.mark()
        assert window.measurement.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize("name", ["attribute: a feature", "outputs", "ode, list", "ode"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_second_backward_and_one_with_a_graph_are_those_of_plain_autograd(
    name: str, share: float
) -> None:
    def seen(model: nn.Module, run: nn.Module, step: Step) -> list[Any]:
        loss = step(run)
        loss.backward(retain_graph=True)
        loss.backward()
        return gradients(model)

    model, step = fresh(name)
    expected = seen(model, model, step)
    plan = planned(fresh(name)[0], share).plan
    model, step = fresh(name)
    assert all(map(equal, expected, seen(model, cs.checkpointed(model, plan), step)))

    model, step = fresh(name)
    weights = list(model.parameters())
    expected = list(torch.autograd.grad(step(model), weights, create_graph=True))
    model, step = fresh(name)
    loss = step(cs.checkpointed(model, plan))
    with pytest.warns(cs.BudgetWarning):
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
        assert other.requires_grad


def test_what_runs_again_leaves_attributes_and_their_lists_alone() -> None:
    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.aux = y.square().mean()
        layer.all.append(layer.aux)
        layer.notes.history.append(layer.aux)

    model = chain_of(leave)
    for layer in model:
        layer.all, layer.notes = [], Notes()
    run = planned(model)
    for layer in model:
        layer.all.clear()
    loss = run(X).mean() + all_aux(model)
    before = [(layer.aux, list(layer.all), list(layer.notes.history)) for layer in model]
    loss.backward()
    for layer, (aux, whole, history) in zip(model, before, strict=True):
        assert layer.aux is aux
        assert [id(t) for t in layer.all] == [id(t) for t in whole]
        assert [id(t) for t in layer.notes.history] == [id(t) for t in history]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gradients_of_features_are_kept_where_they_are_asked_for(share: float) -> None:
    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.aux = y
        if y.requires_grad:
            y.retain_grad()

    def seen(model: nn.Module, run: nn.Module) -> list[Tensor]:
        (run(X).square().mean() + all_aux(model)).backward()
        return [layer.aux.grad for layer in model]

    torch.manual_seed(0)
    model = chain_of(leave)
    plain = copy.deepcopy(model)
    expected = seen(plain, plain)
    run = planned(model, share)
    assert all(map(equal, expected, seen(model, run)))


def test_detached_tensors_and_numbers_are_no_side_outputs() -> None:
    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.seen, layer.size = y.detach(), float(y.detach().norm())

    chain = cs.profile(chain_of(leave), X)
    assert chain.signature is not None
    assert not chain.signature.sides


def test_steps_with_side_outputs_are_verified_and_let_everything_go() -> None:
    torch.manual_seed(0)
    model = chain_of(set_aux(lambda s, x, y: y.square().mean()))

    def loss(y: Tensor) -> Tensor:
        return y.square().mean() + all_aux(model)

    chain = cs.profile(model, X, loss=loss)
    for budget in (cs.plan(chain, budget=10**12).least_budget_bytes, 10**12):
        result = cs.verify(model, cs.plan(chain, budget=budget), X, loss=loss)
        assert result.ok, str(result)
    run = cs.checkpointed(model, cs.plan(chain, budget=budget))
    value = loss(run(X))
    value.backward()
    node = weakref.ref(model[0].aux.grad_fn)
    gc.disable()
    try:
        del value
        for layer in model:
            del layer.aux
        assert node() is None
    finally:
        gc.enable()


def test_plans_with_side_outputs_are_saved_and_loaded(tmp_path: Any) -> None:
    model, step = fresh("list")
    plan = planned(copy.deepcopy(model)).plan
    plan.save(tmp_path / "plan.json")
    loaded = cs.Plan.load(tmp_path / "plan.json")
    assert loaded.chain.signature is not None
    assert loaded.chain.signature.sides == "4x1"
    plain, plain_step = fresh("list")
    expected = run_steps(plain, plain, plain_step)
    assert all(map(equal, expected, run_steps(model, cs.checkpointed(model, loaded), step)))


class Regularised(nn.Module):
    """A right-hand side that leaves a penalty of its last evaluation."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head, self.detached = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2),
            detached,
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        penalty = self.head(y).square().mean()
        self.penalty = penalty.detach() if self.detached else penalty
        return torch.tanh(self.inner(y))


def solved(f: Regularised, **options: Any) -> list[Tensor | None]:
    y = cs.odeint(f, X, torch.tensor([0.0, 1.0]), **options)
    (y[-1].square().mean() + f.penalty).backward()
    return gradients(f)


def test_right_hand_sides_leave_penalties_on_grids_and_are_refused_in_adaptive_solves() -> None:
    grid: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.2}}
    expected = solved(Regularised(), **grid)
    assert all(map(equal, expected, solved(Regularised(), budget="70%", **grid)))
    with pytest.raises(cs.ExecutionError, match=r"f leaves .*attribute 'penalty'.*detach"):
        solved(Regularised(), method="dopri5", budget=10**7)
    expected = solved(Regularised(detached=True), method="dopri5")
    found = solved(Regularised(detached=True), method="dopri5", budget=10**7)
    assert all(map(equal, expected, found))
