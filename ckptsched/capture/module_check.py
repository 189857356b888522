"""The modules of a model in a flat list, and whether they are the same as before.

A walk of the tree takes as long as a step of a small network, and everything that is checked at
each step would take one. What the tree is made of is noted once; a look at each module, without
a loop of Python's own where nothing has changed, then tells whether a walk would find the same.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_, methodcaller, ne
from typing import Any, final

from torch import nn

from ..recompute.fsdp import class_before, own_hooks

_children_of = attrgetter("_modules")
_parameters_of = attrgetter("_parameters")
_buffers_of = attrgetter("_buffers")
_hooks_of = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_forward_of = methodcaller("get", "forward")  # of what a module itself holds
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What an attribute may be that decides what a module computes: how many experts, which layers.
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


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
        self._flat = tuple(chain.from_iterable(self._children))
        self._counts = list(map(len, self._children))
        self._parameters = list(map(tuple, map(_parameters_of, self.modules)))
        self._buffers = list(map(tuple, map(_buffers_of, self.modules)))
        self._kinds = list(map(class_before, self.modules))
        self._forwards = list(map(_forward_of, map(vars, self.modules)))
        self._hooks = self._own_hooks()
        self._passed: object = None
        # torch's own compute the same whatever their attributes are set to.
        mine = [m for m in self.modules if type(m).__module__.partition(".")[0] != "torch"]
        self._settings = [_settings(module) for module in mine]

    def changed(self) -> str:
        """What was replaced, added, moved or taken out since; empty where nothing was."""
        found = list(map(_children_of, self.modules))
        # By identity: what a module is equal to is its own affair.
        now = chain.from_iterable(map(dict.values, found))
        if list(map(len, found)) != self._counts or not all(map(is_, now, self._flat)):
            return "a module of the model"
        # The tensors may be others, as in `torch.func.functional_call`; not their places.
        for what, places, before in (
            ("parameter", _parameters_of, self._parameters),
            ("buffer", _buffers_of, self._buffers),
        ):
            names = list(map(tuple, map(places, self.modules)))
            if names != before:
                for module, one, other in zip(self.modules, names, before, strict=True):
                    if set(one) != set(other):
                        return f"a {what} of a {type(module).__name__}"
        return self._code_changed()

    def _code_changed(self) -> str:
        """The same of what modules run: their class, a forward of their own, their hooks."""
        forwards = list(map(_forward_of, map(vars, self.modules)))
        if forwards != self._forwards:
            differs = list(map(ne, forwards, self._forwards)).index(True)
            return f"the forward of a {type(self.modules[differs]).__name__}"
        hooks = [*chain.from_iterable(map(_hooks_of, self.modules))]
        now = list(map(type, self.modules)), list(map(len, hooks)), [tuple(h) for h in hooks if h]
        if now == self._passed:
            return ""
        kinds = list(map(class_before, self.modules))
        for what, found, before in (
            ("the class", kinds, self._kinds),
            ("a hook", self._own_hooks(), self._hooks),
        ):
            for module, one, other in zip(self.modules, found, before, strict=True):
                if one != other:
                    return f"{what} of a {type(module).__name__}"
        self._passed = now
        return ""

    def _own_hooks(self) -> list[tuple[tuple[int, ...], ...]]:
        """The hooks of each module, FSDP's apart, and those that a wrapper brings."""
        return [tuple(tuple(own_hooks(m, kind)) for kind in _HOOKS) for m in self.modules]

    def __getstate__(self) -> dict[str, Any]:
        """All but what was found last, which tells hooks of one process."""
        return {**self.__dict__, "_passed": None}

    def changed_settings(self) -> list[nn.Module]:
        """The modules with a number or a text among their attributes that is another since.

        Since the inventory was taken, or since the last call.
        """
        found = []
        for k, (module, size, names, values) in enumerate(self._settings):
            own = module.__dict__
            if len(own) != size or [own.get(name) for name in names] != values:
                self._settings[k] = _settings(module)
                found.append(module)
        return found

    def training(self) -> list[bool]:
        """Which of the modules train, in their order."""
        return [module.training for module in self.modules]


def _settings(module: nn.Module) -> tuple[nn.Module, int, list[str], list[Any]]:
    """A module, how many attributes it has, and those that are numbers or texts."""
    own = module.__dict__
    names = [name for name, x in own.items() if type(x) in _PLAIN and name != "training"]
    return module, len(own), names, [own[name] for name in names]
