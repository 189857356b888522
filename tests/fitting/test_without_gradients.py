"""Stages that a model runs without gradients, among others that are trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs


class PartlyWithout(nn.Module):
    """Looks ahead without gradients, through layers that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for layer in self.layers[:2]:
                x = x + layer(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("share", ["55%", "75%", "100%"])
def test_several_steps_are_those_of_plain_autograd(share: str) -> None:
    torch.manual_seed(0)
    plain = PartlyWithout()
    model = cs.fit(copy.deepcopy(plain), torch.randn(64, 16), budget=share)
    for rows in (64, 64, 32, 64):
        x = torch.randn(rows, 16)
        for net in (plain, model):
            net.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
