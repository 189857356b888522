"""A density from samples: a continuous normalizing flow under a byte budget.

From the root of the repository: python -m examples.flow

Points of two moons are carried back in time to a normal distribution, by dopri5 with steps that
keep a tolerance; on the way the logarithm of the density gathers the divergence of the right-hand
side, which that makes by `torch.autograd.grad` itself (Chen et al., arXiv 1806.07366; Grathwohl et
al., FFJORD, arXiv 1810.01367, with the exact divergence). How many steps there are is known
afterwards only, and differs from one training step to the next; the budget holds for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ckptsched as cs
from examples.within_budget import Outcome, against_plain, bytes_of, measured_step, read_arguments

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """How much the example does."""

    points: int
    width: int
    iterations: int
    budget: str


FULL = Size(points=128, width=48, iterations=150, budget="4MiB")
SMALL = Size(points=32, width=8, iterations=4, budget="200KiB")


class Flow(nn.Module):
    """The right-hand side: the state is points (n, 2) and the logarithm of their density (n,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, t: Tensor, state: State) -> State:
        x, _ = state
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (tracked and x.requires_grad):
                x = x.detach().requires_grad_()
            speed = self.net(torch.cat((x, t.expand(len(x), 1)), 1))
            divergence = sum(
                torch.autograd.grad(speed[:, k].sum(), x, create_graph=True)[0][:, k]
                for k in range(2)
            )
        return (speed, -divergence) if tracked else (speed.detach(), -divergence.detach())


def bits(flow: Flow, points: Tensor, budget: int | str | None) -> Tensor:
    """Mean negative logarithm of the density of points, in bits per dimension."""
    t = torch.tensor([1.0, 0.0], dtype=points.dtype)
    gathered = torch.zeros_like(points[:, 0])
    x, change = cs.odeint(flow, (points, gathered), t, rtol=1e-8, atol=1e-10, budget=budget)
    normal = -0.5 * x[-1].square().sum(1) - math.log(2 * math.pi)
    return -(normal - change[-1]).mean() / (2 * math.log(2))


def two_moons(points: int, seed: int) -> Tensor:
    """Points of mean 0 and deviation 1, shape (points, 2), float64."""
    from sklearn import datasets

    x, _ = datasets.make_moons(points, noise=0.05, random_state=seed)
    return torch.as_tensor((x - [0.5, 0.25]) / [0.87, 0.5], dtype=torch.float64)


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Run the example.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        What it came to.
    """
    args = read_arguments(argv, __doc__ or "", FULL.budget)
    size = SMALL if args.small else FULL
    torch.manual_seed(0)
    flow = Flow(size.width).double()
    sample = two_moons(size.points, seed=0)

    def first_loss(budget: int | str | None) -> Tensor:
        return bits(flow, sample, budget)

    budget_bytes = bytes_of(args.budget or size.budget, first_loss, flow.parameters())
    outcome = Outcome(budget_bytes=budget_bytes)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for iteration in range(size.iterations):
        points = two_moons(size.points, seed=iteration)
        measured_step(
            outcome,
            lambda budget, x=points: bits(flow, x, budget),
            flow.parameters(),
            show=iteration % 10 == 0,
        )
        optimizer.step()
    against_plain(outcome, first_loss, flow.parameters())
    outcome.show()
    return outcome


if __name__ == "__main__":
    main()
