"""Networks that tests train by a plan, and plans for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import ckptsched as cs

Made = tuple[nn.Module, Tensor]


class Same(nn.Module):
    """Hands its input on."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Encoder(nn.Module):
    """One transformer layer, whose library version takes more arguments than a stage has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def conv_block(width: int) -> nn.Sequential:
    """The right-hand side of an ODE on images, without the shortcut."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def ode_net() -> Made:
    """Convolutions, BatchNorm, two ODE blocks of several methods."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        cs.ODEBlock(conv_block(8), "rk4", 4),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        cs.ODEBlock(conv_block(16), "euler", 5),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    return model, torch.randn(4, 3, 16, 16)


def dropout_mlp() -> Made:
    """Random numbers in every second stage."""
    parts = [m for _ in range(5) for m in (nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.2))]
    return nn.Sequential(*parts), torch.randn(16, 32)


def dropout_ode() -> Made:
    """Random numbers inside the steps of an ODE, parameters used four times a step."""
    f = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Tanh())
    return nn.Sequential(nn.Linear(8, 16), cs.ODEBlock(f, "rk4", 6), nn.Linear(16, 3)), (
        torch.randn(16, 8)
    )


def input_gradient_mlp() -> Made:
    """The gradient with respect to the input is wanted."""
    parts = [m for _ in range(5) for m in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*parts), torch.randn(16, 32, requires_grad=True)


def shared_weights() -> Made:
    """One module at two places, and an output whose gradient has no other holder."""
    shared = nn.Linear(32, 32)
    model = nn.Sequential(
        shared, nn.Tanh(), nn.Linear(32, 32), nn.GELU(), shared, nn.Tanh(), nn.LayerNorm(32)
    )
    return model, torch.randn(16, 32, requires_grad=True)


def transformer() -> Made:
    """Attention with dropout, on integers."""
    layers = [Encoder(32) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(50, 32), *layers, nn.LayerNorm(32), nn.Linear(32, 50))
    return model, torch.randint(0, 50, (4, 32))


def views() -> Made:
    """Stages that return views of their input."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Same(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Unflatten(1, (8, 64)),
        nn.Linear(64, 64),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return model, torch.randn(4, 3, 8, 8)


def in_place() -> Made:
    """Activations that overwrite what the stage before made."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(inplace=True),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return model, torch.randn(4, 3, 8, 8)


def double_precision_ode() -> Made:
    """An ODE block alone, in float64."""
    f = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    x = torch.randn(32, 16, dtype=torch.float64, requires_grad=True)
    return cs.ODEBlock(f, "heun", 20), x


NETWORKS: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        ode_net,
        dropout_mlp,
        dropout_ode,
        input_gradient_mlp,
        shared_weights,
        transformer,
        views,
        in_place,
        double_precision_ode,
    )
}


def planned(model: nn.Module, x: Tensor, solver: str = "every_2") -> cs.Plan:
    """A plan whose budget is just its projected peak."""
    return tight(cs.profile(model, x), solver)


def tight(chain: cs.Chain, solver: str) -> cs.Plan:
    """A plan by a baseline without slack, or by another solver for a budget in the middle."""
    loose = cs.plan(chain, budget=2**50, solver=solver)
    if solver in ("chain_dp", "auto"):
        middle = (loose.least_budget_bytes + loose.store_all_bytes) // 2
        return cs.plan(chain, budget=max(loose.least_budget_bytes, middle), solver=solver)
    return cs.plan(chain, budget=loose.peak_bytes, solver=solver)
