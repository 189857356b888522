"""One training step: what is stored, and the interpreter of the schedule's operations."""

from __future__ import annotations

import enum
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final

import numpy as np
import torch
from torch import Tensor

from .checksums import Checksums
from .context import RandomState, Recomputing
from .errors import BudgetWarning, ExecutionError
from .higher import Gradients, differentiable_gradients
from .liveness import Segment
from .program import Program
from .schedule import Code, Kind
from .surroundings import Surroundings
from .tape import Tape, record, run_alone
from .trees import State

# Plain numbers: members of an enum are slow to look up, and there is one operation a step or more.
_FORWARD, _TAPED_FORWARD, _BACKWARD = map(int, (Code.FORWARD, Code.TAPED_FORWARD, Code.BACKWARD))
_STATE, _TAPE = int(Kind.STATE), int(Kind.TAPE)
_FIRST = nullcontext()  # surrounds the first run of a stage


class _Phase(enum.Enum):
    """How far a run is."""

    FORWARD = enum.auto()
    TURNED = enum.auto()
    GOING_BACK = enum.auto()
    RELEASED = enum.auto()


class _Stored:
    """A stored state, and what it takes to run on from it."""

    __slots__ = ("random", "state", "versions")

    def __init__(self, state: State, random: RandomState | None) -> None:
        self.state = state
        self.versions = state.versions()
        self.random = random


class _Kept:
    """A stored tape, and its output as long as a later run reads it from here."""

    __slots__ = ("output", "tape")

    def __init__(self, tape: Tape, output: _Stored | None) -> None:
        self.tape = tape
        self.output = output


