"""The continuous adjoint, solved backwards in time: constant memory, and an inexact gradient.

This is the baseline that ANODE argues against (optimise, then discretise): the gradient of the
continuous problem is discretised, which differs from the gradient of the discrete steps, and the
state is recovered by solving backwards, which may be unstable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..base.errors import ExecutionError
from ..recompute.graph_holds import Hold, keep
from .function.captures import outlive, unknown_leaves

SolveForward: TypeAlias = Callable[[Any, Tensor], Any]
"""From an initial state and times to the states at these times, without gradients."""
SolveAdjoint: TypeAlias = Callable[[Callable[..., Any], Any, Tensor], Any]
"""The same, with the right-hand side as its first argument."""


def backsolve(
    solve: SolveForward,
    solve_adjoint: SolveAdjoint,
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    params: Sequence[Tensor],
    *,
    all_wanted: bool = True,
) -> Tensor:
    """Solve forward, and let the backward solve the adjoint equation backwards.

    With a(t) = dL/dy(t) the adjoint equation is da/dt = -a df/dy, and dL/dp the integral of -a
    df/dp from the end to the start. State, adjoint and integral are solved together, from each
    output time to the one before; there the state begins anew with the one that the forward gave.

    States are flat; returned are those at all times, stacked. If `params` are `all_wanted`, the
    backward refuses a func that reads and trains others.

    Reference:
        Chen et al., Neural Ordinary Differential Equations (arXiv 1806.07366), algorithm 1.
    """
    settings = solve, solve_adjoint, func, all_wanted
    states: Tensor = _Backsolve.apply(settings, y0, t, *params)
    return states


class _Backsolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[SolveForward, SolveAdjoint, Callable[[Tensor, Tensor], Tensor], bool],
        y0: Tensor,
        t: Tensor,
        *params: Tensor,
    ) -> Tensor:
        solve, solve_adjoint, func, ctx.all_wanted = settings
        states: Tensor = solve(y0.detach(), t.detach())
        hold = Hold((solve_adjoint, func))
        keep(ctx, hold)
        ctx.save_for_backward(states, t, hold.fuse(), *params)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise ExecutionError(
                "the gradient of a backward solve cannot be differentiated again "
                "(create_graph=True); take gradient='exact'"
            )
        states, t, _, *params = ctx.saved_tensors
        hold: Hold = ctx.hold()
        solve, func = hold.value
        hold.begin()
        hold.end()  # which goes with what is saved, after this
        (gradient,) = grads
        rates = _Adjoint(func, params, all_wanted=ctx.all_wanted)
        times = torch.zeros_like(t)
        adjoint = gradient[-1]
        sums = [torch.zeros_like(p) for p in params]
        for j in range(len(t) - 1, 0, -1):
            if ctx.needs_input_grad[2]:
                times[j] = _inner(gradient[j], func(t[j], states[j]))
            ends = torch.stack([t[j], t[j - 1]]).detach()
            _, adjoint, *sums = (
                part[-1] for part in solve(rates, (states[j], adjoint, *sums), ends)
            )
            adjoint = adjoint + gradient[j - 1]
        if ctx.needs_input_grad[2]:
            before = adjoint - gradient[0]
            times[0] = -_inner(before, func(t[0], states[0]))
        return None, adjoint, times, *sums


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one.conj() * other).sum().real


class _Adjoint:
    """The right-hand side of state, adjoint and integral together."""

    def __init__(
        self,
        func: Callable[[Tensor, Tensor], Tensor],
        params: Sequence[Tensor],
        *,
        all_wanted: bool,
    ) -> None:
        self._func, self._params = func, params
        self._to_look_at = all_wanted

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, adjoint, *_ = state
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            slope = self._func(t, at)
        inputs = [at, *self._params]
        if not slope.requires_grad:
            return (slope, *(torch.zeros_like(x) for x in inputs))
        if self._to_look_at:
            self._to_look_at = False
            lost = unknown_leaves([slope.grad_fn], inputs)
            if lost:  # made by func itself, they go with the slope
                del slope
                self._look(lost, t)
                return self(t, state)
        found = torch.autograd.grad(slope, inputs, -adjoint, allow_unused=True)
        rates = (
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)
        )
        return (slope.detach(), *rates)

    def _look(self, unknown: list[Tensor], t: Tensor) -> None:
        """Refuse a func that reads a tensor whose gradient would be lost; once a backward."""
        lost = outlive(unknown)
        if lost:
            raise ExecutionError(
                f"at time {float(t):g} func reads a tensor of shape {tuple(lost[0].shape)} that "
                "requires a gradient and was not found in its modules, closure and attributes, so "
                "gradient='backsolve' would give it none; give odeint all of them as params, or "
                "register it as a parameter of the module"
            )
