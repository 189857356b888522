"""What it costs not to know the number of steps: online checkpoints beside the least possible.

    python -m benchmarks.online
    python -m benchmarks.online --steps 20 100 1000 --slots 5 10 --json online.json

The first table counts runs of a step without tape, forward and backward together, for so many steps
and states kept at once: the least when the number of steps is known (revolve), ckptsched's online
checkpoints, and the scheme that diffrax and equinox publish, counted here from its description
(Algorithm I, then Wang and Moin's rule, and a sweep back that places new states by bisection). All
three give up the last state with the end of the forward pass, as that scheme does; ckptsched then
keeps the input of the last step besides, which takes no more memory than the sweep back: the last
column. The second table solves an equation with dopri5 and counts the evaluations of f. The third
solves it within shares of the bytes that storing everything takes: how many accepted steps keep
their tapes, how many run again, and the measured peak.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ckptsched.memory.meters import default_meter
from ckptsched.ode.adaptive.solve import solve_adaptive
from ckptsched.ode.adaptive.statistics import Statistics
from ckptsched.ode.methods.table import DOPRI5
from ckptsched.solvers.binomial.online import OnlinePlacement, optimal_length
from ckptsched.solvers.binomial.revolve import advances


@dataclass(frozen=True)
class Row:
    """Runs without tape for one number of steps and of states."""

    steps: int
    slots: int
    least: int
    """With the number of steps known."""
    online: int
    """ckptsched's, with the last state given up."""
    diffrax: int
    """The published scheme of equinox, which diffrax uses."""
    kept: int
    """ckptsched's, with the input of the last step kept, as it does it."""


def reversal_advances(
    positions: Sequence[int], stages: int, slots: int, *, last_input: bool
) -> int:
    """Runs without tape of `online.reversal`, from the closed form; arguments are those."""
    end = stages - 1 if last_input and positions[-1] < stages - 1 else stages
    ends = (*positions[1:], end)
    lengths = [b - a for a, b in zip(positions, ends, strict=True)]
    return sum(advances(length, slots - k) for k, length in enumerate(lengths))


def positions_of_diffrax(steps: int, slots: int) -> list[int]:
    """What the published scheme keeps: Algorithm I to one step before its limit, then Wang-Moin."""
    switch = optimal_length(slots) - 1
    placement = OnlinePlacement(slots)
    for _ in range(min(steps, switch)):
        placement.visit()
    kept = [(p, math.inf if p == 0 else 0.0) for p in placement.positions]
    for n in range(switch, steps):
        if slots == 1:
            break
        below = [
            k for k, (_, level) in enumerate(kept) if any(lv > level for _, lv in kept[k + 1 :])
        ]
        if len(kept) < slots:
            kept.append((n, 0.0))
        elif below:
            kept.pop(below[-1])
            kept.append((n, 0.0))
        else:
            _, level = kept.pop()
            kept.append((n, level + 1))
    return [p for p, _ in kept]


def sweep_of_diffrax(kept: list[int], steps: int, slots: int) -> int:
    """Runs without tape of its sweep back over given positions."""
    held, end, moves = list(kept), steps, 0
    while end:
        at = held[-1]
        if at + 1 == end:
            held.pop()
        target = next_of_diffrax(at, end, len(held), slots)
        while at + 1 < end:
            at, moves = at + 1, moves + 1
            if at == target:
                held.append(at)
                target = next_of_diffrax(at, end, len(held), slots)
        end -= 1
    return moves


def next_of_diffrax(at: int, end: int, used: int, slots: int) -> int:
    """Where it keeps the next state: the next where all fit, else halfway; -1 for nowhere."""
    if used == slots or end - at <= 2:
        return -1
    return at + 1 if end - at - 2 <= slots - used else at + (end - at) // 2


