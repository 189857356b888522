"""One training step: what is stored, and the interpreter of the schedule's operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import final

import numpy as np
import torch
from torch import Tensor

from .aliases import make_alias
from .context import Autocast, RandomState, one_kernel
from .errors import ExecutionError
from .liveness import Segment
from .program import Program
from .schedule import Code, Kind
from .tape import Tape, check_output, record


class _State:
    """A stored state, and what it takes to run on from it."""

    __slots__ = ("random", "tensor", "version")

    def __init__(self, tensor: Tensor, random: RandomState | None) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.random = random


class _Kept:
    """A stored tape, and its output as long as a later run reads it from here."""

    __slots__ = ("output", "tape")

    def __init__(self, tape: Tape, output: _State | None) -> None:
        self.tape = tape
        self.output = output


@final
class Run:
    """One call of the model: what is stored, and where in the schedule it stands."""

    def __init__(self, program: Program, x: Tensor) -> None:
        self.program = program
        self.device = x.device
        self.autocast = Autocast.take(x.device)
        self.input_needs_gradient = x.requires_grad
        parameters = program.all_slots.parameters()
        self.aliases = [make_alias(p) for p in parameters]
        self.alias_of = {id(p): a for p, a in zip(parameters, self.aliases, strict=True)}
        self.bound = [slots.bind(self.alias_of) for slots in program.slots]
        self.pinned = [(p, p._version) for p in parameters]
        self.parameters_by_block = self._assign()
        self.held_buffers = [slots.buffers_in_place() for slots in program.slots]
        self.buffer_versions = self._buffer_versions()
        self.unchanged: list[bool] = []
        self.modes = [(module, module.training) for module in program.modules]
        self.first_trained = self._first_trained()
        self.states: dict[int, _State] = {}
        self.tapes: dict[int, _Kept] = {}
        self.gradient: Tensor | None = None
        self.phase = "forward"
        self.states[0] = _State(x.detach(), self._snapshot(program.liveness.snapshots_input))
        # Bytes of Python, which are no tensor's.
        self.random_before = b"" if program.random else RandomState.take(x.device).to_bytes()

    def _assign(self) -> list[list[Tensor]]:
        """Give each parameter to the first block that uses it, where its gradient is complete."""
        seen: set[int] = set()
        assigned = []
        for slots in self.program.slots:
            mine = [p for p in slots.parameters() if id(p) not in seen]
            seen.update(id(p) for p in mine)
            assigned.append(mine)
        return assigned

    def _buffer_versions(self) -> list[int]:
        held = (b for buffers in self.held_buffers for b in buffers if b is not None)
        return [b._version for b in held]

    def _first_trained(self) -> int:
        """The first stage whose output needs a gradient; 0 where the input does."""
        if self.input_needs_gradient:
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

    def _snapshot(self, wanted: bool | np.bool_) -> RandomState | None:
        if not wanted or not self.program.random:
            return None
        return RandomState.take(self.device)

    # -- the three parts of a step

    def forward(self, segment: Segment) -> None:
        """Run the operations of one block's forward."""
        with self._guard(), self._swapped(segment):
            self._interpret(segment)

    def turn(self) -> Tensor:
        """End the forward pass and hand out the output."""
        program = self.program
        n = len(program.stages)
        state = self.states.get(n)
        if state is None:
            kept = self.tapes[n]
            assert kept.output is not None
            state, kept.output = kept.output, None
        if not program.random and RandomState.take(self.device).to_bytes() != self.random_before:
            self.release()
            raise ExecutionError(
                "a stage drew random numbers, and none did when the model was profiled: it would "
                "draw others when it runs again; profile and plan again, with a sample on which it "
                "draws"
            )
        self.phase = "backward"
        now = self._buffer_versions()
        self.unchanged = [a == b for a, b in zip(self.buffer_versions, now, strict=True)]
        return state.tensor.detach()

    def start_backward(self, gradient: Tensor | None) -> None:
        """Take the gradient of the output, and check that the backward can go on."""
        if self.phase != "backward":
            raise ExecutionError(
                "a second backward through one forward pass: its checkpoints are gone; run the "
                "model again, or add up the losses and go back once (retain_graph does not help)"
            )
        if torch.is_grad_enabled():
            raise ExecutionError(
                "a backward with create_graph=True was asked for: a checkpointed model gives first "
                "derivatives only; use the model itself (`.model`) for higher ones"
            )
        self.phase = "going back"
        try:
            self._check_parameters()
        except BaseException:
            self.release()
            raise
        self.gradient = gradient

    def backward(self, segment: Segment, *, lowest: bool) -> list[Tensor | None]:
        """Run the operations of one block's backward.

        Args:
            segment: The operations.
            lowest: Whether no block before this one needs a backward.

        Returns:
            The gradients of the parameters that were given to this block.
        """
        if self.phase != "going back":
            raise ExecutionError(
                "this forward pass has been released: its backward was done or failed; run the "
                "model again"
            )
        with (
            self._guard(),
            self._modes_of_the_forward(),
            self._swapped(segment),
            self._replaying(segment),
        ):
            self._interpret(segment)
        gradients = []
        for parameter in self.parameters_by_block[segment.block]:
            alias = self.alias_of[id(parameter)]
            gradients.append(alias.grad)
            alias.grad = None
        if lowest:
            gradient = self.gradient
            self.release()
            self.gradient = gradient
        return gradients

    def take_gradient(self) -> Tensor | None:
        """The gradient with respect to the input, given away."""
        gradient, self.gradient = self.gradient, None
        return gradient

    def release(self) -> None:
        """Forget everything that is stored."""
        self.phase = "released"
        self.states.clear()
        self.tapes.clear()
        self.gradient = None
        for alias in self.aliases:
            alias.grad = None

    # -- what surrounds the operations

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Hold the model's lock and autocast; release what is stored when anything fails."""
        try:
            with self.program.lock.lock, self.autocast.again(), one_kernel():
                yield
        except BaseException:
            self.release()
            raise

    @contextmanager
    def _modes_of_the_forward(self) -> Iterator[None]:
        """Let every module train, or not, as in the forward pass."""
        changed = [(m, m.training) for m, flag in self.modes if m.training != flag]
        try:
            for module, now in changed:
                module.training = not now
            yield
        finally:
            for module, now in changed:
                module.training = now

    @contextmanager
    def _swapped(self, segment: Segment) -> Iterator[None]:
        """Put aliases into the modules of every block that the operations touch."""
        program = self.program
        touched = np.unique(program.owner[program.numbers[segment.start : segment.stop]])
        with ExitStack() as stack:
            for k in touched:
                replaced = program.slots[int(k)].parameters_replaced(self.bound[int(k)])
                stack.enter_context(replaced)
            yield

    @contextmanager
    def _replaying(self, segment: Segment) -> Iterator[None]:
        """Leave no trace of what is run again: random numbers drawn, buffers changed."""
        program = self.program
        part = slice(segment.start, segment.stop)
        again = program.numbers[part][program.liveness.repeats[part]]
        if not len(again):
            yield
            return
        outer = RandomState.take(self.device) if program.random else None
        try:
            with ExitStack() as stack:
                clones: dict[int, Tensor] = {}
                for k in np.unique(program.owner[again]):
                    slots, held = program.slots[int(k)], self.held_buffers[int(k)]
                    for buffer in held:
                        if buffer is not None and id(buffer) not in clones:
                            clones[id(buffer)] = buffer.clone()
                    stack.enter_context(slots.buffers_replaced(clones, held))
                yield
        finally:
            if outer is not None:
                outer.restore()

    def _check_parameters(self) -> None:
        program = self.program
        for slots, bound in zip(program.slots, self.bound, strict=True):
            for now, alias in zip(slots.in_place(), bound, strict=True):
                if now is not None and alias is not None and now.device != alias.device:
                    raise ExecutionError(
                        f"parameter {program.parameter_name(now)!r} was on {alias.device} in the "
                        f"forward pass and is on {now.device} now; move the model before the "
                        "forward pass"
                    )
        versions = zip(self.buffer_versions, self._buffer_versions(), self.unchanged, strict=True)
        for before, after, steady in versions:
            if steady and before != after:
                raise ExecutionError(
                    "a buffer that the forward pass left alone was changed in place before the "
                    "backward, so stages would run again with another; call backward before"
                )
        for parameter, version in self.pinned:
            if parameter._version != version:
                raise ExecutionError(
                    f"parameter {program.parameter_name(parameter)!r} was changed in place "
                    "between forward and backward; call backward before optimizer.step"
                )

    # -- the operations

    def _interpret(self, segment: Segment) -> None:
        program = self.program
        part = slice(segment.start, segment.stop)
        codes, numbers = program.codes[part].tolist(), program.numbers[part].tolist()
        for p, code, i in zip(range(segment.start, segment.stop), codes, numbers, strict=True):
            if code == Code.FORWARD:
                self._forward(p, i)
            elif code == Code.TAPED_FORWARD:
                self._taped_forward(p, i)
            elif code == Code.BACKWARD:
                self._backward(i)
            elif program.kinds[p] == Kind.STATE:
                del self.states[i]
            elif program.kinds[p] == Kind.TAPE:
                del self.tapes[i]

    def _input(self, p: int, i: int) -> _State:
        """The input of stage i, with the random state that its run begins with."""
        state = self.states.get(i - 1)
        if state is None:
            kept = self.tapes[i - 1]
            assert kept.output is not None
            state = kept.output
        if state.tensor._version != state.version:
            raise ExecutionError(
                f"the input of stage {self.program.stages[i - 1].name!r} was changed in place "
                "since the stage first ran, by the caller or another stage; change a copy instead"
            )
        if self.program.liveness.frees_input[p]:
            self.tapes[i - 1].output = None
        if self.program.random and self.program.liveness.restores[p]:
            assert state.random is not None
            state.random.restore()
        return state

    def _check_input(self, state: _State, i: int) -> None:
        if state.tensor._version != state.version:
            raise ExecutionError(
                f"stage {self.program.stages[i - 1].name!r} changed its input in place, so it "
                "cannot be run again; use an operation that is not in place, or make the stage one "
                "with the stage before it"
            )

    def _forward(self, p: int, i: int) -> None:
        state = self._input(p, i)
        stage = self.program.stages[i - 1]
        with torch.no_grad():
            # Detached: a stage that turns gradients on by itself returns a graph.
            output = check_output(stage, stage(state.tensor)).detach()
        self._check_input(state, i)
        self.states[i] = _State(output, self._snapshot(self.program.liveness.snapshots[p]))

    def _taped_forward(self, p: int, i: int) -> None:
        state = self._input(p, i)
        stage = self.program.stages[i - 1]
        tape, output = record(stage, state.tensor, needs_gradient=i > self.first_trained)
        self._check_input(state, i)
        key = (stage.key, i > self.first_trained)
        repeated = self.program.repeated.get(key)
        if repeated is None:
            leaves = tape.repeated_leaves()
            repeated = [k for k, alias in enumerate(self.aliases) if id(alias) in leaves]
            self.program.repeated[key] = repeated
        if repeated:
            tape.feed_back([self.aliases[k] for k in repeated])
        kept = None
        if self.program.liveness.keeps_output[p]:
            kept = _State(output, self._snapshot(self.program.liveness.snapshots[p]))
        self.tapes[i] = _Kept(tape, kept)

    def _backward(self, i: int) -> None:
        tape = self.tapes.pop(i).tape
        gradient = self.take_gradient()
        if gradient is not None and gradient.shape != tape.shape:
            raise ExecutionError(
                f"stage {self.program.stages[i - 1].name!r} returned shape "
                f"{tuple(gradient.shape)} when it first ran and {tuple(tape.shape)} when it ran "
                "again; a stage must depend on its input and parameters only"
            )
        self.gradient = tape.backward(gradient)
