"""The sizes that the chain recurrence works with, in bytes and in memory slots.

For a chain without exact bytes they are the planning model's, and the recurrence is exact. For
a chain with a ledger they are *relaxed*: each operation of a persistent schedule takes at most
the bytes that the ledger charges for it, so that the recurrence bounds the ledger from below. It
is exact but for outputs that are views, snapshots of random states and clones of buffers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..stages import StageLedger, backward_variant
from ..workload import Chain

Bytes = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


@final
@dataclass(frozen=True)
class Starts:
    """The ways in which a segment starts, by number.

    Start s = 1..n+1: state s - 1 is there and not counted, to the end of the segment. A chain
    with a ledger has further starts, after a tape of stage s - 1 that does not save state
    s - 1: it is handed on to the last run that reads it, which is the run of s with tape.
    """

    stage: Indices
    """First stage s of the segment."""
    handed: Bytes
    """What state s - 1 takes until stage s has been taped; 0 where it counts with a tape."""

    @functools.cached_property
    def twin(self) -> npt.NDArray[np.int64]:
        """The further start of segments from stage s, by s; 0 where there is none."""
        n = int(self.stage.max()) - 1
        found = np.zeros(n + 2, dtype=np.int64)
        found[self.stage[n + 2 :]] = np.arange(n + 2, len(self.stage))
        return found


@final
@dataclass(frozen=True)
class Tapings:
    """The ways to tape the first stage of a segment; those of a start lie side by side."""

    start: npt.NDArray[np.int64]
    """The start of the segment."""
    option: npt.NDArray[np.int64]
    """Which of the stage's tapes it is."""
    tape: Bytes
    """What the tape takes while it is kept."""
    forward: Bytes
    """The run with tape: the tape, the overhead, and a state handed on to it."""
    backward: Bytes
    """The backward: the tape, both gradients and all parameter gradients included."""
    backward_after_turn: Bytes
    """The same where the tape is from before Turn, so that the caller may hold its output."""
    after: npt.NDArray[np.int64]
    """The start of the segment that follows."""
    extra_seconds: npt.NDArray[np.float64]
    """What this tape takes longer than the stage's fastest, its backward included."""


@final
@dataclass(frozen=True)
class ChainSizes:
    """Bytes in columns; index i is stage or state i, and n + 1 the loss."""

    state: Bytes
    """What keeping state i takes (w_a), shape (n + 1,)."""
    gradient: Bytes
    """Gradient with respect to state i (w_g); 0 at n + 1, shape (n + 2,)."""
    forward: Bytes
    """A run without tape, its output included (w_a + o_f), shape (n + 1,)."""
    later: Bytes
    """W: what the backward of stages after i has left for good, shape (n + 2,)."""
    turn: int
    """The loss."""
    fixed: int
    """What is there from start to end, such as the input."""
    starts: Starts
    """Where segments start."""
    tapings: Tapings
    """How their first stages are taped."""
    origin: npt.NDArray[np.int64]
    """The state in whose storage state i lies: i itself, or an earlier one for a view."""
    forward_seconds: npt.NDArray[np.float64]
    """u_f, shape (n + 1,)."""
    is_ledger: bool
    """Whether the sizes are relaxed from exact bytes."""

    def __len__(self) -> int:
        """The number of stages n."""
        return len(self.state) - 1

    def untimed(self) -> ChainSizes:
        """The same bytes where every run takes as long, and a tape is fast by its number."""
        tapings = replace(self.tapings, extra_seconds=self.tapings.option.astype(np.float64))
        seconds = np.minimum(np.arange(len(self) + 1), 1).astype(np.float64)
        return replace(self, tapings=tapings, forward_seconds=seconds)

    @functools.cached_property
    def sweep(self) -> Bytes:
        """sweep[s, j]: the most bytes of runs s..j-1 without tape, shape (n + 2, n + 2).

        State s - 1 is there and not counted, and each state goes when the next has come. A
        view of a state before s takes nothing beside it.
        """
        n = len(self)
        alone = self.forward[1:]
        pair = alone + self.state[:-1]
        need = np.where(
            self.origin[None, :-1] < np.arange(n + 2)[:, None], alone[None, :], pair[None, :]
        )
        need[np.arange(1, n + 1)[None, :] < np.arange(n + 2)[:, None]] = 0
        sweep = np.zeros((n + 2, n + 2), dtype=np.int64)
        np.maximum.accumulate(need, axis=1, out=sweep[:, 2:])
        return sweep

    @functools.cached_property
    def kept(self) -> Bytes:
        """kept[start, j]: what (j, t) has less than (start, t) where it splits at j.

        State j - 1, unless it is a view of a state before s, and a state that is handed on.
        """
        starts, n = self.starts, len(self)
        kept = np.zeros((len(starts.stage), n + 2), dtype=np.int64)
        is_new = self.origin[None, :] >= starts.stage[:, None]
        kept[:, 1:] = np.where(is_new, self.state[None, :], 0)
        kept += starts.handed[:, None]
        return kept

    @functools.cached_property
    def common_divisor(self) -> int:
        """The largest unit of which all sizes are multiples, in bytes."""
        tapings = self.tapings
        numbers = np.concatenate(
            (
                *(self.state, self.gradient, self.forward, self.later, self.starts.handed),
                *(tapings.tape, tapings.forward, tapings.backward, tapings.backward_after_turn),
            )
        )
        return math.gcd(self.turn, *(int(x) for x in np.unique(numbers))) or 1


