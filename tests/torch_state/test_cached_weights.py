"""Weights that `parametrize.cached()` keeps: gradients and bytes of steps by a plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.profiler.profile import default_loss
from tests.support.networks import planned
from tests.support.surroundings import CPU, SOLVERS, Stage, equal, sample


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        parametrize.register_parametrization(self.linear, "weight", Symmetric())

    def forward(self, t: Any, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def cached_step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Any]:
    """Weights are read before the model, by it, and after it."""
    model.zero_grad()
    slope: Any = model.get_submodule("1.f.linear")
    with parametrize.cached():
        before = slope.weight.square().sum()
        y = run(x).square().mean()
        after = slope.weight.sum()
    (y + 0.1 * before + 0.1 * after).backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_cached_weights(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), cs.ODEBlock(Slope(), method=method, steps=6))
    x = sample(Stage)
    expected = cached_step(model, model, x)
    for solver in SOLVERS:
        with parametrize.cached() if solver == "every_2" else nullcontext():
            plan = planned(model, x, solver)
        found = cached_step(cs.checkpointed(model, plan), model, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not parametrize._cache_enabled
        assert not parametrize._cache


def test_cached_weights_keep_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), cs.ODEBlock(Slope(), method="rk4", steps=6))
    x, meter = sample(Stage), default_meter(CPU)
    plan = planned(model, x, "every_stage")
    trained = cs.checkpointed(model, plan)
    default_loss(trained(x)).backward()
    model.zero_grad()
    with meter.window() as window, parametrize.cached():
        default_loss(trained(x)).backward()
    assert window.phases[0].peak_bytes <= plan.peak_bytes


def test_a_cached_weight_that_moves_is_refused() -> None:
    torch.manual_seed(0)
    slope = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh())

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = slope

        def forward(self, t: Any, x: Tensor) -> Tensor:
            return torch.as_tensor(self.net(x))

    model = nn.Sequential(nn.Linear(6, 6), cs.ODEBlock(Moving(), method="euler", steps=4))
    x = sample(Stage)
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    before = [b.clone() for b in model.buffers()]
    with parametrize.cached(), pytest.raises(cs.PlanMismatchError, match="'weight' of a Linear is"):
        trained(x)
    assert equal(before, list(model.buffers()))
    trained(x).sum().backward()
