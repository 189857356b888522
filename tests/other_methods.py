"""Runge-Kutta methods that the package does not have, for tests: up to order five."""

import math

from ckptsched.ode import ButcherTableau

KUTTA3 = {"order": 3, "a": ((), (0.5,), (-1.0, 2.0)), "b": (1 / 6, 2 / 3, 1 / 6)}
DOPRI5 = {
    "order": 5,
    "a": (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    "b": (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
}


def make_tableau(name: str, *, order: int, a: tuple, b: tuple) -> ButcherTableau:
    """A tableau whose times are the sums of its rows."""
    return ButcherTableau(name=name, order=order, a=a, b=b, c=tuple(map(math.fsum, a)))


DORMAND_PRINCE = make_tableau("dopri5", **DOPRI5)
