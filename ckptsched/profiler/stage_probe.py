"""Finds the distinct stages of a model, and checks that each can be run again.

A stage is known by what it computes (`StageCall.key`) and by the layout of its input and of
the gradient that comes back to it, since these decide what PyTorch allocates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from ..base.errors import CkptschedError, ProfileError
from ..capture.model_state import ModelState
from ..capture.signature import stage_label
from ..capture.stage_discovery import Block, StageCall, count_frozen, trace
from ..memory.meters import storage_bytes
from ..recompute.parameter_swap import Place, Slots
from ..recompute.side_outputs import Look, cut_all, edges_of
from ..recompute.stateful_buffers import Watch, is_write_only, own_generators
from ..recompute.tape import Alone, Carries, Tape, record, run_alone, run_under, sources_of
from ..tensors.devices import drawn_elsewhere, matters
from ..tensors.pytree import Extras, State, storages
from ..tensors.wrapper_tensors import all_parts, cannot_be_followed, dense_parts, type_name
from ..torch_state.foreign_generators import ForeignGenerators
from ..torch_state.replay_context import Autocast, RandomState
from ..workload.stage import StageLedger
from .advice import about_state
from .side_output_search import Found, find_side_outputs, rewritten_weights

Loss: TypeAlias = Callable[[Any], Tensor]
Gradients: TypeAlias = tuple[Tensor | None, ...]
"""With respect to the tensors of a state; None where none comes."""

_MOST_GRADIENTS = 4  # layouts of a state's gradient that are weighed

WITHOUT_DATA = (
    "with fake=True tensors hold no data, and not every operation can do without: "
    "profile without fake"
)


@final
@dataclass(frozen=True, slots=True)
class LossWeight:
    """What a loss takes, and what it sends back."""

    gradients: tuple[Tensor | None, ...]
    """With respect to the tensors of the output."""
    overhead_bytes: int
    """Peak beyond the gradient."""
    rest_bytes: int
    """What is left of it while the backward goes on: its value and the gradient of that."""
    seconds: float = 0.0
    """Of its forward and backward, once timed."""


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """Storages that a step finds and leaves, by identity; stages may hand them on."""

    fixed: frozenset[int]
    """Of parameters and of what every stage is given: no step pays for them."""
    buffers: frozenset[int]
    """Of buffers: a stage that runs again has clones instead."""

    @classmethod
    def of(cls, blocks: Iterable[Block], extras: Extras) -> Standing:
        """Those of a model and one call."""
        slots = Slots(block.module for block in blocks)
        fixed = storages([*slots.parameters(), *extras.apart().leaves])
        return cls(frozenset(fixed), frozenset(storages(slots.buffers())) - fixed.keys())

    def bytes_of(self, leaves: Iterable[Tensor]) -> int:
        """Bytes of the storages of some tensors, without those that no step pays for."""
        return storage_bytes(
            leaf for leaf in all_parts(leaves) if leaf.untyped_storage()._cdata not in self.fixed
        )


@dataclass(eq=False)
class Kind:
    """A distinct stage: equal computation on an equal layout, forward and backward."""

    name: str
    """Name within its block, equal for all steps of an ODE."""
    call: StageCall
    x: State
    """An input that it has seen, without a graph."""
    extras: Extras
    """What every stage is given besides."""
    output: State
    """What it made of them."""
    wanted: tuple[Carries, ...]
    """For each tensor of its input whether the gradient is wanted."""
    carries: tuple[Carries, ...]
    """For each tensor of its output whether it carries a gradient."""
    aliases: list[Tensor]
    """The aliases of its trained parameters, and of what else collects gradients."""
    repeated: list[Tensor]
    """Those that one run uses more than once."""
    draws: bool
    """Whether it draws random numbers."""
    standing: Standing
    """Storages that are there before it runs and after."""
    alone: Alone = Alone.PLAIN
    """How it runs where no tape is kept."""
    own_leaves: bool = False
    """Whether it makes leaves that require gradients, which nobody else is to see."""
    hidden: tuple[Place, ...] = ()
    """Buffers that hold what it, or another stage, reads and changes."""
    sides: tuple[Tensor, ...] = ()
    """Gradients of its side outputs, made up: what it leaves by another way than its output."""
    looks: bool = False
    """Whether it has side outputs, on this path or on another one."""
    left: list[Tensor] = field(default_factory=list)
    """Its side outputs, while the loss is weighed: leaves that want gradients."""
    piles_up: bool = False
    """Whether the side outputs of one run are still there after the next."""
    count: int = 0
    """How many stages of the chain run this computation."""
    is_last: bool = False
    """Whether the caller holds its output."""
    gradients: tuple[Tensor | None, ...] = ()
    """What comes back to it, by tensor of its output."""
    input_gradients: tuple[Tensor | None, ...] = ()
    """What it sends back, by tensor of its input."""
    gradient_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes of the gradient of each alias that gets one, by the alias's id."""
    ledger: StageLedger | None = None
    """Its exact bytes, once weighed."""
    left_bytes: int = 0
    """What a run leaves in its modules, as attributes that each run replaces; a replaced buffer
    counts twice, since the clone that it replaces in a repeated run stays for a while."""
    forward_seconds: float = 0.0
    """Of a run without tape, once timed."""
    backward_seconds: float = 0.0
    """Of a backward, and what the run with tape takes longer than the one without."""
    varies: bool = False
    """Whether it reads data or draws to decide what it computes."""
    begins_with: RandomState | None = None
    """The random state with which its runs begin; None: as they find it."""
    others: list[Kind] = field(default_factory=list)
    """The same stage on other paths, or with a gradient of another layout: the ledger bounds all.
    This one takes the most of them, and its seconds are the stage's."""
    hands_on: State | None = None
    """What the next stage is given, where that is not the output."""
    sends_back: list[Gradients] = field(default_factory=list)
    """What may come back to the stage before, one a layout."""
    saved_bytes: int = 0
    """Storages that a walk of its tape finds besides input, output, parameters and buffers."""
    largest_bytes: int = 0
    """The largest of these."""
    used_bytes: int = 0
    """Bytes of the parameters that its tape uses."""

    def begin(self) -> None:
        """Let the next run take this path."""
        if self.begins_with is not None:
            self.begins_with.restore()

    def run(self) -> State:
        """Run the stage and keep no tape, as the executor does."""
        look = Look() if self.looks else None
        output = run_alone(
            self.call,
            self.x,
            wanted=self.wanted,
            extras=self.extras,
            how=self.alone,
            look=look,
        )
        if look is not None:
            cut_all(look.take())
        return output

    def record(self, x: State) -> tuple[Tape, State]:
        """Run the stage with its tape, as the executor does."""
        tape, output, _ = self.recorded(x)
        if self.repeated:
            with torch.enable_grad():
                tape.feed_back(self.repeated)
        return tape, output

    def recorded(self, x: State) -> tuple[Tape, State, list[Tensor]]:
        """The same without what going back takes, and its side outputs without their graphs."""
        look = Look() if self.looks else None
        tape, output = record(self.call, x, wanted=self.wanted, extras=self.extras, look=look)
        return tape, output, take_sides(tape, look)

    def go_back(self, tape: Tape) -> tuple[Tensor | None, ...]:
        """Go back once, as the executor does: outside of autocast, as torch asks for.

        Raises:
            ProfileError: The run had other side outputs than those before.
        """
        if len(tape.sides) != len(self.sides):
            name = self.call.name or type(self.call.module).__name__
            raise ProfileError(
                f"stage {name!r} left {len(self.sides)} tensors with a graph by another way than "
                f"its output, and {len(tape.sides)} in another run; let it leave the same from run "
                "to run, zeros where there is nothing to say, or return them"
            )
        with Autocast.off(self.x.leaves[0].device).again():
            return tape.backward(
                list(self.gradients), dict(zip(tape.sides, self.sides, strict=True))
            )

    def note_contents(self, tape: Tape, output: State) -> None:
        """Note what a walk of a tape finds."""
        (contents,) = tape.contents()
        theirs = set(storages((*self.x.leaves, *output.leaves)))
        theirs |= self.standing.fixed | self.standing.buffers
        saved = [size for home, size in contents.saved.items() if home not in theirs]
        self.saved_bytes, self.largest_bytes = sum(saved), max(saved, default=0)
        self.used_bytes = sum(a.nbytes for a in self.aliases if id(a) in contents.leaves)

    def set_gradients(self, *, first: bool) -> None:
        """Let the parameters have no gradients yet, or let them all have some already."""
        for alias in self.aliases:
            given = not first and id(alias) in self.gradient_bytes
            alias.grad = torch.zeros_like(alias) if given else None


