"""The planning model's pass over a long schedule, compiled: a hundred times as fast.

It knows the operations of a schedule on the device whose stages offer one tape, and says whether
all of them are allowed. Which one is not, and why, is left to the simulator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled

Bytes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint8]

# The codes and kinds of schedule.py, as constants that compiled code can hold.
_FORWARD, _TAPED, _TURN, _BACKWARD, _DROP = 0, 1, 2, 3, 5
_STATE, _TAPE, _GRAD = 0, 1, 2
# The flags of a stored tape, as in simulator.py.
_FROM_TAPE, _FROM_STATE = 1, 2


class Sizes(NamedTuple):
    """Bytes of the planning model; index i is stage or state i."""

    state: Bytes
    tape: Bytes
    gradient: Bytes
    forward: Bytes
    """Extra bytes while a forward runs."""
    backward: Bytes
    """Extra bytes while a backward runs."""
    parameters: Bytes
    """Parameter gradients that appear with the first backward."""
    loss: int
    """Extra bytes while the loss runs."""


class Stored(NamedTuple):
    """What is stored, by stage, and which stages have had their backward."""

    states: Flags
    tapes: Flags
    grads: Flags
    done: Flags


@compiled
def run(packed: Bytes, sizes: Sizes, stored: Stored, level: Any, timeline: Bytes) -> int:
    """Do the operations of a schedule, as far as they are allowed and known.

    Args:
        packed: Operations as `Schedule` packs them.
        sizes: The chain's sizes.
        stored: What is stored before, and after the call then.
        level: Bytes that are stored before.
        timeline: Bytes while each operation runs, to fill.

    Returns:
        How many operations were done; fewer than all where one is not allowed or not known.
    """
    n = len(stored.done) - 1
    turned = False
    for p in range(len(packed)):
        code, kind = packed[p] & 0xFF, packed[p] >> 8 & 0xFF
        elsewhere, i = packed[p] >> 16 & 0xFFFF, packed[p] >> 32
        during, after = 0, 0
        if i < 0 or i > n or elsewhere or (kind and code != _DROP):
            return p
        if code <= _TAPED:
            if i == 0 or not (stored.states[i - 1] or stored.tapes[i - 1]):
                return p
            target = stored.tapes if code else stored.states
            if target[i]:
                return p
            target[i] = _FROM_TAPE + stored.states[i - 1] if code else 1
            after = sizes.tape[i] if code else sizes.state[i]
            during = after + sizes.forward[i]
        elif code == _DROP:
            if kind > _GRAD or not _drop(stored, kind, i, n):
                return p
            after = -_size(sizes, kind, i)
        elif code == _BACKWARD:
            if i == 0 or not (turned and stored.grads[i] and stored.tapes[i]) or stored.done[i]:
                return p
            if not (stored.states[i - 1] or stored.tapes[i - 1]):
                return p
            stored.tapes[i] = stored.grads[i] = 0
            stored.grads[i - 1] = stored.done[i] = 1
            made = sizes.gradient[i - 1] + sizes.parameters[i]
            during = made + sizes.backward[i]
            after = made - sizes.gradient[i] - sizes.tape[i]
        elif code == _TURN:
            if turned or not (stored.states[n] or stored.tapes[n]):
                return p
            turned = True
            stored.grads[n] = 1
            after = sizes.gradient[n]
            during = after + sizes.loss
        else:
            return p
        timeline[p] = level + during
        level += after
    return len(packed)


@compiled
def _size(sizes: Sizes, kind: int, i: int) -> Any:
    if kind == _STATE:
        return sizes.state[i]
    return sizes.tape[i] if kind == _TAPE else sizes.gradient[i]


@compiled
def _drop(stored: Stored, kind: int, i: int, n: int) -> bool:
    """Forget a value; whether that is allowed."""
    values = stored.states
    if kind == _TAPE:
        values = stored.tapes
    elif kind == _GRAD:
        values = stored.grads
    if not values[i] or (kind == _STATE and i == 0 and not stored.done[1]):
        return False
    if kind != _GRAD and i < n:
        holds = _FROM_STATE if kind == _STATE else _FROM_TAPE
        if stored.tapes[i + 1] == holds:
            return False
    values[i] = 0
    return True
