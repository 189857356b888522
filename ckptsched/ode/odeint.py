"""`odeint`: torchdiffeq's signature and meaning, plus a byte budget and exact gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast, final

import torch
from torch import Tensor

from ..base.budget import Budget
from ..base.errors import WorkloadError
from ..torch_state.torch_modes import has_gradient, outside_of_compiled_code, under_transform
from .adaptive.norms import norm_of_parts
from .adaptive.solve import Limits, make_problem, solve_flat
from .adjoint_arguments import AdjointSettings, hand_on_callbacks
from .continuous_adjoint import backsolve
from .fixed.budgeted import Request
from .fixed.solve import solve_on_grid
from .fixed.step_chain import Call
from .fixed.time_grid import check_times, make_grid
from .function.callbacks import check_callbacks
from .function.captures import Closure, find_closure
from .function.options import (
    read_control,
    read_function,
    read_options,
    read_tensors,
    refuse_events,
)
from .function.tuple_state import flat_state, join, parts_of, split
from .methods.integrators import Implicit, RungeKutta, find_integrator, is_adaptive


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: Any = None,
    options: Mapping[str, Any] | None = None,
    budget: int | float | str | Budget | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    params: Iterable[Tensor] | None = None,
    gradient: Literal["exact", "backsolve"] = "exact",
    granularity: Literal["step", "slope"] = "step",
    solver: str = "auto",
    event_fn: Callable[..., Any] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: Any = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and give y at all times t.

    Arguments, their meaning, and the result are those of `torchdiffeq.odeint`. What is more: with
    a `budget`, a training step through the solve stays within so many bytes. The steps are then
    the stages of a chain that is profiled and planned when a shape is first seen; the plan is kept
    with `func` and serves all calls of that shape, whatever their times. Gradients are those of
    the discrete steps that were taken: bit for bit those without a budget, or to rounding where
    adaptive steps run again. `solve_adaptive` solves the same, and returns statistics besides.

    Args:
        func: The right-hand side: called as func(t, y) with t a tensor of no dimensions in y's
            real dtype and y as y0 is; returns the slope, like y. It may call
            `torch.autograd.grad` itself. Parameters that it trains are found where it is a module,
            or a function that reads modules and tensors from its closure, globals or attributes.
        y0: Initial state: a floating-point or complex tensor, or a tuple of tensors, which are
            solved as one flat tensor, as torchdiffeq does.
        t: Times, one-dimensional, rising or falling, at least two; the first is that of y0.
        rtol: Relative tolerance of adaptive methods: a number, or a tensor that broadcasts to the
            state; where that is a tuple, a number, or a number or tensor for each part.
        atol: Absolute tolerance of adaptive methods, the same.
        method: A name, a `ButcherTableau`, or a step function (f, t, h, y) to the state at t + h.
            Fixed grid: "euler", "midpoint", "heun" ("heun2"), "ralston", "heun3", "rk4" (the 3/8
            rule, as in torchdiffeq), "rk4_classic", "implicit_euler", "trapezoid"
            ("crank_nicolson"), "leapfrog" (for q and p of which neither's slope depends on itself);
            "bosh3", "dopri5", "tsit5" and "dopri8" where the
            options name a grid. Without options, these four choose their steps. None is "dopri5".
        options: For a fixed grid `step_size`, or `grid_constructor` (func, y0, t) to the times of
            the steps; with neither, a step leads from each time to the next. Outputs between two
            steps lie on the line between them. For adaptive methods `norm`, and the fields of
            `StepControl`, such as `first_step` and `max_num_steps`; with `meet_times` steps end
            at t.
        budget: Bytes that forward and backward may use, the outputs and their gradient included:
            a number, text such as "200MiB", a share such as "40%" (on fixed grids: the memory of
            storing everything is not known before adaptive steps), or a `Budget`. None stores
            everything, as plain autograd does.
        loss: From the states that are returned to one number, as the training step computes it: the
            budget then holds with it, whatever it takes, which is measured once. None provides for
            the states, their gradient, and a few more of the size of the state at one time, such as
            a mean square at a single time takes. Read with a budget only.
        params: Tensors that gradients are wanted for, to be sure that they were found; as
            torchdiffeq's `adjoint_params`. None takes all that are found.
        gradient: "exact": of the discrete steps. "backsolve": the continuous adjoint, solved
            backwards in time, as torchdiffeq's `odeint_adjoint` does: **inexact**, for comparison;
            its memory does not grow with the steps, so it takes no budget.
        granularity: A stage of the chain within a budget is a "step", or each "slope" of a
            Runge-Kutta step, so that one evaluation of func at a time needs its tape. The least
            budget is smaller then, and planning takes longer.
        solver: Name of the solver of schedules, or "auto".
        event_fn: torchdiffeq's; refused, with an alternative.
        adjoint_rtol: How the adjoint equation of gradient="backsolve" is solved; None as the
            forward pass. With "exact", which solves none, these four are refused.
        adjoint_atol: The same.
        adjoint_method: The same.
        adjoint_options: The same; its `norm` may be "seminorm".
        adjoint_params: As `params`, by torchdiffeq's name.

    Returns:
        y at all times, of shape `(len(t), *y0.shape)`; a tuple of such where y0 is a tuple.

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
    if not isinstance(solver, str) or not isinstance(granularity, str):
        raise WorkloadError(
            f"solver is {solver!r:.80} and granularity {granularity!r:.80}; both are names, 'auto' "
            "and 'step' where nothing else is wanted"
        )
    refuse_events(event_fn)
    if params is not None and adjoint_params is not None:
        raise WorkloadError("params and adjoint_params are two names of one; give either")
    given = read_tensors("params", params)
    if adjoint_params is not None:
        given = read_tensors("adjoint_params", adjoint_params)
    own = None if adjoint_options is None else read_options("adjoint_options", adjoint_options)
    adjoint = AdjointSettings(adjoint_rtol, adjoint_atol, adjoint_method, own)
    asked = _Asked(func, y0, rtol, atol, method, read_options("options", options))
    check_callbacks(
        func,
        budget=budget is not None,
        adjoint=gradient == "backsolve",
        fixed=not asked.is_adaptive,
    )
    t = t.to(asked.flat.device)
    if under_transform() and (gradient == "backsolve" or isinstance(asked.integrator, Implicit)):
        raise WorkloadError(
            "a transform of torch.func, or forward-mode differentiation, is at work, which can "
            "follow neither implicit steps nor gradient='backsolve', as their gradients are made "
            "otherwise than by torch's own operations; take an explicit method with "
            "gradient='exact', or torch.autograd"
        )
    if gradient == "backsolve":
        return parts_of(_solve_back(asked, t, given, adjoint), asked.shapes)
    adjoint.check_unused()
    if given is not None and budget is not None:
        _check_params(given, find_closure(func))
    states = _solve_flat(asked, t, Request(budget, loss, granularity, solver))
    return parts_of(states, asked.shapes)


@final
class _Asked:
    """The arguments of `odeint` that describe the problem and the method, read."""

    def __init__(
        self, func: Callable[..., Any], y0: Any, rtol: Any, atol: Any, method: Any,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.func, self.y0, self.options = func, y0, options
        self.rtol, self.atol, self.method = rtol, atol, "dopri5" if method is None else method
        self.flat, self.shapes = flat_state(y0)
        self.integrator = find_integrator(self.method, self.shapes)
        self.is_adaptive = is_adaptive(self.integrator, self.options)


def _solve_flat(asked: _Asked, t: Tensor, request: Request) -> Tensor:
    """The flat states at all times, stacked, with the gradient of the steps."""
    func, closure = asked.func, find_closure(asked.func)
    if asked.is_adaptive:
        return _solve_adaptively(asked, t, closure, request)
    grid = make_grid(func, asked.y0, t, asked.options, timed=has_gradient(t))
    call = Call(func, grid, closure, asked.integrator)
    return solve_on_grid(call, asked.flat, asked.shapes, t.dtype, request)


@outside_of_compiled_code
def _solve_adaptively(asked: _Asked, t: Tensor, closure: Closure, request: Request) -> Tensor:
    """The same by adaptive steps, whose options are torchdiffeq's."""
    options = asked.options
    problem = make_problem(
        asked.func, asked.flat, asked.shapes, t, cast(RungeKutta, asked.integrator).tableau,
        asked.rtol, asked.atol, read_function(options, "norm"), read_control(options),
        bool(options.get("meet_times", False)),
    )  # fmt: skip
    limits = Limits.of(request.budget, loss=request.loss)
    states: Tensor = solve_flat(problem, asked.flat, t, closure, limits).states
    return states


