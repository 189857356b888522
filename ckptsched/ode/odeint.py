"""`odeint`: torchdiffeq's signature and meaning, plus a byte budget and exact gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..budget import Budget
from ..context import Recomputing
from ..errors import BudgetWarning, IntegrationError, WorkloadError
from ..holds import Hold, joined
from ..transforms import (
    has_gradient,
    outside_of_compiled_code,
    transform_at_work,
    under_transform,
)
from .adaptively import solve_adaptively
from .backsolve import backsolve
from .closure import Closure, find_closure
from .grid import Grid, check_times, make_grid
from .integrators import Implicit, Integrator, RungeKutta, find_integrator, join, parts_of, split
from .parts import flat_state
from .planned import solve_planned
from .slopes import slope_count
from .solve import Call, Solve


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    method: Any = None,
    options: Mapping[str, Any] | None = None,
    budget: int | float | str | Budget | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    params: Iterable[Tensor] | None = None,
    gradient: Literal["exact", "backsolve"] = "exact",
    granularity: Literal["step", "slope"] = "step",
    solver: str = "auto",
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and give y at all times t.

    Arguments, their meaning, and the result are those of `torchdiffeq.odeint`. What is more: with
    a `budget`, a training step through the solve stays within so many bytes. The steps are then
    the stages of a chain that is profiled and planned when a shape is first seen; the plan is kept
    with `func` and serves all calls of that shape, whatever their times. Gradients are those of
    the discrete steps that were taken: bit for bit those without a budget, or to rounding where
    adaptive steps run again. How many there were, and what they took, tells `solve_adaptive`, which
    solves the same and returns statistics besides.

    Args:
        func: The right-hand side: called as func(t, y) with t a tensor of no dimensions in y's
            real dtype and y as y0 is; returns the slope, like y. It may call
            `torch.autograd.grad` itself. Parameters that it trains are found where it is a module,
            or a function that reads modules and tensors from its closure, globals or attributes.
        y0: Initial state: a floating-point or complex tensor, or a tuple of tensors, which are
            solved as one flat tensor, as torchdiffeq does.
        t: Times, one-dimensional, rising or falling, at least two; the first is that of y0.
        rtol: Relative tolerance of adaptive methods.
        atol: Absolute tolerance of adaptive methods.
        method: A name, a `ButcherTableau`, or a step function (f, t, h, y) to the state at t + h.
            Fixed grid: "euler", "midpoint", "heun" ("heun2"), "ralston", "heun3", "rk4" (the 3/8
            rule, as in torchdiffeq), "rk4_classic", "implicit_euler", "trapezoid"
            ("crank_nicolson"), "leapfrog"; "bosh3", "dopri5", "tsit5" and "dopri8" where the
            options name a grid. Without options, these four choose their steps. None is "dopri5".
        options: Of a fixed grid: `step_size`, or `grid_constructor` (func, y0, t) to the times of
            the steps; with neither, a step leads from each time to the next. Outputs between two
            steps lie on the line between them. Of adaptive methods: `norm`, and what `StepControl`
            takes, such as `first_step` and `max_num_steps`; `meet_times` lets steps end at t.
        budget: Bytes that forward and backward may use, the outputs and their gradient included:
            a number, text such as "200MiB", a share such as "40%" (on fixed grids: what storing
            everything needs is not known before adaptive steps), or a `Budget`. None stores
            everything, as plain autograd does.
        loss: From the states that are returned to one number, as the training step computes it: the
            budget then holds with it, whatever it takes, which is measured once. None provides for
            the states, their gradient, and a few more of the size of the state at one time, such as
            a mean square at a single time takes. Read with a budget only.
        params: Tensors that gradients are wanted for, to be sure that they were found; as
            torchdiffeq's `adjoint_params`. None takes what is found.
        gradient: "exact": of the discrete steps. "backsolve": the continuous adjoint, solved
            backwards in time, as torchdiffeq's `odeint_adjoint` does: **inexact**, for comparison;
            its memory does not grow with the steps, so it takes no budget.
        granularity: What a stage of the chain is within a budget: a "step", or each "slope" of a
            Runge-Kutta step, so that one evaluation of func at a time needs its tape. The least
            budget is smaller then, and planning takes longer.
        solver: Name of the solver of schedules, or "auto".

    Returns:
        y at all times, of shape (len(t), *y0.shape); a tuple of such where y0 is a tuple.

    Raises:
        WorkloadError: Arguments that make no sense; the message says which.
        IntegrationError: A state is not finite, an implicit step cannot be solved, or an adaptive
            one gets too small; the error has the time.
        ExecutionError: func does not return a slope like the state; the message has the time.
        InfeasibleBudgetError: The budget is too small; the message names the least that works.
        BudgetSyntaxError: The budget cannot be read.
        ProfileError: The steps cannot be measured, or use a tensor whose gradient would be lost;
            or the loss is none of the outputs.

    Reference:
        Chen et al., Neural Ordinary Differential Equations (arXiv 1806.07366), for the interface;
        Gholami et al., ANODE (arXiv 1902.10298), for gradients of the discrete steps.

    Example:
        >>> decay = lambda t, y: -y
        >>> y = odeint(decay, torch.ones(1), torch.linspace(0, 1, 11), method="rk4")
        >>> y.shape, round(y[-1].item(), 5)
        (torch.Size([11, 1]), 0.36788)
    """
    check_times(t)
    if not callable(func) or isinstance(func, type):
        raise WorkloadError(f"func is {func!r}; give a module or a function func(t, y)")
    if gradient not in ("exact", "backsolve") or (gradient == "backsolve" and budget is not None):
        raise WorkloadError(
            f"gradient is {gradient!r}{'' if budget is None else ' with a budget'}; give 'exact', "
            "or 'backsolve' without a budget"
        )
    flat, shapes = flat_state(y0)
    t = t.to(flat.device)
    given = dict(options or {})
    integrator = find_integrator("dopri5" if method is None else method, shapes)
    closure = find_closure(func)
    if under_transform() and (gradient == "backsolve" or isinstance(integrator, Implicit)):
        raise WorkloadError(
            "a transform of torch.func, or forward-mode differentiation, is at work, which can "
            "follow neither implicit steps nor gradient='backsolve', as their gradients are made "
            "otherwise than by torch's own operations; take an explicit method with "
            "gradient='exact', or torch.autograd"
        )
    if gradient == "backsolve":
        trained = closure.parameters if params is None else tuple(params)
        trained = tuple(p for p in trained if p.requires_grad)

        def forward(f: Callable[..., Any], y: Any, times: Tensor) -> Any:
            with torch.no_grad():
                return odeint(f, y, times, rtol=rtol, atol=atol, method=method, options=options)

        def slope(time: Tensor, y: Tensor) -> Tensor:
            found: Tensor = join(func(time, split(y, shapes)), shapes)
            return found

        found = backsolve(forward, slope, flat, t, trained, all_wanted=params is None)
        return parts_of(found, shapes)
    if params is not None:
        _check_params(tuple(params), closure, budget is not None)
    if _is_adaptive(integrator, given):
        tableau = cast(RungeKutta, integrator).tableau
        states = solve_adaptively(
            func, flat, t, tableau, shapes, closure, (rtol, atol), given, budget, loss
        )
        return parts_of(states, shapes)
    grid = make_grid(func, y0, t, given, timed=has_gradient(t))
    counts = tuple(map(len, grid.outputs))
    solve = Solve(closure, integrator, shapes, counts, _parts(integrator, granularity))
    outputs = _run(solve, integrator, func, flat, grid, closure, budget, solver, loss)
    _check_finite(solve, Call(func, grid, closure, integrator), flat, outputs)
    return parts_of(outputs, shapes)


