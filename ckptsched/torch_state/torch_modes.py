"""Transforms, compilers and modes of torch around a call, with which no plan can be followed.

Some names here are private to torch. Each has a way out where it is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..base.errors import BudgetWarning, ExecutionError, WorkloadError
from .saved_hooks import innermost_hooks, no_hooks

_AS_IT_IS = nullcontext()

P = ParamSpec("P")
T = TypeVar("T")


def outside_of_compiled_code(function: Callable[P, T]) -> Callable[P, T]:
    """Let code that `torch.compile` compiles leave its graph to call a function.

    What the function calls runs as it is; a part that was compiled by itself stays compiled.
    """
    # torch's own decorator for such cases, as the public one imports the compiler at once.
    disable: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    found: Callable[P, T] = disable(function)
    return found


def transform_at_work(tensors: Iterable[Tensor]) -> str:
    """Name a transform of torch, such as "torch.func", under which only plain autograd can run.

    Empty where none is at work; `tensors` are the inputs and parameters of the model.
    """
    if _functorch_level() is not None:
        return "a transform of torch.func"
    if _forward_mode(tensors):
        return "forward-mode differentiation"
    return ""


def only_plain(
    tensors: Iterable[Tensor], what: str, *, cannot: str = "a plan", stacklevel: int
) -> bool:
    """Whether a transform of torch is at work, so that only plain autograd can run.

    Args:
        tensors: The inputs and parameters.
        what: What runs by plain autograd then, as it begins a sentence.
        cannot: What cannot follow the transform.
        stacklevel: Of the BudgetWarning, as if the caller gave it.
    """
    transform = transform_at_work(tensors)
    if transform:
        warnings.warn(
            f"{transform} is at work, which {cannot} cannot follow: {what} runs by plain autograd, "
            "and takes its memory",
            BudgetWarning,
            stacklevel=stacklevel + 1,
        )
    return bool(transform)


def under_transform() -> bool:
    """Whether any transform of torch.func, or forward-mode differentiation, is at work."""
    level = _forward_level()
    return _functorch_level() is not None or (level is not None and level >= 0)


def untransformed() -> AbstractContextManager[object]:
    """Around the handling of tensors that are nobody's data, such as the state of a generator.

    Where torch has no such switch nothing is switched off, and torch raises an error of its own.
    """
    if _functorch_level() is None:
        return _AS_IT_IS
    switch: Any = getattr(torch._C, "_DisableFuncTorch", nullcontext)
    found: AbstractContextManager[object] = switch()
    return found


def has_gradient(tensor: Tensor) -> bool:
    """Whether a derivative may be asked for; a transform hides what it follows: any may be."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or under_transform()


def as_number(value: Tensor) -> float:
    """Read a tensor of one entry; a WorkloadError where vmap makes it a number a sample."""
    try:
        return float(value.detach())
    except RuntimeError as error:
        if _functorch_level() is None:
            raise
        raise WorkloadError(
            "torch.func.vmap is at work, under which no value can be read that differs from sample "
            "to sample; times, and the sizes of adaptive steps, are such: put the batch into y0 as "
            "a dimension, or take a fixed grid of the same times for all samples"
        ) from error


def as_numbers(values: Tensor) -> list[float]:
    """Read a tensor of one dimension, also where a transform is at work; raises as `as_number`."""
    if _functorch_level() is None:
        found: list[float] = values.tolist()
        return found
    return [as_number(value) for value in values.unbind()]


def refuse_batched_gradients(gradients: Iterable[Tensor | None]) -> None:
    """Refuse several gradients at once, by an ExecutionError where a backward begins.

    They come from a transform of torch.func around it, or from the older one of
    `is_grads_batched=True`.
    """
    functorch: Any = getattr(torch._C, "_functorch", None)
    # Where torch has no such function it refuses our operations itself, by an error of its own.
    batched: Any = getattr(functorch, "is_legacy_batchedtensor", lambda gradient: False)
    if _functorch_level() is not None or any(batched(g) for g in gradients if g is not None):
        raise ExecutionError(
            "several gradients are asked for at once (is_grads_batched=True, vectorize=True, or a "
            "backward under torch.func.vmap), which a backward that runs steps again cannot give: "
            "ask for one after the other, or run without a budget"
        )


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


def is_exporting() -> bool:
    """Whether `torch.export` reads what is called, whose program is to be of plain operators."""
    # Until torch 2.10 `is_exporting` is true in what `torch.compile` reads as well.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return flag if isinstance(flag, bool) else torch.compiler.is_exporting()


def inside_backward() -> bool:
    """Whether a backward is at work that calls this, as `torch.utils.checkpoint` does."""
    task: Any = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def hidden_from_torch_checkpoint() -> AbstractContextManager[None]:
    """Keep `torch.utils.checkpoint` from what is saved inside, if it is what is around.

    It would take away what is saved, a plan's tapes among it, and have all of it computed again
    at once. Where torch does not tell of it, nothing is kept from it.
    """
    hooks = innermost_hooks()
    maker = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    if not maker.startswith(("_checkpoint_hook.", "_recomputation_hook.")):
        return _AS_IT_IS
    return no_hooks()  # what lies under it does not see what is saved either, as without a plan


def module_tracker_at_work() -> bool:
    """Whether `FlopCounterMode` or the like holds nodes of every graph, until it is left.

    It hangs hooks on them to know which module a backward belongs to. What it holds takes no data.
    Where torch does not tell of hooks on all modules, the answer is False.
    """
    hooks: Any = getattr(torch.nn.modules.module, "_global_forward_hooks", {})
    owners = (type(getattr(hook, "__self__", None)) for hook in hooks.values())
    return any(owner.__module__ == "torch.utils.module_tracker" for owner in owners)