@final
class Run:
    """One call of the model: what is stored, and where in the schedule it stands."""

    def __init__(self, program: Program, inputs: State, given: State) -> None:
        """Begin a step.

        Args:
            program: The model and its plan.
            inputs: The input as the caller gave it, taken apart.
            given: What every stage is given besides, taken apart.
        """
        self.program = program
        self.device = inputs.leaves[0].device
        self.seen = Surroundings(program, self.device, given)
        self.parameters_by_block = self._assign()
        self.inputs_wanted = tuple([leaf.requires_grad for leaf in inputs.leaves])
        self.first_trained = self._first_trained(inputs, given)
        self.states: dict[int, _Stored] = {}
        self.tapes: dict[int, _Kept] = {}
        self.gradients: tuple[Tensor | None, ...] = ()
        self.phase = _Phase.FORWARD
        self._repeating = False
        self.output = State(())
        self.checksums = Checksums() if program.check_outputs else None
        self._start(inputs)

    def _start(self, inputs: State) -> None:
        snapshot = self._snapshot(self.program.liveness.snapshots_input)
        self.states[0] = _Stored(inputs.detached(), snapshot)

    def _assign(self) -> list[list[Tensor]]:
        """Give each parameter to the first block that uses it, where its gradient is complete."""
        seen = {id(t) for t in self.seen.given.leaves}  # those belong to the first block
        assigned = []
        for slots in self.program.slots:
            mine = [p for p in slots.parameters() if id(p) not in seen]
            seen.update(id(p) for p in mine)
            assigned.append(mine)
        return assigned

    def _first_trained(self, inputs: State, given: State) -> int:
        """The first stage whose output may need a gradient; 0 where an input does."""
        if any(leaf.requires_grad for leaf in (*inputs.leaves, *given.leaves)):
            return 0
        known: dict[int, bool] = {}
        for i, stage in enumerate(self.program.stages, 1):
            module = stage.module
            trained = known.get(id(module))
            if trained is None:
                trained = known[id(module)] = any(p.requires_grad for p in module.parameters())
            if trained:
                return i
        return len(self.program.stages) + 1

    def _snapshot(self, wanted: bool | int) -> RandomState | None:
        if not wanted or not self.program.random:
            return None
        return RandomState.take(self.device)

    # -- the three parts of a step

    def forward(self, segment: Segment) -> None:
        """Run the operations of one block's forward."""
        with self._guard(), self.seen.entered(), self._swapped(segment):
            self._interpret(segment)

    def turn(self) -> tuple[Tensor, ...]:
        """End the forward pass and hand out the tensors of the output; its tree is in `output`."""
        with self._guard():
            self.seen.end_forward()
        self.phase = _Phase.TURNED
        output = self._take_output().detached()
        self.output = State((), output.tree)
        return output.leaves

    def _take_output(self) -> State:
        n = len(self.program.stages)
        state = self.states.get(n)
        if state is None:
            kept = self.tapes[n]
            assert kept.output is not None
            state, kept.output = kept.output, None
        return state.state

    def start_backward(
        self,
        gradients: tuple[Tensor | None, ...],
        inputs: Callable[[], tuple[State, State]],
    ) -> Gradients | None:
        """Take the gradient of the output, and check that the backward can go on.

        Args:
            gradients: With respect to the tensors of the output.
            inputs: Gives the input and what every stage is given, with their graphs, or fails where
                they are gone; asked only where the stored states are not enough.

        Returns:
            All gradients, where they are to be differentiated again; else None.
        """
        first, self.phase = self.phase is _Phase.TURNED, _Phase.GOING_BACK
        with self._guard():
            self.seen.check()
            if torch.is_grad_enabled():
                self._clear()
                warnings.warn(
                    "a backward with create_graph=True runs a checkpointed model again as one "
                    "graph: it takes the memory of plain autograd, not that of the plan",
                    BudgetWarning,
                    stacklevel=2,
                )
                return differentiable_gradients(self.seen, *self._again(inputs), gradients)
            if not first:
                self._rewind(self._again(inputs)[0])
        self.gradients = gradients
        return None

    def _again(self, inputs: Callable[[], tuple[State, State]]) -> tuple[State, State]:
        first, given = inputs()
        self.seen.give(given)
        return first, given

    def _rewind(self, inputs: State) -> None:
        """Run the forward pass again, for one more backward."""
        program = self.program
        self._clear()
        whole = Segment(0, 0, program.segments.turn)
        blocks = range(len(program.slots))
        with (
            self.seen.entered(),
            self.seen.modes(),
            self._swapped(whole),
            self.seen.traceless(blocks),
        ):
            self.seen.restore_random()
            self._start(inputs)
            self._interpret(whole, again=True)
        self._take_output()

    def backward(self, segment: Segment, *, lowest: bool) -> list[Tensor | None]:
        """Run the operations of one block's backward.

        Args:
            segment: The operations.
            lowest: Whether no block before this one needs a backward.

        Returns:
            The gradients of what `tensors_of` names for this block.
        """
        aliases = self._aliases_of(segment.block)
        if self.phase is not _Phase.GOING_BACK:
            raise ExecutionError(
                "this forward pass has been released: its backward was done or failed; run the "
                "model again"
            )
        with (
            self._guard(),
            self.seen.entered(),
            self.seen.modes(),
            self._swapped(segment),
            self._replaying(segment),
        ):
            self._interpret(segment)
        gradients = []
        for alias in aliases:
            gradients.append(alias.grad)
            alias.grad = None
        if lowest:
            found = self.gradients
            self.release()
            self.gradients = found
        return gradients

    def differentiable(self, higher: Gradients, block: int) -> list[Tensor | None]:
        """The same for a backward with `create_graph`, from what `start_backward` returned."""
        return [higher.others[id(alias)] for alias in self._aliases_of(block)]

    def _aliases_of(self, block: int) -> list[Tensor]:
        return [self.seen.alias_of[id(t)] for t in self.tensors_of(block)]

    def tensors_of(self, block: int) -> list[Tensor]:
        """Whose gradients a block hands over: further inputs at the first, and its parameters."""
        further = self.seen.given.leaves if block == 0 else ()
        return [*further, *self.parameters_by_block[block]]

    def take_gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients with respect to the input's tensors, given away."""
        gradients, self.gradients = self.gradients, ()
        return gradients

    def release(self) -> None:
        """Forget everything that is stored."""
        self.phase = _Phase.RELEASED
        self._clear()
        self.seen.let_go()

    def _clear(self) -> None:
        self.states.clear()
        self.tapes.clear()
        self.gradients = ()
        for alias in self.seen.aliases:
            alias.grad = None

    # -- what surrounds the operations

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Release what is stored when anything fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def _swapped(self, segment: Segment) -> AbstractContextManager[None]:
        """Put aliases into the modules of every block that the operations touch."""
        program = self.program
        touched = np.unique(program.owner[program.numbers[segment.start : segment.stop]])
        return self.seen.parameters_replaced(touched.tolist(), self.seen.bound)

    def _replaying(self, segment: Segment) -> AbstractContextManager[None]:
        """Leave no trace of what the operations run again."""
        program = self.program
        part = slice(segment.start, segment.stop)
        again = program.numbers[part][program.liveness.repeats[part]]
        if not len(again):
            return nullcontext()
        return self.seen.traceless(np.unique(program.owner[again]).tolist())

    # -- the operations

    def _interpret(self, segment: Segment, *, again: bool = False) -> None:
        program = self.program
        self._repeating = again
        part = slice(segment.start, segment.stop)
        columns = (program.codes, program.numbers, program.kinds)
        operations = zip(*(column[part].tolist() for column in columns), strict=True)
        for p, (code, i, kind) in enumerate(operations, segment.start):
            if code == _FORWARD:
                self._forward(p, i)
            elif code == _TAPED_FORWARD:
                self._taped_forward(p, i)
            elif code == _BACKWARD:
                self._backward(i)
            elif kind == _STATE:
                del self.states[i]
            elif kind == _TAPE:
                del self.tapes[i]

    def _input(self, p: int, i: int) -> _Stored:
        """The input of stage i, with the random state that its run begins with."""
        stored = self.states.get(i - 1)
        if stored is None:
            kept = self.tapes[i - 1]
            assert kept.output is not None
            stored = kept.output
        if stored.state.versions() != stored.versions:
            raise ExecutionError(
                f"the input of stage {self.program.stages[i - 1].name!r} was changed in place "
                "since it was made, by the caller or by another stage that holds a view of it; "
                "change a copy instead (x = x + 1, not x += 1)"
            )
        if self.program.facts.frees_input[p]:
            self.tapes[i - 1].output = None
        if self.program.random and self.program.facts.restores[p]:
            assert stored.random is not None
            stored.random.restore()
        return stored

    def _check_input(self, stored: _Stored, i: int) -> None:
        if stored.state.versions() != stored.versions:
            raise ExecutionError(
                f"stage {self.program.stages[i - 1].name!r} changed its input in place, so it "
                "cannot be run again; use an operation that is not in place, or make the stage one "
                "with the stage before it"
            )

    def _marked(self, p: int) -> AbstractContextManager[None]:
        """What tells the stage whether it runs again."""
        again = self._repeating or self.program.facts.repeats[p]
        return Recomputing() if again else _FIRST

    def _check_result(self, i: int, output: State) -> None:
        if self.checksums is not None:
            self.checksums.see(i, self.program.stages[i - 1].name, output.leaves)

    def _wanted(self, i: int) -> tuple[bool, ...]:
        """For each tensor of state i whether its gradient is wanted."""
        if i == 0:
            return self.inputs_wanted
        carries = self.program.carries[i]
        return carries if i >= self.first_trained else (False,) * len(carries)

    def _forward(self, p: int, i: int) -> None:
        stored = self._input(p, i)
        stage = self.program.stages[i - 1]
        with self._marked(p):
            output = run_alone(
                stage,
                stored.state,
                wanted=self._wanted(i - 1),
                extras=self.seen.extras,
                needs_tape=self.program.needs_tape[i - 1],
            )
        self._check_input(stored, i)
        self._check_output(i, output, None)
        snapshot = self._snapshot(self.program.facts.snapshots[p])
        self.states[i] = _Stored(output, snapshot)

    def _taped_forward(self, p: int, i: int) -> None:
        stored = self._input(p, i)
        stage = self.program.stages[i - 1]
        wanted = self._wanted(i - 1)
        with self._marked(p):
            tape, output = record(stage, stored.state, wanted=wanted, extras=self.seen.extras)
        self._check_input(stored, i)
        self._check_output(i, output, tape)
        repeated = self.program.repeated.get((stage.key, wanted))
        if repeated is None:
            repeated = self.program.repeated[stage.key, wanted] = self._repeated(stage.name, tape)
        if repeated:
            tape.feed_back([self.seen.aliases[k] for k in repeated])
        kept = None
        if self.program.facts.keeps_output[p]:
            kept = _Stored(output, self._snapshot(self.program.facts.snapshots[p]))
        self.tapes[i] = _Kept(tape, kept)

    def _repeated(self, name: str, tape: Tape) -> list[int]:
        """Which aliases a stage uses more than once; asked once, as it takes a walk of the tape."""
        uses, aliases = tape.uses(), self.seen.aliases
        if not uses.keys() <= {id(alias) for alias in aliases}:
            raise ExecutionError(
                f"stage {name!r} uses a tensor that requires a gradient and is neither a parameter "
                "of the model nor an argument of the call that ckptsched sees, so its gradient "
                "would be lost; register it, or give it to the model as an argument by itself"
            )
        return [k for k, alias in enumerate(aliases) if uses.get(id(alias), 0) > 1]

    def _check_output(self, i: int, output: State, tape: Tape | None) -> None:
        """Refuse an output that is not made up as the profile saw it."""
        carries = self.program.carries[i]
        name = self.program.stages[i - 1].name
        if len(output.leaves) != len(carries):
            raise ExecutionError(
                f"stage {name!r} returned {len(output.leaves)} tensors, and {len(carries)} when "
                "the model was profiled; let it return the same always, or profile and plan again"
            )
        found = carries if tape is None else tape.carries
        if found != carries and any(map(operator.gt, found, carries)):
            raise ExecutionError(
                f"stage {name!r} returned a tensor that depends on parameters or inputs that are "
                "trained, and it did not when the model was profiled, so its gradient would be "
                "lost; profile and plan again"
            )
        self._check_result(i, output)

    def _backward(self, i: int) -> None:
        tape = self.tapes.pop(i).tape
        gradients = self.take_gradients()
        for gradient, shape in zip(gradients, tape.shapes, strict=True):
            if gradient is not None and gradient.shape != shape:
                raise ExecutionError(
                    f"stage {self.program.stages[i - 1].name!r} returned shape "
                    f"{tuple(gradient.shape)} when it first ran and {tuple(shape)} when it ran "
                    "again; a stage must depend on its input and parameters only"
                )
        self.gradients = tape.backward(gradients)
