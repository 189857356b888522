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

Reference: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, RR-9302 (hal-02352969), with the
gradient that a backward consumes, both overheads and parameter gradients counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from .chain_sizes import ChainSizes, Slots

# More slots than any budget has: "does not fit". Sums of two of them stay within 64 bits.
NEVER = 2**61
# Splits are added and minimised in pieces that stay in a core's second-level cache.
_PIECE_NUMBERS = 64000


@final
@dataclass(frozen=True)
class LeastMemory:
    """The least slots of every segment: the recurrence for feasibility alone.

    slots[s, t] is the least m for which E(s, t, m) is finite, shape (n + 2, n + 2). In bytes
    (unit 1) it is exact at any size of the chain's numbers.
    """

    sizes: Slots
    slots: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """Least slots of the whole chain."""
        return int(self.slots[1, -1])

    def split(self, s: int, t: int, m: int) -> int:
        """Tape if that fits, else split where the longer part is shortest."""
        if m >= self.taped_need(s, t):
            return 0
        js = np.arange(s + 1, t + 1)
        length = np.maximum(js - s, t - js)
        length[split_need(self.sizes, self.slots, s, t) > m] = NEVER
        return int(js[int(length.argmin())])

    def taped_need(self, s: int, t: int) -> int:
        """Least slots of (s, t) if stage s is taped."""
        rest = int(self.sizes.tape[s] + self.slots[s + 1, t])
        return max(int(self.sizes.taped_need(t)[s]), rest)


def kept_states(sizes: Slots, s: int, t: int) -> npt.NDArray[np.int64]:
    """Slots that state j - 1 takes while it is kept in (s, t), by split j = s+1..t."""
    kept = sizes.state[s:t]
    free = [j for j in sizes.sizes.free_splits.get(s, ()) if j <= t]
    if free:
        kept = kept.copy()
        kept[np.array(free) - s - 1] = 0
    return kept


def split_need(sizes: Slots, slots: npt.NDArray[np.int64], s: int, t: int) -> npt.NDArray[np.int64]:
    """Least slots of (s, t) by the first split j = s+1..t."""
    need: npt.NDArray[np.int64] = slots[s + 1 : t + 1, t] + kept_states(sizes, s, t)
    np.maximum(need, slots[s, s:t], out=need)
    np.maximum(need, sizes.sweep_need(s, t), out=need)
    return need


def least_memory(sizes: Slots) -> LeastMemory:
    """Find the least memory of every segment.

    Args:
        sizes: The chain's sizes, in bytes or slots.

    Returns:
        The table, in O(n**3) additions and 8 (n + 2)**2 bytes.
    """
    n = len(sizes.sizes)
    slots = np.full((n + 2, n + 2), NEVER, dtype=np.int64)
    slots[n + 1, n + 1] = sizes.turn
    tape = sizes.tape.tolist()
    for t in range(1, n + 2):
        taped = sizes.taped_need(t).tolist()
        if t <= n:
            slots[t, t] = taped[t]
        for s in range(t - 1, 0, -1):
            best = max(taped[s], tape[s] + int(slots[s + 1, t]))
            slots[s, t] = min(best, int(split_need(sizes, slots, s, t).min()))
    return LeastMemory(sizes, slots)


