"""Exact bytes of runs by value: one pass for who holds which storage to when, one for the bytes.

Each run makes a copy of what its stage makes. A copy is held until the last run that reads it, a
storage until the last copy or tape that holds it is gone; so what a step takes follows from the
order of its runs, Turn and Backwards alone. In what follows i is a stage, p the position of an
operation, k a ledger, e a place in the flat list of all reads, s a storage, numbered as they are
made, and x one of the storages that a stage makes. Backwards come in the reverse order of stages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled
from ..schedule.language import BACKWARD, TAPED, TURN
from .exact_bytes_kernel import Ledgers, Stages

Integers = npt.NDArray[np.int64]


class Wiring(NamedTuple):
    """Who reads what; stage i reads first_read[i] to first_read[i + 1] of the flat arrays."""

    first_read: Integers
    maker: Integers
    """The stage that made the value; 0 for the input."""
    made: Integers
    """Which of the storages that this has made."""
    input: Integers
    """Which storage of the input of the reader, as its ledger counts them."""
    first_made: Integers
    """Stage i makes first_made[i] to first_made[i + 1] of the next array; 0 is the input."""
    output: Integers
    """Which storage of its output, as its ledger counts them."""


class Level(NamedTuple):
    """Numbers of the whole step."""

    start: int
    """Bytes of all that is there before."""
    held: int
    """What the caller holds after the loss."""
    loss: int
    """Extra bytes while the loss runs."""
    again: int
    """Copies of buffers and random states, from the loss on, where any stage runs again."""


class Books(NamedTuple):
    """Who holds what to when; by position of a run, by stage, by read and by storage."""

    last: Integers
    """By position: that of the last operation that reads the copy, shape (m,)."""
    base: Integers
    """By position: where the storages of the copy begin in `made`, shape (m,)."""
    freed: Integers
    """By position: bytes that go after the operation, shape (m + 1,)."""
    after: Integers
    """By position: bytes of all that is there when the operation is done, shape (m + 1,)."""
    kept: Integers
    """By position: bytes of a snapshot that is taken right before the run, less those of one that
    is put back for the last time, shape (m + 1,)."""
    newest: Integers
    """By stage: position of the run that made its newest copy, -1 before, shape (n + 1,)."""
    first_run: Integers
    """By stage: position of its first run."""
    restored: Integers
    """By stage: position of the last run that begins with a snapshot put back, or -1."""
    gone: Integers
    """By stage: position of its Backward."""
    ledger: Integers
    """By stage: the ledger of its tape."""
    tape: Integers
    """By stage: position of the run that made its tape."""
    reading: Integers
    """By read: the storage that is read by the run at hand, shape (reads,)."""
    saving: Integers
    """By read: the storage that was read by the run with tape, shape (reads,)."""
    made: Integers
    """The storages of all copies, flat."""
    size: Integers
    """By storage: its bytes."""
    born: Integers
    """By storage: position of the run that makes it."""
    end: Integers
    """By storage: position of the operation after which nothing holds it."""


def open_books(n: int, operations: int, reads: int, inputs: int, most_made: int) -> Books:
    """Books for so many operations.

    Args:
        n: Number of stages.
        operations: Of a schedule, without drops.
        reads: Of all stages together.
        inputs: Storages of the input.
        most_made: Storages that a run makes, at the most.
    """
    copies = inputs + operations * most_made + 1
    of_stage = [np.zeros(n + 1, np.int64) for _ in range(6)]
    return Books(
        *(np.zeros(operations + 1, np.int64) for _ in range(5)),
        *of_stage,
        *(np.zeros(reads, np.int64) for _ in range(2)),
        *(np.zeros(copies, np.int64) for _ in range(4)),
    )


@compiled
def charge(
    packed: Integers,
    ledgers: Ledgers,
    stages: Stages,
    wiring: Wiring,
    level: Level,
    books: Books,
    during: Integers,
) -> int:
    """Charge operations without drops.

    Args:
        packed: The operations, as `Schedule` packs them.
        ledgers: The ledgers.
        stages: Figures by stage.
        wiring: Who reads what.
        level: Numbers of the whole step.
        books: Room.
        during: Bytes while each operation runs, to fill.

    Returns:
        The peak in bytes.
    """
    _note(packed, ledgers, stages, wiring, books)
    m, now, peak = len(packed), level.start, 0
    storage = wiring.first_made[1] - wiring.first_made[0]
    parameters, gradient = 0, 0
    again = runs_again(packed, books)
    for p in range(m):
        code, i = packed[p] & 0xFF, packed[p] >> 32
        if code <= TAPED:
            k = ledgers.of[i] + (packed[p] >> 8 & 0xFF if code else 0)
            before = now  # with the snapshot that is put back, which goes then
            now += books.kept[p]
            during[p] = now + (ledgers.taped[k] if code else ledgers.forward[k])
            while books.born[storage] == p:
                if books.end[storage] > p:
                    now += books.size[storage]
                storage += 1
            if code:
                now += ledgers.tape[k]
            during[p] = max(during[p], now, before)
        elif code == BACKWARD:
            during[p] = now + _backward_peak(ledgers, stages, wiring, books, i, p)
            now += stages.gradient[i - 1] - gradient + stages.parameters[i]
            now -= ledgers.tape[books.ledger[i]]
            gradient = stages.gradient[i - 1]
            parameters += stages.parameters[i]
        else:
            n = len(stages.gradient) - 1
            during[p] = now + stages.gradient[n] + level.loss
            gradient = stages.gradient[n]
            now += gradient + rest_of_loss(wiring, books, n, level.held)
            now += level.again if again else 0
        now -= books.freed[p]
        books.after[p] = now
        peak = max(peak, during[p])
    return int(peak)


@compiled
def _note(packed: Integers, ledgers: Ledgers, stages: Stages, wiring: Wiring, books: Books) -> None:
    """Find which storages there are, and who holds each of them to when."""
    m = len(packed)
    books.freed[:] = 0
    books.kept[:] = 0
    books.newest[:] = -1
    books.first_run[:] = -1
    books.restored[:] = -1
    for p in range(m):
        if packed[p] & 0xFF == BACKWARD:
            books.gone[packed[p] >> 32] = p
    slots = _note_input(wiring, books, m)
    storages, previous = slots, 0
    for p in range(m):
        code, i = packed[p] & 0xFF, packed[p] >> 32
        if code <= TAPED:
            k = ledgers.of[i] + (packed[p] >> 8 & 0xFF if code else 0)
            _read(wiring, books, i, p)
            if books.first_run[i] < 0:
                books.first_run[i] = p
            elif previous != i - 1:
                books.restored[i] = p
            previous = i
            books.base[p], books.last[p], books.newest[i] = slots, p, p
            for at in range(wiring.first_made[i], wiring.first_made[i + 1]):
                output = ledgers.first_output[k] + wiring.output[at]
                if ledgers.source[output] >= 0:
                    books.made[slots] = _storage_read(wiring, books, i, ledgers.source[output])
                else:
                    books.made[slots] = storages
                    books.size[storages] = ledgers.size[output]
                    books.born[storages] = books.end[storages] = p
                    storages += 1
                slots += 1
            if code:
                books.ledger[i], books.tape[i] = k, p
                _save(ledgers, wiring, books, i, k)
        else:
            previous = -1
            if code == TURN:
                n = len(stages.gradient) - 1
                last = books.newest[n]
                books.last[last] = p
                for x in range(wiring.first_made[n + 1] - wiring.first_made[n]):
                    books.end[books.made[books.base[last] + x]] = m
    books.born[storages] = m
    _note_ends(packed, stages, wiring, books, slots)
    for s in range(wiring.first_made[1] - wiring.first_made[0], storages):
        if books.end[s] > books.born[s]:
            books.freed[min(books.end[s], m)] += books.size[s]


@compiled
def _note_input(wiring: Wiring, books: Books, m: int) -> int:
    """The input, which the caller holds all the time; returns how many storages it has."""
    inputs = wiring.first_made[1] - wiring.first_made[0]
    books.base[m] = 0
    books.newest[0] = m
    for s in range(inputs):
        books.made[s] = s
        books.size[s] = 0
        books.born[s] = -1
        books.end[s] = m
    return int(inputs)


@compiled
def _note_ends(packed: Integers, stages: Stages, wiring: Wiring, books: Books, slots: int) -> None:
    """Have copies hold their storages as long as they are read, and snapshots lie so long."""
    for p in range(len(packed)):
        if packed[p] & 0xFF <= TAPED and books.last[p] > p:
            i = packed[p] >> 32
            for x in range(wiring.first_made[i + 1] - wiring.first_made[i]):
                s = books.made[books.base[p] + x]
                books.end[s] = max(books.end[s], books.last[p])
    for i in range(1, len(books.restored)):
        if books.restored[i] >= 0:
            books.kept[books.first_run[i]] += stages.snapshots[i - 1]
            books.kept[books.restored[i]] -= stages.snapshots[i - 1]


@compiled
def _read(wiring: Wiring, books: Books, i: int, p: int) -> None:
    """Have a run read the newest copies."""
    for e in range(wiring.first_read[i], wiring.first_read[i + 1]):
        copy = books.newest[wiring.maker[e]]
        books.last[copy] = p
        books.reading[e] = books.made[books.base[copy] + wiring.made[e]]


@compiled
def _storage_read(wiring: Wiring, books: Books, i: int, which: int) -> int:
    """The storage that stage i reads as one of its input."""
    for e in range(wiring.first_read[i], wiring.first_read[i + 1]):
        if wiring.input[e] == which:
            return int(books.reading[e])
    return 0


@compiled
def _save(ledgers: Ledgers, wiring: Wiring, books: Books, i: int, k: int) -> None:
    """Have the tape of a run hold what it saves until its Backward."""
    gone = books.gone[i]
    for e in range(wiring.first_read[i], wiring.first_read[i + 1]):
        books.saving[e] = books.reading[e]
    for at in range(ledgers.first_saved[k], ledgers.first_saved[k + 1]):
        which = ledgers.saved[at]
        if which < 0:
            s = _own(wiring, books, i, -1 - which)
            books.end[s] = max(books.end[s], gone)
            continue
        for e in range(wiring.first_read[i], wiring.first_read[i + 1]):
            if wiring.input[e] == which:
                s = books.saving[e]
                books.end[s] = max(books.end[s], gone)


@compiled
def _own(wiring: Wiring, books: Books, i: int, output: int) -> int:
    """The storage that the tape's run has made as one of its output."""
    for at in range(wiring.first_made[i], wiring.first_made[i + 1]):
        if wiring.output[at] == output:
            return int(books.made[books.base[books.tape[i]] + at - wiring.first_made[i]])
    return 0


