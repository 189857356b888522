"""What backwards draw and write between stages that run again lasts, as under autograd."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckptsched as cs


class Drawing(torch.autograd.Function):
    """Adds noise to gradients, as stochastic rounding does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], float]) -> Tensor:
        ctx.draw = draw
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * (1 + 0.1 * ctx.draw()), None


class Noting(torch.autograd.Function):
    """Keeps a mean of gradients in a buffer that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.seen.mul_(0.9).add_(gradient.norm())
        return gradient.clone(), None


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "numpy": np.random.rand,
}


class Noisy(nn.Module):
    def __init__(self, draw: str) -> None:
        super().__init__()
        self.inner, self.draw = nn.Linear(8, 8), draw

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.inner(x))
        x = nn.functional.dropout(x) if self.draw == "torch" else x * (1 + DRAWS[self.draw]())
        return Drawing.apply(torch.tanh(x), DRAWS[self.draw])


def _note(module: nn.Module, _: Any, gradients: Any) -> None:
    module.seen.mul_(0.9).add_(gradients[0].norm())


def _replace(module: nn.Module, _: Any, gradients: Any) -> None:
    module.seen = module.seen * 0.9 + gradients[0].norm()


class Watched(nn.Module):
    """A layer whose backward keeps statistics of gradients."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(8, 8), way
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()))
        if way == "hook":
            self.register_full_backward_hook(_note)
        if way == "replaced":
            self.register_full_backward_hook(_replace)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "checkpoint":  # whose normalisation moves twice a step
            return checkpoint(self._run, x, use_reentrant=False)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.inner(x)))
        if self.way == "function":
            x = Noting.apply(x, self.seen)
        if self.way == "tensor hook" and x.requires_grad:
            x.register_hook(lambda gradient: _note(self, None, [gradient]))
        return torch.sin(x)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + 0.1
        return x


def _left_by_steps(model: nn.Module, x: Tensor) -> bytes:
    """Gradients, buffers and random states after each of three steps."""
    found: list[Any] = []
    for k in range(3):
        torch.manual_seed(k)
        random.seed(k)
        np.random.seed(k)
        model(x).square().sum().backward()
        found += [p.grad for p in model.parameters()]
        found += [b.clone() for b in model.buffers()]
        found += [torch.get_rng_state(), random.getstate(), np.random.get_state()]
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
                p.grad = None
    return pickle.dumps([t.numpy() if isinstance(t, Tensor) else t for t in found])


def _fitted(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    whole = cs.plan(model, x, budget="100%")
    least, most = whole.least_budget_bytes, whole.store_all_bytes
    return cs.fit(model, x, budget=least + int(share * (most - least)))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_backward_draws_as_under_autograd(draw: str, share: float) -> None:
    torch.manual_seed(0)
    model, x = Stack([Noisy(draw) for _ in range(5)]), torch.randn(64, 8)
    plain = copy.deepcopy(model)
    _fitted(model, x, share)
    assert _left_by_steps(model, x) == _left_by_steps(plain, x)
    assert cs.plan_of(model).overhead > 0


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("way", ["hook", "replaced", "function", "tensor hook"])
def test_what_a_backward_writes_to_buffers_lasts(way: str, recorded: bool, share: float) -> None:
    torch.manual_seed(0)
    layers, x = [Watched(way) for _ in range(5)], torch.randn(64, 8)
    model = Stack(layers) if recorded else nn.Sequential(*layers)
    plain = copy.deepcopy(model)
    _fitted(model, x, share)
    assert _left_by_steps(model, x) == _left_by_steps(plain, x)
    assert cs.plan_of(model).overhead > 0


class Shared(nn.Module):
    """A layer that reads what the backward of others writes."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        x = Noting.apply(torch.tanh(self.inner(x)), self.seen)
        return torch.sin(x) / (1 + self.seen)


def test_a_buffer_that_others_read_again_is_refused() -> None:
    torch.manual_seed(0)
    seen, x = torch.zeros(()), torch.randn(64, 8)
    model = _fitted(Stack([Shared(seen) for _ in range(5)]), x, 0.0)
    with pytest.raises(
        cs.ExecutionError, match=r"changes buffer 'layers\.\d\.seen', which a stage"
    ):
        _left_by_steps(model, x)


def test_normalisation_in_a_checkpoint_of_torch_moves_as_under_autograd() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Watched("checkpoint") for _ in range(5)]), torch.randn(64, 8)
    plain = copy.deepcopy(model)
    _fitted(model, x, 0.0)
    assert _left_by_steps(model, x) == _left_by_steps(plain, x)


class Overseen(Stack):
    """Hooks of whose layers keep statistics of gradients elsewhere: in the model, or in a layer."""

    def __init__(self, layers: list[nn.Module], where: int, way: str) -> None:
        super().__init__(layers)
        self.register_buffer("seen", torch.zeros(()))
        keeper = [self, *layers][where]
        for layer in layers:
            layer.register_full_backward_hook(
                lambda _, *gradients: (_note if way == "in place" else _replace)(keeper, *gradients)
            )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("where", [0, 1, 3, 5])
@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_what_hooks_write_to_buffers_of_others_lasts(way: str, where: int) -> None:
    """Unless the stage of that buffer runs again afterwards: then it is refused."""
    found = []
    for planned in (True, False):
        torch.manual_seed(0)
        layers, x = [Watched("none") for _ in range(5)], torch.randn(64, 8)
        model = Overseen([*layers], where, way)
        if planned:
            _fitted(model, x, 0.0)
        if planned and where in (1, 3):
            with pytest.raises(cs.ExecutionError, match=rf"buffer 'layers\.{where - 1}\.seen'"):
                _left_by_steps(model, x)
            return
        found.append(_left_by_steps(model, x))
    assert found[0] == found[1]


class Redrawn(nn.Module):
    """Reads a buffer, for which the caller draws another."""

    def __init__(self, overwrites: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("noise", torch.randn(8))
        if overwrites:
            self.register_full_backward_hook(_halve)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * self.noise)


def _halve(module: nn.Module, *_: Any) -> None:
    module.noise.mul_(0.5)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("overwrites", [False, True])
def test_stages_that_run_again_find_the_buffers_of_their_own_forward(
    overwrites: bool, share: float
) -> None:
    """Others that have taken their places stay, and what a hook would do to them is refused."""
    found = []
    for planned in (False, True):
        torch.manual_seed(0)
        redrawn = [Redrawn(overwrites) for _ in range(5)]
        model, x = Stack([nn.Linear(8, 8), *redrawn]), torch.randn(64, 8)
        if planned:
            _fitted(model, x, share)
        for number in (2.0, 3.0):
            loss = model(x).square().sum()
            for module in redrawn:
                module.noise = torch.full((8,), number)
            if planned and overwrites:
                with pytest.raises(cs.ExecutionError, match=r"buffer 'layers\.\d\.noise'"):
                    loss.backward()
                return
            found.append(torch.autograd.grad(loss, [*model.parameters()]))
        found.append([module.noise for module in redrawn])
    for one, other in zip(found[:3], found[3:], strict=True):
        assert all(map(torch.equal, one, other))


class OwnNorm(nn.BatchNorm1d):
    """One of a class of its own, whose statistics may be read in training for all that is known."""


def test_statistics_that_move_at_one_version_stay() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), OwnNorm(8), nn.Tanh()) for _ in range(6)]
    model, x = Stack([*layers]), torch.randn(64, 8)
    plain = copy.deepcopy(model)
    _fitted(model, x, 0.3)
    assert _left_by_steps(model, x) == _left_by_steps(plain, x)
