"""What a step has stored of states and gradients: here those of a chain, live sets by stage.

A chain hands the state between two stages on as a whole. By the plan of a graph stages are given
values of their own choice, see `value_states`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import final

from torch import Tensor

from ...capture.stage_discovery import StageCall
from ...tensors.pytree import State
from ..script import FREES_INPUT, KEEPS_OUTPUT, RESTORES, SNAPSHOTS
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
