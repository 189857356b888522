"""`odeint` within byte budgets: bytes, gradients, evaluations, and time beside torchdiffeq.

    python -m benchmarks.odeint
    python -m benchmarks.odeint --document            # also docs/measured/odeint.md
    python -m benchmarks.odeint --rounds 9 --out odeint.json

One process, one thread, float64. Times are the least processor time of a training step (forward,
loss, backward), all ways taken in turn; bytes are measured peaks of tensors; gradients are compared
with plain autograd's through the same steps, as the largest difference over the largest entry.
Prints tables and which goals are met; writes `results/odeint-<date>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.budgets import machine
from benchmarks.document import Goal, Section, to_markdown
from benchmarks.odeint.rows import (
    ADAPTIVE,
    FIXED,
    budgets_kept,
    evaluations,
    least_budgets,
    long_solve,
    times,
)
from ckptsched.base.text_table import Grid

RESULTS = Path(__file__).resolve().parents[1] / "results"
_TIMED = ("euler", "rk4", "dopri5 adaptive")
_VERDICTS = {True: "**met**", False: "**not met**", None: "not run"}
_EXACT = 1e-12  # relative difference of gradients that the goals allow
_TOLERANCE = 1.03  # of times, which are noisy


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.odeint", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way that is timed")
    parser.add_argument("--steps", type=int, default=10_000, help="of the long solve")
    parser.add_argument(
        "--document", action="store_true", help="also write docs/measured/odeint.md"
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--show", type=Path, help="read this file, measure nothing")
    args = parser.parse_args(argv)
    data = json.loads(args.show.read_text("utf-8")) if args.show else take(args.rounds, args.steps)
    path = args.out or RESULTS / f"odeint-{data['about']['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    verdicts = goals(data)
    for grid in grids(data):
        print(f"\n{grid.title}\n{grid}")
    print("\nGoals", *verdicts, sep="\n")
    print(f"written to {path.name}")
    if args.document:
        Section("benchmarks.odeint").write(text(data, verdicts))


def take(rounds: int, steps: int) -> dict[str, Any]:
    """Measure everything, small sizes first."""
    torch.set_num_threads(1)
    start = time.process_time()
    about = machine("cpu") | {
        "torchdiffeq": version("torchdiffeq"),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "load_at_start": os.getloadavg()[0],
    }
    data = {
        "about": about,
        "times": times(16, 64, 32, 100, _TIMED, rounds)
        + times(64, 256, 256, 50, _TIMED, max(1, rounds // 2)),
        "evaluations": evaluations((3, 5, 10, 20), 20.0),
        "budgets": budgets_kept(FIXED + ADAPTIVE),
        "granularity": least_budgets(("rk4", "rk4_classic", "dopri5"), 20),
        "long": long_solve(steps, 100, 2),
    }
    about |= {"load_at_end": os.getloadavg()[0], "seconds": time.process_time() - start}
    return data


def grids(data: dict[str, Any]) -> Iterator[Grid]:
    """All tables."""
    yield _budgets_grid(data["budgets"])
    yield _times_grid(data["times"])
    yield _evaluations_grid(data["evaluations"])
    yield _long_grid(data["long"])
    yield _granularity_grid(data["granularity"])


def _budgets_grid(rows: list[dict[str, Any]]) -> Grid:
    return Grid(
        title="`odeint`: bytes and gradients",
        headings=(
            "method",
            "plain autograd",
            "budget",
            "measured peak",
            "gradients",
            "torchdiffeq's",
        ),
        rows=tuple(
            (
                x["method"],
                f"{x['plain_bytes']:,}",
                f"{x['budget_bytes']:,}{' (least)' if x['least'] else ''}",
                f"{x['peak_bytes']:,}",
                f"{x['difference']:.2g}",
                _or_dash(x["torchdiffeq_difference"]),
            )
            for x in rows
        ),
    )


def _or_dash(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.1g}"


def _times_grid(rows: list[dict[str, Any]]) -> Grid:
    def cells(x: dict[str, Any]) -> tuple[str, ...]:
        width, hidden, batch, steps = x["size"]
        s, far = x["seconds"], x["differences"]
        grid = "adaptive" if x["method"] in ADAPTIVE else f"{steps} steps"
        return (
            x["method"].removesuffix(" adaptive"),
            f"{batch}x{width}, {hidden} units, {grid}",
            f"{s['torchdiffeq'] * 1e3:.1f}",
            f"{s['ours'] / s['torchdiffeq']:.2f}",
            f"{s['at_all'] / s['torchdiffeq']:.2f}",
            f"{x['peak_bytes']['adjoint']:,}",
            f"{x['peak_bytes']['at_adjoint']:,}",
            f"{s['at_adjoint'] / s['adjoint']:.2f}",
            f"{far['at_adjoint']:.1g}",
            f"{far['adjoint']:.1g}",
        )

    return Grid(
        title="`odeint`: time beside torchdiffeq",
        headings=(
            *("method", "size", "torchdiffeq ms", "ours over it", "ours, its peak as budget"),
            *("adjoint's peak", "ours in that", "ours over the adjoint", "ours off by"),
            "adjoint off by",
        ),
        rows=tuple(cells(x) for x in rows),
    )


def _evaluations_grid(rows: list[dict[str, Any]]) -> Grid:
    return Grid(
        title="`odeint`: evaluations of f, adaptive dopri5",
        headings=(
            *("states kept", "accepted", "rejected", "forward", "backward", "least backward"),
            *("both over the least", "diffrax's scheme over it", "gradients"),
        ),
        rows=tuple(
            (
                *(f"{x[key]:,}" for key in ("slots", "accepted", "rejected", "forward")),
                f"{x['backward']:,}",
                f"{x['least_backward']:,}",
                f"{_over_least(x, 'backward'):.3f}",
                f"{_over_least(x, 'diffrax_backward'):.3f}",
                f"{x['difference']:.1g}",
            )
            for x in rows
        ),
    )


def _over_least(row: dict[str, Any], key: str) -> float:
    ratio: float = (row["forward"] + row[key]) / (row["forward"] + row["least_backward"])
    return ratio


def _long_grid(x: dict[str, Any]) -> Grid:
    s = x["seconds"]
    rows = (
        ("plain autograd", x["plain_bytes"], s["plain"], 0.0),
        (f"budget of {x['budget_bytes']:,}", x["peak_bytes"], s["ours"], x["difference"]),
        ("torchdiffeq, backprop", None, s["torchdiffeq"], None),
        ("torchdiffeq, adjoint", x["adjoint_bytes"], s["adjoint"], x["adjoint_difference"]),
    )
    return Grid(
        title=f"`odeint`: {x['steps']:,} RK4 steps in 1 % of the memory",
        headings=("way", "measured peak", "seconds a training step", "over plain", "gradients"),
        rows=tuple(
            (
                way,
                "" if peak is None else f"{peak:,}",
                f"{seconds:.2f}",
                f"{seconds / s['plain']:.2f}",
                _or_dash(off),
            )
            for way, peak, seconds, off in rows
        ),
    )


def _granularity_grid(rows: list[dict[str, Any]]) -> Grid:
    return Grid(
        title="`odeint`: least budget, steps or slopes as stages",
        headings=(
            *("method", "plain autograd", "steps", "measured", "slopes", "measured"),
            *("slopes over steps", "gradients"),
        ),
        rows=tuple(
            (
                x["method"],
                f"{x['plain_bytes']:,}",
                *(f"{x['step'][key]:,}" for key in ("least_bytes", "peak_bytes")),
                *(f"{x['slope'][key]:,}" for key in ("least_bytes", "peak_bytes")),
                f"{x['slope']['least_bytes'] / x['step']['least_bytes']:.2f}",
                f"{max(x[key]['difference'] for key in ('step', 'slope')):.1g}",
            )
            for x in rows
        ),
    )


def goals(data: dict[str, Any]) -> list[Goal]:
    """What was asked of the figures, and whether they have it."""
    kept, timed, long = data["budgets"], data["times"], data["long"]
    over = sum(x["peak_bytes"] > x["budget_bytes"] for x in (*kept, long))
    off = max(x["difference"] for x in (*kept, long, *data["evaluations"]))
    fixed = [x for x in (*kept, long) if x.get("method") not in ADAPTIVE]
    equal = sum(x["difference"] == 0 for x in fixed)
    stored = [x["seconds"]["ours"] / x["seconds"]["torchdiffeq"] for x in timed]
    within = [x["seconds"]["at_all"] / x["seconds"]["torchdiffeq"] for x in timed]
    beside = [x["seconds"]["at_adjoint"] / x["seconds"]["adjoint"] for x in timed]
    fits = all(x["peak_bytes"]["at_adjoint"] <= x["peak_bytes"]["adjoint"] for x in timed)
    finer = all(x["slope"]["least_bytes"] < x["step"]["least_bytes"] for x in data["granularity"])
    return [
        Goal("no measured peak above its budget", over == 0, f"{len(kept) + 1} runs, {over} over"),
        Goal(
            "gradients within 1e-12 of plain autograd's through the same steps",
            off <= _EXACT,
            f"at most {off:.1g}; on fixed grids {equal} of {len(fixed)} equal bit by bit",
        ),
        Goal(
            "no slower than torchdiffeq's backprop where all is stored (3 % tolerance)",
            max(stored) <= _TOLERANCE,
            f"{min(stored):.2f} to {max(stored):.2f} of its time",
        ),
        Goal(
            "no slower than torchdiffeq's backprop within its own measured peak (3 % tolerance)",
            max(within) <= _TOLERANCE,
            f"{min(within):.2f} to {max(within):.2f} of its time",
        ),
        Goal(
            "less time than torchdiffeq's adjoint at its measured memory",
            fits and max(beside) < 1,
            f"{min(beside):.2f} to {max(beside):.2f} of its time",
        ),
        Goal(
            "a least budget of slopes below that of steps",
            finer,
            ", ".join(x["method"] for x in data["granularity"]),
        ),
    ]


def text(data: dict[str, Any], verdicts: Sequence[Goal]) -> str:
    """The section of `docs/measured/odeint.md`."""
    about = data["about"]
    return "\n\n".join(
        [
            f"{about['date']}, {about['cores']} cores ({about['device']}), one thread, Python "
            f"{about['python']}, torch {about['torch']}, torchdiffeq {about['torchdiffeq']}; load "
            f"{about['load_at_start']:.1f} when it began, {about['load_at_end']:.1f} when it "
            f"ended; {about['seconds']:.0f} seconds of processor time.",
            *(to_markdown(grid) for grid in grids(data)),
            "## Goals of `odeint`",
            "\n".join(f"- {_VERDICTS[x.met]} {x.what}: {x.shown_by}" for x in verdicts),
        ]
    )


if __name__ == "__main__":
    main()
