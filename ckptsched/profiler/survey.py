"""Finds the distinct stages of a model: forward on a sample, then backward from a loss.

A stage is known by what it computes (`StageCall.key`) and by the layout of its input and of
the gradient that comes back to it, since these decide what PyTorch allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from torch import Tensor

from ..base.errors import ProfileError
from ..capture.inspection import Inspection
from ..capture.model_state import ModelState
from ..capture.signature import StageFacts
from ..capture.stage_discovery import StageCall, TracedBlock, count_frozen, trace
from ..memory.meters import storage_bytes
from ..recompute.parameter_swap import Slot, Slots
from ..recompute.stateful_buffers import BufferWatch
from ..recompute.tape import Carries
from ..tensors.comparison import agree
from ..tensors.devices import matters
from ..tensors.pytree import Extras, State, storages
from ..torch_state.foreign_generators import foreign_generators
from ..torch_state.replay_context import RandomState
from .alike.twins import Alike, Backwards, Candidate, layout_of_gradients
from .refusals import failures_named, refuse_tensors
from .stage_kind import Gradients, StageKind, Standing, layout
from .stage_probe import examine

Vary: TypeAlias = Callable[[StageKind, Sequence[StageCall]], None]

_MOST_GRADIENTS = 4  # layouts of a state's gradient that are weighed


@final
@dataclass(frozen=True, slots=True)
class Survey:
    """The stages of a model, as they have run forward on a sample."""

    blocks: tuple[TracedBlock, ...]
    frozen: int
    """How many leading stages are run as one, as they need no gradient."""
    order: list[StageKind]
    """The kind of each stage; equal stages share one. `survey_backward` puts others in place."""

    def facts(self) -> StageFacts:
        """What steps rely on."""
        order = self.order
        return StageFacts(
            carries=[order[0].wanted, *(kind.carries for kind in order)],
            alone=[kind.alone for kind in order],
            own_leaves=[kind.own_leaves for kind in order],
            sides=[kind.looks for kind in order],
        )

    def hidden(self) -> set[Slot]:
        """Buffers that stages read and change."""
        return {slot for kind in self.order for slot in kind.hidden}


def survey_model(
    inspection: Inspection,
    x: State,
    extras: Extras,
    whole: ModelState,
    vary: Vary | None = None,
    alike: Alike | None = None,
) -> Survey:
    """Trace a model and run every distinct stage of it forward.

    Args:
        inspection: The model, its parameters replaced by aliases.
        x: The sample; on the meta device there are no results to compare.
        extras: What every stage is given besides, leaves where gradients are wanted.
        whole: What the model was when nothing had run.
        vary: Looks at a new kind of stage, and the calls that are of this kind, for other paths.
        alike: What is known of stages like those of the model; without, each is looked at.

    Raises:
        ProfileError: A stage fails, or cannot be run again with the same result.
    """
    blocks = trace(inspection.outline)
    frozen = count_frozen(blocks, [*x.leaves, *extras.apart().leaves])
    if frozen:
        joined = trace(inspection.outline, frozen=frozen)
        kinds = _survey_forward(joined, x, extras, whole, vary, alike)
        if not any(kinds[0].carries):  # as it does where a hook lets an output require a gradient
            return Survey(joined, frozen, kinds)
    return Survey(blocks, 0, _survey_forward(blocks, x, extras, whole, vary, alike))


def _survey_forward(
    blocks: tuple[TracedBlock, ...],
    x: State,
    extras: Extras,
    whole: ModelState,
    vary: Vary | None,
    alike: Alike | None,
) -> list[StageKind]:
    """Run every distinct stage on the output of the stage before it; returns all in order."""
    known: dict[Hashable, StageKind] = {}
    order: list[StageKind] = []
    carries = tuple(map(Carries.of, x.leaves))
    state = x.detached()
    standing = Standing.of(blocks, extras)
    watch = BufferWatch(Slots(block.module for block in blocks))
    calls: dict[Hashable, list[StageCall]] = {}
    for block in blocks if vary else ():
        for call in block.stages:
            calls.setdefault(call.key, []).append(call)
    if alike:
        alike.expect(call for block in blocks for call in block.stages)
    for block in blocks:
        for call in block.stages:
            structure = state.describe(lambda tensor: "tensor")
            fixed = tuple(home in standing.fixed for home in storages(state.leaves))
            key = (call.key, layout(state.leaves), fixed, structure, carries)
            kind = known.get(key)
            if kind is None:
                candidate = Candidate(block, call, state, extras, carries, standing)
                # The first may let its input require a gradient, which no other can.
                number = alike.number(candidate) if alike and order else None
                kind = alike.twin(number, candidate) if alike and number is not None else None
                if kind is None:
                    kind = examine(
                        block, call, state, extras, carries, standing, whole, may_ask=not order
                    )
                    if vary:
                        vary(kind, calls[call.key])
                    if alike and number is not None:
                        alike.note(number, candidate, kind)
                known[key] = kind
            kind.count += 1
            order.append(kind)
            _check_device(kind, x.leaves[0].device)
            state, carries = kind.hands_on or kind.output, kind.carries
    order[-1].is_last = True
    _find_readers(known.values(), watch)
    whole.note_unfit(whole, "a stage")
    return order


@contextmanager
def sides_held(order: Sequence[StageKind]) -> Iterator[list[Tensor]]:
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


def _check_device(kind: StageKind, device: torch.device) -> None:
    """Raise if a stage returns a tensor on another device."""
    for leaf in kind.output.leaves:
        if leaf.device != device and matters(leaf):
            name = kind.call.title
            raise ProfileError(
                f"stage {name!r} returns a tensor on {leaf.device}, and the sample is on "
                f"{device}: bytes are counted and random states kept on one device; leave all of "
                "the model and its states on one"
            )


def survey_backward(order: list[StageKind], gradients: Gradients) -> list[StageKind]:
    """Send a gradient back through every distinct stage.

    Args:
        order: The kind of each stage; replaced where a gradient of another layout comes back.
        gradients: With respect to the tensors of the model's output.

    Returns:
        The distinct kinds.
    """
    known: dict[Hashable, StageKind] = {}
    backwards = Backwards()
    arriving = [gradients]
    for i in reversed(range(len(order))):
        found = order[i]
        key = (id(found), *map(layout_of_gradients, arriving))
        kind = known.get(key)
        if kind is None:
            is_last = i == len(order) - 1
            kind = backwards.like(found, arriving, is_last=is_last)
            if kind is None:
                kind = _for_gradients(found, arriving, is_last=is_last)
                backwards.note(found, arriving, kind, is_last=is_last)
            known[key] = kind
        order[i] = kind
        arriving = kind.sends_back
    return list(known.values())


def _find_readers(kinds: Iterable[StageKind], watch: BufferWatch) -> None:
    """Add to the hidden buffers of each stage those that it shares with another stage.

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
        others = set[Slot]().union(*(them for k, them in owned if k.call.key != kind.call.key))
        shared = own & changed & watch.together(others & changed)
        if shared and not _ignores(kind, shared, watch):
            hidden |= shared
    hidden = watch.together(hidden)
    for kind, own in owned:
        kind.hidden = tuple(place for place in own if place in hidden)
        if kind.hidden:
            kind.look = None  # it hangs on what others do


