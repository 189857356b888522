"""An ordinary differential equation as a module whose time steps are stages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, final

from torch import Tensor, nn

from ..base.errors import WorkloadError
from ..capture.stage_discovery import StageCall
from .fixed.step_stages import SteppedModule, slope_step, step_stages
from .function.options import read_number
from .methods.explicit import Slope, Time, as_time, runge_kutta_step
from .methods.table import find_tableau
from .methods.tableau import ButcherTableau

_TWO_KINDS = (
    "dz/dt = f takes f(z) or f(t, z); give time_dependent=False or True where the signature "
    "does not say which"
)


@final
class ODEBlock(SteppedModule):
    """Solves dz/dt = f(z) or f(t, z) from t0 to t1 in equal steps; each step is a stage.

    The steps share the parameters of f. With `method="euler"` and one step the block is a
    residual block, z + f(z); with N steps it needs N times the memory of one under plain
    autograd, which is what a schedule is for.

    Args:
        f: The right-hand side: a module, or a function that owns no parameters. It is
            called as f(z), or as f(t, z) with t a tensor of no dimensions in the state's dtype
            (torchdiffeq's order), and returns a tensor of z's shape and dtype.
        method: A name in `ode.METHODS`, such as "euler", "midpoint", "heun", "rk4" (the classic
            one) or "dopri5", or a `ButcherTableau`.
        steps: Number of equal steps, at least 1.
        t0: Time of the state that comes in.
        t1: Time of the state that goes out; may lie before t0.
        time_dependent: Whether f takes the time; None reads it off the signature of f.
        granularity: A stage is a "step", or each "slope" of a step, so that the tape of one
            evaluation of f is the least memory, and not that of all in a step.

    Raises:
        WorkloadError: An argument that is none of the above.

    Reference:
        Gholami, Keutzer, Biros, ANODE (arXiv 1902.10298), equations (1a) to (1c).

    Example:
        >>> block = ODEBlock(nn.Linear(3, 3), method="rk4", steps=16)
        >>> block(torch.zeros(2, 3)).shape, len(block.stages())
        (torch.Size([2, 3]), 16)
    """

    f: Callable[..., Tensor]

    def __init__(
        self,
        f: Callable[..., Tensor],
        method: str | ButcherTableau = "euler",
        steps: int = 1,
        t0: float = 0.0,
        t1: float = 1.0,
        time_dependent: bool | None = None,
        granularity: Literal["step", "slope"] = "step",
    ) -> None:
        super().__init__()
        _check_function(f)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise WorkloadError(f"steps is {steps!r}; give an int of at least 1")
        finite = "a number, finite and in units of time"
        t0 = read_number("t0", t0, finite, accepts=math.isfinite)
        t1 = read_number("t1", t1, finite, accepts=math.isfinite)
        if t0 == t1:
            raise WorkloadError(f"t0 and t1 are both {t0}: nothing to solve; let them differ")
        if time_dependent is not None and not isinstance(time_dependent, bool):
            raise WorkloadError(f"time_dependent is {time_dependent!r}; give True, False or None")
        if granularity not in ("step", "slope"):
            raise WorkloadError(f"granularity is {granularity!r}; give 'step' or 'slope'")
        self.f = f
        self.tableau = find_tableau(method)
        self.steps = steps
        self.granularity = granularity
        self.t0 = t0
        self.t1 = t1
        self.time_dependent = takes_time(f) if time_dependent is None else time_dependent

    def stages(self) -> list[StageCall]:
        """The time steps, or their slopes, in order; a small object each."""
        slopes = self.tableau.evaluations if self.granularity == "slope" else None
        return step_stages(self, [1] * self.steps, slopes)

    def stages_follow_from(self) -> Hashable:
        """The attributes that `stages` reads."""
        return self.steps, self.granularity, self.tableau

    def step(self, index: int, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Advance the state by one time step.

        Args:
            index: 0 for the first step.
            z: State at the start of the step.
            args: Arguments of f besides the state, such as a condition.
            kwargs: The same by name.

        Returns:
            The state at its end; same shape and dtype.

        Raises:
            ExecutionError: f does not return a slope of the state's shape and dtype.
        """
        slope = self._slope(args, kwargs)
        return runge_kutta_step(slope, self.tableau, self._start(index), self.h, z)

    def step_part(self, index: int, part: int, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Do one slope of a time step, on states of `slope_step`; other arguments as for `step`."""
        slope = self._slope(args, kwargs)
        return slope_step(slope, self.tableau, self._start(index), self.h, part, state)

    def _start(self, index: int) -> float:
        # From t0 each time: adding up h would let the time drift over many steps.
        return self.t0 + (self.t1 - self.t0) * (index / self.steps)

    def _slope(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Slope:
        """The right-hand side with the other arguments of the block's call."""

        def slope(t: Time, z: Tensor) -> Tensor:
            time = (as_time(t, z),) if self.time_dependent else ()
            return self.f(*time, z, *args, **kwargs)

        return slope

    @property
    def h(self) -> float:
        """Size of a step, in units of time; negative where t1 lies before t0."""
        return (self.t1 - self.t0) / self.steps

    @property
    def evaluations(self) -> int:
        """Number of evaluations of f in a forward pass."""
        return self.steps * self.tableau.evaluations

    def extra_repr(self) -> str:
        """Method, steps and times, for `print(model)`."""
        return f"method={self.tableau.name!r}, steps={self.steps}, t0={self.t0}, t1={self.t1}" + (
            "" if self.granularity == "step" else ", granularity='slope'"
        )


def takes_time(f: Callable[..., Tensor]) -> bool:
    """Tell f(t, z) from f(z) by the number of arguments that f must be given."""
    # What torch.compile makes of a module keeps it under this name, and takes any arguments.
    f = getattr(f, "_orig_mod", f)
    called = f.forward if isinstance(f, nn.Module) else f
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        text = f"the signature of {_describe(f)} cannot be read; {_TWO_KINDS}"
        raise WorkloadError(text) from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if variable or required not in (1, 2):
        shown = ", ".join(map(str, parameters))
        raise WorkloadError(f"{_describe(f)} takes ({shown}); {_TWO_KINDS}")
    return required == 2


def _check_function(f: Callable[..., Tensor]) -> None:
    if isinstance(f, type) or not callable(f):
        raise WorkloadError(f"f is {f!r}; give a module or a function from a state to its slope")
    owner = getattr(f, "__self__", None)
    if isinstance(owner, nn.Module):
        raise WorkloadError(
            f"f is a method of a {type(owner).__name__}, whose parameters would be hidden from "
            "the block; give the module itself, with this method as its forward"
        )


def _describe(f: Callable[..., Tensor]) -> str:
    return f"f ({getattr(f, '__name__', type(f).__name__)})"
