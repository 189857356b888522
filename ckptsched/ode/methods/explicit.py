"""One step of an explicit Runge-Kutta method on tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ...base.errors import ExecutionError
from .tableau import ButcherTableau

Time: TypeAlias = float | Tensor
"""A time or a step size: a number, or a tensor of no dimensions where its gradient is wanted."""

Slope: TypeAlias = Callable[[Time, Tensor], Tensor]
"""The right-hand side f(t, z) of dz/dt = f(t, z): time and state to a slope like the state."""


def runge_kutta_step(f: Slope, tableau: ButcherTableau, t: Time, h: Time, z: Tensor) -> Tensor:
    """Advance dz/dt = f(t, z) by one step: z + h sum_i b_i k_i.

    All sums are `torch.add(..., alpha=)`, whose backward needs no operand: besides the tensors
    that f itself saves, autograd keeps nothing of the step, unless h is a tensor that requires a
    gradient. A slope is let go as soon as no later argument needs it, coefficients that are zero
    cost nothing, and a slope that the result does not depend on, such as the last of a method
    whose last slope is the next step's first, is not evaluated.

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
    last_use = last_uses(tableau)
    slopes: dict[int, Tensor] = {}
    result = z
    for i in last_use:
        argument = z
        for j, a_ij in enumerate(tableau.a[i]):
            if a_ij != 0.0:
                argument = add(argument, slopes[j], h * a_ij)
                if last_use[j] == i:
                    del slopes[j]
        slope = slope_at(f, t + tableau.c[i] * h, argument)
        del argument
        if tableau.b[i] != 0.0:
            result = add(result, slope, h * tableau.b[i])
        if last_use[i] > i:
            slopes[i] = slope
        del slope
    return result


def add(z: Tensor, slope: Tensor, weight: Time) -> Tensor:
    """The sum z + weight * slope, in z's dtype, with the gradient of a weight that is a tensor."""
    if isinstance(weight, Tensor):
        return z + weight.to(z.dtype.to_real()) * slope
    return torch.add(z, slope, alpha=weight)


def weighted_sum(
    z: Tensor, h: Time, weights: Sequence[float], slopes: Mapping[int, Tensor]
) -> Tensor:
    """The state z + h sum_i w_i k_i; slopes k_i with a weight of zero need not be there."""
    for i, weight in enumerate(weights):
        if weight != 0.0:
            z = add(z, slopes[i], h * weight)
    return z


def number(t: Time) -> float:
    """A time as a number, without its graph."""
    return float(t.detach()) if isinstance(t, Tensor) else t


def as_time(t: Time, z: Tensor) -> Tensor:
    """A time as f is given it: a tensor of no dimensions in the real dtype of state z."""
    dtype = z.dtype.to_real()
    if isinstance(t, Tensor):
        return t.to(device=z.device, dtype=dtype)
    # Filled on the device: a tensor made from a Python number would be copied there, and on
    # CUDA the step would wait for it.
    return torch.full((), t, dtype=dtype, device=z.device)


@functools.cache
def last_uses(tableau: ButcherTableau, keep: frozenset[int] = frozenset()) -> dict[int, int]:
    """For each slope that a step needs the last row of a that reads it; itself where none does.

    So for those in `keep` and what they need. Cached, as it is asked for at every step.
    """
    last = {i: i for i in tableau.needed_for(keep)}
    for i in last:
        for j, a_ij in enumerate(tableau.a[i]):
            if a_ij != 0.0:
                last[j] = i
    return last


def slope_at(f: Slope, t: Time, z: Tensor) -> Tensor:
    """Evaluate a right-hand side, and check the slope with `check_slope`."""
    slope = f(t, z)
    check_slope(slope, z, t)
    return slope


def check_slope(slope: Tensor, z: Tensor, t: Time) -> None:
    """Refuse, by an ExecutionError with the time, a slope that does not fit the state z."""
    if not isinstance(slope, Tensor):
        raise ExecutionError(
            f"at time {number(t):g} f returned a {type(slope).__name__}; the right-hand side of "
            f"dz/dt = f must return a tensor of the state's shape {tuple(z.shape)}"
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
        f"at time {number(t):g} f maps a state of shape {tuple(z.shape)} and {z.dtype} to a slope "
        f"of shape {tuple(slope.shape)} and {slope.dtype}; both must agree for dz/dt = f, so let "
        "the last layer of f have as many outputs as the first has inputs, and cast in f or "
        "before the block"
    )
