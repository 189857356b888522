"""The sizes that the chain recurrence works with, in bytes and in memory slots.

For a chain without exact bytes they are the planning model's, and the recurrence is exact. For
a chain with a ledger they are *relaxed*: each operation of a persistent schedule takes at most
the bytes that the ledger charges for it, so that the recurrence bounds the ledger from below. It
is exact but for snapshots of random states, clones of buffers, and outputs that have storages of
earlier states. What states share counts once (`shared_storages`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ...workload.chain import Chain
from ...workload.stage import Stage
from .shared_storages import Holders, Storages, one_each

Bytes = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


@final
@dataclass(frozen=True)
class Starts:
    """The ways in which a segment starts, by number.

    Start s = 1..n+1: state s - 1 is there and not counted, to the end of the segment. A chain
    with a ledger has further starts, after tapes that did not save all of state s - 1: what they
    did not is handed on to the last run that reads it, which is the run of s with tape.
    """

    stage: Indices
    """First stage s of the segment."""
    handed: Bytes
    """What of state s - 1 takes bytes until stage s has been taped, and counts with no tape."""

    @functools.cached_property
    def other(self) -> Indices:
        """The next of the starts of the same stage, by start; 0 after the last."""
        found = np.zeros(len(self.stage), dtype=np.int64)
        last = np.arange(int(self.stage.max()) + 1)
        for start in range(len(last), len(found)):
            s = self.stage[start]
            found[last[s]] = start
            last[s] = start
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

    storages: Storages
    """Where states lie: what keeping them takes (w_a)."""
    layout: Indices
    """Equal for stages that make and hand on storages alike, shape (n + 1,)."""
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
    forward_seconds: npt.NDArray[np.float64]
    """u_f, shape (n + 1,)."""
    is_ledger: bool
    """Whether the sizes are relaxed from exact bytes."""

    def __len__(self) -> int:
        """The number of stages n."""
        return len(self.forward) - 1

    def untimed(self) -> ChainSizes:
        """The same bytes where every run takes as long, and a tape is fast by its number."""
        tapings = replace(self.tapings, extra_seconds=self.tapings.option.astype(np.float64))
        seconds = np.minimum(np.arange(len(self) + 1), 1).astype(np.float64)
        return replace(self, tapings=tapings, forward_seconds=seconds)

    @functools.cached_property
    def state(self) -> Bytes:
        """What keeping state i takes beside none before it, shape (n + 1,)."""
        return self.storages.whole(len(self) + 1)

    @functools.cached_property
    def sweep(self) -> Bytes:
        """sweep[s, j]: the most bytes of runs s..j-1 without tape, shape (n + 2, n + 2).

        State s - 1 is there and not counted, and each state goes when the next has come.
        """
        n = len(self)
        need = self.storages.beside(n + 1)[:, :n] + self.forward[None, 1:]
        need[np.arange(1, n + 1)[None, :] < np.arange(n + 1)[:, None]] = 0
        sweep = np.zeros((n + 2, n + 2), dtype=np.int64)
        np.maximum.accumulate(need, axis=1, out=sweep[:-1, 2:])
        return sweep

    @functools.cached_property
    def kept(self) -> Bytes:
        """kept[start, j]: what (j, t) has less than (start, t) where it splits at j.

        What state j - 1 takes beside state s - 1, and what is handed on.
        """
        starts, n = self.starts, len(self)
        beside = np.zeros((n + 2, n + 2), dtype=np.int64)
        beside[: n + 1, 1:] = self.storages.beside(n + 1)
        kept: Bytes = beside[starts.stage] + starts.handed[:, None]
        return kept

    @functools.cached_property
    def common_divisor(self) -> int:
        """The largest unit of which all sizes are multiples, in bytes."""
        tapings = self.tapings
        numbers = np.concatenate(
            (
                *(self.storages.size, self.gradient, self.forward, self.later, self.starts.handed),
                *(tapings.tape, tapings.forward, tapings.backward, tapings.backward_after_turn),
            )
        )
        return math.gcd(self.turn, *(int(x) for x in np.unique(numbers))) or 1


class Slots(NamedTuple):
    """The same sizes in slots of `unit` bytes.

    A segment from stage s with k slots stands for all bytes up to k * unit + offset[s], where the
    offset is 0 to unit - 1. Offsets follow the tapes, offset[s + 1] = offset[s] - w_t[s] modulo
    the unit, so that keeping tapes rounds nothing away however many they are; keeping a state
    loses less than a slot. Where the unit divides all sizes nothing is rounded. Plain arrays, as
    compiled loops take them, and few of them, as every one takes time to compile; a row a start
    (`Starts`), or a number a taping (`Tapings`).

    Sizes are rounded so that whatever fits in bytes fits; or to the nearest, which bounds nothing
    but says better what is worth keeping.
    """

    unit: int
    """Bytes of a slot."""
    turn: int
    """Least slots of the loss."""
    stage: Indices
    """First stage, by start."""
    other: Indices
    """The next start of the same stage, by start; 0 after the last."""
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
    needs: Indices
    """Least slots in which a segment can start with a taping, what follows it left aside, by
    taping and t."""
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
    level = sizes.gradient + sizes.later
    backward = np.repeat(tapings.backward[:, None], n + 2, axis=1)
    backward[:, n + 1] = tapings.backward_after_turn
    needs = np.maximum(tapings.forward[:, None] + level, backward) + up[tapings.start][:, None]
    return Slots(
        unit=unit,
        turn=turn,
        stage=starts.stage,
        other=starts.other,
        takes=(sizes.kept + offset[None, :] - own[:, None] + half) // unit,
        sweep=sizes.sweep,
        level=level,
        up=up,
        handed=starts.handed,
        first=first,
        tape=(tapings.tape + offset[starts.stage[tapings.after]] - offset[stage] + half) // unit,
        needs=needs // unit,
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
        storages=one_each(columns.state_bytes),
        layout=np.zeros(n + 1, dtype=np.int64),
        gradient=np.append(w_g, 0),
        forward=columns.state_bytes + columns.forward_overhead_bytes,
        later=later,
        turn=int(w_g[-1]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes + chain.held_bytes,
        starts=Starts(stage=np.arange(n + 2), handed=np.zeros(n + 2, dtype=np.int64)),
        tapings=_planning_tapings(chain, later),
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
    """Relax the ledger: no figure is above what it charges."""
    columns, holders = chain.arrays, Holders(chain)
    w_g, output = columns.gradient_bytes, sum(holders.output.values())
    later = _later(columns.parameter_gradient_bytes, output + holders.rest)
    forward = np.array([0, *(x.forward_peak_bytes for x in holders.ledgers)], dtype=np.int64)
    starts, tapings = _ledger_starts(chain, holders, later)
    return ChainSizes(
        storages=holders.storages,
        layout=holders.layout,
        gradient=np.append(w_g, 0),
        forward=forward,
        later=later,
        turn=output + int(w_g[-1]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes + chain.kept_bytes,
        starts=starts,
        tapings=tapings,
        forward_seconds=columns.forward_seconds,
        is_ledger=True,
    )


def _ledger_starts(chain: Chain, holders: Holders, later: Bytes) -> tuple[Starts, Tapings]:
    """A start for each way to come to a stage, and its tapes."""
    n, (entries, after) = len(chain), holders.entries
    level = (chain.arrays.gradient_bytes + later[:-1]).tolist()
    handed, rows, seconds = [0] * len(entries), list[int](), list[float]()
    for start, entry in enumerate(entries):
        s = entry.stage
        if not 1 <= s <= n:
            continue
        stage, lone = chain.stages[s - 1], entry.lone
        # What only tape s will keep, whichever it is, stays from now on, and is counted with the
        # tape before.
        handed[start] = holders.bytes_of(lone.difference(holders.always[s]))
        seconds += _longer(stage)
        for tape, ledger in enumerate(holders.options[s]):
            made = holders.made_and_saved(s, tape)
            also = lone.intersection(holders.saved[s][tape]) - holders.always[s]
            own = ledger.tape_bytes + holders.bytes_of(made) + holders.bytes_of(also)
            then = holders.handed_on(s, lone, tape)
            early = holders.bytes_of(then & holders.always[s + 1]) if s < n else 0
            # The last stage, run again, has an output that is not the caller's.
            again = sum(holders.output[x] for x in made) if s == n else 0
            backward = own + level[s]
            peak, peak_after_turn = holders.backward_peaks(stage, entry, tape)
            rows += (start, tape, own + early, ledger.taped_peak_bytes + handed[start])
            rows += (backward + again + peak, backward + peak_after_turn, after[start][tape])
    columns = np.array(rows, dtype=np.int64).reshape(-1, 7).T.copy()
    start_, option, tape_, forward, backward_, after_turn, after_ = columns
    stages = np.array([entry.stage for entry in entries], dtype=np.int64)
    return Starts(stage=stages, handed=np.array(handed, dtype=np.int64)), Tapings(
        start=start_,
        option=option,
        tape=tape_,
        forward=forward,
        backward=backward_,
        # Of a tape from before Turn, after which the caller holds the output.
        backward_after_turn=after_turn,
        after=after_,
        extra_seconds=np.array(seconds),
    )


def _longer(stage: Stage) -> list[float]:
    """Seconds that each tape of a stage takes longer than the fastest."""
    if not stage.other_tapes:
        return [0.0]
    seconds = [tape.seconds for tape in stage.tapes]
    return [x - min(seconds) for x in seconds]
