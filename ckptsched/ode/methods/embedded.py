"""One step of an embedded Runge-Kutta pair: state, slopes, error, and states inside the step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .explicit import Slope, last_uses, weighted_sum
from .tableau import ButcherTableau

# Polynomials in the share x of the step, by power from 0: the part of the state at an end of the
# step, halfway, and of the slopes at the two ends; in increments over the state at the start. With
# a state halfway they make the quartic that meets all five, else the cubic that meets four.
_QUARTIC = {
    "b": (0.0, 0.0, -5.0, 14.0, -8.0),
    "mid": (0.0, 0.0, 16.0, -32.0, 16.0),
    "start": (0.0, 1.0, -4.0, 5.0, -2.0),
    "end": (0.0, 0.0, 1.0, -3.0, 2.0),
}
_CUBIC = {
    "b": (0.0, 0.0, 3.0, -2.0, 0.0),
    "start": (0.0, 1.0, -2.0, 1.0, 0.0),
    "end": (0.0, 0.0, -1.0, 1.0, 0.0),
}


@final
@dataclass(frozen=True, slots=True)
class Step:
    """Start, end and size of a step, in units of time: all that is recorded of it."""

    t0: float
    """Time at its start."""
    t1: float
    """Time at its end: t0 + h, or the requested time that it is to meet."""
    h: float
    """Its size; negative where time falls."""

    def time(self, c: float) -> float:
        """The time of the slope with coefficient c."""
        return self.t1 if c == 1.0 else self.t0 + c * self.h


@final
class Slopes:
    """The state after a step, and those slopes of it that are still wanted."""

    __slots__ = ("k", "z1")

    def __init__(self, z1: Tensor, k: dict[int, Tensor]) -> None:
        self.z1 = z1
        self.k = k


def run_step(
    f: Slope,
    tableau: ButcherTableau,
    step: Step,
    z: Tensor,
    *,
    first: Tensor | None = None,
    keep: frozenset[int] = frozenset(),
) -> Slopes:
    """Take one step. Sums are `torch.add(..., alpha=)`, whose backward needs no operand.

    `first` is the first slope, where it is known. Returned are the slopes `keep`, by index;
    `tableau.slopes` is the slope at the end, of a method whose last slope is another. A slope that
    neither the new state nor these need is not evaluated.
    """
    last_use = _needs(tableau, keep)
    k: dict[int, Tensor] = {}
    z1 = None
    for i in last_use:
        argument = weighted_sum(z, step.h, tableau.a[i], k)
        if tableau.is_fsal and i == tableau.slopes - 1:
            z1 = argument
        k[i] = first if first is not None and i == 0 else f(step.time(tableau.c[i]), argument)
        del argument
        for j in [j for j in k if last_use[j] <= i]:
            del k[j]
    if z1 is None:
        z1 = weighted_sum(z, step.h, tableau.b, k)
    for j in [j for j in k if j not in keep]:
        del k[j]
    if tableau.slopes in keep:
        k[tableau.slopes] = f(step.t1, z1)
    return Slopes(z1, k)


def difference(h: float, weights: Sequence[float], k: Mapping[int, Tensor]) -> Tensor:
    """The difference of two states, h sum_i w_i k_i, of the slopes k_i by index."""
    return weighted_sum(torch.zeros_like(next(iter(k.values()))), h, weights, k)


@functools.cache
def _needs(tableau: ButcherTableau, keep: frozenset[int]) -> dict[int, int]:
    """The slopes to evaluate, each with that after which nothing needs it any more."""
    last, never = last_uses(tableau, keep), tableau.slopes
    by_argument = tableau.is_fsal and tableau.slopes - 1 in last
    by_sum = {j for j, b_j in enumerate(tableau.b) if b_j != 0.0 and not by_argument}
    return {i: never if i in keep or i in by_sum else last[i] for i in last}


def end_slope(tableau: ButcherTableau) -> int:
    """Index of the slope at the end of the step: the last one's, or one beyond."""
    return tableau.slopes - 1 if tableau.is_fsal else tableau.slopes


@functools.cache
def inside_slopes(tableau: ButcherTableau) -> frozenset[int]:
    """The slopes that states inside a step are made of."""
    rows = _inside_rows(tableau)
    return frozenset(i for i, row in enumerate(rows) if any(row))


def inside_weights(tableau: ButcherTableau, x: float, order: int = 0) -> tuple[float, ...]:
    """Weights w of the slopes in the state at a share x of a step, z + h sum_i w_i k_i.

    With a state halfway (`tableau.mid`) it is the quartic through it and both ends with their
    slopes; else the cubic through the ends. `order` is that of a derivative with respect to x.

    Reference:
        Shampine, Some practical Runge-Kutta formulas, Math. Comp. 46, 1986.
    """
    powers = [math.perm(p, order) * x ** max(p - order, 0) for p in range(5)]
    return tuple(
        sum(c * power for c, power in zip(row, powers, strict=True))
        for row in _inside_rows(tableau)
    )


@functools.cache
def _inside_rows(tableau: ButcherTableau) -> tuple[tuple[float, ...], ...]:
    """For each slope, that at the end included, its polynomial in x."""
    shape = _CUBIC if tableau.mid is None else _QUARTIC
    rows = [[0.0] * 5 for _ in range(end_slope(tableau) + 1)]

    def add(i: int, weight: float, polynomial: Sequence[float]) -> None:
        for p, c in enumerate(polynomial):
            rows[i][p] += weight * c

    for i, b_i in enumerate(tableau.b):
        add(i, b_i, shape["b"])
    for i, mid_i in enumerate(tableau.mid or ()):
        add(i, mid_i, shape["mid"])
    add(0, 1.0, shape["start"])
    add(end_slope(tableau), 1.0, shape["end"])
    return tuple(map(tuple, rows))