def count(steps: int, slots: int) -> Row:
    """All counts for one number of steps and of states."""
    placement = OnlinePlacement(slots)
    for _ in range(steps):
        placement.visit()
    given_up, kept = (
        steps + reversal_advances(placement.positions, steps, slots, last_input=last)
        for last in (False, True)
    )
    theirs = sweep_of_diffrax(positions_of_diffrax(steps, slots), steps, slots)
    return Row(steps, slots, advances(steps + 1, slots), given_up, steps + theirs, kept)


class Field(nn.Module):
    """A right-hand side that takes many steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 32).double(), nn.Linear(32, 4).double()
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Swings, and is bent by a network."""
        self.calls += 1
        turned = torch.stack([z[..., 1], -z[..., 0], z[..., 3], -4 * z[..., 2]], -1)
        return 6 * turned + 0.3 * torch.tanh(self.outer(torch.tanh(self.inner(z))))


def solve(slots: int | None, until: float) -> tuple[int, int, int, int]:
    """One solve and its backward: accepted, rejected steps, evaluations forward and backward."""
    field, y0 = Field(), torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, until], dtype=torch.float64)
    solution = solve_adaptive(field, y0, t, DOPRI5, rtol=1e-6, atol=1e-6, checkpoints=slots)
    before = field.calls
    solution.states[-1].square().sum().backward()
    found = solution.statistics
    return found.accepted, found.rejected, found.evaluations, field.calls - before


def within(shares: Sequence[float], until: float) -> Iterator[tuple[int, int, Statistics]]:
    """Budget, measured peak and counts of a training step, for shares of what storing all takes."""
    field, y0 = Field(), torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, until], dtype=torch.float64)

    def step(budget: int | None) -> Statistics:
        solution = solve_adaptive(field, y0, t, DOPRI5, rtol=1e-6, atol=1e-6, budget=budget)
        loss, found = solution.states[-1].square().sum(), solution.statistics
        del solution
        loss.backward()
        field.zero_grad()
        y0.grad = None
        return found

    meter = default_meter("cpu")
    stored = meter.measure(lambda: step(None))[1].peak_bytes
    for share in shares:
        budget = int(share * stored)
        step(budget)  # measures what a step takes
        found, measured = meter.measure(lambda budget=budget: step(budget))  # type: ignore[misc]
        yield budget, measured.peak_bytes, found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100, 300, 1000, 10_000])
    parser.add_argument("--slots", type=int, nargs="+", default=[3, 5, 10, 20])
    parser.add_argument("--until", type=float, default=20.0, help="time that the solves reach")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.01, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01]
    )
    parser.add_argument("--json", type=Path, help="file for the counts")
    given = parser.parse_args()
    rows = [count(steps, slots) for slots in given.slots for steps in given.steps]
    print("| steps | slots | least | online | ratio | diffrax | ratio | online, last input kept |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        print(
            f"| {r.steps} | {r.slots} | {r.least} | {r.online} | {r.online / r.least:.3f} | "
            f"{r.diffrax} | {r.diffrax / r.least:.3f} | {r.kept} |"
        )
    print("\n| slots | accepted | rejected | f forward | f backward | of the least | diffrax |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for slots in given.slots:
        accepted, rejected, forward, backward = solve(slots, given.until)
        each = DOPRI5.evaluations
        # Forward as it is; backward a run with tape of each step, and the runs without.
        least = forward + each * (accepted + advances(accepted, slots) - (accepted - 1))
        theirs = sweep_of_diffrax(positions_of_diffrax(accepted, slots), accepted, slots)
        published = forward + each * (accepted + theirs)
        print(
            f"| {slots} | {accepted} | {rejected} | {forward} | {backward} | "
            f"{(forward + backward) / least:.3f} | {published / least:.3f} |"
        )
    print("\n| budget | measured peak | accepted | tapes | states | run again | without tape |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for budget, peak, found in within(given.shares, given.until):
        print(
            f"| {budget:,} | {peak:,} | {found.accepted} | {found.tapes} | {len(found.positions)} "
            f"| {found.accepted - found.tapes} | {found.advances} |"
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
