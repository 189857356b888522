"""Linear systems solved from products with the matrix alone: GMRES."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_SMALL = 128  # so many unknowns are solved for without starting again
_MOST_VECTORS = 20
_MOST_CYCLES = 10


def gmres(
    multiply: Callable[[Tensor], Tensor], b: Tensor, *, tolerance: float
) -> tuple[Tensor, float]:
    """Find x with A x = b to a relative residual, starting from zero; A and b are real.

    With more than 128 unknowns it starts again every 20 vectors, at most ten times. The vectors lie
    in one buffer of fixed size, so that the bytes do not depend on how many are needed. Returns x,
    and the relative residual that was reached; infinite where something overflowed.

    Reference:
        Saad and Schultz, GMRES (SIAM J. Sci. Stat. Comput. 7, 1986), by modified Gram-Schmidt,
        done twice, and Givens rotations.
    """
    norm = float(torch.linalg.vector_norm(b))
    x = torch.zeros_like(b)
    if norm == 0.0 or not math.isfinite(norm):
        return x, 0.0 if norm == 0.0 else math.inf
    vectors = b.numel() if b.numel() <= _SMALL else _MOST_VECTORS
    basis = b.new_empty(vectors + 1, *b.shape)
    residual, size = b, norm
    for _ in range(_MOST_CYCLES):
        change = _cycle(multiply, residual, size, tolerance * norm, basis)
        if change is None:
            return x, math.inf
        x = torch.add(x, change)
        residual = b - multiply(x)
        before, size = size, float(torch.linalg.vector_norm(residual))
        if size <= tolerance * norm or not size < 0.5 * before:
            break
    return x, size / norm


def _cycle(
    multiply: Callable[[Tensor], Tensor], b: Tensor, norm: float, goal: float, basis: Tensor
) -> Tensor | None:
    """The best x that products with b span, as far as the basis reaches; None for overflow."""
    torch.div(b, norm, out=basis[0])
    columns: list[list[float]] = []  # of the triangle that the rotations leave
    rotations: list[tuple[float, float]] = []
    rest = [norm]  # right-hand side of the triangle, its last entry the residual
    for k in range(len(basis) - 1):
        column, new = _orthogonalise(multiply(basis[k]), basis[: k + 1])
        below = float(torch.linalg.vector_norm(new))
        if not math.isfinite(below):
            return None
        for i, (cosine, sine) in enumerate(rotations):
            upper, lower = column[i], column[i + 1]
            column[i : i + 2] = [cosine * upper + sine * lower, cosine * lower - sine * upper]
        radius = math.hypot(column[k], below)
        if radius == 0.0:  # A is singular on what was spanned: this is all there is
            break
        cosine, sine = column[k] / radius, below / radius
        rotations.append((cosine, sine))
        columns.append([*column[:k], radius])
        rest[k:] = [cosine * rest[k], -sine * rest[k]]
        if abs(rest[-1]) <= goal or below <= 1e-300:
            break
        torch.div(new, below, out=basis[k + 1])
    return _combine(columns, rest, basis)


def _orthogonalise(product: Tensor, basis: Tensor) -> tuple[list[float], Tensor]:
    """The part of a product that the basis does not span, and the coefficients of the rest."""
    column = [0.0] * (len(basis) + 1)
    for _ in range(2):
        for i, vector in enumerate(basis):
            share = float(torch.sum(vector * product))
            column[i] += share
            product = torch.add(product, vector, alpha=-share)
    return column, product


def _combine(columns: list[list[float]], rest: list[float], basis: Tensor) -> Tensor:
    """Solve the triangle for weights, and return the weighted sum of the basis."""
    weights = [0.0] * len(columns)
    for i in reversed(range(len(columns))):
        known = sum(columns[j][i] * weights[j] for j in range(i + 1, len(columns)))
        weights[i] = (rest[i] - known) / columns[i][i]
    x = torch.zeros_like(basis[0])
    for weight, vector in zip(weights, basis, strict=False):
        x = torch.add(x, vector, alpha=weight)
    return x