@compiled
def runs_again(packed: Integers, books: Books) -> bool:
    """Whether any stage runs more than once."""
    for p in range(len(packed)):
        if packed[p] & 0xFF <= TAPED and books.first_run[packed[p] >> 32] != p:
            return True
    return False


@compiled
def _backward_peak(
    ledgers: Ledgers, stages: Stages, wiring: Wiring, books: Books, i: int, p: int
) -> int:
    """The peak of a backward above the level before it, by which storages outlive its tape."""
    k = books.ledger[i]
    begin, count = ledgers.first_peak[k], ledgers.first_saved[k + 1] - ledgers.first_saved[k]
    mask, any_held, inputs_held, outputs_held = 0, 0, 0, 0
    for bit in range(count):
        which = ledgers.saved[ledgers.first_saved[k] + bit]
        outlives = 0
        if which < 0:
            outlives = 1 if books.end[_own(wiring, books, i, -1 - which)] > p else 0
            outputs_held |= outlives
        else:
            outlives = 1  # what the stage does not read itself is the caller's
            for e in range(wiring.first_read[i], wiring.first_read[i + 1]):
                if wiring.input[e] == which:
                    outlives = 1 if books.end[books.saving[e]] > p else 0
            inputs_held |= outlives
        any_held |= outlives
        mask |= outlives << min(bit, 32)
    if ledgers.has_parts[k]:
        half = (ledgers.first_peak[k + 1] - begin) // 2
        if count > 32 or half != 1 << count:
            mask = any_held
    else:
        half, mask = 1, 4 * inputs_held + 2 * outputs_held
    before, at_first = ledgers.peak[begin + mask], ledgers.peak[begin + half + mask]
    first = stages.parameters[i] > 0
    if stages.partly[i] and not first:
        return int(max(before, at_first))
    return int(at_first if first else before)


@compiled
def rest_of_loss(wiring: Wiring, books: Books, n: int, held: int) -> int:
    """What the caller holds of the loss besides the output."""
    rest, copy = held, books.base[books.newest[n]]
    width = wiring.first_made[n + 1] - wiring.first_made[n]
    for x in range(width):
        is_new = True
        for other in range(x):
            is_new = is_new and books.made[copy + other] != books.made[copy + x]
        rest -= books.size[books.made[copy + x]] if is_new else 0
    return int(max(0, rest))
