"""What a step has stored of states and gradients: live sets by stage, or values by who made them.

A chain hands the state between two stages on as a whole. By the plan of a graph a stage is given
the values that it reads, from their newest copies, and what it makes is a copy of its own, which
goes after it was read for the last time.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import final

from torch import Tensor

from ...capture.recording.replay.own_values import OwnStage, OwnStretch, Value
from ...capture.stage_discovery import StageCall
from ...recompute.tape import state_of
from ...tensors.pytree import State
from ..script import FORGETS, FREES_INPUT, KEEPS_OUTPUT, RESTORES, SNAPSHOTS
from .forward_snapshot import ForwardSnapshot, StateSnapshot

Gradients = tuple[Tensor | None, ...]


class Checkpoint:
    """A stored state, with the random and buffer snapshot to run on from it."""

    __slots__ = ("random", "state", "versions")

    def __init__(self, state: State, random: StateSnapshot | None) -> None:
        self.state = state
        self.versions = state.versions()
        self.random = random


class Flow(abc.ABC):
    """What stages that share one tape hand each other, with its graph."""

    @abc.abstractmethod
    def input(self, p: int, i: int) -> State:
        """The input of stage i, for the run at position p."""

    @abc.abstractmethod
    def take(self, p: int, i: int, made: State) -> None:
        """What stage i has made in the run at position p; a copy is stored where it is read."""

    @abc.abstractmethod
    def outputs(self) -> Sequence[Tensor]:
        """What later stages are given."""


class States(abc.ABC):
    """States of one step, and the gradients that the backward has come to."""

    def __init__(self, seen: ForwardSnapshot, inputs_wanted: tuple[int, ...], first: int) -> None:
        """Store nothing yet.

        Args:
            seen: What the forward pass has found.
            inputs_wanted: For each tensor of the input one of `Carries`.
            first: The first stage whose output may need a gradient.
        """
        self.prepared, self.seen = seen.prepared, seen
        self.inputs_wanted, self.first_trained = inputs_wanted, first

    def _snapshot(self, i: int, wanted: bool | int) -> StateSnapshot | None:
        return self.seen.snapshot(i) if wanted and self.prepared.replays else None

    def _carried(self, i: int) -> tuple[int, ...]:
        """For each tensor of state i what the stage after it finds, one of `Carries`."""
        if i == 0:
            return self.inputs_wanted
        carries = self.prepared.facts.carries[i]
        return carries if i >= self.first_trained else (0,) * len(carries)

    @abc.abstractmethod
    def stage(self, i: int) -> StageCall:
        """What is called as stage i."""

    @abc.abstractmethod
    def wanted(self, i: int) -> tuple[int, ...]:
        """For each tensor that stage i is given one of `Carries`."""

    @abc.abstractmethod
    def carries(self, i: int) -> Sequence[int]:
        """For each tensor that stage i gives what the profile saw that it carries."""

    @abc.abstractmethod
    def begin(self, inputs: State) -> None:
        """Store the input."""

    @abc.abstractmethod
    def read(self, p: int, i: int) -> Checkpoint:
        """The input of stage i for the run at position p, whose random state is put back."""

    @abc.abstractmethod
    def keep(self, p: int, i: int, output: State, *, taped: bool) -> None:
        """Store what the run at position p has made, as long as it is read from here."""

    @abc.abstractmethod
    def drop(self, i: int) -> None:
        """Forget a state, as the schedule says."""

    @abc.abstractmethod
    def tape_gone(self, i: int) -> None:
        """Forget what is read from the tape of stage i alone."""

    @abc.abstractmethod
    def peek(self, i: int) -> State:
        """State i, which is stored: the input, or the output of the last stage."""

    @abc.abstractmethod
    def take_output(self) -> State:
        """The output of the last stage, given away if only its tape has it."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abc.abstractmethod
    def arrive(self, gradients: Gradients) -> None:
        """Take those with respect to the output."""

    @abc.abstractmethod
    def enter(self, p: int, first: int, last: int) -> tuple[Checkpoint, tuple[int, ...]]:
        """What stages that share a tape read of others, and of each tensor one of `Carries`."""

    @abc.abstractmethod
    def flow(self, first: int, last: int, entered: State) -> Flow:
        """What goes through stages that share a tape, from what they read of others."""

    @abc.abstractmethod
    def gradients_of(self, first: int, last: int) -> list[Tensor | None]:
        """The gradients with respect to what stages that share a tape give, given away."""

    @abc.abstractmethod
    def send(self, first: int, last: int, gradients: Gradients) -> None:
        """Take those with respect to what stages that share a tape were given."""

    @abc.abstractmethod
    def take_gradients(self) -> Gradients:
        """Those with respect to the input, or to the state that the backward has come to."""


