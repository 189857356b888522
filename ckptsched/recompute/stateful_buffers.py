"""State that stages keep: buffers that they read and change, random generators of their own.

A stage that runs again must begin with the values that its first run began with. Spectral
normalisation reads and moves its vectors; a counter may enter an output. The layers that
torch calls BatchNorm and InstanceNorm move buffers in training, too, but do not read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..tensors.comparison import same_values
from ..torch_state.foreign_generators import foreign_generators
from ..torch_state.replay_context import AnyGenerator, Generators, RandomState
from .fsdp import class_before
from .parameter_swap import Slot, Slots

# In training they give what they give whatever their running statistics are. Exact types: what a
# subclass does is not known.
_WRITE_ONLY = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

# On a tensor without data: how often a kernel has written to it that leaves no other trace.
_MOVES = "_ckptsched_moves"

Values: TypeAlias = tuple[tuple[int, Tensor | None], ...]
"""Copies of hidden buffers, with the number of the place of each; None where there was none."""


def is_write_only(place: Slot) -> bool:
    """Whether a stage that changes the buffer in this place is known not to read it."""
    return class_before(place[0]) in _WRITE_ONLY


def changeable(blocks: Sequence[Slots], hidden: Iterable[Slot]) -> list[list[bool]]:
    """For each block and each of its places for buffers whether stages may change it.

    Args:
        blocks: The places of each block, in order.
        hidden: Those that hold hidden state.
    """
    known = {(id(module), name) for module, name in hidden}
    return [
        [(id(p[0]), p[1]) in known or is_write_only(p) for p in slots.buffer_places()]
        for slots in blocks
    ]


def note_move(buffer: Tensor) -> None:
    """Note that a kernel has written to a tensor without data, and left no other trace.

    The kernels of normalisation move their statistics at one version, and on the meta device there
    are no values to compare.
    """
    setattr(buffer, _MOVES, getattr(buffer, _MOVES, 0) + 1)


@final
class HiddenBuffers:
    """The slots of buffers that stages read and change, by the block that uses them."""

    def __init__(self, blocks: Sequence[Slots], places: Iterable[Slot]) -> None:
        """Find the places in the blocks.

        Args:
            blocks: The places of each block, in order.
            places: Those that hold hidden state.
        """
        wanted = {(id(module), name) for module, name in places}
        self._places = [
            (module, name, k)
            for k, slots in enumerate(blocks)
            for module, name in slots.buffer_places()
            if (id(module), name) in wanted
        ]
        self.blocks = frozenset(k for _, _, k in self._places)
        """Indices of the blocks that hold any."""
        self.flags = [
            [(id(module), name) in wanted for module, name in slots.buffer_places()]
            for slots in blocks
        ]
        """For each block and each of its places for buffers whether it is one of these."""

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._places)

    def bytes_by_block(self) -> list[int]:
        """Bytes of the buffers by block, each with the last block that uses it."""
        last = {id(b): (k, b.nbytes) for b, k in self._held()}
        sizes = [0] * len(self.flags)
        for k, size in last.values():
            sizes[k] += size
        return sizes

    def _held(self) -> list[tuple[Tensor, int]]:
        found = [(module._buffers.get(name), k) for module, name, k in self._places]
        return [(buffer, k) for buffer, k in found if buffer is not None]

    def take(self, first: int) -> Values:
        """Copy the hidden buffers of a block and of all blocks after it.

        Args:
            first: Index of the block.
        """
        copies: dict[int, Tensor] = {}
        taken = []
        for number, (module, name, k) in enumerate(self._places):
            if k < first:
                continue
            buffer = module._buffers.get(name)
            if buffer is not None and id(buffer) not in copies:
                copies[id(buffer)] = buffer.detach().clone()
            taken.append((number, None if buffer is None else copies[id(buffer)]))
        return tuple(taken)

    @torch.no_grad()
    def put(self, values: Values) -> None:
        """Give the places, which hold stand-ins for the buffers, the values that were copied.

        Args:
            values: What `take` returned; it stays as it is.
        """
        for number, value in values:
            module, name, _ = self._places[number]
            _put(module, name, value)


def _put(module: nn.Module, name: str, value: Tensor | None) -> None:
    now = module._buffers.get(name)
    if value is None:
        module._buffers[name] = None
    elif now is None or now.shape != value.shape or now.dtype != value.dtype:
        module._buffers[name] = value.clone()
    elif not torch.equal(now, value):
        # What has the value already is left alone: a tape may have saved it.
        now.copy_(value)


@final
class BufferWatch:
    """Copies of buffers, to find out later which have changed and to restore them."""

    def __init__(self, slots: Slots) -> None:
        """Copy every buffer.

        Args:
            slots: The places to watch.
        """
        self._before = {
            place: None if b is None else (b, _version(b), b.detach().clone())
            for place, b in zip(slots.buffer_places(), slots.buffers_in_place(), strict=True)
        }

    def changed(self) -> list[Slot]:
        """The places whose buffer was changed or replaced, if only by the same values."""
        return [place for place in self._before if self._has_changed(place)]

    def _has_changed(self, place: Slot) -> bool:
        module, name = place
        now, then = module._buffers.get(name), self._before[place]
        if then is None:
            return now is not None
        before, version, value = then
        if now is not before or _version(before) != version:
            return True
        # Code that goes by `.data` leaves no other trace.
        return not before.is_meta and not same_values(before, value)

    def replaced_bytes(self) -> int:
        """Bytes of buffers in whose places others are now."""
        pairs = ((then, module._buffers.get(name)) for (module, name), then in self._before.items())
        return sum(
            0 if now is None else now.nbytes
            for then, now in pairs
            if now is not (None if then is None else then[0])
        )

    @torch.no_grad()
    def put_back(self, places: Iterable[Slot]) -> None:
        """Put the buffers of some places, and their values, back."""
        for place in places:
            module, name = place
            then = self._before[place]
            module._buffers[name] = None if then is None else then[0].copy_(then[2])

    def together(self, places: Iterable[Slot]) -> set[Slot]:
        """These places, and all that held the same buffers.

        Args:
            places: Some of those that are watched.
        """
        wanted = set(places)
        held = {place: id(then[0]) for place, then in self._before.items() if then is not None}
        chosen = {held[place] for place in wanted if place in held}
        return wanted | {place for place, buffer in held.items() if buffer in chosen}


def _version(buffer: Tensor) -> tuple[int, int]:
    return buffer._version, getattr(buffer, _MOVES, 0)


def own_generators(
    modules: Iterable[nn.Module], given: Iterable[object] = ()
) -> tuple[torch.Generator, ...]:
    """The random generators that modules keep as attributes, and those that a call is given.

    Args:
        modules: Looked through without their submodules; lists, tuples and dicts among their
            attributes are looked into.
        given: What else to look at.
    """
    found: dict[int, torch.Generator] = {}
    ahead: list[tuple[Any, bool]] = [(value, False) for value in given]
    for module in modules:
        ahead += [(value, True) for value in vars(module).values()]
    for value, open_up in ahead:
        if isinstance(value, torch.Generator):
            found[id(value)] = value
        elif open_up and isinstance(value, (list, tuple, dict)):
            inside = value.values() if isinstance(value, dict) else value
            found |= {id(part): part for part in inside if isinstance(part, torch.Generator)}
    return tuple(g for g in found.values() if g is not torch.default_generator)


def every_generator(
    modules: Iterable[nn.Module], given: Iterable[object] = ()
) -> tuple[AnyGenerator, ...]:
    """All that modules may draw from besides torch's default generators, also what is not torch's.

    Args:
        modules: Looked through without their submodules.
        given: What else to look at.
    """
    modules = [*modules]
    return *own_generators(modules, given), *foreign_generators(modules)


def unsteady_weight(modules: Iterable[nn.Module], device: torch.device) -> str:
    """A parametrized weight that is not the same each time it is computed.

    Such as one with spectral normalisation in training, which moves a vector each time. Everything
    is left as it was.

    Args:
        modules: Looked at without their submodules.
        device: Whose random generator to put back besides the CPU's.

    Returns:
        Such as "'weight' of a Linear"; empty where there is none.
    """
    for module in modules:
        if not parametrize.is_parametrized(module):
            continue
        for name, computed in cast(nn.ModuleDict, module.parametrizations).items():
            if not _is_steady(computed, device):
                kind = parametrize.type_before_parametrizations(module)
                return f"{name!r} of a {kind.__name__}"
    return ""


@torch.no_grad()
def _is_steady(computed: nn.Module, device: torch.device) -> bool:
    watch, own = BufferWatch(Slots([computed])), own_generators(computed.modules())
    # Within a step: what is kept of the generators is no tensor, whose bytes would count.
    random, before = Generators(device, own), RandomState.take(device, own).to_bytes()
    try:
        first = computed()
        if watch.changed() or RandomState.take(device, own).to_bytes() != before:
            return False
        return same_values(first, computed())
    finally:
        watch.put_back(watch.changed())
        random.restore()
