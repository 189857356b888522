"""A solve over a fixed grid as a chain of stages, a step each, with outputs that leave on the way.

The times and the tensor that outputs are written into change from call to call. They are no part of
the module: every stage is given them as a `Call`. So one plan serves all calls of one shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn

from ...base.errors import IntegrationError
from ...capture.stage_discovery import StageCall
from ...recompute.graph_holds import Hold, keep
from ...torch_state.replay_context import is_recomputing
from ...torch_state.torch_modes import under_transform
from ..function.attributes import ForwardAttributes
from ..function.captures import Closure
from ..function.tuple_state import Shapes, joined_slope, split
from ..methods.explicit import Slope, Time, add, as_time
from ..methods.integrators import Integrator, Leapfrog, RungeKutta, UserStep
from ..methods.separable import SeparableSlope
from .step_stages import SteppedModule, slope_step, start_of, step_stages
from .time_grid import TimeGrid


@final
class Call:
    """One call of `odeint`, given to every step: function, times, integrator and outputs.

    Outputs are written into `result`, along the first dimension; None collects them with their
    graphs, for plain autograd. `first` is the first whose gradient is asked for: 1 where y0 has
    none.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        grid: TimeGrid,
        closure: Closure,
        integrator: Integrator,
        result: Tensor | None = None,
        first: int = 0,
    ) -> None:
        self.func, self.grid, self.closure, self.result = func, grid, closure, result
        self.integrator = integrator
        self.collects = result is None
        self.kept: list[Tensor] = []
        """Outputs that were collected."""
        self.gradients: Tensor | None = None
        """With respect to all outputs, stacked, during a backward."""
        self._first = first
        self.sampling = False
        """Whether every step does as much as the dearest, because it is measured."""
        self.looked = False
        """Whether the dependences of func were checked against the integrator in a step."""
        self.found: ForwardAttributes | None = None
        """Attributes of func as the forward pass left them, once it is over."""

    def writing_into(self, result: Tensor, first: int) -> Call:
        """The same call with outputs written into a tensor; arguments as for `Call`."""
        return Call(self.func, self.grid, self.closure, self.integrator, result, first)

    def to_measure(self, y0: Tensor) -> Call:
        """The same call for the profiler: no output is written, and their gradients are zero."""
        call = Call(self.func, self.grid, self.closure, self.integrator)
        call.collects, call.sampling = False, True
        zero = torch.zeros((), dtype=y0.dtype, device=y0.device)
        call.gradients = zero.expand(self.grid.count, *y0.shape)
        return call

    def emit(self, j: int, z: Tensor, output: Tensor) -> Tensor:
        """Let output j, the state z at the end of a step or made from it, leave the chain.

        Its gradient will join that of the state. Returns the state to continue with: the same
        values.
        """
        if self.collects:
            self.kept.append(output)
            # The gradients of all that follows add up on their own, as they do in a chain.
            return z.view_as(z)
        state: Tensor = _Emitted.apply(z, output, self, j)
        return state

    def write(self, j: int, output: Tensor) -> None:
        """Write output j into the result, in the first run of its step."""
        if self.result is not None and not is_recomputing():
            self.result[j].copy_(output)

    def again(self) -> AbstractContextManager[None]:
        """Around an evaluation of func: in a backward its attributes are those of the forward."""
        return nullcontext() if self.found is None else self.found.again()

    def gradient(self, j: int) -> Tensor | None:
        """The gradient of output j; that of the first one is asked for last."""
        found = None if self.gradients is None else self.gradients[j]
        if j == self._first and not self.sampling:
            self.gradients = None
        return found

    def arrived(self, gradients: Tensor) -> None:
        """Note the gradients of all outputs, stacked, for the backward of the steps.

        Where gradients can be differentiated again, the steps first run again as one graph, in
        which outputs are collected as for plain autograd: a graph may be gone through several
        times, each with other gradients, and must not hold those of one of them.
        """
        self.kept, self.collects = [], torch.is_grad_enabled()
        asked = self.collects or self._first < len(gradients) - 1
        self.gradients = gradients if asked else None

    def collected(self) -> list[tuple[Tensor, Tensor]]:
        """The outputs that a run as one graph collected, each with its gradient."""
        kept, gradients = self.kept, self.gradients
        self.kept, self.gradients, self.collects = [], None, False
        return [] if gradients is None else list(zip(kept, gradients, strict=False))


class _Emitted(torch.autograd.Function):
    """Hands a state on; an output leaves here in the forward, and its gradient comes in."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, output: Tensor, call: Call, j: int) -> Tensor:
        ctx.call, ctx.j = weakref.ref(call), j  # which the outputs' node keeps
        call.write(j, output)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call: Call | None = ctx.call()
        assert call is not None
        return grads[0], call.gradient(ctx.j), None, None


class _Reaching(torch.autograd.Function):
    """A state through which the way back always reaches the state before, if with zero.

    A step function of the user's may cut the graph; the gradients of outputs before the cut wait
    for the steps to come by.
    """

    @staticmethod
    def forward(ctx: Any, after: Tensor, before: Tensor) -> Tensor:
        return after.view_as(after)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient = grads[0]
        return gradient, gradient.new_zeros(()).expand_as(gradient)


class Outputs(torch.autograd.Function):
    """Hands out all outputs of a call at once, after its last step.

    Its backward, the first of all, notes the gradients of the outputs for the steps.
    """

    @staticmethod
    def forward(ctx: Any, last: Tensor, call: Call, hold: Hold) -> Tensor:
        """Take the last state, which is the last output, and return all outputs stacked."""
        keep(ctx, hold)
        ctx.call = weakref.ref(call)
        result, call.result = call.result, None
        assert result is not None
        result[-1].copy_(last)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Give the last state its gradient; the others are asked for."""
        call: Call | None = ctx.call()
        if call is not None:  # else the node before refuses a second backward
            if call.found is not None:
                call.found.look()
            call.arrived(grads[0])
        return grads[0][-1], None, None


