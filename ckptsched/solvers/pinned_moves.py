"""Positions of the searches over all pinned schedules, and what one operation makes of them.

A position says which backward is next and what is kept of every stage. It is one 64-bit number:
the next backward in the lowest bits, then `width` bits a stage, of which the lowest says whether
the state is kept, and the others which tape is, counted from 1.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..compiled import compiled
from .pinned_sizes import Bytes, PinnedSizes, Seconds

NEXT_BITS: Final = 5
NEXT_MASK: Final = (1 << NEXT_BITS) - 1
_KEY_BITS = 62
_HASH = 0x9E3779B97F4A7C15 >> 1


def key_width(sizes: PinnedSizes) -> int | None:
    """Bits a stage in a position; None where a position would not fit 64 bits."""
    n, most_tapes = len(sizes.state) - 1, int(np.diff(sizes.first_tape[1:]).max())
    width = 1 + most_tapes.bit_length()
    return width if NEXT_BITS + n * width <= _KEY_BITS and n < NEXT_MASK else None


def tapes_beside_states(sizes: PinnedSizes) -> npt.NDArray[np.bool_]:
    """Where it may pay to make tape i while tape i + 1 keeps state i (docs/theory.md, lemma 1).

    Returns:
        By stage, shape (n + 1,).
    """
    n = len(sizes.state) - 1
    tapes = np.minimum.reduceat(sizes.tape, sizes.first_tape[1 : n + 1])
    beside = np.zeros(n + 1, dtype=np.bool_)
    beside[1:n] = sizes.level[1:n] > sizes.state[1:n] + tapes[1:]
    return beside


@compiled
def slot_of(table: npt.NDArray[np.int32], keys: Bytes, key: int) -> int:
    """Where a position stands in a hash table, or would."""
    mask = len(table) - 1
    slot = ((key * _HASH) >> 20) & mask
    while table[slot] >= 0 and keys[table[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@compiled
def fill_table(table: npt.NDArray[np.int32], keys: Bytes, count: int) -> None:
    """Enter the first `count` positions."""
    for position in range(count):
        table[slot_of(table, keys, keys[position])] = position


class Moves(NamedTuple):
    """What may come next: runs, lowest stage first, a Turn or Backward, then drops of states."""

    keys: Bytes
    """The positions after."""
    bytes: Bytes
    """What is there while the operation runs, without what is there from start to end."""
    seconds: Seconds
    """What it takes."""
    operations: int
    """How many are no drops."""
    total: int


@compiled
def most_moves(sizes: PinnedSizes) -> int:
    """No position has more moves."""
    return 2 * len(sizes.state) + len(sizes.tape) + 1


@compiled
def moves(sizes: PinnedSizes, beside: npt.NDArray[np.bool_], width: int, key: int) -> Moves:
    """What may come next, less what docs/theory.md shows to be no use.

    Args:
        sizes: The chain's sizes.
        beside: Of `tapes_beside_states`.
        width: Bits a stage.
        key: A position whose last backward is still to come.
    """
    n, b, mask = len(sizes.state) - 1, key & NEXT_MASK, (1 << width) - 1
    size = most_moves(sizes)
    keys, needs = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    seconds = np.zeros(size)
    fields = np.zeros(n + 2, dtype=np.int64)
    fields[0] = 1
    level = sizes.level[b]
    for i in range(1, n + 1):
        fields[i] = (key >> (NEXT_BITS + (i - 1) * width)) & mask
        if fields[i] & 1:
            level += sizes.state[i]
        if fields[i] > 1:
            level += sizes.tape[sizes.first_tape[i] + (fields[i] >> 1) - 1]
    count = 0
    for i in range(1, min(b, n) + 1):
        at = NEXT_BITS + (i - 1) * width
        held = fields[i + 1] > 1
        if fields[i - 1] == 0 or fields[i] > 1:
            continue
        if fields[i] == 0 and i < b:
            keys[count], needs[count] = key | (1 << at), level + sizes.forward[i]
            seconds[count] = sizes.forward_seconds[i]
            count += 1
        if fields[i] and held and not beside[i]:
            continue
        before, then = level, key
        if fields[i] and not held:
            before -= sizes.state[i]
            then ^= 1 << at
        for k in range(sizes.first_tape[i], sizes.first_tape[i + 1]):
            keys[count] = then | ((k - sizes.first_tape[i] + 1) << (at + 1))
            needs[count], seconds[count] = before + sizes.taped[k], sizes.taped_seconds[k]
            count += 1
    if b == n + 1 and fields[n]:
        keys[count] = _without_state(key - 1, n, width)
        needs[count], seconds[count] = level + sizes.turn, sizes.base_seconds[n + 1]
        count += 1
    elif b <= n and fields[b] > 1 and fields[b - 1]:
        k = sizes.first_tape[b] + (fields[b] >> 1) - 1
        rest = key & ((1 << (NEXT_BITS + (b - 1) * width)) - 1)
        keys[count] = _without_state(rest - 1, b - 1, width)
        needs[count] = level - sizes.level[b] - sizes.tape[k] + sizes.backward[k]
        seconds[count] = sizes.backward_seconds[k]
        count += 1
    operations = count
    for i in range(1, min(b, n) + 1):
        if fields[i] & 1 and fields[i + 1] < 2:
            keys[count], needs[count] = key ^ (1 << (NEXT_BITS + (i - 1) * width)), level
            count += 1
    return Moves(keys, needs, seconds, operations, count)


@compiled
def _without_state(key: int, i: int, width: int) -> int:
    """The position when state i, which nothing reads any more, is dropped if it was kept."""
    return key & ~(1 << (NEXT_BITS + (i - 1) * width)) if i else key
