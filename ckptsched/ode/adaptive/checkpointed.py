"""An adaptive solve within a budget: tapes and checkpoints of its forward pass, and its node.

The first steps keep their tapes, in the outer graph itself, as long as there is room: where all of
them fit, a solve is plain autograd's. When they no longer do, steps run without tapes, states are
kept as `solvers.binomial.online` says, and the latest tapes make room for states. Steps that have
lost their tape, or never had one, are reversed by one node of the outer graph, from the states.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import BudgetWarning, ExecutionError
from ...recompute.graph_holds import Hold, joined, keep, take_over
from ...recompute.stateful_buffers import unsteady_weight
from ...solvers.binomial.online import OnlinePlacement
from ...torch_state.locks import LendingLock, Lent, Locked
from ...torch_state.replay_context import Autocast, OneWay, caching
from ...torch_state.saved_hooks import no_hooks
from ...torch_state.torch_modes import outside_of_compiled_code, refuse_batched_gradients
from ..function.attributes import ForwardAttributes
from ..function.captures import Closure
from ..function.replay_environment import Environment
from ..function.rng_and_buffers import RngAndBuffers, StepSnapshot
from .backward import AcceptedSteps, Checkpoint, Reversal
from .forward import Integration, time_shift
from .problem import Problem, RightHandSide
from .statistics import Statistics
from .step_memory import Room


@final
class CheckpointedSolve:
    """One solve: its forward pass, its tapes and checkpoints, and its backward.

    It holds `locks` while it evaluates f, as other threads replace parameters, too.
    """

    def __init__(
        self,
        problem: Problem,
        closure: Closure,
        wanted: Sequence[Tensor],
        room: Room,
        locks: Sequence[LendingLock],
        statistics: Statistics,
    ) -> None:
        self._problem, self._closure, self._wanted = problem, closure, wanted
        self._room, self._statistics = room, statistics
        within = tuple([stay for lock in locks for stay in lock.mine()])
        self._locked = partial(Locked, locks, within)
        self._states: dict[int, Checkpoint] = {}
        self._fresh = True

    def run(self, y0: Tensor, t: Tensor) -> Tensor:
        """Solve from a flat state, and keep the tapes and states that there is room for.

        Returns the states at the requested times, stacked, in the graph of y0, t and the wanted
        tensors. An ExecutionError where f moved random state or buffers that it did not at first.
        """
        try:
            with self._locked():
                self._check_cached(y0.device)
                with OneWay():
                    return self._run(y0, t)
        except BaseException:
            self._states.clear()
            raise

    def _check_cached(self, device: torch.device) -> None:
        """Refuse weights that f would compute more often than `parametrize.cached()` does."""
        unsteady = unsteady_weight(self._closure.parts, device) if caching() else ""
        if unsteady:
            raise ExecutionError(
                f"{unsteady} is another each time it is computed, which "
                "torch.nn.utils.parametrize.cached() does once and a solve within a budget at each "
                "evaluation; solve outside of cached(), or without a budget"
            )

    def _run(self, y0: Tensor, t: Tensor) -> Tensor:
        carried = RngAndBuffers(self._closure, y0.device)
        begun = ForwardAttributes(self._problem.func)
        forward = _Forward(self._problem, carried, self._room, y0, t)
        forward.with_tapes()
        forward.without_tapes()
        integration, outputs, tapes = forward.integration, forward.outputs, forward.tapes
        statistics = self._statistics
        statistics.count(integration)
        statistics.checkpoints, statistics.tapes = self._room.slots, tapes
        statistics.positions = forward.positions
        if tapes == len(integration.record):
            return torch.stack(outputs)
        carried.check()
        self._carried, self._record = carried, integration.record
        self._tapes, self._before = tapes, forward.outputs_with_tapes
        self._states, head = forward.states, forward.heads[-1]
        self._first = self._states[tapes]
        attributes = ForwardAttributes(self._problem.func, begun)
        self._environment = Environment(self._closure, self._wanted, y0, attributes)
        own, others = outputs[: self._before], outputs[self._before :]
        del forward, integration, outputs
        with no_hooks():  # a further backward needs the saved state as it is
            states: Tensor = _Node.apply(Hold(self), others, head, t, *self._wanted)
        if not own:
            return states
        return joined(take_over(states), *(z.unsqueeze(0) for z in own), states)

    def backward(
        self, gradients: Tensor, *, with_time: bool
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Go back through the accepted steps without tapes.

        `gradients` are those of the outputs that they reach. Returns those of the state before
        them, of the wanted tensors, and of the times. An ExecutionError where a parameter, a buffer
        or a state was changed in place meanwhile.
        """
        self._environment.check()
        self._carried.check_buffers()
        fresh, self._fresh = self._fresh, False
        if not fresh:  # a second backward: all but the first state is gone
            self._states[self._tapes] = self._first
        shift = None
        if with_time:
            real = gradients.dtype.to_real()
            shift = gradients.new_zeros((), dtype=real).requires_grad_()
        f = RightHandSide(self._problem, shift)
        steps = AcceptedSteps(self._record, f, self._carried)
        every = [*[gradients[0]] * self._before, *gradients.unbind()]
        first = self._tapes
        reversal = Reversal(steps, self._environment, first, self._states, every, shift)
        try:
            with self._locked():
                found = reversal.run(self._room.states(first), last_input=fresh)
        finally:
            self._states.clear()
        self._statistics.backward_evaluations = f.evaluations
        self._statistics.advances = reversal.advances
        return found

    def differentiable(self, head: Tensor, t: Tensor, gradients: Tensor) -> list[Tensor | None]:
        """Go back by plain autograd, so that the gradients can be differentiated again.

        `head` is the state before the steps without tapes; it and the times have their graphs.
        Returns the gradients of head, t and the wanted tensors, with theirs.
        """
        self._environment.check()
        warnings.warn(
            "a backward with create_graph=True runs the accepted steps of an adaptive solve again "
            "as one graph: it takes the memory of plain autograd, not that of the budget",
            BudgetWarning,
            stacklevel=2,
        )
        self._states.clear()
        self._fresh = False
        environment = self._environment
        reals = [head, t, *self._wanted]
        # No leaves: asking for their gradients fires no hooks of the parameters, and their graph
        # leads on to the parameters themselves.
        starts = [x.view_as(x) if x.requires_grad else x for x in reals]
        stand_ins = {id(a): x for a, x in zip(environment.tensors, starts[2:], strict=True)}
        with (
            self._locked(),
            environment.again(self._carried, stand_ins),
            torch.enable_grad(),
        ):
            if self._first.snapshot is not None:
                self._first.snapshot.restore()
            f = RightHandSide(self._problem, time_shift(starts[1], head))
            steps = AcceptedSteps(self._record, f, self._carried)
            outputs = steps.connected(self._tapes, starts[0], starts[1])
            self._statistics.backward_evaluations = f.evaluations
            wanted, states = [x for x in starts if x.requires_grad], torch.stack(outputs)
            if not states.requires_grad:  # f reads none of the wanted tensors
                return [None] * len(starts)
            with Lent():
                back = torch.autograd.grad(
                    states, wanted, gradients, create_graph=True, allow_unused=True
                )
            found = iter(back)
        return [next(found) if x.requires_grad else None for x in starts]


