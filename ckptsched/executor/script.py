"""A plan's schedule, made ready to be run: cut at the blocks, with facts about each operation.

A long chain of tiny stages is ruled by what surrounds a stage: turning gradients on and off, a
graph of its own, a call of the engine. So neighbours that can share it are run as one stretch,
which is found here, once. Runs without tape, and drops between them, share the surroundings alone.
Runs with tape T_i ... T_j share one autograd graph where the backwards B_j ... B_i follow each
other, too: it lets go of each stage's tape as the engine comes through, as graphs of their own
would.

In one graph the gradient of a state is let go while its stage's backward still goes on, so such
a backward takes at most what was projected for it. The backward at the peak of the schedule stays
by itself, so that what is measured is what is projected, to the byte.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.budget import Tier
from ..base.errors import InvalidScheduleError, PlanMismatchError
from ..planner.plan import Plan
from ..schedule.language import Code, Schedule
from ..simulator.liveness import Liveness, Segment, Segments, analyse, cut
from ..simulator.value_bytes import analyse_values
from ..workload.graph import Graph

# What `Liveness` says of an operation, as bits of one number: there are many, and each is asked.
KEEPS_OUTPUT, FREES_INPUT, RESTORES, SNAPSHOTS, FORGETS = 1, 2, 4, 8, 16

_CHUNK = 4096  # how many stretches are numbers of Python at a time

Positions = npt.NDArray[np.int32]

Collects = Callable[[int], AbstractSet[int]]
"""For a stage, counted from 1, what its backward adds gradients to, by identity."""


@final
@dataclass(frozen=True, slots=True)
class Touched:
    """Indices of the blocks whose stages a segment of operations runs."""

    all: tuple[int, ...]
    again: tuple[int, ...]
    """Those with stages that have run before."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """A schedule as a step runs it. Positions are those of operations in the schedule."""

    codes: npt.NDArray[np.uint8]
    """One `Code` an operation."""
    numbers: npt.NDArray[np.int32]
    """The stage of each operation, counted from 1."""
    dropped: npt.NDArray[np.uint8]
    """For each drop what it drops, state or tape; for each run with tape which of its tapes."""
    facts: bytes
    """For each operation the sum of KEEPS_OUTPUT, FREES_INPUT, RESTORES and SNAPSHOTS. By value the
    snapshot is one that the run itself begins from, and FORGETS says that it was put back for the
    last time."""
    snapshots_input: bool
    """Whether a snapshot of the random state is kept with the input."""
    segments: Segments
    """Which operations each block's forward and backward runs."""
    stretches: Positions
    """Where each stretch of operations that are run as one starts, and the schedule's length."""
    touched: dict[Segment, Touched]
    owner: npt.NDArray[np.int32]
    """Index of the block of each stage; shape (stages + 1,), of which the first is unused."""
    repeated: tuple[int, ...]
    """The stages that run more than once, in order."""
    frees: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By value, the stages whose copies an operation reads for the last time; 0 for the input."""

    @classmethod
    def of(cls, plan: Plan, collects: Collects) -> Script:
        """Make the schedule of a plan for a chain ready.

        Args:
            plan: The plan.
            collects: What the backward of each stage adds gradients to.

        Raises:
            PlanMismatchError: The schedule asks for what the executor cannot do.
        """
        chain, schedule = plan.chain, plan.schedule
        _refuse_unsupported(schedule)
        liveness = analyse(schedule, len(chain))
        by_value = _by_value(chain, schedule) if isinstance(chain, Graph) else None
        segments = cut(schedule, chain.blocks)
        if liveness.repeats[: segments.turn].any():
            raise PlanMismatchError(
                "the plan runs a stage twice before the loss, which gains nothing and is not "
                "supported; plan again"
            )
        owner = np.zeros(len(chain) + 1, dtype=np.int32)
        for k, block in enumerate(chain.blocks):
            owner[block.first : block.last + 1] = k
        numbers, repeats = schedule.stages, liveness.repeats
        touched = {}
        for segment in (*segments.forward, *segments.backward):
            part = slice(segment.start, segment.stop)
            runs = numbers[part], numbers[part][repeats[part]]
            touched[segment] = Touched(*(tuple(np.unique(owner[x]).tolist()) for x in runs))
        return cls(
            codes=schedule.codes,
            numbers=numbers,
            dropped=schedule.kinds,
            facts=by_value.facts if by_value else _pack(liveness),
            frees=by_value.frees if by_value else {},
            snapshots_input=liveness.snapshots_input,
            segments=segments,
            stretches=find_stretches(
                schedule,
                liveness,
                segments,
                plan.trace.peak_position,
                collects,
                by_value,
            ),
            touched=touched,
            owner=owner,
            repeated=tuple(np.unique(numbers[repeats]).tolist()),
        )


def _refuse_unsupported(schedule: Schedule) -> None:
    if np.any(schedule.codes == Code.COPY) or np.any(schedule.sources != Tier.DEVICE):
        raise PlanMismatchError(
            "the plan moves checkpoints between tiers, which the executor cannot do yet; "
            "plan for the device alone"
        )


@final
@dataclass(frozen=True, slots=True)
class _ByValue:
    """What a schedule for a graph says of its operations."""

    facts: bytes
    frees: dict[int, tuple[int, ...]]
    read_until: tuple[int, ...]
    """For each stage the last that reads what it has made; index 0 is the input."""


def _by_value(graph: Graph, schedule: Schedule) -> _ByValue:
    """Facts about the operations of a schedule for a graph.

    Raises:
        PlanMismatchError: It cannot be run by value.
    """
    try:
        found = analyse_values(graph, schedule)
    except InvalidScheduleError as error:
        raise PlanMismatchError(f"the plan cannot be run: {error}") from error
    flags = {KEEPS_OUTPUT: found.keeps, RESTORES: found.restores}
    flags |= {SNAPSHOTS: found.snapshots, FORGETS: found.forgets}
    facts = np.zeros(len(schedule), np.uint8)
    for bit, positions in flags.items():
        facts[list(positions)] |= bit
    read_until = tuple([max(readers, default=0) for readers in graph.readers])
    return _ByValue(facts.tobytes(), found.frees, read_until)


def _pack(liveness: Liveness) -> bytes:
    """One byte an operation, of the bits that are named above."""
    flags = (liveness.keeps_output, liveness.frees_input, liveness.restores, liveness.snapshots)
    bits = (KEEPS_OUTPUT, FREES_INPUT, RESTORES, SNAPSHOTS)
    pairs = zip(flags, bits, strict=True)
    return np.sum([flag.astype(np.uint8) * bit for flag, bit in pairs], 0, np.uint8).tobytes()


def find_stretches(
    schedule: Schedule,
    liveness: Liveness,
    segments: Segments,
    peak: int,
    collects: Collects,
    by_value: _ByValue | None = None,
) -> Positions:
    """Cut a schedule into stretches that are run as one.

    Args:
        schedule: A valid schedule, on one tier.
        liveness: What `analyse` says of it.
        segments: What `cut` says of it; a stretch lies in one of them.
        peak: Position of the operation at the schedule's peak.
        collects: For a stage, counted from 1, what its backward adds gradients to.
        by_value: What the schedule for a graph says.

    Returns:
        Where each stretch starts, and the length of the schedule.
    """
    codes = schedule.codes
    # Turn belongs to none: the segments on both sides begin and end there.
    plain = (codes == Code.FORWARD) | (codes == Code.DROP)
    joined = np.zeros(len(schedule) + 1, dtype=np.bool_)
    joined[1:-1] = plain[1:] & plain[:-1]
    borders = {s.start for s in (*segments.forward, *segments.backward)} | {segments.turn}
    _join_tapes(joined, schedule, liveness, borders, peak, collects, by_value)
    joined[list(borders)] = False
    return np.flatnonzero(~joined).astype(np.int32)


def _join_tapes(
    joined: npt.NDArray[np.bool_],
    schedule: Schedule,
    liveness: Liveness,
    borders: AbstractSet[int],
    peak: int,
    collects: Collects,
    by_value: _ByValue | None,
) -> None:
    """Mark runs with tape, and backwards, that go on what the operation before them began."""
    codes, numbers, kinds = schedule.codes.tolist(), schedule.stages.data, schedule.kinds.data
    end = 0  # the last stage of the tape that the operation before has used up

    def hands_on(p: int) -> bool:
        """Whether nothing that a run reads is kept on for its tape alone."""
        if by_value is None:
            return bool(liveness.frees_input[p])
        # The graph holds what later stages read, to its end; some of it is made again for these.
        return all(by_value.read_until[maker] <= end for maker in by_value.frees.get(p, ()))

    made: dict[int, int] = {}  # position of the run that made a stage's tape
    known: set[int] = set()
    fresh: set[int] = set()  # what got its first gradient since the last stretch began
    before = -1  # position of the run whose tape the operation before has used up
    for q, code in enumerate(codes):
        if code == Code.TAPED_FORWARD:
            made[numbers[q]] = q
        if code != Code.BACKWARD:
            before = -1
            continue
        tape = made.pop(numbers[q])
        # A lean tape makes values again in its backward, which others are not to pay for.
        is_lean = kinds[tape] > 0 or kinds[max(before, 0)] > 0
        mine = collects(numbers[q])
        # What a first gradient is added to in the engine may share the storage of another
        # gradient; only a graph of its own makes it one to add to in place.
        joins = (
            before == tape + 1
            and hands_on(before)
            and not {q, before} & borders
            and peak not in (q, q - 1)
            and not is_lean
            and not mine & fresh
        )
        if joins:
            joined[q] = joined[before] = True
        else:
            fresh.clear()
            end = numbers[q]
        fresh |= mine - known
        known |= mine
        before = tape


def between(starts: Positions, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The stretches from one position to another.

    Args:
        starts: What `find_stretches` returned.
        start: Where a stretch starts.
        stop: Where one ends.

    Yields:
        Where each starts, and where it ends.
    """
    # On a memoryview: numpy's own search takes as long as the operations of a small block.
    low = bisect_left(starts.data, start)
    high = bisect_left(starts.data, stop, low)
    for k in range(low, high, _CHUNK):
        chunk: Sequence[int] = starts[k : min(k + _CHUNK, high) + 1].tolist()
        yield from itertools.pairwise(chunk)