def leave_sides(kind: Kind) -> None:
    """Run a stage that has side outputs as `_examine` did: for a loss to find those of this run.

    It takes the path on which it leaves most.
    """
    for tensor in kind.left:
        tensor.requires_grad_(False)
    most = max((kind, *kind.others), key=lambda path: storage_bytes(path.sides))
    most.begin()
    *_, left = most.recorded(most.x)
    kept = rewritten_weights(kind.call.module)
    kind.left = [tensor.requires_grad_() for tensor in left if id(tensor) not in kept]


def take_sides(tape: Tape, look: Look | None) -> list[Tensor]:
    """Let a tape know where its side outputs are in it, and return them without their graphs."""
    if look is None:
        return []
    found = look.take()
    tape.sides = edges_of(0, found)
    return cut_all(found)


def layout(leaves: Iterable[Tensor]) -> tuple[Any, ...]:
    """What of tensors decides the bytes that operations on them take."""
    homes: dict[int, int] = {}
    found: list[Any] = []
    for leaf in leaves:
        found.append((type_name(leaf), tuple(leaf.shape)))
        for tensor in dense_parts(leaf):
            storage = tensor.untyped_storage()
            home = homes.setdefault(storage._cdata, len(homes))
            place = tensor.stride(), tensor.storage_offset(), storage.nbytes(), home
            lazy = tensor.is_conj(), tensor.is_neg()
            found.append((tuple(tensor.shape), tensor.dtype, *place, *lazy))
    return tuple(found)


