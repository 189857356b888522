"""Experiment (c): the error of the gradient against the step size, backsolve's and ours.

From the root of the repository: python -m examples.anode.gradient_error --plot gradient_error.png

What is compared with is the gradient of the loss of the discrete steps, by plain autograd; finite
differences of that loss check it. Ours is that of a solve within twice the least byte budget
that works for the method, so that many steps are recomputed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ckptsched as cs
from examples.anode.budgets import least_bytes
from examples.anode.display import new_figure, save, table

METHODS = {"euler": "Euler", "midpoint": "RK2", "rk4_classic": "RK4"}
WIDTH, HIDDEN, BATCH = 16, 32, 8
TOLERANCES = (1e-3, 1e-6, 1e-9)


@dataclass(frozen=True)
class Row:
    """Relative errors of the whole gradient, of z(0) and all parameters."""

    backsolve: float
    cosine: float
    """Between backsolve's gradient and that of the discrete steps."""
    ours: float
    finite_difference: float
    """Of the derivative in one random direction, by central differences."""


class RightHandSide(nn.Module):
    """Two layers of Gaussian weights with an activation between them, float64."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        layers = nn.Linear(WIDTH, HIDDEN), activation, nn.Linear(HIDDEN, WIDTH)
        self.layers = nn.Sequential(*layers).double()
        for linear in (layers[0], layers[2]):
            nn.init.normal_(linear.weight, std=2 / math.sqrt(linear.in_features))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Map a state (batch, WIDTH) to its slope."""
        return self.layers(z)


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, str, int], Row]:
    """Run the experiment, print its tables, and draw its figure.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        The errors by activation, method and number of steps.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="up to 256 steps")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    parser.add_argument("--plot", type=Path, help="draw the figure into this file")
    args = parser.parse_args(argv)
    powers = 9 if args.full else 2 if args.tiny else 7
    grids = [2**k for k in range(powers)]
    tolerances = TOLERANCES[:1] if args.tiny else TOLERANCES
    rows = {}
    for name, activation in {"tanh": nn.Tanh(), "relu": nn.ReLU()}.items():
        problem = Problem(activation)
        rows |= {(name, m, n): compare(problem, m, n) for m in METHODS for n in grids}
        show(name, rows, grids)
        print(f"\nadaptive RK45 (dopri5), f with {name}\n")
        adaptive = [[f"{tol:g}", *compare_adaptive(problem, tol)] for tol in tolerances]
        print(table(["rtol = atol", "backsolve's error", "cosine", "our error"], adaptive) + "\n")
    if args.plot:
        draw(rows, grids, args.plot)
    return rows


class Problem:
    """A loss of z(1), and its gradient by any way of solving."""

    def __init__(self, activation: nn.Module) -> None:
        torch.manual_seed(0)
        self.f = RightHandSide(activation)
        self.start = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        self.target = torch.randn(BATCH, WIDTH, dtype=torch.float64)
        self.inputs = [self.start, *self.f.parameters()]

    def loss(self, times: Tensor, **how: Any) -> Tensor:
        """Half the squared distance of z(1) from the target; `how` goes to `odeint`."""
        end = cs.odeint(self.f, self.start, times, **how)[-1]
        return (end - self.target).square().sum() / 2

    def gradient(self, times: Tensor, **how: Any) -> Tensor:
        """The gradient with respect to z(0) and all parameters, as one vector."""
        parts = torch.autograd.grad(self.loss(times, **how), self.inputs)
        return torch.cat([part.flatten() for part in parts])

    def finite_difference(self, times: Tensor, direction: Tensor, **how: Any) -> float:
        """The derivative of the loss in a direction, by central differences."""
        sizes = [x.numel() for x in self.inputs]
        parts = [d.view_as(x) for d, x in zip(direction.split(sizes), self.inputs, strict=True)]
        start = [x.detach().clone() for x in self.inputs]  # put back as it was, bit for bit
        losses, step = [], 1e-6
        with torch.no_grad():
            for sign in (1, -1):
                for x, x0, part in zip(self.inputs, start, parts, strict=True):
                    x.copy_(x0 + sign * step * part)
                losses.append(self.loss(times, **how).item())
            for x, x0 in zip(self.inputs, start, strict=True):
                x.copy_(x0)
        return (losses[0] - losses[1]) / (2 * step)


def compare(problem: Problem, method: str, steps: int) -> Row:
    """All gradients of one method and step size, against that of the discrete steps."""
    # Backsolve solves from an output time to the one before: with the two ends as outputs the
    # state in between is recovered by solving backwards, as in the paper.
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    how = {"method": method, "options": {"step_size": 1 / steps}}
    exact = problem.gradient(ends, **how)
    backsolved = problem.gradient(ends, gradient="backsolve", **how)
    ours = problem.gradient(ends, budget=twice_the_least(problem, ends, how), **how)
    direction = torch.randn(len(exact), dtype=exact.dtype)
    direction /= direction.norm()
    difference = problem.finite_difference(ends, direction, **how)
    derivative = (exact @ direction).item()
    return Row(
        backsolve=relative(backsolved, exact),
        cosine=torch.cosine_similarity(backsolved, exact, dim=0).item(),
        ours=relative(ours, exact),
        finite_difference=abs(difference - derivative) / abs(derivative),
    )


def compare_adaptive(problem: Problem, tolerance: float) -> tuple[float, float, float]:
    """The same for steps that adapt: backsolve's error and cosine, and ours in a budget."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    how = {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
    exact = problem.gradient(ends, **how)
    backsolved = problem.gradient(ends, gradient="backsolve", **how)
    ours = problem.gradient(ends, budget=twice_the_least(problem, ends, how), **how)
    cosine = torch.cosine_similarity(backsolved, exact, dim=0).item()
    return relative(backsolved, exact), cosine, relative(ours, exact)


