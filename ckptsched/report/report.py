"""The trade-off, plans and chains for people: tables, plots, and pictures in text."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack, final

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..base.budget import Budget, exact_bytes, format_bytes, format_seconds
from ..base.errors import InfeasibleBudgetError
from ..base.json_files import check_writable
from ..base.plot import check_plot
from ..base.progress_bar import progress_bar
from ..base.text_table import Grid
from ..planner.plan import Plan
from ..planner.plan_words import Workload, kind_of
from ..planner.planner import PlanOptions
from ..planner.tradeoff import (
    Tradeoff,
    baseline_grid,
    heading,
    plan_grid,
    remarks,
    tradeoff,
)
from ..schedule.language import Code
from ..workload.tables import chain_grid

if TYPE_CHECKING:
    from ..executor.verify import Verification

_PLAIN_WIDTH = 160  # of output that goes to a file or a pipe, where nothing has to be folded


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files that a report writes."""

    plot: str | os.PathLike[str] | None = None
    """A picture of the trade-off; its ending chooses the format."""
    json: str | os.PathLike[str] | None = None
    """Rows and baselines as data."""
    html: str | os.PathLike[str] | None = None
    """A page to explore all plans in a browser."""

    def check(self) -> None:
        """Find out before a long run whether the files can be written.

        Raises:
            CkptschedError: A plot of this ending cannot be drawn, or a folder is missing.
        """
        for path in (self.plot, self.json, self.html):
            check_writable(path)
        if self.plot is not None:
            check_plot(self.plot)


def report(
    chain: Workload,
    budgets: int | Sequence[int | float | str | Budget] = 10,
    *,
    also: Sequence[int | float | str | Budget] = (),
    measure: Callable[[Plan], Verification] | None = None,
    console: Console | None = None,
    outputs: Outputs | None = None,
    **options: Unpack[PlanOptions],
) -> Tradeoff:
    """Print the trade-off between bytes and seconds, and write it to files.

    Args:
        chain: The chain.
        budgets: How many, or which; see `tradeoff`.
        also: Budgets besides; one that is too small is said on standard error and left out.
        measure: Runs a step under a plan, as `verify` does; None shows projections only.
        console: Where to print; standard output by default.
        outputs: Files to write besides.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        The trade-off, with what was measured.

    Raises:
        CkptschedError: A file cannot be written; found out before anything is measured.
    """
    outputs = outputs or Outputs()
    outputs.check()
    console = console or make_console()
    found = tradeoff(chain, budgets, also=also, skipped=_say_skipped, **options)
    if measure is not None:
        found = measure_rows(found, measure, console)
    print_tradeoff(found, console)
    if outputs.json is not None:
        found.save(outputs.json)
        console.print(f"data written to {outputs.json}", markup=False, highlight=False)
    if outputs.plot is not None:
        found.plot(outputs.plot)
        console.print(f"plot written to {outputs.plot}", markup=False, highlight=False)
    if outputs.html is not None:
        found.to_html(outputs.html)
        console.print(f"page written to {outputs.html}", markup=False, highlight=False)
    return found


def _say_skipped(error: InfeasibleBudgetError) -> None:
    text = " ".join(f"Left out: {error}".split())
    make_console(stderr=True).print(Text(text), soft_wrap=True)


def make_console(*, stderr: bool = False, silent: bool = False) -> Console:
    """A console that folds nothing where its output is no terminal; a silent one prints nothing."""
    if silent:
        return Console(quiet=True)
    console = Console(stderr=stderr, highlight=False)
    return (
        console
        if console.is_terminal
        else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)
    )


def measure_rows(
    found: Tradeoff, measure: Callable[[Plan], Verification], console: Console
) -> Tradeoff:
    """Run a step under the plan of every row.

    Args:
        found: The trade-off.
        measure: Runs a step under a plan and one of plain autograd.
        console: Where the progress bar goes, if it is a terminal.

    Returns:
        The trade-off with measured figures.
    """
    rows = []
    count = len(found.rows)
    with progress_bar(console.is_terminal, console=console, patience_seconds=0.0) as tell:
        for i, row in enumerate(found.rows):
            tell("measuring", i / count)
            rows.append(replace(row, measured=measure(row.plan).measured))
    return replace(found, rows=tuple(rows))


