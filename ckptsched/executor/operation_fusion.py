"""Which operations of a schedule are run as one: found once, with the plan.

A long chain of tiny stages is ruled by what surrounds a stage: turning gradients on and off, a
graph of its own, a call of the engine. Two kinds of neighbours share it. Runs without tape, and
drops between them, share the surroundings alone. Runs with tape T_i ... T_j share one autograd
graph where the backwards B_j ... B_i follow each other, too: it lets go of each stage's tape as
the engine comes through, as graphs of their own would.

In one graph the gradient of a state is let go while its stage's backward still goes on, so such
a backward takes at most what was projected for it. The backward at the peak of the schedule stays
by itself, so that what is measured is what is projected, to the byte.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt

from ..schedule.language import Code, Schedule
from ..simulator.liveness import Liveness, Segments

_CHUNK = 4096  # how many stretches are numbers of Python at a time

Positions = npt.NDArray[np.int32]


def find_stretches(
    schedule: Schedule,
    liveness: Liveness,
    segments: Segments,
    peak: int,
    collects: Callable[[int], AbstractSet[int]],
) -> Positions:
    """Cut a schedule into stretches that are run as one.

    Args:
        schedule: A valid schedule, on one tier.
        liveness: What `analyse` says of it.
        segments: What `cut` says of it; a stretch lies in one of them.
        peak: Position of the operation at the schedule's peak.
        collects: For a stage, counted from 1, what its backward adds gradients to.

    Returns:
        Where each stretch starts, and the length of the schedule.
    """
    codes = schedule.codes
    # Turn belongs to none: the segments on both sides begin and end there.
    plain = (codes == Code.FORWARD) | (codes == Code.DROP)
    joined = np.zeros(len(schedule) + 1, dtype=np.bool_)
    joined[1:-1] = plain[1:] & plain[:-1]
    borders = {s.start for s in (*segments.forward, *segments.backward)} | {segments.turn}
    _join_tapes(joined, schedule, liveness, borders, peak, collects)
    joined[list(borders)] = False
    return np.flatnonzero(~joined).astype(np.int32)


def _join_tapes(
    joined: npt.NDArray[np.bool_],
    schedule: Schedule,
    liveness: Liveness,
    borders: AbstractSet[int],
    peak: int,
    collects: Callable[[int], AbstractSet[int]],
) -> None:
    """Mark runs with tape, and backwards, that go on what the operation before them began."""
    codes, numbers = schedule.codes.tolist(), schedule.stages.data
    last_reads = liveness.frees_input
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
        mine = collects(numbers[q])
        # What a first gradient is added to in the engine may share the storage of another
        # gradient; only a graph of its own makes it one to add to in place.
        joins = (
            before == tape + 1
            and last_reads[before]
            and not {q, before} & borders
            and peak not in (q, q - 1)
            and not mine & fresh
        )
        if joins:
            joined[q] = joined[before] = True
        else:
            fresh.clear()
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
