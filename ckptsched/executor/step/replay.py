"""What stages that run again do to random state and buffers is undone; what backwards do stays.

Between runs that are undone the backwards of stages draw random numbers and change buffers, too:
hooks and custom Functions that keep statistics of gradients. Under autograd all of that lasts, so
a backward finds the caller's generators and the buffers themselves. Of buffers that no forward
changes there are no stand-ins in the first place: a stage that finds one changed is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NoReturn, final

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
        steady: Mapping[tuple[int, str], tuple[Tensor, int]],
        random: Callable[[], RandomState] | None,
    ) -> None:
        """Change nothing yet.

        Args:
            prepared: The model and its plan.
            blocks: Indices of the blocks whose stages run again.
            held: The buffers that the forward pass found.
            steady: Each buffer that no forward may change, and its version, by the id of its module
                and its name.
            random: Reads the random state; None for a model that draws none.
        """
        self._prepared, self._held, self._steady = prepared, held, steady
        self._again = set(blocks)
        self._blocks = sorted(self._again | prepared.hidden.blocks)
        self._random, self._outer = random, random and random()
        self._clones: dict[int, Tensor] = {}
        """What stages find in the place of buffers, by the ids of these."""
        self._earlier: dict[tuple[int, str], int] = {}
        """Versions of buffers that others have replaced since the forward pass, by their places."""
        self._buffer_of: dict[int, Tensor] = {}
        """The other way round."""
        self._instead: dict[tuple[int, str], tuple[Slot, Tensor | None]] = {}
        """What backwards have put in the places of buffers."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the stages find clones of their buffers; at the end all is the caller's again."""
        try:
            with ExitStack() as stack:
                for k in self._blocks:
                    self._clone(k)
                    slots = self._prepared.slots[k]
                    stack.enter_context(slots.buffers_replaced(self._clones, self._held[k]))
                yield
                self._note_replaced()
        finally:
            if self._outer is not None:
                self._outer.restore()
            for (module, name), tensor in self._instead.values():
                module._buffers[name] = tensor

    def _clone(self, k: int) -> None:
        """Clone what a block may change, and all hidden buffers: snapshots are taken of those.

        Where the caller has put another in the place of one since, stages find the earlier one.
        """
        flags = self._prepared.hidden.flags[k], self._prepared.may_change[k]
        places = self._prepared.slots[k].buffer_places()
        for (module, name), buffer, hides, may in zip(places, self._held[k], *flags, strict=True):
            if buffer is None or id(buffer) in self._clones:
                continue
            if may and (hides or k in self._again):
                clone = self._clones[id(buffer)] = buffer.clone()
                self._buffer_of[id(clone)] = buffer
            elif module._buffers.get(name) is not buffer:
                self._clones[id(buffer)] = buffer
                self._earlier[id(module), name] = buffer._version

    def check(self, stage: int) -> None:
        """Refuse to run a stage again whose buffers a backward has changed.

        Args:
            stage: The stage, counted from 1.

        Raises:
            ExecutionError: One that no forward may change is another, or was written to.
        """
        for slots in self._prepared.buffers_of(stage, stage):
            for module, name in slots.buffer_places():
                buffer, version = self._steady.get((id(module), name), (None, 0))
                if buffer is None:
                    continue
                if module._buffers.get(name) is not buffer or buffer._version != version:
                    self._refuse((module, name))

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
        slots = self._prepared.buffers_of(first, last, changing=True) if self._clones else ()
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
            for some in slots:
                stack.enter_context(some.buffers_replaced(self._buffer_of))
            for module, name in places:
                if (id(module), name) in self._instead:
                    module._buffers[name] = self._instead[id(module), name][1]
            before = [module._buffers[name] for module, name in places]
            with around:
                yield
            after = [module._buffers.get(name) for module, name in places]
        for (module, name), buffer, now in zip(places, before, after, strict=True):
            if now is buffer:
                continue
            if (id(module), name) in self._steady:
                module._buffers[name] = now
            else:
                self._instead[id(module), name] = (module, name), now
        for place, clone, version in zip(places, clones, versions, strict=True):
            if clone is not None and id(clone) in self._buffer_of and clone._version != version:
                self._refuse(place)
        if self._random is not None:
            self._outer = None  # no two of them at a time, which would count
            self._outer = self._random()

    def _note_replaced(self) -> None:
        """Note what backwards have put beside stand-ins, in places that no forward changes."""
        for k in self._blocks:
            places = zip(self._prepared.slots[k].buffer_places(), self._held[k], strict=True)
            for (module, name), buffer in places:
                now, key = module._buffers.get(name), (id(module), name)
                if now is not buffer and key in self._steady:
                    self._instead[key] = (module, name), now
                elif now is not None and self._earlier.get(key, now._version) != now._version:
                    # What has taken its place since would have been written to.
                    self._refuse((module, name))

    def _refuse(self, place: Slot) -> NoReturn:
        name = self._prepared.inspection.name_of(place) or place[1]
        raise ExecutionError(
            f"the backward changes buffer {name!r}, which a stage that runs again may read or "
            "change as well, so that gradients or the buffer would be wrong: let what changes it "
            "in the backward (a hook, or a custom Function) write to a buffer of the model that no "
            "forward reads or changes"
        )
