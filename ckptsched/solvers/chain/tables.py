"""The tables of the memory-persistent recurrence: least memory, and least seconds.

P(s, t, m) of the chain model: the least seconds of stages s..t, their backward included, when
state s - 1 is there and not counted in m, and the gradient of state t is counted in m. Here m
counts all bytes that checkpoints and tapes of earlier stages leave, so that conditions carry
W(t) (`ChainSizes.later`) and the recurrence's shifts stay as they are:

    E(s,t,m) = P(s,t,m) - seconds of s..t when nothing is run twice and every tape is the fastest
    E(n+1,n+1,m) = 0                                      if m >= turn
    E(s,s,m)     = min over the tapes of stage s of
        extra seconds                                     if m >= need(s,s)
    E(s,t,m)     = min of
        min over the tapes of stage s of
            extra seconds + E(s+1, t, m - w_t[s])         if m >= need(s,t)
        min over j = s+1..t of
            u_f[s..j-1] + E(j, t, m - w_a[j-1]) + E(s, j-1, m)
                                                          if m >= W(t) + w_g[t] + sweep(s,j)
    need(s,t)    = max(W(t) + w_g[t] + w_t[s] + o_f[s],
                       W(s) + w_p[s] + w_g[s] + w_t[s] + w_g[s-1] + o_b[s])

With a ledger there are other ways to start a segment (`Starts`): what of state s - 1 is in no tape
is handed on by tape s - 1, and takes bytes h until stage s is taped. Then need has h in its first
term, sweep(s,j) and E(j, t, m - h - w_a[j-1]) have it, and E(s, j-1, m) starts like (s, t).

Reference: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, RR-9302 (hal-02352969), with the
gradient that a backward consumes, both overheads and parameter gradients counted.

Counted in slots (`Slots`), whatever fits in bytes fits, so that E is a lower bound of the
seconds in bytes. In 32-bit floats each number is off by a few units in its last place for every
stage that it covers: `Table.bound` takes that off.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from ...base.budget import format_bytes
from ...base.jit import count_steps, is_interpreted, suited
from ...base.progress import report
from . import table_kernel as chain_kernel
from .sizes import ChainSizes, Slots, slots_of

# Stages along the side of a tile: 256 rows of 500 slots take half of a second-level cache.
_TILE = 16
# Tiles between two looks at the progress, and for Ctrl-C: some hundredths of a second.
_TILES_AT_ONCE = 4
# Less work than this is done before a second thread has started.
_ADDITIONS_ALONE = 3e9
_THREADS = 2
# Steps of the interpreter that a split takes by numpy, and more of them for every slot.
_SPLIT, _SLOT = 10.0, 0.001
# Ends of segments between two looks, while least memory is found.
_ENDS_AT_ONCE = 16


@final
@dataclass(frozen=True)
class LeastMemory:
    """What every segment needs: the recurrence for feasibility alone.

    In bytes (a unit of 1) it is exact at any size of the chain's numbers.
    """

    sizes: ChainSizes
    slots: Slots
    least: npt.NDArray[np.int64]
    """The least slots for which E(s, t, m) is finite, by start and t, shape (starts, n + 2)."""
    enough: npt.NDArray[np.int64]
    """The slots from which on E(s, t, m) is 0, in the same shape."""

    @property
    def total(self) -> int:
        """Least slots of the whole chain."""
        return int(self.least[1, -1])


def least_memory(sizes: ChainSizes, unit: int = 1, *, nearest: bool = False) -> LeastMemory:
    """Find the least memory of every segment.

    Args:
        sizes: The chain's sizes.
        unit: Bytes of a slot.
        nearest: Whether sizes are rounded to the nearest slot.

    Returns:
        The table, in O(n**3) additions.
    """
    n, slots = len(sizes), slots_of(sizes, unit, nearest=nearest)
    shape = (len(sizes.starts.stage), n + 2)
    found = LeastMemory(sizes, slots, np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    free = sizes.tapings.extra_seconds == 0
    kernel = suited(chain_kernel.least_slots, table_splits(sizes))
    for first in range(1, n + 2, _ENDS_AT_ONCE):
        last = min(first + _ENDS_AT_ONCE - 1, n + 1)
        kernel(slots, first, last, free, found.least, found.enough)
        report(f"least memory of {n} stages", (last / (n + 1)) ** 3)
    return found


@final
class Table:
    """Extra seconds of every segment for every number of slots up to `top`.

    A row is kept from its least slots to those from which on it is 0.
    """

    def __init__(
        self,
        sizes: ChainSizes,
        unit: int,
        top_bytes: int,
        *,
        exact: bool = False,
        nearest: bool = False,
    ) -> None:
        """Fill the table, in less than starts * n**2 / 6 * slots additions.

        Args:
            sizes: The chain's sizes.
            unit: Bytes of a slot.
            top_bytes: Largest number of bytes of interest.
            exact: Keep 64-bit floats instead of 32-bit ones.
            nearest: Round sizes to the nearest slot, instead of so that whatever fits fits; then
                its numbers bound nothing.
        """
        needs = least_memory(sizes, unit, nearest=nearest)
        self.sizes, self.slots = sizes, needs.slots
        self.top = self.slots.columns(top_bytes)
        self.rows, numbers = _laid_out(needs, self.top)
        # Times are scaled by a power of two, which rounds nothing, so that none is too large or
        # too small for a 32-bit float.
        total = math.fsum(sizes.forward_seconds) + math.fsum(sizes.tapings.extra_seconds)
        self._scale = 2.0 ** -math.frexp(total)[1]
        self.seconds = np.cumsum(sizes.forward_seconds) * self._scale
        self.extra = sizes.tapings.extra_seconds * self._scale
        dtype = np.float64 if exact else np.float32
        self.values: npt.NDArray[Any] = np.empty(numbers, dtype)
        self._fill()

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return int(self.values.nbytes)

    @property
    def least(self) -> int:
        """Least slots of the whole chain; above `top` where nothing fits."""
        return int(self.rows[1, -1, 1])

    def extra_seconds(self, size: int) -> float:
        """E of the whole chain as computed; infinite where nothing fits.

        Args:
            size: Bytes.
        """
        return float(self.row(1, len(self.sizes) + 1)[min(self.slots.columns(size), self.top)])

    def unscaled(self, seconds: float) -> float:
        """Seconds in which the table counts, in seconds."""
        return seconds / self._scale

    def row(self, start: int, t: int) -> npt.NDArray[np.float64]:
        """E(start, t, m) by slots m = 0..top."""
        zero, least, end = (int(x) for x in self.rows[start, t])
        found = np.zeros(self.top + 2)
        found[:least] = np.inf
        found[least:end] = self.values[zero + least : zero + end]
        found /= self._scale
        return found[: self.top + 1]

    @property
    def error(self) -> tuple[float, float]:
        """How much a number may be too large: relative, and absolute in the table's seconds.

        A number in the table is a sum of seconds, none negative. Each stage of the segment adds
        three roundings at most (the seconds of a sweep, and two sums), so that it is at most
        (1 + e)**(3 n + 3) times the true one, with half a unit in the last place for e. The
        running sum of u_f adds an error of n units of the total for each of n sweeps.
        """
        n = len(self.sizes)
        relative = (3 * n + 3) * float(np.finfo(self.values.dtype).eps) / 2
        absolute = (n + 1) ** 2 * float(np.finfo(np.float64).eps) * float(self.seconds[-1])
        return relative, absolute

    def bound(self, size: int) -> float:
        """What no schedule in so many bytes is below, in seconds more than the fastest.

        Args:
            size: Bytes.
        """
        relative, absolute = self.error
        found = self.extra_seconds(size) * math.exp(-relative)
        return max(0.0, found - self.unscaled(absolute))

    def _fill(self) -> None:
        n, top = len(self.sizes), self.top
        self.values[: top + 2] = 0
        self.values[top + 2 : 2 * top + 4] = np.inf
        model = self.slots, self.seconds, self.extra, top
        steps = table_splits(self.sizes) * (_SPLIT + top * _SLOT)
        if is_interpreted(chain_kernel.fill, steps):
            count_steps(chain_kernel.fill, steps)
            chain_kernel.fill_by_rows(self.values, self.rows, *model)
            return
        cut = np.empty(self.rows.shape[:2], dtype=np.int64)

        def fill(tiles: npt.NDArray[np.int64]) -> None:
            chain_kernel.fill(self.values, self.rows, cut, *model, _TILE, tiles)

        what = f"table of {n} stages and {top} slots, {format_bytes(self.nbytes)}"
        report(what, 0.0)
        side = -(-(n + 1) // _TILE)
        is_long = table_splits(self.sizes) * top > _ADDITIONS_ALONE
        pool = ThreadPoolExecutor(_THREADS) if is_long and (os.cpu_count() or 1) > 1 else None
        try:
            done = 0
            for apart in range(side):  # tiles as far apart are independent of each other
                first = 1 + _TILE * np.arange(side - apart)
                tiles = np.stack((first, first + _TILE * apart), axis=1)
                parts = (
                    tiles[k : k + _TILES_AT_ONCE] for k in range(0, len(tiles), _TILES_AT_ONCE)
                )
                for _ in pool.map(fill, parts) if pool else map(fill, parts):
                    pass
                done += (apart + 1) * len(tiles)
                report(what, 6 * done / (side * (side + 1) * (side + 2)))
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)


def _laid_out(needs: LeastMemory, top: int) -> tuple[npt.NDArray[np.int64], int]:
    """Where rows lie, and how many numbers they take, zeros and infinities included.

    A row that does not end before `top` has a number for one slot more.
    """
    stage, n = needs.slots.stage, len(needs.sizes)
    end = np.where(needs.enough > top, top + 2, needs.enough)
    least = np.where(needs.least > top, end, needs.least)
    is_segment = (stage[:, None] >= 1) & (stage[:, None] <= np.arange(n + 2)[None, :])
    widths = np.where(is_segment, end - least, 0)
    before = 2 * (top + 2) + np.cumsum(widths.ravel()) - widths.ravel()
    rows = np.stack((before.reshape(widths.shape) - least, least, end), axis=2)
    return rows, 2 * (top + 2) + int(widths.sum())


def table_numbers(needs: LeastMemory, top: int) -> float:
    """Numbers in the rows of a table in bytes; divided by a unit, of one in slots.

    Args:
        needs: Least memory in bytes.
        top: The largest number of bytes.
    """
    end = np.minimum(needs.enough, top)
    width = np.maximum(end - needs.least, 0)
    stage, t = needs.slots.stage[:, None], np.arange(len(needs.sizes) + 2)[None, :]
    return float(width[(stage >= 1) & (stage <= t)].sum(dtype=np.float64))


def table_splits(sizes: ChainSizes) -> float:
    """How many splits all segments have together: each takes an addition for each slot."""
    n = len(sizes)
    return (len(sizes.starts.stage) - 2) * n**2 / 6
