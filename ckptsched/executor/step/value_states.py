"""States of a step by the plan of a graph: copies of values by who made them.

A stage is given the values that it reads, from their newest copies, and what it makes is a copy of
its own, which goes after it was read for the last time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from ...capture.recording.replay.own_values import OwnStage, OwnStretch, Value
from ...capture.stage_discovery import StageCall
from ...recompute.tape import state_of
from ...tensors.pytree import State
from ..script import FORGETS, KEEPS_OUTPUT, RESTORES, SNAPSHOTS
from .forward_snapshot import ForwardSnapshot, StateSnapshot
from .states import Checkpoint, Flow, Gradients, States


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
