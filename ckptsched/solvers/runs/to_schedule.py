"""From the tables of runs to schedules."""

from __future__ import annotations

from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from ...schedule.language import Code, Schedule
from .tables import End, RunTable

Packed: TypeAlias = npt.NDArray[np.int64]
# Where the stage lies in a packed operation.
_STAGE = 32


def lower(table: RunTable, m: int) -> Schedule:
    """Write out the schedule of the whole chain.

    Args:
        table: The table.
        m: Slots of the whole chain; the table must have a schedule for so many.

    Returns:
        A valid schedule. Lines of left parts are filled again, as the table keeps only what is
        needed to fill others: some dozens, each much shorter than the chain.
    """
    return _Lowering(table).run(m)


@final
class _Lowering:
    """Collects operations; parts that are to come lie on a stack."""

    def __init__(self, table: RunTable) -> None:
        self.table = table
        self.done: list[Packed] = []
        # Operations, or a segment: its position, its end, its slots.
        self.todo: list[Packed | tuple[int, End, int]] = []

    def run(self, m: int) -> Schedule:
        """Lower the whole chain."""
        table = self.table
        self.todo = [_pack(Code.DROP, 0), (table.runs.stages, table.loss, m)]
        while self.todo:
            item = self.todo.pop()
            if isinstance(item, tuple):
                self._segment(*item)
            else:
                self.done.append(item)
        operations = np.concatenate(self.done)
        return Schedule(operations)

    def _segment(self, place: int, end: End, m: int) -> None:
        """Follow the right parts of a segment to its end; the left parts come later."""
        table = self.table
        if table.run_at(place) == end[0]:
            self.done.append(self._in_run(place, end, m))
            return
        line = table.whole if end == table.loss else table.line_to(end, place, m)
        while True:
            a = table.run_at(place)
            if a == end[0]:
                inside = a < len(table.runs)
                self.done.append(self._in_run(place, end, m) if inside else _pack(Code.TURN, 0))
                return
            choice = line.choose(place, m)
            stage = table.stage_at(place)
            if choice.peels:
                self._peel(place, end, choice.left, m)
                return
            if choice.left is None:
                self.done.append(_pack(Code.TAPED_FORWARD, stage))
                self.todo.append(_pack(Code.BACKWARD, stage))
            else:
                last = table.stage_of(choice.left)
                self.done.append(sweep(stage, last))
                self.todo.append((place, choice.left, m))
                self.todo.append(_pack(Code.DROP, last))
            place, m = choice.rest, m - choice.slots

    def _peel(self, place: int, end: End, left: End | None, m: int) -> None:
        """Reverse the stages after `left`, the last first, each swept to from the start."""
        assert left is not None
        table, first = self.table, self.table.stage_at(place)
        for stage in range(table.stage_of(end), table.stage_of(left), -1):
            self.done += [
                sweep(first, stage - 1),
                _pack(Code.TAPED_FORWARD, stage),
                _pack(Code.BACKWARD, stage),
                _pack(Code.DROP, stage - 1),
            ]
        self.todo.append((place, left, m))

    def _in_run(self, place: int, end: End, m: int) -> Packed:
        from .lowering_kernel import lower_in_run

        table = self.table
        first, last = table.stage_at(place), table.stage_of(end)
        values, free, limits, seconds = table.in_run(end[0], m)
        length = last - first + 1
        runs = float(values[free, length]) / seconds if seconds > 0 else length * length / 2
        operations = np.empty(2 * round(runs) + 4 * length + 8, dtype=np.int64)
        count = lower_in_run(values, length, free, limits, seconds, operations)
        found: Packed = operations[:count] + (np.int64(first - 1) << _STAGE)
        return found


def sweep(first: int, last: int) -> Packed:
    """Runs of stages first..last that keep the last state alone, packed."""
    stages = np.arange(first, last + 1, dtype=np.int64) << _STAGE
    pairs = np.empty((len(stages), 2), dtype=np.int64)
    pairs[:, 0] = Code.FORWARD | stages
    pairs[1:, 1] = Code.DROP | stages[:-1]  # a state goes when the next has come
    return np.delete(pairs.ravel(), 1)


def _pack(code: Code, stage: int) -> Packed:
    return np.array([code | stage << _STAGE], dtype=np.int64)
