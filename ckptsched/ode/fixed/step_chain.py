"""A solve over a fixed grid as a chain of stages, a step each, with outputs that leave on the way.

What changes from call to call, the times and where outputs go, is not part of the module: it is
given to every stage, as a `Call`. So one plan serves all calls of one shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn

from ...base.errors import ExecutionError, IntegrationError
from ...capture.stage_discovery import StageCall, StagedModule
from ...recompute.graph_holds import Hold, keep
from ...torch_state.replay_context import is_recomputing
from ...torch_state.torch_modes import under_transform
from ..function.attributes import Found
from ..function.captures import Closure
from ..methods.explicit import Slope, Time, add, number
from ..methods.integrators import Integrator, Leapfrog, RungeKutta, UserStep, as_time, join, split
from ..methods.separable import SeparableSlope
from .slope_stages import slope_step, start_of
from .time_grid import Grid


@final
class Call:
    """What one call gives to every step: function, times, and a place for the outputs."""

    def __init__(
        self,
        func: Callable[..., Any],
        grid: Grid,
        closure: Closure,
        integrator: Integrator,
        result: Tensor | None = None,
        first: int = 0,
    ) -> None:
        """Begin a call.

        Args:
            func: The right-hand side, f(t, y).
            grid: Times of the steps and outputs.
            closure: What the right-hand side reads besides.
            integrator: The rule for one step.
            result: Where outputs are written, along its first dimension. None collects them with
                their graphs, for plain autograd.
            first: The first output whose gradient is asked for: 1 where y0 has none.
        """
        self.func, self.grid, self.closure, self.result = func, grid, closure, result
        self.integrator = integrator
        self.collects = result is None
        self.kept: list[Tensor] = []
        self.gradients: Tensor | None = None
        self._first = first
        self.sampling = False
        """Whether every step is to do what the dearest does, because it is measured."""
        self.looked = False
        """Whether it was seen in a step that func is made for the integrator."""
        self.found: Found | None = None
        """What the forward pass left func with, once it is over."""

    @classmethod
    def to_measure(
        cls,
        func: Callable[..., Any],
        grid: Grid,
        closure: Closure,
        integrator: Integrator,
        y0: Tensor,
    ) -> Call:
        """A call for the profiler: outputs are not written, and gradients of them are zero."""
        call = cls(func, grid, closure, integrator)
        call.collects, call.sampling = False, True
        zero = torch.zeros((), dtype=y0.dtype, device=y0.device)
        call.gradients = zero.expand(1 + sum(map(len, grid.outputs)), *y0.shape)
        return call

    def emit(self, j: int, z: Tensor, output: Tensor) -> Tensor:
        """Let an output leave the chain; its gradient will join that of the state.

        Args:
            j: Its index.
            z: The state to go on with.
            output: The output: the state itself, or made from it.

        Returns:
            The state to go on with: the same values.
        """
        if self.collects:
            self.kept.append(output)
            # The gradients of all that follows add up on their own, as they do in a chain.
            return z.view_as(z)
        state: Tensor = _Emitted.apply(z, output, self, j)
        return state

    def write(self, j: int, output: Tensor) -> None:
        """Write an output, in the first run of its step."""
        if self.result is not None and not is_recomputing():
            self.result[j].copy_(output)

    def again(self) -> AbstractContextManager[None]:
        """Around an evaluation of func: in a backward it finds what the forward pass left."""
        return nullcontext() if self.found is None else self.found.again()

    def gradient(self, j: int) -> Tensor | None:
        """The gradient that came to an output; the first one is asked for last."""
        found = None if self.gradients is None else self.gradients[j]
        if j == self._first and not self.sampling:
            self.gradients = None
        return found

    def arrived(self, gradients: Tensor) -> None:
        """Note the gradients of the outputs for the steps, which go back next.

        Where gradients can be differentiated again, the steps first run again as one graph, in
        which outputs are collected as for plain autograd: a graph may be gone through several
        times, each with other gradients, and must not hold those of one of them.

        Args:
            gradients: With respect to all outputs, stacked.
        """
        self.kept, self.collects = [], torch.is_grad_enabled()
        asked = self.collects or self._first < len(gradients) - 1
        self.gradients = gradients if asked else None

    def collected(self) -> list[tuple[Tensor, Tensor]]:
        """The outputs on the way that a run as one graph collected, with their gradients."""
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
        """Take the last state, which is the last output."""
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
class SolveStage(StageCall):
    """One step of a `Solve`, or one slope of a step."""

    __slots__ = ("index", "module", "part")

    module: Solve

    def __init__(self, solve: Solve, index: int, part: int | None = None) -> None:
        """Name a step; the first has the index 0.

        Args:
            solve: The steps.
            index: Which one.
            part: Which of its slopes; None for the whole step.
        """
        self.prefix = ""
        self.module = solve
        self.index = index
        self.part = part

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Advance the state by this step, or this part of it."""
        if self.part is None:
            return self.module.step(self.index, x, *args)
        return self.module.step_part(self.index, self.part, x, *args)

    @property
    def label(self) -> str:
        """The index as in "step[7]", or "slope 2 of step[7]"."""
        prefix = "" if self.part is None else f"slope {self.part} of "
        return f"{prefix}step[{self.index}]"

    @property
    def key(self) -> Hashable:
        """Equal for steps that give equally many outputs; those that give none count as one.

        So equal steps make one long run, whichever of them give outputs: planned for all to do
        so, between their ends if any is there, which takes at most two states more than some of
        them need.
        """
        return ("step", id(self.module), self.part, max(1, self.module.counts[self.index]))