def _layout_of_gradients(gradients: Gradients) -> tuple[Any, ...]:
    flags = tuple(gradient is not None for gradient in gradients)
    return flags, layout(gradient for gradient in gradients if gradient is not None)


def survey_model(
    model: nn.Module,
    x: State,
    extras: Extras,
    whole: ModelState,
    vary: Callable[[Kind, Sequence[StageCall]], None] | None = None,
) -> tuple[tuple[Block, ...], int, list[Kind]]:
    """Trace a model and run every distinct stage of it forward.

    Args:
        model: The model, its parameters replaced by aliases.
        x: The sample.
        extras: What every stage is given besides, leaves where gradients are wanted.
        whole: What the model was when nothing had run.
        vary: As `survey_forward` has it.

    Returns:
        Its blocks, how many leading stages are run as one as they need no gradient, and the kind
        of each stage.

    Raises:
        ProfileError: A stage fails, or cannot be run again with the same result.
    """
    blocks = trace(model)
    frozen = count_frozen(blocks, [*x.leaves, *extras.apart().leaves])
    if frozen:
        joined = trace(model, frozen=frozen)
        kinds = survey_forward(joined, x, extras, whole, vary)
        if not any(kinds[0].carries):  # as it does where a hook lets an output require a gradient
            return joined, frozen, kinds
    return blocks, 0, survey_forward(blocks, x, extras, whole, vary)


def survey_forward(
    blocks: tuple[Block, ...],
    x: State,
    extras: Extras,
    whole: ModelState,
    vary: Callable[[Kind, Sequence[StageCall]], None] | None = None,
) -> list[Kind]:
    """Run every distinct stage on what the stage before it made.

    Args:
        blocks: The model, its parameters replaced by aliases.
        x: The sample; on the meta device there are no results to compare.
        extras: What every stage is given besides, leaves where gradients are wanted.
        whole: What the model was when nothing had run.
        vary: Looks at a new kind of stage, and the calls that are of this kind, for other paths.

    Returns:
        The kind of each stage, in order; equal stages share one.

    Raises:
        ProfileError: A stage fails, or cannot be run again with the same result.
    """
    known: dict[Hashable, Kind] = {}
    order: list[Kind] = []
    carries = tuple(map(Carries.of, x.leaves))
    state = x.detached()
    standing = Standing.of(blocks, extras)
    watch = Watch(Slots(block.module for block in blocks))
    calls: dict[Hashable, list[StageCall]] = {}
    for block in blocks if vary else ():
        for call in block.stages:
            calls.setdefault(call.key, []).append(call)
    for block in blocks:
        for call in block.stages:
            structure = state.describe(lambda tensor: "tensor")
            fixed = tuple(home in standing.fixed for home in storages(state.leaves))
            key = (call.key, layout(state.leaves), fixed, structure, carries)
            kind = known.get(key)
            if kind is None:
                kind = known[key] = _examine(
                    block, call, state, extras, carries, standing, whole, may_ask=not order
                )
                if vary:
                    vary(kind, calls[call.key])
            kind.count += 1
            order.append(kind)
            _check_device(kind, x.leaves[0].device)
            state, carries = kind.hands_on or kind.output, kind.carries
    order[-1].is_last = True
    _find_readers(known.values(), watch)
    note_unfit(whole, whole, "a stage")
    return order


def note_unfit(whole: ModelState, seen: ModelState, stage: str) -> bool:
    """Note that parameters or plain tensors were written to: such a model follows no plan.

    It is measured to the end, and left as it was.

    Args:
        whole: The state of the model, which keeps the note.
        seen: What has been seen to change since it was taken.
        stage: By whom, in words.
    """
    written = seen.written()
    if written and not whole.unfit:
        whole.unfit = (
            f"{stage} changes {written} in its forward, so it would be changed once more each time "
            "that the stage runs again; keep it in a buffer: register_buffer (or, if a first run "
            "sets it up, run the model once, under torch.no_grad, before it is profiled)"
        )
    return bool(written)


