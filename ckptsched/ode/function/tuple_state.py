"""States that are tuples of tensors, solved as one flat tensor."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...base.errors import ExecutionError, WorkloadError
from ...recompute.graph_holds import handed, take_over
from ...tensors.wrapper_tensors import cannot_be_followed, type_name
from ..methods.explicit import Time, number

Shapes: TypeAlias = tuple[torch.Size, ...] | None
"""Shapes of the parts of a state that is a tuple; None where it is one tensor."""


def flat_state(y0: Any) -> tuple[Tensor, Shapes]:
    """The initial state as one tensor, and the shapes of its parts where it is a tuple.

    A WorkloadError where it is no floating-point or complex tensor, nor a tuple of such of one
    dtype on one device.
    """
    parts = y0 if isinstance(y0, tuple) else (y0,)
    for k, part in enumerate(parts):
        if not isinstance(part, Tensor) or not (part.is_floating_point() or part.is_complex()):
            found = str(part.dtype) if isinstance(part, Tensor) else f"a {type(part).__name__}"
            name = f"y0[{k}]" if isinstance(y0, tuple) else "y0"
            raise WorkloadError(
                f"{name} is {found}; give a floating-point or complex tensor, or a tuple of them, "
                "none of which is a tuple itself"
            )
    if isinstance(y0, Tensor):
        return y0, None
    if not parts:
        raise WorkloadError("y0 is a tuple without tensors; give at least one")
    if len({(part.dtype, part.device) for part in parts}) != 1:
        found = ", ".join(f"y0[{k}] {p.dtype} on {p.device}" for k, p in enumerate(parts))
        raise WorkloadError(
            f"the tensors of y0 must be of one dtype on one device, found {found}; they are "
            "solved as one: cast or move them"
        )
    shapes = tuple(part.shape for part in parts)
    return join(y0, shapes), shapes


def join(y: Any, shapes: Shapes) -> Any:
    """A state or slope that is a tuple as one flat tensor; one tensor is handed back."""
    if shapes is None or not isinstance(y, (tuple, list)):
        return y
    return torch.cat([part.reshape(-1) for part in y])


def split(y: Tensor, shapes: Shapes, leading: int = 0) -> Any:
    """A flat tensor, or several along leading dimensions, as a tuple of views; one as it is."""
    if shapes is None:
        return y
    parts = torch.split(y, [shape.numel() for shape in shapes], dim=-1)
    return tuple(
        part.reshape((*y.shape[:leading], *shape))
        for part, shape in zip(parts, shapes, strict=True)
    )


def parts_of(y: Tensor, shapes: Shapes) -> Any:
    """Flat states, stacked, as the caller gets them; the parts hold what y holds for a backward."""
    if shapes is None:
        return y
    return handed(split(y, shapes, leading=1), take_over(y))


def check_plain(y0: Tensor) -> None:
    """Refuse a flat state of another type: outputs within a budget go into a plain tensor."""
    reason = cannot_be_followed(y0)
    if not reason and type_name(y0):
        reason = (
            f"is a {type_name(y0)}; within a budget odeint solves plain tensors: give "
            "y0.as_subclass(torch.Tensor), or what the tensor wraps"
        )
    if reason:
        raise WorkloadError(f"y0 {reason}")


def joined_slope(found: Any, shapes: Shapes, t: Time) -> Any:
    """The slope of a tuple of tensors as one flat tensor; any other slope is handed back.

    An ExecutionError where it is no tuple or list of tensors of these shapes. Flat, a part that is
    too long could make up for another that is too short.
    """
    if shapes is None:
        return found
    told: object = type(found).__name__
    if isinstance(found, (tuple, list)):
        told = tuple(tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found)
    if told != (expected := tuple(map(tuple, shapes))):
        raise ExecutionError(
            f"at time {number(t):g} f returned {told} for a state of shapes {expected}; let it "
            "return a tuple with the slope of each part"
        )
    return join(found, shapes)