@final
class _Forward:
    """The forward pass: first with tapes, then without."""

    def __init__(
        self, problem: Problem, carried: RngAndBuffers, room: Room, y0: Tensor, t: Tensor
    ) -> None:
        self._room, self._problem, self._carried = room, problem, carried
        self._t = t if t.requires_grad else None
        self._taping = room.another(0)
        self.outputs = [y0]
        self.heads = [y0]
        """The initial state, and that after each step whose tape is kept."""
        self._before: list[tuple[int, StepSnapshot | None]] = []
        """Before each of these steps: the state's version, and the random and buffer snapshot."""
        self.states: dict[int, Checkpoint] = {}
        """The latest of these, and states at the start of steps without tapes, by the number of
        steps before them."""
        self._placement, self._placed = OnlinePlacement(room.slots), set[int]()
        if self._taping:
            shift = None if self._t is None else time_shift(self._t, y0)
            self.integration = Integration(problem, y0, carried, shift)
        else:
            with self._no_tapes():
                z = y0.detach()
                self.integration = Integration(problem, z, carried)
                if z.requires_grad:  # f has set it, and would have set it on the caller's
                    y0.requires_grad_()

    @property
    def tapes(self) -> int:
        """Number of steps, the first ones, whose tapes are kept."""
        return len(self.heads) - 1

    @property
    def positions(self) -> tuple[int, ...]:
        """Numbers of steps before the states that are kept, the last step's input left out."""
        return tuple(sorted(n for n in self.states if n in self._placed or n == self.tapes))

    @property
    def outputs_with_tapes(self) -> int:
        """Number of outputs in the graph of the steps with tapes."""
        return self.integration.record.outputs(self.tapes - 1).stop if self.tapes else 0

    def with_tapes(self) -> None:
        """Run steps with tapes while there is room for theirs."""
        integration = self.integration
        while self._taping and not integration.done and self._room.another(self.tapes):
            self._visit()
            version = integration.z._version
            accepted = integration.advance()
            self.outputs += integration.reached(accepted, self._t)
            self._before.append((version, accepted.snapshot))
            self.heads.append(integration.z)
            del accepted

    def without_tapes(self) -> None:
        """Run the other steps, and keep states."""
        integration = self.integration
        if integration.done:
            return
        with self._no_tapes():
            integration.cut()
            while True:
                n, store = len(integration.record), self._make_room()
                z, version = integration.z, integration.z._version
                accepted = integration.advance()
                self.outputs += integration.reached(accepted)
                # The end shows now: the last step's input is at hand, and runs with its tape first.
                if store or integration.done or n == self.tapes:
                    self.states[n] = Checkpoint(z, version, accepted.snapshot)
                if integration.done:
                    break
                del accepted, z

    def _visit(self) -> bool:
        """Ask the placement about the next state; returns whether it is to be kept."""
        visit, n = self._placement.visit(), len(self.integration.record)
        if visit.store:
            self._placed.add(n)
        if visit.evicted is not None:
            self._placed.remove(visit.evicted)
            if visit.evicted > self.tapes:
                self.states.pop(visit.evicted)
        return visit.store

    def _make_room(self) -> bool:
        """Drop tapes until the next state fits; returns whether that is to be kept."""
        store = self._visit()
        while self.tapes:
            n = len(self.integration.record)
            # The latest head is among the states once the step after it has run, and is no more.
            others = len(self.states) - (self.tapes in self.states) + (store and n > self.tapes)
            if others < self._room.states(self.tapes):
                break
            self._drop_tape()
        return store

    def _drop_tape(self) -> None:
        """Drop the latest tape; the state at the start of its step is kept in its place."""
        self.heads.pop()
        n = self.tapes
        self.states[n] = Checkpoint(self.heads[-1].detach(), *self._before.pop())
        if n + 1 not in self._placed:
            self.states.pop(n + 1, None)
        for j in self.integration.record.outputs(n):
            self.outputs[j] = self.outputs[j].detach()

    @contextmanager
    def _no_tapes(self) -> Iterator[None]:
        # Autocast would remember weights that it has cast here, without their graph.
        with torch.no_grad(), Autocast.take(self.outputs[0].device).again():
            yield


