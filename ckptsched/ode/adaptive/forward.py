"""The forward pass with adaptive steps: attempts, and the record of those that were accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import IntegrationError
from ...torch_state.torch_modes import as_number, under_transform
from ..function.callbacks import ACCEPT, REJECT, STEP
from ..function.rng_and_buffers import RngAndBuffers, StepSnapshot
from ..methods.embedded import (
    Slopes,
    Step,
    difference,
    end_slope,
    inside_slopes,
    inside_weights,
    run_step,
)
from ..methods.explicit import weighted_sum
from ..methods.tableau import ButcherTableau
from .problem import Problem, Record, RightHandSide
from .step_size import first_step_size


@final
@dataclass(frozen=True, slots=True)
class Accepted:
    """A step that was accepted."""

    n: int
    """Number of accepted steps before it."""
    step: Step
    z0: Tensor
    """Flat state at its start."""
    slopes: Slopes
    """Flat state at its end, and slopes."""
    snapshot: StepSnapshot | None
    """Random generators and buffers of f at its start; None where f uses none."""


@final
class Integration:
    """One forward pass, accepted step by accepted step.

    What f draws and changes (`carried`) is found out by its first evaluation. `shift` is a zero
    whose gradient is that of a shift of time.
    """

    def __init__(
        self, problem: Problem, z0: Tensor, carried: RngAndBuffers, shift: Tensor | None = None
    ) -> None:
        """Choose the first step's size; an IntegrationError where f gives no finite slope."""
        self.problem, self.tableau = problem, problem.tableau
        self.f = RightHandSide(problem, shift)
        self.carried = carried
        self.record = Record(problem)
        self.z = z0
        self.rejected = 0
        self._t = problem.times[0]
        self._error = 1.0
        self._attempts = 0
        first = carried.look(lambda: self.f(self._t, z0))
        self._h = self._first_size(first)
        # An f that draws would draw once for a slope that is used twice.
        self._first = None if carried.matters else first
        self.keep = forward_slopes(self.tableau, every=carried.matters)

    def _first_size(self, first: Tensor) -> float:
        problem = self.problem
        if not as_number(torch.isfinite(self.z).all()):
            raise self._failed("the initial state is not finite", "give a finite state")
        with torch.no_grad():
            finite = bool(as_number(torch.isfinite(first).all()))
            size = problem.control.first_step if finite else math.nan
            if size is None:
                size = first_step_size(
                    self.f, self._t, self.z, first, order=self.tableau.order,
                    tolerances=problem.tolerances, direction=problem.direction,
                )  # fmt: skip
        if math.isnan(size):
            raise self._failed(
                "f gives a slope that is not finite at the initial state",
                "look for a division by zero or an overflow in f there",
            )
        return problem.control.limited(size)

    @property
    def done(self) -> bool:
        """Whether all requested times are reached."""
        return self.record.missing == 0

    def cut(self) -> None:
        """Detach the state and the first slope from the tapes that led to them."""
        self.z = self.z.detach()
        if self._first is not None:
            self._first = self._first.detach()
        self.f.still()

    def reached(self, accepted: Accepted, t: Tensor | None = None) -> list[Tensor]:
        """The flat states at the requested times that a step reaches; see `reached_states`."""
        return reached_states(self.record, accepted.n, accepted.z0, accepted.slopes, t)

    def forced(self, step: Step) -> Accepted:
        """Take a step whatever its error is, to measure its memory."""
        slopes, _ = self._attempt(step)
        return self._accept(step, slopes, 1.0, self.carried.take())

    def advance(self) -> Accepted:
        """Attempt steps until one is accepted; an IntegrationError where none is, however small."""
        after_rejection = False
        before = self.carried.take()
        while True:
            step = self._next_step()
            self._tell(STEP, step)
            slopes, ratio = self._attempt(step)
            small = abs(step.h) <= self.problem.control.min_step and math.isfinite(ratio)
            accepted = ratio <= 1.0 or small
            size = abs(step.h) * self.problem.control.factor(
                ratio, self._error, self.tableau.order, after_rejection=after_rejection
            )
            self._h = self.problem.control.limited(size)
            self._tell(ACCEPT if accepted else REJECT, step)
            if accepted:
                return self._accept(step, slopes, ratio, before)
            self.rejected += 1
            after_rejection = True
            del slopes
            if before is not None:
                # The next attempt begins as this one did: random state and buffers follow from the
                # accepted steps alone, as only those are run again.
                before.restore()
            self._check_size(step, ratio)

    def _tell(self, name: str, step: Step) -> None:
        callbacks = self.problem.callbacks
        if callbacks is not None:
            callbacks.tell(name, step.t0, self.z, step.h)

    def _next_step(self) -> Step:
        control, times = self.problem.control, self.problem.times
        self._attempts += 1
        if self._attempts > control.max_num_steps:
            raise self._failed(
                f"{control.max_num_steps} attempts did not reach the next requested time "
                f"{times[-self.record.missing]:.6g} (size now {self._h:.3g})",
                "allow more by max_num_steps, loosen rtol and atol, or use a method for stiff "
                "problems",
            )
        h = self.problem.direction * self._h
        step = Step(self._t, self._t + h, h)
        if self.problem.meet:
            target = times[-self.record.missing]
            if self.problem.direction * (step.t1 - target) >= 0:
                return Step(self._t, target, target - self._t)
        if step.t1 == self._t:
            raise self._underflow(math.nan)
        return step

    def _attempt(self, step: Step) -> tuple[Slopes, float]:
        slopes = run_step(self.f, self.tableau, step, self.z, first=self._first, keep=self.keep)
        b_error = self.tableau.b_error
        assert b_error is not None
        with torch.no_grad():
            error = difference(step.h, b_error, slopes.k)
            return slopes, self.problem.tolerances.ratio(error, self.z, slopes.z1)

    def _accept(
        self, step: Step, slopes: Slopes, ratio: float, snapshot: StepSnapshot | None
    ) -> Accepted:
        n, z0 = len(self.record), self.z
        reached = self.record.append(step)
        if reached:
            self._attempts = 0
        end = end_slope(self.tableau)
        anew = self.carried.matters
        if end not in slopes.k and (reached or not anew):
            slopes.k[end] = self.f(step.t1, slopes.z1)
        self._first = None if anew else slopes.k[end]
        self.z, self._t = slopes.z1, step.t1
        self._error = max(ratio, 1e-4)
        return Accepted(n, step, z0, slopes, snapshot)

    def _check_size(self, step: Step, ratio: float) -> None:
        if self._t + self.problem.direction * self._h == self._t:
            raise self._underflow(ratio)
        if abs(step.h) <= self.problem.control.min_step:
            raise self._failed(
                f"a step of the least size {step.h:.3g} gives a state that is not finite",
                "lower min_step, or look for a singularity of the solution there",
            )

    def _underflow(self, ratio: float) -> IntegrationError:
        what = "the error is not finite" if math.isinf(ratio) else f"error {ratio:.3g} of tolerance"
        return self._failed(
            f"the step size has sunk to {self._h:.3g}, which no longer moves the time ({what})",
            "the solution may be singular there: end before, loosen rtol and atol, or look for a "
            "division by zero or an overflow in f",
        )

    def _failed(self, what: str, remedy: str) -> IntegrationError:
        n = len(self.record)
        return IntegrationError(
            f"{self.tableau.name} stopped at time {self._t:.9g}, after {n} accepted and "
            f"{self.rejected} rejected steps: {what}; {remedy}",
            time=self._t,
            step=n,
        )


