"""Looks at a model once: its modules, what they own, and whether a step still finds the same.

Everything that asks what a model is made of (profiler, executor, verifier) asks an `Inspection`. A
walk of the module tree takes as long as a step of a small network, so the tree is walked here
alone; before each step `Inspection.check` looks at every module of the flat list instead, without a
loop of Python's own where nothing has changed, and tells whether a walk would find the same.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, is_, methodcaller, ne
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from ..base.errors import CkptschedError, PlanMismatchError
from ..base.json_files import printable
from ..recompute.fsdp import HOOKS, class_before, has_hooks, own_hooks
from ..recompute.parameter_swap import Slot, Slots
from ..recompute.stateful_buffers import every_generator, own_generators
from ..torch_state.replay_context import AnyGenerator
from .stage_discovery import Outline, StagedModule
from .wrappers import forward_attribute, refuse_wrapped, unwrapped

_children_of = attrgetter("_modules")
_parameters_of = attrgetter("_parameters")
_buffers_of = attrgetter("_buffers")
_hooks_of = attrgetter(*HOOKS)
_forward_of = methodcaller("get", "forward")  # of what a module itself holds
# What an attribute may be that decides what a module computes: how many experts, which layers.
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})

Layout: TypeAlias = tuple[torch.Size, torch.dtype, torch.device, tuple[int, ...]]
"""Shape, dtype, device and strides of a parameter or buffer."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """Modules, parameters, buffers and stage lists of a model, found by one walk."""

    model: nn.Module
    modules: tuple[nn.Module, ...]
    """All modules, each once, in the order of `model.modules()`."""
    paths: tuple[str, ...]
    """Path of each module, as in `model.named_modules()`."""
    slots: Slots
    """The places of all parameters and buffers; asked for what is in them now."""
    outline: Outline
    """What its stages are made from."""
    has_generators: bool
    """Whether modules keep random generators of their own."""
    trained: tuple[bool, ...]
    """For each parameter whether it requires a gradient."""
    _listed: tuple[Hashable, ...]
    _tree: _Tree
    layouts: tuple[Layout, ...] = ()
    """Of the parameters, then of the buffers, as stages find them, once `with_layouts` has noted
    them: not every tensor that a model may own has one."""
    computed_in: torch.dtype | None = None
    """The dtype that FSDP casts parameters to when it gathers them; None where it leaves them."""

    @classmethod
    def of(cls, model: nn.Module, named: Sequence[tuple[str, nn.Module]] = ()) -> Inspection:
        """Look at a module that is not wrapped in anything.

        Args:
            model: The module.
            named: What `named_modules` of it has given, if it has been asked.
        """
        named = named or tuple(model.named_modules())
        modules = tuple([module for _, module in named])
        slots, outline = Slots(modules, flat=True), Outline.of(model)
        return cls(
            model=model,
            modules=modules,
            paths=tuple([path for path, _ in named]),
            slots=slots,
            outline=outline,
            has_generators=bool(own_generators(modules)),
            trained=_trained(slots),
            _listed=_listed(outline.containers),
            _tree=_Tree(modules),
        )

    def with_layouts(self, computed_in: torch.dtype | None) -> Inspection:
        """Record the layouts of parameters and buffers, which each step must find again.

        Args:
            computed_in: The dtype that FSDP casts parameters of floating point to when it gathers
                them; None where it leaves them.
        """
        layouts = _layouts(self.slots, computed_in, None)
        return replace(self, layouts=layouts, computed_in=computed_in)

    # -- what the model owns

    def named_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """The distinct parameters, then the distinct buffers, that are in place now.

        Yields:
            "parameter" or "buffer", the name as in the model's `state_dict`, and the tensor.
        """
        for kind, held_by in (("parameter", _parameters_of), ("buffer", _buffers_of)):
            seen = set[int]()
            for path, module in zip(self.paths, self.modules, strict=True):
                for name, tensor in held_by(module).items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield kind, _joined(path, name), tensor

    def parameter_name(self, parameter: Tensor) -> str:
        """Name of a parameter of the model; "?" for one that it does not own now."""
        return next((name for _, name, p in self.named_tensors() if p is parameter), "?")

    def name_of(self, place: Slot) -> str:
        """Name of a place as in the model's `state_dict`; empty where no module has it."""
        module, name = place
        pairs = zip(self.paths, self.modules, strict=True)
        return next((_joined(path, name) for path, m in pairs if m is module), "")

    def buffer_places(self, names: Iterable[str]) -> list[Slot]:
        """The places of some buffers.

        Args:
            names: As in the model's `state_dict`, control characters written as escapes.

        Raises:
            PlanMismatchError: The model has no such buffer, or two.
        """
        wanted, places = set(names), dict[str, Slot]()
        for path, module in zip(self.paths, self.modules, strict=True) if wanted else ():
            for name in module._buffers:
                full = printable(_joined(path, name))
                if full in wanted and places.setdefault(full, (module, name)) != (module, name):
                    raise PlanMismatchError(
                        f"two buffers of the model are called {full!r} once control characters are "
                        "written as escapes, and one of them is read and changed; give it another "
                        "name"
                    )
        for full in sorted(wanted - places.keys()):
            raise PlanMismatchError(
                f"the plan says that the buffer {full!r} is read and changed, and the model "
                "has none of that name; profile and plan again"
            )
        return [places[full] for full in sorted(wanted)]

    def generators(
        self, given: Iterable[object] = (), *, foreign: bool = False
    ) -> tuple[AnyGenerator, ...]:
        """The random generators that stages may draw from besides torch's default ones.

        Args:
            given: What a call of the model is given besides tensors.
            foreign: Whether those are among them that are not torch's.
        """
        if foreign:
            return every_generator(self.modules, given)
        return own_generators(self.modules if self.has_generators else (), given)

    # -- what changes from step to step

    def training(self) -> list[bool]:
        """Which of the modules train now, in their order."""
        return [module.training for module in self.modules]

    def trains_something_new(self) -> bool:
        """Whether something is trained in a place that was not there when this was made.

        Such as adapters, put in as everything else was frozen. It walks the model.
        """
        return any(p.requires_grad for p in Slots([self.model]).parameters())

    def check(self, waiting: Collection[int] = ()) -> None:
        """Raise if the model is no longer what was inspected.

        The tensors in the places may be others, as in `torch.func.functional_call`.

        Args:
            waiting: Ids of the parameters that FSDP is still to gather.

        Raises:
            PlanMismatchError: A module, a place for a tensor, a hook, a forward, a list of stages,
                a layout, or which parameters are trained, has changed.
        """
        self._check_tree()
        if _listed(self.outline.containers) != self._listed:
            raise PlanMismatchError(
                "a module lists other stages than when the model was made to follow the plan, as "
                "an ODEBlock does once its steps have changed; profile and plan again"
            )
        if _layouts(self.slots, self.computed_in, waiting) != self.layouts:
            if self.computed_in is not None:
                raise PlanMismatchError(
                    f"the plan is for parameters of {self.computed_in}, and the model has others: "
                    "give fully_shard a MixedPrecisionPolicy with this param_dtype for every part "
                    "and for the whole model, or profile and plan the model as it is"
                )
            raise PlanMismatchError(
                "parameters or buffers have other shapes, dtypes, strides or devices than when the "
                "model was made to follow the plan; profile and plan again"
            )
        if _trained(self.slots) != self.trained:
            raise PlanMismatchError(
                "other parameters require gradients than when the model was made to follow the "
                "plan; plan again after freezing or unfreezing"
            )

    def _check_tree(self) -> None:
        changed = self.changed()
        if changed and any(map(has_hooks, self.outline.containers)):
            raise PlanMismatchError(
                "a hook was added to a container since its parts became stages, which would "
                "skip it; profile and plan again, and the container is run as a whole"
            )
        if changed:
            raise PlanMismatchError(
                f"{changed} was replaced, added or taken out since the model was made to follow "
                "the plan; profile and plan again"
            )

    def changed(self) -> str:
        """Name what was replaced, added, moved or taken out since; empty if nothing was."""
        return self._tree.changed()

    def changed_settings(self) -> list[nn.Module]:
        """The modules with a number or a text among their attributes that is another since.

        Since this was made, or since the last call.
        """
        return self._tree.changed_settings()


