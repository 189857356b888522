"""What one adaptive step takes, measured on the first, and how many states a budget leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor

from ..budget import exact_bytes
from ..errors import InfeasibleBudgetError, ProfileError
from ..memory import Measurement, ProfilerMeter, default_meter
from .embedded import Step, end_slope
from .integration import Accepted, Integration, Problem, Record, RightHandSide, state_inside
from .replay import Environment, Sums, TapedStep, add_rates, replayed

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of tensors that an adaptive solve takes, apart from the states that it keeps."""

    state_bytes: int
    """Of one state."""
    forward_bytes: int
    """Peak of an attempt beyond the state at its start: slopes, error, a state inside."""
    backward_bytes: int
    """Peak of running a step again, with its tape and backward, beyond its input, the gradient
    that comes in and the sums of gradients."""
    gradient_bytes: int
    """Of the gradients of the parameters."""
    beside_bytes: int = 0
    """Of what else lives throughout: the gradient of times, and what the caller names."""
    outputs: int
    """Requested times; their states are the caller's in the backward, as are the gradients."""

    @property
    def least_bytes(self) -> int:
        """Least budget: no state is kept but the initial one, which is the caller's."""
        z = self.state_bytes
        forward = (self.outputs + 1) * z + self.forward_bytes
        backward = (2 * self.outputs + 2) * z + self.gradient_bytes + self.backward_bytes
        return max(forward, backward) + self.beside_bytes

    def slots(self, budget_bytes: int) -> int:
        """States that may be kept at once, the initial one included.

        Args:
            budget_bytes: What forward and backward may take together at their peak.

        Raises:
            InfeasibleBudgetError: Not even the initial one.
        """
        spare = budget_bytes - self.least_bytes
        if spare < 0:
            raise InfeasibleBudgetError(
                f"a budget of {exact_bytes(budget_bytes, budget=True)} is below one adaptive step "
                f"and its backward; the least that works is {exact_bytes(self.least_bytes)}, of "
                f"which {exact_bytes(2 * self.outputs * self.state_bytes)} are the states at the "
                f"{self.outputs} requested times with their gradients, "
                f"{exact_bytes(self.gradient_bytes)} the gradients of parameters and "
                f"{exact_bytes(self.backward_bytes)} the tape of a step",
                budget_bytes=budget_bytes,
                least_budget_bytes=self.least_bytes,
                stage="a step",
            )
        return 1 + spare // max(self.state_bytes, 1)


def measured_first_step(
    problem: Problem,
    environment: Environment,
    z0: Tensor,
    *,
    with_time: bool = False,
    beside_bytes: int = 0,
) -> tuple[Integration, Accepted, Footprint, int]:
    """Take the first step under a meter, and run one like it again.

    Args:
        problem: What to solve.
        environment: What f sees.
        z0: The initial state, without a graph.
        with_time: Whether the gradient of the times will be wanted.
        beside_bytes: Of other tensors that live throughout.

    Returns:
        The integration after one step, that step, what a step takes, and how often f was
        evaluated to find that out.
    """
    integration, begun = measured(z0.device, lambda: Integration(problem, z0))
    # Before the step, whose slopes would be in the way.
    backward, evaluations = measured_replay(
        problem,
        environment,
        integration.planned,
        z0,
        random=integration.random,
        with_time=with_time,
    )

    def first() -> Accepted:
        accepted = integration.advance()
        if end_slope(problem.tableau) in accepted.slopes.k:
            state_inside(problem.tableau, accepted.step, 0.5, z0, accepted.slopes)
        return accepted

    accepted, advanced = measured(z0.device, first)
    footprint = Footprint(
        state_bytes=z0.nbytes,
        forward_bytes=max(begun.peak_bytes, begun.final_bytes + advanced.peak_bytes),
        backward_bytes=backward,
        gradient_bytes=sum(p.nbytes for p in environment.tensors),
        # Of times as they are summed, in float64, and as the caller gets them.
        beside_bytes=beside_bytes + with_time * 2 * 8 * len(problem.times),
        outputs=len(problem.times),
    )
    return integration, accepted, footprint, evaluations


def measured_replay(
    problem: Problem,
    environment: Environment,
    step: Step,
    z0: Tensor,
    *,
    random: bool,
    with_time: bool = False,
) -> tuple[int, int]:
    """Run a step again without tape and with, and go back through it, under a meter.

    Args:
        problem: What is solved.
        environment: What f sees.
        step: The step.
        z0: State at its start, without a graph.
        random: Whether f draws random numbers.
        with_time: Whether the gradient of the times will be wanted.

    Returns:
        The bytes of the peak, and how often f was evaluated.
    """
    probe = replace(problem, times=(step.t0, step.t0 + 0.5 * step.h))
    record = Record(probe)
    record.append(step)
    count = 0
    gradient = torch.zeros_like(z0)
    outputs = torch.zeros((2, *z0.shape), dtype=z0.dtype, device=z0.device)
    # A new sum of the shifts of time is all that these do not hold already.
    sums = Sums([*(torch.zeros_like(p) for p in environment.tensors), *[None] * with_time])

    def run() -> None:
        nonlocal count
        wanted, shift = [*environment.tensors], None
        if with_time:
            shift = z0.new_zeros((), dtype=z0.dtype.to_real()).requires_grad_()
            wanted.append(shift)
        f = RightHandSide(problem.func, z0, shift)
        with environment.again(random=random):
            with torch.no_grad():
                replayed(f, record, probe, 0, z0, random=random)
            if with_time:
                rates = torch.zeros(2, dtype=torch.float64)
                add_rates(rates, f, record, probe, 0, z0, outputs, random=random)
            tape = TapedStep(f, record, probe, 0, z0, random)
            with environment.going_back():
                back, found = tape.backward(gradient, outputs, wanted)
            del tape
            sums.add(found)
            torch.add(outputs[0], outputs[0] if back is None else back)
        count = f.evaluations

    _, measurement = measured(z0.device, run)
    return measurement.peak_bytes, count


def measured(device: torch.device, fn: Callable[[], T]) -> tuple[T, Measurement]:
    """Run a function under the best meter that is free.

    Raises:
        ProfileError: There is none; the message says what to do.
    """
    meter = default_meter(device)
    try:
        with meter.window() as window:
            result = fn()
        return result, window.measurement
    except ProfileError as error:
        if isinstance(meter, ProfilerMeter) or "while another is open" not in str(error):
            raise ProfileError(
                f"an adaptive step cannot be measured here ({error}); give the number of "
                "checkpoints in place of a budget"
            ) from error
    return ProfilerMeter(device).measure(fn)
