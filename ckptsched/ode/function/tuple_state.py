"""States that are tuples of tensors, solved as one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import ExecutionError, WorkloadError
from ...tensors.wrapper_tensors import cannot_be_followed, type_name
from ..adaptive.step_size import Norm, rms_norm
from ..methods.explicit import Time, number
from ..methods.integrators import join, split
from .fingerprint import fingerprint


def flat_state(y0: Any) -> tuple[Tensor, tuple[torch.Size, ...] | None]:
    """The state as one tensor, and the shapes of its parts where it is a tuple.

    Args:
        y0: A floating-point or complex tensor, or a tuple of them.

    Raises:
        WorkloadError: It is something else, or its tensors do not go together.
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


def check_plain(y0: Tensor) -> None:
    """Refuse a state of another type: outputs within a budget are written into a plain tensor.

    Args:
        y0: The flat initial state.

    Raises:
        WorkloadError: It is a wrapper, of another layout, or of a type of its own.
    """
    reason = cannot_be_followed(y0)
    if not reason and type_name(y0):
        reason = (
            f"is a {type_name(y0)}; within a budget odeint solves plain tensors: give "
            "y0.as_subclass(torch.Tensor), or what the tensor wraps"
        )
    if reason:
        raise WorkloadError(f"y0 {reason}")


def joined_slope(found: Any, shapes: tuple[torch.Size, ...] | None, t: Time) -> Any:
    """The slope of a tuple of tensors as one flat tensor; any other slope is handed back.

    Args:
        found: What the right-hand side returned for a state of these shapes.
        shapes: Shapes of the parts of the state; None where it is one tensor.
        t: The time, for the message.

    Raises:
        ExecutionError: Not a tuple or list of tensors of these shapes. Flat, a part that is too
            long could make up for another that is too short.
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


@final
@dataclass(frozen=True, slots=True)
class _NormOfParts:
    """The norm on flat errors of a tuple: as torchdiffeq has it, the largest of its parts'."""

    shapes: tuple[torch.Size, ...]
    norm: Callable[[Any], Tensor] | None

    def __call__(self, errors: Tensor) -> Tensor:
        parts = split(errors, self.shapes)
        if self.norm is not None:
            return self.norm(parts)
        return torch.stack([rms_norm(part) for part in parts]).max()


def norm_of_parts(
    norm: Callable[[Any], Tensor] | None, shapes: tuple[torch.Size, ...] | None
) -> Norm:
    """The norm on flat errors of a norm on errors as the state is.

    Args:
        norm: It; None for the root of the mean square, of a tuple the largest of its parts'.
        shapes: Of the parts of the state; None where it is one tensor.
    """
    return (norm or rms_norm) if shapes is None else _NormOfParts(shapes, norm)


def identity_of_norm(norm: Norm) -> Hashable:
    """What tells a norm from others, also where it is made anew for each solve.

    Args:
        norm: What `norm_of_parts` returned.
    """
    if isinstance(norm, _NormOfParts):
        return norm.shapes, None if norm.norm is None else identity_of_norm(norm.norm)
    return fingerprint(norm) or object()  # what cannot be told is equal to nothing
