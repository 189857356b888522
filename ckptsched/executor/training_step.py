"""One training step: what is stored, and the interpreter of the schedule's operations."""

from __future__ import annotations

import enum
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..base.errors import BudgetWarning, ExecutionError
from ..profiler.side_output_search import is_in_a_graph, still, whereabouts
from ..recompute.engine import nodes_made
from ..recompute.fsdp import fsdp_is_there
from ..recompute.side_outputs import Look, Place, SideOutputs, aliases_kept, attributes_kept
from ..recompute.tape import Carries, Tape, are_leaves, run_alone, run_stage, run_under, sources_of
from ..recompute.tape_contents import Contents
from ..schedule.language import Code, Kind
from ..simulator.liveness import Segment
from ..tensors.pytree import State, storages
from ..torch_state.locks import Stay
from ..torch_state.surroundings import Ambient
from ..torch_state.torch_modes import module_tracker_at_work
from .budget_watch import storage_sizes
from .double_backward import Gradients, differentiable_gradients
from .forward_snapshot import Snapshot, Surroundings
from .fsdp_step import Gathering
from .operation_fusion import between
from .parameter_usage import Path, Uses
from .prepared_plan import FREES_INPUT, KEEPS_OUTPUT, RESTORES, SNAPSHOTS, Program
from .recompute_check import Checksums, Glances

# Plain numbers: members of an enum are slow to look up, and there is one operation a step or more.
_FORWARD, _TAPED_FORWARD, _BACKWARD, _DROP = map(
    int, (Code.FORWARD, Code.TAPED_FORWARD, Code.BACKWARD, Code.DROP)
)
_STATE, _TAPE = int(Kind.STATE), int(Kind.TAPE)
_NO_LOOK: AbstractContextManager[None] = nullcontext()
_NOT_SEEN = (
    "and did not when the model was profiled: its gradient would be wrong, and its graph takes "
    "bytes that are not planned for; profile and plan again with everything in place that takes "
    "such tensors, or let it take them without their graph (tensor.detach())"
)
_FIRST = nullcontext()  # surrounds the first run of a stage
_count = nodes_made or (lambda: 0)
_UNUSED = None, 0


def _is_there(what: Callable[[], object]) -> bool:
    return what() is not None


class _Phase(enum.Enum):
    """How far a run is."""

    FORWARD = enum.auto()
    TURNED = enum.auto()
    GOING_BACK = enum.auto()
    RELEASED = enum.auto()


class _Stored:
    """A stored state, and what it takes to run on from it."""

    __slots__ = ("random", "state", "versions")

    def __init__(self, state: State, random: Snapshot | None) -> None:
        self.state = state
        self.versions = state.versions()
        self.random = random


class _Kept:
    """A stored tape, and its output as long as a later run reads it from here."""

    __slots__ = ("first", "output", "tape", "used", "version")

    def __init__(
        self,
        tape: Tape,
        output: _Stored | None,
        first: int,
        used: tuple[Uses, tuple[int, ...]],
        version: int,
    ) -> None:
        self.tape = tape
        self.output = output
        self.first = first  # the first of the stages whose tape it is
        self.used = used  # which aliases the tape uses, and which it was given the sums of
        self.version = version  # of what was known of the stages then


_JointPath: TypeAlias = tuple[tuple[int, ...], tuple[torch.Size, ...]]


class _Run(NamedTuple):
    """A run with tape of one stage."""

    i: int
    key: Hashable
    path: Path


