"""The executor's benchmark as tables and goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.document import Goal
from benchmarks.executor.rows import TOLERANCE, Ours, Report, Row
from ckptsched.base.text_table import Grid

_BY_OPERATION = ("partitioner", "inductor")
_MIB = 2**20


def grid(report: Report) -> Grid:
    """One network: a row a peer."""
    cuts = len(report.stages)
    headings: list[str] = ["peer", "peak\nMiB", "step over\nplain", "gradients\ndiffer by"]
    for finer in range(cuts):
        name = "finer" if finer else "ours"
        headings += [f"{name},\npeak MiB", "over the\npeer", "median\nof turns", "differ\nby"]
    return Grid(
        title=report.network,
        headings=tuple(headings),
        rows=tuple(
            (
                row.peer,
                f"{row.step.peak_bytes / _MIB:.2f}",
                f"{row.over_plain:.2f}",
                f"{row.step.gradient_difference:.2g}",
                *(cell for k in range(cuts) for cell in _ours(row, finer=bool(k))),
            )
            for row in report.rows
        ),
        names_first=True,
    )


def _ours(row: Row, *, finer: bool) -> tuple[str, ...]:
    found: Ours | None = next((x for x in row.ours if x.finer == finer), None)
    if found is None:
        return ("no plan", "-", "-", "-")
    return (
        f"{found.step.peak_bytes / _MIB:.2f}",
        f"{found.ratio:.3f}",
        f"{found.median_ratio:.3f}",
        f"{found.step.gradient_difference:.2g}",
    )


def notes(report: Report) -> list[str]:
    """What is to be said below a table: sizes, what was left out, why there is no plan."""
    planned = " and ".join(f"{seconds:.0f} s" for seconds in report.plan_seconds)
    stages = " or ".join(str(number) for number in report.stages)
    lines = [
        f"{report.what}: {stages} stages; plain autograd {report.plain_seconds:.3f} s a step; "
        f"profiled and planned for all peaks in {planned}."
    ]
    lines += [f"Left out: {text}" for text in report.left_out]
    lines += [f"{row.peer}: {note}" for row in report.rows for note in row.notes]
    return lines


def goals(reports: Sequence[Report]) -> list[Goal]:
    """The goals of the executor against its peers."""
    found = []
    for report in reports:
        what = "never slower than {} at its own measured peak (3 % tolerance)"
        found += [
            _never_slower(f"{report.network}: {what.format(kind)}", filter(belongs, report.rows))
            for kind, belongs in _KINDS
        ]
    return [*found, _budgets(reports), _gradients(reports)]


def _by_operation(row: Row) -> bool:
    return row.peer.startswith(_BY_OPERATION)


_KINDS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("a checkpointing peer", lambda row: not _by_operation(row) and not _is_plain(row)),
    ("plain autograd", lambda row: _is_plain(row)),
    (
        "selective recomputation with the same kernels",
        lambda row: _by_operation(row) and not row.fused,
    ),
    ("selective recomputation with fused kernels", lambda row: row.fused),
)


def _is_plain(row: Row) -> bool:
    return row.peer == "plain autograd"


def _never_slower(what: str, rows: Iterable[Row]) -> Goal:
    rows = list(rows)
    if not rows:
        return Goal(what, None, "did not run")
    ratios = {row.peer: row.best.ratio for row in rows if row.best}
    none = [row.peer for row in rows if not row.best]
    slower = {peer: ratio for peer, ratio in ratios.items() if ratio > 1 + TOLERANCE}
    parts = [f"{len(rows)} compared"]
    if ratios:
        parts.append(
            f"ours over the peer's {min(ratios.values()):.3f} to {max(ratios.values()):.3f}"
        )
    if slower:
        parts.append("slower: " + ", ".join(f"{x} ({y:.3f})" for x, y in slower.items()))
    if none:
        parts.append(f"no plan in so little memory: {', '.join(none)}")
    return Goal(what, not slower and not none, "; ".join(parts))


def _budgets(reports: Sequence[Report]) -> Goal:
    pairs = [(ours, row) for report in reports for row in report.rows for ours in row.ours]
    over = [row.peer for ours, row in pairs if ours.step.peak_bytes > row.step.peak_bytes]
    text = f"{len(pairs)} plans, {len(over)} over{': ' + ', '.join(over) if over else ''}"
    return Goal("no plan's measured peak above the peer's", not over if pairs else None, text)


def _gradients(reports: Sequence[Report]) -> Goal:
    ours = [x for report in reports for row in report.rows for x in row.ours]
    equal = sum(x.step.gradient_difference == 0 for x in ours)
    worst = max((x.step.gradient_difference for x in ours), default=0.0)
    text = f"{equal} of {len(ours)} plans equal bit by bit; at most {worst:.2g} of the largest"
    return Goal("gradients are those of plain autograd", worst <= 1e-6 if ours else None, text)
