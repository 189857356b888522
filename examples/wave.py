"""What a wave went through: the speed of sound in a plate, from what a few sensors heard.

From the root of the repository: python -m examples.wave

The wave equation u_tt = c(x)^2 (u_xx + u_yy), with u = 0 at the edges, on a grid of points, in
thousands of leapfrog steps. Several bumps are let go, one in each run of a batch; sensors note u.
What is looked for is c, given by its values on a coarse grid. A step takes what its size lets it,
so there are many; plain autograd keeps the tapes of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptsched as cs
from examples.within_budget import Outcome, against_plain, bytes_of, measured_step, read_arguments

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """How much the example does."""

    points: int
    sources: int
    steps: int
    times: int
    iterations: int
    budget: str


FULL = Size(points=40, sources=3, steps=3_000, times=21, iterations=15, budget="6MiB")
SMALL = Size(points=12, sources=1, steps=200, times=5, iterations=3, budget="48KiB")
END = 1.5  # in units of the plate's width over the mean speed
COARSE = 5


class Plate(nn.Module):
    """The right-hand side: the state is u and its rate, (sources, points, points) each."""

    def __init__(self, points: int, speed: Tensor) -> None:
        super().__init__()
        self.speed = nn.Parameter(speed.clone())
        line = functional.interpolate(
            torch.eye(COARSE)[None], points, mode="linear", align_corners=True
        )[0].T  # (points, COARSE): from the coarse grid to the fine one, along one axis
        ones = torch.ones(points - 1)
        second = torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(points)
        self.register_buffer("line", line)
        self.register_buffer("second", second * (points + 1) ** 2)  # derivative, along an axis

    def forward(self, t: Tensor, state: State) -> State:
        u, rate = state
        speed = self.line @ self.speed @ self.line.T
        return rate, speed.square() * (self.second @ u + u @ self.second)


def leapfrog(f: Plate, t: Tensor, h: Tensor, state: State) -> State:
    """A step of one's own: the rate is that half a step earlier, so that f is evaluated once."""
    u, rate = state
    u = u + h * rate
    return u, rate + h * f(t, (u, rate))[1]


def bumps(points: int, sources: int) -> State:
    """One bump in each run, on a circle around the middle; at rest."""
    x = torch.linspace(0, 1, points + 2)[1:-1]
    angle = torch.arange(sources) * (2 * torch.pi / sources) + 0.4
    across = (x - 0.5 - 0.25 * angle.cos()[:, None]).square()
    down = (x - 0.5 - 0.25 * angle.sin()[:, None]).square()
    u = torch.exp(-(across[:, None, :] + down[:, :, None]) / (2 * 0.08**2))
    return u, torch.zeros_like(u)


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
    truth = 1 + 0.15 * (2 * torch.rand(COARSE, COARSE) - 1)
    y0 = bumps(size.points, size.sources)
    t = torch.linspace(0, END, size.times)
    options = {"step_size": END / size.steps}
    sensors = torch.arange(2, size.points, 5)

    def heard(states: tuple[Tensor, Tensor]) -> Tensor:
        return states[0][:, :, sensors][..., sensors]

    how = {"method": leapfrog, "options": options}
    with torch.no_grad():
        seen = heard(cs.odeint(Plate(size.points, truth), y0, t, **how))
    plate = Plate(size.points, torch.ones_like(truth))

    def misfit(states: tuple[Tensor, Tensor]) -> Tensor:
        return (heard(states) - seen).square().mean() / seen.square().mean()

    def loss(budget: int | str | None) -> Tensor:
        return misfit(cs.odeint(plate, y0, t, **how, budget=budget, loss=misfit))

    budget_bytes = bytes_of(args.budget or size.budget, loss, plate.parameters())
    outcome = Outcome(budget_bytes=budget_bytes)
    print(
        f"{size.points} x {size.points} points, {size.sources} bumps, {size.steps} leapfrog steps"
    )
    loss(outcome.budget_bytes)  # measured and planned here, and kept with the plate
    against_plain(outcome, loss, plate.parameters())
    optimizer = torch.optim.Adam(plate.parameters(), lr=0.03)
    for _ in range(size.iterations):
        measured_step(outcome, loss, plate.parameters())
        optimizer.step()
    error = (plate.speed.detach() - truth).square().mean().sqrt()
    before = (1 - truth).square().mean().sqrt()
    outcome.show(
        ("error of the speed", f"{float(error):.4f} (root mean square), {float(before):.4f} before")
    )
    return outcome


if __name__ == "__main__":
    main()
