"""A plan as the runs it makes; what is dropped when follows from what is still to be read.

Peers say which stages run, in which order, and where from. Their plans become schedules of our
language here, in the reading that needs least memory: a state or tape goes right after its last
use. What a peer keeps longer does not count against it.
"""

from __future__ import annotations

from array import array
from typing import final

import numpy as np
import numpy.typing as npt
from numba import njit

from ckptsched.schedule.language import Code, Schedule

_FORWARD, _TAPED, _TURN, _BACKWARD, _DROP = (
    int(Code.FORWARD),
    int(Code.TAPED_FORWARD),
    int(Code.TURN),
    int(Code.BACKWARD),
    int(Code.DROP),
)
_STAGE = 32  # the stage takes the upper half of a packed operation


@final
class Runs:
    """Collects runs, Turn and backwards in the order of a plan."""

    def __init__(self, stages: int) -> None:
        """Start with nothing.

        Args:
            stages: Length n of the chain.
        """
        self._stages = stages
        self._packed = array("q")

    def forward(self, first: int, last: int) -> None:
        """Run stages first..last without tape."""
        self._packed.extend(i << _STAGE | _FORWARD for i in range(first, last + 1))

    def tape(self, first: int, last: int) -> None:
        """Run stages first..last with tapes."""
        self._packed.extend(i << _STAGE | _TAPED for i in range(first, last + 1))

    def turn(self) -> None:
        """End the forward pass."""
        self._packed.append(_TURN)

    def backward(self, last: int, first: int) -> None:
        """Run the backwards of stages last..first."""
        self._packed.extend(i << _STAGE | _BACKWARD for i in range(last, first - 1, -1))

    def schedule(self) -> Schedule:
        """The runs with their drops; the simulator says whether it is valid."""
        packed = np.frombuffer(self._packed, dtype=np.int64)
        return Schedule(_with_drops(packed, self._stages, _dying(packed, self._stages)))


@njit(cache=True)
def _dying(packed: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.uint8]:
    """Which operations read a state for the last time (1) or make one that none reads (2)."""
    marks = np.zeros(len(packed), dtype=np.uint8)
    wanted = np.zeros(n + 1, dtype=np.uint8)  # read further on, before it is made again
    for p in range(len(packed) - 1, -1, -1):
        code, i = packed[p] & 0xFF, packed[p] >> _STAGE
        if code <= _TAPED:
            if not wanted[i]:
                marks[p] |= 2
            wanted[i] = 0
        read = n if code == _TURN else i - 1
        if not wanted[read]:
            marks[p] |= 1
        wanted[read] = 1
    return marks


@njit(cache=True)
def _with_drops(
    packed: npt.NDArray[np.int64], n: int, marks: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Put a Drop behind the last use of every state that is in no tape."""
    found = np.empty(3 * len(packed), dtype=np.int64)
    size = 0
    stored = np.zeros(n + 1, dtype=np.uint8)
    stored[0] = 1
    for p in range(len(packed)):
        code, i = packed[p] & 0xFF, packed[p] >> _STAGE
        found[size] = packed[p]
        size += 1
        if code == _FORWARD:
            stored[i] = 1
        read = n if code == _TURN else i - 1
        if marks[p] & 1 and stored[read]:
            stored[read] = 0
            found[size] = read << _STAGE | _DROP
            size += 1
        if code == _FORWARD and marks[p] & 2:
            stored[i] = 0
            found[size] = i << _STAGE | _DROP
            size += 1
    return found[:size].copy()
