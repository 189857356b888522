"""The ledger's pass over a schedule: what each operation makes, holds and lets go.

Storages are numbered as they are made: those of the input first, then those of outputs and clones
of buffers. A storage takes its bytes while its count of holders is not 0. In what follows i is a
stage or state, k a ledger, p the position of an operation, x a storage, and `at` a place in
a flat array. Schedules are valid, on the device alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled
from ..schedule.language import BACKWARD, STATE, TAPE, TAPED, TURN
from .liveness import FREES_INPUT, KEEPS_OUTPUT, SNAPSHOTS

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Places in `Books.totals`: bytes of the gradient of a state, of those of parameters, of random
# states to put back, and of what the caller holds of the loss besides the output; then the first
# operation that finds what is changed now.
GRADIENT, PARAMETERS, RANDOM, LOSS, CLOCK = range(5)
NEVER = 2**62
"""In place of an operation: what is not held before it is not held at all."""


class Ledgers(NamedTuple):
    """The ledgers of a chain by number; of flat arrays ledger k has first[k] to first[k + 1]."""

    of: Integers
    """That of each stage with its own tape, shape (n + 1,); with tape t it is t further."""
    forward: Integers
    """Peak of a run without tape."""
    taped: Integers
    """Peak of a run with tape."""
    tape: Integers
    """Bytes of the tape."""
    inputs: Integers
    """Storages of the input."""
    first_output: Integers
    size: Integers
    """Bytes of each storage of the output; flat."""
    source: Integers
    """Which storage of the input it is, or -1; flat."""
    first_saved: Integers
    saved: Integers
    """Storages that the tape keeps: k of the input, -1 - k of the output; flat."""
    has_parts: Flags
    """Whether peaks of the backward go by all storages that the tape keeps."""
    first_peak: Integers
    peak: Integers
    """Peaks of the backward; flat."""


class Stages(NamedTuple):
    """Figures by stage or state, shape (n + 1,)."""

    gradient: Integers
    """Gradient with respect to the state."""
    parameters: Integers
    """Parameter gradients that appear with the backward."""
    partly: Flags
    """Whether some of its parameter gradients are there before."""
    snapshots: Integers
    """What it takes to run on from the state."""
    owner: Integers
    """The block of the stage."""


class Replays(NamedTuple):
    """Blocks that segments run again; segment k has first[k] to first[k + 1]."""

    position: Integers
    """First operation of each segment, in order."""
    first: Integers
    block: Integers
    size: Integers
    """Bytes of the block's buffers."""


class Start(NamedTuple):
    """Numbers of the whole chain."""

    level: int
    """Bytes of all that is there before."""
    inputs: int
    """Storages of the input: the first ones, which the caller holds besides."""
    held: int
    """What the caller holds after the loss."""
    loss: int
    """Extra bytes while the loss runs."""
    random: int
    """Random states to put back, while a block runs again."""


class Books(NamedTuple):
    """All that is live: storages by number, states and tapes by stage, clones by block."""

    sizes: Integers
    """Bytes of each storage that was made."""
    holders: Integers
    """How many hold it."""
    maker: Integers
    """The stage whose output it is, 0 for the input, -1 for a clone of buffers."""
    since: Integers
    """The first operation that finds it held, or `NEVER`."""
    until: Integers
    """The first operation that does not any more, or `NEVER`."""
    has_state: Flags
    states: Integers
    """The storages of each state, shape (n + 1, most of a state)."""
    has_tape: Flags
    inputs: Integers
    """The storages of what each tape's run read, in the same shape."""
    outputs: Integers
    """The storages of what it made."""
    ledger: Integers
    """Of each tape its ledger."""
    clone: Integers
    """Of each tape the clone of buffers that it keeps, or -1."""
    hands_on: Flags
    """Whether the tape's output is to be read from it."""
    state_snapshot: Integers
    """What it takes to run on from a state; a tape's has it as long as that hands on."""
    tape_snapshot: Integers
    clones: Integers
    """The clone of each block's buffers in this segment, or -1."""
    totals: Integers
    """Bytes of what there is one of: see `GRADIENT` and others."""


def open_books(n: int, storages: int, width: int, blocks: int) -> Books:
    """Books in which nothing is live.

    Args:
        n: Number of stages.
        storages: How many storages there will be.
        width: Storages of a state, at the most.
        blocks: Number of blocks.
    """
    return Books(
        sizes=np.zeros(storages, np.int64),
        holders=np.zeros(storages, np.int64),
        maker=np.zeros(storages, np.int64),
        since=np.full(storages, NEVER),
        until=np.full(storages, NEVER),
        has_state=np.zeros(n + 1, np.bool_),
        states=np.zeros((n + 1, width), np.int64),
        has_tape=np.zeros(n + 1, np.bool_),
        inputs=np.zeros((n + 1, width), np.int64),
        outputs=np.zeros((n + 1, width), np.int64),
        ledger=np.zeros(n + 1, np.int64),
        clone=np.full(n + 1, -1),
        hands_on=np.zeros(n + 1, np.bool_),
        state_snapshot=np.zeros(n + 1, np.int64),
        tape_snapshot=np.zeros(n + 1, np.int64),
        clones=np.full(blocks, -1),
        totals=np.zeros(5, np.int64),
    )


