"""Experiment (a): ODEs solved forward, then backward with RK45; how much of z(0) is recovered.

From the root of the repository: python -m examples.anode.reversing --plot reversing.png

Three problems: z' = -max(0, lam z), of one dimension and stable forward, so unstable backward;
z' = max(0, W z) with a Gaussian n x n matrix W, whose norm grows like sqrt(n), as it is and
divided by its norm; and the first one again on fixed grids.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ckptsched as cs
from ckptsched.base.errors import IntegrationError
from examples.anode.display import new_figure, save, table

METHODS = {"euler": "Euler", "midpoint": "RK2", "rk4_classic": "RK4"}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    rates: tuple[int, ...]
    tolerances: tuple[float, ...]
    dimensions: tuple[int, ...]
    grids: tuple[int, ...]
    seeds: int


TINY = Size((1, 10), (1e-3,), (5, 10), (50, 100), 1)
HERE = Size(
    (1, 5, 10, 20, 50), (1e-3, 1e-6, 1e-8), (5, 10, 20, 50, 100), (50, 100, 200, 400, 800), 3
)
FULL = Size(
    (1, 5, 10, 20, 30, 50, 100),
    (1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12),
    (5, 10, 20, 50, 100, 200),
    (50, 100, 200, 400, 800, 1600, 3200, 10_000, 100_000),
    5,
)


@dataclass(frozen=True)
class Result:
    """What the tables show."""

    scalar: dict[tuple[int, float], tuple[float, int, int]]
    """By rate and rtol: relative error of z(0), accepted steps forward and backward."""
    matrix: dict[tuple[int, float, bool], float]
    """By n, rtol and whether W is divided by its norm: median relative error."""
    fixed: dict[tuple[str, int], float]
    """By method and number of steps: relative error at rate 10."""


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the experiment, print its tables, and draw its figure.

    Args:
        argv: Arguments as on the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="n = 200, tolerances to 1e-12")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    parser.add_argument("--plot", type=Path, help="draw the figure into this file")
    args = parser.parse_args(argv)
    size = FULL if args.full else TINY if args.tiny else HERE
    result = Result(scalar_errors(size), matrix_errors(size), fixed_errors(size))
    show(result, size)
    if args.plot:
        draw(result, size, args.plot)
    return result


def scalar_errors(size: Size) -> dict[tuple[int, float], tuple[float, int, int]]:
    """z' = -max(0, lam z) from z(0) = 1 to time 1 and back; atol is rtol / 1000, as in ode45."""
    one = torch.ones(1, dtype=torch.float64)
    return {
        (rate, rtol): there_and_back(
            lambda t, z, rate=rate: -torch.relu(rate * z), one, rtol, rtol / 1000
        )
        for rate in size.rates
        for rtol in size.tolerances
    }


def matrix_errors(size: Size) -> dict[tuple[int, float, bool], float]:
    """z' = max(0, W z), W Gaussian, |z(0)| = 1; the median over seeds."""
    errors = {}
    for n in size.dimensions:
        for rtol in (1e-3, 1e-8):
            for normalized in (False, True):
                found = []
                for seed in range(size.seeds):
                    generator = torch.Generator().manual_seed(seed)
                    w = torch.randn(n, n, generator=generator, dtype=torch.float64)
                    z = torch.randn(n, generator=generator, dtype=torch.float64)
                    w = w / torch.linalg.matrix_norm(w, 2) if normalized else w
                    error, *_ = there_and_back(
                        lambda t, z, w=w: torch.relu(w @ z), z / z.norm(), rtol, rtol / 1000
                    )
                    found.append(error)
                errors[n, rtol, normalized] = statistics.median(found)
    return errors


