"""Which run of a stage needs what: facts about a schedule that hold for every interpreter.

The executor and the ledger must agree to the byte on how long an output, a tape's copy of
it, and a snapshot of the random state live. Both read it from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.jit import compiled, suited
from ..schedule.language import BACKWARD, DEVICE, DROP, STATE, TAPE, TAPED, TURN, Code, Schedule
from ..workload.stage import Block

KEEPS_OUTPUT, FREES_INPUT, _RESTORES, SNAPSHOTS, _REPEATS = range(5)
"""Rows of the facts, in the order of the fields of `Liveness`."""
# What made a state: a run at this position, the caller (it is the input), or nothing yet.
_INPUT, _NONE = -1, -2
# Steps of the interpreter for an operation.
_STEPS = 3


@final
@dataclass(frozen=True, slots=True)
class Liveness:
    """Facts about each operation, by its position in the schedule."""

    keeps_output: npt.NDArray[np.bool_]
    """A run with tape whose output is read later from the tape."""
    frees_input: npt.NDArray[np.bool_]
    """A run (or Turn) that is the last to read its input from a tape."""
    restores: npt.NDArray[np.bool_]
    """A run that does not follow the run that made its input: the random state must be put back."""
    snapshots: npt.NDArray[np.bool_]
    """A run whose output is read by one that restores."""
    repeats: npt.NDArray[np.bool_]
    """A run of a stage that has run before."""
    snapshots_input: bool
    """Whether the chain's input is read by a run that restores."""


def analyse(schedule: Schedule, stages: int) -> Liveness:
    """Find how long outputs and random states are needed.

    Args:
        schedule: A valid schedule; of an invalid one the answer means nothing.
        stages: Number of stages n.

    Returns:
        One fact an operation, in O(operations).
    """
    facts = np.zeros((5, len(schedule)), dtype=np.bool_)
    find = suited(_analyse, _STEPS * len(schedule))
    snapshots_input = bool(find(schedule.packed, stages, facts))
    keeps_output, frees_input, restores, snapshots, repeats = facts
    return Liveness(keeps_output, frees_input, restores, snapshots, repeats, snapshots_input)


@compiled
def _analyse(packed: npt.NDArray[np.int64], stages: int, facts: npt.NDArray[np.bool_]) -> bool:
    """Fill the facts; returns whether the input is read by a run that restores."""
    # By stage, the position of the run that made the state or tape that is stored; by position of
    # a run with tape, that of the last run which reads its output from the tape.
    states, tapes = np.full(stages + 1, _NONE), np.full(stages + 1, _NONE)
    last_read = np.full(len(packed), _NONE)
    seen = np.zeros(stages + 1, np.bool_)
    states[0] = _INPUT
    previous, snapshots_input = 0, False  # the stage that ran last; the input counts as stage 0
    for p in range(len(packed)):
        code, kind, i = packed[p] & 0xFF, packed[p] >> 8 & 0xFF, packed[p] >> 32
        if code <= TAPED:
            maker = states[i - 1]
            if maker == _NONE:
                maker = tapes[i - 1]
                last_read[maker] = p
            if previous != i - 1:
                facts[_RESTORES, p] = True
                if maker < 0:
                    snapshots_input = True
                else:
                    facts[SNAPSHOTS, maker] = True
            facts[_REPEATS, p] = seen[i]
            seen[i] = True
            previous = i
            if code:
                tapes[i] = p
            else:
                states[i] = p
        elif code == TURN:
            if states[stages] == _NONE:
                last_read[tapes[stages]] = p
            previous = -1
        elif code == BACKWARD:
            tapes[i] = _NONE
            previous = -1
        elif code == DROP and packed[p] >> 16 & 0xFF == DEVICE:
            if kind == STATE:
                states[i] = _NONE
            elif kind == TAPE:
                tapes[i] = _NONE
    for maker in range(len(packed)):
        if last_read[maker] >= 0:
            facts[KEEPS_OUTPUT, maker] = True
            facts[FREES_INPUT, last_read[maker]] = True
    return snapshots_input


def snapshot_bytes(
    blocks: tuple[Block, ...], stages: int, random_state_bytes: int
) -> npt.NDArray[np.int64]:
    """What a snapshot with each state holds: random states, and the hidden state of later stages.

    Args:
        blocks: Blocks that cover the chain.
        stages: Number of stages n.
        random_state_bytes: Bytes of the random state alone.

    Returns:
        Bytes by state, 0 to n: int64, shape (n + 1,).
    """
    sizes = np.full(stages + 1, random_state_bytes, dtype=np.int64)
    for block in blocks:
        sizes[: block.last] += block.hidden_bytes
    return sizes


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """The operations that one block's node runs, forward or backward."""

    block: int
    """Index of the block."""
    start: int
    """Position of its first operation."""
    stop: int
    """Position after its last operation."""


@final
@dataclass(frozen=True, slots=True)
class Segments:
    """A schedule cut into what each block's forward and backward runs."""

    forward: tuple[Segment, ...]
    """By block, first to last; Turn and what follows it belong to none."""
    turn: int
    """Position of Turn."""
    backward: tuple[Segment, ...]
    """By block, last to first; each ends with the block's last Backward."""


def blocks_of(blocks: tuple[Block, ...], stages: int) -> tuple[Block, ...]:
    """The chain's blocks, or one that covers all stages where it has none."""
    return blocks or (Block(name="", first=1, last=stages),)


def cut(schedule: Schedule, blocks: tuple[Block, ...]) -> Segments:
    """Cut a valid schedule at the borders of blocks.

    Args:
        schedule: A valid schedule.
        blocks: Blocks that cover the chain.

    Returns:
        For each block the operations up to the first run of the next block (forward), and
        up to the Backward of its first stage (backward).
    """
    codes, numbers = schedule.codes, schedule.stages
    turn = int(np.flatnonzero(codes == Code.TURN)[0])
    runs = np.flatnonzero(codes[:turn] <= Code.TAPED_FORWARD)
    starts = [0]
    for block in blocks[1:]:
        starts.append(int(runs[np.argmax(numbers[runs] >= block.first)]))
    starts.append(turn)
    forward = tuple(Segment(k, starts[k], starts[k + 1]) for k in range(len(blocks)))
    backwards = np.flatnonzero(codes == Code.BACKWARD)
    position = {int(numbers[p]): int(p) for p in backwards}
    backward, start = [], turn + 1
    for k in reversed(range(len(blocks))):
        stop = position[blocks[k].first] + 1 if k else len(schedule)
        backward.append(Segment(k, start, stop))
        start = stop
    return Segments(forward, turn, tuple(backward))
