"""Tolerances of adaptive steps: one number, one a part of the state, or one an entry."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...base.errors import WorkloadError
from ..function.tuple_state import Shapes

Tolerance: TypeAlias = float | Tensor
"""A number, or a tensor of the flat state's shape and real dtype."""


def read_tolerances(
    rtol: Any, atol: Any, y0: Tensor, shapes: Shapes
) -> tuple[Tolerance, Tolerance]:
    """The relative and the absolute tolerance, as torchdiffeq reads them.

    Each is a number, or a tensor that broadcasts to the state; where that is a tuple, a number, or
    a sequence of such, one a part.

    Raises:
        WorkloadError: One that cannot be read, does not fit the state, is negative or not finite,
            or requires a gradient; or both are zero somewhere.
    """
    found = _read("rtol", rtol, y0, shapes), _read("atol", atol, y0, shapes)
    positive = found[0] + found[1] > 0
    if not (bool(positive.all()) if isinstance(positive, Tensor) else positive):
        where = "" if all(isinstance(x, float) for x in found) else " somewhere"
        raise WorkloadError(
            f"rtol={_shown(rtol)} and atol={_shown(atol)} are both zero{where}; give two that are "
            "not negative, at least one of them positive"
        )
    return found


def _read(name: str, given: Any, y0: Tensor, shapes: Shapes) -> Tolerance:
    several = isinstance(given, (tuple, list)) or (isinstance(given, Tensor) and given.dim() > 0)
    if shapes is None or not several:
        return _fitted(name, given, y0, y0.shape)
    if len(given) != len(shapes):
        raise WorkloadError(
            f"{name} has {len(given)} parts, and the state {len(shapes)}; give a number, or one "
            "number or tensor for each part"
        )
    parts = [
        _fitted(f"{name}[{k}]", part, y0, shape)
        for k, (part, shape) in enumerate(zip(given, shapes, strict=True))
    ]
    like = y0.new_empty((), dtype=y0.dtype.to_real())
    return torch.cat(
        [
            part.reshape(-1) if isinstance(part, Tensor) else like.new_full((shape.numel(),), part)
            for part, shape in zip(parts, shapes, strict=True)
        ]
    )


def _fitted(name: str, given: Any, y0: Tensor, shape: torch.Size) -> Tolerance:
    """One tolerance, for one tensor of a shape."""
    if isinstance(given, (int, float)) and 0 <= given < math.inf:
        return float(given)  # and nothing is copied to a device, or waited for there
    if isinstance(given, Tensor) and given.requires_grad:
        raise WorkloadError(f"{name} requires a gradient, and there is none of it; detach it")
    try:
        if torch.as_tensor(given).is_complex():
            raise TypeError  # torch would leave out the imaginary part
        value = torch.as_tensor(given, dtype=torch.float64).to(y0.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkloadError(
            f"{name} is {_shown(given)}; give a number, a tensor, or for a tuple as state one for "
            "each part"
        ) from error
    if not bool(((value >= 0) & (value < math.inf)).all()):
        raise WorkloadError(f"{name}={_shown(given)}; give what is finite and not negative")
    if not value.dim():
        return float(value)
    if value.dim() == 1 and value.numel() == shape.numel():
        value = value.reshape(shape)  # as torchdiffeq takes it, flat
    try:
        fitted = value.to(y0.dtype.to_real()).expand(shape)
    except RuntimeError as error:
        raise WorkloadError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to {tuple(shape)}; "
            "give a number, or a tensor with one entry for each of the state's"
        ) from error
    return fitted.contiguous()


def _shown(given: Any) -> str:
    if isinstance(given, Tensor) and given.dim():
        return f"a tensor of shape {tuple(given.shape)}"
    return f"{given!r:.80}"
