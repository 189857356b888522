"""Callbacks: methods of a right-hand side that a solve calls on its way, as torchdiffeq's does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import CallbackWarning, WorkloadError
from ..function.tuple_state import Shapes, split

STEP, ACCEPT, REJECT = "callback_step", "callback_accept_step", "callback_reject_step"
NAMES = (STEP, ACCEPT, REJECT)
OF_ADJOINT = tuple(f"{name}_adjoint" for name in NAMES)


@final
@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a function: each is called with a time, the state there, and a step size."""

    found: dict[str, Callable[[Tensor, Any, Tensor], object]]
    shapes: Shapes
    """Shapes of the parts of the state; None where it is one tensor."""
    dtype: torch.dtype = torch.float64
    """Dtype of times and sizes."""

    def tell(self, name: str, t: float, z: Tensor, h: float) -> None:
        """Call one callback, if the function has it; sizes lose their sign, as torchdiffeq's do."""
        function = self.found.get(name)
        if function is not None:
            time, size = (torch.tensor(x, dtype=self.dtype, device=z.device) for x in (t, abs(h)))
            function(time, split(z, self.shapes), size)


def find_callbacks(
    func: Callable[..., Any],
    shapes: Shapes,
    dtype: torch.dtype = torch.float64,
) -> Callbacks | None:
    """The callbacks that a right-hand side has as attributes; None without any."""
    present = callbacks_of(func, NAMES)
    return Callbacks(present, shapes, dtype) if present else None


def callbacks_of(func: Callable[..., Any], names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Those of some attributes of a function that can be called, by name."""
    found = {name: getattr(func, name, None) for name in names}
    return {name: function for name, function in found.items() if callable(function)}


def check_callbacks(func: Callable[..., Any], *, budget: bool, adjoint: bool, fixed: bool) -> None:
    """Refuse callbacks that this solve would not call as torchdiffeq does.

    A WorkloadError for callbacks within a budget, or of an adjoint equation that is not solved; a
    warning for those that a fixed grid, where no step is rejected, does not call.
    """
    has = callbacks_of(func, NAMES)
    if has and budget:
        raise WorkloadError(
            f"func has {', '.join(has)}, which a solve within a budget does not call: what a "
            "callback changes would not be found again where steps run again. Solve without a "
            "budget, take solve_adaptive's statistics for counts, or look at the states at more "
            "times"
        )
    others = callbacks_of(func, OF_ADJOINT)
    if others and not adjoint:
        raise WorkloadError(
            f"func has {', '.join(others)}, and no adjoint equation is solved, as the gradient is "
            "that of the steps themselves: leave out what is for the adjoint, or take "
            "gradient='backsolve'"
        )
    unfit = [name for name in has if name != STEP]
    if unfit and fixed:
        warnings.warn(
            f"func has {', '.join(unfit)}, which a fixed grid does not call: its steps are neither "
            "accepted nor rejected",
            CallbackWarning,
            stacklevel=3,
        )