def inspect_model(model: object, caller: str, error: type[CkptschedError]) -> Inspection:
    """Inspect a model that a user has given; of one that follows a plan, the model inside.

    Args:
        model: What a user has given.
        caller: Name of the function that it was given to.
        error: What to raise.

    Raises:
        CkptschedError: Of the class that was given: it is no module, or one that cannot be cut
            into stages because of what it is wrapped in, or has such a part. The message says what
            to give instead.
    """
    plain = unwrapped(model, caller, error)
    named = tuple(plain.named_modules())
    refuse_wrapped(named, caller, error)
    return Inspection.of(plain, named)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _trained(slots: Slots) -> tuple[bool, ...]:
    return tuple([p.requires_grad for p in slots.parameters()])


def _listed(containers: Iterable[nn.Module]) -> tuple[Hashable, ...]:
    """Keys of the stage lists of `StagedModule`s, which change when their stages do."""
    return tuple([m.stages_follow_from() for m in containers if isinstance(m, StagedModule)])


def _layouts(
    slots: Slots, computed_in: torch.dtype | None, waiting: Collection[int] | None
) -> tuple[Layout, ...]:
    """Layouts of parameters and buffers as stages will find them.

    Args:
        slots: Their places.
        computed_in: As in `dtype_of`.
        waiting: Ids of those that FSDP is still to gather and cast; None for all parameters.
    """
    owned = slots.parameters() + slots.buffers()
    if computed_in is None:
        return tuple([(t.shape, t.dtype, t.device, t.stride()) for t in owned])
    cast = [computed_in if waiting is None or id(t) in waiting else None for t in owned]
    return tuple(
        [
            (t.shape, dtype_of(t, dtype), t.device, t.stride())
            for t, dtype in zip(owned, cast, strict=True)
        ]
    )


