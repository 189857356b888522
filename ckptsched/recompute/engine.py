"""A short way into autograd's engine, for graphs of a few small nodes.

`torch.autograd.backward` looks at its arguments in Python before it calls the engine, which
takes as long as the backward of a tiny stage. Here they are known to be right. The engine's own
method is not public, so it is tried once, when it is first needed: the engine starts threads, which
a process forked later would miss. Where it is not as expected, the public way is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..torch_state.locks import Lent

Root: TypeAlias = Tensor | GradientEdge

_Backward: TypeAlias = Callable[[tuple[Root, ...], tuple[Tensor, ...]], None]


def edge_of(tensor: Tensor) -> GradientEdge:
    """Where the gradient of a tensor that requires one goes; it does not keep the tensor."""
    node = tensor.grad_fn
    # A function written in Python is not kept by its node, and a leaf has no node yet: torch
    # knows what to do. Others make up nearly all.
    if node is None or isinstance(node, _PYTHON_NODE):
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def publicly(roots: tuple[Root, ...], gradients: tuple[Tensor, ...]) -> None:
    """Go back from some roots to all leaves, as torch documents it."""
    torch.autograd.backward(cast(Any, roots), gradients)


def directly(engine: Any) -> _Backward:
    """The same by the engine's own method."""
    run = engine.run_backward

    def go(roots: tuple[Root, ...], gradients: tuple[Tensor, ...]) -> None:
        # keep_graph, create_graph, inputs
        run(roots, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)

    return go


def choose(engine: Any) -> _Backward:
    """The short way, if it does what it should with this version of torch.

    Args:
        engine: The engine; None where torch has none under the name that is known.
    """
    try:
        way = directly(engine)
        leaf = torch.zeros(1, requires_grad=True)
        with torch.enable_grad():
            doubled = leaf * 2
        way((edge_of(doubled),), (torch.ones(1),))
        right = leaf.grad is not None and leaf.grad.item() == 2.0
    except (AttributeError, TypeError, RuntimeError):
        right = False
    return way if right else publicly


# What is not there matches nothing that it should not: every edge is then asked of torch.
_PYTHON_NODE: type = getattr(torch._C, "_FunctionBase", object)


@functools.cache
def _way() -> _Backward:
    return choose(getattr(torch.autograd.Variable, "_execution_engine", None))


def go_back(roots: tuple[Root, ...], gradients: tuple[Tensor, ...]) -> None:
    """Run autograd's engine from some roots to all leaves; the thread's locks are lent meanwhile.

    Args:
        roots: Where to begin.
        gradients: One a root, of its shape and dtype.
    """
    way = _way()
    with Lent():
        way(roots, gradients)


def counter(count: Any) -> Callable[[], int] | None:
    """A function that counts the graph nodes of the calling thread; None if torch has none.

    Args:
        count: What should tell; None where torch has nothing under the name that is known.
    """
    try:
        leaf = torch.zeros(1, requires_grad=True)
        with torch.enable_grad():
            before = count()
            made = leaf * 2
            right = count() == before + 1
            right = right and made.grad_fn is not None and made.grad_fn._sequence_nr() == before
    except (AttributeError, TypeError, RuntimeError):
        right = False
    return cast("Callable[[], int]", count) if right else None


nodes_made = counter(getattr(torch._C._autograd, "_get_sequence_nr", None))
"""How many nodes the calling thread has made so far: two runs of a stage that differ in it have
not computed the same. None where torch does not tell."""
