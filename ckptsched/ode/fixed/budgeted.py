"""A solve over a fixed grid within a byte budget: measured and planned once a shape, then run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...base.budget import Budget, exact_bytes, format_bytes, parse_budget
from ...base.errors import InfeasibleBudgetError, PlanMismatchError, ProfileError
from ...capture.signature import training_mode
from ...executor.checkpointed import Checkpointed, checkpointed
from ...planner.plan import Plan
from ...planner.planner import plan_one
from ...profiler.profile import profile
from ...recompute.graph_holds import Hold, take_over
from ...torch_state.locks import InTurn
from ...torch_state.replay_context import Generators
from ...torch_state.surroundings import Ambient
from ...workload.chain import Chain
from ..function.attributes import Attributes, Found
from ..function.cache import kept_with
from ..function.captures import Closure
from ..function.fingerprint import Identity, fingerprint
from ..function.tuple_state import check_plain
from ..methods.integrators import Integrator, UserStep
from ..output_loss import Loss, LossNeeds, identity_of_loss, needs_of_loss
from .solve import Call, Outputs, Solve
from .time_grid import Grid


def solve_planned(
    solve: Solve,
    integrator: Integrator,
    func: Callable[..., Any],
    y0: Tensor,
    grid: Grid,
    closure: Closure,
    budget: int | float | str | Budget,
    solver: str,
    loss: Loss | None,
) -> Tensor:
    """Solve so that a backward keeps the budget.

    Args:
        solve: The steps.
        integrator: The rule for one of them.
        func: The right-hand side.
        y0: Flat initial state.
        grid: Times of steps and outputs.
        closure: What the right-hand side reads.
        budget: Bytes of forward and backward together, the outputs and their gradient included.
        solver: Name of a solver of schedules, or "auto".
        loss: Of what is returned to the caller, where it is named.

    Returns:
        The outputs, stacked.

    Raises:
        InfeasibleBudgetError: Nothing fits; the message names the least budget that does.
        ExecutionError: The steps refuse what func does, also while they are measured.
        ProfileError: The loss is none of the outputs.
        WorkloadError: The state is no plain tensor.
    """
    closure.check_compiled()
    check_plain(y0)
    count = 1 + sum(solve.counts)
    kept, which = kept_with(func, closure)
    key = (
        *(which, identity_of_loss(loss), _identity(integrator)),
        *_key(solve, y0, grid, closure, budget, solver),
    )
    for attempt in range(2):
        # Who draws random numbers waits meanwhile: measuring draws, and puts the generator back.
        with InTurn((Generators.turn, kept.lock)):
            # Nor does another thread have stand-ins in their places.
            tensors = (() if grid.clock is None else (grid.clock,)) + closure.tensors
            found: Plan | Checkpointed | None = kept.find(key)
            if found is None:
                needs = needs_of_loss(loss, y0, count, solve.shapes, kept)
                sample = Call.to_measure(func, grid, closure, integrator, y0)
                found = _plan(solve, sample, y0, tensors, budget, solver, needs)
            model = checkpointed(solve, found) if isinstance(found, Plan) else found
            model.share_lock(kept.lock)
            kept.add(key, model if kept.outlives(closure.modules) else model.plan)
        result = torch.empty(count, *y0.shape, dtype=y0.dtype, device=y0.device)
        call = Call(func, grid, closure, integrator, result, first=0 if y0.requires_grad else 1)
        del result  # the call gives it away
        try:
            begun = Found(func)
            last = model(y0, call, *tensors)
            call.found = Found(func, begun)
        except PlanMismatchError:
            # Something changed that the key does not tell, such as a frozen parameter.
            kept.drop(key)
            if attempt:
                raise
            continue
        hold = take_over(last) or Hold(None)
        hold.besides = call
        outputs: Tensor = Outputs.apply(last, call, hold)
        return outputs
    raise AssertionError("unreachable")


def _key(
    solve: Solve,
    y0: Tensor,
    grid: Grid,
    closure: Closure,
    budget: int | float | str | Budget,
    solver: str,
) -> tuple[Hashable, ...]:
    modes = tuple((Identity(module), training_mode(module)) for module in closure.modules)
    return (
        *(solve.shapes, solve.counts, solve.parts, grid.clock is not None, grid.between),
        *(tuple(y0.shape), y0.dtype, y0.stride(), str(y0.device), y0.requires_grad),
        *(modes, *Ambient.take(y0.device).key(), torch.get_num_threads(), str(budget), solver),
    )


def _plan(
    solve: Solve,
    sample: Call,
    y0: Tensor,
    tensors: tuple[Tensor, ...],
    budget: int | float | str | Budget,
    solver: str,
    needs: LossNeeds,
) -> Plan:
    """Measure the chain, and plan it with what outputs and their gradient leave."""
    parse_budget(budget)
    _set_modes(solve)
    count = 1 + sum(solve.counts)
    raised = None
    attributes = Attributes(sample.func)
    try:
        chain = profile(solve, y0, sample, *tensors, loss=_loss)
    except ProfileError as error:
        raised = error.__cause__
        if raised is None:
            raise
    finally:
        beside = attributes.put_back()  # as func will come to keep again
    if raised is not None:  # by the steps, or by func: by the same error as without a budget
        raise raised
    outputs_bytes = count * y0.nbytes
    # The gradient of the outputs is among what lives from the start to the end.
    overhead = max(chain.loss_overhead_bytes, needs.peak_bytes - outputs_bytes)
    chain = replace(chain, loss_overhead_bytes=overhead)
    beside += 2 * outputs_bytes + needs.held_bytes
    if solve.shapes is not None:
        beside += y0.nbytes  # the parts of the state as one tensor
    clock = sample.grid.clock
    if clock is not None:
        beside += 2 * clock.nbytes  # and what it was made from
    return plan_beside(chain, budget, beside, solver)


def _identity(integrator: Integrator) -> Hashable:
    """What tells a rule from others, also where a step function is made anew for each solve."""
    if isinstance(integrator, UserStep):
        step = integrator.function
        return "step", fingerprint(step) or Identity(step), integrator.shapes
    return integrator


def _set_modes(solve: Solve) -> None:
    """Let the mode of the whole be that of its parts, where they agree."""
    solve.training = solve.owners.training = all(m.training for m in solve.owners.modules())


def plan_beside(chain: Chain, budget: int | float | str | Budget, beside: int, solver: str) -> Plan:
    """Plan a chain beside which other tensors live.

    Args:
        chain: The chain.
        budget: For both; a share is one of what storing all needs, both together.
        beside: Bytes of the other tensors, there from the start to the end.
        solver: Name of a solver, or "auto".

    Raises:
        InfeasibleBudgetError: With the least budget for both.
    """
    parsed = parse_budget(budget)
    everything = 2**50
    if parsed.share is not None:
        everything = plan_one(chain, everything, solver="store_all").peak_bytes + beside
    asked = parsed.resolve(everything)
    try:
        if asked <= beside:
            # Not even the outputs fit; what would is in the error of the least that can be asked.
            return plan_one(chain, 1, solver=solver)
        return plan_one(chain, asked - beside, solver=solver)
    except InfeasibleBudgetError as error:
        least = None if error.least_budget_bytes is None else error.least_budget_bytes + beside
        needs = "" if least is None else f"; the least that works is {exact_bytes(least)}"
        raise InfeasibleBudgetError(
            f"no schedule of the {len(chain)} stages fits {exact_bytes(asked, budget=True)}, of "
            f"which the outputs and their gradient take {format_bytes(beside)}{needs}, or ask "
            "for fewer output times",
            budget_bytes=asked,
            least_budget_bytes=least,
            stage=error.stage,
        ) from error


def _loss(last: Tensor) -> Tensor:
    """A mean square over the last output."""
    if last.is_complex():
        last = torch.view_as_real(last)
    return (last - 1.0).square().mean()