class Slots(NamedTuple):
    """The same sizes in slots of `unit` bytes.

    A segment from stage s with k slots stands for all bytes up to k * unit + offset[s]. The
    offsets follow the tapes, offset[s + 1] = offset[s] - w_t[s] modulo the unit, so that keeping
    tapes rounds nothing away however many they are; keeping a state loses less than a slot.
    Where the unit divides all sizes nothing is rounded. Plain arrays, as compiled loops take
    them; a row a start (`Starts`), or a number a taping (`Tapings`).

    Sizes are rounded so that whatever fits in bytes fits; or to the nearest, which bounds nothing
    but says better what is worth keeping.
    """

    unit: int
    """Bytes of a slot."""
    offset: Bytes
    """By stage, 0 to unit - 1, shape (n + 2,)."""
    turn: int
    """Least slots of the loss."""
    stage: Indices
    """First stage, by start."""
    twin: Indices
    """The further start, by stage; 0 where there is none."""
    takes: Indices
    """takes[start, j]: slots that (j, t) has less than (start, t); -1 at the least."""
    sweep: Bytes
    """sweep[s, j]: the most bytes of runs s..j-1 without tape."""
    level: Bytes
    """W(t) + w_g[t] by t: bytes that are there all through a segment."""
    up: Bytes
    """Bytes to add before a need is divided by the unit, by start."""
    handed: Bytes
    """Bytes of a state handed on, by start."""
    first: Indices
    """Start a has the tapings first[a] to first[a + 1] - 1."""
    tape: Indices
    """Slots that what follows has less, by taping."""
    forward: Bytes
    """Bytes of the run with tape, by taping."""
    backward: Bytes
    """Bytes of the backward, by taping."""
    backward_after_turn: Bytes
    """The same where the tape is from before Turn."""
    after: Indices
    """The start that follows, by taping."""
    option: Indices
    """Which of the stage's tapes it is, by taping."""

    def columns(self, size: int) -> int:
        """The fewest slots that stand for so many bytes in the whole chain."""
        return -(-size // self.unit)


def slots_of(sizes: ChainSizes, unit: int, *, nearest: bool = False) -> Slots:
    """Count a chain's sizes in slots.

    Args:
        sizes: The chain's sizes.
        unit: Bytes of a slot; 1 counts bytes.
        nearest: Whether to round to the nearest.
    """
    half = unit // 2 if nearest else 0
    n, starts, tapings = len(sizes), sizes.starts, sizes.tapings
    first = np.searchsorted(tapings.start, np.arange(len(starts.stage) + 1))
    offset = np.zeros(n + 2, dtype=np.int64)
    offset[2:] = np.cumsum(-tapings.tape[first[1 : n + 1]]) % unit
    own = offset[starts.stage]
    stage = starts.stage[tapings.start]
    up = (half if nearest else unit - 1) - own
    turn = max(0, (sizes.turn + int(up[n + 1])) // unit)
    return Slots(
        unit=unit,
        offset=offset,
        turn=turn,
        stage=starts.stage,
        twin=starts.twin,
        takes=(sizes.kept + offset[None, :] - own[:, None] + half) // unit,
        sweep=sizes.sweep,
        level=sizes.gradient + sizes.later,
        up=up,
        handed=starts.handed,
        first=first,
        tape=(tapings.tape + offset[starts.stage[tapings.after]] - offset[stage] + half) // unit,
        forward=tapings.forward,
        backward=tapings.backward,
        backward_after_turn=tapings.backward_after_turn,
        after=tapings.after,
        option=tapings.option,
    )


def chain_sizes(chain: Chain) -> ChainSizes:
    """The sizes of a chain: relaxed from its ledger where it has one."""
    return _ledger_sizes(chain) if chain.has_ledger else _planning_sizes(chain)


def _planning_sizes(chain: Chain) -> ChainSizes:
    columns, n = chain.arrays, len(chain)
    w_g = columns.gradient_bytes
    later = _later(columns.parameter_gradient_bytes)
    return ChainSizes(
        state=columns.state_bytes,
        gradient=np.append(w_g, 0),
        forward=columns.state_bytes + columns.forward_overhead_bytes,
        later=later,
        turn=int(w_g[-1]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes + chain.held_bytes,
        starts=Starts(stage=np.arange(n + 2), handed=np.zeros(n + 2, dtype=np.int64)),
        tapings=_planning_tapings(chain, later),
        origin=np.arange(n + 1),
        forward_seconds=columns.forward_seconds,
        is_ledger=False,
    )


def _planning_tapings(chain: Chain, later: Bytes) -> Tapings:
    """Every tape of every stage."""
    columns = chain.arrays
    if not chain.offers_tapes:
        return _own_tapings(chain, later)
    tapes = [(i, k, tape) for i, x in enumerate(chain.stages, 1) for k, tape in enumerate(x.tapes)]
    stage = np.array([i for i, _, _ in tapes], dtype=np.int64)
    w_t = np.array([tape.tape_bytes for _, _, tape in tapes], dtype=np.int64)
    o_f = np.array([tape.forward_overhead_bytes for _, _, tape in tapes], dtype=np.int64)
    o_b = np.array([tape.backward_overhead_bytes for _, _, tape in tapes], dtype=np.int64)
    seconds = np.array([tape.seconds for _, _, tape in tapes])
    fastest = np.minimum.reduceat(seconds, np.searchsorted(stage, np.arange(1, len(chain) + 1)))
    w_g, w_p = columns.gradient_bytes, columns.parameter_gradient_bytes
    backward = w_t + w_g[stage] + w_g[stage - 1] + o_b + later[stage] + w_p[stage]
    return Tapings(
        start=stage,
        option=np.array([k for _, k, _ in tapes], dtype=np.int64),
        tape=w_t,
        forward=w_t + o_f,
        backward=backward,
        backward_after_turn=backward,
        after=stage + 1,
        extra_seconds=seconds - fastest[stage - 1],
    )


def _own_tapings(chain: Chain, later: Bytes) -> Tapings:
    """The one tape of every stage."""
    columns, stage = chain.arrays, np.arange(1, len(chain) + 1)
    w_t, w_g = columns.tape_bytes[1:], columns.gradient_bytes
    backward = w_t + w_g[1:] + w_g[:-1] + columns.backward_overhead_bytes[1:]
    backward = backward + later[stage] + columns.parameter_gradient_bytes[1:]
    return Tapings(
        start=stage,
        option=np.zeros(len(chain), dtype=np.int64),
        tape=w_t,
        forward=w_t + columns.forward_overhead_bytes[1:],
        backward=backward,
        backward_after_turn=backward,
        after=stage + 1,
        extra_seconds=np.zeros(len(chain)),
    )


def _later(w_p: Bytes, held: int = 0) -> Bytes:
    """W[t] = held + the parameter gradients of all stages after t; W[n + 1] = 0."""
    after = np.append(np.cumsum(w_p[::-1])[::-1], 0)  # after[i] = w_p[i] + ... + w_p[n]
    later: Bytes = np.append(after[1:] + held, 0)
    return later


def _ledger_sizes(chain: Chain) -> ChainSizes:
    """Relax the ledger; why each figure is a lower bound stands beside it."""
    columns, storages = chain.arrays, _storages(chain)
    w_g = columns.gradient_bytes
    later = _later(columns.parameter_gradient_bytes, storages.held)
    forward = np.array([0, *(x.forward_peak_bytes for x in storages.ledgers)], dtype=np.int64)
    starts, tapings = _ledger_starts(chain, storages, later)
    return ChainSizes(
        # A view that is kept keeps the storage it lies in; the input's is the caller's.
        state=storages.own[storages.origin],
        gradient=np.append(w_g, 0),
        forward=forward,
        later=later,
        turn=storages.held + int(w_g[-1]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes,
        starts=starts,
        tapings=tapings,
        origin=storages.origin,
        forward_seconds=columns.forward_seconds,
        is_ledger=True,
    )


@final
@dataclass(frozen=True)
class _Storages:
    """Who keeps the storage of each state; index i is state i."""

    ledgers: tuple[StageLedger, ...]
    origin: npt.NDArray[np.int64]
    own: Bytes
    """Bytes of state i that no other state and not the caller has."""
    held: int
    """Bytes that the caller holds from Turn on."""
    saved: npt.NDArray[np.bool_]
    """Whether tape i saves state i."""
    read: npt.NDArray[np.bool_]
    """Whether tape i + 1 saves state i."""
    tape: Bytes
    """Bytes of tape i, state i included where either tape saves it."""


def _storages(chain: Chain) -> _Storages:
    ledgers = tuple(stage.ledger for stage in chain.stages if stage.ledger is not None)
    n = len(ledgers)
    views = np.array([False, *(ledger.output_is_view for ledger in ledgers)])
    own = np.array([0, *(ledger.state_bytes for ledger in ledgers)], dtype=np.int64)
    own[views] = 0
    # The caller holds the output from the loss on: counted once, in `later` and `turn`, and
    # not as a state. Where the output is a view, the storage that it holds counts as a state.
    held = int(own[n])
    own[n] = 0
    # The storage of state i stays as long as tape i does if either tape saves it: tape i + 1
    # does so from the last run that reads state i, and until then tape i hands it on.
    saved = np.array([False, *(ledger.output_saved for ledger in ledgers)])
    read = np.array([*(ledger.input_saved for ledger in ledgers), False])
    tape = np.array([0, *(ledger.tape_bytes for ledger in ledgers)], dtype=np.int64)
    return _Storages(
        ledgers=ledgers,
        origin=np.maximum.accumulate(np.where(views, 0, np.arange(n + 1))),
        own=own,
        held=held,
        saved=saved,
        read=read,
        tape=tape + np.where(saved | read, own, 0),
    )


def _ledger_starts(chain: Chain, storages: _Storages, later: Bytes) -> tuple[Starts, Tapings]:
    """A further start wherever a tape hands its output on without saving it."""
    n, w_g = len(chain), chain.arrays.gradient_bytes
    # Tape i + 1 is gone when the backward of stage i starts, and with it what only it saved.
    gone = np.where(storages.read & ~storages.saved, storages.own, 0)
    level = storages.tape - gone + w_g + later[:-1]
    handed = np.where(storages.saved | storages.read, 0, storages.own)
    # The last stage, run again, has an output that is not the caller's.
    again = np.where(storages.saved & (np.arange(n + 1) == n), storages.held, 0)
    # Stage, what is handed on, backward, backward after Turn; the loss has no backward.
    starts: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
    after = np.arange(1, n + 2)
    for kept in (True, False):
        for s in range(1, n + 1) if kept else range(2, n + 1):
            if kept or not storages.saved[s - 1]:
                size = 0 if kept else int(handed[s - 1])
                first = int(level[s]) + _peak(chain, storages, s, kept, True)
                other = int(level[s] + again[s]) + _peak(chain, storages, s, kept, False)
                after[s - 1] = len(starts)
                starts.append((s, size, other, first))
        if kept:
            starts.append((n + 1, 0, 0, 0))
    stage, sizes, backward, backward_after_turn = np.array(starts, dtype=np.int64).T
    taped = np.array([0, *(x.taped_peak_bytes for x in storages.ledgers)], dtype=np.int64)
    start = np.flatnonzero((stage > 0) & (stage <= n))
    of = stage[start]
    return Starts(stage=stage, handed=sizes), Tapings(
        start=start,
        option=np.zeros_like(start),
        tape=storages.tape[of],
        forward=taped[of] + sizes[start],
        backward=backward[start],
        backward_after_turn=backward_after_turn[start],
        after=after[of],
        extra_seconds=np.zeros(len(start)),
    )


def _peak(chain: Chain, storages: _Storages, s: int, kept: bool, turned: bool) -> int:
    """The peak of a backward above the level before it; the least where it is not known.

    Args:
        chain: The chain.
        storages: Who keeps what.
        s: The stage.
        kept: Whether its input is kept by more than its own tape.
        turned: Whether its tape is from before Turn.
    """
    n, ledger = len(chain), storages.ledgers[s - 1]
    last = int(storages.origin[n])  # the caller may hold this state
    unsure = not kept and (storages.origin[s - 1] != s - 1 or s - 1 == last)
    inputs = (False, True) if unsure else (kept,)
    first = chain.stages[s - 1].parameter_gradient_bytes > 0
    firsts = {first, True} if ledger.shares_parameters_partly else {first}
    found = []
    for held in inputs:
        outputs: tuple[bool, ...] = (False,)
        if ledger.output_is_view:
            outputs = (held,)  # it is the same storage
        elif s == last:
            outputs = (turned,) if s == n else (False, True)
        found += [
            max(
                ledger.backward_peak_bytes[
                    backward_variant(input_held=held, output_held=output, first=variant)
                ]
                for variant in firsts
            )
            for output in outputs
        ]
    return min(found)
