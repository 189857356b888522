"""The tables of the memory-persistent recurrence: least memory, and least seconds.

P(s, t, m) of the chain model: the least seconds of stages s..t, their backward included, when
state s - 1 is there and not counted in m, and the gradient of state t is counted in m. Here m
counts all bytes that checkpoints and tapes of earlier stages leave, so that conditions carry
W(t) (`ChainSizes.later`) and the recurrence's shifts stay as they are:

    E(s,t,m) = P(s,t,m) - seconds of s..t when nothing is run twice
    E(n+1,n+1,m) = 0                                      if m >= turn
    E(s,s,m)     = 0                                      if m >= need(s,s)
    E(s,t,m)     = min of
        E(s+1, t, m - w_t[s])                             if m >= need(s,t)
        min over j = s+1..t of
            u_f[s..j-1] + E(j, t, m - w_a[j-1]) + E(s, j-1, m)
                                                          if m >= W(t) + w_g[t] + sweep(s,j)
    need(s,t)    = max(W(t) + w_g[t] + w_t[s] + o_f[s],
                       W(s) + w_p[s] + w_g[s] + w_t[s] + w_g[s-1] + o_b[s])

With a ledger there is a second way to start a segment (`Starts`): state s - 1, in no tape, is
handed on by tape s - 1, and takes bytes h until stage s is taped. Then need has h in its first
term, sweep(s,j) and E(j, t, m - h - w_a[j-1]) have it, and E(s, j-1, m) starts like (s, t).

Reference: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, RR-9302 (hal-02352969), with the
gradient that a backward consumes, both overheads and parameter gradients counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from .chain_sizes import ChainSizes, Slots

Seconds = npt.NDArray[np.float64]

# More slots than any budget has: "does not fit". Sums of two of them stay within 64 bits.
NEVER = 2**61
# Splits are added and minimised in pieces that stay in a core's second-level cache.
_PIECE_NUMBERS = 64000


@final
@dataclass(frozen=True)
class LeastMemory:
    """The least slots of every segment: the recurrence for feasibility alone.

    slots[start, t] is the least m for which E(s, t, m) is finite, shape (starts, n + 2). In
    bytes (unit 1) it is exact at any size of the chain's numbers.
    """

    sizes: Slots
    slots: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """Least slots of the whole chain."""
        return int(self.slots[1, -1])

    def split(self, start: int, t: int, m: int) -> int:
        """Tape if that fits, else split where the longer part is shortest."""
        if m >= self.taped_need(start, t):
            return 0
        s = int(self.sizes.sizes.starts.stage[start])
        js = np.arange(s + 1, t + 1)
        length = np.maximum(js - s, t - js)
        length[self.split_need(start, t) > m] = NEVER
        return int(js[int(length.argmin())])

    def taped_need(self, start: int, t: int) -> int:
        """Least slots of a segment of several stages if its first is taped."""
        starts = self.sizes.sizes.starts
        s = int(starts.stage[start])
        rest = int(self.sizes.tape[s] + self.slots[starts.after[s], t])
        return max(int(self.sizes.taped_need(t)[start]), rest)

    def split_need(self, start: int, t: int) -> npt.NDArray[np.int64]:
        """Least slots of a segment by its first split j = s+1..t."""
        s = int(self.sizes.sizes.starts.stage[start])
        need: npt.NDArray[np.int64] = self.slots[s + 1 : t + 1, t] + self.sizes.split_takes(
            start, t
        )
        np.maximum(need, self.slots[start, s:t], out=need)
        np.maximum(need, self.sizes.sweep_need(start, t), out=need)
        return need


def least_memory(sizes: Slots) -> LeastMemory:
    """Find the least memory of every segment.

    Args:
        sizes: The chain's sizes, in bytes or slots.

    Returns:
        The table, in O(n**3) additions.
    """
    n, starts = len(sizes.sizes), sizes.sizes.starts
    slots = np.full((len(starts.stage), n + 2), NEVER, dtype=np.int64)
    slots[n + 1, n + 1] = sizes.turn
    least = LeastMemory(sizes, slots)
    tape, after, by_stage = sizes.tape.tolist(), starts.after.tolist(), starts.by_stage
    for t in range(1, n + 2):
        taped = sizes.taped_need(t).tolist()
        for s in range(min(t, n), 0, -1):
            for start in by_stage[s]:
                if s == t:
                    slots[start, t] = taped[start]
                else:
                    best = max(taped[start], tape[s] + int(slots[after[s], t]))
                    slots[start, t] = min(best, int(least.split_need(start, t).min()))
    return least


@final
class Table:
    """Extra seconds of every segment for every number of slots up to `top`.

    The rows (start, s..t) lie side by side, from `_row[start]` on: values[row, m] = E(s, t, m),
    infinite where nothing fits. 4 n**2 (top + 1) bytes, or up to twice that with a ledger.
    """

    def __init__(self, sizes: Slots, top: int) -> None:
        """Fill the table, in about n**3 / 6 * top additions, or up to twice that.

        Args:
            sizes: The chain's sizes in slots.
            top: Largest number of slots of interest.
        """
        self.sizes, self.top = sizes, top
        self._starts = sizes.sizes.starts
        self.n = n = len(sizes.sizes)
        lengths = np.where(self._starts.stage > 0, n + 2 - self._starts.stage, 0)
        self._row = np.concatenate(([0], np.cumsum(lengths)))
        self._values = np.full((int(self._row[-1]), top + 1), np.inf)
        self._seconds = np.cumsum(sizes.sizes.forward_seconds)
        self._least = least_memory(sizes).slots
        self._scratch = np.empty(max(_PIECE_NUMBERS, 8 * (top + 1)))
        self._fill()

    @property
    def least(self) -> int:
        """Least slots of the whole chain; above `top` where nothing fits."""
        return int(self._least[1, self.n + 1])

    @property
    def extra_seconds(self) -> Seconds:
        """Extra seconds of the whole chain by slots, shape (top + 1,)."""
        row: Seconds = self._rows(1, self.n + 1, self.n + 1)[0]
        return row

    def split(self, start: int, t: int, m: int) -> int:
        """The choice of least extra seconds; taping where it is as good as splitting."""
        s = int(self._starts.stage[start])
        taped = np.inf
        if m >= int(self.sizes.taped_need(t)[start]):
            taped = self.taped_seconds(s, t, m - int(self.sizes.tape[s]))
        split = self.split_seconds(start, t, m, m - self.sizes.split_takes(start, t))
        split[self.sizes.sweep_need(start, t) > m] = np.inf
        best = int(split.argmin())
        return 0 if taped <= split[best] else s + 1 + best

    def taped_seconds(self, s: int, t: int, rest: int) -> float:
        """Extra seconds of (s, t) if stage s is taped and `rest` slots are left for the rest."""
        row = self._rows(int(self._starts.after[s]), t, t)[0]
        return float(row[min(rest, self.top)]) if rest >= 0 else np.inf

    def split_seconds(self, start: int, t: int, m: int, rest: npt.NDArray[np.int64]) -> Seconds:
        """Extra seconds of a segment by split j = s+1..t, whatever its sweep needs.

        Args:
            start: How it starts, which says with which stage s.
            t: Last stage.
            m: Slots of the part (s, j - 1).
            rest: Slots of the part (j, t), by j.
        """
        s = int(self._starts.stage[start])
        js = np.arange(s + 1, t + 1)
        seconds: Seconds = self._seconds[s:t] - self._seconds[s - 1]
        seconds += self._values[self._row[js] + t - js, np.clip(rest, 0, self.top)]
        seconds += self._rows(start, s, t - 1)[:, min(m, self.top)]
        seconds[rest < 0] = np.inf
        return seconds

    def _rows(self, start: int, first: int, last: int) -> Seconds:
        zero = int(self._row[start] - self._starts.stage[start])
        rows: Seconds = self._values[zero + first : zero + last + 1]
        return rows

    def _fill(self) -> None:
        n, top, sizes = self.n, self.top, self.sizes
        self._rows(n + 1, n + 1, n + 1)[0, sizes.turn :] = 0.0
        # enough[start]: slots of (s, t) from which on taping all of it fits, so that E = 0.
        enough = np.zeros(len(self._starts.stage), dtype=np.int64)
        enough[n + 1] = sizes.turn
        tape, state = sizes.tape.tolist(), sizes.state.tolist()
        by_stage, after = self._starts.by_stage, self._starts.after.tolist()
        shifted = np.full((n + 2, top + 1), np.inf)  # row j: E(j, t, m - w_a[j-1]) + u_f[1..j-1]
        for t in range(1, n + 2):
            taped = sizes.taped_need(t)
            for s in range(t, 0, -1):
                for start in by_stage[s] if s <= n else ():
                    rest = tape[s] + int(enough[after[s]]) if s < t else 0
                    enough[start] = max(int(taped[start]), rest)
                    self._cell(start, t, int(taped[start]), int(enough[start]), shifted)
                shift = min(state[s - 1], top + 1)
                row = self._rows(s, t, t)[0]
                shifted[s, :shift] = np.inf
                shifted[s, shift:] = row[: top + 1 - shift] + self._seconds[s - 1]

    def _cell(self, start: int, t: int, taped: int, enough: int, shifted: Seconds) -> None:
        """Fill a row: infinite below its least slots, 0 from `enough` on, between by min."""
        row = self._rows(start, t, t)[0]
        row[enough:] = 0.0
        s = int(self._starts.stage[start])
        lo, hi = int(self._least[start, t]), min(enough, self.top + 1)
        if lo >= hi or s == t:
            return
        self._split_cell(start, t, (lo, hi), shifted)
        row[lo:hi] -= self._seconds[s - 1]
        tape = int(self.sizes.tape[s])
        at = max(lo, taped, tape)
        if at < hi:
            rest = self._rows(int(self._starts.after[s]), t, t)[0]
            np.minimum(row[at:hi], rest[at - tape : hi - tape], out=row[at:hi])

    def _split_cell(self, start: int, t: int, span: tuple[int, int], shifted: Seconds) -> None:
        """Minimise over splits; those whose sweep needs more slots join further up."""
        s, handed = int(self._starts.stage[start]), int(self.sizes.handed[start])
        row, needs = self._rows(start, t, t)[0], self.sizes.sweep_need(start, t)
        lo, hi = max(span[0], handed), span[1]
        for j in self.sizes.sizes.free_splits.get(s, ()):
            at = max(lo, int(needs[j - s - 1])) if j <= t else hi
            if at < hi:
                split = self._rows(j, t, t)[0, at - handed : hi - handed] + self._seconds[j - 1]
                split += self._rows(start, j - 1, j - 1)[0, at:hi]
                np.minimum(row[at:hi], split, out=row[at:hi])
        ends = [len(needs)]
        if needs[-1] > lo:  # needs never fall, as a longer sweep includes the shorter
            steps = np.flatnonzero(np.diff(np.maximum(needs, lo))) + 1
            ends = [*(int(x) for x in steps), len(needs)]
        first = 0
        for last in ends:
            at = max(lo, int(needs[last - 1]))
            if at < hi:
                left = shifted[s + 1 + first : s + 1 + last, at - handed : hi - handed]
                right = self._rows(start, s + first, s + last - 1)[:, at:hi]
                _minimum_of_sums(left, right, row[at:hi], self._scratch)
            first = last


def _minimum_of_sums(left: Seconds, right: Seconds, best: Seconds, scratch: Seconds) -> None:
    """Lower `best` to the minimum over k of left[k] + right[k]; scratch spares allocations."""
    count, width = left.shape
    piece = len(scratch) // width
    for k in range(0, count, piece):
        size = min(piece, count - k)
        sums = scratch[: size * width].reshape(size, width)
        np.add(left[k : k + size], right[k : k + size], out=sums)
        np.minimum(best, np.minimum.reduce(sums, axis=0), out=best)


def table_numbers(sizes: ChainSizes, slots: int) -> tuple[float, float]:
    """Numbers that a table holds, and additions that fill it."""
    n = len(sizes)
    starts = (len(sizes.starts.stage) - 2) / n
    return starts * (n + 1) * (n + 2) / 2 * slots, starts * n**3 / 6 * slots
