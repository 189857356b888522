"""A Runge-Kutta method that the package does not have, for tests."""

import math

from ckptsched.ode import ButcherTableau

KUTTA3 = {"order": 3, "a": ((), (0.5,), (-1.0, 2.0)), "b": (1 / 6, 2 / 3, 1 / 6)}


def make_tableau(name: str, *, order: int, a: tuple, b: tuple) -> ButcherTableau:
    """A tableau whose times are the sums of its rows."""
    return ButcherTableau(name=name, order=order, a=a, b=b, c=tuple(map(math.fsum, a)))
