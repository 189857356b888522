"""Modules that wrap a model: those of ckptsched are taken off, others are refused by name.

A plan is for the stages of the model itself. Wrapped, it would be one stage without a word, or its
parameters could not be replaced while stages run.
"""

from __future__ import annotations

import abc
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import get_ident
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..base.errors import BudgetWarning, CkptschedError
from ..torch_state.replay_context import is_recomputing

_SHARED = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    # Hooks of the state_dict: what either of the two is given counts for both.
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def share(model: nn.Module, other: nn.Module) -> None:
    """Let another module own what a model owns, under the same names.

    Args:
        model: The model.
        other: A module without parameters, buffers and submodules of its own.
    """
    own = vars(model)
    vars(other).update({name: own[name] for name in _SHARED if name in own})


class InPlace(abc.ABC):
    """What runs in place of a model's forward, as an attribute of the model itself.

    So the model keeps its class, and its `__call__` runs its hooks around this.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note the forward that this takes the place of.

        Args:
            model: The model; its forward is not replaced yet.
        """
        self.model = model
        self.attribute = forward_attribute(model)
        """What the model had as an attribute of that name; None where it had its class's."""
        self.before = self.attribute or type(model).forward.__get__(model)
        """The forward that a call would have run."""
        self._off, self._retired = threading.local(), False
        functools.update_wrapper(self, self.before)  # its name, and its signature
        self.__func__ = Unbound(self)  # as a method has one
        self.__code__ = getattr(self.before, "__code__", None)  # torch.export names what it reads

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let calls from this thread run the forward of before."""
        depth = getattr(self._off, "depth", 0)
        self._off.depth = depth + 1
        try:
            yield
        finally:
            self._off.depth = depth

    def is_off(self) -> bool:
        """Whether calls from this thread run the forward of before."""
        return self._retired or getattr(self._off, "depth", 0) > 0

    @contextmanager
    def innermost(self) -> Iterator[None]:
        """Let this thread find the forward of before where others have wrapped this since.

        What they do is around this already, and may not be entered twice: autocast as a decorator
        then stays on for good.
        """
        held = vars(self.model)
        outer = held.get("forward")
        if outer is self or in_place_below(self.model) is not self:
            yield
            return
        below = held["forward"] = _Below(self, outer)
        try:
            yield
        finally:
            if held.get("forward") is below:
                held["forward"] = outer

    def retire(self) -> None:
        """Let all calls run the forward of before: where others hold on to this, and call it."""
        self._retired = True

    @property
    def is_retired(self) -> bool:
        """Whether it is for good that calls run the forward of before."""
        return self._retired

    @abc.abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""

    def __reduce__(self) -> tuple[Any, ...]:
        """The forward of before: a saved model is as it was."""
        if self.attribute is None:
            return getattr, (self.model, "forward")
        return functools.partial, (self.attribute,)


@final
class _Below:
    """A forward without what others have wrapped around it, for one thread."""

    def __init__(self, place: InPlace, outer: Any) -> None:
        self._place, self.outer, self._thread = place, outer, get_ident()
        functools.update_wrapper(self, place.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = get_ident() == self._thread
        return self._place.before(*args, **kwargs) if mine else self.outer(*args, **kwargs)


@final
class Unbound:
    """A fitted model's forward as a function of the model, as the method that it replaces has one.

    What wraps a forward and binds it to the model again, as accelerate does for its mixed
    precision, is copied with the model then, and calls this with the copy.
    """

    def __init__(self, place: InPlace) -> None:
        """Stand for the function of a method.

        Args:
            place: What is in place of the method.
        """
        self.place = place
        self.__name__ = "forward"
        with suppress(TypeError, ValueError):
            own = inspect.signature(place)
            model = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            self.__signature__ = own.replace(parameters=[model, *own.parameters.values()])

    def __call__(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Run a model: the fitted one by its plan, a copy by plain autograd.

        Args:
            model: The model.
            args: What it is called with.
            kwargs: The same by name.
        """
        if model is self.place.model:
            return self.place(*args, **kwargs)
        follows = in_place(model) is not None or is_recomputing()  # this is its forward of before
        if torch.is_grad_enabled() and model.training and not follows:
            warnings.warn(
                f"a copy of a fitted {type(model).__name__} runs by plain autograd, which keeps no "
                "budget, as its forward was wrapped after it was fitted; fit the copy, or fit the "
                "model once it is wrapped and copy it then",
                BudgetWarning,
                stacklevel=2,
            )
        return type(model).forward(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unbound:
        """Itself, as functions are: it is told which model it is to run."""
        return self


@final
class PlainForward(nn.Module):
    """A fitted model as one stage: called, it runs the forward of before, without the hooks.

    All that the model has is this one's, too: the two share their attributes.
    """

    __slots__ = ("_fitted",)

    _fitted: InPlace

    def __init__(self, fitted: InPlace) -> None:
        """Stand for a model.

        Args:
            fitted: What takes the place of its forward.
        """
        object.__setattr__(self, "__dict__", vars(fitted.model))
        object.__setattr__(self, "_fitted", fitted)

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The forward of before, with the names of its arguments."""
        found: Callable[..., Any] = self._fitted.before
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of before."""
        return self._fitted.before(*args, **kwargs)

    def __repr__(self) -> str:
        """As the model prints."""
        return repr(self._fitted.model)


def class_name(module: nn.Module) -> str:
    """The name of the class of a module, or of the model that it stands for.

    Args:
        module: Any module.
    """
    stands_for = module._fitted.model if isinstance(module, PlainForward) else module
    return type(stands_for).__name__


def in_place(module: nn.Module) -> InPlace | None:
    """What runs in place of a module's forward, if something of ours does."""
    found = vars(module).get("forward")
    return found if isinstance(found, InPlace) else None


def in_place_below(module: nn.Module) -> InPlace | None:
    """The same, also where others have wrapped it since, in ways that say what they wrap.

    Args:
        module: A model.
    """
    found = vars(module).get("forward")
    while found is not None:
        if isinstance(found, _Below):
            found = found.outer
        if isinstance(found, Unbound):
            found = found.place
        if isinstance(found, InPlace):
            if not found.is_retired:
                return found if found.model is module else None
            found = found.attribute
        elif isinstance(found, functools.partial):
            found = found.func
        else:
            found = getattr(found, "__func__", getattr(found, "__wrapped__", None))
    return None


def forward_attribute(module: nn.Module) -> Any:
    """A forward that a module has as an attribute of its own, ours apart; None for its class's."""
    found = vars(module).get("forward")
    if isinstance(found, _Below):
        return found.outer
    return found.attribute if isinstance(found, InPlace) else found


def plain_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Let calls of a model from this thread run the forward that it came with.

    Args:
        model: The model, fitted in place or not.
    """
    found = in_place_below(model)
    return nullcontext() if found is None else found.off()


class StandsFor(nn.Module, abc.ABC):
    """A module that owns what another one owns, and adds nothing to its `state_dict`."""

    def __init__(self, model: nn.Module) -> None:
        """Share everything that the model owns.

        Args:
            model: The model; not a submodule, so that keys of the `state_dict` stay its own.
        """
        super().__init__()
        share(model, self)
        self.__dict__["_model"] = model
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        """What is not found here is the model's: its methods, its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_model" not in self.__dict__:  # while it is being made, or copied
                raise
            return getattr(self.model, name)

    @property
    def model(self) -> nn.Module:
        """The model itself, which runs by plain autograd."""
        return cast(nn.Module, self.__dict__["_model"])

    def train(self, mode: bool = True) -> Any:
        """Set training mode, here and in the model, as the model does it."""
        self.training = mode
        self.model.train(mode)
        return self

    # What the model does in a way of its own is done in that way: extra state, hooks, versions.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model."""
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Where this is part of another module that loads.
        self.model._load_from_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's."""
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The model's."""
        return self.model.named_buffers(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's."""
        return self.model.parameters(recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The model's."""
        return self.model.buffers(recurse)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Moves and casts; a recurrent layer keeps a second list of its parameters up to date there.
        self.model._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self


_COMPILED = (
    "is compiled as a whole, so no stage in it can be run by itself; compile the stages of the "
    "plain model first (for k, stage in enumerate(model): model[k] = torch.compile(stage)), then "
    "profile, plan and train that"
)
_BY_NAME = {
    "OptimizedModule": _COMPILED,
    "ScriptModule": (
        "was made by torch.jit.script or torch.jit.trace, so its parameters cannot be replaced "
        "while a stage runs; give the Python module that it was made from"
    ),
    "DistributedDataParallel": (
        "hands the gradients of the module in it to other processes; fit the module in it "
        "(model.module) before it is wrapped, or profile and plan that, and wrap what "
        "checkpointed() returns: "
        "DistributedDataParallel(ckptsched.checkpointed(model.module, plan))"
    ),
    "DataParallel": (
        "runs copies of the module in it in several threads, which a plan cannot follow; give the "
        "module in it (model.module), and wrap what checkpointed() returns in "
        "DistributedDataParallel, one process a device"
    ),
    "FullyShardedDataParallel": (
        "keeps its parameters in flat shards; profile and plan the module that it wraps, and shard "
        "by torch.distributed.fsdp.fully_shard"
    ),
}
# Compiled parts are fine: they are stages, or inside of one.
_NOT_AS_PARTS = frozenset(_BY_NAME) - {"OptimizedModule"}


def unwrapped(model: object, caller: str, error: type[CkptschedError]) -> nn.Module:
    """The model inside a module that makes it follow a plan; another module itself.

    Args:
        model: What a user has given.
        caller: Name of the function that it was given to.
        error: What to raise if it is no module.
    """
    while isinstance(model, StandsFor):
        model = model.model
    if not isinstance(model, nn.Module):
        raise error(f"{caller} needs an nn.Module, found a {type(model).__name__}")
    return model


def refuse_wrapped(
    named: Iterable[tuple[str, nn.Module]], caller: str, error: type[CkptschedError]
) -> None:
    """Raise if a model is, or contains, a module that cannot be cut into stages.

    Args:
        named: The modules of a model by path, first the model itself.
        caller: Name of the function that it was given to.
        error: What to raise; the message says what to give instead.
    """
    for path, module in named:
        kind = _torch_kind(module)
        if kind is not None and (not path or kind in _NOT_AS_PARTS):
            where = f"{path!r} of the model" if path else "the model"
            raise error(f"{caller}: {where} is a {type(module).__name__}: it {_BY_NAME[kind]}")
        if not path and is_compiled(module):
            raise error(f"{caller}: the model has been compiled by model.compile(): it {_COMPILED}")


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: what it computes is then compiled as a whole."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _torch_kind(module: nn.Module) -> str | None:
    """Which of torch's wrappers a module is; by name, as to import them takes long."""
    for kind in type(module).__mro__:
        if kind.__name__ in _BY_NAME and kind.__module__.startswith("torch."):
            return kind.__name__
    return None
