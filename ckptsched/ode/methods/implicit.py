"""One step of an implicit method, solved by Newton's method with a matrix-free linear solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...base.errors import ExecutionError, IntegrationError
from ...torch_state.torch_modes import refuse_batched_gradients
from .explicit import Slope, Time, add, number, slope_at
from .gmres import gmres

_MOST_NEWTON = 50
_MOST_HALVINGS = 8
_ROUNDING = 8.0  # residuals of so many units in the last place are rounding
_STAGNANT = 1e4  # and of so many, where Newton's method gets no further


def theta_step(f: Slope, theta: float, t: Time, h: Time, z: Tensor) -> Tensor:
    """Advance dz/dt = f(t, z) by z_1 = z + h (1 - theta) f(t, z) + h theta f(t + h, z_1).

    The equation is solved to the rounding of the dtype, by Newton's method; its linear systems by
    GMRES, from products with the Jacobian alone. The gradient is that of the solution (implicit
    function theorem): the step's own equation, evaluated once at z_1, is what autograd keeps, and
    the backward solves one linear system with the transposed Jacobian, for which it evaluates f
    once more. It is right to the rounding of these solutions, and not differentiable again.

    Args:
        f: Right-hand side, whose gradient can itself be differentiated.
        theta: 1 for backward Euler (order 1), 1/2 for the trapezoidal rule (order 2).
        t: Time at the start of the step.
        h: Size of the step; may be negative.
        z: State at time t, real.

    Returns:
        The state at time t + h.

    Raises:
        IntegrationError: Newton's method does not converge; the error has the time.
        ExecutionError: f returns something else than a slope of the state's shape and dtype.

    Reference:
        Knoll and Keyes, Jacobian-free Newton-Krylov methods (J. Comp. Phys. 193, 2004).
    """
    if z.is_complex():
        raise ExecutionError(
            f"implicit methods solve for real states, found {z.dtype}; give the real and the "
            "imaginary part as two tensors"
        )
    known = z
    if theta != 1.0:
        known = add(z, slope_at(f, t, z), h * (1.0 - theta))
    end, weight = t + h, number(h) * theta
    solution = _solve(f, end, weight, known.detach(), z.detach(), (number(t), number(h)))
    if not torch.is_grad_enabled():
        return solution
    corrected = add(known, slope_at(f, end, solution), h * theta)
    # What is left of the equation is rounding: its value does not count, its gradient does.
    jacobian_at = end.detach() if isinstance(end, Tensor) else end
    made: Tensor = _Inverse.apply(corrected, solution, f, jacobian_at, weight)
    return made


class _Inverse(torch.autograd.Function):
    """Stands for (I - weight df/dz)^-1 in front of the step's equation."""

    @staticmethod
    def forward(
        ctx: Any, corrected: Tensor, solution: Tensor, f: Slope, end: Time, weight: float
    ) -> Tensor:
        ctx.save_for_backward(solution)
        ctx.f, ctx.end, ctx.weight = f, end, weight
        return solution.view_as(solution)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_batched_gradients(grads)
        if torch.is_grad_enabled():
            raise ExecutionError(
                "the gradient of an implicit step cannot be differentiated again "
                "(create_graph=True); take an explicit method for second derivatives"
            )
        (solution,) = ctx.saved_tensors
        with torch.enable_grad():
            z = solution.detach().requires_grad_()
            slope = ctx.f(ctx.end, z)

        multiply = partial(_product, slope, z, ctx.weight)
        solved, residual = gmres(multiply, grads[0], tolerance=_ROUNDING * _eps(z))
        if residual > _STAGNANT * _eps(z):
            raise IntegrationError(
                f"the linear system of an implicit step's gradient, at time {number(ctx.end):g}, "
                f"was solved to a relative residual of {residual:.1e} only; take smaller steps",
                time=number(ctx.end),
            )
        return solved, None, None, None, None


def _product(of: Tensor | None, at: Tensor, weight: float, w: Tensor) -> Tensor:
    """The tensor w less its weighted product from the left with a Jacobian, where there is one."""
    if of is None or not of.requires_grad:
        return w
    (found,) = torch.autograd.grad(of, at, w, retain_graph=True, allow_unused=True)
    return w if found is None else torch.add(w, found, alpha=-weight)


def _eps(z: Tensor) -> float:
    return torch.finfo(z.dtype).eps


def _solve(
    f: Slope,
    end: Time,
    weight: float,
    known: Tensor,
    guess: Tensor,
    where: tuple[float, float],
) -> Tensor:
    """Find z with z = known + weight f(end, z)."""
    end = end.detach() if isinstance(end, Tensor) else end
    z, eps = guess, _eps(guess)
    residual, multiply, scale = _linearise(f, end, weight, known, z)
    size = _norm(residual)
    if not math.isfinite(size):
        raise IntegrationError(
            f"f gives a slope that is not finite for the implicit step from time {where[0]:g} of "
            f"size {where[1]:g}, at the state before it; bound what f returns",
            time=where[0],
        )
    for _ in range(_MOST_NEWTON):
        if size <= _ROUNDING * eps * scale:
            return z
        change, _ = gmres(multiply, -residual, tolerance=max(1e-6, 4 * eps))
        length = 1.0
        for _ in range(_MOST_HALVINGS):
            ahead = torch.add(z, change, alpha=length)
            found = _linearise(f, end, weight, known, ahead)
            if _norm(found[0]) < size:
                break
            length /= 2
        else:
            if size <= _STAGNANT * eps * scale:
                return z
            break
        z, (residual, multiply, scale), size = ahead, found, _norm(found[0])
    if size <= _STAGNANT * eps * scale:
        return z
    raise IntegrationError(
        f"Newton's method for the implicit step from time {where[0]:g} of size {where[1]:g} "
        f"stopped at a residual of {size:.1e}, where {_ROUNDING * eps * scale:.1e} was wanted; "
        "take smaller steps, or let f be smooth there",
        time=where[0],
    )


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _linearise(
    f: Slope, end: Time, weight: float, known: Tensor, z: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor], float]:
    """The residual at z, products with its Jacobian, and the size of the terms that it sums.

    A product from the right is the gradient of a product from the left, so that anything that
    can be differentiated twice will do.
    """
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        slope = slope_at(f, end, at)
        w = torch.zeros_like(z).requires_grad_()
        left = None
        if slope.requires_grad:
            (left,) = torch.autograd.grad(slope, at, w, create_graph=True, allow_unused=True)
    value = slope.detach()
    residual = torch.add(z - known, value, alpha=-weight)
    multiply = partial(_product, left, w, weight)
    return residual, multiply, _norm(z) + _norm(known) + abs(weight) * _norm(value)
