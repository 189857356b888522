"""The trade-off between bytes and seconds: the best plan at each of many budgets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from .budget import Budget, format_bytes, format_seconds
from .errors import BudgetSyntaxError, CkptschedError, InfeasibleBudgetError
from .planner import BaselineFigures, compare_baselines, plan_each
from .plans import Plan, excess, render_json, write_atomically
from .tables import Grid
from .workload import Chain

FORMAT = "ckptsched tradeoff"
VERSION = 1
_EVERY = re.compile(r"every_\d+")
_PLOT_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_LOG_ABOVE = 4.0  # times store-all's seconds, from which a linear axis hides the cheaper plans
_HEADROOM = 1.6  # the plot ends at this many times the largest overhead of a plan


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One training step under a plan, and one that stores everything, in the same run."""

    peak_bytes: int
    """Peak of live tensor bytes under the plan."""
    seconds: float
    """Seconds of the step under the plan."""
    plain_seconds: float
    """Seconds of the step of plain autograd."""
    max_gradient_difference: float
    """Largest absolute difference of any gradient from plain autograd's."""
    ok: bool
    """Whether the budget was kept, and gradients and buffers are plain autograd's."""

    @property
    def overhead(self) -> float:
        """Seconds more than plain autograd, as a share of it; noise can make it negative."""
        return self.seconds / self.plain_seconds - 1.0 if self.plain_seconds else 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The best plan for one budget."""

    plan: Plan
    """The plan; its budget is the row's."""
    measured: Measured | None = None
    """A real step under the plan; None where none was run."""


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Tradeoff:
    """Plans from the least budget that works to storing everything, beside the baselines."""

    chain: Chain
    """What was planned."""
    rows: tuple[Row, ...]
    """One a budget, the least first; a larger budget never takes longer."""
    baselines: tuple[BaselineFigures, ...]
    """Every baseline, whether or not it fits one of the budgets."""

    def fitting(self, row: Row) -> tuple[BaselineFigures, ...]:
        """The baselines that fit the budget of a row."""
        return tuple(x for x in self.baselines if x.peak_bytes <= row.plan.budget_bytes)

    def __repr__(self) -> str:
        """One line; `str` gives the tables."""
        low, high = self.rows[0].plan.budget_bytes, self.rows[-1].plan.budget_bytes
        return f"<Tradeoff of {len(self.rows)} budgets, {low} to {high} bytes>"

    def __str__(self) -> str:
        """Tables for people."""
        grids = (plan_grid(self), baseline_grid(self))
        parts = [heading(self), *(f"{grid.title}\n{grid}" for grid in grids)]
        return "\n\n".join([*parts, *verdict(self)])

    def to_json(self) -> dict[str, Any]:
        """Rows and baselines as JSON data, in bytes and seconds."""
        last = self.rows[-1].plan
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.chain.name,
            "fingerprint": self.chain.fingerprint,
            "stages": len(self.chain),
            "least_budget_bytes": last.least_budget_bytes,
            "store_all_bytes": last.store_all_bytes,
            "store_all_seconds": self.chain.store_all_seconds,
            "rows": [_row_to_json(self, row) for row in self.rows],
            "baselines": [
                {**asdict(x), "overhead": excess(x.seconds, self.chain.store_all_seconds)}
                for x in self.baselines
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trade-off to a JSON file."""
        write_atomically(path, render_json(self.to_json()) + "\n")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the trade-off; the file's ending chooses the format, such as ".png".

        Raises:
            CkptschedError: matplotlib is not installed, or does not know the ending.
        """
        _draw(self, path)


def tradeoff(
    chain: Chain,
    budgets: int | Sequence[int | float | str | Budget] = 10,
    *,
    also: Sequence[int | float | str | Budget] = (),
    solver: str = "auto",
    skipped: Callable[[InfeasibleBudgetError], None] | None = None,
) -> Tradeoff:
    """Plan a chain for many budgets, from one solve where the solver can.

    Args:
        chain: The chain.
        budgets: How many, from the least that works to storing everything, both included,
            each larger than the one before by the same factor; or the budgets themselves.
        also: Budgets besides.
        solver: Name of the solver, see `plan`.
        skipped: Told of each budget of `also` that is too small, which then has no row.

    Returns:
        A row a budget; a larger budget never takes longer.

    Raises:
        InfeasibleBudgetError: One of the budgets that were given is too small.
    """
    chosen = _spread(chain, budgets, solver) if isinstance(budgets, int) else list(budgets)
    first = len(chosen)  # of the budgets besides
    chosen = [*chosen, *also]
    if not chosen:
        raise BudgetSyntaxError("a trade-off needs at least one budget, found none")
    plans = []
    for i, result in enumerate(plan_each(chain, chosen, solver=solver)):
        if isinstance(result, Plan):
            plans.append(result)
        elif skipped is None or i < first:
            raise result
        else:
            skipped(result)
    if not plans:
        raise BudgetSyntaxError("a trade-off needs at least one budget that works, found none")
    plans.sort(key=lambda plan: plan.budget_bytes)
    return Tradeoff(
        chain=chain,
        rows=tuple(Row(plan=plan) for plan in plans),
        baselines=compare_baselines(chain),
    )


def _spread(chain: Chain, count: int, solver: str) -> list[int]:
    """Budgets from the least feasible to store-all, evenly spaced in the logarithm.

    Overhead rises steeply towards the least budget: equal factors look closer there.
    """
    if count < 2:
        raise BudgetSyntaxError(
            f"a trade-off needs at least 2 budgets, found {count}; the least that works and "
            "store-all are the first two"
        )
    [result] = plan_each(chain, ["100%"], solver=solver)
    if isinstance(result, InfeasibleBudgetError):
        raise result
    low, high = result.least_budget_bytes, max(result.store_all_bytes, result.least_budget_bytes)
    if low < 1:
        return [max(high, 1)]
    factor = (high / low) ** (1 / (count - 1))
    inner = (min(max(int(low * factor**i), low), high) for i in range(1, count - 1))
    return sorted({low, *inner, high})


def _row_to_json(tradeoff: Tradeoff, row: Row) -> dict[str, Any]:
    plan, measured = row.plan, row.measured
    data: dict[str, Any] = {
        "budget_bytes": plan.budget_bytes,
        "solver": plan.solver,
        "peak_bytes": plan.peak_bytes,
        "seconds": plan.seconds,
        "overhead": plan.overhead,
        "forwards": plan.forwards,
        "schedule_class": plan.schedule_class,
        "lower_bound_seconds": plan.lower_bound_seconds,
        "gap": plan.gap,
        "loss_to_rounding": plan.loss_to_rounding,
        "baselines_that_fit": [x.name for x in tradeoff.fitting(row)],
    }
    if measured is not None:
        data["measured"] = {**asdict(measured), "overhead": measured.overhead}
    return data


def heading(tradeoff: Tradeoff) -> str:
    """What the trade-off is of, in two sentences."""
    chain, last = tradeoff.chain, tradeoff.rows[-1].plan
    name = f" of {chain.name!r}" if chain.name else ""
    return (
        f"trade-off{name}: {len(chain)} stages; storing everything takes "
        f"{format_bytes(last.store_all_bytes)} and {format_seconds(chain.store_all_seconds)}; "
        f"the least budget that works is {format_bytes(last.least_budget_bytes)}"
    )


def plan_grid(tradeoff: Tradeoff) -> Grid:
    """A row a budget: what the plan needs, projected and, where there is one, measured."""
    headings = [
        "budget",
        "budget\nin bytes",
        "projected\npeak",
        "of\nstore-all",
        "forward\nruns",
        "gap",
        "projected\ntime",
        "overhead",
    ]
    measuring = any(row.measured for row in tradeoff.rows)
    if measuring:
        headings += ["measured\npeak", "of the\nbudget", "measured\ntime", "measured\noverhead"]
    rows = []
    for row in tradeoff.rows:
        plan, measured = row.plan, row.measured
        cells = [
            format_bytes(plan.budget_bytes, budget=True),
            str(plan.budget_bytes),
            format_bytes(plan.peak_bytes),
            f"{plan.peak_bytes / max(plan.store_all_bytes, 1):.1%}",
            str(plan.forwards),
            f"{plan.gap:.2%}",
            format_seconds(plan.seconds),
            f"{plan.overhead:+.1%}",
        ]
        if measured is not None:
            cells += [
                format_bytes(measured.peak_bytes),
                f"{measured.peak_bytes / max(plan.budget_bytes, 1):.1%}",
                format_seconds(measured.seconds),
                f"{measured.overhead:+.1%}",
            ]
        rows.append((*cells, *("-",) * (len(headings) - len(cells))))
    return Grid(title="Plans", headings=tuple(headings), rows=tuple(rows))


def baseline_grid(tradeoff: Tradeoff) -> Grid:
    """A row a budget: the overhead of the plan and of each baseline that fits.

    The family every_<k> has one column, for the cheapest of it that fits.
    """
    names = [x.name for x in tradeoff.baselines if not _EVERY.fullmatch(x.name)]
    sizes = {x.name: format_bytes(x.peak_bytes) for x in tradeoff.baselines}
    shown = [name for name in names if any(name in _names(tradeoff, r) for r in tradeoff.rows)]
    headings = ["budget", "our plan", *(f"{name}\n{sizes[name]}" for name in shown)]
    families = [_best_of_family(tradeoff, row) for row in tradeoff.rows]
    if any(families):
        headings.append("every_k\nbest k")
    store_all = tradeoff.chain.store_all_seconds
    rows = []
    for row, best in zip(tradeoff.rows, families, strict=True):
        cells = [format_bytes(row.plan.budget_bytes, budget=True), f"{row.plan.overhead:+.1%}"]
        costs = {x.name: f"{excess(x.seconds, store_all):+.1%}" for x in tradeoff.fitting(row)}
        cells += [costs.get(name, "-") for name in shown]
        if best is not None:
            cells.append(f"{costs[best.name]} k={best.name.removeprefix('every_')}")
        rows.append((*cells, *("-",) * (len(headings) - len(cells))))
    title = "Overhead of the plan, and of the baselines where they fit (below: what they need)"
    return Grid(title=title, headings=tuple(headings), rows=tuple(rows))


def _names(tradeoff: Tradeoff, row: Row) -> set[str]:
    return {x.name for x in tradeoff.fitting(row)}


def _best_of_family(tradeoff: Tradeoff, row: Row) -> BaselineFigures | None:
    family = [x for x in tradeoff.fitting(row) if _EVERY.fullmatch(x.name)]
    return min(family, key=lambda x: x.seconds, default=None)


def verdict(tradeoff: Tradeoff) -> list[str]:
    """One line about what was measured; nothing where nothing was."""
    rows = [row for row in tradeoff.rows if row.measured is not None]
    if not rows:
        return []
    largest = max(row.measured.max_gradient_difference for row in rows if row.measured)
    failed = [row.plan.budget_bytes for row in rows if row.measured and not row.measured.ok]
    kept = "every budget was kept" if not failed else f"NOT as promised at {failed} bytes"
    return [f"Measured: {kept}; largest difference of a gradient {largest:.3g}."]


def check_plot(path: str | os.PathLike[str]) -> None:
    """Find out before a long run whether a plot can be drawn there.

    Args:
        path: As `Tradeoff.plot` takes it.

    Raises:
        CkptschedError: matplotlib is not installed, or does not know the ending.
    """
    known = _new_figure().canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending and ending not in known:
        raise CkptschedError(
            f"no plot can be drawn to {str(path)!r}: the ending '.{ending}' is unknown; give one "
            f"of {', '.join(sorted(known))}"
        )


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CkptschedError(
            f"plots need matplotlib ({error}); install it: pip install 'ckptsched[plot]'"
        ) from error
    # A figure of its own, without pyplot: nothing global changes, and no display is needed.
    return Figure(figsize=(8, 5), layout="constrained")


def _draw(tradeoff: Tradeoff, path: str | os.PathLike[str]) -> None:
    check_plot(path)
    figure = _new_figure()
    axes = figure.add_subplot()
    largest = max(row.plan.budget_bytes for row in tradeoff.rows)
    unit, scale = next((u, s) for u, s in _PLOT_UNITS if largest >= s or s == 1)
    _draw_series(tradeoff, axes, scale)
    name = tradeoff.chain.name or f"{len(tradeoff.chain)} stages"
    axes.set_title(f"Bytes against seconds: {name}")
    axes.set_xlabel(f"Peak of tensor bytes in a training step [{unit}]")
    axes.set_ylabel("Seconds of the step / seconds when everything is stored")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _draw_series(tradeoff: Tradeoff, axes: Any, scale: int) -> None:
    plans = [row.plan for row in tradeoff.rows]
    x, y = [plan.budget_bytes / scale for plan in plans], [1 + plan.overhead for plan in plans]
    label = "our plan at each budget, projected"
    axes.step(x, y, where="post", marker="o", markersize=4, label=label)
    if measured := [row.measured for row in tradeoff.rows if row.measured]:
        x = [item.peak_bytes / scale for item in measured]
        ratios = [1 + item.overhead for item in measured]
        axes.plot(x, ratios, "x", color="tab:red", label="our plan, measured")
    # What is far dearer than any plan would flatten the plans: it goes to the upper edge.
    top = 1 + _HEADROOM * (max(*y, 1.1) - 1)
    store_all = tradeoff.chain.store_all_seconds
    label = "baselines, projected"
    for item in tradeoff.baselines:
        ratio = 1 + excess(item.seconds, store_all)
        point = (item.peak_bytes / scale, min(ratio, top))
        text = item.name if ratio <= top else f"{item.name} ({ratio:.3g})"
        marker = "s" if ratio <= top else "^"
        axes.plot(*point, marker, color="tab:gray", markersize=5, label=label)
        axes.annotate(
            text, point, xytext=(3, 4), textcoords="offset points", fontsize="small", rotation=50
        )
        label = "_"  # matplotlib leaves such labels out of the legend
    axes.margins(0.08, 0.28)
    if max(y) > _LOG_ABOVE:
        axes.set_yscale("log")
