"""Arrays of numpy among the arguments of a fitted model: other values are other calls."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

import ckptsched as cs


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, weights: np.ndarray) -> Tensor:
        x = x * float(weights.mean())
        for layer in self.layers:
            x = torch.tanh(layer(x)) * torch.tensor(weights)
        return x


def test_an_array_that_is_written_to_is_another() -> None:
    plain, x = Scaled(), torch.randn(64, 8)
    weights = np.ones(8, dtype=np.float32)
    model = cs.fit(copy.deepcopy(plain), x, weights, budget="100%")
    assert len(cs.plan_of(model).chain) > 1
    same = np.ones(8, dtype=np.float32)
    for array in (weights, 2 * weights, weights, same):
        if array is weights:
            weights += 0.5
        for m in (plain, model):
            m(x, array).square().sum().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