@compiled
def charge(
    packed: Integers,
    facts: Flags,
    ledgers: Ledgers,
    stages: Stages,
    replays: Replays,
    start: Start,
    books: Books,
    during: Integers,
) -> None:
    """Charge the first operations of a schedule, and begin the segment of the next.

    Args:
        packed: Operations as `Schedule` packs them.
        facts: As `liveness.analyse` finds them.
        ledgers: The ledgers.
        stages: Figures by stage.
        replays: What is run again.
        start: What is there before.
        books: What is live before, and then after.
        during: Bytes while each operation runs, to fill; as many are done.
    """
    # Branches stay in this loop: a call counts a reference to every array that it hands on, which
    # for all of them takes longer than what is done.
    n, level = len(stages.gradient) - 1, start.level
    made, segment, totals = start.inputs, 0, books.totals
    for p in range(len(during) + 1):
        totals[CLOCK] = p
        if segment < len(replays.position) and replays.position[segment] == p:
            level += _begin_segment(books, replays, segment, made, start.random)
            made += replays.first[segment + 1] - replays.first[segment]
            segment += 1
        if p == len(during):
            return
        totals[CLOCK] = p + 1
        code, kind, i = packed[p] & 0xFF, packed[p] >> 8 & 0xFF, packed[p] >> 32
        if code <= TAPED:
            k = ledgers.of[i] + (kind if code else 0)
            peak = level + (ledgers.taped[k] if code else ledgers.forward[k])
            source = books.states[i - 1] if books.has_state[i - 1] else books.outputs[i - 1]
            output = books.outputs[i] if code else books.states[i]
            made = _make(books, ledgers, k, i, source, output, made)
            snapshot = stages.snapshots[i] * facts[SNAPSHOTS, p]
            if code:
                books.inputs[i] = source
                books.clone[i] = books.clones[stages.owner[i]]
                level += _begin_tape(books, ledgers, k, i, facts[KEEPS_OUTPUT, p], snapshot)
            else:
                books.has_state[i] = True
                books.state_snapshot[i] = snapshot
                level += snapshot + _hold_all(books, output, _width(ledgers, k))
            during[p] = max(peak, level)
            if facts[FREES_INPUT, p]:
                level -= _stop_handing_on(books, i - 1, ledgers.inputs[k])
        elif code == BACKWARD:
            during[p] = level + _backward_peak(books, ledgers, stages, i)
            level -= _drop_tape(books, ledgers, i)
            level += _set(totals, GRADIENT, stages.gradient[i - 1])
            level += _set(totals, PARAMETERS, totals[PARAMETERS] + stages.parameters[i])
        elif code == TURN:
            during[p] = level + stages.gradient[n] + start.loss
            level += _turn(books, ledgers, n, start.held)
            if facts[FREES_INPUT, p]:
                level -= _stop_handing_on(books, n, _width(ledgers, ledgers.of[n]))
            level += _set(totals, GRADIENT, stages.gradient[n])
        else:
            during[p] = level
            if kind == STATE:
                books.has_state[i] = False
                width = _width(ledgers, ledgers.of[i]) if i else start.inputs
                level -= books.state_snapshot[i] + _release_all(books, books.states[i], width)
            elif kind == TAPE:
                level -= _drop_tape(books, ledgers, i)
            else:
                level += _set(totals, GRADIENT, 0)


@compiled
def _set(totals: Integers, which: int, size: int) -> int:
    """Set the bytes of what there is one of; returns by how much they grow."""
    added = size - totals[which]
    totals[which] = size
    return int(added)


@compiled
def _hold(books: Books, x: int) -> int:
    """Hold a storage; returns the bytes that this adds."""
    books.holders[x] += 1
    if books.holders[x] > 1:
        return 0
    books.since[x] = books.totals[CLOCK]
    return int(books.sizes[x])


@compiled
def _release(books: Books, x: int) -> int:
    """Hold a storage no longer; returns the bytes that this frees."""
    books.holders[x] -= 1
    if books.holders[x]:
        return 0
    books.until[x] = books.totals[CLOCK]
    return int(books.sizes[x])


@compiled
def _hold_all(books: Books, storages: Integers, width: int) -> int:
    added = 0
    for k in range(width):
        added += _hold(books, storages[k])
    return added


@compiled
def _release_all(books: Books, storages: Integers, width: int) -> int:
    freed = 0
    for k in range(width):
        freed += _release(books, storages[k])
    return freed


@compiled
def _width(ledgers: Ledgers, k: int) -> int:
    """Storages of the output."""
    return int(ledgers.first_output[k + 1] - ledgers.first_output[k])