def print_tradeoff(found: Tradeoff, console: Console) -> None:
    """Print the rows of a trade-off, and the baselines beside them."""
    console.print(Text(heading(found)))
    for grid in (plan_grid(found), baseline_grid(found)):
        console.print()
        print_grid(grid, console)
    for line in remarks(found):
        console.print()
        console.print(Text(line))


def print_grid(grid: Grid, console: Console) -> None:
    """Print a table: with lines and colours on a terminal, as plain text elsewhere."""
    if not console.is_terminal:
        console.print(Text(f"{grid.title}\n{grid}"), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title, table.title_justify = Text(grid.title, style="bold"), "left"
    for i, column in enumerate(grid.headings):
        left = grid.names_first and i == 0
        table.add_column(Text(column), justify="left" if left else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def print_chain(chain: Workload, console: Console, plan: Plan) -> None:
    """Print what a chain or graph holds.

    Args:
        chain: The chain or graph.
        console: Where to print.
        plan: A plan of the chain that stores everything, for its figures.
    """
    name = f" {chain.name!r}" if chain.name else ""
    exact = "to the byte" if chain.has_ledger else "in the planning model"
    lines = [
        f"{kind_of(chain)}{name} of {len(chain)} stages, {exact}",
        f"  store-all     {format_bytes(plan.store_all_bytes)} and "
        f"{format_seconds(chain.store_all_seconds)}",
        f"  least budget  {exact_bytes(plan.least_budget_bytes)}",
        f"  fingerprint   {chain.fingerprint[:16]}",
    ]
    once = sum(stage.once for stage in chain.stages)
    if once:
        policy = chain.signature.policy if chain.signature else ""
        lines.append(f"  run once      {once} stages, by {policy or 'what they say'}")
    console.print(Text("\n".join(lines)), soft_wrap=True)
    console.print()
    print_grid(chain_grid(chain), console)


def timeline(plan: Plan, *, width: int = 72, height: int = 12, ascii_only: bool = False) -> str:
    """A picture in text of the bytes while each operation runs.

    Args:
        plan: The plan.
        width: Columns of the picture; several operations share one, which shows their
            largest.
        height: Rows of the picture.
        ascii_only: Whether to draw with # for terminals without block characters.

    Returns:
        Bytes upwards, operations to the right, and marks for the peak and the turn.
    """
    bytes_ = plan.trace.timeline
    width = max(1, min(width, len(bytes_)))
    edges = np.linspace(0, len(bytes_), width + 1).astype(int)
    columns = np.array(
        [bytes_[a:b].max() for a, b in itertools.pairwise(edges.tolist())], dtype=np.int64
    )
    top = max(int(columns.max()), 1)
    full = "#" if ascii_only else "█"
    lines = []
    for level in range(height, 0, -1):
        bars = "".join(full if value * height > (level - 1) * top else " " for value in columns)
        label = format_bytes(top * level // height) if level in (height, height // 2) else ""
        lines.append(f"{label:>12} |{bars}".rstrip())
    lines.append(f"{'0 B':>12} +{'-' * width}")
    turn = int(np.argmax(plan.schedule.codes == Code.TURN))
    lines.append(_marks(edges, {"^ turn": turn, "^ peak": plan.trace.peak_position}))
    share = plan.peak_bytes / max(plan.budget_bytes, 1)
    lines.append(
        f"{len(bytes_)} operations; the peak of {format_bytes(plan.peak_bytes)} is {share:.1%} of "
        f"the budget of {format_bytes(plan.budget_bytes, budget=True)}"
    )
    return "\n".join(lines)


def _marks(edges: npt.NDArray[np.int_], marks: dict[str, int]) -> str:
    """Marks below their operations; those that would overlap go to the next line."""
    lines = [""]
    for mark, position in sorted(marks.items(), key=lambda item: item[1]):
        column = 14 + int(np.searchsorted(edges, position, side="right")) - 1
        if len(lines[-1]) > column:
            lines.append("")
        lines[-1] = lines[-1].ljust(column) + mark + " "
    return "\n".join(line.rstrip() for line in lines)
