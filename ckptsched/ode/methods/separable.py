"""A check that a right-hand side fits leapfrog: dq/dt depends on p alone, dp/dt on q alone."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import WorkloadError
from ...recompute.parameter_swap import Slots
from ...recompute.stateful_buffers import own_generators
from ...torch_state.replay_context import Generators
from ..function.captures import Closure
from .explicit import Slope, Time, number

_ROUNDING = 64.0
"""Differences of so many units in the last place are rounding."""


@final
class SeparableSlope:
    """A right-hand side of flat pairs (q, p) that is watched through one step of leapfrog.

    The step evaluates it at (q0, p0), (q0, p1) and (q1, p1), so that each dependence that is not to
    be shows between two slopes that are there anyway. Only where it does, and time may be the
    cause, is the right-hand side evaluated again, at one time.
    """

    def __init__(self, slope: Slope, closure: Closure) -> None:
        self._slope, self._closure = slope, closure
        self._seen = 0
        self.moved = True
        """After a step: whether both parts moved in it, so that a dependence on them would show."""
        self._state: Tensor | None = None
        self._other: Tensor | None = None
        """The part of the latest slope that is to be the same in the next."""

    def __call__(self, t: Time, z: Tensor) -> Tensor:
        """Evaluate it; a WorkloadError where dq/dt depends on q, or dp/dt on p."""
        found: Any = self._slope(t, z)
        if isinstance(found, Tensor) and found.shape == z.shape:
            self._look(t, z.detach(), found.detach())
        return found  # type: ignore[no-any-return]

    def _look(self, t: Time, z: Tensor, slope: Tensor) -> None:
        half = z.numel() // 2
        positions, momenta = slice(0, half), slice(half, None)
        self._seen += 1
        state, before, self._state = self._state, self._other, z
        if self._seen == 1:  # at (q0, p0)
            self._other = slope[momenta]
            return
        assert state is not None
        assert before is not None
        self._other = slope[positions] if self._seen == 2 else None
        # The part of the state that moved, on which this part of the slope must not depend.
        part, what = (
            (momenta, "dp/dt changes with p")  # at (q0, p1)
            if self._seen == 2
            else (positions, "dq/dt changes with q")  # at (q1, p1)
        )
        self.moved = self.moved and not torch.equal(state[part], z[part])
        if not _near(before, slope[part]):
            self._compare(t, state, z, part, what)

    def _compare(self, t: Time, one: Tensor, other: Tensor, part: slice, what: str) -> None:
        """Evaluate both states at one time and random state, and refuse a slope that differs."""
        slots, closure = Slots(self._closure.modules), self._closure
        random = Generators(one.device, own_generators(closure.parts, closure.generators))
        slopes = []
        for z in (one, other):
            with slots.buffers_replaced({id(b): b.clone() for b in slots.buffers()}):
                slopes.append(self._slope(t, z)[part].detach())
            random.restore()
        if _near(*slopes):
            return
        change, size = ((a - b).abs().max().item() for a, b in ((*slopes,), (slopes[0], 0.0)))
        raise WorkloadError(
            f"method 'leapfrog' is of order two where dq/dt = a(t, p) and dp/dt = b(t, q); found "
            f"that {what}, by {change:.3g} where it is up to {size:.3g}, at time {number(t):g}. It "
            "would be of order one here, and not symplectic; take 'rk4' or 'trapezoid', or give a "
            "step function of your own as method"
        )


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two slopes are equal but for rounding; slopes that are not finite pass."""
    if torch.equal(one, other):
        return True
    allowed = _ROUNDING * torch.finfo(one.dtype).eps * one.abs().max()
    return not bool(((one - other).abs() > allowed).any())