def _check_params(params: tuple[Tensor, ...], closure: Closure, planned: bool) -> None:
    """Refuse a parameter that a plan would not see; plain autograd sees them all."""
    found = {id(p) for p in closure.parameters}
    missing = [k for k, p in enumerate(params) if p.requires_grad and id(p) not in found]
    if missing and planned:
        raise WorkloadError(
            f"params[{missing[0]}] was not found in what func reads: its modules, closure, globals "
            "and attributes; give func as a module that owns it, or without a budget"
        )


def _parts(integrator: Integrator, granularity: str) -> int:
    """How many stages a step is."""
    if granularity not in ("step", "slope"):
        raise WorkloadError(f"granularity is {granularity!r}; give 'step' or 'slope'")
    if granularity == "step":
        return 1
    if not isinstance(integrator, RungeKutta):
        raise WorkloadError(
            f"granularity 'slope' takes the steps of Runge-Kutta methods apart, found "
            f"{type(integrator).__name__}; give 'step'"
        )
    return slope_count(integrator.tableau)


def _is_adaptive(integrator: Integrator, options: Mapping[str, Any]) -> bool:
    """Whether the method chooses its steps: it can tell their error, and no grid is named."""
    return (
        isinstance(integrator, RungeKutta)
        and integrator.tableau.is_fsal
        and options.get("step_size") is None
        and options.get("grid_constructor") is None
    )