def _solve_back(
    asked: _Asked, t: Tensor, params: tuple[Tensor, ...] | None, adjoint: AdjointSettings
) -> Tensor:
    """The same with the gradient of the continuous adjoint."""
    # The backward holds none of the call, whose initial state may have a graph.
    func, shapes, options = asked.func, asked.shapes, asked.options
    norm = norm_of_parts(read_function(options, "norm"), shapes)
    how = adjoint.solver(asked.rtol, asked.atol, asked.method, options, norm, shapes)

    def forward(y: Tensor, times: Tensor) -> Tensor:
        again = _Asked(func, split(y, shapes), asked.rtol, asked.atol, asked.method, options)
        with torch.no_grad():
            return _solve_flat(again, times, Request(None))

    def backward(rates: Callable[..., Any], y: Any, times: Tensor) -> Any:
        hand_on_callbacks(func, rates)
        adjoint_equation = _Asked(rates, y, **how)
        with torch.no_grad():
            found = _solve_flat(adjoint_equation, times, Request(None))
        return parts_of(found, adjoint_equation.shapes)

    def slope(time: Tensor, y: Tensor) -> Tensor:
        found: Tensor = join(func(time, split(y, shapes)), shapes)
        return found

    found = find_closure(func).parameters if params is None else params
    trained = tuple(p for p in found if p.requires_grad)
    return backsolve(forward, backward, slope, asked.flat, t, trained, all_wanted=params is None)


def _check_params(params: tuple[Tensor, ...], closure: Closure) -> None:
    """Refuse a parameter that a plan would not see; plain autograd sees them all."""
    found = {id(p) for p in closure.parameters}
    missing = [k for k, p in enumerate(params) if p.requires_grad and id(p) not in found]
    if missing:
        raise WorkloadError(
            f"params[{missing[0]}] was not found in what func reads: its modules, closure, globals "
            "and attributes; give func as a module that owns it, or without a budget"
        )