def dtype_of(tensor: Tensor, computed_in: torch.dtype | None) -> torch.dtype:
    """The dtype in which stages find a parameter or buffer.

    Args:
        tensor: It, as the model owns it.
        computed_in: What FSDP casts parameters of floating point to when it gathers them; None
            where it leaves them.
    """
    cast = computed_in and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return computed_in if computed_in and cast else tensor.dtype


@final
class _Tree:
    """Contents of the module tree, recorded so that a change shows at a glance."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self._modules = modules
        self._children = tuple(chain.from_iterable(m._modules.values() for m in modules))
        self._counts = [len(module._modules) for module in modules]
        self._parameters = list(map(tuple, map(_parameters_of, modules)))
        self._buffers = list(map(tuple, map(_buffers_of, modules)))
        self._classes = list(map(class_before, modules))
        self._forwards = self._own_forwards()
        self._hooks = self._own_hooks()
        self._passed: object = None  # what code was found to be the same last
        # torch's own compute the same whatever their attributes are set to.
        mine = [m for m in modules if type(m).__module__.partition(".")[0] != "torch"]
        self._settings = [_settings(module) for module in mine]

    def __getstate__(self) -> dict[str, Any]:
        """All but what was found last, which tells hooks of one process."""
        return {**self.__dict__, "_passed": None}

    def changed(self) -> str:
        found = list(map(_children_of, self._modules))
        # By identity: what a module is equal to is its own affair.
        now = chain.from_iterable(map(dict.values, found))
        if list(map(len, found)) != self._counts or not all(map(is_, now, self._children)):
            return "a module of the model"
        for what, places, before in (
            ("parameter", _parameters_of, self._parameters),
            ("buffer", _buffers_of, self._buffers),
        ):
            names = list(map(tuple, map(places, self._modules)))
            if names != before:
                for module, one, other in zip(self._modules, names, before, strict=True):
                    if set(one) != set(other):
                        return f"a {what} of a {type(module).__name__}"
        return self._code_changed()

    def _code_changed(self) -> str:
        """The same of what modules run: their class, a forward of their own, their hooks."""
        forwards = self._own_forwards()
        if forwards != self._forwards:
            differs = list(map(ne, forwards, self._forwards)).index(True)
            return f"the forward of a {type(self._modules[differs]).__name__}"
        hooks = [*chain.from_iterable(map(_hooks_of, self._modules))]
        now = list(map(type, self._modules)), list(map(len, hooks)), [tuple(h) for h in hooks if h]
        if now == self._passed:
            return ""
        classes = list(map(class_before, self._modules))
        for what, found, before in (
            ("the class", classes, self._classes),
            ("a hook", self._own_hooks(), self._hooks),
        ):
            for module, one, other in zip(self._modules, found, before, strict=True):
                if one != other:
                    return f"{what} of a {type(module).__name__}"
        self._passed = now
        return ""

    def _own_forwards(self) -> list[Any]:
        """What modules have as a forward of their own; of the model, before it was fitted."""
        found = list(map(_forward_of, map(vars, self._modules)))
        found[0] = forward_attribute(self._modules[0])
        return found

    def _own_hooks(self) -> list[tuple[tuple[int, ...], ...]]:
        """The hooks of each module, FSDP's apart, and those that a wrapper brings."""
        return [tuple(tuple(own_hooks(m, kind)) for kind in HOOKS) for m in self._modules]

    def changed_settings(self) -> list[nn.Module]:
        found = []
        for k, (module, size, names, values) in enumerate(self._settings):
            own = module.__dict__
            if len(own) != size or [own.get(name) for name in names] != values:
                self._settings[k] = _settings(module)
                found.append(module)
        return found


def _settings(module: nn.Module) -> tuple[nn.Module, int, list[str], list[Any]]:
    """A module, how many attributes it has, and those that are numbers or texts."""
    own = module.__dict__
    names = [name for name, x in own.items() if type(x) in _PLAIN and name != "training"]
    return module, len(own), names, [own[name] for name in names]
