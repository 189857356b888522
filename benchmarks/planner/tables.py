"""The planner's benchmark as tables: for a terminal, and for `docs/measured/planner.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.planner.goals import row_gap
from benchmarks.planner.parts import AUTO, ROTOR
from benchmarks.planner.rows import Comparison, Findings, Row
from ckptsched.base.text_table import Grid


def line(row: Row) -> str:
    """One row, as it is found."""
    text = f"{row.part:9} {row.chain:22} {row.method:28}"
    if row.budget_bytes is not None:
        text += f" {row.budget_bytes:>13} bytes"
    elif row.slots is not None:
        text += f" s = {row.slots:<15}"
    text += f" {_seconds(row):>10}"
    if row.quality is None:
        return f"{text}  {row.timing.note}" if row.timing.note else text
    text += f"  {row.quality.relative:9.5f}  {row.quality.forwards} runs"
    gap = row_gap(row)
    text += f"  gap {gap:.3%} ({row.quality.solver})" if gap is not None else ""
    return text + (f"  loss {row.loss:+.4%}" if row.loss is not None else "")


def _seconds(row: Row) -> str:
    if not row.timing.seconds:
        return row.timing.note.partition(",")[0].partition(":")[0]  # errors: their type
    return f"{row.timing.median:.4f} s"


def grids(found: Findings) -> list[Grid]:
    """All tables that have rows."""
    made = (
        uniform_grid(found),
        uniform_plans_grid(found),
        instance_grid(found),
        comparison_grid(found),
        frontier_grid(found),
    )
    return [grid for grid in made if grid.rows]


def uniform_grid(found: Findings) -> Grid:
    """Uniform chains: seconds to have all operations in hand, and forward runs."""
    rows = [x for x in found.rows if x.part == "uniform" and x.slots is not None]
    cases = dict.fromkeys((x.stages, x.slots) for x in rows)
    methods = list(dict.fromkeys(x.method for x in rows))
    cells = []
    for n, s in cases:
        of_case = {x.method: x for x in rows if (x.stages, x.slots) == (n, s)}
        cells.append((str(n), str(s), *(_seconds_and_runs(of_case.get(m)) for m in methods)))
    return Grid(
        title="Uniform chains: seconds to have all operations in hand, forward runs",
        headings=("n", "s", *methods),
        rows=tuple(cells),
    )


def _seconds_and_runs(row: Row | None) -> str:
    if row is None:
        return "-"
    runs = f", {row.quality.forwards}" if row.quality else ""
    return _seconds(row) + runs


def uniform_plans_grid(found: Findings) -> Grid:
    """Uniform chains: ours at the peaks of the peers' plans, with time and certificate."""
    cells = []
    for row in found.rows:
        if row.part != "uniform" or row.method != AUTO or row.budget_bytes is None:
            continue
        beside = [
            x
            for x in found.rows
            if x.chain == row.chain
            and x.slots is not None
            and x.quality is not None
            and x.quality.peak_bytes == row.budget_bytes
        ]
        theirs = {f"{x.method}, s = {x.slots}": x for x in beside if x.quality}
        best = min(theirs.items(), key=lambda item: item[1].quality.seconds, default=None)  # type: ignore[union-attr]
        if best is None or best[1].quality is None:
            continue
        quality = row.quality
        cells.append(
            (
                row.chain,
                f"{row.budget_bytes / 2**20:g}",
                best[0],
                str(best[1].quality.forwards),
                str(quality.forwards) if quality else "no plan",
                f"{quality.seconds / best[1].quality.seconds - 1:+.2%}" if quality else "-",
                _seconds(row),
                f"{row_gap(row) or 0.0:.3%}" if quality else "-",
                quality.solver if quality else "-",
            )
        )
    headings = (
        "chain",
        "budget\nMiB",
        "cheapest peer",
        "its\nruns",
        "our\nruns",
        "our step\nover its",
    )
    return Grid(
        title='Uniform chains: plan(solver="auto") at the exact peaks of the peers\' plans',
        headings=(*headings, "planned and\nsimulated", "gap", "solver"),
        rows=tuple(cells),
        names_first=True,
    )