@final
class Table:
    """Extra seconds of every segment for every number of slots up to `top`.

    Row (s, t) starts at `_row[s] + t - s`, so that the rows (s, s..t) lie side by side:
    values[row, m] = E(s, t, m), infinite where nothing fits. 8 (n+1)(n+2)/2 (top+1) bytes.
    """

    def __init__(self, sizes: Slots, top: int) -> None:
        """Fill the table, in about n**3 / 6 * top additions.

        Args:
            sizes: The chain's sizes in slots.
            top: Largest number of slots of interest.
        """
        self.sizes, self.top = sizes, top
        self.n = n = len(sizes.sizes)
        lengths = np.arange(n + 1, 0, -1)
        self._row = np.concatenate(([0, 0], np.cumsum(lengths)))
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
    def extra_seconds(self) -> npt.NDArray[np.float64]:
        """Extra seconds of the whole chain by slots, shape (top + 1,)."""
        row: npt.NDArray[np.float64] = self._rows(1, self.n + 1, self.n + 1)[0]
        return row

    def split(self, s: int, t: int, m: int) -> int:
        """The choice of least extra seconds; taping where it is as good as splitting."""
        taped = np.inf
        if m >= int(self.sizes.taped_need(t)[s]):
            taped = self.taped_seconds(s, t, m - int(self.sizes.tape[s]))
        split = self.split_seconds(s, t, m, m - kept_states(self.sizes, s, t))
        split[self.sizes.sweep_need(s, t) > m] = np.inf
        best = int(split.argmin())
        return 0 if taped <= split[best] else s + 1 + best

    def taped_seconds(self, s: int, t: int, rest: int) -> float:
        """Extra seconds of (s, t) if stage s is taped and `rest` slots are left for the rest."""
        return float(self._rows(s + 1, t, t)[0, min(rest, self.top)]) if rest >= 0 else np.inf

    def split_seconds(
        self, s: int, t: int, m: int, rest: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Extra seconds of (s, t) by split j = s+1..t, whatever its sweep needs.

        Args:
            s: First stage.
            t: Last stage.
            m: Slots of the part (s, j - 1).
            rest: Slots of the part (j, t), by j.
        """
        js = np.arange(s + 1, t + 1)
        seconds: npt.NDArray[np.float64] = self._seconds[s:t] - self._seconds[s - 1]
        seconds += self._values[self._row[js] + t - js, np.clip(rest, 0, self.top)]
        seconds += self._rows(s, s, t - 1)[:, min(m, self.top)]
        seconds[rest < 0] = np.inf
        return seconds

    def _rows(self, s: int, first: int, last: int) -> npt.NDArray[np.float64]:
        start = int(self._row[s]) - s
        return self._values[start + first : start + last + 1]

    def _fill(self) -> None:
        n, top, sizes = self.n, self.top, self.sizes
        self._rows(n + 1, n + 1, n + 1)[0, sizes.turn :] = 0.0
        # enough[s]: slots of (s, t) from which on taping all of it fits, so that E = 0.
        enough = [0] * (n + 2)
        enough[n + 1] = sizes.turn
        tape, state = sizes.tape.tolist(), sizes.state.tolist()
        shifted = np.full((n + 2, top + 1), np.inf)  # row j: E(j, t, m - w_a[j-1]) + u_f[1..j-1]
        for t in range(1, n + 2):
            taped = sizes.taped_need(t).tolist()
            for s in range(t, 0, -1):
                if s <= n:
                    rest = tape[s] + enough[s + 1] if s < t else 0
                    enough[s] = max(taped[s], rest)
                    self._cell(s, t, taped[s], enough[s], shifted)
                shift = state[s - 1]
                row = self._rows(s, t, t)[0]
                shifted[s, :shift] = np.inf
                if shift <= top:
                    shifted[s, shift:] = row[: top + 1 - shift] + self._seconds[s - 1]

    def _cell(
        self, s: int, t: int, taped: int, enough: int, shifted: npt.NDArray[np.float64]
    ) -> None:
        """Fill row (s, t): infinite below its least slots, 0 from `enough` on, between by min."""
        row = self._rows(s, t, t)[0]
        row[enough:] = 0.0
        lo, hi = int(self._least[s, t]), min(enough, self.top + 1)
        if lo >= hi or s == t:
            return
        best = row[lo:hi]
        self._split_cell(s, t, lo, hi, shifted)
        best -= self._seconds[s - 1]
        tape = int(self.sizes.tape[s])
        start = max(lo, taped, tape)
        if start < hi:
            rest = self._rows(s + 1, t, t)[0]
            np.minimum(row[start:hi], rest[start - tape : hi - tape], out=row[start:hi])

    def _split_cell(
        self, s: int, t: int, lo: int, hi: int, shifted: npt.NDArray[np.float64]
    ) -> None:
        """Minimise over splits; those whose sweep needs more slots join further up."""
        needs = self.sizes.sweep_need(s, t)
        row = self._rows(s, t, t)[0]
        for j in self.sizes.sizes.free_splits.get(s, ()):
            if j <= t:
                at = max(lo, int(needs[j - s - 1]))
                split = self._rows(j, t, t)[0, at:hi] + self._rows(s, j - 1, j - 1)[0, at:hi]
                np.minimum(row[at:hi], split + self._seconds[j - 1], out=row[at:hi])
        ends = [len(needs)]
        if needs[-1] > lo:  # needs never fall, as a longer sweep includes the shorter
            steps = np.flatnonzero(np.diff(np.maximum(needs, lo))) + 1
            ends = [*(int(x) for x in steps), len(needs)]
        first = 0
        for last in ends:
            at = max(lo, int(needs[last - 1]))
            if at < hi:
                left = shifted[s + 1 + first : s + 1 + last, at:hi]
                right = self._rows(s, s + first, s + last - 1)[:, at:hi]
                _minimum_of_sums(left, right, row[at:hi], self._scratch)
            first = last


def _minimum_of_sums(
    left: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
    best: npt.NDArray[np.float64],
    scratch: npt.NDArray[np.float64],
) -> None:
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
    return (n + 1) * (n + 2) / 2 * slots, n**3 / 6 * slots
