"""What stages that run again do to random state and buffers is undone; what backwards do stays.

Between runs that are undone the backwards of stages draw random numbers and change buffers, too:
hooks and custom Functions that keep statistics of gradients. Under autograd all of that lasts, so
a backward finds the caller's generators and the buffers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NoReturn, final

import torch
from torch import Tensor

from ...base.errors import ExecutionError
from ...recompute.parameter_swap import Slot, Slots
from ...torch_state.replay_context import RandomState
from ..prepared_plan import PreparedPlan

Held = Sequence[Sequence[Tensor | None]]
"""For each block the buffer of each place."""


@final
class Replay:
    """One stretch of a backward in which stages run again."""

    def __init__(
        self,
        prepared: PreparedPlan,
        blocks: Iterable[int],
        held: Held,
        steady: Mapping[int, int],
        random: Callable[[], RandomState] | None,
    ) -> None:
        """Change nothing yet.

        Args:
            prepared: The model and its plan.
            blocks: Indices of the blocks whose stages run again.
            held: The buffers that the forward pass found.
            steady: The version of each buffer that no forward may change, by its id; none while
                one goes on.
            random: Reads the random state; None for a model that draws none.
        """
        self._prepared, self._held, self._steady = prepared, held, steady
        self._again = set(blocks)
        self._blocks = sorted(self._again | prepared.hidden.blocks)
        self._random, self._outer = random, random and random()
        self._clones: dict[int, tuple[Tensor, Tensor, int]] = {}
        """By the id of a buffer it, its clone, and the clone's version as the two were equal."""
        self._instead: dict[tuple[int, str], tuple[Slot, Tensor | None]] = {}
        """What backwards have put in the places of buffers."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the stages find clones of their buffers; at the end all is the caller's again."""
        try:
            with ExitStack() as stack:
                for k in self._blocks:
                    self._clone(k)
                    clones = {name: clone for name, (_, clone, _) in self._clones.items()}
                    slots = self._prepared.slots[k]
                    stack.enter_context(slots.buffers_replaced(clones, self._held[k]))
                yield
                self._hand_on()
        finally:
            if self._outer is not None:
                self._outer.restore()
            for (module, name), tensor in self._instead.values():
                module._buffers[name] = tensor

    def _clone(self, k: int) -> None:
        """Clone what a block may change, and all hidden buffers: snapshots are taken of those."""
        flags = self._prepared.hidden.flags[k]
        for place, (buffer, hides) in enumerate(zip(self._held[k], flags, strict=True)):
            if buffer is None or id(buffer) in self._clones or not (hides or k in self._again):
                continue
            if self._steady.get(id(buffer), buffer._version) != buffer._version:
                self._refuse(self._prepared.slots[k].buffer_places()[place])
            clone = buffer.clone()
            self._clones[id(buffer)] = buffer, clone, clone._version

    def going_back(
        self, first: int, last: int, around: AbstractContextManager[None]
    ) -> AbstractContextManager[None]:
        """Let a backward find the caller's random state, and the buffers themselves.

        Of the generators that runs were given nothing is kept: what runs after a backward begins
        with a snapshot of its own.

        Args:
            first: The first of the stages that it goes back through.
            last: The last of them.
            around: What else it is to find.
        """
        slots = self._prepared.buffers_of(first, last) if self._clones else ()
        return self._entered(slots, around) if slots or self._outer is not None else around

    @contextmanager
    def _entered(
        self, slots: Sequence[Slots], around: AbstractContextManager[None]
    ) -> Iterator[None]:
        if self._outer is not None:
            self._outer.restore()
        places = [place for some in slots for place in some.buffer_places()]
        clones = [module._buffers[name] for module, name in places]
        versions = [None if clone is None else clone._version for clone in clones]
        with ExitStack() as stack:
            themselves = {id(clone): buffer for buffer, clone, _ in self._clones.values()}
            for some in slots:
                stack.enter_context(some.buffers_replaced(themselves))
            for module, name in places:
                if (id(module), name) in self._instead:
                    module._buffers[name] = self._instead[id(module), name][1]
            before = [module._buffers[name] for module, name in places]
            with around:
                yield
            for (module, name), buffer in zip(places, before, strict=True):
                now = module._buffers.get(name)
                if now is not buffer:
                    self._instead[id(module), name] = (module, name), now
        for place, clone, version in zip(places, clones, versions, strict=True):
            if clone is not None and clone._version != version and not self._is_steady(clone):
                self._refuse(place)
        if self._random is not None:
            self._outer = None  # no two of them at a time, which would count
            self._outer = self._random()

    def _is_steady(self, clone: Tensor) -> bool:
        return any(c is clone and id(b) in self._steady for b, c, _ in self._clones.values())

    @torch.no_grad()
    def _hand_on(self) -> None:
        """Give buffers what backwards have written to their clones, which tapes had kept."""
        for buffer, clone, version in self._clones.values():
            if id(buffer) not in self._steady or clone._version == version:
                continue
            if buffer._version != self._steady[id(buffer)] or self._is_shared(buffer):
                places = (
                    self._prepared.slots[k].buffer_places()[place]
                    for k in self._blocks
                    for place, held in enumerate(self._held[k])
                    if held is buffer
                )
                self._refuse(next(places))
            buffer.copy_(clone)

    def _is_shared(self, buffer: Tensor) -> bool:
        """Whether several stages could find a buffer, one of them after the backward of another."""
        clone = self._clones[id(buffer)][1]
        finds = [
            any(clone is b for some in self._prepared.buffers_of(i, i) for b in some.buffers())
            for i in range(1, len(self._prepared.stages) + 1)
        ]
        return sum(finds) > 1

    def _refuse(self, place: Slot) -> NoReturn:
        name = self._prepared.inspection.name_of(place) or place[1]
        raise ExecutionError(
            f"the backward changes buffer {name!r}, which stages that run again may read or change "
            "as well, so that gradients or the buffer would be wrong: let what changes it in the "
            "backward (a hook, or a custom Function) write to a buffer that no forward reads or "
            "changes, and take that over after the backward"
        )
