"""What the planner's benchmark measures: rows of figures, and comparisons at equal peaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from benchmarks.timing import Timing
from ckptsched.planner.plan import Plan
from ckptsched.schedule.language import Schedule
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain


@final
@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a schedule is; peak and seconds are the simulator's, whoever made it."""

    peak_bytes: int
    """Exact peak."""
    seconds: float
    """Seconds of a step."""
    relative: float
    """Seconds over those of storing everything."""
    forwards: int
    """Forward runs, those with tape included."""
    operations: int
    """Operations of the schedule."""
    gap: float | None = None
    """Seconds over our lower bound, less 1; None for peers."""
    schedule_class: str = ""
    """The class that the lower bound holds for."""
    solver: str = ""
    """Which of our solvers found it."""


def judge(chain: Chain, schedule: Schedule) -> Quality:
    """Simulate a schedule that comes without a certificate."""
    trace = simulate(chain, schedule)
    return Quality(
        peak_bytes=trace.peak_bytes,
        seconds=trace.seconds,
        relative=trace.seconds / chain.store_all_seconds,
        forwards=trace.forwards,
        operations=len(schedule),
    )


def judge_plan(plan: Plan) -> Quality:
    """The figures of a plan of ours, and its certificate."""
    return Quality(
        peak_bytes=plan.peak_bytes,
        seconds=plan.seconds,
        relative=plan.seconds / plan.chain.store_all_seconds,
        forwards=plan.forwards,
        operations=len(plan.schedule),
        gap=plan.gap,
        schedule_class=plan.schedule_class,
        solver=plan.solver,
    )


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one chain."""

    part: str
    """"uniform", "instances" or "frontier"."""
    chain: str
    """Name of the chain."""
    stages: int
    """Its length."""
    method: str
    """The peer, or how ours was asked."""
    timing: Timing
    """Seconds to have all operations in hand, and memory."""
    slots: int | None = None
    """Slots of memory that a peer was given."""
    budget_bytes: int | None = None
    """The nominal budget."""
    quality: Quality | None = None
    """How good the schedule is; None where there is none."""
    known_best: float | None = None
    """Relative seconds of the best schedule known."""
    known_bound: float | None = None
    """Relative seconds that no persistent schedule goes below."""

    @property
    def loss(self) -> float | None:
        """Seconds over those of the best schedule known, less 1."""
        if self.quality is None or self.known_best is None:
            return None
        return self.quality.relative / self.known_best - 1

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data, without what is not there."""
        data: dict[str, Any] = {key: getattr(self, key) for key in _PLAIN}
        data |= {"loss": self.loss, **self.timing.to_json()}
        if self.quality is not None:
            data |= asdict(self.quality)
        return {key: value for key, value in data.items() if value not in (None, "")}


_PLAIN = (
    "part",
    "chain",
    "stages",
    "method",
    "slots",
    "budget_bytes",
    "known_best",
    "known_bound",
)


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours at the exact peak of a peer's plan."""

    chain: str
    """Name of the chain."""
    peer: str
    """Whose plan."""
    peak_bytes: int
    """Its exact peak, and our budget."""
    peer_seconds: float
    """Seconds of a step by its plan."""
    our_seconds: float
    """Seconds of a step by ours; infinite where we found nothing."""
    within_nominal: bool = True
    """Whether the peer's plan keeps the budget that the peer was given."""

    @property
    def excess(self) -> float:
        """Our seconds over the peer's, less 1: above 0 is a defeat."""
        return self.our_seconds / self.peer_seconds - 1 if self.peer_seconds else 0.0

    @property
    def is_worse(self) -> bool:
        """Whether ours is costlier, by more than the last digits of sums."""
        return self.our_seconds > self.peer_seconds * (1 + 1e-9)


@final
@dataclass(frozen=True)
class Findings:
    """Everything that one part found."""

    rows: Sequence[Row] = ()
    comparisons: Sequence[Comparison] = ()

    def __add__(self, other: Findings) -> Findings:
        """Both."""
        return Findings((*self.rows, *other.rows), (*self.comparisons, *other.comparisons))
