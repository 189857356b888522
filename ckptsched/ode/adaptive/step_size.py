"""Step-size control: the size of an error, and the size of the next step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import WorkloadError
from ...torch_state.torch_modes import as_number
from ..function.tolerances import Tolerance
from .norms import Norm, rms_norm


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepControl:
    """From the error of a step to the size of the next.

    The next step is this one's size times safety * e^(-1/q + 3/4 beta) * e_before^beta, within
    limits, for an error e in units of the tolerance, that of the accepted step before, and a
    method of order q. With beta = 0 that is the elementary (integral) controller; with beta > 0 it
    is PI control, whose steps vary more smoothly where stability limits them.

    Reference:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I: section II.4; beta:
        Hairer, Wanner, Solving Ordinary Differential Equations II: section IV.2, equation (2.43c).
    """

    safety: float = 0.9
    """Below 1, so that the next step is likely to be accepted."""
    ifactor: float = 10.0
    """A step is at most this times the one before."""
    dfactor: float = 0.2
    """A rejected step is tried again with at least this times its size."""
    beta: float = 0.0
    """Share of PI control; 0.04 is usual for methods of order 5. Below 4/3 over the order."""
    min_step: float = 0.0
    """A step of this size is accepted whatever its error; in units of time."""
    max_step: float = math.inf
    """No step is larger; in units of time."""
    first_step: float | None = None
    """Size of the first step; None where it is to be found."""
    max_num_steps: int = 2**31 - 1
    """Attempts from one requested time to the next."""

    def __post_init__(self) -> None:
        """Refuse a figure out of its range by a WorkloadError."""
        ranges = {
            "safety": 0 < self.safety <= 1,
            "ifactor": 1 <= self.ifactor < math.inf,
            "dfactor": 0 < self.dfactor < 1,
            "beta": 0 <= self.beta <= 0.2,
            "min_step": 0 <= self.min_step < math.inf,
            "max_step": self.max_step > 0 and self.min_step <= self.max_step,
            "first_step": self.first_step is None or 0 < self.first_step < math.inf,
            "max_num_steps": self.max_num_steps >= 1,
        }
        for name, right in ranges.items():
            if not right:
                raise WorkloadError(
                    f"step control with {name}={getattr(self, name)!r}; it needs 0 < safety <= 1, "
                    "ifactor >= 1, 0 < dfactor < 1, 0 <= beta <= 0.2, 0 <= min_step <= max_step, "
                    "and a positive first_step and max_num_steps"
                )

    def check_order(self, order: int) -> None:
        """Refuse so much of PI control that a larger error would ask for a larger step."""
        if 0.75 * self.beta * order >= 1:
            raise WorkloadError(
                f"step control with beta={self.beta!r} for a method of order {order}: a larger "
                f"error would give a larger step; give a beta below {4 / (3 * order):.4g}, such as "
                f"{round(0.2 / order, 3)}"
            )

    def factor(self, error: float, before: float, order: int, *, after_rejection: bool) -> float:
        """The factor from the size of a step to that of the next.

        Args:
            error: Error of the step, in units of the tolerance; infinite or NaN where the step
                gave no finite state.
            before: Error of the accepted step before it; 1 at the first.
            order: Order of the method.
            after_rejection: Whether the step was rejected before. PI control then does not let the
                next one grow.
        """
        if not math.isfinite(error):
            return self.dfactor
        if error == 0.0:
            return self.ifactor
        exponent = 0.75 * self.beta - 1 / order
        wanted = self.safety * math.pow(error, exponent) * math.pow(before, self.beta)
        least = 1.0 if error < 1 and not self.beta else self.dfactor
        most = 1.0 if after_rejection and self.beta else self.ifactor
        return min(most, max(wanted, least))

    def limited(self, size: float) -> float:
        """The size within the least and the largest."""
        return min(max(size, self.min_step), self.max_step)


@final
@dataclass(frozen=True, slots=True)
class Tolerances:
    """The largest error of a step: atol + rtol * |z| in each entry, and the norm over all."""

    rtol: Tolerance
    atol: Tolerance
    norm: Norm = rms_norm

    def ratio(self, error: Tensor, z0: Tensor, z1: Tensor) -> float:
        """The error of a step from z0 to z1 over the tolerated one: up to 1 the step is accepted.

        Infinite where the error or the new state is not finite.
        """
        scale = self.scale(torch.maximum(z0.abs(), z1.abs()))
        ratio = self.size(torch.div(error, scale))
        # A state that is infinite allows any error.
        if not math.isfinite(ratio) or not as_number(torch.isfinite(scale).all()):
            return math.inf
        return ratio

    def scale(self, size: Tensor) -> Tensor:
        """The tolerated error of each entry; `size`, the entries' absolute values, is reused."""
        return size.mul_(self.rtol).add_(self.atol)

    def size(self, errors: Tensor) -> float:
        """The norm of errors as a number; a WorkloadError where it returned something else."""
        found: Any = self.norm(errors)
        if isinstance(found, (int, float)):
            return float(found)
        if not isinstance(found, Tensor) or found.numel() != 1:
            is_tensor = isinstance(found, Tensor)
            told = f"shape {tuple(found.shape)}" if is_tensor else type(found).__name__
            raise WorkloadError(
                f"the norm of errors returned {told}; let it return one number as a tensor, such "
                "as errors.abs().square().mean().sqrt()"
            )
        return as_number(found)

    @property
    def nbytes(self) -> int:
        """Bytes of tolerances that are tensors."""
        return sum(x.nbytes for x in (self.rtol, self.atol) if isinstance(x, Tensor))


def first_step_size(
    f: Callable[[float, Tensor], Tensor],
    t0: float,
    z0: Tensor,
    f0: Tensor,
    *,
    order: int,
    tolerances: Tolerances,
    direction: float,
) -> float:
    """Size of a first step that is likely to be accepted; takes one evaluation of f.

    `f0` is the slope at time t0 and state z0, `direction` 1.0 where time rises, else -1.0. The size
    is positive, in units of time; NaN where f gives a slope that is not finite.

    Reference:
        Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I: section II.4, the
        starting step size.
    """
    scale = tolerances.scale(z0.abs())
    d0, d1 = tolerances.size(z0 / scale), tolerances.size(f0 / scale)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    z1 = torch.add(z0, f0, alpha=direction * h0)
    difference = f(t0 + direction * h0, z1) - f0
    d2 = tolerances.size(difference / scale) / h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = float((0.01 / max(d1, d2)) ** (1 / order))
    return min(100 * h0, h1) if math.isfinite(d1 + d2) else math.nan
