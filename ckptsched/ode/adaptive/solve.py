"""Adaptive solves whose gradient keeps a byte budget.

The forward pass accepts and rejects steps. Of an accepted step its time and size are recorded, and
as there is room its tape is kept, else the state at its start, or neither, as the number of steps
is known in the end only (`checkpointed`). The backward runs accepted steps that have no tape again
with their recorded sizes, and nothing else: it gives the gradient of the accepted discrete steps,
states inside steps included, with step sizes held constant. Slopes are no part of a state: a step
that is run again needs neither an error nor the slope at its end, so that the slope that is the
next step's first (FSAL) costs nothing when it is evaluated there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ...base.budget import Budget, parse_budget
from ...base.errors import BudgetSyntaxError, ExecutionError, WorkloadError
from ...tensors.devices import KNOWN, several_devices
from ...torch_state.locks import Locked
from ...torch_state.replay_context import Generators
from ...torch_state.torch_modes import (
    as_numbers,
    has_gradient,
    only_plain,
    outside_of_compiled_code,
)
from ..adaptive.norms import norm_of_parts
from ..function.cache import cache_of
from ..function.callbacks import check_callbacks, find_callbacks
from ..function.captures import Closure, find_closure
from ..function.rng_and_buffers import RngAndBuffers
from ..function.tolerances import read_tolerances
from ..function.tuple_state import Shapes, check_plain, flat_state, parts_of
from ..methods.table import find_tableau
from ..methods.tableau import ButcherTableau
from ..output_loss import Loss, needs_of_loss
from .checkpointed import CheckpointedSolve
from .forward import Integration, time_shift
from .problem import Problem, check_times
from .statistics import Statistics
from .step_memory import Room
from .step_memory_probe import Trial
from .step_size import StepControl, Tolerances


@final
@dataclass(frozen=True, slots=True)
class AdaptiveSolution:
    """The states at the requested times, and counts of the solve."""

    states: Any
    """The state at each requested time, stacked: the first is the initial state. A tuple of such
    where the state is one."""
    statistics: Statistics
    """Counts; those of the backward are filled in by it."""


@outside_of_compiled_code
def solve_adaptive(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    method: str | ButcherTableau = "dopri5",
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    norm: Callable[[Any], Tensor] | None = None,
    control: StepControl | None = None,
    meet_times: bool = False,
    params: Sequence[Tensor] | None = None,
    budget: int | str | Budget | None = None,
    loss: Loss | None = None,
    checkpoints: int | None = None,
    beside_bytes: int = 0,
) -> AdaptiveSolution:
    """Solve dy/dt = func(t, y) with steps that keep a tolerance.

    Without a budget and checkpoints all tapes of accepted steps are kept, and the backward is plain
    autograd's. With either the numbers of the forward pass are the same, bit for bit, and the
    gradient that of the same steps. Within a budget tapes are kept as long as they fit: where all
    do, no step runs again, and the gradient has the bits of plain autograd. Differentiating the
    gradient again (`create_graph=True`) takes the memory of plain autograd, with a warning.

    Args:
        func: Right-hand side, called with a time of no dimensions and a state; returns a slope of
            the state's shape and dtype.
        y0: Initial state: a floating-point or complex tensor, or a tuple of them, which are solved
            as one.
        t: Requested times, a tensor of one dimension that rises or falls strictly; the first is
            that of y0.
        method: Name of a method with an error estimate, or a tableau.
        rtol: Tolerance relative to the state: a number, or a tensor that broadcasts to it; of a
            tuple a number, or one or a tensor for each part.
        atol: Tolerance besides, the same.
        norm: The size of a tensor of errors: `rms_norm`, which None stands for, `batch_max_norm`,
            or one of your own. Of a tuple it gets a tuple; None then takes the largest of the
            parts' figures.
        control: Size of the steps; the elementary controller if None.
        meet_times: Whether steps end at the requested times. Else states there are those inside
            steps, by the method's interpolant, and the last step may go beyond.
        params: Tensors that func reads and that are to get gradients; if None, all that are found:
            the parameters of a module, or of modules and tensors that a function reads from its
            closure.
        budget: Bytes that forward and backward may take at their peak together: states at the
            requested times and their gradients, states that are kept, the tape of a step, and
            gradients of parameters. Bytes or text such as "200MiB". The memory of a step is
            measured on the first, once for each kind of call (shapes, dtypes, modes, wanted
            gradients), and remembered for func, and for functions of equal code and closure.
        loss: From the states that are returned to one number, as the training step computes it: the
            budget then holds with it, whatever it takes, which is measured once. None provides for
            the states, their gradient, and a few more of the size of the state at one time, such as
            a mean square at a single time takes. Read with a budget only.
        checkpoints: States that may be kept at once, the initial one included, in place of a
            budget; no tapes.
        beside_bytes: Bytes of the budget for other tensors that live throughout.

    Returns:
        The states, shape `(len(t), *y0.shape)`, a tuple of such where y0 is one; and statistics.

    Raises:
        IntegrationError: The solution cannot be continued; the error has the time.
        InfeasibleBudgetError: The budget is below one step; the error has the least that works.
        WorkloadError: A method without an error estimate, or arguments that do not go together.
        BudgetSyntaxError: A budget that is not in bytes.
        ProfileError: The loss is none of the states, or there is no meter.
    """
    flat, shapes = flat_state(y0)
    limited = budget is not None or checkpoints is not None
    check_callbacks(func, budget=limited, adjoint=False, fixed=False)
    problem = make_problem(func, flat, shapes, t, method, rtol, atol, norm, control, meet_times)
    limits = Limits.of(budget, checkpoints, beside_bytes, loss)
    solution = solve_flat(problem, flat, t, find_closure(func), limits, params)
    return AdaptiveSolution(parts_of(solution.states, shapes), solution.statistics)


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """Most memory of a solve: bytes, or a number of checkpoints; without both, no limit."""

    budget_bytes: int | None
    checkpoints: int | None = None
    beside_bytes: int = 0
    """Bytes of the budget for other tensors that live throughout."""
    loss: Loss | None = None
    """The caller's, where it is named."""

    @staticmethod
    def of(
        budget: int | float | str | Budget | None,
        checkpoints: int | None = None,
        beside_bytes: int = 0,
        loss: Loss | None = None,
    ) -> Limits:
        """Read arguments of `solve_adaptive`; raises as that does."""
        if checkpoints is not None and (budget is not None or checkpoints < 1):
            raise WorkloadError(
                f"checkpoints={checkpoints!r} with budget={budget!r}; give one of them, and at "
                "least 1 checkpoint"
            )
        if budget is None:
            return Limits(None, checkpoints, beside_bytes, loss)
        parsed = parse_budget(budget)
        if parsed.bytes is None:
            raise BudgetSyntaxError(
                f"the budget {budget!r} is a share of what storing everything needs, which is not "
                "known before an adaptive solve, as the number of its steps is not; give bytes, "
                "such as '64MiB', or have solve_adaptive take a number of checkpoints"
            )
        return Limits(parsed.resolve(0), None, beside_bytes, loss)