@contextmanager
def sides_held(order: Sequence[Kind]) -> Iterator[list[Tensor]]:
    """The side outputs of all stages, as leaves that want gradients, for a loss to use.

    Those of a stage that runs several times and leaves more each time occur as often.

    Args:
        order: The kind of each stage.
    """
    kinds = {id(kind): kind for kind in order}.values()
    held = [tensor for kind in kinds for tensor in kind.left]
    more = [
        torch.empty_like(tensor).requires_grad_()
        for kind in kinds
        for tensor in kind.left * (kind.count - 1) * kind.piles_up
    ]
    try:
        yield [*held, *more]
    finally:
        for kind in kinds:
            kind.left.clear()
        for tensor in held:
            tensor.requires_grad_(False)


def _check_device(kind: Kind, device: torch.device) -> None:
    """Refuse a stage that hands a state to another device."""
    for leaf in kind.output.leaves:
        if leaf.device != device and matters(leaf):
            name = kind.call.name or type(kind.call.module).__name__
            raise ProfileError(
                f"stage {name!r} returns a tensor on {leaf.device}, and the sample is on "
                f"{device}: bytes are counted and random states kept on one device; leave all of "
                "the model and its states on one"
            )


def survey_backward(order: list[Kind], gradients: Gradients) -> list[Kind]:
    """Send a gradient back through every distinct stage.

    Args:
        order: The kind of each stage; replaced where a gradient of another layout comes back.
        gradients: With respect to the tensors of the model's output.

    Returns:
        The distinct kinds.
    """
    known: dict[Hashable, Kind] = {}
    arriving = [gradients]
    for i in reversed(range(len(order))):
        found = order[i]
        key = (id(found), *map(_layout_of_gradients, arriving))
        kind = known.get(key)
        if kind is None:
            kind = known[key] = _for_gradients(found, arriving, is_last=i == len(order) - 1)
        order[i] = kind
        arriving = kind.sends_back
    return list(known.values())


def _examine(
    block: Block,
    call: StageCall,
    x: State,
    extras: Extras,
    wanted: tuple[Carries, ...],
    standing: Standing,
    whole: ModelState,
    *,
    may_ask: bool,
) -> Kind:
    name = call.name or type(call.module).__name__
    given = [leaf for leaf in extras.apart().leaves if leaf.requires_grad]
    collecting = [*Slots([call.module]).parameters(), *given]
    with _failures_named(f"stage {name!r}", x):
        probe = _Probe(name, call, x, extras, whole, wanted)
        output = probe.run_twice()
        if may_ask:  # the caller sees what becomes of the input
            probe.wanted = wanted = probe.asked()
        found = Found() if x.leaves[0].is_meta else probe.side_outputs(collecting)
        tape, taped, left = probe.record()
        _check_gradients(name, tape, collecting)
        own_leaves = _makes_leaves(probe, tape, collecting, [*found.tensors, *left])
        alone = probe.find_way(output, taped)
        if found.tensors:  # those of the latest run are there
            tape, taped, left = probe.record()
        for tensor in found.tensors:
            tensor.requires_grad_(False)
        probe.look()
    leaves = tape.repeated_leaves()
    aliases = list({id(leaf): leaf for leaf in collecting if leaf.requires_grad}.values())
    return Kind(
        name=stage_label(block, call.name),
        call=call,
        x=x,
        extras=extras,
        output=taped if alone else output,
        wanted=wanted,
        carries=tape.carries,
        aliases=aliases,
        repeated=[alias for alias in aliases if id(alias) in leaves],
        draws=probe.draws,
        standing=standing,
        alone=alone,
        own_leaves=own_leaves,
        hidden=probe.hidden,
        sides=gradients_of_sides(found.tensors),
        looks=bool(found.tensors),
        left=[t.requires_grad_() for t in left if id(t) not in rewritten_weights(call.module)],
        piles_up=found.piles_up,
        left_bytes=(probe.replaced_bytes + probe.cached_bytes + held_of_input(x, found.tensors)),
    )


def _check_gradients(name: str, tape: Tape, collecting: Iterable[Tensor]) -> None:
    """Refuse a stage whose forward went back to what collects gradients."""
    if tape.is_used or any(leaf.grad is not None for leaf in collecting):
        raise ProfileError(
            f"stage {name!r} calls backward() in its forward, which adds to the .grad of "
            "parameters and inputs each time that it runs; use torch.autograd.grad, which does not"
        )


