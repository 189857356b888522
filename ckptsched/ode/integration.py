"""The forward pass with adaptive steps: attempts, and the record of those that were accepted."""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ..context import Generators, RandomState
from ..errors import ExecutionError, IntegrationError
from .control import Norm, StepControl, error_ratio, first_step_size, rms_norm
from .embedded import Slopes, Step, combined, end_slope, inside_slopes, inside_weights, run_step
from .steps import Time, check_slope
from .tableaus import ButcherTableau


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be solved, and how closely."""

    func: Callable[[Tensor, Tensor], Tensor]
    """The right-hand side f(t, z), as torchdiffeq has it: t has no dimensions."""
    tableau: ButcherTableau
    """A method with an error estimate."""
    times: tuple[float, ...]
    """Requested times, the first of them that of the initial state; they rise or fall strictly."""
    rtol: float
    """Tolerance relative to the state."""
    atol: float
    """Tolerance besides."""
    norm: Norm = rms_norm
    """Makes one figure of all errors."""
    control: StepControl = field(default_factory=StepControl)
    """How large a step may be."""
    meet: bool = False
    """Whether steps end at the requested times, in place of states inside steps."""

    @property
    def direction(self) -> float:
        """1.0 where time rises, -1.0 where it falls."""
        return 1.0 if self.times[-1] >= self.times[0] else -1.0


@final
class RightHandSide:
    """f with time as a number, counted and checked."""

    def __init__(
        self,
        func: Callable[[Tensor, Tensor], Tensor],
        like: Tensor,
        shift: Tensor | None = None,
    ) -> None:
        """Take f, a state, whose dtype and device its time gets, and what shifts its time."""
        self._func = func
        self._options: dict[str, Any] = {"dtype": like.dtype.to_real(), "device": like.device}
        self.evaluations = 0
        self._shift = shift

    def __call__(self, t: Time, z: Tensor) -> Tensor:
        """Evaluate f at a time.

        Raises:
            IntegrationError: It does not return a slope of the state's shape and dtype.
        """
        self.evaluations += 1
        time = torch.full((), float(t), **self._options)
        if self._shift is not None:
            time = time + self._shift
        slope = self._func(time, z)
        try:
            check_slope(slope, z, t)
        except ExecutionError as error:
            raise IntegrationError(str(error), time=float(t)) from None
        return slope


@final
class Record:
    """The accepted steps as numbers, 16 bytes each, and where the requested times lie."""

    def __init__(self, problem: Problem) -> None:
        """Start without steps."""
        self._problem = problem
        self._times = array("d", [problem.times[0]])
        self._sizes = array("d")
        self._last: list[int] = []  # the step of each requested time but the first

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, n: int) -> Step:
        """The step that comes after n others."""
        return Step(self._times[n], self._times[n + 1], self._sizes[n])

    def append(self, step: Step) -> range:
        """Add a step.

        Returns:
            The indices of the requested times that it reaches.
        """
        self._times.append(step.t1)
        self._sizes.append(step.h)
        times, direction = self._problem.times, self._problem.direction
        before = len(self._last)
        while self.missing and direction * (times[len(self._last) + 1] - step.t1) <= 0:
            self._last.append(len(self) - 1)
        return range(before + 1, len(self._last) + 1)

    @property
    def missing(self) -> int:
        """How many requested times no step has reached."""
        return len(self._problem.times) - 1 - len(self._last)

    def outputs(self, n: int) -> range:
        """Indices of the requested times that the step after n others reaches."""
        first = bisect.bisect_left(self._last, n)
        return range(first + 1, bisect.bisect_right(self._last, n) + 1)

    def share(self, n: int, j: int) -> float:
        """Where in a step a requested time lies: 0 at its start, 1 at its end."""
        step, time = self[n], self._problem.times[j]
        return 1.0 if time == step.t1 else (time - step.t0) / step.h

    @property
    def nbytes(self) -> int:
        """What the record takes; not of tensors, and not on the device."""
        return 8 * (len(self._times) + len(self._sizes))


@final
@dataclass(frozen=True, slots=True)
class Accepted:
    """A step that was accepted."""

    n: int
    """How many came before it."""
    step: Step
    z0: Tensor
    """State at its start."""
    slopes: Slopes
    """State at its end, and slopes."""
    reached: range
    """Indices of the requested times inside."""
    random: Generators | None
    """The random generators at its start, where f draws from them."""


@final
class Integration:
    """One forward pass, accepted step by accepted step."""

    def __init__(self, problem: Problem, z0: Tensor, shift: Tensor | None = None) -> None:
        """Evaluate the first slope, and find the first step.

        Args:
            problem: What to solve.
            z0: Its initial state.
            shift: A zero, whose gradient is that of a shift of time; None where none is wanted.

        Raises:
            IntegrationError: f gives no finite slope at the first time.
        """
        self.problem, self.tableau = problem, problem.tableau
        self.f = RightHandSide(problem.func, z0, shift)
        self.record = Record(problem)
        self.z = z0
        self.rejected = 0
        self._t = problem.times[0]
        self._error = 1.0
        self._attempts = 0
        before = RandomState.take(z0.device).to_bytes()
        self._first: Tensor | None = self.f(self._t, z0)
        self.random = RandomState.take(z0.device).to_bytes() != before
        self._h = self._first_size(self._first)
        if self.random:  # a slope that is used twice would be drawn once
            self._first = None
        self.keep = forward_slopes(self.tableau, self.random)

    def _first_size(self, first: Tensor) -> float:
        problem = self.problem
        if not bool(torch.isfinite(self.z).all()):
            raise self._failed("the initial state is not finite", "give a finite state")
        with torch.no_grad():
            finite = bool(torch.isfinite(first).all())
            size = problem.control.first_step if finite else math.nan
            if size is None:
                size = first_step_size(
                    self.f, self._t, self.z, first, order=self.tableau.order,
                    rtol=problem.rtol, atol=problem.atol, norm=problem.norm,
                    direction=problem.direction,
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

    @property
    def planned(self) -> Step:
        """The step to attempt next, but for what limits it."""
        h = self.problem.direction * self._h
        return Step(self._t, self._t + h, h)

    def snapshot(self) -> Generators | None:
        """Copies of the random generators, where f draws from them."""
        return Generators(self.z.device) if self.random else None

    def advance(self) -> Accepted:
        """Attempt steps until one is accepted.

        Raises:
            IntegrationError: None is, however small, or there were too many attempts.
        """
        after_rejection = False
        undo = self.snapshot()
        while True:
            step = self._next_step()
            slopes, ratio = self._attempt(step)
            small = abs(step.h) <= self.problem.control.min_step and math.isfinite(ratio)
            accepted = ratio <= 1.0 or small
            size = abs(step.h) * self.problem.control.factor(
                ratio, self._error, self.tableau.order, after_rejection=after_rejection
            )
            self._h = self.problem.control.limited(size)
            if accepted:
                return self._accept(step, slopes, ratio, undo)
            self.rejected += 1
            after_rejection = True
            del slopes
            if undo is not None:
                undo.restore()
            self._check_size(step, ratio)

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
        step = self.planned
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
            error = combined(None, step.h, b_error, slopes.k)
            problem = self.problem
            ratio = error_ratio(
                error, self.z, slopes.z1, rtol=problem.rtol, atol=problem.atol, norm=problem.norm
            )
        return slopes, ratio

    def _accept(
        self, step: Step, slopes: Slopes, ratio: float, random: Generators | None
    ) -> Accepted:
        n, z0 = len(self.record), self.z
        reached = self.record.append(step)
        if reached:
            self._attempts = 0
        end = end_slope(self.tableau)
        if end not in slopes.k and (reached or not self.random):
            slopes.k[end] = self.f(step.t1, slopes.z1)
        self._first = None if self.random else slopes.k[end]
        self.z, self._t = slopes.z1, step.t1
        self._error = max(ratio, 1e-4)
        return Accepted(n, step, z0, slopes, reached, random)

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


def forward_slopes(tableau: ButcherTableau, random: bool) -> frozenset[int]:
    """The slopes that an attempt leaves: for its error, states inside, and the next step."""
    b_error = tableau.b_error or ()
    keep = {i for i, weight in enumerate(b_error) if weight != 0.0} | inside_slopes(tableau)
    keep |= {end_slope(tableau)}
    if random:  # all, so that each draws what it drew when the step is run again
        keep |= set(range(tableau.slopes))
    return frozenset(i for i in keep if i < tableau.slopes)


def state_inside(
    tableau: ButcherTableau, step: Step, share: float, z0: Tensor, slopes: Slopes
) -> Tensor:
    """The state at a requested time inside a step.

    Args:
        tableau: The method.
        step: The step.
        share: Where in it.
        z0: State at its start.
        slopes: State at its end, and slopes.
    """
    if share == 1.0:
        return slopes.z1
    return combined(z0, step.h, inside_weights(tableau, share), slopes.k)


def check_times(times: Sequence[float]) -> None:
    """Refuse times that do not rise or fall strictly.

    Raises:
        IntegrationError: Where they do not; it names the first fault.
    """
    direction = 1.0 if len(times) < 2 or times[1] >= times[0] else -1.0
    for j, (a, b) in enumerate(itertools.pairwise(times), 1):
        if not direction * (b - a) > 0:
            raise IntegrationError(
                f"requested times must rise or fall strictly: t[{j - 1}] is {a!r} and t[{j}] "
                f"{b!r}; sort them and leave out doubles",
                time=b,
            )
