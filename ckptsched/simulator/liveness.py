"""Which run of a stage needs what: facts about a schedule that hold for every interpreter.

The executor and the ledger must agree to the byte on how long an output, a tape's copy of
it, and a snapshot of the random state live. Both read it from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.budget import Tier
from ..schedule.language import Code, Kind, Schedule
from ..workload.stage import Block


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
    snapshots_input: bool
    """Whether the chain's input is read by a run that restores."""
    repeats: npt.NDArray[np.bool_]
    """A run of a stage that has run before."""


def analyse(schedule: Schedule, stages: int, *, compiled: bool = False) -> Liveness:
    """Find how long outputs and random states are needed.

    Args:
        schedule: A valid schedule; of an invalid one the answer means nothing.
        stages: Number of stages n.
        compiled: Have compiled code find it; for a valid schedule without copies and without
            drops on other tiers.

    Returns:
        One fact an operation, in O(operations).
    """
    size = len(schedule)
    flags = np.zeros((5, size), dtype=np.bool_)
    if compiled:
        from . import exact_bytes_kernel as ledger_kernel

        snapshots_input = bool(ledger_kernel.analyse(schedule.packed, stages, flags))
        keeps_output, frees_input, restores, snapshots, repeats = flags
        return Liveness(keeps_output, frees_input, restores, snapshots, snapshots_input, repeats)
    keeps_output, frees_input, restores, snapshots, repeats = flags
    states = [-2] * (stages + 1)  # position of the run that made it; -1 the input, -2 none
    tapes = [-2] * (stages + 1)
    last_read: dict[int, int] = {}
    states[0] = -1
    snapshots_input = False
    seen = bytearray(stages + 1)
    previous = 0  # stage whose run came last; the input counts as the run of stage 0
    codes, numbers, kinds = schedule.codes.tolist(), schedule.stages.tolist(), schedule.kinds
    sources = schedule.sources
    for p, (code, i) in enumerate(zip(codes, numbers, strict=True)):
        if code <= Code.TAPED_FORWARD:
            maker = states[i - 1]
            if maker == -2:
                maker = tapes[i - 1]
                last_read[maker] = p
            if previous != i - 1:
                restores[p] = True
                if maker < 0:
                    snapshots_input = True
                else:
                    snapshots[maker] = True
            repeats[p] = seen[i]
            seen[i] = 1
            previous = i
            (tapes if code else states)[i] = p
        elif code == Code.TURN:
            if states[stages] == -2:
                last_read[tapes[stages]] = p
            previous = -1
        elif code == Code.BACKWARD:
            tapes[i] = -2
            previous = -1
        elif code == Code.DROP and sources[p] == Tier.DEVICE:
            if kinds[p] == Kind.STATE:
                states[i] = -2
            elif kinds[p] == Kind.TAPE:
                tapes[i] = -2
    for maker, reader in last_read.items():
        if maker >= 0:
            keeps_output[maker] = True
            frees_input[reader] = True
    return Liveness(keeps_output, frees_input, restores, snapshots, snapshots_input, repeats)


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