def twice_the_least(problem: Problem, times: Tensor, how: dict[str, Any]) -> int:
    """A budget in bytes; where there are many steps, many of them have to run again."""
    return 2 * least_bytes(lambda budget: problem.loss(times, budget=budget, **how))


def relative(found: Tensor, exact: Tensor) -> float:
    """Euclidean norm of the difference, over that of the second."""
    return ((found - exact).norm() / exact.norm()).item()


def order(errors: Sequence[float]) -> float | None:
    """The order in the step size of errors, each with half the step of the one before.

    Returns:
        The slope between the two finest; None where the slope before differs by more than a
        quarter, as it does where f has kinks and the error no order at all.
    """
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors[-3:])]
    if len(slopes) < 2 or abs(slopes[0] - slopes[1]) > 0.25:
        return None
    return slopes[1]


def show(activation: str, rows: dict[tuple[str, str, int], Row], grids: Sequence[int]) -> None:
    """Print the table of one activation."""
    print(f"f with {activation}: relative error of the gradient\n")
    lines = []
    for method, name in METHODS.items():
        here = {n: rows[activation, method, n] for n in grids}
        found = order([here[n].backsolve for n in grids])
        slope = "none" if found is None else round(found, 2)
        lines += [
            [f"{name}: backsolve", *(here[n].backsolve for n in grids), slope],
            [f"{name}: its cosine", *(here[n].cosine for n in grids), ""],
            [f"{name}: ours", *(here[n].ours for n in grids), ""],
            [f"{name}: finite differences", *(here[n].finite_difference for n in grids), ""],
        ]
    print(table(["steps", *grids, "order"], lines))


def draw(rows: dict[tuple[str, str, int], Row], grids: Sequence[int], path: Path) -> None:
    """Error against step size, one panel an activation."""
    figure = new_figure(9, 3.6)
    sizes = [1 / n for n in grids]
    for axes, activation in zip(figure.subplots(1, 2, sharey=True), ("tanh", "relu"), strict=True):
        for method, name in METHODS.items():
            here = [rows[activation, method, n] for n in grids]
            theirs = [r.backsolve for r in here]
            [line] = axes.loglog(sizes, theirs, "o-", label=f"{name}, backsolve")
            # A gradient that is the same bit for bit has no place on a logarithmic axis.
            ours = [max(r.ours, 1e-17) for r in here]
            axes.loglog(sizes, ours, "x:", color=line.get_color(), label=f"{name}, ours")
        axes.set(title=f"f with {activation}", xlabel="step size")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("relative error of the gradient\n(1e-17: equal bit for bit)")
    save(figure, path)


if __name__ == "__main__":
    main()
