"""Adaptive solves whose gradient keeps a byte budget.

The forward pass accepts and rejects steps without tapes. Of an accepted step only its time and
size are recorded; some states are kept, by `solvers.online`, as the number of steps is known in
the end only. The backward runs the accepted steps again with their recorded sizes, and nothing
else: it gives the gradient of the accepted discrete steps, states inside steps included, with
step sizes held constant. Slopes are no part of a state: a step that is run again needs neither an
error nor the slope at its end, so that the slope that is the next step's first (FSAL) costs
nothing when it is evaluated there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..budget import Budget, parse_budget
from ..errors import BudgetSyntaxError, BudgetWarning, ExecutionError, WorkloadError
from ..solvers.online import OnlinePlacement
from ..transforms import outside_of_compiled_code, transform_at_work
from .closure import Closure, find_closure
from .control import Norm, StepControl, rms_norm
from .embedded import combined, inside_rates
from .footprint import Footprint, measured_first_step
from .integration import Accepted, Integration, Problem, RightHandSide, check_times, state_inside
from .methods import find_tableau
from .replay import Checkpoint, Environment, Sweep
from .tableaus import ButcherTableau


@final
@dataclass(slots=True, kw_only=True)
class Statistics:
    """What a solve did; the figures of its backward come with the backward."""

    accepted: int = 0
    """Steps that were accepted."""
    rejected: int = 0
    """Attempts that were not."""
    evaluations: int = 0
    """Of f in the forward pass."""
    measuring_evaluations: int = 0
    """Of f to measure what a step takes; 0 without a budget."""
    backward_evaluations: int = 0
    """Of f in the latest backward; 0 where all tapes are kept."""
    advances: int = 0
    """Steps run again without tape in the latest backward."""
    checkpoints: int | None = None
    """States that may be kept at once, the initial one included; None where all tapes are."""
    positions: tuple[int, ...] = ()
    """After how many steps the states that were kept come."""
    footprint: Footprint | None = None
    """What a step takes; None without a budget."""
    record_bytes: int = 0
    """What the times and sizes of the accepted steps take, in the host's memory."""


@final
@dataclass(frozen=True, slots=True)
class AdaptiveSolution:
    """The states at the requested times, and what it took."""

    states: Tensor
    """The state at each requested time, stacked: the first is the initial state."""
    statistics: Statistics
    """Counts; those of the backward are filled in by it."""


@outside_of_compiled_code
def solve_adaptive(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    method: str | ButcherTableau = "dopri5",
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    norm: Norm = rms_norm,
    control: StepControl | None = None,
    meet_times: bool = False,
    params: Sequence[Tensor] | None = None,
    budget: int | str | Budget | None = None,
    checkpoints: int | None = None,
    beside_bytes: int = 0,
) -> AdaptiveSolution:
    """Solve dy/dt = func(t, y) with steps that keep a tolerance.

    Without a budget and checkpoints all tapes of accepted steps are kept, and the backward is plain
    autograd's. With either the numbers of the forward pass are the same, bit for bit, and the
    gradient that of the same steps; double differentiation then is an error.

    Args:
        func: Right-hand side, called with a time of no dimensions and a state; returns a slope of
            the state's shape and dtype.
        y0: Initial state, floating-point or complex.
        t: Requested times, a tensor of one dimension that rises or falls strictly; the first is
            that of y0.
        method: Name of a method with an error estimate, or a tableau.
        rtol: Tolerance relative to the state.
        atol: Tolerance besides.
        norm: Makes one figure of all errors: `rms_norm`, `batch_max_norm`, or one of your own.
        control: Size of the steps; the elementary controller if None.
        meet_times: Whether steps end at the requested times. Else states there are those inside
            steps, by the method's interpolant, and the last step may go beyond.
        params: What func reads and is to get gradients; if None, what is found: the parameters of
            a module, or of modules and tensors that a function reads from its closure.
        budget: Bytes that forward and backward may take at their peak together: states at the
            requested times and their gradients, states that are kept, the tape of a step, and
            gradients of parameters. Bytes or text such as "200MiB". What a step takes is measured
            on the first.
        checkpoints: States that may be kept at once, the initial one included, in place of a
            budget.
        beside_bytes: Of the budget, what other tensors take that live throughout.

    Returns:
        The states, shape (len(t), *y0.shape), and statistics.

    Raises:
        IntegrationError: The solution cannot be continued; the error has the time.
        InfeasibleBudgetError: The budget is below one step; the error has the least that works.
        WorkloadError: A method without an error estimate, or arguments that do not go together.
        BudgetSyntaxError: A budget that is not in bytes.
    """
    problem = _problem(func, y0, t, method, (rtol, atol), norm, control, meet_times)
    closure = find_closure(func)
    given = closure.parameters if params is None else params
    wanted = list({id(p): p for p in given if p.requires_grad}.values())
    if meet_times and t.requires_grad:
        raise WorkloadError(
            "the gradient of t is that of states inside steps; leave out meet_times, or detach t"
        )
    budget_bytes = _budget_bytes(budget, checkpoints)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (y0, t, *wanted))
    bounded = tracked and (budget_bytes is not None or checkpoints is not None)
    if bounded and transform_at_work((y0, t, *wanted)):
        warnings.warn(
            f"{transform_at_work((y0, t, *wanted))} is at work, which checkpoints cannot follow: "
            "the solve runs by plain autograd, and takes its memory",
            BudgetWarning,
            stacklevel=3,
        )
        bounded = False
    if not bounded:
        return _solve_plainly(problem, y0, t if tracked and t.requires_grad else None)
    solve = _Solve(problem, closure, wanted, y0, budget_bytes, checkpoints)
    solve.with_time, solve.beside_bytes = t.requires_grad, beside_bytes
    states: Tensor = _Node.apply(solve, y0, t, *wanted)
    return AdaptiveSolution(states, solve.statistics)


