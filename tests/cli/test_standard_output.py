"""The library prints nothing on standard output, be it Python, C++ or a solver that writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs


class Skips(nn.Module):
    """No chain as it is, so that it is recorded, and its graph is searched, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        first = y = x
        for layer in self.layers:
            y = torch.tanh(layer(y)) + first
        return y


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def test_measuring_planning_training_and_verifying_print_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    x, model = torch.randn(64, 16), Skips()
    cs.fit(model, x, budget="70%", loss=loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(model(x)).backward()
        optimizer.step()
    plan = cs.plan_of(model)
    cs.unfit(model)
    plan.save(tmp_path / "plan.json")
    assert cs.verify(model, cs.Plan.load(tmp_path / "plan.json"), x, loss=loss_of).ok
    assert len(cs.tradeoff(plan.chain).front) > 1
    assert capfd.readouterr().out == ""