@final
class StepChain(SteppedModule):
    """All steps of a solve; called with the initial state, a `Call`, and tensors.

    Args:
        call: A call of the solve, for its modules, integrator and numbers of outputs.
        shapes: Shapes of the parts of the state where it is a tuple.
        slopes: Number of slopes that a step is taken apart into; None for whole steps.
    """

    def __init__(self, call: Call, shapes: Shapes, slopes: int | None) -> None:
        super().__init__()
        self.owners = nn.ModuleList(call.closure.modules)
        # A plan must not keep a function of the user's, and serves others like it.
        self.integrator = None if isinstance(call.integrator, UserStep) else call.integrator
        self.shapes, self.slopes = shapes, slopes
        self.counts = tuple(map(len, call.grid.outputs))

    def stages(self) -> list[StageCall]:
        """The steps, or their slopes, in order."""
        return step_stages(self, self.counts, self.slopes)

    def stages_follow_from(self) -> Hashable:
        """The attributes that `stages` reads."""
        return self.slopes, self.counts

    def sent_ahead(self, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        """The outputs that left on the way, in the graph of a run again, with their gradients."""
        call: Call = args[0]
        return call.collected()

    def step(self, index: int, z: Tensor, call: Call, *tensors: Tensor) -> Tensor:
        """Advance the flat state by one step, and let its outputs leave.

        `tensors` are the clock where the call has one, then stand-ins for the closure's tensors. An
        IntegrationError of the integrator gets the step.
        """
        times, tensors = self._times(call, tensors)
        start, end = times[index], times[index + 1]
        if index == 0:
            z = call.emit(0, z, z)
        try:
            with call.again(), call.closure.replaced(tensors):
                slope = self.slope_of(call)
                watched = None
                if isinstance(call.integrator, Leapfrog) and self._is_to_be_seen(call):
                    slope = watched = SeparableSlope(slope, call.closure)
                after = call.integrator.step(slope, start, end - start, z)
                if watched is not None:
                    call.looked = watched.moved
        except IntegrationError as error:
            error.step = index
            raise
        if isinstance(call.integrator, UserStep) and z.requires_grad and not call.collects:
            after = _Reaching.apply(after, z)
        return self._emit(index, call, times, z, after)

    def _is_to_be_seen(self, call: Call) -> bool:
        """Whether to check the dependences of func: once a call, and in each measured step."""
        first = not call.looked and not is_recomputing()
        return (first or call.sampling) and not under_transform()

    def step_part(self, index: int, part: int, state: Any, call: Call, *tensors: Tensor) -> Any:
        """Do one slope of a Runge-Kutta step; arguments as for `step` and `slope_step`."""
        assert isinstance(self.integrator, RungeKutta)
        times, tensors = self._times(call, tensors)
        start, end = times[index], times[index + 1]
        if index == 0 and part == 0:
            state = call.emit(0, state, state)
        tableau = self.integrator.tableau
        with call.again(), call.closure.replaced(tensors):
            after = slope_step(self.slope_of(call), tableau, start, end - start, part, state)
        if part < tableau.evaluations - 1:
            return after
        return self._emit(index, call, times, start_of(state), after)

    def _times(self, call: Call, tensors: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        """The times of the steps, as numbers or as the clock, and the other tensors."""
        if call.grid.clock is not None and tensors:
            return tensors[0], tensors[1:]
        return call.grid.times, tensors

    def _emit(self, index: int, call: Call, times: Any, z: Tensor, after: Tensor) -> Tensor:
        """Let the outputs of a step from state z to state `after` leave; returns `after`."""
        start, end = times[index], times[index + 1]
        outputs = call.grid.outputs[index]
        if call.sampling:
            dearest = 0.5 if call.grid.between else 1.0
            outputs = tuple([(j, dearest) for j, _ in outputs or ((1, 1.0),)])
        for j, share in outputs:
            if index == len(self.counts) - 1 and share == 1.0 and not call.sampling:
                break  # the last output is what the chain returns
            output = after
            if share != 1.0:
                place: Time = share
                if isinstance(times, Tensor):
                    place = (times[len(self.counts) + 1 + j] - start) / (end - start)
                output = add(z, after - z, place)
            after = call.emit(j, after, output)
        return after

    def slope_of(self, call: Call) -> Slope:
        """The right-hand side of a call, on flat states; holds the call weakly.

        The graph of an implicit step evaluates it in its backward, and the caller's module may keep
        a tensor of that graph: a reference cycle that Python collects only where it leads through
        the node of the outputs, which holds the call.
        """
        reference, shapes = weakref.ref(call), self.shapes

        def slope(t: Time, z: Tensor) -> Tensor:
            here = reference()
            assert here is not None
            found = here.func(as_time(t, z), split(z, shapes))
            return joined_slope(found, shapes, t)  # type: ignore[no-any-return]

        return slope

    def extra_repr(self) -> str:
        """Integrator, steps and slopes, on which a plan depends besides modules and shapes."""
        return f"integrator={self.integrator!r}, steps={len(self.counts)}, slopes={self.slopes}"
