"""Steps in groups: a chain of runs whose stages are so many steps each, to plan large budgets.

Where the budget holds thousands of states, its slots are larger than a state. Stages are then
grouped: a group is swept, taped and reversed as a whole, which a few of many checkpoints differ by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from ..schedule import Code, Schedule
from .run_lowering import Packed, sweep
from .run_structure import Indices, Runs

# Slots that the tapes of a group take at least, and the part of them that its state may be.
_SLOTS = 2
_STATE = 0.02
# A run has so many groups at least, if it has as many stages.
_FEWEST = 32
# Groups may be so many times as large as they must, for tapes that are nearly whole slots.
_CHOICES = 4


@final
@dataclass(frozen=True)
class Groups:
    """A chain of groups, and the stages that they stand for."""

    runs: Runs
    """The chain, a group a stage."""
    last: Indices
    """The last stage of each group; 0 at 0, shape (groups + 1,)."""

    def expand(self, schedule: Schedule) -> Schedule:
        """The same schedule in stages.

        Args:
            schedule: A schedule of groups.
        """
        if len(self.last) == self.last[-1] + 1:
            return schedule
        last = self.last
        codes, groups = schedule.codes.tolist(), schedule.stages.tolist()
        parts = [
            self._part(code, int(last[g - 1]) + 1, int(last[g]))
            for code, g in zip(codes, groups, strict=True)
        ]
        return Schedule(np.concatenate(parts))

    def _part(self, code: int, first: int, last: int) -> Packed:
        if code == Code.FORWARD:
            return sweep(first, last)
        if code == Code.TAPED_FORWARD:
            return _pack(code, np.arange(first, last + 1))
        if code == Code.BACKWARD:
            return _pack(code, np.arange(last, first - 1, -1))
        return _pack(code, np.array([0 if code == Code.TURN else last]))


def _pack(code: int, stages: npt.NDArray[np.int64]) -> Packed:
    packed: Packed = code | stages.astype(np.int64) << 32
    return packed


def group_sizes(runs: Runs, unit: int) -> Indices:
    """Stages of a group, by run, so that rounding to slots changes little.

    A group's tapes take several slots, of which its kept state is a small part where that is
    rounded to nothing; of larger groups too, that is taken whose tapes are nearest to whole slots.

    Args:
        runs: The runs.
        unit: Bytes of a slot.
    """
    sizes = []
    for count, state, tape in zip(runs.count, runs.state, np.maximum(runs.tape, 1), strict=True):
        least = -(-_SLOTS * unit // tape)
        if 2 * state < unit:
            least = max(least, -(-state // int(_STATE * tape + 1)))
        most = max(1, count // _FEWEST)
        choices = np.arange(min(least, most), min(_CHOICES * least, most) + 1)
        slots = choices * tape / unit
        sizes.append(choices[np.abs(slots / np.maximum(np.rint(slots), 1) - 1).argmin()])
    return np.array(sizes, dtype=np.int64)


def group(runs: Runs, sizes: Indices) -> Groups:
    """Put stages of a run into groups.

    Args:
        runs: The runs.
        sizes: Stages of a group, by run; the first group of a run may have fewer.
    """
    whole, rest = runs.count // sizes, runs.count % sizes
    of = np.repeat(np.arange(len(runs)), 1 + (rest > 0))
    is_rest = np.zeros(len(of), dtype=np.bool_)
    is_rest[1:] = of[1:] == of[:-1]
    is_rest = np.append(is_rest[1:], False) & (np.append(of[1:], -1) == of)
    stages = np.where(is_rest, rest[of], sizes[of])
    count = np.where(is_rest, 1, whole[of])
    entry = np.where(np.append(False, is_rest[:-1]), runs.state[of], runs.entry[of])
    steps = np.repeat(stages, count)
    more = (stages - 1) * runs.tape[of]
    return Groups(
        runs=Runs(
            first=np.cumsum(np.append(1, count))[:-1],
            count=count,
            seconds=runs.seconds[of] * stages,
            state=runs.state[of],
            is_view=runs.is_view[of],
            entry=entry,
            forward=runs.forward[of],
            tape=runs.tape[of] * stages,
            taped=runs.taped[of] + more,
            backward=runs.backward[of] + more,
            backward_after_turn=runs.backward_after_turn[of] + more,
            level=np.append(runs.level[of], runs.level[-1]),
            turn=runs.turn,
            stages=int(count.sum()),
        ),
        last=np.append(0, np.cumsum(steps)),
    )
