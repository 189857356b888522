"""How long does planning take, and how good are the plans?

Solves every reference budget of the chains in `instances/` with chain_dp, and compares with the
lower bound and the best schedule known (`instances/reference.json`). Prints a table and writes
`results/planner-<date>.json`.

    python -m benchmarks.planner                  # all chains: some minutes
    python -m benchmarks.planner gpt96 resnet50_b32
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ckptsched.errors import InfeasibleBudgetError
from ckptsched.solvers import ChainDp
from ckptsched.workload import Chain

HERE = Path(__file__).resolve().parent


def measure(chain: Chain, row: dict[str, Any]) -> dict[str, Any]:
    """Solve one budget; times relative to storing everything."""
    start = time.perf_counter()
    try:
        solution = ChainDp().solve(chain, row["budget_bytes"])
    except InfeasibleBudgetError as error:
        return {
            "budget_bytes": row["budget_bytes"],
            "planning_seconds": time.perf_counter() - start,
            "least_budget_bytes": error.least_budget_bytes,
        }
    seconds = time.perf_counter() - start
    relative = solution.trace.seconds / chain.store_all_seconds
    bound = solution.lower_bound_seconds / chain.store_all_seconds
    best = row["best_known"]
    return {
        "budget_bytes": row["budget_bytes"],
        "planning_seconds": seconds,
        "relative_seconds": relative,
        "relative_lower_bound": bound,
        "known_lower_bound": row["lower_bound"],
        "known_best": best,
        "loss_percent": None if best is None else 100 * (relative / best - 1),
        "peak_share": solution.trace.peak_bytes / row["budget_bytes"],
        "rounding_unit_bytes": solution.rounding_unit_bytes,
    }


def measure_all(chain: Chain, rows: list[dict[str, Any]]) -> float:
    """Seconds for all budgets in one go, which share tables."""
    start = time.perf_counter()
    ChainDp().solve_each(chain, [row["budget_bytes"] for row in rows])
    return time.perf_counter() - start


def show(name: str, result: dict[str, Any]) -> None:
    """Print one line."""
    text = f"{name:16} {result['budget_bytes']:>13} {result['planning_seconds']:7.2f} s"
    if "relative_seconds" in result:
        loss = result["loss_percent"]
        text += (
            f"  {result['relative_seconds']:9.5f} (at least {result['relative_lower_bound']:.5f})"
        )
        text += "  best unknown" if loss is None else f"  loss {loss:+.4f} %"
        text += f"  peak {result['peak_share']:.2%}"
    else:
        text += f"  infeasible below {result['least_budget_bytes']}"
    print(text, flush=True)


def about() -> dict[str, Any]:
    """What figures depend on, without naming a machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "load_at_start": os.getloadavg()[0],
    }


def main() -> None:
    """Measure the chains named, or all that have references."""
    reference = json.loads((HERE / "instances" / "reference.json").read_text())["instances"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(reference)}; all if none")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    found: dict[str, Any] = {"about": about(), "instances": {}}
    for name in options.names or reference:
        chain = Chain.load(HERE / "instances" / f"{name}.json")
        rows = reference[name]
        results = []
        for row in rows:
            results.append(measure(chain, row))
            show(name, results[-1])
        together = measure_all(chain, rows)
        losses = [x["loss_percent"] for x in results if x.get("loss_percent") is not None]
        print(
            f"{name:16} n = {len(chain)}: {len(rows)} budgets in one go {together:.2f} s, ", end=""
        )
        print(f"worst loss {max(losses, default=0):+.4f} %", flush=True)
        found["instances"][name] = {
            "stages": len(chain),
            "solve_each_seconds": together,
            "budgets": results,
        }
    path = options.out or HERE / "results" / f"planner-{found['about']['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