def _makes_leaves(
    probe: _Probe, tape: Tape, collecting: Iterable[Tensor], left: Iterable[Tensor]
) -> bool:
    """Whether a stage uses leaves that it makes itself, anew in every run.

    Args:
        probe: It runs the stage again.
        tape: Of a run.
        collecting: What collects gradients.
        left: What runs so far have left besides their outputs; a later one may read that.

    Raises:
        ProfileError: It uses others, whose gradients would be lost.
    """
    known = {id(leaf) for leaf in collecting}
    unknown = {
        key: leaf for key, (leaf, _) in tape.contents()[0].leaves.items() if key not in known
    }
    if not unknown:
        return False
    again, *_ = probe.record()
    others = {id(tensor): tensor for tensor in left}
    once_more = again.contents()[0].leaves.keys()
    strange = (unknown.keys() & others.keys()) | (once_more & (unknown | others).keys())
    for key in strange:
        leaf = (unknown | others)[key]
        kind = "parameter" if isinstance(leaf, nn.Parameter) else "tensor"
        what = f": {_shape(leaf)}, which requires a gradient" if isinstance(leaf, Tensor) else ""
        raise ProfileError(
            f"stage {probe.name!r} uses a {kind} that its module does not own, or a tensor that "
            f"another stage left in an attribute or a list{what}, so its gradient would be lost; "
            "register the parameter, or the module that owns it, in the stage, or give the tensor "
            "to the model as a further argument that requires a gradient; let a stage return what "
            "a later one needs; and where stages add up their auxiliary losses, let each append "
            "its own to a list, and sum up the list when the model has returned"
        )
    return True