def _problem(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    method: str | ButcherTableau,
    tolerances: tuple[float, float],
    norm: Norm,
    control: StepControl | None,
    meet: bool,
) -> Problem:
    tableau = find_tableau(method)
    if tableau.b_error is None:
        raise WorkloadError(
            f"method {tableau.name!r} has no error estimate, so its steps cannot adapt; give one "
            "that has, such as 'dopri5', or use it on a fixed grid"
        )
    rtol, atol = tolerances
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise WorkloadError(f"rtol={rtol!r} and atol={atol!r}; give two that are not negative")
    if not (y0.is_floating_point() or y0.is_complex()):
        raise WorkloadError(f"the initial state has dtype {y0.dtype}; give one of floating point")
    if t.dim() != 1 or not len(t) or not t.is_floating_point():
        raise WorkloadError(
            f"t has shape {tuple(t.shape)} and {t.dtype}; give a tensor of one dimension, of "
            "floating point, with at least one time"
        )
    times = tuple(map(float, t.detach().tolist()))
    check_times(times)
    control = StepControl() if control is None else control
    control.check_order(tableau.order)
    return Problem(
        func=func, tableau=tableau, times=times, rtol=rtol, atol=atol, norm=norm,
        control=control, meet=meet,
    )  # fmt: skip


def _budget_bytes(budget: int | str | Budget | None, checkpoints: int | None) -> int | None:
    if checkpoints is not None and (budget is not None or checkpoints < 1):
        raise WorkloadError(
            f"checkpoints={checkpoints!r} with budget={budget!r}; give one of them, and at least 1 "
            "checkpoint"
        )
    if budget is None:
        return None
    parsed = parse_budget(budget)
    if parsed.bytes is None:
        raise BudgetSyntaxError(
            f"the budget {budget!r} is a share of what storing everything needs, which is not "
            "known before an adaptive solve, as the number of its steps is not; give bytes, such "
            "as '64MiB', or have solve_adaptive take a number of checkpoints"
        )
    return parsed.resolve(0)


def _solve_plainly(problem: Problem, y0: Tensor, t: Tensor | None) -> AdaptiveSolution:
    """All tapes are kept: plain autograd through the accepted steps."""
    shift = None
    if t is not None:
        shift = (t[0] - t[0].detach()).to(device=y0.device, dtype=y0.dtype.to_real())
    integration = Integration(problem, y0, shift)
    states = [y0]
    while not integration.done:
        accepted = integration.advance()
        for j in accepted.reached:
            state = _reached_state(integration, accepted, j)
            if t is not None:
                state = state + _moved(integration, accepted, j, t)
            states.append(state)
    statistics = Statistics()
    _count(statistics, integration)
    return AdaptiveSolution(torch.stack(states), statistics)


def _moved(integration: Integration, accepted: Accepted, j: int, t: Tensor) -> Tensor:
    """Zero, with the derivative in time of the state inside a step."""
    share = integration.record.share(accepted.n, j)
    weights = inside_rates(integration.tableau, share)
    with torch.no_grad():
        rate = combined(None, 1.0, weights, accepted.slopes.k)
    moved = (t[j] - t[0]) - (t[j] - t[0]).detach()
    return rate * moved.to(device=rate.device, dtype=rate.dtype.to_real())


def _reached_state(integration: Integration, accepted: Accepted, j: int) -> Tensor:
    share = integration.record.share(accepted.n, j)
    return state_inside(integration.tableau, accepted.step, share, accepted.z0, accepted.slopes)


def _count(statistics: Statistics, integration: Integration) -> None:
    statistics.accepted = len(integration.record)
    statistics.rejected = integration.rejected
    statistics.evaluations = integration.f.evaluations
    statistics.record_bytes = integration.record.nbytes


