"""A plan in words: its table, its certificate in sentences, names of what is live."""

from __future__ import annotations

import math
import re
from typing import Protocol, TypeAlias

from ..base.budget import COUNTED, exact_bytes, format_bytes, format_seconds
from ..schedule.language import Backward, Forward, Schedule, Turn
from ..schedule.trace import Live, Trace
from ..workload.chain import Chain
from ..workload.graph import Graph
from .tapes import lines_of, tapes_of

Workload: TypeAlias = Chain | Graph
"""What can be planned."""

_SHOWN_AT_PEAK = 6
_VALUE = re.compile(r"(state|tape|grad)\[(\d+)\]")


class Planned(Protocol):
    """What is said and shown of a plan; see `Plan`, which has all of it."""

    @property
    def chain(self) -> Workload:
        """As in `Plan`."""

    @property
    def schedule(self) -> Schedule:
        """As in `Plan`."""

    @property
    def trace(self) -> Trace:
        """As in `Plan`."""

    @property
    def solver(self) -> str:
        """As in `Plan`."""

    @property
    def schedule_class(self) -> str:
        """As in `Plan`."""

    @property
    def budget_bytes(self) -> int:
        """As in `Plan`."""

    @property
    def budget_text(self) -> str:
        """As in `Plan`."""

    @property
    def store_all_bytes(self) -> int:
        """As in `Plan`."""

    @property
    def least_budget_bytes(self) -> int:
        """As in `Plan`."""

    @property
    def lower_bound_seconds(self) -> float:
        """As in `Plan`."""

    @property
    def rounding_unit_bytes(self) -> int:
        """As in `Plan`."""

    @property
    def seconds(self) -> float:
        """As in `Plan`."""

    @property
    def peak_bytes(self) -> int:
        """As in `Plan`."""

    @property
    def forwards(self) -> int:
        """As in `Plan`."""

    @property
    def gap(self) -> float:
        """As in `Plan`."""

    @property
    def overhead(self) -> float:
        """As in `Plan`."""

    @property
    def loss_to_rounding(self) -> float:
        """As in `Plan`."""


def kind_of(workload: Workload) -> str:
    """What it is, for people and as a key in JSON: "chain" or "graph"."""
    return "graph" if isinstance(workload, Graph) else "chain"


def excess(seconds: float, least: float) -> float:
    """How much longer than the least, as a share of it; never negative.

    Sums of the same seconds in another order differ in the last digits: that is no excess.

    Args:
        seconds: What something takes.
        least: What it takes at best.
    """
    if seconds - least <= 1e-12 * abs(least):
        return 0.0
    return seconds / least - 1.0 if least else math.inf


def table_of(plan: Planned) -> str:
    """The table that `print(plan)` shows."""
    rows = rows_of(plan)
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {text}" for label, text in rows]
    return "\n".join([heading_of(plan), *lines])


def heading_of(plan: Planned) -> str:
    """What a plan is of: "plan of 'resnet', 18 stages"."""
    chain = plan.chain
    name = f"{chain.name!r}," if chain.name else f"a {kind_of(chain)} of"
    return f"plan of {name} {len(chain)} stages"


def rows_of(plan: Planned) -> list[tuple[str, str]]:
    """The lines of the table: a label, empty where a line goes on, and a text."""
    chain = plan.chain
    store_all = format_seconds(chain.store_all_seconds)
    again = plan.forwards - len(chain)
    return [
        ("solver", plan.solver),
        (
            "budget",
            f"{exact_bytes(plan.budget_bytes, budget=True)}, asked for as {plan.budget_text}",
        ),
        ("counted", COUNTED),
        (
            "projected peak",
            f"{exact_bytes(plan.peak_bytes)}: {plan.peak_bytes / max(plan.budget_bytes, 1):.1%} of "
            f"the budget, {plan.peak_bytes / max(plan.store_all_bytes, 1):.1%} of store-all "
            f"({format_bytes(plan.store_all_bytes)})",
        ),
        (
            "projected time",
            f"{format_seconds(plan.seconds)} (store-all {store_all}){_spread(plan)}",
        ),
        ("overhead", f"{plan.overhead:+.2%} of store-all"),
        ("forward runs", f"{plan.forwards} of {len(chain)} stages: {again} again"),
        *zip(("tapes", "", ""), lines_of(tapes_of(chain, plan.schedule)), strict=False),
        ("least budget", exact_bytes(plan.least_budget_bytes)),
        (
            "lower bound",
            f"{format_seconds(plan.lower_bound_seconds)}; {words_of_class(plan)} takes less",
        ),
        *(("", line) for line in note_on_bound(plan)),
        ("gap", f"{plan.gap:.2%} above the lower bound"),
        ("rounding", _rounding(plan)),
        ("at the peak", words_of_peak(plan)),
        *(("", line) for line in _live_lines(plan)),
    ]


