"""The README's figure: seconds of a step over peak bytes, drawn from saved results.

    python -m benchmarks.tradeoff_figure

reads benchmarks/results/budgets-euler-*.json, which `python -m benchmarks.budgets` wrote, and
writes docs/figures/tradeoff.svg. Nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "budgets-euler-2026-11-23.json"
FIGURE = ROOT / "docs" / "figures" / "tradeoff.svg"
NETWORK = "resnet18-euler-16"
# The least budget takes ten times the time: it would flatten all others.
MOST_OVERHEAD = 1.0


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Writes the figure of one network.

    Args:
        rows: A budget each, with measured_peak_bytes, plain_peak_bytes, and the overhead projected
            and measured over storing everything (0.2 is a fifth more time).
        path: The SVG file.
    """
    shown = [row for row in rows if row["overhead_projected"] <= MOST_OVERHEAD]
    shares = [100 * row["measured_peak_bytes"] / row["plain_peak_bytes"] for row in shown]
    figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    for name, mark in (("measured", "o"), ("projected", "x")):
        overheads = [100 * row[f"overhead_{name}"] for row in shown]
        axes.plot(
            shares, overheads, mark, label=f"{name} time", linestyle="-" if mark == "x" else ""
        )
    axes.set_xlabel("measured peak, % of plain autograd's bytes")
    axes.set_ylabel("more time, %")
    axes.set_xlim(0, 105)
    axes.set_ylim(0, 35)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    # No date and no random names: the same results give the same file.
    mpl.rcParams["svg.hashsalt"] = "ckptsched"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(RESULTS.read_text())["networks"][NETWORK], FIGURE)
    print(f"wrote {FIGURE.relative_to(ROOT)}")
