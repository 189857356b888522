"""What no pinned schedule of a chain beats, for any number of budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..workload import Chain
from .pinned_sizes import (
    Bytes,
    PinnedSizes,
    pinned_sizes,
    relaxed_level,
    with_fastest_runs,
)
from .pinned_table import PinnedTable

# A table takes at most 320 MB and some two seconds.
_MOST_NUMBERS = 4e7
_MOST_ADDITIONS = 3e9
_MOST_SLOTS = 4000
# A bound of few slots says nothing.
_FEWEST_SLOTS = 20


def pinned_lower_bounds(chain: Chain, budgets: Sequence[int]) -> list[float]:
    """Seconds that no pinned schedule of the planning model beats, for each budget.

    Budgets between two powers of two share a table. For a chain with a ledger, and for one too
    long for a table, the bound is what storing everything takes: it holds for all schedules.

    Args:
        chain: The chain.
        budgets: Bytes, in any order.

    Returns:
        Seconds; infinite where no pinned schedule fits.
    """
    base = chain.store_all_seconds
    bounds = dict.fromkeys(budgets, base)
    if chain.has_ledger:
        return [base for _ in budgets]
    sizes = with_fastest_runs(pinned_sizes(chain))
    groups: dict[int, list[int]] = {}
    for budget in bounds:
        groups.setdefault((budget - sizes.fixed).bit_length(), []).append(budget)
    for group in groups.values():
        free = [budget - sizes.fixed for budget in group]
        if max(free) < 0:
            bounds |= dict.fromkeys(group, math.inf)
        elif (table := _affordable_table(sizes, max(free))) is not None:
            extra = table.extra_seconds
            seconds = [base + float(extra[m // table.unit]) if m >= 0 else math.inf for m in free]
            bounds |= dict(zip(group, seconds, strict=True))
    return [bounds[budget] for budget in budgets]


def pinned_table(sizes: PinnedSizes, top_bytes: int, *, level: Bytes | None = None) -> PinnedTable:
    """A table up to so many bytes, as fine as its limits allow: exact where it can be.

    Args:
        sizes: The chain's sizes.
        top_bytes: The largest budget of interest, without what is always there.
        level: As in `PinnedTable`.
    """
    unit = slot_bytes(sizes, top_bytes, max(_slots(sizes), 1))
    return PinnedTable(sizes, top_bytes // unit, unit, level=level)


def _affordable_table(sizes: PinnedSizes, top_bytes: int) -> PinnedTable | None:
    return pinned_table(sizes, top_bytes) if _slots(sizes) >= _FEWEST_SLOTS else None


def _slots(sizes: PinnedSizes) -> int:
    """Slots that a table may have."""
    n = len(sizes.state) - 1
    rows, additions = (n + 1) * (n + 2) / 2, (n + 1) ** 3 / 3
    return int(min(_MOST_SLOTS, _MOST_NUMBERS / rows, _MOST_ADDITIONS / additions))


def slot_bytes(sizes: PinnedSizes, top_bytes: int, slots: int) -> int:
    """Bytes of a slot: what divides all sizes, where so many slots reach the top, else more.

    Args:
        sizes: The chain's sizes.
        top_bytes: The largest budget of interest, without what is always there.
        slots: The most slots that a table may have.
    """
    columns = (sizes.state, sizes.forward, sizes.level, sizes.tape, sizes.taped, sizes.backward)
    numbers = np.unique(np.concatenate(columns))
    divisor = math.gcd(sizes.turn, *(int(x) for x in numbers)) or 1
    return divisor if top_bytes // divisor < slots else -(-top_bytes // slots)


def least_pinned_bytes(sizes: PinnedSizes) -> int:
    """Bytes below which no pinned schedule fits: the recurrence of `pinned_table` for memory.

    Args:
        sizes: The chain's sizes, of some dozen stages at most: n**3 steps, not compiled.
    """
    least = least_bytes_of_segments(sizes, relaxed_level(with_fastest_runs(sizes)))
    return sizes.fixed + int(least[1, -1])


def least_bytes_of_segments(sizes: PinnedSizes, level: Bytes) -> Bytes:
    """The same for every segment.

    Args:
        sizes: The chain's sizes.
        level: e(t), by t, as in `PinnedTable`.

    Returns:
        Bytes that stages s..t need at least, at [s, t], shape (n + 2, n + 2).
    """
    sizes = with_fastest_runs(sizes)
    n = len(sizes.state) - 1
    least = np.zeros((n + 2, n + 2), dtype=np.int64)
    least[n + 1, n + 1] = sizes.turn
    for t in range(1, n + 2):
        for s in range(min(t, n), 0, -1):
            need = _least_with_tape(sizes, level, least, s, t)
            swept = 0
            for z in range(s, t):
                before = int(sizes.state[z - 1]) if z > s else 0
                swept = max(swept, int(sizes.forward[z] + level[t]) + before)
                kept = int(sizes.state[z] if z == n else sizes.state[s : z + 1].min())
                need = min(need, max(swept, int(least[s, z]), kept + int(least[z + 1, t])))
            least[s, t] = need
    return least


def _least_with_tape(sizes: PinnedSizes, level: Bytes, least: Bytes, s: int, t: int) -> int:
    """Bytes of the stages s..t at least where stage s is run once, with tape."""
    tapes = slice(int(sizes.first_tape[s]), int(sizes.first_tape[s + 1]))
    need = np.maximum(level[t] + sizes.taped[tapes], sizes.backward[tapes])
    if s < t:
        need = np.maximum(need, sizes.tape[tapes] + least[s + 1, t])
    return int(need.min())