def forward_slopes(tableau: ButcherTableau, *, every: bool) -> frozenset[int]:
    """Indices of the slopes that an attempt needs: for its error, states inside, the next step.

    With `every` all, so that each draws the same numbers when the step is run again.
    """
    b_error = tableau.b_error or ()
    keep = {i for i, weight in enumerate(b_error) if weight != 0.0} | inside_slopes(tableau)
    keep |= {end_slope(tableau)}
    if every:
        keep |= set(range(tableau.slopes))
    return frozenset(i for i in keep if i < tableau.slopes)


def state_inside(
    tableau: ButcherTableau, step: Step, share: float, z0: Tensor, slopes: Slopes
) -> Tensor:
    """The flat state at a share of a step: that at its start (z0) for 0, at its end for 1."""
    if share == 1.0:
        return slopes.z1
    return weighted_sum(z0, step.h, inside_weights(tableau, share), slopes.k)


def reached_states(
    record: Record, n: int, z0: Tensor, slopes: Slopes, t: Tensor | None = None
) -> list[Tensor]:
    """The flat states at the requested times that the step after n others, from z0, reaches.

    `t` are the requested times with their graph; None where their gradient is not wanted.
    """
    tableau, step, found = record.problem.tableau, record[n], []
    for j in record.outputs(n):
        share = record.share(n, j)
        state = state_inside(tableau, step, share, z0, slopes)
        if t is not None:
            state = _moving(state, tableau, step, share, slopes, t[j] - t[0])
        found.append(state)
    return found


def _moving(
    state: Tensor,
    tableau: ButcherTableau,
    step: Step,
    share: float,
    slopes: Slopes,
    since_start: Tensor,
) -> Tensor:
    """A state inside a step as a function of its time, given as a tensor since the first time."""
    rates = []
    for order in range(1, rates_inside(tableau) + 1):
        weights = [w * step.h ** (1 - order) for w in inside_weights(tableau, share, order)]
        rates.append(difference(1.0, weights, slopes.k))
    shift = since_start - since_start.detach()
    shift = shift.to(device=state.device, dtype=state.dtype.to_real())
    if under_transform():  # transforms follow torch's own operations only
        weight: float | Tensor = 1.0
        for k, rate in enumerate(rates, 1):
            weight = weight * shift / k
            state = state + rate * weight
        return state
    moved: Tensor = _Moving.apply(state, shift, *rates)
    return moved


def rates_inside(tableau: ButcherTableau) -> int:
    """Number of derivatives in time of the polynomial inside a step; each output keeps them."""
    return 3 if tableau.mid is None else 4


class _Moving(torch.autograd.Function):
    """A state and its derivatives in time, as the Taylor sum over a shift, which is zero.

    The sum is exact for the polynomial inside a step, so that derivatives of any order are. The
    first derivatives need those in time as numbers only: their graph is gone through where
    gradients are differentiated again, and costs nothing else.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, shift: Tensor, *rates: Tensor) -> Tensor:
        ctx.save_for_backward(shift, *rates)
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shift, *rates = ctx.saved_tensors
        gradient = grads[0]
        if not torch.is_grad_enabled():
            return gradient, _product(gradient, rates[0]), *[None] * len(rates)
        back, rate, weight = [], torch.zeros_like(rates[0]), torch.ones_like(shift)
        for order, derivative in enumerate(rates, 1):
            rate = rate + derivative * weight
            weight = weight * shift / order
            back.append(gradient * weight)
        return gradient, _product(gradient, rate), *back


def _product(gradient: Tensor, rate: Tensor) -> Tensor:
    return (rate.conj() * gradient).real.sum()


def time_shift(t: Tensor, like: Tensor) -> Tensor:
    """A zero like a state's reals whose gradient is that of a shift of all times."""
    return (t[0] - t[0].detach()).to(device=like.device, dtype=like.dtype.to_real())