@final
class LiveSets(States):
    """The states of a chain, each stored as a whole; tapes hand theirs on as long as it is read."""

    def __init__(self, seen: ForwardSnapshot, inputs_wanted: tuple[int, ...], first: int) -> None:
        super().__init__(seen, inputs_wanted, first)
        self._states: dict[int, Checkpoint] = {}
        self._of_tapes: dict[int, Checkpoint] = {}
        self._gradients: Gradients = ()

    def stage(self, i: int) -> StageCall:
        """That of the chain."""
        return self.prepared.stages[i - 1]

    def wanted(self, i: int) -> tuple[int, ...]:
        """By the state before."""
        return self._carried(i - 1)

    def carries(self, i: int) -> Sequence[int]:
        """By the state after."""
        return self.prepared.facts.carries[i]

    def begin(self, inputs: State) -> None:
        """Store state 0."""
        snapshot = self._snapshot(0, self.prepared.script.snapshots_input)
        self._states[0] = Checkpoint(inputs.detached(), snapshot)

    def read(self, p: int, i: int) -> Checkpoint:
        """State i - 1."""
        stored = self._states.get(i - 1) or self._of_tapes[i - 1]
        facts = self.prepared.script.facts[p]
        if facts & FREES_INPUT:
            self._of_tapes.pop(i - 1, None)
        if facts & RESTORES and self.prepared.replays:
            assert stored.random is not None
            stored.random.restore()
        return stored

    def keep(self, p: int, i: int, output: State, *, taped: bool) -> None:
        """As state i, or with its tape where a later run reads it from there."""
        facts = self.prepared.script.facts[p]
        if taped and not facts & KEEPS_OUTPUT:
            return
        stored = Checkpoint(
            output.detached() if taped else output, self._snapshot(i, facts & SNAPSHOTS)
        )
        (self._of_tapes if taped else self._states)[i] = stored

    def drop(self, i: int) -> None:
        """It is stored: the schedule is valid."""
        del self._states[i]

    def tape_gone(self, i: int) -> None:
        """What it handed on."""
        self._of_tapes.pop(i, None)

    def peek(self, i: int) -> State:
        """From a checkpoint, or from the tape."""
        return (self._states.get(i) or self._of_tapes[i]).state

    def take_output(self) -> State:
        """State n."""
        n = len(self.prepared.stages)
        state = self.peek(n)
        self._of_tapes.pop(n, None)
        return state

    def clear(self) -> None:
        """All states, and the gradients."""
        self._states.clear()
        self._of_tapes.clear()
        self._gradients = ()

    def arrive(self, gradients: Gradients) -> None:
        """As those of state n."""
        self._gradients = gradients

    def enter(self, p: int, first: int, last: int) -> tuple[Checkpoint, tuple[int, ...]]:
        """The state before the first."""
        return self.read(p, first), self.wanted(first)

    def flow(self, first: int, last: int, entered: State) -> Flow:
        """Each hands its whole state to the next."""
        return _LiveSetFlow(self, last, entered)

    def gradients_of(self, first: int, last: int) -> list[Tensor | None]:
        """Those of the state after the last."""
        return list(self.take_gradients())

    def send(self, first: int, last: int, gradients: Gradients) -> None:
        """Those of the state before the first."""
        self._gradients = gradients

    def take_gradients(self) -> Gradients:
        """Of the state that the backward has come to."""
        gradients, self._gradients = self._gradients, ()
        return gradients


@final
class _LiveSetFlow(Flow):
    def __init__(self, states: LiveSets, last: int, entered: State) -> None:
        self._states, self._last, self._state = states, last, entered

    def input(self, p: int, i: int) -> State:
        return self._state

    def take(self, p: int, i: int, made: State) -> None:
        self._state = made
        if i == self._last:
            self._states.keep(p, i, made, taped=True)

    def outputs(self) -> Sequence[Tensor]:
        return self._state.leaves


