"""Functions of a model's code that decide by values are one call, and the rest is opened."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs


def matched_loss(scores: Tensor, targets: Tensor, *, weight: float = 0.5) -> Tensor:
    """Each target takes the nearest score that is left, as a matcher of boxes does."""
    left, total = list(range(len(scores))), scores.new_zeros(())
    for target in targets:
        best = min(left, key=lambda k: float((scores[k] - target).detach().abs()))
        left.remove(best)
        total = total + (scores[best] - target).square()
    return total * weight


def clipped(x: Tensor, most: float = 1.0) -> tuple[Tensor, float]:
    """Gives a number besides."""
    norm = float(x.detach().norm())
    return x * min(1.0, most / norm), norm


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Matched(Base):
    """Its loss is computed in its forward, as detection models do."""

    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"loss": matched_loss(y.mean(1), targets, weight=0.25), "y": y}


class Static(Base):
    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.body(x).mean(1), targets)}

    @staticmethod
    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        found = [matched_loss(scores, targets[k:]) for k in range(2)]
        return found[0] + found[1]


class Numbers(Base):
    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        y, norm = clipped(self.body(x))
        return {"loss": (y.mean(1) - targets.sum()).square().sum() * norm}


class Inside(Base):
    """What a function is given hides a parameter."""

    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": hidden_loss(SimpleNamespace(layer=self.layers[0].weight), x, targets)}


def hidden_loss(given: Any, x: Tensor, targets: Tensor) -> Tensor:
    return matched_loss((x @ given.layer).mean(1), targets)


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(128, 16), torch.randn(5)


def gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    model.zero_grad()
    model(*batch)["loss"].backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [Matched, Static])
def test_a_function_that_decides_by_values_is_one_call(kind: type[Base]) -> None:
    codes = matched_loss.__code__, matched_loss.__kwdefaults__, matched_loss.__defaults__
    torch.manual_seed(0)
    model = kind()
    plain, first = copy.deepcopy(model), batch_of(0)
    recorded = cs.captured(model, *first).recording
    (name,) = recorded.whole
    where = {Matched: "matched_loss", Static: "Static.loss"}[kind]
    assert name == f"{__name__}:{where}"
    assert "reads values that the model computes with" in recorded.whole[name]
    assert codes == (
        *(matched_loss.__code__, matched_loss.__kwdefaults__, matched_loss.__defaults__),
    )
    least = cs.least_budget(model, *first, overhead=5)
    assert least.peak_bytes < 0.8 * least.store_all_bytes
    cs.fit(model, *first, budget=least.peak_bytes)
    for seed in range(4):  # other values match otherwise
        batch = batch_of(seed)
        found, expected = gradients(model, batch), gradients(plain, batch)
        assert len(found) == len(expected) == 12
        assert all(map(torch.equal, found, expected))


def test_copies_and_files_of_a_recording_name_the_function() -> None:
    model, batch = Matched(), batch_of(0)
    cs.fit(model, *batch, budget="90%")
    expected = gradients(model, batch)
    assert all(map(torch.equal, gradients(copy.deepcopy(model), batch), expected))


@pytest.mark.parametrize("kind", [Numbers, Inside])
def test_a_function_that_is_no_stage_makes_the_model_one(kind: type[Base]) -> None:
    model, batch = kind(), batch_of(0)
    plain = copy.deepcopy(model)
    with pytest.raises(cs.ProfileError, match=r"cannot be taken apart: .* outside of any part"):
        cs.captured(model, *batch)
    cs.fit(model, *batch, budget="100%")
    for seed in range(2):
        found = gradients(model, batch_of(seed))
        assert all(map(torch.equal, found, gradients(plain, batch_of(seed))))


class Remembers(nn.Module):
    """Keeps what it has made of each mask, and the mask."""

    @functools.lru_cache(maxsize=1)  # noqa: B019 - as people write it
    def positions(self, mask: Tensor) -> Tensor:
        return mask.cumsum(-1).sin()

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def scale(mask: Tensor) -> Tensor:
        return mask.float().cos()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * self.scale(mask) + self.positions(mask)


class Masked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.remembers = Remembers()

    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = self.remembers(torch.tanh(layer(x)), x > 0)
        return {"loss": (x.mean(1) - targets.sum()).square().sum()}


def test_what_methods_remember_is_no_state_of_the_model() -> None:
    torch.manual_seed(0)
    model, batch = Masked(), batch_of(0)
    plain = copy.deepcopy(model)
    gradients(model, batch)  # and so remembers something
    assert not cs.captured(model, *batch).recording.whole
    least = cs.least_budget(model, *batch, overhead=5)
    assert least.peak_bytes < 0.8 * least.store_all_bytes
    cs.fit(model, *batch, budget=least.peak_bytes)
    for seed in range(3):
        found = gradients(model, batch_of(seed))
        assert all(map(torch.equal, found, gradients(plain, batch_of(seed))))
