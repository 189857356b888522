"""Random generators and buffers that a right-hand side moves from one evaluation to the next.

The generators are torch's own and those that f keeps; the buffers are those that it reads and
changes, such as the vectors of spectral normalisation or a counter. An accepted step that is run
again begins with both as it began the first time. A rejected attempt leaves both as it found them,
so that they follow from the accepted steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ...base.errors import ExecutionError
from ...recompute.parameter_swap import Slot, Slots
from ...recompute.stateful_buffers import (
    BufferWatch,
    HiddenBuffers,
    Values,
    is_write_only,
    own_generators,
)
from ...torch_state.replay_context import Generators, RandomState
from ...torch_state.torch_modes import untransformed
from .captures import Closure, is_scripted


@final
@dataclass(frozen=True, slots=True)
class StepSnapshot:
    """The states of random generators, and the buffers that f changes, before a step."""

    random: Generators | None
    hidden: HiddenBuffers
    values: Values

    def restore(self) -> None:
        """Restore the generators, and copy the values into the tensors that are buffers now."""
        if self.random is not None:
            with untransformed():
                self.random.restore()
        self.hidden.put(self.values)


@final
class RngAndBuffers:
    """Finds out which generators and buffers an evaluation of f moves; takes snapshots of them."""

    def __init__(self, closure: Closure, device: torch.device) -> None:
        """Note the generators and buffers that f may move, for states on a device."""
        modules = [m for m in closure.parts if not is_scripted(m)]
        self.own = own_generators(modules, closure.generators)
        self._device = device
        # Without buffers there is nothing to watch.
        self._slots = Slots(m for m in modules if m._buffers)
        self._hidden = HiddenBuffers([self._slots], ())
        self.draws = False
        """Whether f draws random numbers."""
        self._unmoved: tuple[bytes, list[tuple[Slot, Tensor | None, int]]] = (b"", [])

    @property
    def matters(self) -> bool:
        """Whether f draws random numbers, or changes a buffer that it reads."""
        return self.draws or bool(self._hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers in one snapshot."""
        return sum(self._hidden.bytes_by_block())

    def look(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Call `evaluate`, which evaluates f once, and note the generators and buffers it moves."""
        before = self._random()
        watch = BufferWatch(self._slots) if self._slots.buffer_places() else None
        slope = evaluate()
        after = self._random()
        self.draws = after != before
        if watch is not None:
            changed = [place for place in watch.changed() if not is_write_only(place)]
            self._hidden = HiddenBuffers([self._slots], watch.together(changed))
        self._unmoved = (b"" if self.draws else after, self._steady())
        return slope

    def take(self) -> StepSnapshot | None:
        """A snapshot of the present; None where f moves nothing."""
        if not self.matters:
            return None
        with untransformed():
            random = Generators(self._device, self.own) if self.draws else None
        return StepSnapshot(random, self._hidden, self._hidden.take(0))

    def check(self) -> None:
        """Refuse to run f again where it moved more than in its first evaluation."""
        random, buffers = self._unmoved
        if random and self._random() != random:
            raise ExecutionError(
                "f drew random numbers on the way, and none when it was first evaluated, so that "
                "steps that are run again would draw others; let it draw from the start, or solve "
                "without a budget"
            )
        for (place, then, version), (_, now, _) in zip(buffers, self._steady(), strict=True):
            if now is not then or (now is not None and now._version != version):
                raise ExecutionError(
                    f"f changed the buffer {place[1]!r} of a {type(place[0]).__name__} on the way, "
                    "and not when it was first evaluated, so that steps that are run again would "
                    "begin with other values; let it change from the start, or solve without a "
                    "budget"
                )

    def check_buffers(self) -> None:
        """Refuse to run f again where a buffer that it only reads was changed in place."""
        for place, then, version in self._unmoved[1]:
            if then is not None and then._version != version:
                raise ExecutionError(
                    f"the buffer {place[1]!r} of a {type(place[0]).__name__}, which f does not "
                    "change, was changed in place between forward and backward, so steps would run "
                    "again with another; call backward before, or give the buffer a new tensor"
                )

    def _random(self) -> bytes:
        with untransformed():
            return RandomState.take(self._device, self.own).to_bytes()

    def _steady(self) -> list[tuple[Slot, Tensor | None, int]]:
        """Buffers that f only reads, each with its place in a module and its version."""
        places = zip(self._slots.buffer_places(), self._hidden.flags[0], strict=True)
        found = [(p, p[0]._buffers.get(p[1])) for p, hides in places if not hides]
        return [(p, b, 0 if b is None else b._version) for p, b in found if not is_write_only(p)]