@outside_of_compiled_code
def _run(
    solve: Solve,
    integrator: Integrator,
    func: Callable[..., Any],
    y0: Tensor,
    grid: Grid,
    closure: Closure,
    budget: int | float | str | Budget | None,
    solver: str,
    loss: Callable[[Any], Tensor] | None,
) -> Tensor:
    """All outputs, stacked: by plain steps, or planned where a backward is possible."""
    clock = () if grid.clock is None else (grid.clock,)
    inputs = (y0, *clock, *closure.parameters)
    if budget is not None and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        transform = transform_at_work(inputs)
        if not transform:
            return solve_planned(solve, integrator, func, y0, grid, closure, budget, solver, loss)
        warnings.warn(
            f"{transform} is at work, which a plan cannot follow: the solve runs by plain "
            "autograd, and takes its memory",
            BudgetWarning,
            stacklevel=3,
        )
    call = Call(func, grid, closure, integrator)
    z = y0
    for index in range(grid.steps):
        z = solve.step(index, z, call, *clock)
    states = [*call.kept, z]
    call.kept = []
    if isinstance(solve.integrator, Implicit) and z.requires_grad:
        # Whose backward evaluates func, and refers to the call weakly.
        return joined(Hold(call), *(state.unsqueeze(0) for state in states), fused=True)
    return torch.stack(states)


def _check_finite(solve: Solve, call: Call, y0: Tensor, outputs: Tensor) -> None:
    """Refuse a solution that is not finite; where it went wrong is found by running again."""
    seen = outputs.detach()
    # A sum takes no memory; one that overflows is looked at more closely.
    if transform_at_work((seen,)) or bool(seen.sum().isfinite()) or bool(seen.isfinite().all()):
        return
    with torch.no_grad(), Recomputing():
        z, grid = y0.detach(), call.grid
        for index in range(grid.steps):
            before, z = z, solve.step(index, z, call)
            call.kept.clear()
            if not bool(z.isfinite().all()):
                break
    start, end = grid.times[index], grid.times[index + 1]
    largest = float(before[before.isfinite()].abs().max()) if before.isfinite().any() else 0.0
    given = " (y0 itself is not finite)" if not bool(y0.isfinite().all()) else ""
    raise IntegrationError(
        f"the state is not finite after step {index} of {grid.steps}, from time {start!r} to "
        f"{end!r}{given}; the largest entry before it was {largest:.3g}. Take smaller steps, an "
        "implicit method if the problem is stiff, or bound what func returns",
        time=end,
        step=index,
    )
