"""Adaptive methods as `odeint` is asked for them: torchdiffeq's options, and tuples as states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..errors import WorkloadError
from ..transforms import outside_of_compiled_code
from .adaptive import Bounds, make_problem, solve_problem
from .closure import Closure
from .control import StepControl
from .output_loss import Loss
from .parts import norm_of_parts, on_flat_states
from .tableaus import ButcherTableau

_CONTROL = tuple(field.name for field in dataclasses.fields(StepControl))


@outside_of_compiled_code
def solve_adaptively(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    shapes: tuple[torch.Size, ...] | None,
    closure: Closure,
    tolerances: tuple[float, float],
    options: Mapping[str, Any],
    budget: int | float | str | Budget | None,
    loss: Loss | None,
) -> Tensor:
    """Solve with steps that keep a tolerance.

    Args:
        func: The user's right-hand side.
        y0: Flat initial state.
        t: Times.
        tableau: The method.
        shapes: Of the parts of the state where it is a tuple.
        closure: What func reads.
        tolerances: Relative and absolute.
        options: Of the steps' control, `norm` (of a tuple where the state is one) and `meet_times`.
        budget: Bytes, or None.
        loss: Of what is returned to the caller, where it is named.

    Returns:
        The flat states at all times, stacked.

    Raises:
        WorkloadError: An option that is unknown.
    """
    given = dict(options)
    norm = norm_of_parts(given.pop("norm", None), shapes)
    meet = bool(given.pop("meet_times", False))
    unknown = sorted(set(given) - set(_CONTROL))
    if unknown:
        raise WorkloadError(
            f"unknown options {unknown} for an adaptive method; it takes norm, meet_times, "
            f"{', '.join(_CONTROL)}, or step_size and grid_constructor for a fixed grid"
        )
    rtol, atol = map(float, tolerances)
    control = StepControl(**given)
    slope = on_flat_states(func, shapes)
    problem = make_problem(slope, y0, t, tableau, (rtol, atol), norm, control, meet)
    # The parts of the state are the caller's; as one tensor it is one more.
    bounds = Bounds.of(budget, None, 0 if shapes is None else y0.nbytes)
    bounds = dataclasses.replace(bounds, loss=loss, shapes=shapes)
    solution = solve_problem(problem, closure, None, y0, t, bounds, func)
    states: Tensor = solution.states
    return states
