"""One training step: forward, end of the forward pass, and backward, block by block."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import final

import torch
from torch import Tensor

from ...base.errors import BudgetWarning, ExecutionError
from ...profiler.side_output_search import is_in_a_graph, still
from ...recompute.fsdp import fsdp_is_there
from ...recompute.tape import Carries
from ...simulator.liveness import Segment
from ...tensors.pytree import State
from .double_backward import Gradients, differentiable_gradients
from .forward_snapshot import ForwardSnapshot
from .fsdp_step import Gathering
from .interpreter import NOT_SEEN, Interpreter


class _Phase(enum.Enum):
    """How far a step is."""

    FORWARD = enum.auto()
    TURNED = enum.auto()
    GOING_BACK = enum.auto()
    RELEASED = enum.auto()


@final
class TrainingStep:
    """One call of the model: drives the interpreter, and hands gradients to the outer graph."""

    def __init__(self, seen: ForwardSnapshot, inputs: State) -> None:
        """Begin a step.

        Args:
            seen: What the forward pass has found: the model and its plan among it.
            inputs: The input as the caller gave it, taken apart.
        """
        self.prepared, self.seen = seen.prepared, seen
        self.device = inputs.leaves[0].device
        sharding = self.prepared.sharding()
        self.gathering = None if sharding is None else Gathering(sharding, self.seen)
        self.parameters_by_block = self._assign()
        self.interpreter = Interpreter(self.seen, self.gathering, inputs)
        self.sides = self.interpreter.sides
        self.phase = _Phase.FORWARD
        self.output = State(())
        self.input_gradients: tuple[Tensor | None, ...] = ()
        """With respect to the input, once the backward has come to it."""
        self.trees: tuple[State, ...] = ()
        """Of the input and of what every stage is given, without their tensors."""

    def _assign(self) -> list[list[Tensor]]:
        """Give each parameter to the first block that uses it, where its gradient is complete."""
        seen = {id(t) for t in self.seen.given.leaves}  # those belong to the first block
        assigned = []
        for slots in self.prepared.slots:
            mine = []
            for p in slots.in_place():
                if p is not None and id(p) not in seen:
                    seen.add(id(p))
                    mine.append(p)
            assigned.append(mine)
        return assigned

    def let_ask(self, inputs: State) -> None:
        """Set `requires_grad` on the tensors of the input on which the first stage itself would."""
        if Carries.ASKED in self.interpreter.inputs_wanted:
            for leaf, wants in zip(inputs.leaves, self.interpreter.inputs_wanted, strict=True):
                leaf.requires_grad_(leaf.requires_grad or wants == Carries.ASKED)

    # -- the three parts of a step

    def begin(self, block: int) -> None:
        """Take over the parameters of a block that FSDP has just gathered."""
        if self.gathering is not None:
            found = self.gathering.begin(block)
            mine = self.parameters_by_block[block]
            self.parameters_by_block[block] = [found.get(id(p), p) for p in mine]

    def state_before(self, block: int) -> State:
        """The state that a block takes as it begins; the output for the number of blocks."""
        i = self.prepared.chain.blocks[block - 1].last if block else 0
        return self.interpreter.states.peek(i)

    def forward(self, segment: Segment) -> None:
        """Run the operations of one block's forward."""
        with self._guard(), self.seen.entered(), self._swapped(segment):
            self.interpreter.run(segment)
            self._check_places(segment)

    def turn(self) -> tuple[Tensor, ...]:
        """End the forward pass and hand out the tensors of the output; its tree is in `output`."""
        with self._guard():
            self.seen.end_forward()
        self.phase = _Phase.TURNED
        output = self.interpreter.states.take_output().detached()
        self.output = State((), output.tree)
        return output.leaves

    def graft(self, sides: list[Tensor]) -> None:
        """Make the side outputs of stages outputs of the step's own graph.

        Args:
            sides: What `sides.outputs` returned, with the graph; emptied.
        """
        try:
            self.sides.graft(sides)
        except ExecutionError as error:
            self.release()
            raise ExecutionError(f"a stage {error}") from error

    def start_backward(
        self,
        gradients: tuple[Tensor | None, ...],
        inputs: Callable[[], tuple[State, State]],
        further: tuple[Tensor | None, ...] = (),
    ) -> Gradients | None:
        """Take the gradient of the output, and check that the backward can go on.

        Args:
            gradients: With respect to the tensors of the output.
            inputs: Gives the input and what every stage is given, with their graphs, or fails where
                they are gone; asked only where the stored states are not enough.
            further: The gradients of what stages have left besides.

        Returns:
            All gradients, where they are to be differentiated again; else None.
        """
        first, self.phase = self.phase is _Phase.TURNED, _Phase.GOING_BACK
        self.interpreter.see_who_watches()
        with self._guard():
            self.seen.check()
            self.seen.begin_backward()
            if self.gathering is not None:
                self.gathering.check()
            if torch.is_grad_enabled():
                if self.gathering is not None:
                    raise ExecutionError(
                        "a backward with create_graph=True through blocks that fully_shard has "
                        "sharded: FSDP has no gradients that can be differentiated again; shard "
                        "nothing, or use create_graph=False"
                    )
                self.interpreter.clear()
                warnings.warn(
                    "a backward with create_graph=True runs a checkpointed model again as one "
                    "graph: it takes the memory of plain autograd, not that of the plan",
                    BudgetWarning,
                    stacklevel=2,
                )
                self.sides.arrive(further)
                again = self._again(inputs)
                return differentiable_gradients(self.seen, *again, gradients, self.sides)
            if not first:
                self._rewind(self._again(inputs)[0])
        self.interpreter.states.arrive(gradients)
        self.sides.arrive(further)
        return None

    def _again(self, inputs: Callable[[], tuple[State, State]]) -> tuple[State, State]:
        first, given = inputs()
        self.seen.give(given)
        return first, given

    def _rewind(self, inputs: State) -> None:
        """Run the forward pass again, for one more backward."""
        prepared = self.prepared
        self.interpreter.clear()
        whole = Segment(0, 0, prepared.script.segments.turn)
        blocks = range(len(prepared.slots))
        with (
            self.seen.entered(),
            self.seen.modes(blocks),
            self._replaced(blocks),
            self.seen.traceless(blocks),
        ):
            self.seen.begin_again()
            self.interpreter.states.begin(inputs)
            self.interpreter.run(whole, again=True)
        self.interpreter.states.take_output()

    def backward(self, segment: Segment, *, lowest: bool) -> list[Tensor | None]:
        """Run the operations of one block's backward.

        Args:
            segment: The operations.
            lowest: Whether no block before this one needs a backward.

        Returns:
            The gradients of what `tensors_of` names for this block.
        """
        aliases = self._aliases_of(segment.block)
        if fsdp_is_there():
            self.seen.match_gradients(segment.block)
        if self.phase is not _Phase.GOING_BACK:
            raise ExecutionError(
                "this forward pass has been released: its backward was done or failed; run the "
                "model again"
            )
        touched = self.prepared.script.touched[segment]
        again = touched.again if self.gathering is None else ()
        versions = self.seen.versions_in(again)
        with (
            self._guard(),
            self.seen.entered(),
            self.seen.modes(touched.all),
            self._swapped(segment),
            self._replaying(segment),
        ):
            self.interpreter.run(segment)
            self.seen.check_again(again, versions)
            self._check_places(segment)
        gradients = []
        for alias in aliases:
            gradients.append(alias.grad)
            alias.grad = None
        if lowest:
            self.input_gradients = self.interpreter.states.take_gradients()
            self.release()
            self._check_aliases()
        return gradients

    def _check_aliases(self) -> None:
        """Refuse to end a step in which something that a stage has made is still in a graph."""
        for k, alias in enumerate(self.seen.aliases):
            if is_in_a_graph(alias) and still(partial(is_in_a_graph, alias)):
                known = self.seen.parameters[k : k + 1]
                names = [self.prepared.inspection.parameter_name(parameter) for parameter in known]
                what = f"parameter {names[0]!r}" if names else "what every stage is given"
                raise ExecutionError(
                    f"a stage left a tensor that it made from {what} by another way than its "
                    f"output, {NOT_SEEN}"
                )

    def differentiable(self, higher: Gradients, block: int) -> list[Tensor | None]:
        """The same for a backward with `create_graph`, from what `start_backward` returned."""
        return [higher.others[id(alias)] for alias in self._aliases_of(block)]

    def _aliases_of(self, block: int) -> list[Tensor]:
        return [self.seen.alias_of[id(t)] for t in self.tensors_of(block)]

    def tensors_of(self, block: int) -> list[Tensor]:
        """Tensors whose gradients a block returns: its parameters; further inputs at the first."""
        further = self.seen.given.leaves if block == 0 else ()
        return [*further, *self.parameters_by_block[block]]

    def release(self) -> None:
        """Let go of everything that is stored."""
        self.phase = _Phase.RELEASED
        self.interpreter.clear()
        self.sides.let_go()
        self.seen.let_go()

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
        return self._replaced(self.prepared.script.touched[segment].all)

    def _replaced(self, blocks: Sequence[int]) -> AbstractContextManager[None]:
        if self.gathering is not None:  # which does so where stages run
            return nullcontext()
        return self.seen.parameters_replaced(blocks, self.seen.bound)

    def _check_places(self, segment: Segment) -> None:
        if self.gathering is None:
            self.seen.check_places(self.prepared.script.touched[segment].all)

    def _replaying(self, segment: Segment) -> AbstractContextManager[None]:
        """Leave no trace of what the operations run again."""
        again = self.prepared.script.touched[segment].again
        return self.seen.traceless(again) if again else nullcontext()