def instance_grid(found: Findings) -> Grid:
    """Instances: the worst of ours over the budgets of each, and rotor's time."""
    ours = [x for x in found.rows if x.part == "instances" and x.method == AUTO]
    cells = []
    for name in dict.fromkeys(x.chain for x in ours):
        rows = [x for x in ours if x.chain == name]
        gaps = [gap for x in rows if (gap := row_gap(x)) is not None]
        losses = [x.loss for x in rows if x.loss is not None]
        theirs = [x for x in found.rows if x.chain == name and x.method == ROTOR]
        cells.append(
            (
                name,
                str(rows[0].stages),
                f"{len(gaps)} of {len(rows)}",
                _range([x.timing.median for x in rows if x.timing.seconds]),
                f"{max(x.timing.peak_bytes for x in rows) >> 20}",
                f"{max(gaps):.3%}" if gaps else "-",
                f"{max(losses):+.4%}" if losses else "-",
                _range([x.timing.median for x in theirs if x.part == "instances" and x.quality])
                or next((x.timing.note for x in theirs if x.timing.note), "-").partition(":")[0],
                *_duel([x for x in found.comparisons if x.chain == name]),
            )
        )
    headings = (
        "chain",
        "stages",
        "budgets\nplanned",
        "seconds for\none budget",
        "peak MiB\nof process",
    )
    return Grid(
        title='Instances: plan(solver="auto") for each reference budget, beside rotor',
        headings=(
            *headings,
            "worst\ngap",
            "worst loss to\nbest known",
            "rotor,\nseconds",
            "at rotor's\npeaks",
            "worse",
            "mean",
        ),
        rows=tuple(cells),
        names_first=True,
    )


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}"


def _duel(group: Sequence[Comparison]) -> tuple[str, str, str]:
    """How many comparisons, how many defeats, and the mean of our excess."""
    if not group:
        return ("-", "-", "-")
    mean = sum(x.excess for x in group) / len(group)
    return (str(len(group)), str(sum(x.is_worse for x in group)), f"{mean:+.3%}")


def comparison_grid(found: Findings) -> Grid:
    """Seeded chains by shape: ours at the exact peaks of rotor's plans."""
    names = {x.chain for x in found.rows if x.part == "seeded"}
    group = [x for x in found.comparisons if x.chain in names]
    cells = []
    for shape in dict.fromkeys(x.chain.partition("_")[0] for x in group):
        of_shape = [x for x in group if x.chain.startswith(f"{shape}_")]
        count, worse, mean = _duel(of_shape)
        over = sum(not x.within_nominal for x in of_shape)
        chains = len({x.chain for x in of_shape})
        most = max(x.excess for x in of_shape)
        cells.append((shape, str(chains), count, worse, f"{most:+.4%}", mean, str(over)))
    headings = ("shape", "chains", "compared", "ours\nworse", "at most", "on average")
    return Grid(
        title="Seeded chains: our seconds over rotor's at the exact peaks of its plans",
        headings=(*headings, "rotor over\nits budget"),
        rows=tuple(cells),
        names_first=True,
    )


def frontier_grid(found: Findings) -> Grid:
    """Whole frontiers: seconds and memory."""
    cells = [
        (
            x.chain,
            str(x.stages),
            x.method,
            _seconds(x),
            f"{x.timing.peak_bytes >> 20}",
            f"{x.timing.base_bytes >> 20}",
            "-" if x.quality is None or x.quality.gap is None else f"{x.quality.gap:.3%}",
        )
        for x in found.rows
        if x.part == "frontier"
    ]
    return Grid(
        title="Whole frontiers",
        headings=(
            "chain",
            "stages",
            "method",
            "time",
            "peak MiB\nof process",
            "before\nit ran",
            "worst gap",
        ),
        rows=tuple(cells),
        names_first=True,
    )


def comparisons_to_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons by chain and peer, with every defeat in full."""
    found = []
    for chain, peer in dict.fromkeys((x.chain, x.peer) for x in comparisons):
        group = [x for x in comparisons if (x.chain, x.peer) == (chain, peer)]
        found.append(
            {
                "chain": chain,
                "peer": peer,
                "compared": len(group),
                "worse": sum(x.is_worse for x in group),
                "largest_excess": max(x.excess for x in group),
                "mean_excess": sum(x.excess for x in group) / len(group),
                "peer_over_its_budget": sum(not x.within_nominal for x in group),
                "defeats": [asdict(x) for x in group if x.is_worse],
            }
        )
    return found
