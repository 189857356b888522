"""Why a plan is as it is: what binds it, what other budgets would buy, how baselines compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Unpack, final

from ..base.budget import format_bytes, format_seconds
from ..base.progress_bar import bar_of_solvers
from ..base.text_table import Grid
from ..schedule.trace import Live
from .plan import Plan
from .plan_words import excess, label_of, note_on_bound, words_of_class, words_of_peak
from .planner import BaselineFigures, PlanOptions, compare_baselines, plan_each
from .tapes import lines_of, tape_grid, tapes_of

_FACTORS = (Fraction(90, 100), Fraction(1), Fraction(101, 100), Fraction(110, 100))
_SHOWN = 12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The best plan for a budget nearby."""

    factor: float
    """Its budget as a multiple of the plan's."""
    budget_bytes: int
    """Its budget."""
    plan: Plan | None
    """What is found for it; None where nothing fits."""
    least_budget_bytes: int
    """The least budget that works."""


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """Why a plan is as it is; `print` shows it as text."""

    plan: Plan
    """What is explained."""
    binding: str
    """The operation that runs at the peak, in words."""
    live: tuple[Live, ...]
    """What is live there, largest first; adds up to the peak."""
    alternatives: tuple[Alternative, ...]
    """Plans for 10 % less, 1 % more and 10 % more budget; for the same, if one is faster."""
    baselines: tuple[BaselineFigures, ...]
    """The rules of thumb; one fits where its peak is within the budget."""

    def saved_seconds(self, alternative: Alternative) -> float | None:
        """Seconds a step that another budget saves; negative if it costs, None if it fails."""
        if alternative.plan is None:
            return None
        return self.plan.seconds - alternative.plan.seconds

    def __repr__(self) -> str:
        """One line; `str` gives the text."""
        return f"<Explanation of {self.plan!r}>"

    def __str__(self) -> str:
        """For people."""
        parts = [_certificate(self.plan), _peak(self), _tapes(self.plan)]
        parts += [*_alternatives(self), _baselines(self)]
        return "\n\n".join(parts)


def explain_plan(
    plan: Plan, *, progress: bool | None = None, **options: Unpack[PlanOptions]
) -> Explanation:
    """Explain a plan; `plan.explain()` is the same.

    Args:
        plan: The plan.
        progress: Whether to show a progress bar, see `plan`.
        options: Of `plan`, for the budgets nearby: solver, time_limit, cache.
    """
    sizes = [max(1, int(plan.budget_bytes * factor)) for factor in _FACTORS]
    with bar_of_solvers(progress):
        results = plan_each(plan.chain, sizes, **options)
    alternatives = []
    for factor, size, result in zip(_FACTORS, sizes, results, strict=True):
        found = result if isinstance(result, Plan) else None
        # Never more than the plan itself, where the budget has room for it.
        if size >= plan.peak_bytes and (found is None or found.seconds > plan.seconds):
            found = plan
        # What a rule of thumb leaves on the table must not look like the gain of a budget.
        if factor == 1 and (found is None or excess(plan.seconds, found.seconds) == 0):
            continue
        alternatives.append(
            Alternative(
                factor=float(factor),
                budget_bytes=size,
                plan=found,
                least_budget_bytes=result.least_budget_bytes or plan.least_budget_bytes,
            )
        )
    return Explanation(
        plan=plan,
        binding=words_of_peak(plan),
        live=plan.trace.live_at_peak,
        alternatives=tuple(alternatives),
        baselines=compare_baselines(plan.chain),
    )


def _certificate(plan: Plan) -> str:
    who = words_of_class(plan)
    who = who[0].upper() + who[1:]
    lines = [
        f"Found by {plan.solver}: {format_seconds(plan.seconds)}, {plan.overhead:+.2%} of storing "
        "everything.",
    ]
    if plan.gap == 0:
        lines.append(f"{who} takes less time in this budget.")
    else:
        bound = format_seconds(plan.lower_bound_seconds)
        lines.append(f"{who} takes less than {bound} in this budget; the gap is {plan.gap:.2%}.")
        lines += [f"{line[0].upper()}{line[1:]}." for line in note_on_bound(plan)]
    need, missing = format_bytes(plan.store_all_bytes), plan.store_all_bytes - plan.budget_bytes
    if missing > 0:
        lines.append(
            f"Storing everything takes {need}, {format_bytes(missing)} more than the budget of "
            f"{format_bytes(plan.budget_bytes, budget=True)}."
        )
    else:
        lines.append(f"Storing everything takes {need}, which the budget has room for.")
    return "\n".join(lines)


def _peak(explanation: Explanation) -> str:
    plan = explanation.plan
    share = plan.peak_bytes / max(plan.budget_bytes, 1)
    title = (
        f"The peak of {format_bytes(plan.peak_bytes)}, {share:.1%} of the budget, is at the "
        f"{explanation.binding}. Live there:"
    )
    total = max(plan.peak_bytes, 1)
    rows = [
        (label_of(item, plan.chain), format_bytes(item.bytes), f"{item.bytes / total:.1%}")
        for item in explanation.live[:_SHOWN]
    ]
    if rest := explanation.live[_SHOWN:]:
        size = sum(item.bytes for item in rest)
        rows.append((f"and {len(rest)} more", format_bytes(size), f"{size / total:.1%}"))
    return f"{title}\n{_grid(('what', 'bytes', 'share'), rows)}"


def _tapes(plan: Plan) -> str:
    tapes = tapes_of(plan.chain, plan.schedule)
    lines = [f"{line[0].upper()}{line[1:]}." for line in lines_of(tapes)]
    once = sum(stage.once for stage in plan.chain.stages)
    if once:
        signature = plan.chain.signature
        policy = signature and signature.policy
        lines.append(f"By {policy or 'what they say'}, {once} may run once only.")
    return "\n".join([f"Of {len(plan.chain)} stages:", *lines, str(tape_grid(plan.chain, tapes))])


def _alternatives(explanation: Explanation) -> list[str]:
    rows = []
    for item in explanation.alternatives:
        saved = explanation.saved_seconds(item)
        name = "the same" if item.factor == 1 else f"{item.factor - 1:+.0%}"
        budget = format_bytes(item.budget_bytes, budget=True)
        if item.plan is None or saved is None:
            least = format_bytes(item.least_budget_bytes)
            rows.append((name, budget, "nothing fits", f"least: {least}", ""))
        else:
            change = format_seconds(abs(saved))
            word = "nothing" if not saved else f"{change} {'less' if saved > 0 else 'more'}"
            rows.append(
                (
                    name,
                    budget,
                    word,
                    format_seconds(item.plan.seconds),
                    f"{item.plan.overhead:+.2%}",
                )
            )
    headings = ("budget", "bytes", "changes", "time", "overhead")
    return [f"With another budget:\n{_grid(headings, rows)}"]


def _baselines(explanation: Explanation) -> str:
    plan = explanation.plan
    rows = []
    for item in explanation.baselines:
        fits = item.peak_bytes <= plan.budget_bytes
        slower = f"{excess(item.seconds, plan.seconds):+.2%}" if fits else "does not fit"
        rows.append(
            (item.name, format_bytes(item.peak_bytes), format_seconds(item.seconds), slower)
        )
    headings = ("rule of thumb", "needs", "time", "against the plan")
    return f"At the same budget:\n{_grid(headings, rows)}"


def _grid(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Grid:
    return Grid(title="", headings=headings, rows=tuple(rows), names_first=True)
