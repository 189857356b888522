"""A solve over a fixed grid: by plain steps, or within a byte budget where a backward may come."""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.errors import IntegrationError, WorkloadError
from ...recompute.graph_holds import Hold, joined
from ...torch_state.replay_context import Recomputing
from ...torch_state.torch_modes import only_plain, outside_of_compiled_code, transform_at_work
from ..function.callbacks import STEP, Callbacks, find_callbacks
from ..function.tuple_state import Shapes
from ..methods.integrators import Implicit, Integrator, RungeKutta
from .budgeted import Request, solve_planned
from .step_chain import Call, StepChain


def solve_on_grid(
    call: Call, y0: Tensor, shapes: Shapes, times_dtype: torch.dtype, request: Request
) -> Tensor:
    """Solve with the steps of a fixed grid; returns the flat states at all times, stacked.

    Without a budget everything is stored; callbacks are given times of `times_dtype`.

    Raises:
        WorkloadError: A granularity that does not fit the integrator.
        IntegrationError: A state that is not finite; the error has time and step.
    """
    chain = StepChain(call, shapes, _slopes(call.integrator, request.granularity))
    callbacks = find_callbacks(call.func, shapes, times_dtype)
    outputs = _run(chain, call, y0, request, callbacks)
    _check_finite(chain, call, y0, outputs)
    return outputs


def _slopes(integrator: Integrator, granularity: str) -> int | None:
    """The number of stages that a step is taken apart into; None for whole steps."""
    if granularity not in ("step", "slope"):
        raise WorkloadError(f"granularity is {granularity!r}; give 'step' or 'slope'")
    if granularity == "step":
        return None
    if not isinstance(integrator, RungeKutta):
        raise WorkloadError(
            f"granularity 'slope' takes the steps of Runge-Kutta methods apart, found "
            f"{type(integrator).__name__}; give 'step'"
        )
    slopes = integrator.tableau.evaluations
    return slopes if slopes > 1 else None


@outside_of_compiled_code
def _run(
    chain: StepChain, call: Call, y0: Tensor, request: Request, callbacks: Callbacks | None
) -> Tensor:
    """All outputs, stacked: by plain steps, or planned where a backward is possible."""
    grid = call.grid
    clock = () if grid.clock is None else (grid.clock,)
    inputs = (y0, *clock, *call.closure.parameters)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    planned = request.budget is not None and tracked
    if planned and not only_plain(inputs, "the solve", stacklevel=4):
        return solve_planned(chain, call, y0, request)
    z = y0
    for index in range(grid.steps):
        if callbacks is not None:
            start, end = grid.times[index], grid.times[index + 1]
            callbacks.tell(STEP, start, z, end - start)
        z = chain.step(index, z, call, *clock)
    states = [*call.kept, z]
    call.kept = []
    if isinstance(call.integrator, Implicit) and z.requires_grad:
        # Its backward evaluates func, and refers to the call weakly.
        return joined(Hold(call), *(state.unsqueeze(0) for state in states), fused=True)
    return torch.stack(states)


def _check_finite(chain: StepChain, call: Call, y0: Tensor, outputs: Tensor) -> None:
    """Refuse a solution that is not finite; the step at fault is found by running again."""
    seen = outputs.detach()
    # A sum takes no memory; one that overflows is looked at more closely.
    if transform_at_work((seen,)) or bool(seen.sum().isfinite()) or bool(seen.isfinite().all()):
        return
    with torch.no_grad(), Recomputing():
        z, grid = y0.detach(), call.grid
        for index in range(grid.steps):
            before, z = z, chain.step(index, z, call)
            call.kept.clear()
            if not bool(z.isfinite().all()):
                break
    start, end = grid.times[index], grid.times[index + 1]
    largest = float(before[before.isfinite()].abs().max()) if before.isfinite().any() else 0.0
    given = " (y0 itself is not finite)" if not bool(y0.isfinite().all()) else ""
    raise IntegrationError(
        f"the state is not finite after step {index} of {grid.steps}, from time {start!r} to "
        f"{end!r}{given}; the largest entry before it was {largest:.3g}. Take smaller steps, an "
        "implicit method if the problem is stiff, or bound what func returns",
        time=end,
        step=index,
    )
