"""Runs: stages in a row that are equal in every number, as the steps of an ODE block are.

A network of L blocks with N_t equal steps has a few dozen runs, however many steps. What a segment
of such a chain needs depends on the runs in which it starts and ends, so that tables of needs have
a row a run and not a row a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..chain.sizes import Bytes, ChainSizes

Indices = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
Rounding = Literal["nearest", "down"]

# Of one run: slots of a kept state, of a kept tape; least slots for a stage with tape, for a sweep
# of one stage, and for a longer one.
Limits = tuple[int, int, int, int, int]


@final
@dataclass(frozen=True)
class Runs:
    """A chain in runs, in order; what is indexed by stage has the run's number, R is the loss."""

    first: Indices
    """First stage of each run, shape (R,)."""
    count: Indices
    """Stages of each run."""
    seconds: Seconds
    """Seconds of one forward (u_f)."""
    state: Bytes
    """What keeping an output takes (w_a), at the least or at most."""
    entry: Bytes
    """The state before the run's first stage, where a sweep enters it."""
    forward: Bytes
    """A run without tape, the output included (w_a + o_f)."""
    tape: Bytes
    """What keeping a tape takes (w_t)."""
    taped: Bytes
    """A run with tape, the tape included (w_t + o_f)."""
    backward: Bytes
    """A backward: tape, both gradients, all parameter gradients that are there."""
    backward_after_turn: Bytes
    """The same for a tape from before the loss."""
    level: Bytes
    """Gradient and parameter gradients that are there through a segment that ends in the run;
    0 for one that ends in the loss, shape (R + 1,)."""
    turn: int
    """Bytes of the loss."""
    stages: int
    """Stages of the chain, n."""

    def __len__(self) -> int:
        """The number of runs R."""
        return len(self.first)

    @property
    def last(self) -> Indices:
        """Last stage of each run."""
        return self.first + self.count - 1


@final
@dataclass(frozen=True)
class ChainRuns:
    """The runs of a chain, with the sizes to plan with and those to bound with.

    They differ where a stage has several tapes or, with a ledger, several ways to start after one:
    plans use the stage's own tape and the start that needs more, bounds the least of each figure.
    """

    plan: Runs
    bound: Runs


def chain_runs(sizes: ChainSizes) -> ChainRuns:
    """Find the runs of a chain: the longest rows of stages that are equal in all sizes.

    Args:
        sizes: The chain's sizes; those of parameter gradients must not change within a run.
    """
    n = len(sizes)
    least, most = _tapings(sizes, most=False), _tapings(sizes, most=True)
    whole, new = sizes.state, sizes.storages.new(n + 1)
    is_view = (whole > 0)[1:] & (new == 0)[1:]
    columns = [
        *(whole[1:], new[1:], sizes.layout[1:], sizes.gradient[1:-1], sizes.later[1:-1]),
        *(sizes.forward[1:], sizes.forward_seconds[1:], *least, *most),
    ]
    starts = np.ones(n, dtype=np.bool_)
    starts[1:] = is_view[1:]  # views are never in a run
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    starts[1:] |= is_view[:-1]
    at = np.flatnonzero(starts)
    count = np.diff(np.append(at, n))

    def runs(tapings: tuple[Bytes, Bytes, Bytes, Bytes], state: Bytes, entry: Bytes) -> Runs:
        tape, taped, backward, backward_after_turn = (column[at] for column in tapings)
        return Runs(
            first=at + 1,
            count=count,
            seconds=sizes.forward_seconds[at + 1],
            state=state,
            entry=entry,
            forward=sizes.forward[at + 1],
            tape=tape,
            taped=taped,
            backward=backward,
            backward_after_turn=backward_after_turn,
            level=np.append((sizes.gradient + sizes.later)[at + 1], 0),
            turn=sizes.turn,
            stages=n,
        )

    # What all stages of a run hand on was there before: beside it a state takes what is new.
    state = np.where(count == 1, whole[at + 1], new[at + 1])
    return ChainRuns(plan=runs(most, state, whole[at]), bound=runs(least, new[at + 1], new[at]))


def _tapings(sizes: ChainSizes, *, most: bool) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Tape, run with tape, backward, and backward after Turn, by stage from 1 on."""
    tapings = sizes.tapings
    stage = sizes.starts.stage[tapings.start] - 1
    found = []
    own = tapings.option == 0
    columns = (tapings.tape, tapings.forward, tapings.backward, tapings.backward_after_turn)
    for column in columns:
        by_stage = np.full(len(sizes), 0 if most else np.iinfo(np.int64).max)
        if most:
            np.maximum.at(by_stage, stage[own], column[own])
        else:
            np.minimum.at(by_stage, stage, column)
        found.append(by_stage)
    tape, taped, backward, backward_after_turn = found
    return tape, taped, backward, backward_after_turn


class RunSlots(NamedTuple):
    """A chain's runs in memory slots: plain arrays, as compiled loops take them.

    Needs are those of segments that start in run a and end in run b; R is the loss.
    """

    stages: Indices
    """Stages, by run."""
    seconds: Seconds
    """Seconds of a forward."""
    keep: Indices
    """Slots that a kept state takes."""
    tape: Indices
    """Slots that a kept tape takes."""
    taped: Indices
    """taped[a, b]: least slots in which the first stage can be taped first and reversed last."""
    alone: Indices
    """alone[a, b]: least slots for a sweep of one stage."""
    pair: Indices
    """pair[a, b]: the same for several stages of run a."""
    cross: Indices
    """cross[a, c, b, x, y]: the same from run a into a later run c; x and y say whether it has
    more than one stage there."""
    turn: int
    """Least slots of the loss."""
    end: Indices
    """Stages after each run."""
    elapsed: Seconds
    """elapsed[y]: seconds of forwards of the last y stages, shape (n + 1,)."""


def run_slots(runs: Runs, unit: int, rounding: Rounding) -> RunSlots:
    """Count sizes in slots.

    Args:
        runs: The runs.
        unit: Bytes of a slot.
        rounding: "down" for bounds.
    """

    def slots(size: Bytes) -> Indices:
        half = unit // 2 if rounding == "nearest" else 0
        return np.maximum(size + half, 0) // unit

    number, level = len(runs), runs.level
    taped = np.maximum(runs.taped[:, None] + level[None, :], runs.backward[:, None])
    after_turn = np.maximum(runs.taped + level[-1], runs.backward_after_turn)
    taped[:, number] = after_turn
    pair = runs.forward + runs.state  # two stages of the same run, one after the other
    alone = runs.forward
    cross = np.zeros((number, number, number + 1, 2, 2), dtype=np.int64)
    for a in range(number):
        between = 0
        for c in range(a + 1, number):
            between = max(between, int(runs.forward[c] + runs.entry[c]))
            for x, y in np.ndindex(2, 2):
                need = max(int(pair[a] if x else alone[a]), between, int(pair[c]) if y else 0)
                cross[a, c, :, x, y] = need + level
            if runs.count[c] > 1:
                between = max(between, int(pair[c]))
    elapsed = np.zeros(runs.stages + 1)
    np.cumsum(np.repeat(runs.seconds, runs.count)[::-1], out=elapsed[1:])
    return RunSlots(
        stages=runs.count,
        seconds=runs.seconds,
        keep=slots(runs.state),
        tape=slots(runs.tape),
        taped=slots(taped),
        alone=slots(alone[:, None] + level[None, :]),
        pair=slots(pair[:, None] + level[None, :]),
        cross=slots(cross),
        turn=int(slots(np.array([runs.turn], dtype=np.int64))[0]),
        end=runs.stages - runs.last,
        elapsed=elapsed,
    )
