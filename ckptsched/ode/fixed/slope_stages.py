"""A Runge-Kutta step taken apart: one evaluation of f at a time, so that its tape is kept alone.

Between two slopes flow the state at the start of the step, the sum of what the step has so far,
and the slopes that later arguments need: tensors that are handed on and not copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods.explicit import Slope, Time, add, last_uses, slope_at
from ..methods.tableau import ButcherTableau


def slope_count(tableau: ButcherTableau) -> int:
    """Number of parts of a step: one for each slope that it needs."""
    return len(last_uses(tableau))


def slope_step(f: Slope, tableau: ButcherTableau, t: Time, h: Time, k: int, state: Any) -> Any:
    """Do one part of a step; all parts in order make `runge_kutta_step`, in the same additions.

    Args:
        f: Right-hand side.
        tableau: The method.
        t: Time at the start of the step.
        h: Size of the step.
        k: Which part, counted from 0.
        state: The state for the first part, then what the part before returned.

    Returns:
        What the next part takes; the state at t + h from the last.

    Raises:
        ExecutionError: f returns something else than a slope of the state's shape and dtype.
    """
    last_use = last_uses(tableau)
    needed = list(last_use)
    i = needed[k]
    z, result, kept = (state, state, {}) if k == 0 else _unpack(last_use, k, state)
    argument = z
    for j, a_ij in enumerate(tableau.a[i]):
        if a_ij != 0.0:
            argument = add(argument, kept[j], h * a_ij)
    slope = slope_at(f, t + tableau.c[i] * h, argument)
    if tableau.b[i] != 0.0:
        result = add(result, slope, h * tableau.b[i])
    if k == len(needed) - 1:
        return result
    kept[i] = slope
    return z, result, *(kept[j] for j in _alive(last_use, k + 1))


def start_of(state: Any) -> Tensor:
    """The state at the start of the step, from what any of its parts takes."""
    found: Tensor = state[0] if isinstance(state, tuple) else state
    return found


def _alive(last_use: dict[int, int], k: int) -> list[int]:
    """The slopes that part k or a later one reads."""
    needed = list(last_use)
    return [j for j in needed[:k] if last_use[j] >= needed[k]]


def _unpack(
    last_use: dict[int, int], k: int, state: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    z, result, *slopes = state
    return z, result, dict(zip(_alive(last_use, k), slopes, strict=True))