def gradients_of_sides(left: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of side outputs, made up."""
    return tuple([torch.zeros_like(tensor, requires_grad=False) for tensor in left])


def held_of_input(x: State, sides: Iterable[Tensor]) -> int:
    """Bytes of the input that stay after the run as side outputs lie in them."""
    homes = storages(sides).keys()
    mine = storages(x.leaves)
    return storage_bytes(part for home in mine.keys() & homes for part in mine[home])


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}"


@contextmanager
def _failures_named(what: str, x: State) -> Iterator[None]:
    """Turn what a stage raises on this input into an error that names it."""
    try:
        yield
    except ProfileError:
        raise
    except CkptschedError as error:
        raise ProfileError(str(error)) from error
    except Exception as error:
        advice = WITHOUT_DATA if x.leaves[0].is_meta else about_state(x, error)
        raise ProfileError(
            f"{what} failed on an input of {x.describe(_shape)}: "
            f"{type(error).__name__}: {error}{advice and f'; {advice}'}"
        ) from error


class _AsksForGradients(Exception):
    """A stage without gradients let its input require one."""


class _Probe:
    """Runs a stage from where it began, to see what it depends on."""

    def __init__(
        self,
        name: str,
        call: StageCall,
        x: State,
        extras: Extras,
        whole: ModelState,
        wanted: tuple[Carries, ...],
    ) -> None:
        self.name, self.call, self.x, self.extras = name, call, x, extras
        self.wanted = wanted
        self._alone = Alone.PLAIN  # how it is run
        self._leaves_sides = False
        self._whole, self._found = whole, ModelState(call.module, whole=whole)
        self._writes = False  # to what is no buffer, each time
        self._sets_up = False  # plain tensors, in its first run
        self.hidden: tuple[Place, ...] = ()
        """Places of buffers that it changes, and may read."""
        self.draws = False
        """Whether it draws random numbers."""
        self.replaced_bytes = 0
        """Bytes of buffers that it puts in the place of others."""
        self.cached_bytes = 0
        """Bytes of plain tensors that it makes once and keeps."""
        slots = Slots([call.module])
        self._buffers = storages(slots.buffers())
        self._watch = Watch(slots)
        self._own = own_generators(call.module.modules(), extras.apart().constants())
        self._random = self._random_now()

    def _random_now(self) -> RandomState:
        return RandomState.take(self.x.leaves[0].device, self._own)

    def begin_again(self) -> None:
        """Put random state and hidden buffers to where they were."""
        self._random.restore()
        if self._writes:
            self._found.put_back()
        self._watch.put_back(self.hidden)

    @torch.no_grad()
    def run_twice(self) -> State:
        """Run the stage, and again from the same random state and hidden buffers.

        Without gradients, or where it fails so, as a stage does that differentiates, with them.

        Returns:
            Its output.

        Raises:
            ProfileError: It gives another result, or does what cannot be done again.
        """
        try:
            return self._run_twice()
        except CkptschedError:
            raise
        except Exception as error:
            if not self._fails_again():
                raise ProfileError(
                    f"stage {self.name!r} failed once, and not when it was run again: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._alone = Alone.DIFFERENTIATES
            return self._run_twice()

    def _fails_again(self) -> bool:
        """Whether it cannot run without gradients; all is put back to where it began."""
        try:
            self._put_all_back()
            self._run()
        except Exception:
            return True
        finally:
            self._put_all_back()
        return False

    def _put_all_back(self) -> None:
        self._watch.put_back(self._watch.changed())
        self.begin_again()

    def record(self) -> tuple[Tape, State, list[Tensor]]:
        """Run the stage with its tape, from where it began.

        Returns:
            The tape, its output, and its side outputs without their graphs.
        """
        self.begin_again()
        look = self._looking()
        tape, output = record(self.call, self.x, wanted=self.wanted, extras=self.extras, look=look)
        return tape, output, take_sides(tape, look)

    def _looking(self) -> Look | None:
        return Look() if self._leaves_sides else None

    def asked(self) -> tuple[Carries, ...]:
        """What the tensors of the input carry once the stage has run."""
        if self._alone is Alone.PLAIN:
            return self.wanted
        self.begin_again()
        with torch.enable_grad():
            _, source = sources_of(self.x, self.wanted)
            run_under(None, self.call, source, self.extras)
        return tuple(
            Carries.ASKED if leaf.requires_grad and not carried else carried
            for leaf, carried in zip(source.leaves, self.wanted, strict=True)
        )

    def side_outputs(self, collecting: Sequence[Tensor]) -> Found:
        """What it leaves by another way than its output.

        Args:
            collecting: What collects its gradients.

        Raises:
            ProfileError: It cannot be followed there.
        """

        def find(*, keeps: bool = True) -> Found:
            return find_side_outputs(
                self.name,
                self.call,
                self.x,
                wanted=self.wanted,
                extras=self.extras,
                aliases=collecting,
                module=self.call.module,
                keeps=keeps,
                again=self.begin_again,
            )

        try:
            found = find()
        except CkptschedError:
            raise
        except RuntimeError as error:  # torch.func allows no hooks of what is saved
            found = find(keeps=False)
            if found.tensors:
                raise ProfileError(
                    f"stage {self.name!r} leaves a tensor with a graph by another way than its "
                    f"output, where it cannot be found again ({error}); let it return the tensor"
                ) from error
        self._leaves_sides = bool(found.tensors)
        return found

    def find_way(self, output: State, taped: State) -> Alone:
        """How the stage gives, without a tape, what it gives with one.

        Args:
            output: What `run_twice` returned.
            taped: Its output with a tape.

        Raises:
            ProfileError: It does not.
        """
        # Some kernels round otherwise without gradients, such as those of oneDNN's LSTM.
        plain = self._alone is Alone.PLAIN and all(map(_equal, output.leaves, taped.leaves))
        # With side outputs it runs with gradients on in any case.
        if not plain or self._leaves_sides:
            self._alone = Alone.FORGETS
            try:
                found = self._gives_again(taped, list(taped.leaves))
            except (CkptschedError, RuntimeError):  # it went back, or torch.func allows no hooks
                found = False
            if not found:
                self._alone = Alone.DIFFERENTIATES
                self._check_same(self._gives_again(taped, list(taped.leaves)))
        return Alone.PLAIN if plain and self._alone is not Alone.DIFFERENTIATES else self._alone

    def _run_twice(self) -> State:
        output = self._run_first()
        changed, self.replaced_bytes = self._watch.changed(), self._watch.replaced_bytes()
        self.hidden = tuple([place for place in changed if not is_write_only(place)])
        self._check_output(output)
        # Where it lies in a buffer, the second run may change it: a copy is compared.
        first = [
            leaf.clone() if self._buffers.keys() & storages([leaf]).keys() else leaf
            for leaf in output.leaves
        ]
        kept = self._plain_tensors()
        same = self._gives_again(output, first)
        self.cached_bytes = self._bytes_kept(kept, output)
        if not same and len(changed) > len(self.hidden):
            self.hidden = tuple(changed)
            same = self._gives_again(output, first)
        self._check_same(same)
        return output

    def _check_same(self, same: bool) -> None:
        if not same:
            rebound = self._found.rebound()
            such = f" (it changes {', '.join(map(repr, rebound[:4]))})" if rebound else ""
            raise ProfileError(
                f"stage {self.name!r} gives another result when it is run again on the same input "
                "with the same random state and buffers: it keeps a state of its own that is no "
                f"buffer{such}, or draws from a generator that is no attribute of its modules and "
                "no argument; keep the state in a buffer (register_buffer), the generator as an "
                "attribute"
            )

    def _run(self) -> State:
        """Run the stage as it is run where no tape is kept."""
        x = self.x.detached()
        look = self._looking()
        output = run_alone(
            self.call, x, wanted=self.wanted, extras=self.extras, how=self._alone, look=look
        ).detached()
        if look is not None:
            cut_all(look.take())
        if any(leaf.requires_grad for leaf in x.leaves):
            raise _AsksForGradients
        return output

    def _run_first(self) -> State:
        given, others = self.extras.apart(), ForeignGenerators.of(self.call.module.modules())
        elsewhere = drawn_elsewhere(self.x.leaves[0].device)
        versions = self.x.versions(), given.versions()
        output = self._run()
        # Where it lies is looked at later.
        refuse_tensors(f"the output of stage {self.name!r}", output.leaves, without_data=True)
        self.draws = self._random_now() != self._random
        self._sets_up = self._whole.note_set_up(self._found)
        self.look()
        if (self.x.versions(), given.versions()) != versions:
            what = "its input" if self.x.versions() != versions[0] else "what every stage is given"
            raise ProfileError(
                f"stage {self.name!r} changes {what} in place, so it cannot be run again; use an "
                "operation that is not in place, or make it one module with the stage before it"
            )
        if drawn_elsewhere(self.x.leaves[0].device) != elsewhere:
            raise ProfileError(
                f"stage {self.name!r} draws random numbers on another device than its input is on, "
                "whose random state is not put back when it runs again; draw where the input is"
            )
        if others.moved():
            raise ProfileError(
                f"stage {self.name!r} draws from the generator of Python or numpy, which is not "
                "put back when it runs again; draw from torch's"
            )
        return output

    def look(self) -> None:
        """Note whether it changes what is no buffer in place.

        Raises:
            ProfileError: It replaces a parameter.
        """
        replaced = self._found.replaced()
        if replaced:
            raise ProfileError(
                f"stage {self.name!r} puts another tensor in the place of {replaced} in its "
                "forward, whose gradient would be lost; make parameters before the model is "
                "profiled (run a model that makes them itself once, under torch.no_grad), and keep "
                "what a stage changes in a buffer: register_buffer"
            )
        self._writes |= note_unfit(self._whole, self._found, f"stage {self.name!r}")

    def _plain_tensors(self) -> dict[int, int]:
        return ModelState(self.call.module, whole=self._whole, copied=False).attribute_storages()

    def _bytes_kept(self, kept: dict[int, int], output: State) -> int:
        """Bytes of plain tensors that the first run made, and that the second left alone."""
        passed = storages([*self.x.leaves, *output.leaves, *self.extras.apart().leaves])
        known = passed.keys() | self._found.attribute_storages().keys()
        still = self._plain_tensors().keys() - known
        return sum(size for home, size in kept.items() if home in still)

    def _check_output(self, output: State) -> None:
        """Refuse a state that lies in a buffer which the next run changes."""
        buffers = [module._buffers[name] for module, name in self.hidden]
        now = storages([buffer for buffer in buffers if buffer is not None])
        if not now.keys().isdisjoint(storages(output.leaves)):
            raise ProfileError(
                f"stage {self.name!r} returns a buffer that it reads and changes, so its output "
                "changes when it is run again; return a copy (buffer.clone())"
            )

    def _gives_again(self, output: State, first: list[Tensor]) -> bool:
        self.begin_again()
        looks = self._sets_up and not self._writes
        before = ModelState(self.call.module, whole=self._whole) if looks else None
        again = self._run()
        if before is not None and note_unfit(self._whole, before, f"stage {self.name!r}"):
            self._writes = True
            return self._gives_again(output, first)  # from where it began in everything
        shapes = output.describe(_shape), again.describe(_shape)
        if shapes[0] != shapes[1]:
            raise ProfileError(
                f"stage {self.name!r} returned {shapes[0]} and, run again on the same input, "
                f"{shapes[1]}; a stage must depend on its input and parameters only"
            )
        return all(map(_equal, first, again.leaves))


def _find_readers(kinds: Iterable[Kind], watch: Watch) -> None:
    """Let every stage know of the buffers that it shares with one that hides a state in them.

    What a layer changes and does not read itself, such as the statistics of BatchNorm, may be read
    by another stage.

    Args:
        kinds: All distinct stages.
        watch: All buffers, as they were before any stage ran.
    """
    hidden = {place for kind in kinds for place in kind.hidden}
    owned = [(kind, set(Slots([kind.call.module]).buffer_places())) for kind in kinds]
    changed = watch.together(watch.changed()) - watch.together(hidden)
    for kind, own in owned if changed else ():
        others = set[Place]().union(*(them for k, them in owned if k.call.key != kind.call.key))
        shared = own & changed & watch.together(others & changed)
        if shared and not _ignores(kind, shared, watch):
            hidden |= shared
    hidden = watch.together(hidden)
    for kind, own in owned:
        kind.hidden = tuple(place for place in own if place in hidden)


def _ignores(kind: Kind, places: set[Place], watch: Watch) -> bool:
    """Whether a stage gives the same with the buffers as they were before any stage ran."""
    random = RandomState.take(kind.x.leaves[0].device)
    now = [leaf.clone() for leaf in kind.run().leaves]
    watch.put_back(places)
    random.restore()
    return all(map(_equal, now, kind.run().leaves))


def _equal(one: Tensor, other: Tensor) -> bool:
    # CUDA kernels may add up in another order; on the CPU equal means equal.
    tolerance = 0.0 if one.device.type == "cpu" else tolerance_of(one.dtype)
    pairs = zip(dense_parts(one), dense_parts(other), strict=True)
    return all(
        a.is_meta or torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in pairs
    )


def refuse_tensors(what: str, tensors: Iterable[Tensor], *, without_data: bool) -> None:
    """Refuse tensors that cannot be followed.

    Args:
        what: They are, in words.
        tensors: Any.
        without_data: Whether all is on the meta device.

    Raises:
        ProfileError: One of them cannot be counted, or holds no data.
    """
    for tensor in tensors:
        reason = cannot_be_followed(tensor, without_data=without_data)
        if reason:
            raise ProfileError(f"{what} {reason}")


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two results may be apart where additions come in another order, relative or absolute.

    At least four of the last bits, as bfloat16 has few; 0 for what is not rounded.

    Args:
        dtype: Of the results.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    last_bit = torch.finfo(dtype).eps
    return max(4 * last_bit, min(1e-3, 3 * math.sqrt(last_bit)))


def _for_gradients(found: Kind, arriving: list[Gradients], *, is_last: bool) -> Kind:
    """The kind for gradients of these layouts, on each of its paths, after going back once."""
    first = _for_gradient(found, arriving[0], is_last=is_last)
    rest = []
    for gradients in arriving:
        for path in found.others if gradients is arriving[0] else (found, *found.others):
            # A path that was found on another input may have no backward: it is none to plan for.
            with suppress(ProfileError):
                rest.append(_for_gradient(path, _fitted(gradients, path), is_last=is_last))
    first.others = rest
    if rest or found.varies:
        # What one path does not use another may, one that no draw has shown among them.
        unseen = {id(alias): alias.nbytes for alias in found.aliases} if found.varies else {}
        for kind in rest:
            for alias, size in kind.gradient_bytes.items():
                first.gradient_bytes[alias] = max(size, first.gradient_bytes.get(alias, 0))
        first.gradient_bytes = unseen | first.gradient_bytes
        for kind in rest:
            kind.gradient_bytes = first.gradient_bytes
    layouts = {_layout_of_gradients(k.input_gradients): k.input_gradients for k in (first, *rest)}
    first.sends_back = list(layouts.values())[:_MOST_GRADIENTS]
    return first


def _fitted(gradients: Gradients, path: Kind) -> Gradients:
    """These gradients, where they have the shapes that the output has on a path."""
    pairs = zip(gradients, path.output.leaves, strict=True)
    return tuple(
        [g if g is None or g.shape == leaf.shape else torch.ones_like(leaf) for g, leaf in pairs]
    )


def _for_gradient(found: Kind, gradients: Gradients, *, is_last: bool) -> Kind:
    """The kind for gradients of this layout, after going back once."""
    kind = replace(
        found,
        is_last=is_last,
        gradients=gradients,
        gradient_bytes={},
        others=[],
    )
    kind.set_gradients(first=True)
    kind.begin()
    name = kind.call.name or type(kind.call.module).__name__
    with _failures_named(f"the backward of stage {name!r}", kind.x):
        tape, output = kind.record(kind.x)
        kind.note_contents(tape, output)
        del output
        kind.input_gradients = kind.go_back(tape)
        for alias in kind.aliases:
            if alias.grad is None:
                continue
            if alias.grad.layout in (torch.sparse_coo, torch.sparse_csr):
                raise ProfileError(
                    f"stage {name!r} makes gradients of layout {alias.grad.layout}; ckptsched "
                    "counts dense ones: turn sparse gradients off (nn.Embedding(sparse=False))"
                )
            made = f"a gradient that stage {name!r} makes"
            refuse_tensors(made, [alias.grad], without_data=kind.x.leaves[0].is_meta)
    kind.gradient_bytes = {
        id(alias): storage_bytes([alias.grad]) for alias in kind.aliases if alias.grad is not None
    }
    kind.set_gradients(first=True)
    return kind
