"""From the recurrence's tables to schedules: every segment is taped or split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from ..schedule import Schedule, ScheduleBuilder
from .chain_sizes import Slots
from .chain_table import LeastMemory, Table, kept_states, split_need


class Choices(Protocol):
    """What the lowering asks: how the schedule of a segment begins."""

    def split(self, s: int, t: int, m: int) -> int:
        """The j at which segment (s, t) with m slots splits; 0 where stage s is taped."""

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
    n = len(choices.sizes.sizes)
    tape = choices.sizes.tape.tolist()
    build = ScheduleBuilder()
    # Entries are (s, t, m) to solve, (0, i, 0) to drop state i, (-1, i, 0) to reverse stage i.
    todo = [(0, 0, 0), (1, n + 1, m)]
    while todo:
        s, t, m = todo.pop()
        if s == 0:
            build.drop_state(t)
        elif s < 0:
            build.backward(t)
        elif s == n + 1:
            build.turn()
        else:
            j = 0 if s == t else choices.split(s, t, m)
            if j:
                build.sweep(s, j - 1)
                kept = int(kept_states(choices.sizes, s, t)[j - s - 1])
                todo += [(s, j - 1, m), (0, j - 1, 0), (j, t, m - kept)]
            else:
                build.tape(s)
                todo.append((-1, s, 0))
                if s < t:
                    todo.append((s + 1, t, m - tape[s]))
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

    def split(self, s: int, t: int, m: int) -> int:
        """The choice that fits in m bytes and has the least seconds in the table."""
        sizes, scale = self.sizes, self.optimism / self.table.sizes.unit
        taped, tapes = np.inf, m >= self.least.taped_need(s, t)
        if tapes:
            rest = round((m - int(sizes.tape[s])) * scale)
            taped = self.table.taped_seconds(s, t, rest)
        rests = np.rint((m - kept_states(sizes, s, t)) * scale).astype(np.int64)
        seconds = self.table.split_seconds(s, t, round(m * scale), rests)
        seconds[split_need(sizes, self.least.slots, s, t) > m] = np.inf
        best = int(seconds.argmin())
        if np.isinf(min(taped, seconds[best])):  # near the least memory slots are too coarse
            return self.least.split(s, t, m)
        return 0 if taped <= seconds[best] else s + 1 + best
