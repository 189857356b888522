"""Plain strategies, by name: no search, just the schedule that people write by hand.

They are what a plan is compared with. Each keeps a fixed set of states, whatever the budget;
it fits or it does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.errors import InfeasibleBudgetError, SolverRefusalError, WorkloadError
from ..schedule.language import Schedule, ScheduleBuilder
from ..simulator.simulator import simulate
from ..workload.chain import Chain
from .base import AbstractSolver, Solution, infeasible

# A schedule that starts from the input for every backward has about n * n operations of 8
# bytes: 32 MB and ten seconds of simulation at this length, and nobody would run it.
INPUT_ONLY_STAGES = 2_000
# Beyond this, comparing it costs more than all other baselines together.
_COMPARED_INPUT_ONLY_STAGES = 300
# Beyond this, simulating one baseline takes a tenth of a second or more: a comparison leaves out
# every_<k> on uniform chains. The planner looks for the best k itself (`fitting_every_k`).
_LONG = 20_000
# Numbers k of a grid grow by this factor, or by more where so many stages would be simulated.
_GRID_FACTOR = 1.2
_GRID_STAGES = 1_000_000

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
@dataclass(frozen=True, slots=True)
class Guess:
    """What an `every_<k>` needs and takes, without simulating it."""

    rule: Baseline
    least_bytes: int
    """Its peak is no less: states and tapes that it keeps at once."""
    seconds: float
    """Seconds of the step, up to the order of sums."""


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

    def solve_each(
        self, chain: Chain, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Return the strategy's schedule for each budget that its simulated peak fits."""
        schedule = self.schedule(chain)
        trace = simulate(chain, schedule)
        solution = Solution(
            schedule=schedule,
            trace=trace,
            schedule_class="fixed schedule",
            lower_bound_seconds=trace.seconds,
            least_budget_bytes=trace.peak_bytes,
        )
        return [
            solution if trace.peak_bytes <= x else infeasible(chain, x, trace, self.name)
            for x in budgets
        ]

    def guess(self, chain: Chain) -> Guess:
        """What the strategy takes, and needs at least, without simulating it.

        Args:
            chain: Any chain.
        """
        states, tapes = _kept_bytes(chain)
        forward = chain.arrays.forward_seconds[1:]
        n = len(chain)
        if self.name == "input_only":
            again = float(forward @ np.arange(n - 1, -1, -1))
            return Guess(self, int(tapes.max()), chain.store_all_seconds + again)
        firsts, lasts, taped = self._spans(chain)
        starts, last_states = firsts - 1, states[lasts[:-1] - 1]
        # While a segment is run again, its tapes are there, the states that were kept before it,
        # and the tapes of those before it that were taped at once.
        sums = np.add.reduceat(tapes, starts)
        kept = np.where(taped[:-1], sums[:-1], last_states)
        least = int((sums + np.concatenate(([0], np.cumsum(kept)))).max())
        again = float(np.add.reduceat(forward, starts)[~taped].sum())
        return Guess(self, least, chain.store_all_seconds + again)

    def _segments(self, chain: Chain) -> list[_Segment]:
        columns = (column.tolist() for column in self._spans(chain))
        return [_Segment(a, b, taped=taped) for a, b, taped in zip(*columns, strict=True)]

    def _spans(
        self, chain: Chain
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """First and last stage of each segment, and whether it is taped at once."""
        n = len(chain)
        if self.name == "store_all":
            return np.array([1]), np.array([n]), np.array([True])
        if self.name == "anode":
            blocks = chain.blocks
            first = np.array([block.first for block in blocks] or [1])
            last = np.array([block.last for block in blocks] or [n])
            return first, last, (first == last) | (last == n)
        match = _EVERY.fullmatch(self.name)
        k = int(match[1]) if match else 1 if self.name == "every_stage" else round(math.sqrt(n))
        first = np.arange(1, n + 1, k)
        last = np.minimum(first + k - 1, n)
        return first, last, last == n


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
        raise SolverRefusalError(
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


def every_k_grid(chain: Chain) -> tuple[Guess, ...]:
    """`every_<k>` for numbers k that grow by about a fifth, to find a good one by trying.

    Args:
        chain: Any chain.

    Returns:
        About 40 for 8,000 stages, cheapest first; fewer for very long chains, and none for one
        stage. Of the k that give as many segments the least is taken.
    """
    n = len(chain)
    most = max(_GRID_STAGES // n, 8)
    factor = max(_GRID_FACTOR, n ** (1 / most))
    numbers = {min(math.ceil(factor**i), n) for i in range(math.ceil(math.log(n, factor)) + 1)}
    numbers = {-(-n // -(-n // k)) for k in numbers}
    guesses = [Baseline(f"every_{k}").guess(chain) for k in numbers if k < n]
    return tuple(sorted(guesses, key=lambda guess: guess.seconds))


def _kept_bytes(chain: Chain) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Bytes of every state and tape that a schedule surely pays for while it keeps them."""
    columns = chain.arrays
    if not chain.has_ledger:
        return columns.state_bytes[1:], columns.tape_bytes[1:]
    known = [stage.ledger for stage in chain.stages if stage.ledger is not None]
    states = np.array([0 if x.output_is_view else x.state_bytes for x in known], dtype=np.int64)
    return states, np.array([x.tape_bytes for x in known], dtype=np.int64)


def fitting_every_k(chain: Chain, budget_bytes: int, most: int = 4) -> tuple[Baseline, ...]:
    """`every_<k>` that should fit a uniform chain's budget by a closed form, cheapest first.

    Args:
        chain: A uniform chain. With a ledger the closed form is that of the planning model.
        budget_bytes: Bytes that the peak may reach.
        most: How many to name at most.

    Returns:
        The cheapest are those whose last segment is longest, as it is not run again. Whether
        one fits is for the simulator to say.
    """
    n, stage = len(chain), chain.stages[-1]
    k = np.arange(1, n, dtype=np.int64)
    segments = -(-n // k)
    last = n - (segments - 1) * k
    w_a, w_t, w_g = stage.state_bytes, stage.tape_bytes, stage.gradient_bytes
    fixed = chain.input_bytes + chain.held_bytes
    forward, backward = stage.forward_overhead_bytes, w_g + stage.backward_overhead_bytes
    new = stage.parameter_gradient_bytes
    at_end = max(forward, w_g + chain.loss_overhead_bytes, w_g + backward + new)
    peak_at_end = (segments - 1) * w_a + last * w_t + at_end
    again = w_g + new + max(forward, backward)
    peak_again = (segments - 2) * w_a + k * w_t + again
    peaks = fixed + np.maximum(peak_at_end, peak_again)
    fitting = np.flatnonzero(peaks <= budget_bytes)
    # The longest last segment first; of equals the one that needs the fewest bytes.
    order = fitting[np.lexsort((peaks[fitting], -last[fitting]))]
    return tuple(Baseline(f"every_{int(k[i])}") for i in order[:most])
