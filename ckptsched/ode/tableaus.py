"""Explicit Runge-Kutta methods as data that checks itself."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from ..errors import WorkloadError

# Coefficients are floats: a sum of a few of them is right to some 1e-15, and a wrong digit
# in a table is far larger.
_TOLERANCE = 1e-12

# A rooted tree is the sorted tuple of the trees that hang from its root.
_Tree = tuple["_Tree", ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ButcherTableau:
    """The coefficients of an explicit Runge-Kutta method.

    For dz/dt = f(t, z) a step of size h computes the slopes
    k_i = f(t + c_i h, z + h sum_j a_ij k_j) and then z + h sum_i b_i k_i. The literature calls
    the k_i stages; here a stage is a link of the chain, so they are slopes.

    Reference:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I: section II.1 for
        the form (1.8), theorem II.2.13 for the order conditions.
    """

    name: str
    """As `find_tableau` knows it."""
    order: int
    """The error of a step is O(h^(order + 1)); every order condition is checked."""
    a: tuple[tuple[float, ...], ...]
    """Row i holds the i coefficients below the diagonal; the others are zero."""
    b: tuple[float, ...]
    """Weights of the slopes in the step."""
    c: tuple[float, ...]
    """Times of the slopes, as shares of the step."""

    def __post_init__(self) -> None:
        """Refuse coefficients that are not those of a method of the stated order.

        Raises:
            WorkloadError: Shapes that do not match, a coefficient that is not finite, a row sum
                that is not c_i, or an order condition that is broken.
        """
        self._check_shapes()
        for i, (row, c_i) in enumerate(zip(self.a, self.c, strict=True)):
            if abs(math.fsum(row) - c_i) > _TOLERANCE:
                raise WorkloadError(
                    f"tableau {self.name!r}: row {i} of a sums to {math.fsum(row)!r}, but "
                    f"c[{i}] is {c_i!r}; they must be equal, so correct one of them"
                )
        for vertices in range(1, self.order + 1):
            for tree in _trees(vertices):
                found, needed = self._weight(tree), 1 / _density(tree)
                if abs(found - needed) > _TOLERANCE:
                    raise WorkloadError(
                        f"tableau {self.name!r}: an order condition for order {vertices} "
                        f"gives {found!r} in place of {needed!r}"
                        f"{' (the sum of b)' if vertices == 1 else ''}; correct a "
                        f"coefficient, or state order={vertices - 1} if that is what it has"
                    )

    def _check_shapes(self) -> None:
        if not isinstance(self.order, int) or isinstance(self.order, bool) or self.order < 1:
            raise WorkloadError(f"tableau {self.name!r}: order is {self.order!r}; give an int >= 1")
        slopes = len(self.b)
        if not slopes or len(self.a) != slopes or len(self.c) != slopes:
            raise WorkloadError(
                f"tableau {self.name!r}: a has {len(self.a)} rows, b {slopes} and c "
                f"{len(self.c)} entries; all three need one for each slope, at least one"
            )
        for i, row in enumerate(self.a):
            if len(row) != i:
                raise WorkloadError(
                    f"tableau {self.name!r}: row {i} of a has {len(row)} entries; an explicit "
                    f"method has {i} there, those below the diagonal"
                )
        for value in itertools.chain(*self.a, self.b, self.c):
            if not math.isfinite(value):
                raise WorkloadError(
                    f"tableau {self.name!r}: found the coefficient {value!r}; all must be finite"
                )

    @property
    def slopes(self) -> int:
        """Number of evaluations of f in a step."""
        return len(self.b)

    def _weight(self, tree: _Tree) -> float:
        """The elementary weight: what the method makes of one term of the Taylor series."""
        return math.fsum(b_i * d for b_i, d in zip(self.b, self._derivative(tree), strict=True))

    def _derivative(self, tree: _Tree) -> list[float]:
        """Weight of the tree in each slope: the product over the branches of sum_j a_ij."""
        weights = [1.0] * self.slopes
        for branch in tree:
            inner = self._derivative(branch)
            for i, row in enumerate(self.a):
                weights[i] *= math.fsum(a_ij * inner[j] for j, a_ij in enumerate(row))
        return weights


@functools.cache
def _trees(vertices: int) -> tuple[_Tree, ...]:
    """All rooted trees of so many vertices: 1, 1, 2, 4, 9, 20, ..."""
    return tuple(_forests(vertices - 1, vertices - 1))


def _forests(vertices: int, largest: int) -> Iterator[_Tree]:
    """All multisets of trees with so many vertices together, none above `largest`."""
    if vertices == 0:
        yield ()
    for size in range(min(vertices, largest), 0, -1):
        # Take all trees of this size at once: the rest is smaller, so none comes up twice.
        for count in range(vertices // size, 0, -1):
            for trees in itertools.combinations_with_replacement(_trees(size), count):
                for rest in _forests(vertices - count * size, size - 1):
                    yield (*trees, *rest)


def _vertices(tree: _Tree) -> int:
    return 1 + sum(map(_vertices, tree))


def _density(tree: _Tree) -> int:
    """Product over all vertices of the vertices in the subtree there."""
    return _vertices(tree) * math.prod(map(_density, tree))


EULER = ButcherTableau(name="euler", order=1, a=((),), b=(1.0,), c=(0.0,))
"""One slope, at the start: the step of a residual network."""

MIDPOINT = ButcherTableau(name="midpoint", order=2, a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2))
"""The slope halfway; what the code released with ANODE calls RK2."""

HEUN = ButcherTableau(name="heun", order=2, a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0))
"""The explicit trapezoidal rule: the mean of the slopes at both ends."""

RK4 = ButcherTableau(
    name="rk4",
    order=4,
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 1 / 2, 1 / 2, 1.0),
)
"""The classic method of order four."""

METHODS = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "rk4": RK4,
}
"""Every method by its name. There is no "rk2": the ANODE paper's is Heun's to some readers and
the midpoint rule in its released code."""


def find_tableau(method: str | ButcherTableau) -> ButcherTableau:
    """Look a method up by its name.

    Args:
        method: A name in `METHODS`, or a tableau, which is handed back.

    Returns:
        The coefficients.

    Raises:
        WorkloadError: There is no such name.
    """
    if isinstance(method, ButcherTableau):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    raise WorkloadError(
        f"unknown method {method!r}; give one of {', '.join(map(repr, METHODS))} "
        "or a ButcherTableau"
    )