@final
class Run:
    """One call of the model: what is stored, and where in the schedule it stands."""

    def __init__(
        self,
        program: Program,
        inputs: State,
        given: State,
        ambient: Ambient,
        inside: Ambient | None = None,
        within: Sequence[Stay] = (),
    ) -> None:
        """Begin a step.

        Args:
            program: The model and its plan.
            inputs: The input as the caller gave it, taken apart.
            given: What every stage is given besides, taken apart.
            ambient: What the caller has around.
            inside: The same with the context of a first run; None where the user gives none.
            within: The turns during which the step was begun.
        """
        self.program = program
        self.device = inputs.leaves[0].device
        self.seen = Surroundings(program, given, ambient, inside, within)
        sharding = program.sharding()
        self.gathering = None if sharding is None else Gathering(sharding, self.seen)
        self.parameters_by_block = self._assign()
        self.inputs_wanted = program.input_carries(inputs)
        self.first_trained = self._first_trained(given)
        self.states: dict[int, _Stored] = {}
        self.tapes: dict[int, _Kept] = {}
        self.gradients: tuple[Tensor | None, ...] = ()
        self.phase = _Phase.FORWARD
        self._repeating = False
        self._gradients_on = torch.enable_grad()  # entered every step, and cheaper to keep
        self.output = State(())
        self.trees: tuple[State, ...] = ()
        """Of the input and of what every stage is given, without their tensors."""
        self.sides = SideOutputs()
        self.checksums = Checksums() if program.check == "outputs" else None
        # Kernels of other devices may differ in the last bit from run to run.
        glancing = program.check == "glance" and self.device.type == "cpu"
        self.glances = Glances() if glancing else None
        self._start(inputs)

    def _start(self, inputs: State) -> None:
        snapshot = self._snapshot(0, self.program.snapshots_input)
        self.states[0] = _Stored(inputs.detached(), snapshot)

    def _assign(self) -> list[list[Tensor]]:
        """Give each parameter to the first block that uses it, where its gradient is complete."""
        seen = {id(t) for t in self.seen.given.leaves}  # those belong to the first block
        assigned = []
        for slots in self.program.slots:
            mine = []
            for p in slots.in_place():
                if p is not None and id(p) not in seen:
                    seen.add(id(p))
                    mine.append(p)
            assigned.append(mine)
        return assigned

    def let_ask(self, inputs: State) -> None:
        """Let those tensors of the input require a gradient that the first stage would let."""
        if Carries.ASKED in self.inputs_wanted:
            for leaf, wants in zip(inputs.leaves, self.inputs_wanted, strict=True):
                leaf.requires_grad_(leaf.requires_grad or wants == Carries.ASKED)

    def _first_trained(self, given: State) -> int:
        """The first stage whose output may need a gradient; 0 where an input does."""
        if any(self.inputs_wanted) or any(leaf.requires_grad for leaf in given.leaves):
            return 0
        return self.program.first_trained

    def _snapshot(self, i: int, wanted: bool | int) -> Snapshot | None:
        return self.seen.snapshot(i) if wanted and self.program.replays else None

    # -- the three parts of a step

    def begin(self, block: int) -> None:
        """Take a block's parameters as FSDP has gathered them; it does so when the block begins."""
        if self.gathering is not None:
            found = self.gathering.begin(block)
            mine = self.parameters_by_block[block]
            self.parameters_by_block[block] = [found.get(id(p), p) for p in mine]

    def state_before(self, block: int) -> State:
        """The state that a block takes as it begins; the output for the number of blocks."""
        i = self.program.chain.blocks[block - 1].last if block else 0
        stored = self.states.get(i) or self.tapes[i].output
        assert stored is not None
        return stored.state

    def forward(self, segment: Segment) -> None:
        """Run the operations of one block's forward."""
        with self._guard(), self.seen.entered(), self._swapped(segment):
            self._interpret(segment)
            self._check_places(segment)

    def turn(self) -> tuple[Tensor, ...]:
        """End the forward pass and hand out the tensors of the output; its tree is in `output`."""
        with self._guard():
            self.seen.end_forward()
        self.phase = _Phase.TURNED
        output = self._take_output().detached()
        self.output = State((), output.tree)
        return output.leaves

    def graft(self, sides: list[Tensor]) -> None:
        """Let what stages have left besides their outputs be outputs of the step's own graph.

        Args:
            sides: What `sides.outputs` returned, with the graph; emptied.
        """
        try:
            self.sides.graft(sides)
        except ExecutionError as error:
            self.release()
            raise ExecutionError(f"a stage {error}") from error

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
                self._clear()
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
        self.gradients = gradients
        self.sides.arrive(further)
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
            self.seen.modes(blocks),
            self._replaced(blocks),
            self.seen.traceless(blocks),
        ):
            self.seen.begin_again()
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
        if fsdp_is_there():
            self.seen.match_gradients(segment.block)
        if self.phase is not _Phase.GOING_BACK:
            raise ExecutionError(
                "this forward pass has been released: its backward was done or failed; run the "
                "model again"
            )
        touched = self.program.touched[segment]
        again = touched.again if self.gathering is None else ()
        versions = self.seen.versions_in(again)
        with (
            self._guard(),
            self.seen.entered(),
            self.seen.modes(touched.all),
            self._swapped(segment),
            self._replaying(segment),
        ):
            self._interpret(segment)
            self.seen.check_again(again, versions)
            self._check_places(segment)
        gradients = []
        for alias in aliases:
            gradients.append(alias.grad)
            alias.grad = None
        if lowest:
            found = self.gradients
            self.release()
            self._check_aliases()
            self.gradients = found
        return gradients

    def _check_aliases(self) -> None:
        """Refuse to end a step in which something that a stage has made is still in a graph."""
        for k, alias in enumerate(self.seen.aliases):
            if is_in_a_graph(alias) and still(partial(is_in_a_graph, alias)):
                known = self.seen.parameters[k : k + 1]
                names = [repr(self.program.parameter_name(parameter)) for parameter in known]
                what = f"parameter {names[0]}" if names else "what every stage is given"
                raise ExecutionError(
                    f"a stage left a tensor that it made from {what} by another way than its "
                    f"output, {_NOT_SEEN}"
                )

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
        self.sides.let_go()
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
        return self._replaced(self.program.touched[segment].all)

    def _replaced(self, blocks: Sequence[int]) -> AbstractContextManager[None]:
        if self.gathering is not None:  # which does so where stages run
            return nullcontext()
        return self.seen.parameters_replaced(blocks, self.seen.bound)

    def _check_places(self, segment: Segment) -> None:
        if self.gathering is None:
            self.seen.check_places(self.program.touched[segment].all)

    def _replaying(self, segment: Segment) -> AbstractContextManager[None]:
        """Leave no trace of what the operations run again."""
        again = self.program.touched[segment].again
        return self.seen.traceless(again) if again else nullcontext()

    # -- the operations

    def _interpret(self, segment: Segment, *, again: bool = False) -> None:
        """Run some operations, a stretch at a time.

        Args:
            segment: The operations.
            again: Whether stages run again that the schedule has not run before.
        """
        self._repeating = again
        stretches = between(self.program.stretches, segment.start, segment.stop)
        with torch.no_grad():
            if self.gathering is None:
                for p, end in stretches:
                    self._stretch(p, end)
                return
            with self.gathering.one_at_a_time() as place:
                for p, end in stretches:
                    for start, stop, block in self.gathering.by_block(p, end):
                        if block is not None:
                            place.to(block)
                        self._stretch(start, stop)

    def _stretch(self, p: int, end: int) -> None:
        codes, numbers = self.program.codes.data, self.program.numbers.data
        code = codes[p]
        if code == _TAPED_FORWARD:
            self._taped_forwards(p, numbers[p], numbers[end - 1])
        elif code == _BACKWARD:
            self._backwards(numbers[p], numbers[end - 1])
        elif end - p == 1 and code == _DROP:
            self._drop(p, numbers[p])
        else:
            self._without_tapes(p, end)

    def _without_tapes(self, start: int, stop: int) -> None:
        """Runs without tape, and drops between them."""
        codes, numbers = self.program.codes.data, self.program.numbers.data
        with self._marked(start):
            for p in range(start, stop):
                if codes[p] == _FORWARD:
                    self._forward(p, numbers[p])
                else:
                    self._drop(p, numbers[p])

    def _drop(self, p: int, i: int) -> None:
        kind = self.program.kinds.data[p]
        if kind == _STATE:
            del self.states[i]
        elif kind == _TAPE:
            del self.tapes[i]

    def _taped_forwards(self, p: int, first: int, last: int) -> None:
        """Runs with tape of stages that follow each other, from a position on."""
        while first < last and not self._shares_a_tape(first, last):
            self._taped_forward(p, first)
            p, first = p + 1, first + 1
        if first < last:
            self._taped_together(p, first, last)
        else:
            self._taped_forward(p, first)

    def _shares_a_tape(self, first: int, last: int) -> bool:
        """Whether the stages have been seen, one by one, and depend on something trained."""
        if first == 1 or first - 1 < self.first_trained or nodes_made is None:
            return False
        # The gradient of such a leaf stays with the tape, and is let go with it.
        if self.program.own_leaves.find(1, first - 1, last) >= 0:
            return False
        return self.program.usage.knows(first, last)

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
        facts = self.program.facts[p]
        if facts & FREES_INPUT:
            self.tapes[i - 1].output = None
        if facts & RESTORES and self.program.replays:
            assert stored.random is not None
            stored.random.restore()
        return stored

    def _marked(self, p: int) -> AbstractContextManager[None]:
        """What tells the stages of a stretch whether they run again."""
        # A block's forward runs nothing again, and its backward nothing else.
        again = self._repeating or p > self.program.segments.turn
        return self.seen.again() if again else _FIRST

    def _wanted(self, i: int) -> tuple[int, ...]:
        """For each tensor of state i what the stage after it finds, one of `Carries`."""
        if i == 0:
            return self.inputs_wanted
        carries = self.program.carries[i]
        return carries if i >= self.first_trained else (0,) * len(carries)

    def _forward(self, p: int, i: int) -> None:
        program, stored = self.program, self._input(p, i)
        stage, extras = program.stages[i - 1], self.seen.extras
        how = program.run_alone[i - 1]
        if how or program.sides[i - 1]:
            wanted = self._wanted(i - 1)
            with self._looking(i) as look:
                output = run_alone(
                    stage, stored.state, wanted=wanted, extras=extras, how=how, look=look
                )
            if look is not None:
                self._take_sides([(i, look)])
        else:
            output = run_stage(stage, stored.state, extras).without_graph()
        self._check_input(stored.state, stored.versions, i)
        self._check_output(i, output)
        snapshot = self._snapshot(i, program.facts[p] & SNAPSHOTS)
        self.states[i] = _Stored(output, snapshot)

    def _taped_forward(self, p: int, i: int) -> None:
        program, stored = self.program, self._input(p, i)
        stage = program.stages[i - 1]
        wanted = self._wanted(i - 1)
        with self._gradients_on, self._marked(p), self._looking(i) as look:
            boxes, source = sources_of(stored.state, wanted)
            nodes = _count()
            made = run_under(look, stage, source, self.seen.extras)
            nodes = _count() - nodes
        self._check_input(stored.state, stored.versions, i)
        self._check_output(i, made)
        tape = Tape(boxes, made.leaves)
        path = nodes, tape.shapes
        if look is not None:
            made, source = made.detached(), stored.state
            tape.sides = self._take_sides([(i, look)])
        # As in `_shares_a_tape`; other inputs are kinds of their own.
        key = program.usage.key(i, None if i > 1 and i > self.first_trained else wanted)
        uses = None if program.varies[i - 1] else program.usage.get(key, path)
        if uses is None:
            (uses,) = self._look(
                tape, [_Run(i, key, path)], (0,), storage_sizes(source.leaves), made.leaves
            )
        fed = program.usage.fed(uses, i)
        if fed:
            with self._gradients_on:
                tape.feed_back([self.seen.aliases[k] for k in fed])
        self._keep(p, i, i, tape, made, (uses, fed))

    def _taped_together(self, p: int, first: int, last: int) -> None:
        """One tape for several stages."""
        program, stored = self.program, self._input(p, first)
        extras, stages = self.seen.extras, program.stages
        looks: list[tuple[int, Look]] = []
        # A stage may save what another one leaves: the objects must be the caller's alone.
        sided = any(program.sides[first - 1 : last])
        with self._gradients_on, self._marked(p):
            boxes, state = sources_of(stored.state, self._wanted(first - 1))
            versions = state.versions()
            entered = storage_sizes(state.leaves)
            del stored
            marks = [_count()]
            for i in range(first, last + 1):
                with self._looking(i) as look, aliases_kept(look is None and sided):
                    made = run_under(look, stages[i - 1], state, extras)
                if look is not None:
                    looks.append((i, look))
                self._check_input(state, versions, i)
                self._check_output(i, made)
                state, versions = made, made.versions()
                marks.append(_count())
            del made
        tape = Tape(boxes, state.leaves)
        path = tuple([mark - marks[0] for mark in marks]), tape.shapes
        uses = self._known(first, last, path)
        if uses is None and not looks:
            uses = self._look_together(tape, first, marks, path, entered, state)
        # Side outputs are taken once the outputs have been let go, and a walk must see them: until
        # then the tape may use anything.
        every = tuple(range(len(self.seen.aliases)))
        fed = every if uses is None else program.usage.fed(uses, last)
        carriers = [leaf for leaf in state.leaves if leaf.requires_grad]
        with self._gradients_on:
            tape.feed_back([self.seen.aliases[k] for k in fed], carriers)
        state = state.detached()
        del carriers
        if looks:
            tape.sides = self._take_sides(looks)
        if uses is None:
            uses = self._look_together(tape, first, marks, path, entered, state)
        self._keep(p + last - first, first, last, tape, state, (uses, fed))

    def _known(self, first: int, last: int, path: _JointPath) -> Uses | None:
        """What stages use that have one tape together; None where it is to be looked at."""
        usage = self.program.usage
        if any(self.program.varies[first - 1 : last]):
            return None
        uses = usage.of_tape(first, last, path)
        if uses is not None:
            return uses
        found = []
        for i, (before, after) in enumerate(itertools.pairwise(path[0]), first):
            uses = usage.get(usage.key(i), (after - before, ()))
            if uses is None:
                return None
            found.append(uses)
        return usage.join(first, last, path, found)

    def _look_together(
        self,
        tape: Tape,
        first: int,
        marks: Sequence[int],
        path: _JointPath,
        inputs: Mapping[int, int],
        output: State,
    ) -> Uses:
        """Look at a tape of several stages.

        Args:
            tape: The tape.
            first: The first of the stages.
            marks: How many nodes there were before each of them, and at the end.
            path: The same from 0 on, and the shapes of the output.
            inputs: The storages of the first one's input.
            output: Of the last of them.
        """
        usage = self.program.usage
        counts = enumerate(itertools.pairwise(marks), first)
        runs = [_Run(i, usage.key(i), (after - before, ())) for i, (before, after) in counts]
        found = self._look(tape, runs, marks[:-1], inputs, output.leaves)
        return usage.join(first, runs[-1].i, path, found)

    def _looking(self, i: int) -> AbstractContextManager[Look | None]:
        """What stage i runs under if it has side outputs."""
        if not self.program.sides[i - 1]:
            return _NO_LOOK
        return self.sides.looking(i, self.program.stages[i - 1].module)

    def _take_sides(self, looks: Sequence[tuple[int, Look]]) -> dict[Place, GradientEdge]:
        """Note what runs have left, their outputs let go."""
        try:
            return self.sides.take(looks)
        except ExecutionError as error:
            names = " or ".join(repr(self.program.stages[i - 1].name) for i, _ in looks)
            raise ExecutionError(f"stage {names} {error}") from error

    def _keep(
        self,
        p: int,
        first: int,
        last: int,
        tape: Tape,
        made: State,
        used: tuple[Uses, tuple[int, ...]],
    ) -> None:
        """Store a tape, made by an operation that ran last, and its output where that is read."""
        kept = None
        if self.program.facts[p] & KEEPS_OUTPUT:
            snapshot = self._snapshot(last, self.program.facts[p] & SNAPSHOTS)
            kept = _Stored(made.detached(), snapshot)
        self.tapes[last] = _Kept(tape, kept, first, used, self.program.usage.version)

    def _look(
        self,
        tape: Tape,
        runs: Sequence[_Run],
        marks: Sequence[int],
        inputs: Mapping[int, int],
        output: Sequence[Tensor],
    ) -> list[Uses]:
        """What each stage of a tape uses, and whether the tape takes more than was projected.

        Args:
            tape: The tape.
            runs: The runs that have made it.
            marks: How many nodes there were before each.
            inputs: The storages of the first one's input.
            output: The tensors of the last one's output.
        """
        program, aliases = self.program, self.seen.aliases
        found = tape.contents(marks)
        theirs = set(storages(self.seen.given.leaves))
        for block in {int(program.owner[run.i]) for run in runs}:
            slots = program.slots[block]
            theirs |= storages([*slots.parameters(), *slots.buffers()]).keys()
        for run, contents in zip(runs, found, strict=True):
            self._check_leaves(run.i, contents)
        program.overruns.look([run.i for run in runs], found, inputs, output, theirs, aliases)
        return [
            program.usage.learn(
                run.key, run.path, [c.leaves.get(id(a), _UNUSED)[1] for a in aliases]
            )
            for run, c in zip(runs, found, strict=True)
        ]

    def _check_leaves(self, i: int, contents: Contents) -> None:
        """Refuse a stage whose tape would lose a gradient."""
        leaves = contents.leaves
        known = {id(alias) for alias in self.seen.aliases}
        unknown = [leaves[key][0] for key in leaves.keys() - known]
        # Those that a stage makes itself come with each run; nothing is known of their ids.
        if unknown and not (self.program.own_leaves[i - 1] and are_leaves(unknown)):
            raise ExecutionError(
                f"stage {self.program.stages[i - 1].name!r} uses a tensor that requires a gradient "
                "and is neither a parameter of the model nor an argument of the call that "
                "ckptsched sees, so its gradient would be lost; register it, or give it to the "
                "model as an argument by itself; if the stage makes it anew in every run, profile "
                "and plan again"
            )

    def _check_input(self, x: State, versions: tuple[int, ...], i: int) -> None:
        if x.versions() != versions:
            raise ExecutionError(
                f"stage {self.program.stages[i - 1].name!r} changed its input in place, so it "
                "cannot be run again; use an operation that is not in place, or make the stage one "
                "with the stage before it"
            )

    def _check_output(self, i: int, output: State) -> None:
        """Refuse an output that is not made up as the profile saw it."""
        carries, leaves = self.program.carries[i], output.leaves
        if len(leaves) != len(carries):
            raise ExecutionError(
                f"stage {self.program.stages[i - 1].name!r} returned {len(leaves)} tensors, and "
                f"{len(carries)} when the model was profiled; let it return the same always, or "
                "profile and plan again"
            )
        for leaf, carried in zip(leaves, carries, strict=True):
            if leaf.requires_grad and not carried:
                raise ExecutionError(
                    f"stage {self.program.stages[i - 1].name!r} returned a tensor that depends on "
                    "parameters or inputs that are trained, and it did not when the model was "
                    "profiled, so its gradient would be lost; profile and plan again"
                )
        if self.checksums is not None:
            self.checksums.see(i, self.program.stages[i - 1].name, leaves)
        elif self.glances is not None and self.program.glanced[i - 1]:
            self.glances.see(i, self.program.stages[i - 1].name, leaves)

    def _backwards(self, last: int, first: int) -> None:
        """Backwards of stages that follow each other, by the tapes that there are."""
        i = last
        while i >= first:
            kept = self.tapes.pop(i)
            if kept.version != self.program.usage.version:
                self._feed_again(i, kept)
            gradients = list(self.take_gradients())
            start, tape = kept.first, kept.tape
            del kept
            self._check_gradients(i, gradients, tape.shapes)
            if tape.is_used:
                self._refuse_left(start, i)
            further = self.sides.gradients_of(tape.sides)
            lives = tape.watch()
            with self.seen.going_back(), self._attributes_kept(start, i):
                try:
                    self.gradients = tape.backward(gradients, further)
                except RuntimeError as error:  # freed, by who went back from what was left?
                    self._refuse_left(start, i, error)
                    raise
            del tape, further
            held = lives() is not None and not module_tracker_at_work()
            if held and still(partial(_is_there, lives)):
                self._refuse_left(start, i)
            i = start - 1

    def _attributes_kept(self, first: int, last: int) -> AbstractContextManager[None]:
        """Around a backward that may run parts of stages again, as torch's checkpoint does."""
        stages = range(first - 1, last)
        modules = [self.program.stages[k].module for k in stages if self.program.sides[k]]
        if not modules:
            return nullcontext()
        return attributes_kept(part for module in modules for part in module.modules())

    def _refuse_left(self, first: int, last: int, error: RuntimeError | None = None) -> None:
        """Say that stages have left something; if that explains an error, or always without one."""
        stages = self.program.stages[first - 1 : last]
        if error is not None:
            sides = self.program.sides[first - 1 : last]
            stages = [s for s, looks in zip(stages, sides, strict=True) if not looks]
        names = " or ".join(dict.fromkeys(repr(stage.name) for stage in stages))
        found = ", ".join(dict.fromkeys(w for s in stages for w in whereabouts(s.module)))
        if error is not None and not found:
            return
        raise ExecutionError(
            f"stage {names} left a tensor with a graph by another way than its output "
            f"({found or 'in a list, a closure or a hook'}), {_NOT_SEEN}"
        ) from error

    def _feed_again(self, i: int, kept: _Kept) -> None:
        """Let sums come first that stages after a tape turned out to share only since."""
        uses, fed = kept.used
        more = [k for k in self.program.usage.fed(uses, i) if k not in fed]
        if more:
            with self._gradients_on:
                kept.tape.feed_more([self.seen.aliases[k] for k in more])

    def _check_gradients(
        self, i: int, gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]
    ) -> None:
        for gradient, shape in zip(gradients, shapes, strict=True):
            if gradient is not None and gradient.shape != shape:
                raise ExecutionError(
                    f"stage {self.program.stages[i - 1].name!r} returned shape "
                    f"{tuple(gradient.shape)} when it first ran and {tuple(shape)} when it ran "
                    "again; a stage must depend on its input and parameters only"
                )