@final
class Solve(StagedModule):
    """All steps of a solve; called with the initial state, a `Call`, and tensors.

    Args:
        closure: What the right-hand side reads; its modules are this module's parts.
        integrator: The rule for one step.
        shapes: Of the parts of the state where it is a tuple.
        counts: How many outputs each step gives.
        parts: How many stages a step is: its slopes, or 1.
    """

    def __init__(
        self,
        closure: Closure,
        integrator: Integrator,
        shapes: tuple[torch.Size, ...] | None,
        counts: tuple[int, ...],
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.owners = nn.ModuleList(closure.modules)
        # A plan must not keep a function of the user's, and serves others like it.
        self.integrator = None if isinstance(integrator, UserStep) else integrator
        self.shapes = shapes
        self.counts = counts
        self.parts = parts

    def stages(self) -> list[StageCall]:
        """The steps, or their slopes, in order."""
        steps = range(len(self.counts))
        if self.parts == 1:
            return [SolveStage(self, index) for index in steps]
        return [SolveStage(self, index, part) for index in steps for part in range(self.parts)]

    def stages_follow_from(self) -> Hashable:
        """The attributes that `stages` reads."""
        return self.parts, self.counts

    def sent_ahead(self, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        """The outputs on the way."""
        call: Call = args[0]
        return call.collected()

    def step(self, index: int, z: Tensor, call: Call, *tensors: Tensor) -> Tensor:
        """Advance by one step, and let its outputs leave.

        Args:
            index: 0 for the first step.
            z: Flat state at its start.
            call: The call.
            tensors: The clock where the call has one, then stand-ins for what the closure reads.

        Returns:
            The state at its end.

        Raises:
            IntegrationError: The integrator cannot do the step; the error has time and step.
        """
        times, tensors = self._times(call, tensors)
        start, end = times[index], times[index + 1]
        if index == 0:
            z = call.emit(0, z, z)
        try:
            with call.again(), call.closure.replaced(tensors):
                slope = self.slope_of(call)
                if isinstance(call.integrator, Leapfrog) and self._is_to_be_seen(call):
                    slope = seen = SeparableSlope(slope, call.closure)
                    after = call.integrator.step(slope, start, end - start, z)
                    call.looked = seen.moved
                else:
                    after = call.integrator.step(slope, start, end - start, z)
        except IntegrationError as error:
            error.step = index
            raise
        if isinstance(call.integrator, UserStep) and z.requires_grad and not call.collects:
            after = _Reaching.apply(after, z)
        return self._emit(index, call, times, z, after)

    def _is_to_be_seen(self, call: Call) -> bool:
        """Whether to look at what func depends on: once a call, and where that is measured."""
        first = not call.looked and not is_recomputing()
        return (first or call.sampling) and not under_transform()

    def step_part(self, index: int, part: int, state: Any, call: Call, *tensors: Tensor) -> Any:
        """Do one slope of a step of a Runge-Kutta method.

        Args:
            index: 0 for the first step.
            part: 0 for its first slope.
            state: What the part before returned.
            call: The call.
            tensors: As for `step`.

        Returns:
            What the next part takes.
        """
        assert isinstance(self.integrator, RungeKutta)
        times, tensors = self._times(call, tensors)
        start, end = times[index], times[index + 1]
        if index == 0 and part == 0:
            state = call.emit(0, state, state)
        tableau = self.integrator.tableau
        with call.again(), call.closure.replaced(tensors):
            after = slope_step(self.slope_of(call), tableau, start, end - start, part, state)
        if part < self.parts - 1:
            return after
        return self._emit(index, call, times, start_of(state), after)

    def _times(self, call: Call, tensors: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        """The times of the steps, as numbers or as the clock, and the other tensors."""
        if call.grid.clock is not None and tensors:
            return tensors[0], tensors[1:]
        return call.grid.times, tensors

    def _emit(self, index: int, call: Call, times: Any, z: Tensor, after: Tensor) -> Tensor:
        """Let the outputs of a step leave, which led from z to after."""
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
        """The right-hand side of a call, on flat states; does not keep the call.

        The graph of an implicit step evaluates it in its backward, and the caller's module may keep
        what comes of that graph: a circle that is collected only where it leads through the node of
        the outputs, which keeps the call.
        """
        reference, shapes = weakref.ref(call), self.shapes

        def slope(t: Time, z: Tensor) -> Tensor:
            here = reference()
            assert here is not None
            found = here.func(as_time(t, z), split(z, shapes))
            if shapes is not None:
                _check_parts(found, shapes, t)
            return join(found, shapes)  # type: ignore[no-any-return]

        return slope

    def extra_repr(self) -> str:
        """What a plan depends on besides modules and shapes."""
        return f"integrator={self.integrator!r}, steps={len(self.counts)}, parts={self.parts}"


def _check_parts(slope: Any, shapes: tuple[torch.Size, ...], t: Time) -> None:
    """Flat, a part that is too long could make up for another that is too short."""
    found = (
        tuple(tuple(part.shape) for part in slope)
        if isinstance(slope, (tuple, list)) and all(isinstance(p, Tensor) for p in slope)
        else type(slope).__name__
    )
    expected = tuple(map(tuple, shapes))
    if found != expected:
        raise ExecutionError(
            f"at time {number(t):g} func returned {found} for a state of shapes {expected}; "
            "let it return a tuple with the slope of each part"
        )