class _Node(torch.autograd.Function):
    """The steps without tapes in the outer graph."""

    @staticmethod
    def forward(
        ctx: Any, hold: Hold, outputs: list[Tensor], head: Tensor, t: Tensor, *_: Tensor
    ) -> Tensor:
        keep(ctx, hold)
        ctx.save_for_backward(head, t, hold.fuse())
        states = torch.stack(outputs)
        outputs.clear()
        return states

    @staticmethod
    @outside_of_compiled_code
    def backward(ctx: Any, *grads: Any) -> Any:
        try:
            head, t, _ = ctx.saved_tensors
        except RuntimeError as error:
            raise ExecutionError(
                "a second backward through one solve: pass retain_graph=True to the first, or "
                f"solve again (torch: {error})"
            ) from error
        hold: Hold = ctx.hold()
        solve: CheckpointedSolve = hold.value
        hold.begin()
        hold.end()  # which goes with what is saved, after this
        if torch.is_grad_enabled():
            return None, None, *solve.differentiable(head, t, grads[0])
        if ctx.needs_input_grad[3]:
            refuse_batched_gradients(grads)  # the gradient of time is made of numbers
        back, others, times = solve.backward(grads[0], with_time=ctx.needs_input_grad[3])
        if times is not None:
            times = times.to(device=t.device, dtype=t.dtype)
        return None, None, back if ctx.needs_input_grad[2] else None, times, *others
