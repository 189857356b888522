"""From the recurrence's tables to schedules: every segment is taped or split.

The choices are made in exact bytes. A segment takes what the table of least memory allows in the
bytes that are left for it; which of that, the table of seconds decides, though it counts in slots.
So every budget from the least on has a schedule, and none overruns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from ...base.jit import suited
from ...schedule.language import Schedule, ScheduleBuilder
from . import traceback_kernel as chain_walk
from .sizes import ChainSizes
from .tables import LeastMemory, Table


@final
@dataclass(frozen=True, eq=False)
class Outline:
    """A schedule before its operations are written out."""

    events: npt.NDArray[np.int64]
    """What to do, as `traceback_kernel.walk` writes it, shape (events, 3)."""
    extra_seconds: float
    """What it takes longer than when nothing is run twice and every tape is the fastest."""

    def build(self) -> Schedule:
        """Write the operations out."""
        build = ScheduleBuilder()
        for what, first, last in self.events.tolist():
            if what == chain_walk.SWEEP:
                build.sweep(first, last)
            elif what == chain_walk.TAPE:
                build.tape(first, last)
            elif what == chain_walk.TURN:
                build.turn()
            elif what == chain_walk.BACKWARD:
                build.backward(first)
            else:
                build.drop_state(first)
        return build.build()


def fastest_outline(sizes: ChainSizes) -> Outline:
    """Tape every stage by its fastest option, run nothing twice."""
    n, tapings = len(sizes), sizes.tapings
    events = np.zeros((2 * n + 2, 3), dtype=np.int64)
    events[:n, 0], events[:n, 1] = chain_walk.TAPE, np.arange(1, n + 1)
    free = np.flatnonzero((tapings.extra_seconds == 0) & (tapings.start <= n))[::-1]
    events[tapings.start[free] - 1, 2] = tapings.option[free]  # the first of equals
    events[n, 0] = chain_walk.TURN
    events[n + 1 : -1, 0], events[n + 1 : -1, 1] = chain_walk.BACKWARD, np.arange(n, 0, -1)
    events[-1, 0] = chain_walk.DROP
    return Outline(events, 0.0)


def outline(
    least: LeastMemory, size: int, table: Table | None = None, scale: float = 1.0
) -> Outline:
    """Choose for every segment what fits and takes least, from the whole chain down.

    Args:
        least: Least memory in bytes.
        size: Bytes of the whole chain, no fewer than its least.
        table: What a segment takes. Where there is none or it knows of nothing that fits, as
            may be near the least memory, a segment is taped if that fits, else split where its
            longer part is shortest.
        scale: Bytes count this much where the table is looked up. It rounds so that too much
            fits; a little less than 1 makes up for that.

    Returns:
        An outline, in one look at the splits of each of at most 2 n segments.
    """
    sizes = least.sizes
    events = np.empty((4 * len(sizes) + 2, 3), dtype=np.int64)
    if table is None:
        rows, values = np.zeros((1, 1, 3), np.int64), np.zeros(0, np.float32)
        seconds, extra = np.cumsum(sizes.forward_seconds), sizes.tapings.extra_seconds
        slots, top = least.slots, -1
    else:
        rows, values, slots, top = table.rows, table.values, table.slots, table.top
        seconds, extra = table.seconds, table.extra
    lookup = (values, rows, slots.up, slots.unit, seconds, extra, top, scale)
    guide = chain_walk.Guide(least.slots, least.least, *lookup)
    walk = suited(chain_walk.walk, len(sizes) ** 2)
    count, total = walk(guide, size, events)
    return Outline(events[:count], total if table is None else table.unscaled(total))
