"""How much memory solves with many output times take: torchdiffeq's, its adjoint's, and the least.

    python -m benchmarks.output_times

64 steps of rk4 (256 for 257 times), or dopri5 at 1e-6, through a network of 16 and 32 units,
batch 16. Peaks of forward, loss and backward are measured, in states of one time. The least
budget is that of a loss that is named (`loss=`), or of one that is not; the last column is what
the step took within it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from ckptsched import InfeasibleBudgetError, odeint
from ckptsched.memory.meters import default_meter

METHODS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "options": {"step_size": 1 / 64}},
    "dopri5": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8},
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "at the last time": lambda y: (y[-1] - 1).square().mean(),
    "at all times": lambda y: y.square().mean(),
}


class Field(nn.Module):
    """A small network, bent by time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope."""
        slope: Tensor = self.layers(y) * torch.cos(t)
        return slope


def peak(
    solve: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], inputs: list[Tensor]
) -> int:
    """Bytes of a training step; what is measured once is, before."""

    def step() -> None:
        for x in inputs:
            x.grad = None
        loss(solve()).backward()  # type: ignore[no-untyped-call]

    step()
    return default_meter("cpu").measure(step)[1].peak_bytes


def least_budget(solve: Callable[..., Tensor], **how: Any) -> int:
    """Bytes that the error of a single byte names."""
    try:
        solve(budget=1, **how)
    except InfeasibleBudgetError as error:
        return error.least_budget_bytes or 0
    raise AssertionError("a solve within one byte")


def row(how: dict[str, Any], times: int, loss: Callable[[Tensor], Tensor]) -> list[str]:
    """Peaks and least budgets, in states of one time."""
    torch.manual_seed(0)
    field, y0 = Field(), torch.randn(16, 16, requires_grad=True)
    inputs, t = [y0, *field.parameters()], torch.linspace(0, 1, times)

    def by(solver: Any, **more: Any) -> Tensor:
        solved: Tensor = solver(field, y0, t, **how, **more)
        return solved

    least = least_budget(lambda **more: by(odeint, **more), loss=loss)
    figures = [
        peak(lambda: by(torchdiffeq.odeint), loss, inputs),
        peak(lambda: by(torchdiffeq.odeint_adjoint), loss, inputs),
        least_budget(lambda **more: by(odeint, **more)),
        least,
        peak(lambda: by(odeint, budget=least, loss=loss), loss, inputs),
    ]
    return [f"{figure / y0.nbytes:.0f}" for figure in figures]


def main() -> None:
    """Measure, and print the table."""
    warnings.simplefilter("ignore")  # torchdiffeq's
    print("| method | times | loss | odeint | adjoint | least | named | measured |")
    print("|---|---|---|---|---|---|---|---|")
    for method, how in METHODS.items():
        for times in (5, 17, 65, 257):
            for name, loss in LOSSES.items():
                cells = [method, str(times), name, *row(how, times, loss)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
