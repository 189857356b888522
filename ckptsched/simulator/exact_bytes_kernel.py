"""The ledger's pass over a long schedule, compiled, and that of liveness.

They do what `ledger` and `liveness` say, operation by operation, on plain arrays: those two are
what to read. Schedules are valid, and without copies and without drops on other tiers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The codes and kinds of schedule.py, as constants that compiled code can hold.
_FORWARD, _TAPED, _TURN, _BACKWARD, _DROP = 0, 1, 2, 3, 5
_STATE, _TAPE = 0, 1
# The facts of liveness.py, a row each.
_KEEPS_OUTPUT, _FREES_INPUT, _RESTORES, _SNAPSHOTS, _REPEATS = range(5)
_INPUT, _NONE = -1, -2


@compiled
def analyse(packed: Integers, stages: int, facts: Flags) -> bool:
    """Find how long outputs and random states are needed.

    Args:
        packed: Operations as `Schedule` packs them.
        stages: Number of stages n.
        facts: A row for each of the flags of `Liveness`, to fill, shape (5, operations).

    Returns:
        Whether the chain's input is read by a run that restores.
    """
    states, tapes = np.full(stages + 1, _NONE), np.full(stages + 1, _NONE)
    last_read = np.full(len(packed), _NONE)
    seen = np.zeros(stages + 1, np.bool_)
    states[0] = _INPUT
    previous, snapshots_input = 0, False
    for p in range(len(packed)):
        code, kind, i = packed[p] & 0xFF, packed[p] >> 8 & 0xFF, packed[p] >> 32
        if code <= _TAPED:
            maker = states[i - 1]
            if maker == _NONE:
                maker = tapes[i - 1]
                last_read[maker] = p
            if previous != i - 1:
                facts[_RESTORES, p] = True
                if maker < 0:
                    snapshots_input = True
                else:
                    facts[_SNAPSHOTS, maker] = True
            facts[_REPEATS, p] = seen[i]
            seen[i] = True
            previous = i
            if code:
                tapes[i] = p
            else:
                states[i] = p
        elif code == _TURN:
            if states[stages] == _NONE:
                last_read[tapes[stages]] = p
            previous = -1
        elif code == _BACKWARD:
            tapes[i] = _NONE
            previous = -1
        elif code == _DROP:
            if kind == _STATE:
                states[i] = _NONE
            elif kind == _TAPE:
                tapes[i] = _NONE
    for maker in range(len(packed)):
        if last_read[maker] >= 0:
            facts[_KEEPS_OUTPUT, maker] = True
            facts[_FREES_INPUT, last_read[maker]] = True
    return snapshots_input


class Kinds(NamedTuple):
    """What stages have in common, by kind; of flat arrays kind k has first[k] to first[k + 1]."""

    of: Integers
    """Kind of each stage, shape (n + 1,)."""
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
    """What is there before, and numbers of the whole chain."""

    level: int
    """Bytes of all that is there."""
    snapshot: int
    """Random states that are kept with the input, of that."""
    inputs: int
    """Storages of the input: the first ones, which the caller holds besides."""
    input_bytes: int
    """Bytes of the first of them."""
    storages: int
    """How many storages there will be."""
    width: int
    """Storages of a state, at the most."""
    blocks: int
    """Number of blocks."""
    held: int
    """What the caller holds after the loss."""
    loss: int
    """Extra bytes while the loss runs."""
    random: int
    """Random states to put back, while a block runs again."""


class _Books(NamedTuple):
    """All that is live; states and tapes by stage, storages by number."""

    sizes: Integers
    holders: Integers
    has_state: Flags
    states: Integers
    inputs: Integers
    outputs: Integers
    clone: Integers
    """Of each tape the clone of buffers that it keeps, or -1."""
    hands_on: Flags
    state_snapshot: Integers
    tape_snapshot: Integers


@compiled
def charge(
    packed: Integers,
    facts: Flags,
    kinds: Kinds,
    stages: Stages,
    replays: Replays,
    start: Start,
    during: Integers,
) -> None:
    """Charge every operation of a schedule.

    Args:
        packed: Operations as `Schedule` packs them.
        facts: As `analyse` fills them.
        kinds: Figures by kind of stage.
        stages: Figures by stage.
        replays: What is run again.
        start: What is there before.
        during: Bytes while each operation runs, to fill.
    """
    n, level = len(stages.gradient) - 1, start.level
    books = _open(n, start)
    clones = np.full(start.blocks, -1)
    made, segment, random, gradient = start.inputs, 0, 0, 0
    for p in range(len(packed)):
        code, kind, i = packed[p] & 0xFF, packed[p] >> 8 & 0xFF, packed[p] >> 32
        if segment < len(replays.position) and replays.position[segment] == p:
            level += _begin_segment(books, clones, replays, segment, made)
            again = replays.first[segment + 1] - replays.first[segment]
            made += again
            level += (start.random if again else 0) - random
            random = start.random if again else 0
            segment += 1
        if code <= _TAPED:
            k = kinds.of[i]
            peak = level + (kinds.taped[k] if code else kinds.forward[k])
            source = books.states[i - 1] if books.has_state[i - 1] else books.outputs[i - 1]
            output = books.outputs[i] if code else books.states[i]
            made = _make(books, kinds, k, source, output, made)
            snapshot = stages.snapshots[i] * facts[_SNAPSHOTS, p]
            if code:
                books.inputs[i] = source
                books.clone[i] = clones[stages.owner[i]]
                keeps = facts[_KEEPS_OUTPUT, p]
                level += _begin_tape(books, kinds, k, i, keeps, snapshot)
            else:
                books.has_state[i] = True
                books.state_snapshot[i] = snapshot
                level += snapshot + _hold_all(books, output, _width(kinds, k))
            during[p] = max(peak, level)
            if facts[_FREES_INPUT, p]:
                level -= _stop_handing_on(books, i - 1, kinds.inputs[k])
        elif code == _BACKWARD:
            during[p] = level + _backward_peak(books, kinds, stages, i)
            level -= _drop_tape(books, kinds, i)
            level += stages.gradient[i - 1] - gradient + stages.parameters[i]
            gradient = stages.gradient[i - 1]
        elif code == _TURN:
            during[p] = level + stages.gradient[n] + start.loss
            level += _turn(books, kinds, n, start.held)
            if facts[_FREES_INPUT, p]:
                level -= _stop_handing_on(books, n, _width(kinds, kinds.of[n]))
            level += stages.gradient[n] - gradient
            gradient = stages.gradient[n]
        else:
            during[p] = level
            if kind == _STATE:
                books.has_state[i] = False
                width = _width(kinds, kinds.of[i]) if i else start.inputs
                level -= books.state_snapshot[i] + _release_all(books, books.states[i], width)
            elif kind == _TAPE:
                level -= _drop_tape(books, kinds, i)
            else:
                level -= gradient
                gradient = 0


@compiled
def _open(n: int, start: Start) -> _Books:
    """The input, which the caller holds besides."""
    shape = (n + 1, start.width)
    books = _Books(
        np.zeros(start.storages, np.int64),
        np.zeros(start.storages, np.int64),
        np.zeros(n + 1, np.bool_),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.full(n + 1, -1),
        np.zeros(n + 1, np.bool_),
        np.zeros(n + 1, np.int64),
        np.zeros(n + 1, np.int64),
    )
    books.sizes[0] = start.input_bytes
    books.holders[: start.inputs] = 2
    books.has_state[0] = True
    books.states[0, : start.inputs] = np.arange(start.inputs)
    books.state_snapshot[0] = start.snapshot
    return books


@compiled
def _hold(books: _Books, x: int) -> int:
    """Hold a storage; returns the bytes that this adds."""
    books.holders[x] += 1
    return int(books.sizes[x]) if books.holders[x] == 1 else 0


@compiled
def _release(books: _Books, x: int) -> int:
    """Hold a storage no longer; returns the bytes that this frees."""
    books.holders[x] -= 1
    return 0 if books.holders[x] else int(books.sizes[x])


@compiled
def _hold_all(books: _Books, storages: Integers, width: int) -> int:
    added = 0
    for k in range(width):
        added += _hold(books, storages[k])
    return added


@compiled
def _release_all(books: _Books, storages: Integers, width: int) -> int:
    freed = 0
    for k in range(width):
        freed += _release(books, storages[k])
    return freed


@compiled
def _width(kinds: Kinds, k: int) -> int:
    """Storages of the output."""
    return int(kinds.first_output[k + 1] - kinds.first_output[k])


@compiled
def _begin_segment(
    books: _Books, clones: Integers, replays: Replays, segment: int, made: int
) -> int:
    """Let clones of the last segment go and make new ones; returns the bytes that this adds."""
    added = 0
    for block in range(len(clones)):
        if clones[block] >= 0:
            added -= _release(books, clones[block])
            clones[block] = -1
    for at in range(replays.first[segment], replays.first[segment + 1]):
        books.sizes[made] = replays.size[at]
        clones[replays.block[at]] = made
        added += _hold(books, made)
        made += 1
    return added


@compiled
def _make(
    books: _Books, kinds: Kinds, k: int, source: Integers, output: Integers, made: int
) -> int:
    """Number the storages of an output; returns how many there are then."""
    first = kinds.first_output[k]
    for at in range(first, kinds.first_output[k + 1]):
        if kinds.source[at] >= 0:
            output[at - first] = source[kinds.source[at]]
        else:
            books.sizes[made] = kinds.size[at]
            output[at - first] = made
            made += 1
    return made


@compiled
def _saved(books: _Books, kinds: Kinds, i: int, at: int) -> int:
    """A storage that tape i keeps."""
    which = kinds.saved[at]
    return int(books.inputs[i, which] if which >= 0 else books.outputs[i, -1 - which])


@compiled
def _begin_tape(books: _Books, kinds: Kinds, k: int, i: int, hands_on: bool, snapshot: int) -> int:
    """Book a tape; returns the bytes that it adds."""
    added = kinds.tape[k]
    for at in range(kinds.first_saved[k], kinds.first_saved[k + 1]):
        added += _hold(books, _saved(books, kinds, i, at))
    if books.clone[i] >= 0:
        added += _hold(books, books.clone[i])
    books.hands_on[i] = hands_on
    books.tape_snapshot[i] = snapshot if hands_on else 0
    if hands_on:
        added += snapshot + _hold_all(books, books.outputs[i], _width(kinds, k))
    return int(added)


@compiled
def _stop_handing_on(books: _Books, i: int, width: int) -> int:
    """Returns the bytes that this frees."""
    if not books.hands_on[i]:
        return 0
    books.hands_on[i] = False
    return int(books.tape_snapshot[i]) + _release_all(books, books.outputs[i], width)


@compiled
def _drop_tape(books: _Books, kinds: Kinds, i: int) -> int:
    """Returns the bytes that this frees."""
    k = kinds.of[i]
    freed = _stop_handing_on(books, i, _width(kinds, k)) + kinds.tape[k]
    for at in range(kinds.first_saved[k], kinds.first_saved[k + 1]):
        freed += _release(books, _saved(books, kinds, i, at))
    if books.clone[i] >= 0:
        freed += _release(books, books.clone[i])
    return int(freed)


@compiled
def _turn(books: _Books, kinds: Kinds, n: int, held: int) -> int:
    """Have the caller hold the output, and the value of the loss; returns the bytes added."""
    width = _width(kinds, kinds.of[n])
    output = books.states[n] if books.has_state[n] else books.outputs[n]
    added = _hold_all(books, output, width)
    rest = held
    for k in range(width):
        is_new = True
        for other in range(k):
            is_new = is_new and output[other] != output[k]
        rest -= books.sizes[output[k]] if is_new else 0
    return int(added + max(0, rest))


@compiled
def _outlives(books: _Books, kinds: Kinds, i: int, x: int) -> bool:
    """Whether something besides tape i holds a storage."""
    k, own = kinds.of[i], 0
    for at in range(kinds.first_saved[k], kinds.first_saved[k + 1]):
        own += _saved(books, kinds, i, at) == x
    return bool(books.holders[x] > own)


@compiled
def _backward_peak(books: _Books, kinds: Kinds, stages: Stages, i: int) -> int:
    """The peak of a backward above the level before it."""
    k = kinds.of[i]
    first, half = stages.parameters[i] > 0, 0
    begin = kinds.first_peak[k]
    if kinds.has_parts[k]:
        count = kinds.first_saved[k + 1] - kinds.first_saved[k]
        half = (kinds.first_peak[k + 1] - begin) // 2
        mask, any_held = 0, 0
        for bit in range(count):
            x = _saved(books, kinds, i, kinds.first_saved[k] + bit)
            if _outlives(books, kinds, i, x):
                any_held = 1
                mask |= 1 << min(bit, 32)
        if count > 32 or half != 1 << count:
            mask = any_held
        before, at_first = kinds.peak[begin + mask], kinds.peak[begin + half + mask]
    else:
        mask = 4 * _outlives(books, kinds, i, books.inputs[i, 0])
        mask += 2 * _outlives(books, kinds, i, books.outputs[i, 0])
        before, at_first = kinds.peak[begin + mask], kinds.peak[begin + mask + 1]
    if stages.partly[i] and not first:
        return int(max(before, at_first))
    return int(at_first if first else before)
