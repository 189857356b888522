"""The trade-off between bytes and seconds: the best plan at each of many budgets."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Unpack, final

from ..base.budget import Budget, format_bytes, format_seconds
from ..base.errors import BudgetSyntaxError, InfeasibleBudgetError
from ..base.json_files import render_json, write_atomically
from ..base.plot import Picture
from ..base.progress_bar import bar_of_solvers
from ..base.text_table import Grid
from .explorer.content import Front, Shown
from .explorer.page import page_of
from .plan import Plan
from .plan_words import Workload, excess, words_of_class
from .planner import BaselineFigures, PlanOptions, compare_baselines, plan_each, plan_front
from .tapes import counts_of, tapes_of

FORMAT = "ckptsched tradeoff"
VERSION = 1
_EVERY = re.compile(r"every_\d+")
_KNEE = "< knee"


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
    timeline_bytes: tuple[int, ...] = field(default=(), repr=False)
    """Bytes at most while each operation ran; empty where that was not measured."""

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

    chain: Workload
    """What was planned."""
    rows: tuple[Row, ...]
    """One a budget, the least first; a larger budget never takes longer."""
    baselines: tuple[BaselineFigures, ...]
    """Every baseline, whether or not it fits one of the budgets."""
    front: tuple[Plan, ...] = ()
    """Every step that the search has come by, also between the rows: plans of rising peak and
    falling seconds, each with its peak as budget."""

    @property
    def knee(self) -> Row | None:
        """The row where more bytes cease to save much time.

        Budgets and seconds are scaled to run from 0 to 1 over the rows, and a chord is drawn
        from the least budget's point (0, 1) to the largest's (1, 0). The knee is the row that
        lies farthest below the chord, that is of the largest 1 - bytes - seconds; of several
        the one of least budget. That is the knee of Satopää et al., "Finding a Kneedle in a
        Haystack" (2011), for a decreasing convex curve, without its smoothing: plans have no
        noise. It depends on which budgets are shown; more rows place it more finely.

        None where no row lies below the chord, as when there are fewer than three.
        """
        first, last = self.rows[0].plan, self.rows[-1].plan
        width, height = last.budget_bytes - first.budget_bytes, first.seconds - last.seconds
        if width <= 0 or excess(first.seconds, last.seconds) == 0:
            return None

        def depth(row: Row) -> float:
            along = (row.plan.budget_bytes - first.budget_bytes) / width
            return 1.0 - along - (row.plan.seconds - last.seconds) / height

        best = max(self.rows, key=depth)  # the first of equals
        return best if depth(best) > 1e-9 else None

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
        return "\n\n".join([*parts, *remarks(self)])

    def _repr_html_(self) -> str:
        """For notebooks: the tables, with what is remarked below."""
        tables = "".join(grid.to_html() for grid in (plan_grid(self), baseline_grid(self)))
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in remarks(self))
        return f"<p>{html.escape(heading(self))}</p>{tables}{lines}"

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
            "knee_budget_bytes": None if self.knee is None else self.knee.plan.budget_bytes,
            "rows": [_row_to_json(self, row) for row in self.rows],
            "front": [
                {"peak_bytes": x.peak_bytes, "seconds": x.seconds, "forwards": x.forwards}
                for x in self.front
            ],
            "baselines": [
                {**asdict(x), "overhead": excess(x.seconds, self.chain.store_all_seconds)}
                for x in self.baselines
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trade-off to a JSON file."""
        write_atomically(path, render_json(self.to_json()) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page to explore all plans in a browser: one file, which asks for no other.

        The knee is shown first, where there is one. The file appears whole or not at all.
        """
        write_atomically(path, page_of(*_page_content(self)))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the trade-off; the file's ending chooses the format, such as ".png".

        Raises:
            CkptschedError: matplotlib is not installed, or does not know the ending.
        """
        _picture(self).draw(path)


def tradeoff(
    chain: Workload,
    budgets: int | Sequence[int | float | str | Budget] = 10,
    *,
    also: Sequence[int | float | str | Budget] = (),
    skipped: Callable[[InfeasibleBudgetError], None] | None = None,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Tradeoff:
    """Plan a chain for many budgets, from one solve where the solver can.

    Args:
        chain: The chain or graph.
        budgets: How many, from the least that works to storing everything, both included,
            each larger than the one before by the same factor; or the budgets themselves.
        also: Budgets besides.
        skipped: Told of each budget of `also` that is too small, which then has no row.
        progress: Whether to show a progress bar, see `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        A row a budget; a larger budget never takes longer. Each row is what `plan` finds for
        its budget, or less: where sizes are rounded, a larger budget takes over what a smaller
        one found.

    Raises:
        InfeasibleBudgetError: One of the budgets that were given is too small.
    """
    with bar_of_solvers(progress):
        if isinstance(budgets, int):
            budgets = _spread(chain, budgets, options)
        chosen = [*budgets, *also]
        if not chosen:
            raise BudgetSyntaxError("a trade-off needs at least one budget, found none")
        results, front = plan_front(chain, chosen, **options)
    plans = []
    for i, result in enumerate(results):
        if isinstance(result, Plan):
            plans.append(result)
        elif skipped is None or i < len(budgets):
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
        front=front,
    )


def _spread(chain: Workload, count: int, options: PlanOptions) -> list[int]:
    """Budgets from the least feasible to store-all, evenly spaced in the logarithm.

    Overhead rises steeply towards the least budget: equal factors look closer there.
    """
    if count < 2:
        raise BudgetSyntaxError(
            f"a trade-off needs at least 2 budgets, found {count}; the least that works and "
            "store-all are the first two"
        )
    [result] = plan_each(chain, ["100%"], **options)
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
        "tapes": counts_of(tapes_of(plan.chain, plan.schedule)),
        "schedule_class": plan.schedule_class,
        "lower_bound_seconds": plan.lower_bound_seconds,
        "gap": plan.gap,
        "loss_to_rounding": plan.loss_to_rounding,
        "baselines_that_fit": [x.name for x in tradeoff.fitting(row)],
    }
    if measured is not None:
        figures = asdict(measured)
        del figures["timeline_bytes"]  # for pictures
        data["measured"] = {**figures, "overhead": measured.overhead}
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
    lean = [counts_of(tapes_of(row.plan.chain, row.plan.schedule))["lean"] for row in tradeoff.rows]
    if any(lean):
        headings.append("lean\ntapes")
    knee = tradeoff.knee
    if knee:
        headings.append("")
    measuring = any(row.measured for row in tradeoff.rows)
    if measuring:
        headings += ["measured\npeak", "of the\nbudget", "measured\ntime", "measured\noverhead"]
    rows = []
    for row, count in zip(tradeoff.rows, lean, strict=True):
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
        if any(lean):
            cells.append(str(count))
        if knee:
            cells.append(_KNEE if row is knee else "")
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


