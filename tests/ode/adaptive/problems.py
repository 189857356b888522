"""A right-hand side, and what tests of adaptive solves compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptsched.base.errors import (
    InfeasibleBudgetError,
)
from ckptsched.ode.methods.table import METHODS

ADAPTIVE = sorted(name for name, tableau in METHODS.items() if tableau.b_error is not None)
DOUBLE = torch.float64


class Field(nn.Module):
    """A right-hand side that depends on time and counts its evaluations."""

    def __init__(self, width: int = 6, hidden: int = 24) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.double()
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        slope: Tensor = self.outer(torch.tanh(self.inner(z))) * torch.cos(t)
        return slope


def start(batch: int = 16, width: int = 6) -> Tensor:
    return torch.randn(batch, width, dtype=DOUBLE, requires_grad=True)


def mean_square(states: Tensor) -> Tensor:
    return states.square().mean()


def gradients(states: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(mean_square(states), tensors)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], share: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(one - other) <= share * torch.linalg.vector_norm(other)


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def least_budget(solve: Callable[..., Any]) -> int:
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(budget=1)
    least = caught.value.least_budget_bytes
    assert least is not None
    return least


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False).double()
        self.norm = nn.BatchNorm1d(6).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(z)))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6).double(), nn.Dropout(0.05)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(z)))
