"""Which storages the states of a chain lie in, and which of them are held by more than one tape.

A stage may hand parts of its input on: a residual connection cut into finer stages is
`x -> (x, norm(x)) -> (x, attention(h)) -> x + h`, and three of its states hold x in one storage.
A storage is made by one stage and handed on for some stages, so that the states that have it
follow each other. What keeping state i adds to a kept state s - 1 is what stages s..i made. A view
is a state that is handed on as a whole.

A tape keeps the storages that it saved. Others of the state that it makes are handed on to the
next tape, and then kept by nobody. So what a tape takes, and what its backward frees, depends on
which storages of its input are held besides: by a kept state, by earlier tapes, or by the caller.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ...workload.chain import Chain
from ...workload.stage import Stage, StageLedger, backward_variant

Bytes = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]

_NONE: frozenset[int] = frozenset()
# Entries to stages, on average, up to which it is told who holds storages that are handed on
# through several stages and that no tape on the way saves.
_MOST_ENTRIES = 4
# Of more storages of which it is not known whether they are held, all or none are looked at.
_MOST_UNSURE = 4


@final
@dataclass(frozen=True)
class Storages:
    """The storages of all states, in the order in which they are made."""

    first: Indices
    """The first state that has it; 0 for those of the input."""
    last: Indices
    """The last state that has it."""
    size: Bytes
    """Bytes; 0 for those of the input and of the output, which the caller holds."""

    def whole(self, states: int) -> Bytes:
        """Bytes of each state alone, shape (states,)."""
        change = np.zeros(states + 1, dtype=np.int64)
        np.add.at(change, self.first, self.size)
        np.subtract.at(change, self.last + 1, self.size)
        found: Bytes = np.cumsum(change)[:-1]
        return found

    def new(self, states: int) -> Bytes:
        """Bytes of each state that the state before has not, shape (states,)."""
        found = np.zeros(states, dtype=np.int64)
        np.add.at(found, self.first, self.size)
        return found

    def beside(self, states: int) -> Bytes:
        """beside[s, i]: bytes of state i that were made from stage s on; 0 where i < s.

        That is what it takes beside state s - 1. Shape (states, states).
        """
        change = np.zeros((states, states + 1), dtype=np.int64)
        np.add.at(change, (self.first, self.first), self.size)
        np.subtract.at(change, (self.first, self.last + 1), self.size)
        np.cumsum(change, axis=1, out=change)
        found: Bytes = np.cumsum(change[::-1, :-1], axis=0)[::-1]
        return np.triu(found)


def one_each(state_bytes: Bytes) -> Storages:
    """The storages of states that share nothing.

    Args:
        state_bytes: Bytes of each state, from the input on.
    """
    states = np.arange(len(state_bytes))
    return Storages(first=states, last=states, size=state_bytes)


class Entry(NamedTuple):
    """A way to come to a stage s: the loss is stage n + 1."""

    stage: int
    lone: frozenset[int]
    """Storages of state s - 1 that nothing but tape s can hold from the run of s with tape on,
    by number. None of them where state s - 1 is kept, or other tapes saved all that it has."""


@final
class Holders:
    """Who holds which storage of a chain with exact bytes; storages have numbers."""

    def __init__(self, chain: Chain) -> None:
        """Follow the storages through the stages."""
        self.ledgers = tuple(stage.ledger for stage in chain.stages if stage.ledger is not None)
        self.n = n = len(self.ledgers)
        self.states, self.first, self.last, known = _follow(self.ledgers)
        self.options = ((), *(stage.ledgers for stage in chain.stages))
        """By stage its ledger with each of its tapes."""
        self.saved = [
            tuple([_saved(x, *self.states[i - 1 : i + 1]) for x in options])
            for i, options in enumerate(self.options)
        ]
        """By stage and tape the storages that the tape keeps, those of its input first."""
        self.always = [
            frozenset.intersection(*map(frozenset, x)) if x else _NONE for x in self.saved
        ]
        """By stage those that each of its tapes keeps."""
        # The caller holds the output from the loss on: counted once, and not as a state. Storages
        # of the output that were made before the last stage count as those of their states.
        self.output = {x: known[x] for x in self.states[n] if self.first[x] == n}
        """Bytes of the storages that the last stage makes, by number."""
        self.size = [
            0 if home in (0, n) else size for home, size in zip(self.first, known, strict=True)
        ]
        whole = sum(known[x] for x in self.states[n])
        whole += chain.input_bytes if 0 in self.states[n] else 0
        self.rest = max(0, chain.held_bytes - chain.kept_bytes - whole)
        """What the caller holds after the loss besides the output, such as its value."""
        self.tracked = frozenset(range(len(known)))
        self._track()
        self._peaks: dict[Hashable, int] = {}

    @functools.cached_property
    def storages(self) -> Storages:
        """The same in columns."""
        return Storages(*(np.array(x, dtype=np.int64) for x in (self.first, self.last, self.size)))

    @functools.cached_property
    def layout(self) -> Indices:
        """Equal for stages that make and hand on storages alike, shape (n + 1,)."""
        seen: dict[Hashable, int] = {None: 0}
        found = [0]
        for ledger in self.ledgers:
            key = ledger.parts and (ledger.parts.inputs, ledger.parts.output_sources)
            found.append(seen.setdefault((ledger.output_is_view, key), len(seen)))
        return np.array(found, dtype=np.int64)

    @functools.cached_property
    def entries(self) -> tuple[list[Entry], list[list[int]]]:
        """The ways to come to stages, by number, and after each the way to the next, by tape.

        Number s = 1..n+1 is that where state s - 1 is kept; 0 is none.
        """
        return self._walk(math.inf)

    def _walk(self, most: float) -> tuple[list[Entry], list[list[int]]]:
        """The same, given up where there are more entries than so many."""
        found = [Entry(s, _NONE) for s in range(self.n + 2)]
        after: list[list[int]] = [[] for _ in found]
        here = {_NONE: 1}
        for s in range(1, self.n + 1):
            then = {_NONE: s + 1}
            for lone, number in here.items():
                for tape in range(len(self.saved[s])):
                    rest = self.handed_on(s, lone, tape) & self.tracked if s < self.n else _NONE
                    if rest not in then:
                        then[rest] = len(found)
                        found.append(Entry(s + 1, rest))
                        after.append([])
                    after[number].append(then[rest])
            if len(found) > most:
                break
            here = then
        return found, after

    def _track(self) -> None:
        """Tell fewer storages apart where there would be too many entries: the large ones.

        Of others it is not known who holds them after the stage that made them, and they count
        with states and with the tapes of that stage and the next alone.
        """
        long = [x for x in range(len(self.first)) if self.last[x] > self.first[x] > 0]
        long.sort(key=lambda x: -self.size[x])
        short, most = self.tracked - set(long), _MOST_ENTRIES * (self.n + 2)
        while long and len(self._walk(most)[0]) > most:
            del long[len(long) // 2 :]
            self.tracked = short | set(long)

    def handed_on(self, s: int, lone: frozenset[int], tape: int = 0) -> frozenset[int]:
        """The storages of state s that tape s hands on and no tape or state keeps so far.

        Args:
            s: The stage.
            lone: Those of state s - 1 that only tape s may keep.
            tape: Which of its tapes it is.
        """
        saved, first = self.saved[s][tape], self.first
        return frozenset(
            [x for x in self.states[s] if x not in saved and (x in lone or first[x] == s)]
        )

    def bytes_of(self, storages: frozenset[int] | Sequence[int]) -> int:
        """Bytes of storages, without those that the caller holds."""
        return sum([self.size[x] for x in storages])

    def made_and_saved(self, s: int, tape: int = 0) -> list[int]:
        """Storages that stage s makes and one of its tapes keeps."""
        return [x for x in dict.fromkeys(self.saved[s][tape]) if self.first[x] == s]

    def backward_peaks(self, stage: Stage, entry: Entry, tape: int = 0) -> tuple[int, int]:
        """The peaks of a backward of a tape from after Turn, and of one from before.

        Peaks are above the level before the backward; the least where they are not known.

        Args:
            stage: The stage.
            entry: How it was come to when it was run with tape.
            tape: Which of its tapes it was.
        """
        peak = self._backward_peak(stage, entry, tape, turned=False)
        # Of other stages nobody can tell whether the caller holds what they make.
        is_last = entry.stage == self.n
        return peak, self._backward_peak(stage, entry, tape, turned=True) if is_last else peak

    def _backward_peak(self, stage: Stage, entry: Entry, tape: int, *, turned: bool) -> int:
        s, ledger = entry.stage, self.options[entry.stage][tape]
        first = stage.parameter_gradient_bytes > 0
        partly = self.ledgers[s - 1].shares_parameters_partly
        firsts = frozenset({first, True} if partly else {first})
        which = self.saved[s][tape]
        if ledger.parts is None:
            which = (self.states[s - 1][0], self.states[s][0])
        held = tuple([self._is_held(x, entry, turned=turned) for x in which])
        same = tuple([which.index(x) for x in which])  # an output that is a view is the input
        key = id(ledger), held, same, firsts
        if key not in self._peaks:
            self._peaks[key] = min(
                max(_peak(ledger, [outlives[k] for k in same], first) for first in firsts)
                for outlives in _possible(held)
            )
        return self._peaks[key]

    def _is_held(self, x: int, entry: Entry, *, turned: bool) -> bool | None:
        """Whether something besides a tape holds a storage before its backward; None: it may."""
        is_output = self.last[x] == self.n  # the caller holds it, if it is that of the first pass
        if self.first[x] == entry.stage:
            return (turned if entry.stage == self.n else None) if is_output else False
        if x in entry.lone:
            return None if is_output else False
        return True if x in self.tracked or self.first[x] == 0 else None


def _follow(
    ledgers: Sequence[StageLedger],
) -> tuple[list[tuple[int, ...]], list[int], list[int], list[int]]:
    """The storages of each state; of each storage its first and last state, and its bytes."""
    parts = ledgers[0].parts
    states = [tuple(range(parts.inputs if parts else 1))]
    first, last, sizes = ([0] * len(states[0]) for _ in range(3))
    for i, ledger in enumerate(ledgers, 1):
        source = states[-1]
        made = list(source) if ledger.output_is_view else []
        for size, origin in [] if made else _outputs(ledger):
            if origin < 0:
                made.append(len(first))
                first.append(i)
                last.append(i)
                sizes.append(size)
            else:
                made.append(source[origin])
        for x in made:
            last[x] = i
        states.append(tuple(made))
    return states, first, last, sizes


def _outputs(ledger: StageLedger) -> Iterator[tuple[int, int]]:
    """Bytes of each storage of the output, and which one of the input it is, or -1."""
    if ledger.parts is None:
        return iter([(ledger.state_bytes, -1)])
    return zip(ledger.parts.output_bytes, ledger.parts.output_sources, strict=True)


def _saved(
    ledger: StageLedger, source: tuple[int, ...], output: tuple[int, ...]
) -> tuple[int, ...]:
    """The storages of input and output that a tape keeps."""
    if ledger.parts is None:
        return source * ledger.input_saved + output * ledger.output_saved
    inputs = tuple(source[k] for k in ledger.parts.saved_inputs)
    return inputs + tuple(output[k] for k in ledger.parts.saved_outputs)


def _peak(ledger: StageLedger, outlives: list[bool], first: bool) -> int:
    if ledger.parts is not None:
        return ledger.parts.backward_peak(tuple(outlives), first=first)
    input_held, output_held = outlives
    variant = backward_variant(input_held=input_held, output_held=output_held, first=first)
    return ledger.backward_peak_bytes[variant]


def _possible(held: tuple[bool | None, ...]) -> Iterator[tuple[bool, ...]]:
    """What may be, where it is not known of all; of many unknown ones all or none."""
    unsure = held.count(None)
    cases: Iterator[tuple[bool, ...]] = itertools.product((False, True), repeat=unsure)
    if unsure > _MOST_UNSURE:
        cases = iter([(False,) * unsure, (True,) * unsure])
    for case in cases:
        left = iter(case)
        yield tuple(next(left) if x is None else x for x in held)
