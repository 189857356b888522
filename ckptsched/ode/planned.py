"""A solve over a fixed grid within a byte budget: measured and planned once a shape, then run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, final

import torch
from torch import Tensor

from ..budget import Budget, exact_bytes, format_bytes, parse_budget
from ..context import Autocast
from ..errors import InfeasibleBudgetError, PlanMismatchError
from ..executor import Checkpointed, checkpointed
from ..planner import plan
from ..plans import Plan
from ..profiler import profile
from ..structure import training_mode
from ..workload import Chain
from .closure import KEPT, Closure
from .grid import Grid
from .solve import Call, Outputs, Solve

_MOST_KEPT = 8


@final
class _Kept:
    """Models that follow a plan, kept with the right-hand side; a copy of that begins anew."""

    def __init__(self) -> None:
        self.models: dict[Hashable, Checkpointed] = {}

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def solve_planned(
    solve: Solve,
    y0: Tensor,
    grid: Grid,
    closure: Closure,
    budget: int | float | str | Budget,
    solver: str,
) -> Tensor:
    """Solve so that a backward keeps the budget.

    Args:
        solve: The steps.
        y0: Flat initial state.
        grid: Times of steps and outputs.
        closure: What the right-hand side reads.
        budget: Bytes of forward and backward together, the outputs and their gradient included.
        solver: Name of a solver of schedules, or "auto".

    Returns:
        The outputs, stacked.

    Raises:
        InfeasibleBudgetError: Nothing fits; the message names the least budget that does.
    """
    count = 1 + sum(solve.counts)
    tensors = (() if grid.clock is None else (grid.clock,)) + closure.tensors
    kept = _kept_with(solve.__dict__["func"])
    key = _key(solve, y0, grid, budget, solver)
    for attempt in range(2):
        model = kept.models.get(key)
        if model is None:
            model = _plan(solve, y0, grid, closure, tensors, budget, solver)
            while len(kept.models) >= _MOST_KEPT:
                del kept.models[next(iter(kept.models))]
            kept.models[key] = model
        result = torch.empty(count, *y0.shape, dtype=y0.dtype, device=y0.device)
        call = Call(grid, closure, result)
        del result  # the call gives it away
        try:
            last = model(y0, call, *tensors)
        except PlanMismatchError:
            # Something changed that the key does not tell, such as a frozen parameter.
            del kept.models[key]
            if attempt:
                raise
            continue
        outputs: Tensor = Outputs.apply(last, call)
        return outputs
    raise AssertionError("unreachable")


def _kept_with(func: Callable[..., Any]) -> _Kept:
    """The models kept with a function; a new one where it has no attributes."""
    owner = getattr(func, "__self__", func)  # a method is made anew each time
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):
        return _Kept()
    found: _Kept = attributes.setdefault(KEPT, _Kept())
    return found


def _key(
    solve: Solve, y0: Tensor, grid: Grid, budget: int | float | str | Budget, solver: str
) -> Hashable:
    modes = tuple(training_mode(module) for module in solve.owners)
    func = solve.__dict__["func"]
    return (
        *(getattr(func, "__name__", ""), solve.integrator, solve.shapes, solve.counts, solve.parts),
        *(grid.clock is not None, tuple(y0.shape), y0.dtype, y0.stride(), str(y0.device)),
        *(y0.requires_grad, modes, str(Autocast.take(y0.device)), torch.get_num_threads()),
        *(str(budget), solver),
    )


def _plan(
    solve: Solve,
    y0: Tensor,
    grid: Grid,
    closure: Closure,
    tensors: tuple[Tensor, ...],
    budget: int | float | str | Budget,
    solver: str,
) -> Checkpointed:
    """Measure the chain, plan it with what outputs and their gradient leave, and wrap it."""
    parse_budget(budget)
    _set_modes(solve)
    count = 1 + sum(solve.counts)
    sample = Call.to_measure(grid, closure, y0)

    def loss(last: Tensor) -> Tensor:
        return _loss(last, count)

    chain = profile(solve, y0, sample, *tensors, loss=loss)
    beside = 2 * count * y0.numel() * y0.element_size()
    if solve.shapes is not None:
        beside += y0.numel() * y0.element_size()  # the parts of the state as one tensor
    if grid.clock is not None:
        beside += 2 * grid.clock.nbytes  # and what it was made from
    return checkpointed(solve, plan_beside(chain, budget, beside, solver))


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
        everything = plan(chain, budget=everything, solver="store_all").peak_bytes + beside
    asked = parsed.resolve(everything)
    try:
        if asked <= beside:
            # Not even the outputs fit; what would is in the error of the least that can be asked.
            return plan(chain, budget=1, solver=solver)
        return plan(chain, budget=asked - beside, solver=solver)
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


def _loss(last: Tensor, count: int) -> Tensor:
    """A loss that takes what a mean square over all outputs does."""
    if last.is_complex():
        last = torch.view_as_real(last)
    outputs = last.reshape(1, -1).expand(count, -1)
    return (outputs - 1.0).square().mean()