@compiled
def _begin_segment(books: Books, replays: Replays, segment: int, made: int, random: int) -> int:
    """Let clones of the last segment go and make new ones; returns the bytes that this adds.

    Where any block runs again, random states are there to be put back, too.
    """
    added, clones = 0, books.clones
    for block in range(len(clones)):
        if clones[block] >= 0:
            added -= _release(books, clones[block])
            clones[block] = -1
    for at in range(replays.first[segment], replays.first[segment + 1]):
        books.sizes[made] = replays.size[at]
        books.maker[made] = -1
        clones[replays.block[at]] = made
        added += _hold(books, made)
        made += 1
    again = replays.first[segment + 1] > replays.first[segment]
    return added + _set(books.totals, RANDOM, random if again else 0)


@compiled
def _make(
    books: Books, ledgers: Ledgers, k: int, i: int, source: Integers, output: Integers, made: int
) -> int:
    """Number the storages of the output of stage i; returns how many there are then."""
    first = ledgers.first_output[k]
    for at in range(first, ledgers.first_output[k + 1]):
        if ledgers.source[at] >= 0:
            output[at - first] = source[ledgers.source[at]]
        else:
            books.sizes[made] = ledgers.size[at]
            books.maker[made] = i
            output[at - first] = made
            made += 1
    return made


@compiled
def _saved(books: Books, ledgers: Ledgers, i: int, at: int) -> int:
    """A storage that tape i keeps."""
    which = ledgers.saved[at]
    return int(books.inputs[i, which] if which >= 0 else books.outputs[i, -1 - which])


@compiled
def _begin_tape(
    books: Books, ledgers: Ledgers, k: int, i: int, hands_on: bool, snapshot: int
) -> int:
    """Book a tape; returns the bytes that it adds."""
    added = ledgers.tape[k]
    books.has_tape[i] = True
    books.ledger[i] = k
    for at in range(ledgers.first_saved[k], ledgers.first_saved[k + 1]):
        added += _hold(books, _saved(books, ledgers, i, at))
    if books.clone[i] >= 0:
        added += _hold(books, books.clone[i])
    books.hands_on[i] = hands_on
    books.tape_snapshot[i] = snapshot if hands_on else 0
    if hands_on:
        added += snapshot + _hold_all(books, books.outputs[i], _width(ledgers, k))
    return int(added)


@compiled
def _stop_handing_on(books: Books, i: int, width: int) -> int:
    """Returns the bytes that this frees."""
    if not books.hands_on[i]:
        return 0
    books.hands_on[i] = False
    return int(books.tape_snapshot[i]) + _release_all(books, books.outputs[i], width)


@compiled
def _drop_tape(books: Books, ledgers: Ledgers, i: int) -> int:
    """Returns the bytes that this frees."""
    k = books.ledger[i]
    freed = _stop_handing_on(books, i, _width(ledgers, k)) + ledgers.tape[k]
    books.has_tape[i] = False
    for at in range(ledgers.first_saved[k], ledgers.first_saved[k + 1]):
        freed += _release(books, _saved(books, ledgers, i, at))
    if books.clone[i] >= 0:
        freed += _release(books, books.clone[i])
    return int(freed)


@compiled
def _turn(books: Books, ledgers: Ledgers, n: int, held: int) -> int:
    """Have the caller hold the output, and the value of the loss; returns the bytes added."""
    width = _width(ledgers, ledgers.of[n])
    output = books.states[n] if books.has_state[n] else books.outputs[n]
    added = _hold_all(books, output, width)
    rest = held
    for k in range(width):
        is_new = True
        for other in range(k):
            is_new = is_new and output[other] != output[k]
        rest -= books.sizes[output[k]] if is_new else 0
    return int(added + _set(books.totals, LOSS, max(0, rest)))


@compiled
def _outlives(books: Books, ledgers: Ledgers, i: int, x: int) -> bool:
    """Whether something besides tape i holds a storage."""
    k, own = books.ledger[i], 0
    for at in range(ledgers.first_saved[k], ledgers.first_saved[k + 1]):
        own += _saved(books, ledgers, i, at) == x
    return bool(books.holders[x] > own)


@compiled
def _backward_peak(books: Books, ledgers: Ledgers, stages: Stages, i: int) -> int:
    """The peak of a backward above the level before it."""
    k = books.ledger[i]
    first, half = stages.parameters[i] > 0, 0
    begin = ledgers.first_peak[k]
    if ledgers.has_parts[k]:
        count = ledgers.first_saved[k + 1] - ledgers.first_saved[k]
        half = (ledgers.first_peak[k + 1] - begin) // 2
        mask, any_held = 0, 0
        for bit in range(count):
            x = _saved(books, ledgers, i, ledgers.first_saved[k] + bit)
            if _outlives(books, ledgers, i, x):
                any_held = 1
                mask |= 1 << min(bit, 32)
        if count > 32 or half != 1 << count:
            mask = any_held
        before, at_first = ledgers.peak[begin + mask], ledgers.peak[begin + half + mask]
    else:
        mask = 4 * _outlives(books, ledgers, i, books.inputs[i, 0])
        mask += 2 * _outlives(books, ledgers, i, books.outputs[i, 0])
        before, at_first = ledgers.peak[begin + mask], ledgers.peak[begin + mask + 1]
    if stages.partly[i] and not first:
        return int(max(before, at_first))
    return int(at_first if first else before)
