"""Finds the distinct stages of a model, and checks that each can be run again.

A stage is known by what it computes (`StageCall.key`) and by the layout of its input and of
the gradient that comes back to it, since these decide what PyTorch allocates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from .aliases import Slots
from .context import RandomState
from .errors import CkptschedError, ProfileError
from .memory import storage_bytes
from .stages import StageLedger
from .structure import stage_label
from .tape import Tape, record, run_alone, run_stage
from .tracing import Block, StageCall
from .trees import Extras, State, storages

Loss: TypeAlias = Callable[[Any], Tensor]

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
    seconds: float
    """Seconds of its forward and backward."""
    overhead_bytes: int
    """Peak beyond the gradient."""
    rest_bytes: int
    """What is left of it while the backward goes on: its value and the gradient of that."""


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
            leaf for leaf in leaves if leaf.untyped_storage()._cdata not in self.fixed
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
    wanted: tuple[bool, ...]
    """For each tensor of its input whether the gradient is wanted."""
    carries: tuple[bool, ...]
    """For each tensor of its output whether it carries a gradient."""
    aliases: list[Tensor]
    """The aliases of its trained parameters, and of what else collects gradients."""
    repeated: list[Tensor]
    """Those that one run uses more than once."""
    draws: bool
    """Whether it draws random numbers."""
    standing: Standing
    """Storages that are there before it runs and after."""
    needs_tape: bool = False
    """Whether it gives the same bits only where it runs with its tape."""
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
    forward_seconds: list[float] = field(default_factory=list)
    """Seconds of each timed run without tape."""
    backward_seconds: list[float] = field(default_factory=list)
    """Seconds of each timed backward, and what its run with tape took longer."""

    def run(self) -> State:
        """Run the stage and keep no tape, as the executor does."""
        return run_alone(
            self.call, self.x, wanted=self.wanted, extras=self.extras, needs_tape=self.needs_tape
        )

    def record(self, x: State) -> tuple[Tape, State]:
        """Run the stage with its tape, as the executor does."""
        tape, output = record(self.call, x, wanted=self.wanted, extras=self.extras)
        if self.repeated:
            tape.feed_back(self.repeated)
        return tape, output

    def set_gradients(self, *, first: bool) -> None:
        """Let the parameters have no gradients yet, or let them all have some already."""
        for alias in self.aliases:
            given = not first and id(alias) in self.gradient_bytes
            alias.grad = torch.zeros_like(alias) if given else None


def layout(leaves: Iterable[Tensor]) -> tuple[Any, ...]:
    """What of tensors decides the bytes that operations on them take."""
    homes: dict[int, int] = {}
    found = []
    for tensor in leaves:
        storage = tensor.untyped_storage()
        home = homes.setdefault(storage._cdata, len(homes))
        place = tensor.stride(), tensor.storage_offset(), storage.nbytes(), home
        found.append((tuple(tensor.shape), tensor.dtype, *place))
    return tuple(found)


def _layout_of_gradients(gradients: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    flags = tuple(gradient is not None for gradient in gradients)
    return flags, layout(gradient for gradient in gradients if gradient is not None)


def survey_forward(blocks: tuple[Block, ...], x: State, extras: Extras) -> list[Kind]:
    """Run every distinct stage on what the stage before it made.

    Args:
        blocks: The model, its parameters replaced by aliases.
        x: The sample; on the meta device there are no results to compare.
        extras: What every stage is given besides, leaves where gradients are wanted.

    Returns:
        The kind of each stage, in order; equal stages share one.

    Raises:
        ProfileError: A stage fails, or cannot be run again with the same result.
    """
    known: dict[Hashable, Kind] = {}
    order = []
    carries = tuple(leaf.requires_grad for leaf in x.leaves)
    state = x.detached()
    standing = Standing.of(blocks, extras)
    buffers = Slots(block.module for block in blocks).buffers()
    before = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    for block in blocks:
        for call in block.stages:
            structure = state.describe(lambda tensor: "tensor")
            fixed = tuple(home in standing.fixed for home in storages(state.leaves))
            key = (call.key, layout(state.leaves), fixed, structure, carries)
            kind = known.get(key)
            if kind is None:
                kind = known[key] = _examine(block, call, state, extras, carries, standing)
            kind.count += 1
            order.append(kind)
            state, carries = kind.output, kind.carries
    order[-1].is_last = True
    _check_buffers(known.values(), [(b, old) for b, version, old in before if b._version > version])
    return order


def survey_backward(order: list[Kind], gradients: tuple[Tensor | None, ...]) -> list[Kind]:
    """Send a gradient back through every distinct stage.

    Args:
        order: The kind of each stage; replaced where a gradient of another layout comes back.
        gradients: With respect to the tensors of the model's output.

    Returns:
        The distinct kinds.
    """
    known: dict[Hashable, Kind] = {}
    for i in reversed(range(len(order))):
        found = order[i]
        key = (id(found), _layout_of_gradients(gradients))
        kind = known.get(key)
        if kind is None:
            kind = known[key] = _for_gradient(found, gradients, is_last=i == len(order) - 1)
        order[i] = kind
        gradients = kind.input_gradients
    return list(known.values())


def _examine(
    block: Block,
    call: StageCall,
    x: State,
    extras: Extras,
    wanted: tuple[bool, ...],
    standing: Standing,
) -> Kind:
    name = call.name or type(call.module).__name__
    with _failures_named(f"stage {name!r}", x):
        before = RandomState.take(x.leaves[0].device)
        output, draws = _check_repeatable(name, call, x, extras)
        before.restore()
        tape, taped = record(call, x, wanted=wanted, extras=extras)
    # Some kernels round otherwise without gradients, such as those of oneDNN's LSTM.
    needs_tape = not all(map(_equal, output.leaves, taped.leaves))
    leaves = tape.repeated_leaves()
    given = [leaf for leaf in extras.apart().leaves if leaf.requires_grad]
    collecting = [*Slots([call.module]).parameters(), *given]
    if not tape.uses().keys() <= {id(leaf) for leaf in collecting}:
        raise ProfileError(
            f"stage {name!r} uses a parameter that its module does not own, so its gradient would "
            "be lost; register the parameter, or the module that owns it, in the stage, or give "
            "the tensor to the model as a further argument"
        )
    aliases = list({id(leaf): leaf for leaf in collecting if leaf.requires_grad}.values())
    return Kind(
        name=stage_label(block, call.name),
        call=call,
        x=x,
        extras=extras,
        output=taped if needs_tape else output,
        wanted=wanted,
        carries=tape.carries,
        aliases=aliases,
        repeated=[alias for alias in aliases if id(alias) in leaves],
        draws=draws,
        standing=standing,
        needs_tape=needs_tape,
    )


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
        advice = f"; {WITHOUT_DATA}" if x.leaves[0].is_meta else ""
        raise ProfileError(
            f"{what} failed on an input of {x.describe(_shape)}: "
            f"{type(error).__name__}: {error}{advice}"
        ) from error


def _check_repeatable(name: str, call: StageCall, x: State, extras: Extras) -> tuple[State, bool]:
    """Run a stage twice from one random state; returns its output, and whether it draws."""
    device = x.leaves[0].device
    before, others = RandomState.take(device), _other_generators()
    given = extras.apart()
    buffers = storages(Slots([call.module]).buffers())
    versions = x.versions(), given.versions()
    with torch.no_grad():
        # Where it lies in a buffer, the second run may change it: a copy is compared.
        output = run_stage(call, x, extras).detached()
        first = [
            leaf.clone() if leaf.untyped_storage()._cdata in buffers else leaf
            for leaf in output.leaves
        ]
        draws = RandomState.take(device) != before
        if (x.versions(), given.versions()) != versions:
            what = "its input" if x.versions() != versions[0] else "what every stage is given"
            raise ProfileError(
                f"stage {name!r} changes {what} in place, so it cannot be run again; use an "
                "operation that is not in place, or make it one module with the stage before it"
            )
        if _other_generators() != others:
            raise ProfileError(
                f"stage {name!r} draws from the generator of Python or numpy, which is not put "
                "back when it runs again; draw from torch's"
            )
        before.restore()
        again = run_stage(call, x, extras)
    shapes = output.describe(_shape), again.describe(_shape)
    if shapes[0] != shapes[1]:
        raise ProfileError(
            f"stage {name!r} returned {shapes[0]} and, run again on the same input, {shapes[1]}; "
            "a stage must depend on its input and parameters only"
        )
    if not all(map(_equal, first, again.leaves)):
        raise ProfileError(
            f"stage {name!r} gives another result when it is run again on the same input with the "
            "same random state: it keeps a state of its own (a buffer that it reads and changes, "
            "or a generator of its own), and running it again would give wrong gradients"
        )
    return output, draws


def _check_buffers(kinds: Iterable[Kind], changed: list[tuple[Tensor, Tensor]]) -> None:
    """Refuse a stage that reads a buffer that another stage changes.

    Args:
        kinds: All distinct stages, each of which can be run again by itself.
        changed: Buffers that stages have changed, and their values before.
    """
    owned = [(kind, {id(b) for b in Slots([kind.call.module]).buffers()}) for kind in kinds]
    for kind, own in owned:
        others = set[int]().union(*(ids for k, ids in owned if k.call.key != kind.call.key))
        shared = [(b, old) for b, old in changed if id(b) in own & others]
        if not shared:
            continue
        random = RandomState.take(kind.x.leaves[0].device)
        now = [leaf.clone() for leaf in kind.run().leaves]
        for buffer, old in shared:
            buffer.copy_(old)
        random.restore()
        if not all(map(_equal, now, kind.run().leaves)):
            raise ProfileError(
                f"stage {kind.call.name!r} reads a buffer that another stage changes, so what it "
                "gives when it is run again depends on what ran before; hand the value on as a "
                "part of the state"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    # CUDA kernels may add up in another order; on the CPU equal means equal.
    tolerance = 0.0 if one.device.type == "cpu" else 1e-3
    return one.is_meta or torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _other_generators() -> tuple[object, ...]:
    """State of the default generators of Python and numpy, to compare."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _for_gradient(found: Kind, gradients: tuple[Tensor | None, ...], *, is_last: bool) -> Kind:
    """The kind for gradients of this layout, after going back once."""
    kind = replace(
        found,
        is_last=is_last,
        gradients=gradients,
        gradient_bytes={},
        forward_seconds=[],
        backward_seconds=[],
    )
    kind.set_gradients(first=True)
    name = kind.call.name or type(kind.call.module).__name__
    with _failures_named(f"the backward of stage {name!r}", kind.x):
        tape, _ = kind.record(kind.x)
        kind.input_gradients = tape.backward(gradients)
        for alias in kind.aliases:
            if alias.grad is not None and alias.grad.layout is not torch.strided:
                raise ProfileError(
                    f"stage {name!r} makes gradients of layout {alias.grad.layout}; ckptsched "
                    "counts dense ones: turn sparse gradients off (nn.Embedding(sparse=False))"
                )
    kind.gradient_bytes = {
        id(alias): alias.grad.untyped_storage().nbytes()
        for alias in kind.aliases
        if alias.grad is not None
    }
    kind.set_gradients(first=True)
    return kind
