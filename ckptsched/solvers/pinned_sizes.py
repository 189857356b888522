"""The planning model in columns, as the methods over all pinned schedules read it.

Unlike `chain_sizes` nothing here assumes that a schedule is memory-persistent, and the sizes are
the planning model's even where the chain has a ledger.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..workload import Chain

Bytes = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


@final
class PinnedSizes(NamedTuple):
    """Bytes and seconds in columns; index i is stage or state i, and n + 1 the loss.

    What a tape costs stands in columns of its own: those of stage i are numbers
    `first_tape[i]` to `first_tape[i + 1] - 1`, and the first of them is the stage's own.
    A named tuple, because compiled functions take it as it is.
    """

    state: Bytes
    """What keeping state i takes (w_a), shape (n + 1,)."""
    forward: Bytes
    """A run without tape, its output included (w_a + o_f), shape (n + 1,)."""
    level: Bytes
    """Gradients that are there before Backward(i): g_i, and all parameter gradients of later
    stages; 0 at n + 1, shape (n + 2,)."""
    turn: int
    """The loss and its gradient (w_g[n] + o_l)."""
    fixed: int
    """What is there from start to end: the input, and what the caller holds."""
    first_tape: Bytes
    """Number of the first tape of stage i, shape (n + 2,)."""
    tape: Bytes
    """What keeping a tape takes (w_t), by tape."""
    taped: Bytes
    """A run with tape, the tape included (w_t + o_f), by tape."""
    backward: Bytes
    """The backward: its tape and all gradients that there are meanwhile, by tape."""
    tape_seconds: Seconds
    """The run and the backward, above those of the stage's fastest tape, by tape."""
    taped_seconds: Seconds
    """The run alone, by tape."""
    backward_seconds: Seconds
    """The backward alone, by tape."""
    forward_seconds: Seconds
    """A run without tape (u_f), shape (n + 1,)."""
    base_seconds: Seconds
    """Run and backward of the fastest tape; the loss at n + 1, shape (n + 2,)."""


def pinned_sizes(chain: Chain) -> PinnedSizes:
    """Read a chain's columns.

    Args:
        chain: Any chain; a ledger is not looked at.
    """
    columns, n = chain.arrays, len(chain)
    w_g, w_p = columns.gradient_bytes, columns.parameter_gradient_bytes
    level = np.zeros(n + 2, dtype=np.int64)
    level[: n + 1] = w_g
    level[:n] += np.cumsum(w_p[:0:-1])[::-1]
    stage, first_tape, tape, o_f, o_b, u_f, u_b = _tapes(chain)
    backward = level[stage] + tape + w_g[np.maximum(stage - 1, 0)] + o_b + w_p[stage]
    fastest = np.minimum.reduceat(u_f + u_b, first_tape[: n + 1])
    return PinnedSizes(
        state=columns.state_bytes,
        forward=columns.state_bytes + columns.forward_overhead_bytes,
        level=level,
        turn=int(w_g[n]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes + chain.held_bytes,
        first_tape=first_tape,
        tape=tape,
        taped=tape + o_f,
        backward=backward,
        tape_seconds=u_f + u_b - fastest[stage],
        taped_seconds=u_f,
        backward_seconds=u_b,
        forward_seconds=columns.forward_seconds,
        base_seconds=np.append(fastest, chain.loss_seconds),
    )


def _tapes(chain: Chain) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes, Seconds, Seconds]:
    """By tape: its stage; by stage: its first tape; then w_t, o_f, o_b, u_f and u_b by tape."""
    c, n = chain.arrays, len(chain)
    if not chain.offers_tapes:
        stage = np.arange(n + 1)
        bytes_ = (c.tape_bytes, c.forward_overhead_bytes, c.backward_overhead_bytes)
        return stage, np.arange(n + 2), *bytes_, c.forward_seconds, c.backward_seconds
    tapes = [(0, 0, 0, 0, 0.0, 0.0)] + [
        (
            i,
            x.tape_bytes,
            x.forward_overhead_bytes,
            x.backward_overhead_bytes,
            x.forward_seconds,
            x.backward_seconds,
        )
        for i, stage in enumerate(chain.stages, 1)
        for x in stage.tapes
    ]
    stage, tape, o_f, o_b = np.array([x[:4] for x in tapes], dtype=np.int64).T.copy()
    u_f, u_b = np.array([x[4:] for x in tapes]).T.copy()
    return stage, np.searchsorted(stage, np.arange(n + 2)), tape, o_f, o_b, u_f, u_b


def with_fastest_runs(sizes: PinnedSizes) -> PinnedSizes:
    """The same sizes, but a run without tape takes no more than one with any of the tapes.

    For lower bounds: a tape that is dropped without a backward is then no better than the state.
    Nothing changes where no tape is faster to make than the state, or fits where that does not.
    """
    first = sizes.first_tape[:-1]
    return sizes._replace(
        forward=np.minimum(sizes.forward, np.minimum.reduceat(sizes.taped, first)),
        forward_seconds=np.minimum(
            sizes.forward_seconds, np.minimum.reduceat(sizes.taped_seconds, first)
        ),
    )


def are_runs_fastest(sizes: PinnedSizes) -> bool:
    """Whether a run without tape takes no more seconds and bytes than one with any tape."""
    fastest = with_fastest_runs(sizes)
    same_bytes = fastest.forward[1:] == sizes.forward[1:]
    return bool(same_bytes.all() and (fastest.forward_seconds == sizes.forward_seconds).all())


def relaxed_level(sizes: PinnedSizes) -> Bytes:
    """Bytes beside those of segment (s, t) until Backward(t) starts, at the least, by t.

    Where a segment is prepared while later stages are still to be reversed, some state of at
    most stage t is stored besides (docs/theory.md, lemma 3); its gradient is there otherwise.
    """
    relaxed = np.zeros_like(sizes.level)
    relaxed[1:-1] = np.minimum(sizes.level[1:-1], np.minimum.accumulate(sizes.state[1:]))
    return relaxed