def solve_flat(
    problem: Problem,
    y0: Tensor,
    t: Tensor,
    closure: Closure,
    limits: Limits,
    params: Sequence[Tensor] | None = None,
) -> AdaptiveSolution:
    """Solve a problem; returns and raises as `solve_adaptive` does, but that states are flat.

    `t` has its graph. `params` are the tensors of the closure that get gradients; None for all.
    """
    cache, function = cache_of(problem.func, closure)
    with Locked((cache.lock,)):  # else another thread may have stand-ins in their places
        params = closure.parameters if params is None else params
    wanted = list({id(p): p for p in params if p.requires_grad}.values())
    if problem.meet and (t.requires_grad or has_gradient(t)):
        raise WorkloadError(
            "the gradient of t is that of states inside steps; leave out meet_times, or detach t"
        )
    everything = (y0, t, *wanted)
    tracked = any(map(has_gradient, everything))
    limited = limits.budget_bytes is not None or limits.checkpoints is not None
    if not (limited and tracked and len(problem.times) > 1):
        return _solve_plainly(problem, closure, y0, t, tracked=tracked)
    if only_plain(everything, "the solve", cannot="checkpoints", stacklevel=3):
        return _solve_plainly(problem, closure, y0, t, tracked=True)
    _check_can_run_again(y0, wanted, closure)
    trial = Trial(problem, closure, wanted, y0, with_time=t.requires_grad)
    count, shapes = len(problem.times), problem.shapes
    loss_needs = partial(needs_of_loss, limits.loss, y0, count, shapes, cache)
    # The parts of the state are the caller's; as one tensor it is one more.
    beside_bytes = limits.beside_bytes + problem.tolerances.nbytes
    beside_bytes += 0 if shapes is None else y0.nbytes
    found = trial.findings(cache, function, limits.budget_bytes, beside_bytes, loss_needs)
    statistics = Statistics(measuring_evaluations=trial.evaluations)
    room = Room(slots=limits.checkpoints or 1)
    if limits.budget_bytes is not None and found.footprint is not None:
        statistics.footprint = found.footprint
        room = found.footprint.room(limits.budget_bytes)
    # In the order in which all ask for them.
    locks = (*((Generators.lock,) if found.draws else ()), cache.lock)
    states = CheckpointedSolve(problem, closure, wanted, room, locks, statistics).run(y0, t)
    return AdaptiveSolution(states, statistics)


