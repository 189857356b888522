"""Physics from data: the gravity and the drag of pendulums, through 10,000 steps of RK4.

From the root of the repository: python -m examples.pendulum

Pendulums of one kind are let go at different angles, and their angle and angular velocity are
noted some times. What is looked for is what they have in common: theta'' = -k sin(theta) -
(a + b |theta'|) theta'. The step size is that of the physics, so there are many; plain autograd
keeps the tapes of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ckptsched as cs
from examples.within_budget import Outcome, against_plain, bytes_of, measured_step, read_arguments

TRUTH = (9.81, 0.10, 0.05)
GUESS = (9.30, 0.00, 0.00)
UNITS = (0.3, 0.1, 0.03)  # how well they are known beforehand: the optimizer's steps are in these
END = 6.0  # seconds


@dataclass(frozen=True)
class Size:
    """How much the example does."""

    pendulums: int
    steps: int
    times: int
    evaluations: int
    budget: str


FULL = Size(pendulums=64, steps=10_000, times=21, evaluations=10, budget="4MiB")
SMALL = Size(pendulums=16, steps=200, times=5, evaluations=3, budget="48KiB")


class Pendulum(nn.Module):
    """The right-hand side: the state is (2, pendulums), angles in radians and their velocities."""

    def __init__(self, values: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("guess", torch.tensor(values, dtype=torch.float64))
        self.register_buffer("units", torch.tensor(UNITS, dtype=torch.float64))
        self.change = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        theta, omega = y
        k, a, b = self.values()
        return torch.stack((omega, -k * theta.sin() - (a + b * omega.abs()) * omega))

    def values(self) -> Tensor:
        """Gravity over length, linear and quadratic drag."""
        return torch.addcmul(self.guess, self.units, self.change)


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
    angles = torch.linspace(0.3, 2.5, size.pendulums, dtype=torch.float64)
    y0 = torch.stack((angles, torch.zeros_like(angles)))
    t = torch.linspace(0, END, size.times, dtype=torch.float64)
    options = {"step_size": END / size.steps}
    with torch.no_grad():
        seen = cs.odeint(Pendulum(TRUTH), y0, t, method="rk4", options=options)
        seen = seen + 0.01 * torch.randn_like(seen)
    model = Pendulum(GUESS)

    def misfit(y: Tensor) -> Tensor:
        return (y - seen).square().mean()

    def loss(budget: int | str | None) -> Tensor:
        how = {"method": "rk4", "options": options}
        return misfit(cs.odeint(model, y0, t, **how, budget=budget, loss=misfit))

    budget_bytes = bytes_of(args.budget or size.budget, loss, model.parameters())
    outcome = Outcome(budget_bytes=budget_bytes)
    print(f"{size.pendulums} pendulums, {size.steps} steps of RK4 over {END:g} s; planning")
    loss(outcome.budget_bytes)  # measured and planned here, and kept with the model
    against_plain(outcome, loss, model.parameters())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_eval=size.evaluations, line_search_fn="strong_wolfe"
    )
    optimizer.step(lambda: measured_step(outcome, loss, model.parameters()))
    found = ", ".join(f"{value:.4f}" for value in model.values().tolist())
    outcome.show(("k, a, b found", found), ("k, a, b of the data", str(TRUTH)[1:-1]))
    return outcome


if __name__ == "__main__":
    main()