@final
class _Solve:
    """One solve: its forward pass, what it keeps, and the way back."""

    def __init__(
        self,
        problem: Problem,
        closure: Closure,
        wanted: Sequence[Tensor],
        y0: Tensor,
        budget_bytes: int | None,
        checkpoints: int | None,
    ) -> None:
        """Note what is solved and what it may take."""
        self._problem = problem
        self._environment = Environment(closure, wanted, y0)
        self._budget_bytes, self._slots = budget_bytes, checkpoints or 1
        self._states: dict[int, Checkpoint] = {}
        self._fresh = True
        self.with_time, self.beside_bytes = False, 0
        self.statistics = Statistics()

    def forward(self, y0: Tensor) -> Tensor:
        """Solve without tapes, and keep some states.

        Args:
            y0: The initial state, without a graph.

        Returns:
            The states at the requested times, stacked.
        """
        try:
            with self._environment.first_time():
                return self._forward(y0)
        except BaseException:
            self._states.clear()
            raise

    def _forward(self, y0: Tensor) -> Tensor:
        times = len(self._problem.times)
        if times == 1:
            return y0.unsqueeze(0).clone()
        integration, accepted = self._first_step(y0)
        states = y0.new_empty((times, *y0.shape))
        states[0] = y0
        placement = OnlinePlacement(self._slots)
        placement.visit()
        while True:
            for j in accepted.reached:
                states[j] = _reached_state(integration, accepted, j)
            if integration.done:
                break
            del accepted
            self._place(integration, placement)
            accepted = integration.advance()
        # The end shows now: the input of the last step is at hand, and runs with its tape first.
        if accepted.n not in self._states:
            self._states[accepted.n] = Checkpoint.of(accepted.z0, accepted.random)
        self._record, self._random = integration.record, integration.random
        _count(self.statistics, integration)
        self.statistics.checkpoints = self._slots
        self.statistics.positions = placement.positions
        return states

    def _place(self, integration: Integration, placement: OnlinePlacement) -> None:
        visit, n = placement.visit(), len(integration.record)
        if visit.evicted is not None:
            del self._states[visit.evicted]
        if visit.store:
            self._states[n] = Checkpoint.of(integration.z, integration.snapshot())

    def _first_step(self, y0: Tensor) -> tuple[Integration, Accepted]:
        """Take the first step, and find how many states the budget leaves room for."""
        if self._budget_bytes is None:
            integration = Integration(self._problem, y0)
            accepted = integration.advance()
        else:
            integration, accepted, footprint, evaluations = measured_first_step(
                self._problem,
                self._environment,
                y0,
                with_time=self.with_time,
                beside_bytes=self.beside_bytes,
            )
            self.statistics.footprint = footprint
            self.statistics.measuring_evaluations = evaluations
            self._slots = footprint.slots(self._budget_bytes)
        self._first = Checkpoint.of(y0, accepted.random)
        self._states[0] = self._first
        return integration, accepted

    def backward(
        self, gradients: Tensor, *, with_time: bool
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Go back through the accepted steps.

        Args:
            gradients: With respect to the states at the requested times, stacked.
            with_time: Whether the gradient of the times is wanted.

        Returns:
            The gradients of the initial state, of the tensors that f reads, and of the times.
        """
        if len(self._problem.times) == 1:
            times = torch.zeros(1, dtype=torch.float64) if with_time else None
            return gradients[0].clone(), [None] * len(self._environment.tensors), times
        self._environment.check()
        fresh, self._fresh = self._fresh, False
        if not fresh:  # a second backward: all but the initial state is gone
            self._states[0] = self._first
        shift = None
        if with_time:
            real = gradients.dtype.to_real()
            shift = gradients.new_zeros((), dtype=real).requires_grad_()
        f = RightHandSide(self._problem.func, gradients, shift)
        sweep = Sweep(self._problem, self._record, self._environment, f, random=self._random)
        try:
            found = sweep.run(self._states, self._slots, gradients, shift, last_input=fresh)
        finally:
            self._states.clear()
        self.statistics.backward_evaluations = f.evaluations
        self.statistics.advances = sweep.advances
        return found


class _Node(torch.autograd.Function):
    """The whole solve in the outer graph."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, y0: Tensor, t: Tensor, *wanted: Tensor) -> Tensor:
        states = solve.forward(y0.detach())
        ctx.solve = solve
        ctx.save_for_backward(y0, t)
        return states

    @staticmethod
    @outside_of_compiled_code
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise ExecutionError(
                "the gradient of an adaptive solve with a budget cannot be differentiated again "
                "(create_graph=True); solve without a budget, which keeps all tapes"
            )
        try:
            _, t = ctx.saved_tensors
        except RuntimeError as error:
            raise ExecutionError(
                "a second backward through one solve: pass retain_graph=True to the first, or "
                f"solve again (torch: {error})"
            ) from error
        back, others, times = ctx.solve.backward(grads[0], with_time=ctx.needs_input_grad[2])
        if times is not None:
            times = times.to(device=t.device, dtype=t.dtype)
        return None, back if ctx.needs_input_grad[1] else None, times, *others