def _ignores(kind: StageKind, places: set[Slot], watch: BufferWatch) -> bool:
    """Whether a stage gives the same with the buffers as they were before any stage ran."""
    foreign = foreign_generators(kind.call.module.modules())
    random = RandomState.take(kind.x.leaves[0].device, foreign)
    now = [leaf.clone() for leaf in kind.run().leaves]
    watch.put_back(places)
    random.restore()
    return all(map(agree, now, kind.run().leaves))


def _for_gradients(found: StageKind, arriving: list[Gradients], *, is_last: bool) -> StageKind:
    """A copy of the kind for gradients of these layouts, on each path, after one backward."""
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
    layouts = {layout_of_gradients(k.input_gradients): k.input_gradients for k in (first, *rest)}
    first.sends_back = list(layouts.values())[:_MOST_GRADIENTS]
    return first


def note_gradients_there(order: Sequence[StageKind]) -> None:
    """Tell stages that run once which gradients later stages have made before their backward.

    Args:
        order: The kind of each stage, gone back through.
    """
    made: set[int] = set()
    for kind in reversed(order):
        if kind.count == 1:
            for path in (kind, *kind.others):
                path.there = frozenset(made & path.gradient_bytes.keys())
        made |= kind.gradient_bytes.keys()


def _fitted(gradients: Gradients, path: StageKind) -> Gradients:
    """These gradients, where they have the shapes that the output has on a path."""
    pairs = zip(gradients, path.output.leaves, strict=True)
    return tuple(
        [g if g is None or g.shape == leaf.shape else torch.ones_like(leaf) for g, leaf in pairs]
    )


def _for_gradient(found: StageKind, gradients: Gradients, *, is_last: bool) -> StageKind:
    """A copy of the kind for gradients of this layout, after one backward."""
    kind = replace(
        found,
        is_last=is_last,
        gradients=gradients,
        gradient_bytes={},
        others=[],
    )
    kind.set_gradients(first=True)
    kind.begin()
    name = kind.call.title
    with failures_named(f"the backward of stage {name!r}", kind.x):
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
