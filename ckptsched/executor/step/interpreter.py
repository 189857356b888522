"""Runs the operations of a schedule, and stores the states and tapes of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ...base.errors import ExecutionError
from ...capture.stage_discovery import StageCall
from ...profiler.side_output_search import still, whereabouts
from ...recompute.budget_watch import storage_sizes
from ...recompute.engine import nodes_made
from ...recompute.output_check import SeenOutputs
from ...recompute.side_outputs import Look, SideOutputs, SidePlace, aliases_kept, attributes_kept
from ...recompute.tape import Tape, run_alone, run_stage, run_under, sources_of
from ...schedule.language import Code, Kind
from ...simulator.liveness import Segment
from ...tensors.pytree import State
from ...torch_state.torch_modes import module_tracker_at_work
from ..parameter_usage import Uses
from ..script import between
from .forward_snapshot import ForwardSnapshot
from .fsdp_step import Gathering
from .states import Checkpoint, LiveSets, States
from .tape_uses import TapedRun, TapeUses
from .value_states import Values
from .watch import Watch, watch_of

# Plain numbers: members of an enum are slow to look up, and there is one operation a step or more.
_FORWARD, _TAPED_FORWARD, _BACKWARD, _DROP = map(
    int, (Code.FORWARD, Code.TAPED_FORWARD, Code.BACKWARD, Code.DROP)
)
_STATE, _TAPE = int(Kind.STATE), int(Kind.TAPE)
_NO_LOOK: AbstractContextManager[None] = nullcontext()
NOT_SEEN = (
    "and did not when the model was profiled: its gradient would be wrong, and its graph takes "
    "bytes that are not planned for; profile and plan again with everything in place that takes "
    "such tensors, or let it take them without their graph (tensor.detach())"
)
_FIRST = nullcontext()  # surrounds the first run of a stage
_count = nodes_made or (lambda: 0)


def _is_there(what: Callable[[], object]) -> bool:
    return what() is not None


class _StoredTape:
    """A stored tape."""

    __slots__ = ("first", "tape", "used", "version")

    def __init__(
        self, tape: Tape, first: int, used: tuple[Uses, tuple[int, ...]], version: int
    ) -> None:
        self.tape = tape
        self.first = first  # the first of the stages whose tape it is
        self.used = used  # which aliases the tape uses, and which it was given the sums of
        self.version = version  # of what was known of the stages then


@final
class Interpreter:
    """States and tapes that one call of the model has stored; runs each operation on them."""

    def __init__(self, seen: ForwardSnapshot, gathering: Gathering | None, inputs: State) -> None:
        """Store the input.

        Args:
            seen: What the forward pass has found.
            gathering: Of a model whose blocks are sharded.
            inputs: The input as the caller gave it, taken apart.
        """
        self.prepared, self.seen, self.gathering = seen.prepared, seen, gathering
        self.inputs_wanted = self.prepared.input_carries(inputs)
        wanted = any(self.inputs_wanted) or any(leaf.requires_grad for leaf in seen.given.leaves)
        self.first_trained = 0 if wanted else self.prepared.first_trained
        """The first stage whose output may need a gradient; 0 where an input does."""
        kind = Values if self.prepared.own else LiveSets
        self.states: States = kind(seen, self.inputs_wanted, self.first_trained)
        self.tapes: dict[int, _StoredTape] = {}
        self.sides = SideOutputs()
        self._repeating = False
        self._gradients_on = torch.enable_grad()  # entered every step, and cheaper to keep
        whole = self.prepared.check == "outputs"
        # Kernels of other devices may differ in the last bit from run to run.
        glances = self.prepared.check == "glance" and seen.device.type == "cpu"
        self._uses = TapeUses(seen)
        self._outputs = SeenOutputs(whole=whole) if whole or glances else None
        self.states.begin(inputs)
        self.see_who_watches()

    def see_who_watches(self) -> None:
        """Ask anew who watches the operations; once a forward and a backward, as it takes time."""
        self._watch = watch_of(self.prepared, self.seen.device)

    def clear(self) -> None:
        """Let go of all states, tapes and gradients."""
        self.states.clear()
        self.tapes.clear()
        for alias in self.seen.aliases:
            alias.grad = None

    def _name(self, i: int) -> str:
        return self.prepared.stages[i - 1].name

    # -- the operations

    def run(self, segment: Segment, *, again: bool = False) -> None:
        """Run the operations of a segment, a stretch at a time.

        Args:
            segment: The operations.
            again: Whether stages run again that the schedule has not run before.
        """
        self._repeating = again
        stretches = between(self.prepared.script.stretches, segment.start, segment.stop)
        stretch = self._stretch if self._watch is None else partial(self._watched, self._watch)
        with torch.no_grad():
            if self.gathering is None:
                for p, end in stretches:
                    stretch(p, end)
                return
            with self.gathering.one_at_a_time() as place:
                for p, end in stretches:
                    for start, stop, block in self.gathering.by_block(p, end):
                        if block is not None:
                            place.to(block)
                        stretch(start, stop)

    def _watched(self, watch: Watch, p: int, end: int) -> None:
        """A stretch one operation at a time, but for backwards that share a tape."""
        codes, numbers = self.prepared.script.codes.data, self.prepared.script.numbers.data
        while p < end:
            stop = p + 1
            if codes[p] == _BACKWARD:
                stop += numbers[p] - self.tapes[numbers[p]].first
            with watch(p, stop):
                self._stretch(p, stop)
            p = stop

    def _stretch(self, p: int, end: int) -> None:
        codes, numbers = self.prepared.script.codes.data, self.prepared.script.numbers.data
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
        codes, numbers = self.prepared.script.codes.data, self.prepared.script.numbers.data
        with self._marked(start):
            for p in range(start, stop):
                if codes[p] == _FORWARD:
                    self._forward(p, numbers[p])
                else:
                    self._drop(p, numbers[p])

    def _drop(self, p: int, i: int) -> None:
        kind = self.prepared.script.dropped.data[p]
        if kind == _STATE:
            self.states.drop(i)
        elif kind == _TAPE:
            del self.tapes[i]
            self.states.tape_gone(i)

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
        facts, which = self.prepared.facts, slice(first - 1, last)
        # The gradient of such a leaf stays with the tape, and is let go with it.
        if any(facts.own_leaves[which]) or (self.prepared.own and any(facts.sides[which])):
            return False
        return self.prepared.usage.knows(first, last)

    def _input(self, p: int, i: int) -> Checkpoint:
        """The input of stage i; its random state is put back."""
        return self._unchanged(i, self.states.read(p, i))

    def _unchanged(self, i: int, stored: Checkpoint) -> Checkpoint:
        if stored.state.versions() != stored.versions:
            raise ExecutionError(
                f"the input of stage {self._name(i)!r} was changed in place "
                "since it was made, by the caller or by another stage that holds a view of it; "
                "change a copy instead (x = x + 1, not x += 1)"
            )
        return stored

    def _marked(self, p: int) -> AbstractContextManager[None]:
        """What tells the stages of a stretch whether they run again."""
        # A block's forward runs nothing again, and its backward nothing else.
        again = self._repeating or p > self.prepared.script.segments.turn
        return self.seen.again() if again else _FIRST

    def _forward(self, p: int, i: int) -> None:
        self.seen.check_buffers(i)
        prepared, stored = self.prepared, self._input(p, i)
        stage, extras = self.states.stage(i), self.seen.extras
        how = prepared.facts.alone[i - 1]
        if how or prepared.facts.sides[i - 1]:
            wanted = self.states.wanted(i)
            with self._looking(i) as look:
                output = run_alone(
                    stage, stored.state, wanted=wanted, extras=extras, how=how, look=look
                )
            if look is not None:
                self._take_sides([(i, look)])
        else:
            output = run_stage(stage, stored.state, extras).without_graph()
        self._check_input(stored.state, stored.versions, i)
        self._check_output(i, stored.state, output)
        self.states.keep(p, i, output, taped=False)

    def _taped_forward(self, p: int, i: int) -> None:
        self.seen.check_buffers(i)
        prepared, stored = self.prepared, self._input(p, i)
        stage: StageCall = self.states.stage(i)
        if prepared.script.dropped.data[p]:  # the plan was checked to have no other than lean ones
            stage = stage.lean or stage
        wanted = self.states.wanted(i)
        with self._gradients_on, self._marked(p), self._looking(i) as look:
            boxes, source = sources_of(stored.state, wanted)
            nodes = _count()
            made = run_under(look, stage, source, self.seen.extras)
            nodes = _count() - nodes
        self._check_input(stored.state, stored.versions, i)
        self._check_output(i, source, made)
        tape = Tape(boxes, made.leaves)
        path = nodes, tape.shapes
        if look is not None:
            made, source = made.detached(), stored.state
            tape.sides = self._take_sides([(i, look)])
        # As in `_shares_a_tape`; other inputs are kinds of their own.
        key = prepared.usage.key(i, None if i > 1 and i > self.first_trained else wanted)
        uses = self._uses.of_stage(tape, TapedRun(i, key, path), source, made)
        fed = prepared.usage.fed(uses, i)
        if fed:
            with self._gradients_on:
                tape.feed_back([self.seen.aliases[k] for k in fed])
        self.states.keep(p, i, made, taped=True)
        self._store(i, i, tape, (uses, fed))

    def _taped_together(self, p: int, first: int, last: int) -> None:
        """One tape for several stages."""
        prepared, extras = self.prepared, self.seen.extras
        stored, wanted = self.states.enter(p, first, last)
        self._unchanged(first, stored)
        looks: list[tuple[int, Look]] = []
        # A stage may save what another one leaves: the objects must be the caller's alone.
        sided = any(prepared.facts.sides[first - 1 : last])
        with self._gradients_on, self._marked(p):
            boxes, x = sources_of(stored.state, wanted)
            entered = storage_sizes(x.leaves)
            flow = self.states.flow(first, last, x)
            del stored, x
            marks = [_count()]
            for i in range(first, last + 1):
                self.seen.check_buffers(i)
                x = flow.input(p + i - first, i)
                versions = x.versions()
                if sided:
                    with self._looking(i) as look, aliases_kept(look is None):
                        made = run_under(look, self.states.stage(i), x, extras)
                    if look is not None:
                        looks.append((i, look))
                else:
                    made = run_stage(self.states.stage(i), x, extras)
                self._check_input(x, versions, i)
                self._check_output(i, x, made)
                del x
                flow.take(p + i - first, i, made)
                del made
                marks.append(_count())
            outputs = flow.outputs()
            del flow
        tape = Tape(boxes, outputs)
        path = tuple([mark - marks[0] for mark in marks]), tape.shapes
        uses = self._uses.known(first, last, path)
        if uses is None and not looks:
            uses = self._uses.look_together(tape, first, marks, path, entered, outputs)
        # Side outputs are taken once the outputs have been let go, and a walk must see them: until
        # then the tape may use anything.
        every = tuple(range(len(self.seen.aliases)))
        fed = every if uses is None else prepared.usage.fed(uses, last)
        carriers = [leaf for leaf in outputs if leaf.requires_grad]
        with self._gradients_on:
            tape.feed_back([self.seen.aliases[k] for k in fed], carriers)
        del carriers
        outputs = [leaf.detach() for leaf in outputs]
        if looks:
            tape.sides = self._take_sides(looks)
        if uses is None:
            uses = self._uses.look_together(tape, first, marks, path, entered, outputs)
        self._store(first, last, tape, (uses, fed))

    def _looking(self, i: int) -> AbstractContextManager[Look | None]:
        """What stage i runs under if it has side outputs."""
        if not self.prepared.facts.sides[i - 1]:
            return _NO_LOOK
        return self.sides.looking(i, self.prepared.stages[i - 1].module)

    def _take_sides(self, looks: Sequence[tuple[int, Look]]) -> dict[SidePlace, GradientEdge]:
        """Note what runs have left, their outputs let go."""
        try:
            return self.sides.take(looks)
        except ExecutionError as error:
            names = " or ".join(repr(self._name(i)) for i, _ in looks)
            raise ExecutionError(f"stage {names} {error}") from error

    def _store(self, first: int, last: int, tape: Tape, used: tuple[Uses, tuple[int, ...]]) -> None:
        self.tapes[last] = _StoredTape(tape, first, used, self.prepared.usage.version)

    def _check_input(self, x: State, versions: tuple[int, ...], i: int) -> None:
        if x.versions() != versions:
            raise ExecutionError(
                f"stage {self._name(i)!r} changed its input in place, so it "
                "cannot be run again; use an operation that is not in place, or make the stage one "
                "with the stage before it"
            )

    def _check_output(self, i: int, x: State, output: State) -> None:
        """Refuse an output that is not made up as the profile saw it."""
        carries, leaves = self.states.carries(i), output.leaves
        if len(leaves) != len(carries):
            raise ExecutionError(
                f"stage {self._name(i)!r} returned {len(leaves)} tensors, and "
                f"{len(carries)} when the model was profiled; let it return the same always, or "
                "profile and plan again"
            )
        for leaf, carried in zip(leaves, carries, strict=True):
            if leaf.requires_grad and not carried:
                raise ExecutionError(
                    f"stage {self._name(i)!r} returned a tensor that depends on "
                    "parameters or inputs that are trained, and it did not when the model was "
                    "profiled, so its gradient would be lost; profile and plan again"
                )
        if self._outputs is not None and self.prepared.compared[i - 1]:
            self._outputs.see(i, self._name, x.leaves, leaves)

    def _backwards(self, last: int, first: int) -> None:
        """Backwards of stages that follow each other, by the tapes that there are."""
        i = last
        while i >= first:
            kept = self.tapes.pop(i)
            if kept.version != self.prepared.usage.version:
                self._feed_again(i, kept)
            self.states.tape_gone(i)
            start, tape = kept.first, kept.tape
            gradients = self.states.gradients_of(start, i)
            del kept
            self._check_gradients(i, gradients, tape.shapes)
            if tape.is_used:
                self._refuse_left(start, i)
            further = self.sides.gradients_of(tape.sides)
            lives = tape.watch()
            with self.seen.going_back(start, i), self._attributes_kept(start, i):
                try:
                    sent = tape.backward(gradients, further)
                except RuntimeError as error:  # freed, by who went back from what was left?
                    self._refuse_left(start, i, error)
                    raise
            self.states.send(start, i, sent)
            del tape, further, sent
            held = lives() is not None and not module_tracker_at_work()
            if held and still(partial(_is_there, lives)):
                self._refuse_left(start, i)
            i = start - 1

    def _attributes_kept(self, first: int, last: int) -> AbstractContextManager[None]:
        """Around a backward that may run parts of stages again, as torch's checkpoint does."""
        stages = range(first - 1, last)
        modules = [self.prepared.stages[k].module for k in stages if self.prepared.facts.sides[k]]
        if not modules:
            return nullcontext()
        return attributes_kept(part for module in modules for part in module.modules())

    def _refuse_left(self, first: int, last: int, error: RuntimeError | None = None) -> None:
        """Say that stages have left something; if that explains an error, or always without one."""
        stages = self.prepared.stages[first - 1 : last]
        if error is not None:
            sides = self.prepared.facts.sides[first - 1 : last]
            stages = [s for s, looks in zip(stages, sides, strict=True) if not looks]
        names = " or ".join(dict.fromkeys(repr(stage.name) for stage in stages))
        found = ", ".join(dict.fromkeys(w for s in stages for w in whereabouts(s.module)))
        if error is not None and not found:
            return
        raise ExecutionError(
            f"stage {names} left a tensor with a graph by another way than its output "
            f"({found or 'in a list, a closure or a hook'}), {NOT_SEEN}"
        ) from error

    def _feed_again(self, i: int, kept: _StoredTape) -> None:
        """Let sums come first that stages after a tape turned out to share only since."""
        uses, fed = kept.used
        more = [k for k in self.prepared.usage.fed(uses, i) if k not in fed]
        if more:
            with self._gradients_on:
                kept.tape.feed_more([self.seen.aliases[k] for k in more])

    def _check_gradients(
        self, i: int, gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]
    ) -> None:
        for gradient, shape in zip(gradients, shapes, strict=True):
            if gradient is not None and gradient.shape != shape:
                raise ExecutionError(
                    f"stage {self._name(i)!r} returned shape "
                    f"{tuple(gradient.shape)} when it first ran and {tuple(shape)} when it ran "
                    "again; a stage must depend on its input and parameters only"
                )