def make_problem(
    func: Callable[..., Any],
    y0: Tensor,
    shapes: Shapes,
    t: Tensor,
    method: str | ButcherTableau,
    rtol: Any,
    atol: Any,
    norm: Callable[[Any], Tensor] | None,
    control: StepControl | None,
    meet_times: bool,
) -> Problem:
    """The problem that the arguments of `solve_adaptive` describe; raises as that does."""
    read = read_tolerances(rtol, atol, y0, shapes)
    tableau = find_tableau(method)
    if tableau.b_error is None:
        raise WorkloadError(
            f"method {tableau.name!r} has no error estimate, so its steps cannot adapt; give one "
            "that has, such as 'dopri5', or use it on a fixed grid"
        )
    if t.dim() != 1 or not len(t) or not t.is_floating_point():
        raise WorkloadError(
            f"t has shape {tuple(t.shape)} and {t.dtype}; give a tensor of one dimension, of "
            "floating point, with at least one time"
        )
    times = tuple(as_numbers(t.detach()))
    check_times(times, t.dtype)
    control = StepControl() if control is None else control
    control.check_order(tableau.order)
    return Problem(
        func=func, shapes=shapes, tableau=tableau, times=times,
        tolerances=Tolerances(*read, norm_of_parts(norm, shapes)), control=control,
        meet=meet_times, callbacks=find_callbacks(func, shapes),
    )  # fmt: skip


def _check_can_run_again(y0: Tensor, wanted: Sequence[Tensor], closure: Closure) -> None:
    """Refuse states and functions whose steps cannot be run again exactly."""
    check_plain(y0)
    where = several_devices((f"a tensor of shape {tuple(x.shape)}", x) for x in (y0, *wanted))
    if where or y0.device.type not in KNOWN:
        raise ExecutionError(
            f"checkpoints are for one device of type {' or '.join(KNOWN)}, whose random state is "
            f"put back when steps run again; found {where or y0.device}: move all there, or solve "
            "without a budget and checkpoints"
        )
    closure.check_compiled()


def _solve_plainly(
    problem: Problem, closure: Closure, y0: Tensor, times: Tensor, *, tracked: bool
) -> AdaptiveSolution:
    """All tapes are kept: plain autograd through the accepted steps."""
    t = times if tracked and has_gradient(times) else None
    shift = None if t is None else time_shift(t, y0)
    integration = Integration(problem, y0, RngAndBuffers(closure, y0.device), shift)
    states = [y0]
    while not integration.done:
        states += integration.reached(integration.advance(), t)
    statistics = Statistics(tapes=len(integration.record) if tracked else 0)
    statistics.count(integration)
    return AdaptiveSolution(torch.stack(states), statistics)
