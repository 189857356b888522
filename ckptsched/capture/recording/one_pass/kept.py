"""What attributes of a model hold when a pass is over, and did not hold before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from ....tensors.pytree import State
from ..calls import Kept, Place, Source, is_plain_object
from .owned import OF_EVERY_MODULE, attributes_in
from .values import Numbers


@final
class KeptValues:
    """Finds the values of a pass that attributes and buffers hold."""

    def __init__(self, model: nn.Module, known: set[Place]) -> None:
        """Look at what attributes hold before.

        Args:
            model: The model.
            known: Attributes that hold tensors before.
        """
        self.kept: dict[Place, Kept] = {}
        """Attributes that hold values of the pass when it is over."""
        self.left: dict[Place, Any] = {}
        """The values that attributes hold after the pass, and did not before."""
        self._model, self._known = model, known
        self._had = {id(own): dict(own) for own in attributes_in(model)}

    def look(self, numbers: Numbers, source: Callable[[Tensor], Source]) -> None:
        """Look at what they hold now, and have them hold it no more.

        Args:
            numbers: Of the values of the pass.
            source: Tells where a tensor comes from.
        """
        for path, module in self._model.named_modules():
            for name, value in [*module._buffers.items()]:
                place = Place(path, "_buffers", name)
                self._look_at(module._buffers, place, value, numbers, source)
                del value
            for name, value in [*vars(module).items()]:
                if name not in OF_EVERY_MODULE:
                    place = Place(path, "", name)
                    self._look_at(vars(module), place, value, numbers, source)
                    if is_plain_object(value):
                        for inner, part in [*vars(value).items()]:
                            place = Place(path, "", name, (("attr", inner),))
                            self._look_at(vars(value), place, part, numbers, source)
                            del part
                del value

    def _look_at(
        self,
        own: dict[str, Any],
        place: Place,
        value: Any,
        numbers: Numbers,
        source: Callable[[Tensor], Source],
    ) -> None:
        """Note what an attribute holds, if it was put there in the pass and is made of values."""
        if not isinstance(value, Tensor | list | tuple | dict):
            return
        name = place.steps[-1][1] if place.steps else place.name
        state = State.of(value, opaque=True)
        if all(numbers.of(leaf) is None for leaf in state.leaves):
            return
        if not isinstance(value, Tensor):
            had = self._had.get(id(own))
            if had is None or had.get(name) is value:
                return  # the same container, to which more was added
        self.kept[place] = State((), state.tree), tuple(map(source, state.leaves))
        if not place.kind and place not in self._known:
            self.left[place] = state.detached().value()
        # Whoever runs the pass puts attributes back; until then nothing is held.
        own[name] = state.replaced(torch.empty(0) for _ in state.leaves).value()
