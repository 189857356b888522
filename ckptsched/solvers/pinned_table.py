"""A lower bound on every pinned schedule of a chain, by a recurrence.

R(s, t, m) bounds from below the extra seconds, over running every stage once, of any schedule
that reverses the stages s..t (t = n + 1: the loss) in m bytes. State s - 1 is there and not
counted. With e(t) bytes beside the segment until Backward(t), and u(a, b) the seconds of the
stages a..b without tape, R is the least of

    R(s + 1, t, m - w_t[s])                             where tape s fits first and last
    u(s, z) + [l < z] u(l + 1, z) + R(z + 1, t, m - min(w_a[l..z])) + R(s, z, m)
                                                        s <= l <= z < t, where s..z can be swept

The first is that of the memory-persistent recurrence (Beaumont et al., RR-9302); the second
allows for every way in which the checkpoint below stage z + 1 may change while the stages above
are reversed. Statement and proof are in docs/theory.md. Where states never grow, only l = z
matters, and R is the persistent optimum.
"""

from __future__ import annotations

import functools
from typing import Final, final

import numpy as np

from ..compiled import compiled
from ..progress import report
from .pinned_sizes import Bytes, PinnedSizes, Seconds, relaxed_level

_NO_STATE = np.iinfo(np.int64).max


@final
class PinnedTable:
    """R for all segments and all numbers of slots up to `top`, sizes rounded down."""

    def __init__(
        self, sizes: PinnedSizes, top: int, unit: int = 1, *, level: Bytes | None = None
    ) -> None:
        """Fill the table: n**3 / 3 * top additions, 4 n**2 * top bytes.

        Args:
            sizes: The chain's sizes in bytes.
            top: Largest number of slots of interest.
            unit: Bytes of a slot.
            level: e(t), by t; by default what lemma 3 of docs/theory.md gives.
        """
        self.unit: Final = unit
        self.n: Final = len(sizes.state) - 1
        n = self.n
        self.offset = np.cumsum([0, 0, *range(n + 1, 0, -1)])
        self.rows = np.full((int(self.offset[n + 1]) + 1, top + 1), np.inf)
        self.rows[-1, sizes.turn // unit :] = 0.0
        level = relaxed_level(sizes) if level is None else level
        seconds = np.cumsum(sizes.forward_seconds)
        scratch = np.empty((n + 2, top + 1))
        lowest = np.empty(n + 2, dtype=np.int64)
        for t in range(1, n + 2):
            report(f"lower bound over all schedules of {n} stages", ((t - 1) / (n + 1)) ** 3)
            lowest[:] = _NO_STATE
            _fill_column(
                t, int(level[t]), unit, sizes, seconds, self.offset, self.rows, scratch, lowest
            )

    def row(self, s: int, t: int) -> Seconds:
        """R(s, t, m) by slots m."""
        row: Seconds = self.rows[self.offset[s] + t - s]
        return row

    @functools.cached_property
    def extra_seconds(self) -> Seconds:
        """R of the whole chain by slots."""
        return self.row(1, self.n + 1)


@compiled
def _fill_column(
    t: int,
    level: int,
    unit: int,
    sizes: PinnedSizes,
    seconds: Seconds,
    offset: Bytes,
    values: Seconds,
    shifted: Seconds,
    lowest: Bytes,
) -> None:
    """Rows (s, t) for all s; shifted[z] is the best over l of what follows a split at z."""
    n, top = len(sizes.state) - 1, values.shape[1] - 1
    for s in range(min(t, n), 0, -1):
        row = values[offset[s] + t - s]
        for k in range(sizes.first_tape[s], sizes.first_tape[s + 1]):
            need = max(level + sizes.taped[k], sizes.backward[k]) // unit
            extra = sizes.tape_seconds[k]
            if s == t:
                for m in range(need, top + 1):
                    row[m] = min(row[m], extra)
            else:
                w = sizes.tape[k] // unit
                rest = values[offset[s + 1] + t - s - 1]
                for m in range(max(need, w), top + 1):
                    row[m] = min(row[m], extra + rest[m - w])
        if s == t:
            continue
        for z in range(s, min(t, n) if s < n else t):
            if sizes.state[s] < lowest[z]:
                lowest[z] = sizes.state[s]
                rest = values[offset[z + 1] + t - z - 1]
                _charge(shifted[z], rest, sizes.state[s] // unit, seconds[z] - seconds[s], z == s)
        end = top + 1
        while end > 0 and row[end - 1] == 0.0:
            end -= 1
        swept = 0
        for z in range(s, t):
            alone = sizes.forward[z] + level
            swept = max(swept, alone + sizes.state[z - 1] if z > s else alone)
            sweep = seconds[z] - seconds[s - 1]
            below, above = values[offset[s] + z - s], shifted[z]
            for m in range(swept // unit, end):
                value = below[m] + above[m] + sweep
                row[m] = value if value < row[m] else row[m]


@compiled
def _charge(best: Seconds, rest: Seconds, slots: int, again: float, is_first: bool) -> None:
    """best[m] = min(best[m], rest[m - slots] + again), or the latter alone at first."""
    if is_first:
        best[:] = np.inf
    for m in range(slots, len(best)):
        value = rest[m - slots] + again
        best[m] = value if value < best[m] else best[m]
