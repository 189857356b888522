"""Steps in groups: a chain of runs whose stages are so many steps each, to plan large budgets.

Where the budget holds thousands of states, its slots are larger than a state. Stages are then
grouped: a group is swept, taped and reversed as a whole, which a few of many checkpoints differ by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from ...schedule.language import Code, Schedule
from .find_runs import Indices, Runs

# Slots that the tapes of a group take at least, and the part of them that its state may be.
_SLOTS = 2
_STATE = 0.02
# A run has so many groups at least, if it has as many stages; and so many fit at once, at least.
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
        codes, groups = schedule.codes, schedule.stages
        first, last = self.last[groups - 1] + 1, self.last[groups]
        stages = last - first + 1
        is_forward, is_drop = codes == Code.FORWARD, codes == Code.DROP
        is_back = codes == Code.BACKWARD
        # A sweep drops each state but the last when the next has come.
        length = np.where(is_forward, 2 * stages - 1, stages)
        length[is_drop | (codes == Code.TURN)] = 1
        of = np.repeat(np.arange(len(codes)), length)
        i = np.arange(len(of)) - np.repeat(np.cumsum(length) - length, length)
        code, stage = codes[of].astype(np.int64), first[of] + i
        stage[is_back[of]] = (last[of] - i)[is_back[of]]
        swept, drops = is_forward[of], is_forward[of] & (i % 2 == 0) & (i > 0)
        stage[swept] = (first[of] + (i + 1) // 2)[swept]
        stage[drops] -= 1
        code[drops] = Code.DROP
        stage[is_drop[of]] = last[of][is_drop[of]]
        stage[codes[of] == Code.TURN] = 0
        return Schedule(code | stage << 32)


def group_sizes(runs: Runs, unit: int, most_bytes: int) -> Indices:
    """Stages of a group, by run, so that rounding to slots changes little.

    A group's tapes take several slots, of which its kept state is a small part where that is
    rounded to nothing; of larger groups too, that is taken whose tapes are nearest to whole slots.

    Args:
        runs: The runs.
        unit: Bytes of a slot.
        most_bytes: What all that is kept may take; tapes that are large beside it stay alone.
    """
    sizes = []
    for count, state, tape in zip(runs.count, runs.state, np.maximum(runs.tape, 1), strict=True):
        least = -(-_SLOTS * unit // tape)
        if 2 * state < unit:
            least = max(least, math.ceil(state / (_STATE * tape)))
        most = max(1, min(count, most_bytes // tape) // _FEWEST)
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
