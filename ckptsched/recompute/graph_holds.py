"""Holds what a graph needs for its backward in a way that Python can collect.

A module that keeps what it has computed is a circle: the module, its tensor, the tensor's graph,
and what the graph runs again in its backward, the module. Python's collector finds its way from a
tensor to the one node that made it, where that is a function in Python, and no further: from node
to node the way leads through C++. So the node whose output is handed out holds everything, those
before it refer to that weakly, and where autograd lets a graph go after a backward, so does the
hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor


@final
class Hold:
    """Keeps an object alive as long as a backward may come."""

    __slots__ = ("__weakref__", "_begun", "_going_back", "_spent", "besides", "value")

    def __init__(self, value: Any) -> None:
        """Hold something."""
        self.value = value
        """None once no backward can come."""
        self.besides: Any = None
        """What else is held."""
        self._begun = self._going_back = self._spent = False

    def fuse(self) -> Tensor:
        """A tensor without bytes, for a node to save: where autograd lets it go, so does this."""
        tensor = torch.empty(0)
        tensor._ckptsched_fuse = _Fuse(weakref.ref(self))  # type: ignore[attr-defined]
        return tensor

    def begin(self) -> None:
        """A backward begins."""
        self._begun = self._going_back = True

    def end(self) -> None:
        """The backward has ended, or failed."""
        self._going_back = False
        self._look()

    def spend(self) -> None:
        """No other backward can begin."""
        # Hooks of the caller may save another tensor instead: the fuse then goes before any begins.
        self._spent = self._begun
        self._look()

    def _look(self) -> None:
        if self._spent and not self._going_back:
            self.value = self.besides = None


@final
class _Fuse:
    """Tells a hold when it is gone itself."""

    __slots__ = ("_hold",)

    def __init__(self, hold: weakref.ref[Hold]) -> None:
        self._hold = hold

    def __del__(self) -> None:
        hold = self._hold()
        if hold is not None:
            hold.spend()


def keep(ctx: Any, hold: Hold) -> None:
    """Let a node hold something, until another takes it over.

    Args:
        ctx: Of the node.
        hold: What is held; its `hold` from here on is a weak reference to it.
    """
    ctx.hold, ctx.keeps = weakref.ref(hold), hold


def take_over(output: Tensor) -> Hold | None:
    """Take what the node holds that made a tensor, to be held by one after it.

    Args:
        output: The tensor.

    Returns:
        None where it holds nothing.
    """
    node = output.grad_fn
    held: Hold | None = getattr(node, "keeps", None)
    if held is not None:
        node.keeps = None  # type: ignore[union-attr]
    return held


class _Handed(torch.autograd.Function):
    """The same tensor, whose node holds something."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, hold: Hold) -> Tensor:
        keep(ctx, hold)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Joined(torch.autograd.Function):
    """Tensors one after the other, whose node holds something."""

    @staticmethod
    def forward(ctx: Any, hold: Hold, fused: bool, *tensors: Tensor) -> Tensor:
        keep(ctx, hold)
        ctx.counts, ctx.fused = [len(tensor) for tensor in tensors], fused
        if fused:
            ctx.save_for_backward(hold.fuse())
        return torch.cat(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hold = ctx.hold()
        if ctx.fused and hold is not None:
            hold.begin()
            _at_the_end(hold.end)
        return None, None, *torch.split(grads[0], ctx.counts)


def handed(tensors: tuple[Tensor, ...], hold: Hold | None) -> tuple[Tensor, ...]:
    """The same tensors, each of which holds something."""
    if hold is None:
        return tensors
    return tuple(_Handed.apply(x, hold) if x.requires_grad else x for x in tensors)


def joined(hold: Hold | None, *tensors: Tensor, fused: bool = False) -> Tensor:
    """Tensors along their first dimension, as one that holds something.

    Args:
        hold: What; None for nothing.
        tensors: The tensors.
        fused: Whether that is to go after a backward; no node before does so.
    """
    if hold is None:
        return torch.cat(tensors)
    result: Tensor = _Joined.apply(hold, fused, *tensors)
    return result


def _at_the_end(call: Callable[[], None]) -> None:
    """Call something once the backward that is going on has come to its end."""
    # No public API; without it what is held stays until the graph goes.
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    queue = getattr(engine, "queue_callback", None)
    if queue is not None:
        queue(call)
