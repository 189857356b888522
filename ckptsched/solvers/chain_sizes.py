"""The sizes that the chain recurrence works with, in bytes or rounded to memory slots.

For a chain without exact bytes they are the planning model's, and the recurrence is exact. For
a chain with a ledger they are *relaxed*: each operation of a persistent schedule takes at most
the bytes that the ledger charges for it, so that the recurrence bounds the ledger from below. It
is exact but for outputs that are views, snapshots of random states and clones of buffers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from ..stages import StageLedger, backward_variant
from ..workload import Chain

Bytes = npt.NDArray[np.int64]
Rounding = Literal["nearest", "down"]


@final
@dataclass(frozen=True)
class Starts:
    """The ways in which a segment starts, by number.

    Start s = 1..n+1: state s - 1 is there and not counted, to the end of the segment. A chain
    with a ledger has further starts, after a tape of stage s - 1 that does not save state
    s - 1: it is handed on to the last run that reads it, which is the run of s with tape.
    """

    stage: npt.NDArray[np.int64]
    """First stage s of the segment."""
    handed: Bytes
    """What state s - 1 takes until stage s has been taped; 0 where it counts with a tape."""
    backward: Bytes
    """The backward of s: its tape, both gradients and all parameter gradients included."""
    backward_after_turn: Bytes
    """The same where the tape is from before Turn, so that the caller may hold its output."""
    after: npt.NDArray[np.int64]
    """The start of the segment that follows a tape of stage s, by s."""

    @functools.cached_property
    def by_stage(self) -> tuple[tuple[int, ...], ...]:
        """The starts of segments from stage s, by s; further ones last."""
        found: list[list[int]] = [[] for _ in range(int(self.stage.max()) + 1)]
        for start, s in enumerate(self.stage.tolist()):
            found[s].append(start)
        return tuple(tuple(starts) for starts in found)


@final
@dataclass(frozen=True)
class ChainSizes:
    """Bytes in columns; index i is stage or state i, and n + 1 the loss."""

    state: Bytes
    """What keeping state i takes (w_a), shape (n + 1,)."""
    tape: Bytes
    """What keeping tape i takes (w_t), shape (n + 1,)."""
    gradient: Bytes
    """Gradient with respect to state i (w_g); 0 at n + 1, shape (n + 2,)."""
    forward: Bytes
    """A run without tape, its output included (w_a + o_f), shape (n + 1,)."""
    taped: Bytes
    """A run with tape, the tape included (w_t + o_f), shape (n + 1,)."""
    later: Bytes
    """W: what the backward of stages after i has left for good, shape (n + 2,)."""
    turn: int
    """The loss."""
    fixed: int
    """What is there from start to end, such as the input."""
    starts: Starts
    """Where segments start, and the backward passes of their first stages."""
    origin: npt.NDArray[np.int64]
    """The state in whose storage state i lies: i itself, or an earlier one for a view."""
    forward_seconds: npt.NDArray[np.float64]
    """u_f, shape (n + 1,)."""
    is_ledger: bool
    """Whether the sizes are relaxed from exact bytes."""

    def __len__(self) -> int:
        """The number of stages n."""
        return len(self.state) - 1

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
        need[np.arange(1, n + 1)[None, :] < np.arange(n + 2)[:, None]] = np.iinfo(np.int64).min
        sweep = np.full((n + 2, n + 2), np.iinfo(np.int64).min // 2, dtype=np.int64)
        np.maximum.accumulate(need, axis=1, out=sweep[:, 2:])
        return np.maximum(sweep, np.iinfo(np.int64).min // 2)

    @functools.cached_property
    def free_splits(self) -> dict[int, tuple[int, ...]]:
        """The j by s where state j - 1 is a view of a state before s, and so costs nothing."""
        found: dict[int, list[int]] = {}
        for i in np.flatnonzero(self.origin[1:] < np.arange(1, len(self) + 1)) + 1:
            for s in range(int(self.origin[i]) + 1, int(i) + 1):
                found.setdefault(s, []).append(int(i) + 1)
        return {s: tuple(js) for s, js in found.items()}

    @functools.cached_property
    def common_divisor(self) -> int:
        """The largest unit of which all sizes are multiples, in bytes."""
        starts = self.starts
        numbers = np.concatenate(
            (
                *(self.state, self.tape, self.gradient, self.forward, self.taped, self.later),
                *(starts.handed, starts.backward, starts.backward_after_turn),
            )
        )
        return math.gcd(self.turn, *(int(x) for x in np.unique(numbers))) or 1


@final
@dataclass(frozen=True)
class Slots:
    """The same sizes in slots of `unit` bytes."""

    sizes: ChainSizes
    unit: int
    rounding: Rounding

    def round(self, size: Bytes) -> Bytes:
        """Bytes as whole slots; thresholds below 0 count as 0."""
        half = self.unit // 2 if self.rounding == "nearest" else 0
        slots: Bytes = size + half
        slots //= self.unit
        return np.maximum(slots, 0, out=slots)

    @functools.cached_property
    def state(self) -> Bytes:
        """Slots that keeping a state takes."""
        return self.round(self.sizes.state)

    @functools.cached_property
    def tape(self) -> Bytes:
        """Slots that keeping a tape takes."""
        return self.round(self.sizes.tape)

    @functools.cached_property
    def turn(self) -> int:
        """Slots of the loss."""
        return int(self.round(np.array([self.sizes.turn], dtype=np.int64))[0])

    @functools.cached_property
    def handed(self) -> Bytes:
        """Slots that a state handed on takes, by start."""
        return self.round(self.sizes.starts.handed)

    def taped_need(self, t: int) -> Bytes:
        """Least slots by start in which its stage can be taped first and reversed last."""
        sizes, starts, n = self.sizes, self.sizes.starts, len(self.sizes)
        stage = np.minimum(starts.stage, n)  # the loss has no tape: any number will do
        forward = sizes.taped[stage] + starts.handed + sizes.gradient[t] + sizes.later[t]
        backward = starts.backward if t <= n else starts.backward_after_turn
        return self.round(np.maximum(forward, backward))

    def sweep_need(self, start: int, t: int) -> Bytes:
        """Least slots by j = s+1..t in which stages s..j-1 can be swept in (s, t)."""
        sizes, starts = self.sizes, self.sizes.starts
        s = int(starts.stage[start])
        more = sizes.gradient[t] + sizes.later[t] + starts.handed[start]
        return self.round(sizes.sweep[s, s + 1 : t + 1] + more)

    def split_takes(self, start: int, t: int) -> Bytes:
        """Slots that the part (j, t) has less than (s, t), by split j = s+1..t."""
        s = int(self.sizes.starts.stage[start])
        takes: Bytes = self.state[s:t] + self.handed[start]
        free = [j for j in self.sizes.free_splits.get(s, ()) if j <= t]
        takes[np.array(free, dtype=np.int64) - s - 1] = self.handed[start]
        return takes


def chain_sizes(chain: Chain) -> ChainSizes:
    """The sizes of a chain: relaxed from its ledger where it has one."""
    return _ledger_sizes(chain) if chain.has_ledger else _planning_sizes(chain)


def _planning_sizes(chain: Chain) -> ChainSizes:
    columns, n = chain.arrays, len(chain)
    w_g, w_t = columns.gradient_bytes, columns.tape_bytes
    later = _later(columns.parameter_gradient_bytes)
    backward = np.zeros(n + 2, dtype=np.int64)
    backward[1:-1] = (w_t + w_g + columns.backward_overhead_bytes)[1:] + w_g[:-1]
    backward[:-1] += later[:-1] + columns.parameter_gradient_bytes
    return ChainSizes(
        state=columns.state_bytes,
        tape=w_t,
        gradient=np.append(w_g, 0),
        forward=columns.state_bytes + columns.forward_overhead_bytes,
        taped=w_t + columns.forward_overhead_bytes,
        later=later,
        turn=int(w_g[-1]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes + chain.held_bytes,
        starts=Starts(
            stage=np.arange(n + 2),
            handed=np.zeros(n + 2, dtype=np.int64),
            backward=backward,
            backward_after_turn=backward,
            after=np.arange(1, n + 2),
        ),
        origin=np.arange(n + 1),
        forward_seconds=columns.forward_seconds,
        is_ledger=False,
    )


def _later(w_p: Bytes, held: int = 0) -> Bytes:
    """W[t] = held + the parameter gradients of all stages after t; W[n + 1] = 0."""
    after = np.append(np.cumsum(w_p[::-1])[::-1], 0)  # after[i] = w_p[i] + ... + w_p[n]
    later: Bytes = np.append(after[1:] + held, 0)
    return later


def _ledger_sizes(chain: Chain) -> ChainSizes:
    """Relax the ledger; why each figure is a lower bound stands beside it."""
    columns, storages = chain.arrays, _storages(chain)
    ledgers = storages.ledgers
    w_g = columns.gradient_bytes
    later = _later(columns.parameter_gradient_bytes, storages.held)
    forward = np.array([0, *(x.forward_peak_bytes for x in ledgers)], dtype=np.int64)
    taped = np.array([0, *(x.taped_peak_bytes for x in ledgers)], dtype=np.int64)
    return ChainSizes(
        # A view that is kept keeps the storage it lies in; the input's is the caller's.
        state=storages.own[storages.origin],
        tape=storages.tape,
        gradient=np.append(w_g, 0),
        forward=forward,
        taped=taped,
        later=later,
        turn=storages.held + int(w_g[-1]) + chain.loss_overhead_bytes,
        fixed=chain.input_bytes,
        starts=_ledger_starts(chain, storages, later),
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


def _ledger_starts(chain: Chain, storages: _Storages, later: Bytes) -> Starts:
    """A further start wherever a tape hands its output on without saving it."""
    n, w_g = len(chain), chain.arrays.gradient_bytes
    # Tape i + 1 is gone when the backward of stage i starts, and with it what only it saved.
    gone = np.where(storages.read & ~storages.saved, storages.own, 0)
    level = storages.tape - gone + w_g + later[:-1]
    handed = np.where(storages.saved | storages.read, 0, storages.own)
    # The last stage, run again, has an output that is not the caller's.
    again = np.where(storages.saved & (np.arange(n + 1) == n), storages.held, 0)
    columns: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
    after = np.arange(1, n + 2)
    for kept in (True, False):
        for s in range(1, n + 1) if kept else range(2, n + 1):
            if kept or not storages.saved[s - 1]:
                size = 0 if kept else int(handed[s - 1])
                first = int(level[s]) + _peak(chain, storages, s, kept, True)
                other = int(level[s] + again[s]) + _peak(chain, storages, s, kept, False)
                after[s - 1] = len(columns)
                columns.append((s, size, other, first))
        if kept:
            columns.append((n + 1, 0, 0, 0))
    stage, sizes, backward, backward_after_turn = np.array(columns, dtype=np.int64).T
    return Starts(
        stage=stage,
        handed=sizes,
        backward=backward,
        backward_after_turn=backward_after_turn,
        after=after,
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
