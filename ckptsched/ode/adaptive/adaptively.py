"""Adaptive methods as `odeint` is asked for them: torchdiffeq's options, and tuples as states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...base.budget import Budget
from ...torch_state.torch_modes import outside_of_compiled_code
from ..function.callbacks import find_callbacks
from ..function.captures import Closure
from ..function.options import read_control, read_function
from ..function.tolerances import Tolerance, tolerance_bytes
from ..function.tuple_state import norm_of_parts, on_flat_states
from ..methods.tableau import ButcherTableau
from ..output_loss import Loss
from .solve import Bounds, make_problem, solve_problem


@outside_of_compiled_code
def solve_adaptively(
    func: Callable[..., Any],
    y0: Tensor,
    t: Tensor,
    tableau: ButcherTableau,
    shapes: tuple[torch.Size, ...] | None,
    closure: Closure,
    tolerances: tuple[Tolerance, Tolerance],
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
        tolerances: Relative and absolute, as they were read.
        options: Of the steps' control, `norm` (of a tuple where the state is one) and `meet_times`.
        budget: Bytes, or None.
        loss: Of what is returned to the caller, where it is named.

    Returns:
        The flat states at all times, stacked.

    Raises:
        WorkloadError: An option that is unknown.
    """
    norm = norm_of_parts(read_function(options, "norm"), shapes)
    meet, control = bool(options.get("meet_times", False)), read_control(options)
    slope, callbacks = on_flat_states(func, shapes), find_callbacks(func, shapes)
    problem = make_problem(slope, t, tableau, tolerances, norm, control, meet, callbacks)
    # The parts of the state are the caller's; as one tensor it is one more.
    beside = tolerance_bytes(tolerances) + (0 if shapes is None else y0.nbytes)
    bounds = Bounds.of(budget, None, beside)
    bounds = dataclasses.replace(bounds, loss=loss, shapes=shapes)
    solution = solve_problem(problem, closure, None, y0, t, bounds, func)
    states: Tensor = solution.states
    return states
