"""From the recurrence's tables to schedules: every segment is taped or split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from ..schedule import Schedule, ScheduleBuilder
from .chain_sizes import Slots
from .chain_table import LeastMemory, Table


class Choices(Protocol):
    """What the lowering asks: how the schedule of a segment begins."""

    def split(self, start: int, t: int, m: int) -> int:
        """The j at which a segment with m slots splits; 0 where its first stage is taped."""

    @property
    def sizes(self) -> Slots:
        """The sizes that m counts in."""


def lower(choices: Choices, m: int) -> Schedule:
    """Write out the schedule of the whole chain, without recursion.

    Args:
        choices: Where segments split.
        m: Slots of the whole chain.

    Returns:
        A valid schedule, in O(operations) and one choice a segment.
    """
    sizes, starts = choices.sizes, choices.sizes.sizes.starts
    n, tape = len(sizes.sizes), sizes.tape.tolist()
    build = ScheduleBuilder()
    # Entries are (start, t, m) to solve, (0, i, 0) to drop state i, (-1, i, 0) to reverse i.
    todo = [(0, 0, 0), (1, n + 1, m)]
    while todo:
        start, t, m = todo.pop()
        s = int(starts.stage[start])
        if start == 0:
            build.drop_state(t)
        elif start < 0:
            build.backward(t)
        elif s == n + 1:
            build.turn()
        else:
            j = 0 if s == t else choices.split(start, t, m)
            if j:
                build.sweep(s, j - 1)
                takes = int(sizes.split_takes(start, t)[j - s - 1])
                todo += [(start, j - 1, m), (0, j - 1, 0), (j, t, m - takes)]
            else:
                build.tape(s)
                todo.append((-1, s, 0))
                if s < t:
                    todo.append((int(starts.after[s]), t, m - tape[s]))
    return build.build()


@final
@dataclass(frozen=True)
class Guided:
    """Choices that fit in bytes, of the least seconds that a rounded table knows for them.

    A segment takes what the exact table of least memory allows in m bytes; which of that, the
    table of slots decides. So every budget from the least on has a schedule without overrun.
    """

    least: LeastMemory
    """In bytes."""
    table: Table
    """In slots."""
    optimism: float = 1.0
    """Bytes count this much in the table: it rounds, and what it refuses may fit after all."""

    @property
    def sizes(self) -> Slots:
        """Bytes."""
        return self.least.sizes

    def split(self, start: int, t: int, m: int) -> int:
        """The choice that fits in m bytes and has the least seconds in the table."""
        sizes, scale = self.sizes, self.optimism / self.table.sizes.unit
        s = int(sizes.sizes.starts.stage[start])
        taped = np.inf
        if m >= self.least.taped_need(start, t):
            rest = round((m - int(sizes.tape[s])) * scale)
            taped = self.table.taped_seconds(s, t, rest)
        rests = np.rint((m - sizes.split_takes(start, t)) * scale).astype(np.int64)
        seconds = self.table.split_seconds(start, t, round(m * scale), rests)
        seconds[self.least.split_need(start, t) > m] = np.inf
        best = int(seconds.argmin())
        if np.isinf(min(taped, seconds[best])):  # near the least memory slots are too coarse
            return self.least.split(start, t, m)
        return 0 if taped <= seconds[best] else s + 1 + best