def fixed_errors(size: Size) -> dict[tuple[str, int], float]:
    """The scalar problem at rate 10 on grids of equal steps, there and back."""
    errors = {}
    for method in METHODS:
        for steps in size.grids:
            z = torch.ones(1, dtype=torch.float64)
            for ends in ([0.0, 1.0], [1.0, 0.0]):
                times = torch.linspace(*ends, steps + 1, dtype=torch.float64)
                states = cs.odeint(lambda t, z: -torch.relu(10 * z), z, times, method=method)
                z = states[-1]
            errors[method, steps] = abs(z.item() - 1)
    return errors


def there_and_back(
    f: Callable[[Tensor, Tensor], Tensor], start: Tensor, rtol: float, atol: float
) -> tuple[float, int, int]:
    """Solve over [0, 1] and back by adaptive RK45 (dopri5).

    Returns:
        Relative error of what is recovered, infinite where the solver gives up, and the accepted
        steps forward and backward.
    """
    state, steps = start, []
    try:
        for ends in ([0.0, 1.0], [1.0, 0.0]):
            times = torch.tensor(ends, dtype=start.dtype)
            solved = cs.solve_adaptive(f, state, times, rtol=rtol, atol=atol, meet_times=True)
            state = solved.states[-1]
            steps.append(solved.statistics.accepted)
    except IntegrationError:
        return math.inf, *steps, *[0] * (2 - len(steps))
    return ((state - start).norm() / start.norm()).item(), steps[0], steps[1]


def order(errors: dict[tuple[str, int], float], method: str, grids: Sequence[int]) -> float:
    """Slope of the error against the step size, between the two finest grids above rounding."""
    seen = [n for n in grids if errors[method, n] > 1e-11]
    if len(seen) < 2:
        return math.nan
    n, m = seen[-2:]
    return math.log(errors[method, n] / errors[method, m]) / math.log(m / n)


def show(result: Result, size: Size) -> None:
    """Print the tables."""
    print("z' = -max(0, lam z): relative error of z(0) after forward and back (accepted steps)\n")
    rows = [
        [rate, *("{:.2g} ({}+{})".format(*result.scalar[rate, tol]) for tol in size.tolerances)]
        for rate in size.rates
    ]
    print(table(["lam", *(f"rtol {tol:g}" for tol in size.tolerances)], rows))
    print("\nz' = max(0, W z): relative error of z(0), median over seeds\n")
    kinds = [(rtol, normalized) for normalized in (False, True) for rtol in (1e-3, 1e-8)]
    names = [f"{_matrix(normalized)}, rtol {rtol:g}" for rtol, normalized in kinds]
    rows = [[n, *(result.matrix[n, *kind] for kind in kinds)] for n in size.dimensions]
    print(table(["n", *names], rows))
    print("\nz' = -max(0, 10 z) on fixed grids: relative error of z(0), and its order\n")
    rows = [
        [
            name,
            *(result.fixed[method, n] for n in size.grids),
            round(order(result.fixed, method, size.grids), 2),
        ]
        for method, name in METHODS.items()
    ]
    print(table(["", *(f"{n} steps" for n in size.grids), "order"], rows))


def _matrix(normalized: bool) -> str:
    return "normalized W" if normalized else "W"


def draw(result: Result, size: Size, path: Path) -> None:
    """The matrix problem against n, and the fixed grids against the number of steps."""
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    for normalized in (False, True):
        for rtol in (1e-3, 1e-8):
            errors = [result.matrix[n, rtol, normalized] for n in size.dimensions]
            label = f"{_matrix(normalized)}, rtol {rtol:g}"
            left.loglog(size.dimensions, errors, "o--" if normalized else "o-", label=label)
    left.set(title="z' = max(0, W z), RK45 there and back", xlabel="n")
    for method, name in METHODS.items():
        right.loglog(size.grids, [result.fixed[method, n] for n in size.grids], "o-", label=name)
    right.set(title="z' = -max(0, 10 z), fixed steps", xlabel="steps")
    for axes, ticks in ((left, size.dimensions), (right, size.grids)):
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.xaxis.minorticks_off()
        axes.set_ylabel("relative error of z(0)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
