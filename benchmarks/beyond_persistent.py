"""What memory-persistent schedules lose, and how much of it sliding checkpoints win back.

From the root of the repository: python -m benchmarks.beyond_persistent

First on random tiny chains, at every budget, against the optimum of all pinned schedules; then on
longer ones against the lower bound that holds for all of them. Losses are in percent of the
seconds of the optimum or of the bound. Prints two tables, and with --json saves the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ckptsched.simulator import simulate
from ckptsched.solvers import Baseline, BeyondPersistent, ChainDp, Solution
from ckptsched.solvers.exact_search import certify_all
from ckptsched.workload import Chain

# Orders the sizes of the states 1..n.
SHAPES: dict[str, Callable[[list[int]], list[int]]] = {
    "equal": lambda sizes: sizes[:1] * len(sizes),
    "falling": lambda sizes: sorted(sizes, reverse=True),
    "rising": sorted,
    "rising, then falling": lambda sizes: _halves(sizes, first=False),
    "falling, then rising": lambda sizes: _halves(sizes, first=True),
    "random": lambda sizes: sizes,
}
# Of the budgets between the least and storing everything.
_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7)
_SAME = 1e-9  # below this relative difference two costs are equal


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", type=int, default=150, help="tiny chains a shape")
    parser.add_argument("--stages", type=int, nargs="*", default=[20, 50, 100])
    parser.add_argument("--chains", type=int, default=3, help="longer chains a shape and length")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    BeyondPersistent().solve(_tiny_chain(random.Random(0), sorted), 10**6)  # compiles
    tiny = [_tiny_row(shape, args.tiny) for shape in SHAPES]
    _print("Tiny chains (4 to 6 stages), against the optimum of all pinned schedules", tiny)
    longer = [_long_row(shape, n, args.chains) for n in args.stages for shape in tuple(SHAPES)[1:]]
    _print("Longer chains, against the lower bound over all pinned schedules", longer)
    if args.json:
        machine = {"processor": platform.processor() or platform.machine()}
        results = {"machine": machine, "tiny": tiny, "longer": longer}
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _halves(sizes: list[int], *, first: bool) -> list[int]:
    half = len(sizes) // 2
    return sorted(sizes[:half], reverse=first) + sorted(sizes[half:], reverse=not first)


def _tiny_chain(draw: random.Random, shape: Callable[[list[int]], list[int]]) -> Chain:
    """Integer sizes and times, and overheads in half of the chains."""
    n = draw.randint(4, 6)
    states = shape([draw.randint(1, 6) for _ in range(n)])
    data: dict[str, Any] = {
        "u_f": [draw.randint(1, 10) for _ in range(n)],
        "u_b": [draw.randint(1, 20) for _ in range(n)],
        "w_a": [draw.randint(1, 6), *states],
        "w_t": [state + draw.randint(0, 8) for state in states],
    }
    if draw.random() < 0.5:
        data |= {key: [draw.randint(0, 6) for _ in range(n)] for key in ("o_f", "o_b")}
    return Chain.from_json(data)


def _tiny_row(shape: str, count: int) -> dict[str, Any]:
    draw = random.Random(f"tiny {shape}")
    persistent, sliding, proven = [], [], 0
    for _ in range(count):
        chain = _tiny_chain(draw, SHAPES[shape])
        top = _store_all_peak(chain)
        budgets = range(ChainDp().solve(chain, top).least_budget_bytes, top)
        for budget, before, after in _pairs(chain, budgets):
            found = certify_all(chain, budget, before.trace.seconds)
            assert found.is_closed
            optimum = found.lower_bound_seconds
            persistent.append(before.trace.seconds / optimum - 1)
            sliding.append(after.trace.seconds / optimum - 1)
            proven += after.lower_bound_seconds >= optimum * (1 - _SAME)
    return {
        "shape": shape,
        "budgets": len(persistent),
        "persistent": _losses(persistent),
        "sliding": _losses(sliding),
        "bound is the optimum %": round(100 * proven / len(persistent), 1),
    }


def _long_chain(draw: random.Random, n: int, shape: str) -> Chain:
    """States log-uniform from 1 to 64 MiB, tapes 1 to 6 times those, times independent."""
    states = SHAPES[shape]([int(2**20 * 64 ** draw.random()) for _ in range(n)])
    forward = [draw.uniform(1, 10) for _ in range(n)]
    return Chain.from_json(
        {
            "time_unit": "ms",
            "u_f": forward,
            "u_b": [2 * x for x in forward],
            "w_a": [0, *states],
            "w_t": [int(state * draw.uniform(1, 6)) for state in states],
        }
    )


def _long_row(shape: str, n: int, count: int) -> dict[str, Any]:
    draw = random.Random(f"long {shape} {n}")
    gains, before_gaps, after_gaps, seconds = [], [], [], []
    for _ in range(count):
        chain = _long_chain(draw, n, shape)
        top = _store_all_peak(chain)
        least = ChainDp().solve(chain, top).least_budget_bytes
        budgets = [int(least + share * (top - least)) for share in _SHARES]
        start = time.process_time()
        pairs = list(_pairs(chain, budgets))
        seconds.append(time.process_time() - start)
        for _, before, after in pairs:
            gains.append(before.trace.seconds / after.trace.seconds - 1)
            before_gaps.append(before.trace.seconds / after.lower_bound_seconds - 1)
            after_gaps.append(after.trace.seconds / after.lower_bound_seconds - 1)
    return {
        "shape": shape,
        "stages": n,
        "budgets": len(gains),
        "gain": _losses(gains),
        "gap, persistent": _losses(before_gaps),
        "gap, sliding": _losses(after_gaps),
        "median gap %": round(100 * statistics.median(after_gaps), 3),
        "seconds a chain": round(statistics.median(seconds), 1),
    }


def _pairs(chain: Chain, budgets: Sequence[int]) -> Iterator[tuple[int, Solution, Solution]]:
    """The persistent and the sliding solution for each budget that has both."""
    persistent = ChainDp().solve_each(chain, budgets)
    sliding = BeyondPersistent().solve_each(chain, budgets)
    for budget, before, after in zip(budgets, persistent, sliding, strict=True):
        if isinstance(before, Solution) and isinstance(after, Solution):
            yield budget, before, after


def _store_all_peak(chain: Chain) -> int:
    return simulate(chain, Baseline("store_all").schedule(chain)).peak_bytes


def _losses(shares: Sequence[float]) -> dict[str, float]:
    """How many are above 0, and their mean (over all) and largest in percent."""
    return {
        "worse": sum(share > _SAME for share in shares),
        "mean %": round(100 * statistics.fmean(shares), 4),
        "worst %": round(100 * max(shares), 2),
    }


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = []
        for key, value in row.items():
            if isinstance(value, dict):
                value = " ".join(f"{name} {figure:g}" for name, figure in value.items())
            cells.append(f"{key}: {value}")
        print("  " + "; ".join(cells))


if __name__ == "__main__":
    main()
