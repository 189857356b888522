"""A distinct stage of a model, with everything that the profile finds out about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from ..base.errors import ProfileError
from ..capture.stage_discovery import StageCall, TracedBlock
from ..memory.meters import storage_bytes
from ..recompute.parameter_swap import Slot, Slots
from ..recompute.side_outputs import Look, cut_all, edges_of
from ..recompute.tape import Alone, Carries, Tape, record, run_alone
from ..tensors.pytree import Extras, State, storages
from ..tensors.wrapper_tensors import all_parts, dense_parts, type_name
from ..torch_state.replay_context import Autocast, RandomState
from ..workload.stage import StageLedger
from .side_output_search import rewritten_weights

Loss: TypeAlias = Callable[[Any], Tensor]
Gradients: TypeAlias = tuple[Tensor | None, ...]
"""With respect to the tensors of a state; None where none comes."""


@final
@dataclass(frozen=True, slots=True)
class LossWeight:
    """Bytes and seconds of a loss, and the gradients that it sends back."""

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
    """Storages that exist before a step and after it, by identity; stages may pass them on."""

    fixed: frozenset[int]
    """Of parameters and of what every stage is given: no step pays for them."""
    buffers: frozenset[int]
    """Of buffers: a stage that runs again has clones instead."""

    @classmethod
    def of(cls, blocks: Iterable[TracedBlock], extras: Extras) -> Standing:
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
class StageKind:
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
    foreign: bool = False
    """Whether it draws from generators that are not torch's."""
    own_leaves: bool = False
    """Whether it makes leaves that require gradients, which nobody else is to see."""
    hidden: tuple[Slot, ...] = ()
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
    look: int | None = None
    """Equal for stages that take the same bytes and seconds; None for one that is like no other."""
    gradients: tuple[Tensor | None, ...] = ()
    """What comes back to it, by tensor of its output."""
    input_gradients: tuple[Tensor | None, ...] = ()
    """What it sends back, by tensor of its input."""
    gradient_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes of the gradient of each alias that gets one, by the alias's id."""
    there: frozenset[int] = frozenset()
    """Ids of the aliases whose gradients are there when its backward runs, as later stages have
    made them; of a stage that runs once."""
    ledger: StageLedger | None = None
    """Its exact bytes, once weighed."""
    lean: StageLedger | None = None
    """The same with a lean tape; None where that would save little, or is not to be had."""
    made_again: tuple[int, ...] = ()
    """The calls that a backward from the lean tape makes again, counted from 0 in the stage."""
    left_bytes: int = 0
    """What a run leaves in its modules, as attributes that each run replaces; a replaced buffer
    counts twice, since the clone that it replaces in a repeated run stays for a while."""
    forward_seconds: float = 0.0
    """Of a run without tape, once timed."""
    backward_seconds: float = 0.0
    """Of a backward, and what the run with tape takes longer than the one without."""
    lean_backward_seconds: float = 0.0
    """The same with a lean tape."""
    varies: bool = False
    """Whether it reads data or draws to decide what it computes."""
    begins_with: RandomState | None = None
    """The random state with which its runs begin; None: as they find it."""
    others: list[StageKind] = field(default_factory=list)
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
        """Set the random state with which the stage takes this path."""
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
            name = self.call.title
            raise ProfileError(
                f"stage {name!r} left {len(self.sides)} tensors with a graph by another way than "
                f"its output, and {len(tape.sides)} in another run; let it leave the same from run "
                "to run, zeros where there is nothing to say, or return them"
            )
        with Autocast.off(self.x.leaves[0].device).again():
            return tape.backward(
                list(self.gradients), dict(zip(tape.sides, self.sides, strict=True))
            )

    def leanly(self) -> StageKind | None:
        """The same stage with a lean tape; None where it offers none, or hangs on too much.

        What a stage leaves elsewhere, or decides by values, a backward must not do once more.
        """
        hangs = self.varies or self.hidden or self.others or self.begins_with is not None
        leaves = self.looks or self.sides or self.own_leaves
        lean = self.call.lean
        if lean is None or hangs or leaves or self.alone is Alone.DIFFERENTIATES:
            return None
        return replace(self, call=lean)

    def note_contents(self, tape: Tape, output: State) -> None:
        """Record the bytes that a walk of a tape finds saved."""
        (contents,) = tape.contents()
        theirs = set(storages((*self.x.leaves, *output.leaves)))
        theirs |= self.standing.fixed | self.standing.buffers
        saved = [size for home, size in contents.saved.items() if home not in theirs]
        self.saved_bytes, self.largest_bytes = sum(saved), max(saved, default=0)
        self.used_bytes = sum(a.nbytes for a in self.aliases if id(a) in contents.leaves)

    def set_gradients(self, *, first: bool) -> None:
        """Give the aliases the gradients that are there before a backward.

        Args:
            first: Whether it is the first of the stage: those that later stages have made are
                there, and otherwise all.
        """
        for alias in self.aliases:
            given = id(alias) in self.gradient_bytes and (not first or id(alias) in self.there)
            alias.grad = torch.zeros_like(alias) if given else None

    def clear_gradients(self) -> None:
        """Let the gradients of the aliases go."""
        for alias in self.aliases:
            alias.grad = None


def leave_sides(kind: StageKind) -> None:
    """Run a stage that has side outputs as `examine` did: for a loss to find those of this run.

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
    """Register the side outputs of a run with its tape; returns them without their graphs."""
    if look is None:
        return []
    found = look.take()
    tape.sides = edges_of(0, found)
    return cut_all(found)


def gradients_of_sides(left: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of side outputs, made up."""
    return tuple([torch.zeros_like(tensor, requires_grad=False) for tensor in left])


def held_of_input(x: State, sides: Iterable[Tensor]) -> int:
    """Bytes of the input that stay after the run as side outputs lie in them."""
    homes = storages(sides).keys()
    mine = storages(x.leaves)
    return storage_bytes(part for home in mine.keys() & homes for part in mine[home])


def layout(leaves: Iterable[Tensor]) -> tuple[Any, ...]:
    """Shapes, dtypes, strides and storages of tensors, which decide the bytes of operations."""
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
