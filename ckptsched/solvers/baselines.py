"""Plain strategies, by name: no search, just the schedule that people write by hand.

They are what a plan is compared with. Each keeps a fixed set of states, whatever the budget;
it fits or it does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from ..errors import WorkloadError
from ..schedule import Schedule, ScheduleBuilder
from ..simulator import simulate
from ..workload import Chain
from .base import AbstractSolver, Solution, infeasible

# A schedule that starts from the input for every backward has about n * n operations of 8
# bytes: 32 MB and ten seconds of simulation at this length, and nobody would run it.
INPUT_ONLY_STAGES = 2_000
# Beyond this, comparing it costs more than all other baselines together.
_COMPARED_INPUT_ONLY_STAGES = 300
# Beyond this, simulating one baseline takes most of a second, and where revolve takes the chain
# it is no dearer than any of them that keeps states.
_LONG = 20_000

_EVERY = re.compile(r"every_([1-9][0-9]*)")
_FIXED = ("store_all", "anode", "every_stage", "sqrt", "input_only")
BASELINE_NAMES = (*_FIXED, "every_<k>")


@final
@dataclass(frozen=True, slots=True)
class _Segment:
    """Stages first..last, of which the forward pass keeps tapes, or the last state only."""

    first: int
    last: int
    taped: bool


@final
@dataclass(frozen=True)
class Baseline(AbstractSolver):
    """One plain strategy.

    - `store_all`: every tape is kept, as plain autograd does.
    - `anode`: a state per block of several stages; when the backward pass reaches the block,
      it is run again with tapes. Blocks of one stage are taped at once. A chain without
      blocks is one block. Gholami, Keutzer, Biros (arXiv 1902.10298), section V.
    - `every_<k>`: a state every k stages, and the stages between run again with tapes; what
      `torch.utils.checkpoint.checkpoint_sequential` does. `every_stage` is k = 1, `sqrt` is
      k = round(sqrt(n)) (Chen et al., arXiv 1604.06174).
    - `input_only`: nothing but the input; each backward starts from it: n (n + 1) / 2 runs.

    The last segment of each is taped in the forward pass, as its backward comes next.

    Raises:
        WorkloadError: The name is that of no baseline.
    """

    name: str

    def __post_init__(self) -> None:
        """Refuse an unknown name."""
        if self.name not in _FIXED and not _EVERY.fullmatch(self.name):
            raise WorkloadError(
                f"no baseline is called {self.name!r}; the baselines are "
                + ", ".join(BASELINE_NAMES)
            )

    def schedule(self, chain: Chain) -> Schedule:
        """The one schedule of the strategy.

        Args:
            chain: Any chain.

        Returns:
            A valid schedule, in O(operations).

        Raises:
            WorkloadError: `input_only` on a chain of thousands of stages.
        """
        if self.name == "input_only":
            return _input_only(len(chain))
        return _segmented(len(chain), self._segments(chain))

    def solve(self, chain: Chain, budget_bytes: int) -> Solution:
        """Return the strategy's schedule if its simulated peak fits the budget."""
        schedule = self.schedule(chain)
        trace = simulate(chain, schedule)
        if trace.peak_bytes > budget_bytes:
            raise infeasible(chain, budget_bytes, trace, self.name)
        return Solution(
            schedule=schedule,
            trace=trace,
            schedule_class="fixed schedule",
            lower_bound_seconds=trace.seconds,
            least_budget_bytes=trace.peak_bytes,
        )

    def _segments(self, chain: Chain) -> list[_Segment]:
        n = len(chain)
        if self.name == "store_all":
            return [_Segment(1, n, taped=True)]
        if self.name == "anode":
            spans = [(block.first, block.last) for block in chain.blocks] or [(1, n)]
            return [_Segment(a, b, taped=a == b or b == n) for a, b in spans]
        match = _EVERY.fullmatch(self.name)
        k = int(match[1]) if match else 1 if self.name == "every_stage" else round(math.sqrt(n))
        ends = [min(a + k - 1, n) for a in range(1, n + 1, k)]
        starts = range(1, n + 1, k)
        return [_Segment(a, b, taped=b == n) for a, b in zip(starts, ends, strict=True)]


def _segmented(n: int, segments: Iterable[_Segment]) -> Schedule:
    """Keep tapes or the last state of each segment; run the latter again with tapes."""
    build = ScheduleBuilder()
    segments = list(segments)
    kept = {0}  # states that lie in the store rather than in a tape
    for segment in segments:
        if segment.taped:
            for i in range(segment.first, segment.last + 1):
                build.tape(i)
        else:
            build.sweep(segment.first, segment.last)
            kept.add(segment.last)
    build.turn()
    if n in kept:
        build.drop_state(n)
    for segment in reversed(segments):
        if not segment.taped:
            for i in range(segment.first, segment.last + 1):
                build.tape(i)
        for i in range(segment.last, segment.first - 1, -1):
            build.backward(i)
        if segment.first - 1 in kept:
            build.drop_state(segment.first - 1)
    return build.build()


def _input_only(n: int) -> Schedule:
    if n > INPUT_ONLY_STAGES:
        raise WorkloadError(
            f"input_only needs about n * n operations, too many for {n} stages (at most "
            f"{INPUT_ONLY_STAGES}); use revolve or every_<k>"
        )
    build = ScheduleBuilder()
    for i in range(n, 0, -1):
        build.sweep(1, i - 1)
        build.tape(i)
        if i == n:
            build.turn()
        build.backward(i)
        build.drop_state(i - 1)
    return build.build()


def baselines_for(chain: Chain) -> tuple[Baseline, ...]:
    """The baselines that are worth comparing on a chain.

    Args:
        chain: The chain.

    Returns:
        `store_all`; `anode` where there are blocks; `every_<k>` for k = 2, 4, 8 … below n, but
        not on long uniform chains; `every_stage`; `sqrt`; `input_only` for a few hundred stages
        at most.
    """
    n = len(chain)
    names = ["store_all"]
    if chain.blocks:
        names.append("anode")
    if n <= _LONG or not chain.is_uniform:
        names += [f"every_{2**e}" for e in range(1, n.bit_length()) if 2**e < n]
    names += ["every_stage", "sqrt"]
    if n <= _COMPARED_INPUT_ONLY_STAGES:
        names.append("input_only")
    return tuple(Baseline(name) for name in names)
