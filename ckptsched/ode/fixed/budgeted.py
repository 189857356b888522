"""A solve over a fixed grid within a byte budget: measured and planned once a shape, then run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ...base.budget import Budget, exact_bytes, format_bytes, parse_budget
from ...base.errors import InfeasibleBudgetError, PlanMismatchError, ProfileError
from ...executor.checkpointed import Checkpointed, checkpointed
from ...planner.plan import Plan
from ...planner.planner import plan_one
from ...profiler.profile import profile
from ...recompute.graph_holds import Hold, take_over
from ...torch_state.locks import Locked
from ...torch_state.replay_context import Generators
from ...torch_state.surroundings import Ambient
from ...workload.chain import Chain
from ..function.attributes import Attributes, ForwardAttributes
from ..function.cache import cache_of
from ..function.fingerprint import Identity, fingerprint, layout
from ..function.tuple_state import check_plain
from ..methods.integrators import Integrator, UserStep
from ..output_loss import Loss, LossNeeds, identity_of_loss, needs_of_loss
from .step_chain import Call, Outputs, StepChain


@final
@dataclass(frozen=True)
class Request:
    """The arguments of `odeint` that a plan depends on."""

    budget: int | float | str | Budget | None
    """Bytes of forward and backward together, the outputs and their gradient included."""
    loss: Loss | None = None
    """The caller's loss of all outputs, where it is named."""
    granularity: str = "step"
    """A stage of the chain: a "step", or a "slope" of a step."""
    solver: str = "auto"
    """Name of a solver of schedules, or "auto"."""


def solve_planned(chain: StepChain, call: Call, y0: Tensor, request: Request) -> Tensor:
    """Solve so that a backward keeps the budget; returns the flat states at all times, stacked.

    Raises:
        InfeasibleBudgetError: Nothing fits; the message names the least budget that does.
        ExecutionError: The steps refuse an output of func, also while they are measured.
        ProfileError: The loss is none of the outputs.
        WorkloadError: The state is no plain tensor.
    """
    closure, grid = call.closure, call.grid
    closure.check_compiled()
    check_plain(y0)
    cache, function = cache_of(call.func, closure)
    key = (
        *(function, identity_of_loss(request.loss), _identity(call.integrator)),
        *(chain.shapes, chain.counts, chain.slopes, grid.clock is not None, grid.between),
        *(layout(y0), str(request.budget), request.solver, torch.get_num_threads()),
        *((Identity(m), tuple(p.training for p in m.modules())) for m in closure.modules),
        *Ambient.take(y0.device).key(),
    )
    for attempt in range(2):
        # Other threads that draw random numbers wait meanwhile: measuring draws, and puts the
        # generator back. So do those that replace parameters of the same modules.
        with Locked((Generators.lock, cache.lock)):
            tensors = (() if grid.clock is None else (grid.clock,)) + closure.tensors
            found: Plan | Checkpointed | None = cache.find(key)
            if found is None:
                needs = needs_of_loss(request.loss, y0, grid.count, chain.shapes, cache)
                found = _plan(chain, call.to_measure(y0), y0, tensors, request, needs)
            model = checkpointed(chain, found) if isinstance(found, Plan) else found
            model.share_lock(cache.lock)
            cache.add(key, model if cache.outlives(closure.modules) else model.plan)
        result = torch.empty(grid.count, *y0.shape, dtype=y0.dtype, device=y0.device)
        running = call.writing_into(result, first=0 if y0.requires_grad else 1)
        del result  # the call gives it away
        try:
            begun = ForwardAttributes(call.func)
            last = model(y0, running, *tensors)
            running.found = ForwardAttributes(call.func, begun)
        except PlanMismatchError:
            # Something changed that the key does not tell, such as a frozen parameter.
            cache.drop(key)
            if attempt:
                raise
            continue
        hold = take_over(last) or Hold(None)
        hold.besides = running
        outputs: Tensor = Outputs.apply(last, running, hold)
        return outputs
    raise AssertionError("unreachable")


def _plan(
    chain: StepChain,
    sample: Call,
    y0: Tensor,
    tensors: tuple[Tensor, ...],
    request: Request,
    needs: LossNeeds,
) -> Plan:
    """Measure the chain, and plan it with the bytes that outputs and their gradient leave."""
    assert request.budget is not None
    budget = parse_budget(request.budget)
    # The mode of the whole is that of its parts, where they agree.
    chain.training = chain.owners.training = all(m.training for m in chain.owners.modules())
    raised = None
    attributes = Attributes(sample.func)
    try:
        measured = profile(chain, y0, sample, *tensors, loss=_loss)
    except ProfileError as error:
        raised = error.__cause__
        if raised is None:
            raise
    finally:
        beside = attributes.put_back()  # as func will come to keep again
    if raised is not None:  # by the steps, or by func: by the same error as without a budget
        raise raised
    outputs_bytes = sample.grid.count * y0.nbytes
    # The gradient of the outputs counts among the tensors that live from the start to the end.
    overhead = max(measured.loss_overhead_bytes, needs.peak_bytes - outputs_bytes)
    beside += 2 * outputs_bytes + needs.held_bytes
    if chain.shapes is not None:
        beside += y0.nbytes  # the parts of the state as one tensor
    clock = sample.grid.clock
    if clock is not None:
        beside += 2 * clock.nbytes  # and what it was made from
    measured = replace(measured, loss_overhead_bytes=overhead)
    return _plan_beside(measured, budget, beside, request.solver)


def _identity(integrator: Integrator) -> Hashable:
    """A key of an integrator, the same where a step function is made anew for each solve."""
    if isinstance(integrator, UserStep):
        step = integrator.function
        return "step", fingerprint(step) or Identity(step), integrator.shapes
    return integrator


def _plan_beside(chain: Chain, budget: Budget, beside: int, solver: str) -> Plan:
    """Plan a chain beside other tensors of so many bytes, which live from the start to the end.

    A share is one of the peak of storing all, both together; an infeasible budget's error has the
    least for both.
    """
    everything = 2**50
    if budget.share is not None:
        everything = plan_one(chain, everything, solver="store_all").peak_bytes + beside
    asked = budget.resolve(everything)
    try:
        if asked <= beside:
            # Not even the outputs fit; the error of the least budget tells the one that works.
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
