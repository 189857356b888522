"""Methods of a right-hand side that a solve calls on its way, as torchdiffeq's does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import CallbackWarning, WorkloadError
from ..methods.integrators import split

STEP, ACCEPT, REJECT = "callback_step", "callback_accept_step", "callback_reject_step"
NAMES = (STEP, ACCEPT, REJECT)
OF_ADJOINT = tuple(f"{name}_adjoint" for name in NAMES)


@final
@dataclass(frozen=True)
class Callbacks:
    """What a function has of them: each is called with a time, the state there, and a step size."""

    found: dict[str, Callable[[Tensor, Any, Tensor], object]]
    shapes: tuple[torch.Size, ...] | None
    """Of the parts of the state where it is a tuple."""
    dtype: torch.dtype = torch.float64
    """In which times are given."""

    def tell(self, name: str, t: float, z: Tensor, h: float) -> None:
        """Call one, if it is there.

        Args:
            name: Which.
            t: Time at the start of the step.
            z: State there.
            h: Its size; given without its sign, as torchdiffeq does.
        """
        function = self.found.get(name)
        if function is not None:
            time, size = (torch.tensor(x, dtype=self.dtype, device=z.device) for x in (t, abs(h)))
            function(time, split(z, self.shapes), size)


def find_callbacks(
    func: Callable[..., Any],
    shapes: tuple[torch.Size, ...] | None,
    dtype: torch.dtype = torch.float64,
) -> Callbacks | None:
    """The callbacks of a right-hand side, which are attributes of it.

    Args:
        func: It.
        shapes: Of the parts of the state where it is a tuple.
        dtype: In which times are given.

    Returns:
        None where there are none.
    """
    found = {name: getattr(func, name, None) for name in NAMES}
    present = {name: function for name, function in found.items() if callable(function)}
    return Callbacks(present, shapes, dtype) if present else None


def check_callbacks(func: Callable[..., Any], *, budget: bool, adjoint: bool, fixed: bool) -> None:
    """Refuse callbacks that could not be called as they are meant to be.

    Args:
        func: The right-hand side.
        budget: Whether steps may run again.
        adjoint: Whether the adjoint equation is solved.
        fixed: Whether steps lie on a grid, where none is rejected.

    Raises:
        WorkloadError: It has some that this solve does not call.
    """
    has = [name for name in NAMES if callable(getattr(func, name, None))]
    if has and budget:
        raise WorkloadError(
            f"func has {', '.join(has)}, which a solve within a budget does not call: what a "
            "callback changes would not be found again where steps run again. Solve without a "
            "budget, take solve_adaptive's statistics for counts, or look at the states at more "
            "times"
        )
    others = [name for name in OF_ADJOINT if callable(getattr(func, name, None))]
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
