"""Rules for one step: explicit, implicit, symplectic, or a function of the user's.

An integrator knows one step. The times of the steps, and their memory, are not its concern.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from ...base.errors import WorkloadError
from ..function.tuple_state import Shapes, join, split
from .explicit import Slope, Time, add, as_time, number, runge_kutta_step, slope_at
from .implicit import theta_step
from .table import METHODS, find_tableau
from .tableau import ButcherTableau

StepFunction: TypeAlias = Callable[[Any, Tensor, Tensor, Any], Any]
"""A step of the user's own: (f, t, h, y) to the state at t + h, with t and h tensors."""


class Integrator(abc.ABC):
    """A rule for one step; equal rules are equal objects, and print the same."""

    @abc.abstractmethod
    def step(self, f: Slope, t: Time, h: Time, z: Tensor) -> Tensor:
        """Advance state z from time t to t + h, where h may be negative; same shape and dtype."""

    def check(self, shapes: Shapes) -> None:  # noqa: B027
        """Refuse a state that the rule cannot advance; any will do unless a rule says otherwise."""


@final
@dataclass(frozen=True)
class RungeKutta(Integrator):
    """An explicit Runge-Kutta method."""

    tableau: ButcherTableau

    def step(self, f: Slope, t: Time, h: Time, z: Tensor) -> Tensor:
        """See `runge_kutta_step`."""
        return runge_kutta_step(f, self.tableau, t, h, z)


@final
@dataclass(frozen=True)
class Implicit(Integrator):
    """Backward Euler (theta = 1) or the trapezoidal rule (theta = 1/2), for stiff problems."""

    theta: float

    def step(self, f: Slope, t: Time, h: Time, z: Tensor) -> Tensor:
        """See `theta_step`."""
        return theta_step(f, self.theta, t, h, z)


@final
@dataclass(frozen=True)
class Leapfrog(Integrator):
    """Stormer and Verlet's method for a pair of positions q and momenta p: kick, drift, kick.

    For dq/dt = a(t, p), dp/dt = b(t, q) it is of order two and symplectic where the problem is
    Hamiltonian: the energy error stays bounded over long times. f is evaluated three times a
    step.

    Reference:
        Hairer, Lubich, Wanner, Geometric Numerical Integration (2006), section I.1.4.
    """

    def step(self, f: Slope, t: Time, h: Time, z: Tensor) -> Tensor:
        """Advance the flat pair (q, p)."""
        half = z.numel() // 2
        q, p = z[:half], z[half:]
        slope = slope_at(f, t, z)
        p = add(p, slope[half:], h * 0.5)
        slope = slope_at(f, t + h * 0.5, torch.cat([q, p]))
        q = add(q, slope[:half], h)
        slope = slope_at(f, t + h, torch.cat([q, p]))
        return torch.cat([q, add(p, slope[half:], h * 0.5)])

    def check(self, shapes: Shapes) -> None:
        """Refuse a state that is no pair of positions and momenta of one shape."""
        if shapes is None or len(shapes) != 2 or shapes[0] != shapes[1]:
            found = "one tensor" if shapes is None else f"shapes {[tuple(s) for s in shapes]}"
            raise WorkloadError(
                "method 'leapfrog' advances a pair (q, p) of positions and momenta of one shape, "
                f"found {found}; give y0=(q, p), and let func(t, (q, p)) return (dq/dt, dp/dt)"
            )


@final
@dataclass(frozen=True)
class UserStep(Integrator):
    """A step function of the user's."""

    function: StepFunction
    shapes: Shapes = None
    """Shapes of the parts of the state; None where it is one tensor."""

    def step(self, f: Slope, t: Time, h: Time, z: Tensor) -> Tensor:
        """Call the function with states as the user has them, and tensors for the times."""

        def right_hand_side(t: Any, y: Any) -> Any:
            return split(f(t, join(y, self.shapes)), self.shapes)

        times = as_time(t, z), as_time(h, z)
        result = join(self.function(right_hand_side, *times, split(z, self.shapes)), self.shapes)
        if not isinstance(result, Tensor) or (result.shape, result.dtype) != (z.shape, z.dtype):
            described = type(result).__name__
            if isinstance(result, Tensor):
                described = f"shape {tuple(result.shape)} and {result.dtype}"
            raise WorkloadError(
                f"the step function given as method returned {described} at time {number(t):g} for "
                f"a state of shape {tuple(z.shape)} and {z.dtype}; let it return the state at "
                "t + h, of the same shape and dtype"
            )
        return result


def is_adaptive(integrator: Integrator, options: Mapping[str, Any]) -> bool:
    """Whether a method chooses its steps: it estimates their error, and options name no grid."""
    return (
        isinstance(integrator, RungeKutta)
        and integrator.tableau.is_fsal
        and options.get("step_size") is None
        and options.get("grid_constructor") is None
    )


# As torchdiffeq has them: its rk4 is the 3/8 rule, and heun2 is Heun's method.
_OTHER_NAMES = {"rk4": "rk4_38", "rk4_classic": "rk4", "heun2": "heun"}
_OTHER_KINDS: dict[str, Integrator] = {
    "implicit_euler": Implicit(1.0),
    "crank_nicolson": Implicit(0.5),
    "trapezoid": Implicit(0.5),
    "leapfrog": Leapfrog(),
}


def find_integrator(
    method: Any, shapes: Shapes = None
) -> RungeKutta | Implicit | Leapfrog | UserStep:
    """The integrator that argument `method` of `odeint` stands for.

    A WorkloadError where there is no such name, or the state is none that it can advance.
    """
    found: Any
    if isinstance(method, ButcherTableau):
        found = RungeKutta(method)
    elif isinstance(method, str) and method in _OTHER_KINDS:
        found = _OTHER_KINDS[method]
    elif isinstance(method, str) and _OTHER_NAMES.get(method, method) in METHODS:
        found = RungeKutta(find_tableau(_OTHER_NAMES.get(method, method)))
    elif callable(method) and not isinstance(method, type):
        found = UserStep(method, shapes)
    else:
        known = sorted({*METHODS, *_OTHER_NAMES, *_OTHER_KINDS})
        raise WorkloadError(
            f"unknown method {method!r}; give one of {', '.join(map(repr, known))}, a "
            "ButcherTableau, or a step function (f, t, h, y) -> y"
        )
    found.check(shapes)
    return found  # type: ignore[no-any-return]
