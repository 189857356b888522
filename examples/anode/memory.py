"""Experiment (d): bytes of a training step against the number of blocks L and of steps N_t.

From the root of the repository: python -m examples.anode.memory --plot memory.png

L ODE blocks of two 3x3 convolutions, Euler's method. Peaks are measured on real steps: plain
autograd, O(L N_t); ANODE's schedule, which keeps the input of every block and stores one block at
a time, O(L) + O(N_t); a checkpoint at every step of all blocks; and the planner within a fixed
budget, for which the paper names revolve: less memory than ANODE's, for more computation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import ckptsched as cs
from examples.anode.budgets import least_bytes
from examples.anode.display import new_figure, save, table

SPARE_STATES = 3
"""States that the fixed budget has room for besides what the deepest network cannot do without."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    batch: int
    channels: int
    pixels: int
    blocks: tuple[int, ...]
    steps: tuple[int, ...]


TINY = Size(1, 2, 8, (1, 2), (1, 3))
HERE = Size(4, 8, 16, (1, 2, 4, 8), (1, 2, 4, 8, 16, 32))
FULL = Size(32, 64, 32, (1, 2, 4, 8), (1, 2, 4, 8, 16, 32))


@dataclass(frozen=True)
class Measured:
    """A training step under one schedule."""

    peak_bytes: int
    forwards: int
    """Stages run forward, those that are run again included."""
    gradient_difference: float
    """Largest absolute difference of any gradient from plain autograd's."""


def main(argv: Sequence[str] | None = None) -> dict[tuple[int, int, str], Measured]:
    """Run the experiment, print its tables, and draw its figure.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        What was measured, by L, N_t and schedule.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="64 channels of 32x32, batch 32")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    parser.add_argument("--plot", type=Path, help="draw the figure into this file")
    args = parser.parse_args(argv)
    size = FULL if args.full else TINY if args.tiny else HERE
    torch.manual_seed(0)
    x = torch.randn(size.batch, size.channels, size.pixels, size.pixels)
    state = x.numel() * x.element_size()
    # Along each axis the other stands at its middle: a cross in place of the whole grid, and two
    # corners, which tell the terms of the law apart.
    middle = size.blocks[len(size.blocks) // 2], size.steps[len(size.steps) // 2]
    cells = {(middle[0], n): network(size, middle[0], n) for n in size.steps}
    cells |= {(blocks, middle[1]): network(size, blocks, middle[1]) for blocks in size.blocks}
    corners = (size.blocks[0], size.steps[1]), (size.blocks[-1], size.steps[-1])
    cells |= {corner: network(size, *corner) for corner in corners}
    chains = {cell: cs.profile(model, x) for cell, model in cells.items()}
    least = [
        least_bytes(lambda budget, chain=chain: cs.plan(chain, budget=budget))
        for chain in chains.values()
    ]
    fixed = max(least) + SPARE_STATES * state
    rows = {}
    for cell, model in cells.items():
        for name, plan in plans(chains[cell], fixed).items():
            rows[*cell, name] = measure(model, plan, x)
    show(rows, state, fixed)
    if args.plot:
        draw(rows, middle, state, args.plot)
    return rows


def network(size: Size, blocks: int, steps: int) -> nn.Sequential:
    """L ODE blocks with a right-hand side of their own each, and a layer for the classes."""
    c = size.channels
    layers: list[nn.Module] = []
    for _ in range(blocks):
        f = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU()
        )
        layers.append(cs.ODEBlock(f, method="euler", steps=steps))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
    return nn.Sequential(*layers, head)


def plans(chain: cs.Chain, fixed: int) -> dict[str, cs.Plan]:
    """One plan a schedule, each in the least budget that holds it but for the last."""
    names = {"plain": "store_all", "ANODE": "anode", "every step": "every_stage"}
    found = {}
    for name, solver in names.items():
        least = least_bytes(lambda budget, s=solver: cs.plan(chain, budget=budget, solver=s))
        found[name] = cs.plan(chain, budget=least, solver=solver)
    # Where the network is small, storing everything fits and nothing runs twice.
    return found | {"fixed budget": cs.plan(chain, budget=fixed)}


def measure(model: nn.Module, plan: cs.Plan, x: torch.Tensor) -> Measured:
    """Run a step by the plan, and one by plain autograd."""
    verified = cs.verify(model, plan, x)
    if not verified.ok:
        raise SystemExit(f"the plan broke a promise:\n{verified}")
    return Measured(verified.measured_peak_bytes, plan.forwards, verified.max_gradient_difference)


def show(rows: dict[tuple[int, int, str], Measured], state: int, fixed: int) -> None:
    """Print the table, in units of one activation tensor."""
    print(f"measured peak in states of {state:,} bytes (stages run forward)")
    print(f"fixed budget: {fixed:,} bytes, {fixed / state:.1f} states\n")
    names = list(dict.fromkeys(name for *_, name in rows))
    lines = [
        [
            *cell,
            *(
                f"{rows[*cell, name].peak_bytes / state:.1f} ({rows[*cell, name].forwards})"
                for name in names
            ),
            max(rows[*cell, name].gradient_difference for name in names),
        ]
        for cell in sorted({(blocks, steps) for blocks, steps, _ in rows})
    ]
    print(table(["L", "N_t", *names, "gradient difference"], lines))
    print("\nleast squares fit of the peak in states, N_t > 1: a + b L + c N_t + d L N_t\n")
    print(table(["schedule", "a", "b", "c", "d"], [[n, *fit(rows, n, state)] for n in names]))


def fit(rows: dict[tuple[int, int, str], Measured], name: str, state: int) -> list[float]:
    """The coefficients of the law for one schedule; a block of one step is no block to ANODE."""
    cells = [(blocks, steps) for blocks, steps, kind in rows if kind == name and steps > 1]
    matrix = torch.tensor([[1.0, b, n, b * n] for b, n in cells], dtype=torch.float64)
    peaks = torch.tensor([rows[*cell, name].peak_bytes / state for cell in cells]).double()
    found = torch.linalg.lstsq(matrix, peaks.unsqueeze(1), driver="gelsd").solution
    return [round(value, 2) + 0.0 for value in found.flatten().tolist()]


def draw(
    rows: dict[tuple[int, int, str], Measured],
    middle: tuple[int, int],
    state: int,
    path: Path,
) -> None:
    """Peak against N_t, and against L."""
    figure = new_figure(9, 3.4)
    names = list(dict.fromkeys(name for *_, name in rows))
    for axis, axes in zip((1, 0), figure.subplots(1, 2), strict=True):
        cells = sorted({key[:2] for key in rows if key[1 - axis] == middle[1 - axis]})
        for name in names:
            peaks = [rows[*cell, name].peak_bytes / state for cell in cells]
            axes.loglog([cell[axis] for cell in cells], peaks, "o-", label=name)
        ticks = [cell[axis] for cell in cells]
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.xaxis.minorticks_off()
        held = f"L = {middle[0]}" if axis == 1 else f"N_t = {middle[1]}"
        axes.set(title=held, xlabel=("L", "N_t")[axis], ylabel="measured peak, in states")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
