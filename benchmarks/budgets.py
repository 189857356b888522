"""Is every budget kept, and does a plan cost what it says, on the networks of the ANODE paper?

From the root of the repository: python -m benchmarks.budgets

For each network, at budgets from the least feasible to storing everything: projected and
measured peak, projected and measured overhead, the largest difference of a gradient, and
whether BatchNorm's statistics are equal. Overhead is the least time of the planned step over that
of the plan that stores everything, timed in turn in the same run; plain autograd is timed, too.
Prints a table, and with --json saves the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptsched as cs
from models import ode_resnet18, ode_resnet_small, ode_squeezenext23

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18-euler-16": lambda: ode_resnet18(method="euler", steps=16),
    "resnet18-rk4-8": lambda: ode_resnet18(method="rk4", steps=8),
    "squeezenext-euler-16": lambda: ode_squeezenext23(method="euler", steps=16),
    "squeezenext-rk4-8": lambda: ode_squeezenext23(method="rk4", steps=8),
    "small-rk4-8": lambda: ode_resnet_small(method="rk4", steps=8, in_channels=3),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:4])
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    results = {}
    for name in args.networks:
        results[name] = measure(name, args.budgets, args.batch, args.rounds, args.device)
        if args.json:
            args.json.write_text(
                json.dumps({**machine(args.device), "networks": results}, indent=1)
            )


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ckptsched": cs.__version__,
    }


def measure(name: str, budgets: int, batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One network at all budgets."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(device)
    x = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)

    def loss(output: Tensor) -> Tensor:
        return functional.cross_entropy(output, labels)

    start = time.perf_counter()
    chain = cs.profile(model, x, loss=loss)
    profiled = time.perf_counter() - start
    start = time.perf_counter()
    tradeoff = cs.tradeoff(chain, budgets=budgets)
    planned = time.perf_counter() - start
    print(
        f"\n{name}: {len(chain)} stages, batch {batch}; profiled in {profiled:.1f} s, "
        f"{budgets} budgets planned in {planned:.1f} s",
        flush=True,
    )
    print(
        "   budget MiB  projected   measured  of proj.  overhead proj.  meas.  ratio  of plain"
        "  gradients  BatchNorm"
    )
    store_all = cs.checkpointed(model, cs.plan(chain, budget=2**60, solver="store_all"))
    rows = []
    for row in tradeoff.rows:
        result = cs.verify(model, row.plan, x, loss=loss, tolerance=1.0)
        racers = [cs.checkpointed(model, row.plan), store_all, model]
        rows.append(figures(row.plan, result, race(racers, x, loss, rounds)))
        print(f"   … {rows[-1]['budget_bytes']} bytes: {rows[-1]['seconds']}", flush=True)
    compare(rows)
    for figure in rows:
        show(figure)
    ratios = [row["measured_over_projected_time"] for row in rows]
    print(
        f"   time measured over projected: median {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )
    return rows


def race(
    models: Sequence[nn.Module], x: Tensor, loss: Callable[[Tensor], Tensor], rounds: int
) -> list[float]:
    """Least seconds of a step of each model, timed in turn: what disturbs a step only adds.

    A step that is not timed comes before each: in training the same plan has run before, and the
    memory that it takes is at hand.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, seconds, strict=True):
            for timed in (False, True):
                synchronize(x)
                start = time.perf_counter()
                loss(model(x)).backward()
                synchronize(x)
                if timed:
                    times.append(time.perf_counter() - start)
                model.zero_grad()
    return [min(times) for times in seconds]


def synchronize(x: Tensor) -> None:
    """Wait for the device."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def compare(rows: list[dict[str, Any]]) -> None:
    """Add what follows from all rows: the plain steps are the same at every budget."""
    store_all = min(row["seconds"][1] for row in rows)
    plain = min(row["seconds"][2] for row in rows)
    for row in rows:
        taken = row["seconds"][0]
        row["overhead_measured"] = taken / store_all - 1
        row["measured_over_projected_time"] = taken / store_all / (1 + row["overhead_projected"])
        row["time_over_plain_autograd"] = taken / plain


def figures(plan: cs.Plan, result: cs.Verification, seconds: Sequence[float]) -> dict[str, Any]:
    """What one budget showed; seconds of the plan, of storing everything, of plain autograd."""
    return {
        "budget_bytes": plan.budget_bytes,
        "projected_peak_bytes": plan.peak_bytes,
        "measured_peak_bytes": result.measured_peak_bytes,
        "plain_peak_bytes": result.plain_peak_bytes,
        "overhead_projected": plan.overhead,
        "seconds": list(seconds),
        "gap": plan.gap,
        "forwards": plan.forwards,
        "solver": plan.solver,
        "max_gradient_difference": result.max_gradient_difference,
        "buffers_equal": result.buffers_equal,
        "within_budget": result.measured_peak_bytes <= plan.budget_bytes,
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    mib = 2.0**20
    budget, projected, measured = (
        row[f"{name}_bytes"] / mib for name in ("budget", "projected_peak", "measured_peak")
    )
    share = row["measured_peak_bytes"] / row["projected_peak_bytes"]
    print(
        f"   {budget:10.3f} {projected:10.3f} {measured:10.3f}  {share:8.3%}  "
        f"{row['overhead_projected']:13.1%} "
        f"{row['overhead_measured']:6.1%} {row['measured_over_projected_time']:6.3f}  "
        f"{row['time_over_plain_autograd']:8.3f}  "
        f"{row['max_gradient_difference']:9.2g}  {'equal' if row['buffers_equal'] else 'DIFFER'}"
        f"{'' if row['within_budget'] else '  OVER BUDGET'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
