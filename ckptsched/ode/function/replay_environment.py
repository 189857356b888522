"""Parameters, buffers, modes and settings of a forward pass, restored to run f again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final

from torch import Tensor

from ...base.errors import ExecutionError
from ...recompute.parameter_swap import Slots, make_alias
from ...torch_state.replay_context import Generators, OneWay, Recomputing
from ...torch_state.surroundings import Ambient
from .attributes import ForwardAttributes
from .captures import Closure
from .rng_and_buffers import RngAndBuffers


@final
class Environment:
    """Records parameters, buffers, modes and settings; restores or checks them for runs again.

    `tensors` are those whose gradients are wanted, of the closure or not; `found` are f's
    attributes as the forward pass left them.
    """

    def __init__(
        self,
        closure: Closure,
        tensors: Sequence[Tensor],
        like: Tensor,
        found: ForwardAttributes | None = None,
    ) -> None:
        self._found = found
        self._closure, self._slots = closure, Slots(closure.modules)
        self._modes = [(m, m.training) for m in closure.parts]
        self._ambient = self._wanted = self._around = Ambient.take(like.device)
        self._device = like.device
        held = [*self._slots.parameters(), *closure.tensors]
        aliases = {id(p): make_alias(p) for p in held}
        self._bound = self._slots.bind(aliases)
        # As with parameters: the modules may have other buffers by the time of a backward.
        self._buffers = self._slots.buffers_in_place()
        self._stand_ins = [aliases[id(t)] for t in closure.tensors]
        self._watched = [*held, *(t for t in tensors if id(t) not in aliases)]
        self._versions = [t._version for t in self._watched]
        # Aliases that gradients are taken of, so that hooks of the real parameters do not fire.
        self.tensors = [aliases.get(id(t), t) for t in tensors]
        # All tensors that f may read with a gradient, wanted or not.
        self.known = [*aliases.values(), *self.tensors]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the clones of buffers that are there while f runs again."""
        return sum(b.nbytes for b in self._held_buffers().values())

    def _held_buffers(self) -> dict[int, Tensor]:
        return {id(b): b for b in self._buffers if b is not None}

    def check(self) -> None:
        """Refuse to run f again where a parameter was changed in place, by an ExecutionError."""
        if self._found is not None:
            self._found.look()
        for tensor, version in zip(self._watched, self._versions, strict=True):
            if tensor._version != version:
                raise ExecutionError(
                    f"a parameter of shape {tuple(tensor.shape)} was changed in place between "
                    "forward and backward; call backward before optimizer.step"
                )

    @contextmanager
    def again(
        self, carried: RngAndBuffers, stand_ins: Mapping[int, Tensor] | None = None
    ) -> Iterator[None]:
        """Around a run again, which leaves no trace.

        `stand_ins` are read in place of some of `known`, by the ids of these.
        """
        outer = Generators(self._device, carried.own) if carried.draws else None
        around = Ambient.take(self._device)
        wanted = self._ambient.found_from(around)
        self._around = around
        self._wanted = around if wanted == around else wanted
        changed = [(m, m.training) for m, flag in self._modes if m.training != flag]
        clones = {key: buffer.clone() for key, buffer in self._held_buffers().items()}
        instead = stand_ins or {}
        bound = [None if a is None else instead.get(id(a), a) for a in self._bound]
        try:
            for module, now in changed:
                module.training = not now
            with (
                self._wanted.again(self._around),
                OneWay(),
                Recomputing(),
                nullcontext() if self._found is None else self._found.again(),
                self._slots.parameters_replaced(bound),
                self._closure.replaced([instead.get(id(a), a) for a in self._stand_ins]),
                self._slots.buffers_replaced(clones, self._buffers),
            ):
                yield
        finally:
            for module, now in changed:
                module.training = now
            if outer is not None:
                outer.restore()

    def going_back(self) -> AbstractContextManager[None]:
        """Inside `again`, for a backward: the modes and settings of its caller."""
        return self._wanted.going_back_to(self._around)
