"""The modules of a model in a flat list, and whether they are the same as before.

A walk of the tree takes as long as a step of a small network, and everything that is checked at
each step would take one. What the tree is made of is noted once; a look at the children of each
module then tells whether a walk would find the same.
"""

from __future__ import annotations

from operator import is_
from typing import final

from torch import nn


@final
class Inventory:
    """All modules of a model, as they were when it was taken."""

    def __init__(self, model: nn.Module) -> None:
        """Walk the model once.

        Args:
            model: The model; a copy of the inventory with it belongs to the copy.
        """
        self.modules = tuple(model.modules())
        """In the order of `model.modules()`."""
        self._children = [tuple(module._modules.values()) for module in self.modules]
        self._parameters = [set(module._parameters) for module in self.modules]
        self._buffers = [set(module._buffers) for module in self.modules]

    def changed(self) -> str:
        """What was replaced, added, moved or taken out since; empty where nothing was."""
        for module, before in zip(self.modules, self._children, strict=True):
            now = module._modules
            # Most have no children. By identity: what a module is equal to is its own affair.
            if (now or before) and not (
                len(now) == len(before) and all(map(is_, now.values(), before))
            ):
                return "a module of the model"
        # The tensors may be others, as in `torch.func.functional_call`; not their places.
        for module, names in zip(self.modules, self._parameters, strict=True):
            if module._parameters.keys() != names:
                return f"a parameter of a {type(module).__name__}"
        for module, names in zip(self.modules, self._buffers, strict=True):
            if module._buffers.keys() != names:
                return f"a buffer of a {type(module).__name__}"
        return ""

    def training(self) -> list[bool]:
        """Which of the modules train, in their order."""
        return [module.training for module in self.modules]
