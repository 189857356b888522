"""The form of explicit Runge-Kutta methods: data that checks itself."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import final

from ...base.errors import WorkloadError

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
    """Name that `find_tableau` looks up."""
    order: int
    """The error of a step is O(h^(order + 1)); every order condition is checked."""
    a: tuple[tuple[float, ...], ...]
    """Row i holds the i coefficients below the diagonal; the others are zero."""
    b: tuple[float, ...]
    """Weights of the slopes in the step."""
    c: tuple[float, ...]
    """Times of the slopes, as shares of the step."""

    b_error: tuple[float, ...] | None = None
    """b less the weights of an embedded method: weights of the slopes in a step's error. None
    where the method has none."""
    embedded_order: int = 0
    """Order of the embedded method; checked, and that it is not higher. 0 where there is none."""
    mid: tuple[float, ...] | None = None
    """Weights that give the state halfway, z + h sum_i mid_i k_i; checked for the order of the
    method or four, whichever is less: with states and slopes at both ends they make a quartic that
    is right to that order inside the step. None where the method has none."""

    def __post_init__(self) -> None:
        """Refuse coefficients that are not those of a method of the stated order.

        That are shapes that do not match, a coefficient that is not finite, a row sum that is not
        c_i, or an order condition that is broken.
        """
        for fault in itertools.chain(self._wrong_shapes(), self._wrong_coefficients()):
            raise WorkloadError(f"tableau {self.name!r}: {fault}")

    def _wrong_shapes(self) -> Iterator[str]:
        """Faults of numbers of coefficients, of orders, and of coefficients that are not finite."""
        if not isinstance(self.order, int) or isinstance(self.order, bool) or self.order < 1:
            yield f"order is {self.order!r}; give an int >= 1"
        slopes = len(self.b)
        if not slopes or len(self.a) != slopes or len(self.c) != slopes:
            yield (
                f"a has {len(self.a)} rows, b {slopes} and c {len(self.c)} entries; all three need "
                "one for each slope, at least one"
            )
        for i, row in enumerate(self.a):
            if len(row) != i:
                yield (
                    f"row {i} of a has {len(row)} entries; an explicit method has {i} there, those "
                    "below the diagonal"
                )
        for name, weights in (("b_error", self.b_error), ("mid", self.mid)):
            if weights is not None and len(weights) != slopes:
                yield (
                    f"{name} has {len(weights)} entries; give one for each of the {slopes} slopes, "
                    "or None"
                )
        order = self.embedded_order
        if self.b_error is None and order != 0:
            yield f"embedded_order is {order!r} and b_error None; give both or neither"
        for value in itertools.chain(*self.a, self.b, self.c, self.b_error or (), self.mid or ()):
            if not math.isfinite(value):
                yield f"found the coefficient {value!r}; all must be finite"

    def _wrong_coefficients(self) -> Iterator[str]:
        """Faults of row sums, and of order conditions, of coefficients whose shapes are right."""
        for i, (row, c_i) in enumerate(zip(self.a, self.c, strict=True)):
            if abs(math.fsum(row) - c_i) > _TOLERANCE:
                yield (
                    f"row {i} of a sums to {math.fsum(row)!r}, but c[{i}] is {c_i!r}; they must be "
                    "equal, so correct one of them"
                )
        trees = _Conditions(self.a)
        for vertices, found, needed in trees.broken(self.b, self.order):
            yield (
                f"an order condition for order {vertices} gives {found!r} in place of {needed!r}"
                f"{' (the sum of b)' if vertices == 1 else ''}; correct a coefficient, or state "
                f"order={vertices - 1} if that is what it has"
            )
        for vertices, found, needed in trees.broken(self.mid, min(self.order, 4), 0.5):
            yield (
                f"an order condition for order {vertices} of the state halfway gives {found!r} in "
                f"place of {needed!r}; correct mid"
            )
        order = self.embedded_order
        if self.b_error is None:
            return
        if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order < self.order:
            yield (
                f"embedded_order is {order!r}; give that of the method whose weights are "
                f"b - b_error, at least 1 and below {self.order}"
            )
        # The embedded method has its order where its difference to this one sees no term.
        for vertices, found, _ in trees.broken(self.b_error, order, 0.0):
            yield (
                f"an order condition for order {vertices} of the embedded method is off by "
                f"{found!r}; correct b_error, or state embedded_order={vertices - 1} if that is "
                "what it has"
            )
        if not any(trees.broken(self.b_error, order + 1, 0.0)):
            yield (
                f"b_error sees no error of order {order + 1}, though the embedded method is said "
                f"to be of order {order} only; correct b_error, or state embedded_order={order + 1}"
            )

    @property
    def slopes(self) -> int:
        """Number of slopes; a step of a fixed grid leaves out those that it does not need."""
        return len(self.b)

    @property
    def needed(self) -> tuple[int, ...]:
        """Indices of the slopes that z + h sum_i b_i k_i depends on, directly or through others."""
        return self.needed_for(())

    def needed_for(self, keep: Collection[int]) -> tuple[int, ...]:
        """The same with those that slopes in `keep` depend on, these included."""
        wanted = [b_i != 0.0 or i in keep for i, b_i in enumerate(self.b)]
        for i in reversed(range(self.slopes)):
            if wanted[i]:
                for j, a_ij in enumerate(self.a[i]):
                    wanted[j] |= a_ij != 0.0
        return tuple(i for i, flag in enumerate(wanted) if flag)

    @property
    def evaluations(self) -> int:
        """Evaluations of f that a step of a fixed grid makes."""
        return len(self.needed)

    @property
    def is_fsal(self) -> bool:
        """Whether the last slope is the first of the next step (first same as last)."""
        return (
            self.slopes > 1
            and self.c[-1] == 1.0
            and self.b[-1] == 0.0
            and self.a[-1] == self.b[:-1]
        )


@final
class _Conditions:
    """The order conditions of some slopes: one for each rooted tree, each worked out once."""

    def __init__(self, a: tuple[tuple[float, ...], ...]) -> None:
        self._a = a
        self._known: dict[_Tree, list[float]] = {}

    def broken(
        self, weights: tuple[float, ...] | None, order: int, share: float = 1.0
    ) -> Iterator[tuple[int, float, float]]:
        """The conditions up to an order that weights of the slopes break; none for None.

        `share` is where in the step the state is that they make: 1 at its end; 0 for weights of an
        error. Yields the vertices of a tree, its weight, and the weight that it must have.
        """
        for vertices in range(1, order + 1) if weights else ():
            for tree in _trees(vertices):
                terms = zip(weights or (), self._of(tree), strict=True)
                found, needed = math.fsum(w * d for w, d in terms), share**vertices / _density(tree)
                if abs(found - needed) > _TOLERANCE:
                    yield vertices, found, needed

    def _of(self, tree: _Tree) -> list[float]:
        """Weight of the tree in each slope: the product over the branches of sum_j a_ij."""
        found = self._known.get(tree)
        if found is None:
            found = [1.0] * len(self._a)
            for branch in tree:
                inner = self._of(branch)
                for i, row in enumerate(self._a):
                    found[i] *= math.fsum(a_ij * inner[j] for j, a_ij in enumerate(row))
            self._known[tree] = found
        return found


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