def remarks(tradeoff: Tradeoff) -> list[str]:
    """Lines about the gap, the knee, and what was measured; only those that apply."""
    lines = []
    # Where nothing runs twice the bound is that of all schedules, and goes without saying.
    classes = dict.fromkeys(words_of_class(x.plan) for x in tradeoff.rows if x.plan.overhead)
    if classes:
        lines.append(f"Gap: above a lower bound; {' or '.join(classes)} takes less than that.")
    if knee := tradeoff.knee:
        plan = knee.plan
        lines.append(
            f"Knee: {format_bytes(plan.budget_bytes, budget=True)}, where "
            f"{plan.budget_bytes / max(plan.store_all_bytes, 1):.1%} of store-all's bytes cost "
            f"{plan.overhead:+.1%} of time; bytes beyond it save less time than the average byte."
        )
    rows = [row for row in tradeoff.rows if row.measured is not None]
    if rows:
        largest = max(row.measured.max_gradient_difference for row in rows if row.measured)
        failed = [row.plan.budget_bytes for row in rows if row.measured and not row.measured.ok]
        kept = "every budget was kept" if not failed else f"NOT as promised at {failed} bytes"
        lines.append(f"Measured: {kept}; largest difference of a gradient {largest:.3g}.")
    return lines


def _page_content(tradeoff: Tradeoff) -> tuple[Workload, list[Shown], Front, int]:
    """What the explorer shows of a trade-off; see `page_of`."""
    rows, knee = tradeoff.rows, tradeoff.knee
    at = None if knee is None else rows.index(knee)
    front = Front(
        knee=at,
        baselines=tuple((x.name, x.peak_bytes, x.seconds) for x in tradeoff.baselines),
        steps=tuple((x.peak_bytes, x.seconds) for x in tradeoff.front),
    )
    shown = [Shown(plan=row.plan, measured=row.measured) for row in rows]
    return tradeoff.chain, shown, front, len(rows) // 2 if at is None else at


def _picture(tradeoff: Tradeoff) -> Picture:
    store_all = tradeoff.chain.store_all_seconds

    def point(plan: Plan) -> tuple[int, float]:
        return plan.budget_bytes, 1 + plan.overhead

    found = [row.measured for row in tradeoff.rows if row.measured]
    return Picture(
        title=tradeoff.chain.name or f"{len(tradeoff.chain)} stages",
        plans=tuple(point(row.plan) for row in tradeoff.rows),
        steps=tuple((x.peak_bytes, 1 + x.overhead) for x in tradeoff.front),
        measured=tuple((item.peak_bytes, 1 + item.overhead) for item in found),
        baselines=tuple(
            (item.name, (item.peak_bytes, 1 + excess(item.seconds, store_all)))
            for item in tradeoff.baselines
        ),
        knee=tradeoff.knee and point(tradeoff.knee.plan),
    )
