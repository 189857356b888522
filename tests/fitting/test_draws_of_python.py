"""Models that draw from Python's and numpy's generators in their forward, fitted in place."""

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

import ckptsched as cs
from ckptsched.memory.meters import default_meter


def _rows(kind: str) -> nn.Module:
    own: dict[str, Any] = {
        "own of python": random.Random(3),
        "own of numpy": np.random.default_rng(3),
        "own and old": np.random.RandomState(3),
    }

    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.own = nn.Linear(8, 8), own.get(kind)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.inner(x))
            if kind == "python":
                return x * random.uniform(0.5, 1.5)
            if self.own is not None:
                return x * float(self.own.uniform(0.5, 1.5))
            if kind == "numpy":
                return x + torch.from_numpy(np.random.randn(8)).float()
            order = list(range(len(x)))
            random.shuffle(order)
            return x[order]

    return Noise()


class Noisy(nn.Module):
    """Layers that draw, and others between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.noisy = nn.ModuleList(_rows(kind) for _ in range(3))
        self.plain = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for noisy, plain in zip(self.noisy, self.plain, strict=True):
            x = x + torch.tanh(plain(torch.sin(noisy(x))))
        return x


class Skipping(nn.Module):
    """A layer that may be skipped, as a draw decides before anything is computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.random() if self.kind == "python" else np.random.uniform()
        return x if self.training and drawn < 0.5 else x + torch.tanh(self.inner(x))


class Skips(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Skipping(kind) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


class Whole(nn.Module):
    """One that draws in its own forward, so that it is one stage."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            drawn = random.random() if self.kind == "python" else np.random.rand()
            if drawn >= 0.5:
                x = x + torch.tanh(layer(x))
        return torch.tanh(x)


def _states() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


def _put(states: bytes) -> None:
    python, numpy, ours = pickle.loads(states)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.from_numpy(ours))


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "python": lambda: Noisy("python"),
    "numpy": lambda: Noisy("numpy"),
    "own of python": lambda: Noisy("own of python"),
    "own of numpy": lambda: Noisy("own of numpy"),
    "own and old": lambda: Noisy("own and old"),
    "shuffled": lambda: Noisy("shuffled"),
    "skipping by python": lambda: Skips("python"),
    "skipping by numpy": lambda: Skips("numpy"),
    "whole by python": lambda: Whole("python"),
    "whole by numpy": lambda: Whole("numpy"),
}


@pytest.mark.parametrize("name", _MODELS)
def test_steps_are_those_of_plain_autograd_and_within_the_budget(name: str) -> None:
    plain, x = _MODELS[name](), torch.randn(256, 8)
    model: Any = copy.deepcopy(plain)
    before = _states()
    cs.fit(model, x, budget="100%")
    assert _states() == before
    plan = cs.plan_of(model)
    if plan.least_budget_bytes < plan.store_all_bytes:
        cs.fit(model, x, budget=plan.least_budget_bytes)
        assert cs.plan_of(model).forwards > len(cs.plan_of(model).chain)
        assert _states() == before
    budget = cs.plan_of(model).budget_bytes
    for step in range(4):
        random.seed(step)
        np.random.seed(step)
        begun = _states()
        expected = plain(x)
        expected.square().sum().backward()
        after = _states()
        _put(begun)
        with default_meter("cpu").window() as window:
            found = model(x)
            found.square().sum().backward()
            window.mark()
        assert _states() == after
        assert torch.equal(found, expected)
        assert window.measurement.peak_bytes <= budget
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
            p.grad = q.grad = None
        del found, expected


def test_parts_that_draw_are_whole_and_those_around_them_are_not() -> None:
    net = cs.captured(Skips("python"), torch.randn(16, 8))
    assert {*net.recording.whole} == {f"layers.{k}" for k in range(4)}
