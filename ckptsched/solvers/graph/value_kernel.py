"""Tables of runs of a recorded model, in exact bytes: one as operations, and a search through them.

As `search_kernel`, whose tables and moves these are, but for the bytes: those of the ledger, by
which values the runs read and tapes save. A node may have several tapes, of which one is chosen. In
what follows k is a phase, v a node, u one that it reads, e a place in the flat list of reads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.jit import compiled
from ...schedule.language import BACKWARD, TAPED, TURN
from ...simulator.exact_bytes_kernel import Ledgers, Stages
from ...simulator.value_bytes_kernel import Books, Level, Wiring, charge
from .search_kernel import (
    BARE,
    CHANGED,
    IDLE,
    MOVED,
    NOTHING,
    Scratch,
    Table,
    clean,
    copy,
    is_better,
    is_taken,
    move,
    take_back,
)

Integers = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

_OTHER_TAPES = 0.15  # of all moves


class Figures(NamedTuple):
    """What a recorded model takes, as the kernel of its exact bytes has it."""

    ledgers: Ledgers
    stages: Stages
    wiring: Wiring
    level: Level
    forward: Seconds
    """Of a run without tape, by node, shape (n + 1,)."""
    first_tape: Integers
    """Node v offers the tapes first_tape[v] to first_tape[v + 1] - 1."""
    taped: Seconds
    """Of a run with each tape and its backward."""


class Room(NamedTuple):
    """Room for one look."""

    books: Books
    packed: Integers
    """The operations of a table, as `Schedule` packs them."""
    during: Integers
    needed: npt.NDArray[np.uint8]
    """By node whether a later run reads it."""


@compiled
def pack(
    figures: Figures, table: Table, option: Integers, scratch: Scratch, room: Room
) -> tuple[int, float]:
    """Write a table as operations, without the runs whose copy nothing reads.

    Args:
        figures: Of the model.
        table: What runs when.
        option: By node which tape it is run with, shape (n + 1,).
        scratch: Where idle runs are noted.
        room: To be filled, from its end on.

    Returns:
        Where the operations begin, and their seconds; infinite where there is no room for all.
    """
    n, at, seconds, idle = len(option) - 1, len(room.packed), 0.0, 0
    scratch.counts[IDLE] = 0
    wiring, needed = figures.wiring, room.needed
    needed[:] = 0
    for k in range(n, -1, -1):
        if at == 0:
            return 0, math.inf
        at -= 1
        room.packed[at] = BACKWARD | (n + 1 - k) << 32 if k else TURN
        if k == 0:
            needed[n] = 1
        for v in range(table.high[k], table.low[k] - 1, -1):
            run = table.runs[k, v]
            if run == NOTHING:
                continue
            if run == BARE and k and not needed[v]:
                scratch.idle[idle] = k * (n + 1) + v
                idle += 1
                continue
            needed[v] = 0
            if at == 0:
                return 0, math.inf
            at -= 1
            if run == BARE:
                room.packed[at] = v << 32
                seconds += figures.forward[v]
            else:
                room.packed[at] = TAPED | option[v] << 8 | v << 32
                seconds += figures.taped[figures.first_tape[v] + option[v]]
            for e in range(wiring.first_read[v], wiring.first_read[v + 1]):
                needed[wiring.maker[e]] = 1
    scratch.counts[IDLE] = idle
    return at, seconds


@compiled
def look(
    figures: Figures, table: Table, option: Integers, scratch: Scratch, room: Room
) -> tuple[int, float]:
    """The peak of a table in bytes, and its seconds; arguments as those of `pack`.

    Seconds are infinite where there is no room for it, and its peak is not known.
    """
    at, seconds = pack(figures, table, option, scratch, room)
    if seconds == math.inf:
        return 0, seconds
    runs = room.packed[at:]
    peak = charge(
        runs,
        figures.ledgers,
        figures.stages,
        figures.wiring,
        figures.level,
        room.books,
        room.during[: len(runs)],
    )
    return peak, seconds


@compiled
def _other_tapes(figures: Figures, option: Integers, old: Integers, draws: Seconds, n: int) -> bool:
    """Have an interval of nodes run with other tapes; returns whether any is another."""
    a = 1 + int(draws[1] * n)
    b = min(n, a + int(draws[2] ** 4 * n))
    changed = False
    for v in range(a, b + 1):
        count = figures.first_tape[v + 1] - figures.first_tape[v]
        chosen = int(draws[3] * count)
        changed = changed or option[v] != chosen
        old[v], option[v] = option[v], chosen
    for v in range(1, n + 1):
        if v < a or v > b:
            old[v] = option[v]
    return changed


@compiled
def copy_options(target: Integers, option: Integers) -> None:
    """Make the tapes of all nodes those of another array."""
    for v in range(len(option)):
        target[v] = option[v]


@compiled
def anneal(
    figures: Figures,
    table: Table,
    option: Integers,
    best: Table,
    best_option: Integers,
    scratch: Scratch,
    room: Room,
    draws: Seconds,
    budget: int,
    price: float,
    heat: Seconds,
    found: Seconds,
) -> None:
    """Try moves; keep those that make it better, and by chance some that do not.

    Args:
        figures: Of the model.
        table: Where the search is; changed.
        option: The tapes of the nodes; changed.
        best: The best table that fits, to be replaced by better ones.
        best_option: Its tapes.
        scratch: Where changes are noted.
        room: For looks.
        draws: Random numbers, shape (moves, DRAWS).
        budget: Bytes that the peak may reach.
        price: Seconds that a byte above the budget counts as.
        heat: For each move the seconds by which a change for the worse is often taken.
        found: Peak in bytes and seconds of `best`, to be replaced, shape (2,).
    """
    n = len(option) - 1
    offers = figures.first_tape[n + 1] - figures.first_tape[1] > n
    old = option.copy()
    peak, seconds = look(figures, table, option, scratch, room)
    value = seconds + price * max(0, peak - budget)
    for m in range(len(draws)):
        scratch.counts[CHANGED] = scratch.counts[MOVED] = 0
        by_tape = offers and draws[m, 7] < _OTHER_TAPES
        if by_tape:
            if not _other_tapes(figures, option, old, draws[m], n):
                continue
        else:
            move(table, scratch, draws[m], n)
            if scratch.counts[CHANGED] == 0:
                continue
        peak, seconds = look(figures, table, option, scratch, room)
        now = seconds + price * max(0, peak - budget)
        if not is_taken(now, value, draws[m, 6], heat[m]):
            take_back(table, scratch)
            if by_tape:
                copy_options(option, old)
            continue
        value = now
        clean(table, scratch, n)
        if is_better(peak, seconds, budget, found):
            found[0], found[1] = peak, seconds
            copy(best, table)
            copy_options(best_option, option)
