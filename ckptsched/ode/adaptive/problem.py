"""The problem of an adaptive solve, its right-hand side, and the record of accepted steps."""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import ExecutionError, IntegrationError
from ..fixed.time_grid import resolution_note
from ..function.callbacks import Callbacks
from ..function.tuple_state import Shapes, joined_slope, split
from ..methods.embedded import Step
from ..methods.explicit import Time, as_time, check_slope
from ..methods.tableau import ButcherTableau
from .step_size import StepControl, Tolerances


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An initial value problem, its method and its tolerances; states are flat."""

    func: Callable[..., Any]
    """The user's right-hand side f(t, y), as torchdiffeq has it: t has no dimensions."""
    shapes: Shapes = None
    """Shapes of the parts of y where it is a tuple, of which flat states are made."""
    tableau: ButcherTableau
    """A method with an error estimate."""
    times: tuple[float, ...]
    """Requested times, the first of them that of the initial state; they rise or fall strictly."""
    tolerances: Tolerances
    """Those of a step's error."""
    control: StepControl = field(default_factory=StepControl)
    """Limits of a step's size, and its change from step to step."""
    meet: bool = False
    """Whether steps end at the requested times, in place of states inside steps."""
    callbacks: Callbacks | None = None
    """Methods of func to call before and after attempts."""

    @property
    def direction(self) -> float:
        """1.0 where time rises, -1.0 where it falls."""
        return 1.0 if self.times[-1] >= self.times[0] else -1.0


@final
class RightHandSide:
    """f of a time as a number and a flat state; evaluations are counted, and slopes checked.

    `shift` is a zero without dimensions, added to each time for its gradient.
    """

    def __init__(self, problem: Problem, shift: Tensor | None = None) -> None:
        self._func, self._shapes, self._shift = problem.func, problem.shapes, shift
        self.evaluations = 0

    def still(self) -> None:
        """Add no shift to times from here on."""
        self._shift = None

    def __call__(self, t: Time, z: Tensor) -> Tensor:
        """Evaluate f; an IntegrationError where the slope has not the state's shape and dtype."""
        self.evaluations += 1
        time = as_time(float(t), z)
        if self._shift is not None:
            time = time + self._shift
        slope = self._func(time, split(z, self._shapes))
        try:
            slope = joined_slope(slope, self._shapes, t)
            check_slope(slope, z, t)
        except ExecutionError as error:
            raise IntegrationError(str(error), time=float(t)) from None
        return slope  # type: ignore[no-any-return]


@final
class Record:
    """The accepted steps as numbers, 16 bytes each, and where the requested times lie."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._times = array("d", [problem.times[0]])
        self._sizes = array("d")
        self._last: list[int] = []  # the step of each requested time but the first

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, n: int) -> Step:
        """The step that comes after n others."""
        return Step(self._times[n], self._times[n + 1], self._sizes[n])

    def append(self, step: Step) -> range:
        """Add a step; returns the indices of the requested times that it reaches."""
        self._times.append(step.t1)
        self._sizes.append(step.h)
        times, direction = self.problem.times, self.problem.direction
        before = len(self._last)
        while self.missing and direction * (times[len(self._last) + 1] - step.t1) <= 0:
            self._last.append(len(self) - 1)
        return range(before + 1, len(self._last) + 1)

    @property
    def missing(self) -> int:
        """Number of requested times that no step has reached."""
        return len(self.problem.times) - 1 - len(self._last)

    def outputs(self, n: int) -> range:
        """Indices of the requested times that the step after n others reaches."""
        first = bisect.bisect_left(self._last, n)
        return range(first + 1, bisect.bisect_right(self._last, n) + 1)

    def share(self, n: int, j: int) -> float:
        """The share of step n that lies before requested time j: 0 at its start, 1 at its end."""
        step, time = self[n], self.problem.times[j]
        return 1.0 if time == step.t1 else (time - step.t0) / step.h

    @property
    def nbytes(self) -> int:
        """Bytes of the record, in the host's memory."""
        return 8 * (len(self._times) + len(self._sizes))


def check_times(times: Sequence[float], dtype: torch.dtype = torch.float64) -> None:
    """Raise an IntegrationError at the first fault of times that do not rise or fall strictly."""
    direction = 1.0 if len(times) < 2 or times[1] >= times[0] else -1.0
    for j, (a, b) in enumerate(itertools.pairwise(times), 1):
        if not direction * (b - a) > 0:
            raise IntegrationError(
                f"requested times must rise or fall strictly: t[{j - 1}] is {a!r} and t[{j}] "
                f"{b!r}; sort them and leave out doubles{resolution_note(a, b, dtype)}",
                time=b,
            )
