"""What is done before a model is recorded: caches off, and what its first forward sets up.

Models of transformers keep keys and values for a next token, which no training step uses, unless
they are told not to. And many models set themselves up in the first forward: a flag, a table, hooks
that they put in. A recording must know the model as it is from then on.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...base.errors import ProfileError
from ...tensors.comparison import same_values
from ...tensors.pytree import State
from ...torch_state.foreign_generators import ForeignGenerators
from ...torch_state.replay_context import RandomState
from ..inspection import Inspection
from ..model_state import left_as_it_was
from .attributes import attributes_of

_CACHE = "use_cache"
_GLOBAL_HOOKS = tuple(
    f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")
)


def without_cache(inputs: State) -> State:
    """The same call, in which no cache is asked for.

    Args:
        inputs: What a model is called with, as `(args, kwargs)`, taken apart.
    """
    args, kwargs = inputs.value()
    if kwargs.get(_CACHE) is not True:
        return inputs
    return State.of((args, {**kwargs, _CACHE: False}), opaque=True)


def caching(module: nn.Module) -> tuple[Any, ...]:
    """The configurations in a module that ask for caches.

    Args:
        module: A model, or a part of one.
    """
    found = {id(config): config for config in (vars(m).get("config") for m in module.modules())}
    return tuple([c for c in found.values() if getattr(c, _CACHE, None) is True])


@contextmanager
def switched_off(configurations: Iterable[Any]) -> Iterator[None]:
    """Have configurations ask for no caches within a `with` block.

    Args:
        configurations: Those that ask for caches.
    """
    try:
        for configuration in configurations:
            setattr(configuration, _CACHE, False)
        yield
    finally:
        for configuration in configurations:
            setattr(configuration, _CACHE, True)


def caches_off(model: nn.Module, inputs: State) -> AbstractContextManager[None]:
    """Turn off what the configurations of a model say of caches, and say so.

    Args:
        model: The model.
        inputs: What it is called with.
    """
    on, generates = caching(model), getattr(model, "can_generate", None)
    if without_cache(inputs) is not inputs or (on and callable(generates) and generates()):
        warnings.warn(
            f"the {type(model).__name__} would keep keys and values for a next token, which a "
            "training step has no use for: it is recorded with use_cache=False, and gives none",
            stacklevel=4,
        )
    return switched_off(on)


def set_up(inspection: Inspection, inputs: State, device: torch.device) -> bool:
    """Run a model once, if its first forward changes attributes and those after it do not.

    Its parameters, buffers and random generators stay as they were, and so do its results. What it
    has set up besides stays, as after any forward.

    Args:
        inspection: The model.
        inputs: What it is called with.
        device: Where it lies.

    Returns:
        Whether it was run.
    """
    try:
        return _set_up(inspection, inputs, device)
    except Exception:  # it needs gradients: its first forward is that of a step
        return False


def _set_up(inspection: Inspection, inputs: State, device: torch.device) -> bool:
    generators = inspection.generators(inputs.constants())
    model = inspection.model
    with left_as_it_was(inspection, RandomState.take(device, generators)):
        first, once = _run(inspection, inputs, device), _plain_tensors(model)
        after = attributes_of(model)
        second, twice = _run(inspection, inputs, device), _plain_tensors(model)
        settles = after == attributes_of(model)
        same = first.tree == second.tree and all(map(same_values, first.leaves, second.leaves))
        lasting = {place for place, tensor in once.items() if twice.get(place) is tensor}
    if settles and same:
        before = _plain_tensors(model)
        _run(inspection, inputs, device)
        for path, name in _plain_tensors(model):
            if (path, name) not in lasting:  # made anew in each forward
                own = vars(model.get_submodule(path))
                own.pop(name) if (path, name) not in before else own.update(
                    {name: before[path, name]}
                )
    return settles and same


def _plain_tensors(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """The tensors that modules keep as attributes, by path and name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def fails(model: nn.Module, inputs: State) -> bool:
    """Whether a model fails on a call also when nobody looks on.

    Args:
        model: The model.
        inputs: What it is called with.
    """
    args, kwargs = inputs.value()
    try:
        with torch.enable_grad():
            model.forward(*args, **kwargs)
    except Exception:
        return True
    return False


def refuse_unready(model: nn.Module) -> None:
    """Refuse what no recording can begin with.

    Args:
        model: The model.

    Raises:
        ProfileError: It has parameters or buffers without a shape yet, or all modules of the
            process have hooks.
    """
    for path, part in model.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if is_lazy(tensor):
                raise ProfileError(
                    f"{path}.{name} of the model has no shape yet: run the model once, under "
                    "torch.no_grad, before it is recorded"
                )
    hooks = (getattr(torch.nn.modules.module, name, None) for name in _GLOBAL_HOOKS)
    if any(hooks):
        raise ProfileError(
            "hooks are registered for all modules of the process, such as those of a profiler, "
            "which stages would run without; take them off before the model is recorded"
        )


def _run(inspection: Inspection, inputs: State, device: torch.device) -> State:
    """One forward, after which parameters, buffers and generators are as they were before."""
    model = inspection.model
    random = RandomState.take(device, inspection.generators(inputs.constants()))
    foreign = ForeignGenerators.of(inspection.modules)
    places: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for m in inspection.modules for held in (m._parameters, m._buffers)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        args, kwargs = inputs.value()
        with torch.no_grad():
            return State.of(model.forward(*args, **kwargs), opaque=True)
    finally:
        for held, before in places:
            held.clear()
            held.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not same_values(buffer, value):
                    buffer.copy_(value)
        random.restore()
        foreign.restore()


_Cached: type = type(functools.lru_cache(lambda: None))


def forget_cached(model: nn.Module) -> None:
    """Empty the caches in which methods keep results by their arguments, as functools offers them.

    They hold tensors of earlier calls, as arguments and as results, where nobody sees them. To
    empty a cache changes nothing that is computed.

    Args:
        model: The model; its modules and their classes are looked through.
    """
    homes: dict[int, object] = {}
    for module in model.modules():
        homes |= {id(home): home for home in (module, *type(module).__mro__)}
    for home in homes.values():
        for held in [*vars(home).values()]:
            value = getattr(held, "__func__", held)  # of a static method
            for found in (value, *_closed_over(value)):
                if isinstance(found, _Cached):
                    found.cache_clear()  # type: ignore[attr-defined]


def _closed_over(value: object, depth: int = 4) -> Iterator[object]:
    """What a function of Python closes over, and the functions among that."""
    for cell in getattr(value, "__closure__", None) or () if depth else ():
        with suppress(ValueError):  # not filled yet
            yield cell.cell_contents
            yield from _closed_over(cell.cell_contents, depth - 1)
