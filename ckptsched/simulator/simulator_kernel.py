"""The planning model's pass over a schedule: its bytes, and the first rule that it breaks.

In what follows i is a stage or state, p the position of an operation, `tape` the number of a tape
in the flat arrays of all tapes that stages offer. Where a value lies is `at[tier, kind, i]`: 0
where it does not. What a broken rule means in words is said by `simulator`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled

Bytes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]

# The codes, kinds and tiers of the schedule language, as constants that compiled code can hold.
_TAPED, _TURN, _BACKWARD, _COPY, _DROP = 1, 2, 3, 4, 5
_STATE, _TAPE, _GRAD = 0, 1, 2
_DEVICE, _TIERS = 0, 3
# What the flag of a stored tape says: it was made from the tape before, or from the bare state,
# which is what a run reads where both are stored. It keeps that copy as long as it is there.
FROM_TAPE, FROM_STATE = 1, 2
# The rules, in the order in which they are looked at.
(
    FINE,
    UNKNOWN,
    NO_STAGE,
    NO_INPUT,
    STORED,
    NO_OPTION,
    NOT_TURNED,
    HAD_BACKWARD,
    NO_GRADIENT,
    NO_TAPE,
    NO_STATE,
    TURNED_BEFORE,
    NO_OUTPUT,
    NOT_HERE,
    INPUT_NEEDED,
    HELD_BY_TAPE,
    SAME_TIER,
    THERE_ALREADY,
    NO_INPUT_OF_TAPE,
) = range(19)
# Places in `Stored.totals`: the operation at hand, bytes on the device and of parameter gradients,
# whether the forward pass has ended; then by tier what lies there, and the most of it.
POSITION, LEVEL, PARAMETERS, TURNED, AWAY, MOST_AWAY = 0, 1, 2, 3, 4, 4 + _TIERS


class Sizes(NamedTuple):
    """Bytes of the planning model, by stage or state i but for those of tapes."""

    state: Bytes
    gradient: Bytes
    forward: Bytes
    """Extra bytes while a forward without tape runs."""
    parameters: Bytes
    """Parameter gradients that appear with the backward."""
    first: Bytes
    """Stage i offers the tapes first[i] to first[i + 1] - 1, its own first."""
    tape: Bytes
    """Bytes of each tape."""
    taped: Bytes
    """Extra bytes while the forward with it runs."""
    backward: Bytes
    """Extra bytes while the backward from it runs."""
    loss: int
    """Extra bytes while the loss runs."""


class Stored(NamedTuple):
    """What is stored, and what has been done."""

    at: Flags
    """Whether a value lies on a tier, shape (tiers, kinds, n + 1); of a tape on the device also
    what it holds: `FROM_TAPE`, `FROM_STATE`."""
    size: Bytes
    """Bytes of what lies on other tiers, in the same shape."""
    tape: Bytes
    """Number of the tape of stage i that is, or was last, stored, shape (n + 1,)."""
    done: Flags
    """Stages that have had their backward."""
    spent: Bytes
    """Number of the tape that this was from."""
    totals: Bytes
    """See `POSITION` and others."""


@compiled
def run(packed: Bytes, sizes: Sizes, stored: Stored, during: Bytes, moved: Bytes) -> int:
    """Do the first operations of a schedule, as far as they keep the rules.

    Args:
        packed: Operations as `Schedule` packs them.
        sizes: The chain's sizes.
        stored: What is stored before, and then after.
        during: Bytes on the device while each operation runs, to fill; as many are done.
        moved: Bytes that each Copy moves, to fill.

    Returns:
        The rule that the operation at `POSITION` breaks, or `FINE`.
    """
    at, totals = stored.at, stored.totals
    n = at.shape[2] - 1
    for p in range(len(during)):
        totals[POSITION] = p
        code, kind, i = packed[p] & 0xFF, packed[p] >> 8 & 0xFF, packed[p] >> 32
        source, target = packed[p] >> 16 & 0xFF, packed[p] >> 24 & 0xFF
        if code > _DROP or source >= _TIERS or target >= _TIERS:
            return UNKNOWN
        if code >= _COPY and kind > _GRAD:
            return UNKNOWN
        level = totals[LEVEL]
        if code <= _TAPED:
            rule = _may_run(sizes, at, code, kind, i, n)
            if rule:
                return rule
            if code:
                tape = sizes.first[i] + kind
                stored.tape[i] = tape
                at[_DEVICE, _TAPE, i] = FROM_TAPE + at[_DEVICE, _STATE, i - 1]
                totals[LEVEL] += sizes.tape[tape]
                during[p] = totals[LEVEL] + sizes.taped[tape]
            else:
                at[_DEVICE, _STATE, i] = 1
                totals[LEVEL] += sizes.state[i]
                during[p] = totals[LEVEL] + sizes.forward[i]
        elif code == _DROP:
            rule = _may_drop(stored, kind, i, source, n)
            if rule:
                return rule
            during[p] = level
            at[source, kind, i] = 0
            if source == _DEVICE:
                totals[LEVEL] -= _size(sizes, stored, kind, i)
            else:
                totals[AWAY + source] -= stored.size[source, kind, i]
        elif code == _BACKWARD:
            rule = _may_go_back(stored, i, n)
            if rule:
                return rule
            made = sizes.gradient[i - 1] + sizes.parameters[i]
            during[p] = level + made + sizes.backward[stored.tape[i]]
            totals[LEVEL] += made - sizes.gradient[i] - sizes.tape[stored.tape[i]]
            totals[PARAMETERS] += sizes.parameters[i]
            stored.spent[i] = stored.tape[i]
            at[_DEVICE, _TAPE, i] = at[_DEVICE, _GRAD, i] = 0
            at[_DEVICE, _GRAD, i - 1] = stored.done[i] = 1
        elif code == _TURN:
            if totals[TURNED]:
                return TURNED_BEFORE
            if not (at[_DEVICE, _STATE, n] or at[_DEVICE, _TAPE, n]):
                return NO_OUTPUT
            totals[TURNED] = 1
            at[_DEVICE, _GRAD, n] = 1
            totals[LEVEL] += sizes.gradient[n]
            during[p] = totals[LEVEL] + sizes.loss
        else:
            rule = _may_copy(at, kind, i, source, target, n)
            if rule:
                return rule
            moved[p] = _size(sizes, stored, kind, i)
            flag = 1
            if kind == _TAPE and i > 0:
                flag = FROM_TAPE + at[_DEVICE, _STATE, i - 1]
            at[target, kind, i] = flag
            if target == _DEVICE:
                totals[LEVEL] += moved[p]
            else:
                stored.size[target, kind, i] = moved[p]
                totals[AWAY + target] += moved[p]
                most = max(totals[MOST_AWAY + target], totals[AWAY + target])
                totals[MOST_AWAY + target] = most
            during[p] = totals[LEVEL]
    return FINE


@compiled
def _size(sizes: Sizes, stored: Stored, kind: int, i: int) -> int:
    """Bytes of a value on the device."""
    if kind == _STATE:
        return int(sizes.state[i])
    return int(sizes.tape[stored.tape[i]] if kind == _TAPE else sizes.gradient[i])


@compiled
def _may_run(sizes: Sizes, at: Flags, code: int, option: int, i: int, n: int) -> int:
    """The rule that a forward breaks, with the tape of an option or without."""
    if i < 1 or i > n:
        return NO_STAGE
    if not (at[_DEVICE, _STATE, i - 1] or at[_DEVICE, _TAPE, i - 1]):
        return NO_INPUT
    if at[_DEVICE, code, i]:
        return STORED
    if code and sizes.first[i] + option >= sizes.first[i + 1]:
        return NO_OPTION
    return FINE


@compiled
def _may_go_back(stored: Stored, i: int, n: int) -> int:
    """The rule that a backward breaks."""
    at = stored.at
    if i < 1 or i > n:
        return NO_STAGE
    if not stored.totals[TURNED]:
        return NOT_TURNED
    if stored.done[i]:
        return HAD_BACKWARD
    if not at[_DEVICE, _GRAD, i]:
        return NO_GRADIENT
    if not at[_DEVICE, _TAPE, i]:
        return NO_TAPE
    if not (at[_DEVICE, _STATE, i - 1] or at[_DEVICE, _TAPE, i - 1]):
        return NO_STATE
    return FINE


@compiled
def _may_drop(stored: Stored, kind: int, i: int, tier: int, n: int) -> int:
    """The rule that a Drop breaks."""
    at = stored.at
    if i < 0 or i > n:
        return NO_STAGE
    if not at[tier, kind, i]:
        return NOT_HERE
    if tier != _DEVICE:
        return FINE
    if kind == _STATE and i == 0 and not stored.done[1]:
        return INPUT_NEEDED
    if kind != _GRAD and i < n:
        holds = FROM_STATE if kind == _STATE else FROM_TAPE
        if at[_DEVICE, _TAPE, i + 1] == holds:
            return HELD_BY_TAPE
    return FINE


@compiled
def _may_copy(at: Flags, kind: int, i: int, source: int, target: int, n: int) -> int:
    """The rule that a Copy breaks."""
    if i < 0 or i > n:
        return NO_STAGE
    if source == target:
        return SAME_TIER
    if not at[source, kind, i]:
        return NOT_HERE
    if at[target, kind, i]:
        return THERE_ALREADY
    if target != _DEVICE or kind != _TAPE or i == 0:
        return FINE
    if not (at[_DEVICE, _STATE, i - 1] or at[_DEVICE, _TAPE, i - 1]):
        return NO_INPUT_OF_TAPE  # which it would come to hold
    return FINE