def _spread(plan: Planned) -> str:
    """How far the seconds that were measured are to be trusted, from 1 % on."""
    chain = plan.chain if isinstance(plan.chain, Chain) else plan.chain.lined
    spread = chain.seconds_spread if chain else 0.0
    return f", measured to about {spread:.0%}" if spread >= 0.01 else ""


def words_of_class(plan: Planned) -> str:
    """What takes no less than the plan's lower bound: "no memory-persistent schedule"."""
    name = plan.schedule_class
    if name == "all schedules":
        return "no schedule at all"
    if name.startswith("all "):
        return "no " + name.removeprefix("all ").removesuffix("s")  # "no pinned schedule"
    return f"none of the {name}" if "schedules" in name else f"no {name} schedule"


def note_on_bound(plan: Planned) -> list[str]:
    """A line where the bound says no more than that storing everything is fastest."""
    if plan.gap == 0 or excess(plan.lower_bound_seconds, plan.chain.store_all_seconds) > 0:
        return []
    note = "this is the time of storing everything: no closer bound was found"
    if not (isinstance(plan.chain, Chain) and plan.chain.has_ledger):
        return [note]
    return [
        f'{note}, as none on all schedules is known for exact bytes; solver="auto" bounds a class '
        "of them"
    ]


def _rounding(plan: Planned) -> str:
    unit = format_bytes(plan.rounding_unit_bytes)
    if plan.loss_to_rounding:
        return f"unit {unit}, costs at most {plan.loss_to_rounding:.2%}"
    return f"unit {unit}, nothing lost"


def words_of_peak(plan: Planned) -> str:
    """The operation at the peak: "backward of block.step[1], operation 38 of 40"."""
    trace = plan.trace
    operation = plan.schedule[trace.peak_position]
    match operation:
        case Forward(stage, tape, option):
            kept = f" {option}" if option else ""  # of several tapes
            verb = f"forward with tape{kept} of" if tape else "forward of"
            what = f"{verb} {plan.chain.stage_name(stage)}"
        case Backward(stage):
            what = f"backward of {plan.chain.stage_name(stage)}"
        case Turn():
            what = "the loss"
        case _:
            what = trace.peak_operation
    return f"{what}, operation {trace.peak_position + 1} of {len(plan.schedule)}"


def _live_lines(plan: Planned) -> list[str]:
    live = plan.trace.live_at_peak
    shown = [(label_of(item, plan.chain), item.bytes) for item in live[:_SHOWN_AT_PEAK]]
    if rest := live[_SHOWN_AT_PEAK:]:
        shown.append((f"and {len(rest)} more", sum(item.bytes for item in rest)))
    width = max((len(label) for label, _ in shown), default=0)
    return [f"{label:<{width}}  {format_bytes(size):>12}" for label, size in shown]


def label_of(item: Live, chain: Workload) -> str:
    """Name of something live for people: "tape[3] (block.step[1])"."""
    match = _VALUE.fullmatch(item.name)
    if match is None or isinstance(chain, Graph):  # what is live on a graph has names already
        return item.name
    number = int(match[2])
    name = chain.stage_name(number) if number else "the input"
    return item.name if name == f"stage {number}" else f"{item.name} ({name})"


def certificate_of(plan: Planned) -> list[str]:
    """What a plan promises and what that rests on, in sentences for people."""
    chain, again = plan.chain, plan.forwards - len(plan.chain)
    share = plan.peak_bytes / max(plan.budget_bytes, 1)
    counted = (
        "counted to the byte, as PyTorch allocates"
        if chain.has_ledger
        else "counted by the planning model: a few numbers a stage"
    )
    lines = [
        f"It fits: the peak is {format_bytes(plan.peak_bytes)}, {share:.1%} of the budget of "
        f"{format_bytes(plan.budget_bytes, budget=True)} ({counted}).",
        f"It costs {format_seconds(plan.seconds)} a step, {plan.overhead:.2%} more than the "
        f"{format_seconds(chain.store_all_seconds)} of storing everything, which would take "
        f"{format_bytes(plan.store_all_bytes)}.",
        f"{again} runs of stages are made again, besides one of each of {len(chain)}."
        if again
        else f"No stage runs twice: {len(chain)} stages, one run each.",
        f"How good that is: {words_of_class(plan)} that keeps the budget takes less than "
        f"{format_seconds(plan.lower_bound_seconds)}, so this one is within {plan.gap:.2%} of the "
        "best of them.",
        *(f"{line[0].upper()}{line[1:]}." for line in note_on_bound(plan)),
        f"What binds is the {words_of_peak(plan)}.",
        f"The least budget that works is {format_bytes(plan.least_budget_bytes)}.",
    ]
    if plan.loss_to_rounding:
        unit = format_bytes(plan.rounding_unit_bytes)
        lines.append(
            f"The solver {plan.solver} counted in units of {unit}, which costs at most "
            f"{plan.loss_to_rounding:.2%}."
        )
    return [*lines, f"A budget counts {COUNTED}."]
