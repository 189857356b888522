"""One step of an explicit Runge-Kutta method on tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ExecutionError
from .tableaus import ButcherTableau

Slope = Callable[[float, Tensor], Tensor]
"""The right-hand side f(t, z) of dz/dt = f(t, z): time and state to a slope like the state."""


def runge_kutta_step(f: Slope, tableau: ButcherTableau, t: float, h: float, z: Tensor) -> Tensor:
    """Advance dz/dt = f(t, z) by one step: z + h sum_i b_i k_i.

    All sums are `torch.add(..., alpha=)`, whose backward needs no operand: besides what f
    itself saves, autograd keeps nothing of the step. A slope is let go as soon as no later
    argument needs it, and coefficients that are zero cost nothing.

    Args:
        f: Right-hand side.
        tableau: Coefficients a, b, c of the method.
        t: Time at the start of the step.
        h: Size of the step, in units of t; may be negative.
        z: State at time t, of any shape and floating-point or complex dtype.

    Returns:
        The state at time t + h; same shape and dtype.

    Raises:
        ExecutionError: f returns something else than a slope of the state's shape and dtype.
    """
    last_use = _last_uses(tableau)
    slopes: dict[int, Tensor] = {}
    result = z
    for i, row in enumerate(tableau.a):
        argument = z
        for j, a_ij in enumerate(row):
            if a_ij != 0.0:
                argument = torch.add(argument, slopes[j], alpha=h * a_ij)
            if last_use[j] == i:
                del slopes[j]
        slope = f(t + tableau.c[i] * h, argument)
        del argument
        if i == 0:
            _check_slope(slope, z)
        if tableau.b[i] != 0.0:
            result = torch.add(result, slope, alpha=h * tableau.b[i])
        if last_use[i] > i:
            slopes[i] = slope
        del slope
    return result


def _last_uses(tableau: ButcherTableau) -> list[int]:
    """For each slope the last row of a that needs it; its own index where none does."""
    last = list(range(tableau.slopes))
    for i, row in enumerate(tableau.a):
        for j, a_ij in enumerate(row):
            if a_ij != 0.0:
                last[j] = i
    return last


def _check_slope(slope: Tensor, z: Tensor) -> None:
    """Only the first slope is looked at: the others come from the same function."""
    if not isinstance(slope, Tensor):
        raise ExecutionError(
            f"f returned a {type(slope).__name__}; the right-hand side of dz/dt = f must "
            f"return a tensor of the state's shape {tuple(z.shape)}"
        )
    if slope.shape == z.shape and slope.dtype == z.dtype:
        return
    # Under autocast a slope may be narrower than the state: the sum is the state's dtype.
    if (
        slope.shape == z.shape
        and torch.is_autocast_enabled(z.device.type)
        and torch.promote_types(slope.dtype, z.dtype) == z.dtype
    ):
        return
    raise ExecutionError(
        f"f maps a state of shape {tuple(z.shape)} and {z.dtype} to a slope of shape "
        f"{tuple(slope.shape)} and {slope.dtype}; both must agree for dz/dt = f, so let the "
        "last layer of f have as many outputs as the first has inputs, and cast in f or "
        "before the block"
    )
