"""Adaptive methods as `odeint` is asked for them: torchdiffeq's options, and tuples as states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, parse_budget
from ..errors import WorkloadError
from .adaptive import solve_adaptive
from .closure import Closure
from .control import Norm, StepControl, rms_norm
from .integrators import join, split
from .tableaus import ButcherTableau

_CONTROL = tuple(field.name for field in dataclasses.fields(StepControl))


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

    Returns:
        The flat states at all times, stacked.

    Raises:
        WorkloadError: An option that is unknown.
    """
    given = dict(options)
    norm = _norm(given.pop("norm", None), shapes)
    meet = bool(given.pop("meet_times", False))
    unknown = sorted(set(given) - set(_CONTROL))
    if unknown:
        raise WorkloadError(
            f"unknown options {unknown} for an adaptive method; it takes norm, meet_times, "
            f"{', '.join(_CONTROL)}, or step_size and grid_constructor for a fixed grid"
        )

    def slope(time: Tensor, z: Tensor) -> Tensor:
        found: Tensor = join(func(time, split(z, shapes)), shapes)
        return found

    rtol, atol = map(float, tolerances)
    solution = solve_adaptive(
        slope,
        y0,
        t,
        tableau,
        rtol=rtol,
        atol=atol,
        norm=norm,
        control=StepControl(**given),
        meet_times=meet,
        params=closure.parameters,
        budget=parse_budget(budget) if isinstance(budget, float) else budget,
        # The parts of the state are the caller's; as one tensor it is one more.
        beside_bytes=0 if shapes is None else y0.nbytes,
    )
    return solution.states


def _norm(norm: Callable[[Any], Tensor] | None, shapes: tuple[torch.Size, ...] | None) -> Norm:
    """The norm on flat errors: of a tuple, as torchdiffeq has it, the largest of its parts'."""
    if shapes is None:
        return norm or rms_norm

    def of_parts(errors: Tensor) -> Tensor:
        parts = split(errors, shapes)
        if norm is not None:
            return norm(parts)
        return torch.stack([rms_norm(part) for part in parts]).max()

    return of_parts
