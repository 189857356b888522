"""Stand-ins for the parameters and buffers of modules while their stages run.

A stage that is differentiated on its own must not touch the real parameters: their hooks
would fire once a step and `torch.autograd.grad` would pollute their `.grad`. So while a
stage runs, its modules hold aliases that share the parameters' storage, and gradients
collect in the aliases. Likewise a stage that runs again holds clones of its buffers, so that
running statistics move once a training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias, final

from torch import Tensor, nn

Place: TypeAlias = tuple[nn.Module, str]
"""A module, and the name under which it keeps a buffer."""

_PLAIN = nn.Module.__setattr__


@final
class Slots:
    """The places in some modules where parameters and buffers are kept."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Find the places, each once.

        Args:
            modules: Modules; their submodules count, too.
        """
        seen: dict[int, nn.Module] = {}
        for root in modules:
            for module in root.modules():
                seen.setdefault(id(module), module)
        # `_parameters` and `_buffers` are what `torch.func.functional_call` swaps, too: there
        # is no public way to put a tensor that is not a new parameter into a module.
        self._parameters = [(m, name) for m in seen.values() for name in m._parameters]
        self._buffers = [(m, name) for m in seen.values() for name in m._buffers]
        self.modules = tuple(seen.values())
        """All modules, each once."""

    def parameters(self) -> list[Tensor]:
        """The distinct parameters that are in the places now."""
        found = [module._parameters.get(name) for module, name in self._parameters]
        return list({id(p): p for p in found if p is not None}.values())

    def buffers(self) -> list[Tensor]:
        """The distinct buffers that are in the places now."""
        found = (module._buffers[name] for module, name in self._buffers)
        return list({id(b): b for b in found if b is not None}.values())

    def buffers_in_place(self) -> list[Tensor | None]:
        """What is in each place for a buffer now, in the order of the places."""
        return [module._buffers[name] for module, name in self._buffers]

    def buffer_places(self) -> list[Place]:
        """The places for buffers themselves, in their order."""
        return list(self._buffers)

    def parameter_place(self, k: int) -> Place:
        """The place for a parameter of a number, in the order of `in_place`."""
        return self._parameters[k]

    def in_place(self) -> list[Tensor | None]:
        """What is in each place for a parameter now, in the order of the places."""
        return [module._parameters[name] for module, name in self._parameters]

    def missing(self) -> str:
        """A place that its module no longer has, in words; empty where all are there."""
        for kind, places in (("parameter", self._parameters), ("buffer", self._buffers)):
            for module, name in places:
                if name not in (module._parameters if kind == "parameter" else module._buffers):
                    return f"{kind} {name!r} of a {type(module).__name__}"
        return ""

    def bind(self, aliases: Mapping[int, Tensor]) -> list[Tensor | None]:
        """The alias for each place, by the parameter that is there now.

        Bound to places and not to parameters: by the time of a backward others may be there,
        as after `torch.func.functional_call`.

        Args:
            aliases: The alias of each parameter, by the parameter's id.
        """
        return [None if p is None else aliases[id(p)] for p in self.in_place()]

    @contextmanager
    def parameters_replaced(self, bound: Sequence[Tensor | None]) -> Iterator[None]:
        """Put aliases in the places, and the parameters back at the end.

        Args:
            bound: What `bind` returned.
        """
        before = self.in_place()
        try:
            self._put(bound)
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Tensor | None]) -> None:
        for (module, name), tensor in zip(self._parameters, tensors, strict=True):
            # nn.RNNBase keeps a second list of its parameters that only its own __setattr__
            # updates. It takes parameters only; what else is there, functional_call has put there.
            if type(module).__setattr__ is _PLAIN or not isinstance(tensor, nn.Parameter):
                module._parameters[name] = tensor  # type: ignore[assignment]
            elif module._parameters[name] is not tensor:
                setattr(module, name, tensor)

    @contextmanager
    def buffers_replaced(
        self, clones: Mapping[int, Tensor], held: Sequence[Tensor | None] | None = None
    ) -> Iterator[None]:
        """Put clones in the places, and the buffers back at the end.

        Args:
            clones: The clone of each buffer, by the buffer's id; others stay.
            held: The buffer of each place; those that are there now if None.
        """
        before = self.buffers_in_place()
        try:
            for (module, name), buffer in zip(self._buffers, held or before, strict=True):
                if id(buffer) in clones:
                    module._buffers[name] = clones[id(buffer)]
            yield
        finally:
            for (module, name), buffer in zip(self._buffers, before, strict=True):
                module._buffers[name] = buffer


def make_alias(parameter: Tensor) -> nn.Parameter:
    """A leaf that shares the parameter's storage, with a gradient of its own."""
    # nn.Parameter detaches what is one already; of other kinds it may keep what they are.
    data = parameter if type(parameter) is nn.Parameter else parameter.detach()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)
