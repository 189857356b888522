"""The planning model's pass over a schedule: its bytes, and the first rule that it breaks.

In what follows i is a stage or state, u a state that is read and v who reads it, p the position of
an operation, `tape` the number of a tape in the flat arrays of all tapes that stages offer. Stages
read one state or, in a graph, several. Where a value lies is `at[tier, kind, i]`: 0 where it does
not. What a broken rule means in words is said by `rule_words`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled
from ..schedule.language import BACKWARD, COPY, DEVICE, DROP, GRAD, STATE, TAPE, TAPED, TIERS, TURN

Bytes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]

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
    NOT_COMPLETE,
    NO_GRADIENT,
    NO_TAPE,
    LOST_PART,
    OTHER_COPY,
    TURNED_BEFORE,
    NO_OUTPUT,
    NOT_HERE,
    INPUT_NEEDED,
    HELD_BY_TAPE,
    SAME_TIER,
    THERE_ALREADY,
    NO_INPUT_OF_TAPE,
) = range(21)
# Places in `Stored.totals`: the operation at hand, bytes on the device and of parameter gradients,
# whether the forward pass has ended, and the other stage or state that a broken rule is about; then
# by tier what lies there, and the most of it.
POSITION, LEVEL, PARAMETERS, TURNED, ABOUT, AWAY, MOST_AWAY = 0, 1, 2, 3, 4, 5, 5 + TIERS


class Edges(NamedTuple):
    """Who reads what; an edge is one stage reading one state."""

    first: Bytes
    """Stage i has the edges first[i] to first[i + 1] - 1."""
    source: Bytes
    """By edge: the state that is read."""
    reader: Bytes
    """By edge: the stage that reads it."""
    first_from: Bytes
    """State u has first_from[u] to first_from[u + 1] - 1 of `leaving`."""
    leaving: Bytes
    """Edges by the state that they leave."""
    pins: bool
    """Whether a tape needs, to its Backward, the states that it was made from. By value it holds
    what it saves, and needs nothing else."""


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
    """Whether a value lies on a tier, shape (tiers, kinds, n + 1)."""
    bare: Flags
    """By edge: whether the tape of its reader, if that is stored, was made from the bare state, and
    not from its tape. It keeps that copy as long as it is there."""
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
def run(
    packed: Bytes, edges: Edges, sizes: Sizes, stored: Stored, during: Bytes, moved: Bytes
) -> int:
    """Do the first operations of a schedule, as far as they keep the rules.

    Args:
        packed: Operations as `Schedule` packs them.
        edges: Who reads what.
        sizes: Bytes of stages.
        stored: What is stored before, and then after.
        during: Bytes on the device while each operation runs, to fill; as many are done.
        moved: Bytes that each Copy moves, to fill.

    Returns:
        The rule that the operation at `POSITION` breaks, or `FINE`.
    """
    # Branches stay in this loop: a call counts a reference to every array that it hands on, which
    # for all of them takes longer than what is done.
    at, totals = stored.at, stored.totals
    for p in range(len(during)):
        totals[POSITION] = p
        code, kind, i = packed[p] & 0xFF, packed[p] >> 8 & 0xFF, packed[p] >> 32
        source, target = packed[p] >> 16 & 0xFF, packed[p] >> 24 & 0xFF
        if code > DROP or source >= TIERS or target >= TIERS or (code >= COPY and kind > GRAD):
            return UNKNOWN
        if code <= TAPED:
            rule = _may_run(edges, sizes.first, at, totals, code, kind, i)
            if rule:
                return rule
            size, extra = sizes.state[i], sizes.forward[i]
            if code:
                tape = sizes.first[i] + kind
                size, extra = sizes.tape[tape], sizes.taped[tape]
                stored.tape[i] = tape
                _hold(edges, at, stored.bare, i)
            at[DEVICE, code, i] = 1
            totals[LEVEL] += size
            during[p] = totals[LEVEL] + extra
        elif code == DROP:
            rule = _may_drop(edges, stored, kind, i, source)
            if rule:
                return rule
            during[p] = totals[LEVEL]
            size = stored.size[source, kind, i] if source else _size(sizes, stored, kind, i)
            at[source, kind, i] = 0
            totals[AWAY + source if source else LEVEL] -= size
        elif code == BACKWARD:
            rule = _may_go_back(edges, stored, i)
            if rule:
                return rule
            during[p] = _go_back(edges, sizes, stored, i)
        elif code == TURN:
            rule = _turn(at, totals, sizes.gradient)
            if rule:
                return rule
            during[p] = totals[LEVEL] + sizes.loss
        else:
            rule = _may_copy(edges, stored, kind, i, source, target)
            if rule:
                return rule
            moved[p] = _size(sizes, stored, kind, i)
            _copy(edges, stored, kind, i, target, moved[p])
            during[p] = totals[LEVEL]
    return FINE


@compiled
def _go_back(edges: Edges, sizes: Sizes, stored: Stored, i: int) -> int:
    """Do a backward; returns the bytes while it runs.

    Of a state that several read it makes a part, which is added to those before it.
    """
    at, totals, tape = stored.at, stored.totals, stored.tape[i]
    peak = totals[LEVEL] + sizes.parameters[i] + sizes.backward[tape]
    for e in range(edges.first[i], edges.first[i + 1]):
        u = edges.source[e]
        peak += sizes.gradient[u]
        if not at[DEVICE, GRAD, u]:
            at[DEVICE, GRAD, u] = 1
            totals[LEVEL] += sizes.gradient[u]
    totals[LEVEL] += sizes.parameters[i] - sizes.gradient[i] - sizes.tape[tape]
    totals[PARAMETERS] += sizes.parameters[i]
    at[DEVICE, TAPE, i] = at[DEVICE, GRAD, i] = 0
    stored.done[i] = 1
    stored.spent[i] = tape
    return int(peak)


@compiled
def _turn(at: Flags, totals: Bytes, gradient: Bytes) -> int:
    """End the forward pass; returns the rule that this breaks."""
    n = at.shape[2] - 1
    if totals[TURNED]:
        return TURNED_BEFORE
    if not (at[DEVICE, STATE, n] or at[DEVICE, TAPE, n]):
        return NO_OUTPUT
    totals[TURNED] = at[DEVICE, GRAD, n] = 1
    totals[LEVEL] += gradient[n]
    return FINE


@compiled
def _copy(edges: Edges, stored: Stored, kind: int, i: int, target: int, size: int) -> None:
    totals = stored.totals
    stored.at[target, kind, i] = 1
    if target == DEVICE:
        totals[LEVEL] += size
        if kind == TAPE:
            _hold(edges, stored.at, stored.bare, i)
    else:
        stored.size[target, kind, i] = size
        totals[AWAY + target] += size
        totals[MOST_AWAY + target] = max(totals[MOST_AWAY + target], totals[AWAY + target])


@compiled
def _size(sizes: Sizes, stored: Stored, kind: int, i: int) -> int:
    """Bytes of a value on the device."""
    if kind == STATE:
        return int(sizes.state[i])
    return int(sizes.tape[stored.tape[i]] if kind == TAPE else sizes.gradient[i])


@compiled
def _hold(edges: Edges, at: Flags, bare: Flags, i: int) -> None:
    """Note which copies tape i keeps: bare states, which a run reads where there are both."""
    for e in range(edges.first[i], edges.first[i + 1]):
        bare[e] = at[DEVICE, STATE, edges.source[e]]


@compiled
def _lacks(edges: Edges, at: Flags, totals: Bytes, i: int) -> bool:
    """Whether a state that stage i reads is neither there nor in a tape; notes which."""
    for e in range(edges.first[i], edges.first[i + 1]):
        u = edges.source[e]
        if not (at[DEVICE, STATE, u] or at[DEVICE, TAPE, u]):
            totals[ABOUT] = u
            return True
    return False


@compiled
def _is_awaited(edges: Edges, stored: Stored, u: int) -> bool:
    """Whether a reader of a state has not had its backward; notes which."""
    for k in range(edges.first_from[u], edges.first_from[u + 1]):
        v = edges.reader[edges.leaving[k]]
        if not stored.done[v]:
            stored.totals[ABOUT] = v
            return True
    return False


@compiled
def _may_run(
    edges: Edges, first: Bytes, at: Flags, totals: Bytes, code: int, option: int, i: int
) -> int:
    """The rule that a forward breaks, with the tape of an option or without."""
    if i < 1 or i >= at.shape[2]:
        return NO_STAGE
    if _lacks(edges, at, totals, i):
        return NO_INPUT
    if at[DEVICE, code, i]:
        return STORED
    if code and first[i] + option >= first[i + 1]:
        return NO_OPTION
    return FINE


@compiled
def _may_go_back(edges: Edges, stored: Stored, i: int) -> int:
    """The rule that a backward breaks."""
    at = stored.at
    if i < 1 or i >= at.shape[2]:
        return NO_STAGE
    if not stored.totals[TURNED]:
        return NOT_TURNED
    if stored.done[i]:
        return HAD_BACKWARD
    if _is_awaited(edges, stored, i):
        return NOT_COMPLETE
    if not at[DEVICE, GRAD, i]:
        return NO_GRADIENT
    if not at[DEVICE, TAPE, i]:
        return NO_TAPE
    if edges.pins and _lacks(edges, at, stored.totals, i):
        return NO_INPUT
    for e in range(edges.first[i], edges.first[i + 1]):
        rule = _may_add(edges, stored, edges.source[e])
        if rule:
            return rule
    return FINE


@compiled
def _may_add(edges: Edges, stored: Stored, u: int) -> int:
    """The rule that is broken where a part of a gradient is made.

    One that was begun is added to where it lies, and has no other copy.
    """
    stored.totals[ABOUT] = u
    at = stored.at
    if not at[DEVICE, GRAD, u]:
        for k in range(edges.first_from[u], edges.first_from[u + 1]):
            if stored.done[edges.reader[edges.leaving[k]]]:
                return LOST_PART
    for tier in range(1, TIERS):
        if at[tier, GRAD, u]:
            return OTHER_COPY
    return FINE


@compiled
def _may_drop(edges: Edges, stored: Stored, kind: int, i: int, tier: int) -> int:
    """The rule that a Drop breaks."""
    at = stored.at
    if i < 0 or i >= at.shape[2]:
        return NO_STAGE
    if not at[tier, kind, i]:
        return NOT_HERE
    if tier != DEVICE or kind == GRAD:
        return FINE
    if kind == STATE and i == 0 and _is_awaited(edges, stored, 0):
        return INPUT_NEEDED
    if not edges.pins:
        return FINE
    for k in range(edges.first_from[i], edges.first_from[i + 1]):
        e = edges.leaving[k]
        if at[DEVICE, TAPE, edges.reader[e]] and stored.bare[e] == (kind == STATE):
            stored.totals[ABOUT] = edges.reader[e]
            return HELD_BY_TAPE
    return FINE


@compiled
def _may_copy(edges: Edges, stored: Stored, kind: int, i: int, source: int, target: int) -> int:
    """The rule that a Copy breaks."""
    at = stored.at
    if i < 0 or i >= at.shape[2]:
        return NO_STAGE
    if source == target:
        return SAME_TIER
    if not at[source, kind, i]:
        return NOT_HERE
    if at[target, kind, i]:
        return THERE_ALREADY
    if target == DEVICE and kind == TAPE and _lacks(edges, at, stored.totals, i):
        return NO_INPUT_OF_TAPE  # which it would come to hold
    return FINE
