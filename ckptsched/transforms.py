"""What else of torch is at work around a call: there a plan cannot be followed.

Some names here are private to torch. Each has a way out where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
T = TypeVar("T")


def outside_of_compiled_code(function: Callable[P, T]) -> Callable[P, T]:
    """Let code that `torch.compile` compiles leave its graph to call a function.

    What the function calls runs as it is; a part that was compiled by itself stays compiled.

    Args:
        function: The function, which the compiler is not to read.
    """
    # torch's own decorator for such cases, as the public one imports the compiler at once.
    disable: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    found: Callable[P, T] = disable(function)
    return found


def transform_at_work(tensors: Iterable[Tensor]) -> str:
    """Name what transforms the computation, so that only plain autograd can run it.

    Args:
        tensors: Inputs and parameters of the model.

    Returns:
        Such as "torch.func"; empty where nothing does.
    """
    if _functorch_level() is not None:
        return "a transform of torch.func"
    if _forward_mode(tensors):
        return "forward-mode differentiation"
    return ""


def _functorch_level() -> int | None:
    """Depth of `torch.func.vmap`, `grad` and the like; None outside.

    Where torch has no such function the answer is None: torch then refuses our nodes inside a
    transform with an error of its own, so nothing goes wrong silently.
    """
    functorch: Any = getattr(torch._C, "_functorch", None)
    level = getattr(functorch, "maybe_current_level", None)
    found: int | None = None if level is None else level()
    return found


def _forward_mode(tensors: Iterable[Tensor]) -> bool:
    level = _forward_level()
    if level is not None:
        return level >= 0
    return any(_is_dual(tensor) for tensor in tensors)


def _forward_level() -> int | None:
    """Depth of forward-mode differentiation, -1 outside; None where torch does not tell."""
    level: int | None = getattr(forward_ad, "_current_level", None)
    return level


def _is_dual(tensor: Tensor) -> bool:
    try:
        dual: Any = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    except RuntimeError:  # outside of a dual level
        return False
    return dual.tangent is not None


def inside_backward() -> bool:
    """Whether a backward is at work that calls this, as `torch.utils.checkpoint` does."""
    task: Any = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


@contextmanager
def hidden_from_torch_checkpoint() -> Iterator[None]:
    """Keep `torch.utils.checkpoint` from what is saved inside, if it is what is around.

    It would take away what is saved, a plan's tapes among it, and have all of it computed again
    at once. Where torch does not tell of it, nothing is kept from it.
    """
    engine: Any = getattr(torch._C, "_autograd", None)
    top: Any = getattr(engine, "_top_saved_tensors_default_hooks", None)
    hooks = [] if top is None else [top(True)]
    maker = getattr(hooks[0][0], "__qualname__", "") if hooks and hooks[0] else ""
    if not maker.startswith(("_checkpoint_hook.", "_recomputation_hook.")):
        yield
        return
    # Whatever lies under it does not see what is saved either, as in plain autograd.
    engine._pop_saved_tensors_default_hooks()
    while (under := top(True)) is not None:
        hooks.append(under)
        engine._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            engine._push_saved_tensors_default_hooks(pack, unpack)