@final
class Values(States):
    """Copies of what stages have made, and gradients by value."""

    def __init__(self, seen: ForwardSnapshot, inputs_wanted: tuple[int, ...], first: int) -> None:
        super().__init__(seen, inputs_wanted, first)
        self._own: tuple[OwnStage, ...] = seen.prepared.own
        self._copies: dict[int, Checkpoint] = {}
        self._snapshots: dict[int, StateSnapshot | None] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}

    def stage(self, i: int) -> StageCall:
        """The one that reads values."""
        return self._own[i - 1].call

    def wanted(self, i: int) -> tuple[int, ...]:
        """By the live set before, of which they are some."""
        carried = self._carried(i - 1)
        return tuple([carried[place] for place in self._own[i - 1].entered_at])

    def carries(self, i: int) -> Sequence[int]:
        """By the live set after."""
        carries = self.prepared.facts.carries[i]
        return [carries[place] for place in self._own[i - 1].gives]

    def begin(self, inputs: State) -> None:
        """Store the input's values."""
        self._copies[0] = Checkpoint(inputs.detached(), None)

    def read(self, p: int, i: int) -> Checkpoint:
        """What it reads, from the newest copies."""
        self.begin_run(p, i)
        found = self._checkpoint(self._own[i - 1].reads)
        self.free(p)
        return found

    def begin_run(self, p: int, i: int) -> None:
        """Take the snapshot of random state and buffers before a run, or put it back."""
        facts = self.prepared.script.facts[p]
        if facts & SNAPSHOTS:
            self._snapshots[i] = self._snapshot(i - 1, wanted=True)
        if facts & RESTORES and self.prepared.replays:
            snapshot = self._snapshots[i]
            assert snapshot is not None
            snapshot.restore()
        if facts & FORGETS:
            self._snapshots.pop(i, None)

    def _checkpoint(self, reads: Sequence[Value]) -> Checkpoint:
        leaves = [self._copies[value.maker].state.leaves[value.place] for value in reads]
        found = Checkpoint(state_of(tuple(leaves)), None)
        found.versions = tuple([self._copies[value.maker].versions[value.place] for value in reads])
        return found

    def free(self, p: int) -> None:
        """Forget the copies that the run at position p is the last to read."""
        for maker in self.prepared.script.frees.get(p, ()):
            self._copies.pop(maker, None)

    def enter(self, p: int, first: int, last: int) -> tuple[Checkpoint, tuple[int, ...]]:
        """All that some of them read of others; it is freed as it is read."""
        stretch = self.prepared.stretch(first, last)
        wanted = [self._carried(i - 1)[place] for i, place in stretch.entered_at]
        return self._checkpoint(stretch.reads), tuple(wanted)

    def flow(self, first: int, last: int, entered: State) -> Flow:
        """Each is given what it reads, whoever has made it."""
        return _ValueFlow(self, first, self.prepared.stretch(first, last), entered)

    def keep(self, p: int, i: int, output: State, *, taped: bool) -> None:
        """A copy of what it has made, if that is read."""
        if not self.prepared.script.facts[p] & KEEPS_OUTPUT:
            self._copies.pop(i, None)
            return
        pairs = zip(output.leaves, self._own[i - 1].passes, strict=True)
        made = [leaf.detach() for leaf, source in pairs if source < 0]
        self._copies[i] = Checkpoint(state_of(tuple(made)), None)

    def drop(self, i: int) -> None:
        """Nothing: copies go after they were read for the last time."""

    def tape_gone(self, i: int) -> None:
        """Nothing."""

    def peek(self, i: int) -> State:
        """The copy of what it has made: all there is before the first stage and after the last."""
        return self._copies[i].state

    def take_output(self) -> State:
        """The last stage's copy, which nothing reads after Turn."""
        return self._copies.pop(len(self._own)).state

    def clear(self) -> None:
        """All copies, snapshots and gradients."""
        self._copies.clear()
        self._snapshots.clear()
        self._gradients.clear()

    def arrive(self, gradients: Gradients) -> None:
        """As those of what the last stage has made, which is all of the output."""
        self._gradients[len(self._own)] = list(gradients)

    def gradients_of(self, first: int, last: int) -> list[Tensor | None]:
        """Those of what they have made, and so far of what they have read and later stages, too."""
        found = []
        for maker, place in self._given(first, last):
            row = self._gradients.get(maker)
            found.append(row[place] if row else None)
            if row:
                row[place] = None
        for i in range(first, last + 1):
            self._gradients.pop(i, None)
        return found

    def _given(self, first: int, last: int) -> Sequence[Value]:
        if first == last:
            return self._own[first - 1].given
        return self.prepared.stretch(first, last).gives

    def send(self, first: int, last: int, gradients: Gradients) -> None:
        """Those of what they have read of others, each in place of what there was of it so far."""
        reads = self._own[first - 1].reads
        if first < last:
            reads = self.prepared.stretch(first, last).reads
        for (maker, place), gradient in zip(reads, gradients, strict=True):
            row = self._gradients.get(maker)
            if row is None:
                row = self._gradients[maker] = [None] * self._made(maker)
            row[place] = gradient

    def _made(self, maker: int) -> int:
        """How many values a stage has made."""
        return len(self._own[maker - 1].makes) if maker else self._own[0].alive[0]

    def take_gradients(self) -> Gradients:
        """Of the input."""
        return tuple(self._gradients.pop(0, [None] * self._made(0)))


@final
class _ValueFlow(Flow):
    def __init__(self, states: Values, first: int, stretch: OwnStretch, entered: State) -> None:
        self._states, self._first, self._stretch = states, first, stretch
        self._own: tuple[OwnStage, ...] = states.prepared.own
        self._alive = dict(zip(stretch.reads, entered.leaves, strict=True))

    def input(self, p: int, i: int) -> State:
        self._states.begin_run(p, i)
        found = state_of(tuple([self._alive[value] for value in self._own[i - 1].reads]))
        self._states.free(p)
        return found

    def take(self, p: int, i: int, made: State) -> None:
        values = self._own[i - 1].given
        self._alive |= zip(values, made.leaves, strict=True)
        for value in self._stretch.spent[i - self._first]:
            self._alive.pop(value, None)
        self._states.keep(p, i, made, taped=True)

    def outputs(self) -> Sequence[Tensor]:
        return [self._alive[value] for value in self._stretch.gives]
