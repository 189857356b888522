"""Experiment (b): a residual block on an image, solved forward and then backward with RK45.

From the root of the repository: python -m examples.anode.reversing_image --plot images.png

The image is a handwritten digit in C equal channels; f is a 3x3 convolution with Gaussian weights
and an activation. With 16 channels the image is lost whatever the activation; with a single
channel and weights of deviation 1 it comes back.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptsched as cs
from ckptsched.base.errors import IntegrationError
from examples.anode.display import new_figure, save, table

ACTIVATIONS: dict[str, nn.Module] = {
    "none": nn.Identity(),
    "ReLU": nn.ReLU(),
    "leaky ReLU": nn.LeakyReLU(0.01),
    "softplus": nn.Softplus(),
}


@dataclass(frozen=True)
class Case:
    """A kind of weights."""

    channels: int
    deviation: float | None
    """Of the weights; None for He's, the square root of 2 / (9 channels)."""

    @property
    def name(self) -> str:
        """For the tables."""
        kind = "He" if self.deviation is None else f"deviation {self.deviation:g}"
        return f"{self.channels} channel{'s' * (self.channels > 1)}, {kind}"


@dataclass(frozen=True)
class Size:
    """How much is run."""

    pixels: int
    cases: tuple[Case, ...]
    tolerances: tuple[float, ...]
    seeds: int


TINY = Size(8, (Case(1, 1), Case(4, 1)), (1e-3,), 1)
HERE = Size(28, (Case(1, 1), Case(16, 1), Case(16, None)), (1e-3, 1e-6), 3)
FULL = Size(28, (Case(1, 1), Case(1, 3), Case(8, 1), Case(16, 1), Case(16, None)), (1e-3, 1e-6), 5)


@dataclass(frozen=True)
class Reversal:
    """An image there and back: means over the channels, and the relative error of all."""

    image: Tensor
    output: Tensor | None
    recovered: Tensor | None
    error: float
    """Infinite where the solver gave up."""


def main(argv: Sequence[str] | None = None) -> dict[tuple[Case, str, float], list[Reversal]]:
    """Run the experiment, print its tables, and draw its figure.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        A reversal for each seed, by case, activation and tolerance.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="more kinds of weights, five seeds")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    parser.add_argument("--plot", type=Path, help="draw the figure into this file")
    args = parser.parse_args(argv)
    size = FULL if args.full else TINY if args.tiny else HERE
    image = digit(size.pixels)
    found = {
        (case, name, tolerance): [
            reverse(image, case, activation, tolerance, seed) for seed in range(size.seeds)
        ]
        for case in size.cases
        for name, activation in ACTIVATIONS.items()
        for tolerance in size.tolerances
    }
    show(found, size)
    if args.plot:
        draw(found, size, args.plot)
    return found


def digit(pixels: int) -> Tensor:
    """A handwritten zero of scikit-learn, scaled to (pixels, pixels), from 0 to 1."""
    from sklearn.datasets import load_digits

    image = torch.as_tensor(load_digits().images[0], dtype=torch.float32)[None, None] / 16
    return functional.interpolate(
        image, (pixels, pixels), mode="bilinear", align_corners=False
    ).squeeze()


@torch.no_grad()
def reverse(
    image: Tensor, case: Case, activation: nn.Module, tolerance: float, seed: int
) -> Reversal:
    """Solve z' = activation(conv z) over [0, 1] and back by adaptive RK45, in float32."""
    deviation = math.sqrt(2 / (9 * case.channels)) if case.deviation is None else case.deviation
    generator = torch.Generator().manual_seed(seed)
    shape = (case.channels, case.channels, 3, 3)
    weight = deviation * torch.randn(shape, generator=generator)
    start = image.expand(1, case.channels, *image.shape).contiguous()

    def f(t: Tensor, z: Tensor) -> Tensor:
        return activation(functional.conv2d(z, weight, padding=1))

    tolerances = {"rtol": tolerance, "atol": tolerance}
    how = {"method": "dopri5", "options": {"max_num_steps": 2000}, **tolerances}
    output = None
    try:
        output = cs.odeint(f, start, torch.tensor([0.0, 1.0]), **how)[-1]
        back = cs.odeint(f, output, torch.tensor([1.0, 0.0]), **how)[-1]
    except IntegrationError:
        return Reversal(image, None if output is None else output.mean((0, 1)), None, math.inf)
    error = ((back - start).norm() / start.norm()).item()
    return Reversal(image, output.mean((0, 1)), back.mean((0, 1)), error)


def show(found: dict[tuple[Case, str, float], list[Reversal]], size: Size) -> None:
    """Print the relative errors, median over the seeds."""
    print("relative error of the image after forward and back (inf: the solver gave up)\n")
    lines = [
        [
            case.name,
            f"{tolerance:g}",
            *(
                statistics.median(r.error for r in found[case, name, tolerance])
                for name in ACTIVATIONS
            ),
        ]
        for case in size.cases
        for tolerance in size.tolerances
    ]
    print(table(["weights", "rtol = atol", *ACTIVATIONS], lines))


def draw(found: dict[tuple[Case, str, float], list[Reversal]], size: Size, path: Path) -> None:
    """Input, output and recovered images at the loosest tolerance, two kinds of weights."""
    cases = (size.cases[0], next(c for c in size.cases if c.channels > 1))
    figure = new_figure(8, 6.2)
    grid = figure.subplots(len(ACTIVATIONS), 6)
    for row, name in zip(grid, ACTIVATIONS, strict=True):
        for half, case in enumerate(cases):
            reversal = found[case, name, size.tolerances[0]][0]
            parts = {
                "input": reversal.image,
                "output": reversal.output,
                f"recovered: {reversal.error:.2g}": reversal.recovered,
            }
            for axes, (title, picture) in zip(row[3 * half :], parts.items(), strict=False):
                axes.set_axis_off()
                axes.set_title(title, fontsize=8)
                if picture is not None:
                    axes.imshow(picture.numpy(), cmap="gray")
        row[0].set_title(f"{name}: input", fontsize=8)
    left, right = (case.name for case in cases)
    figure.suptitle(f"{left}{' ' * 40}{right}", fontsize=10)
    save(figure, path)


if __name__ == "__main__":
    main()
