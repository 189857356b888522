"""An adaptive solve within bounds: what its forward pass keeps, and its node in the outer graph.

The first steps keep their tapes, in the outer graph itself, as long as there is room: where all of
them fit, a solve is plain autograd's. When they no longer do, steps run without tapes, states are
kept by `solvers.online`, and the latest tapes make room for states. What has lost its tape, or
never had one, is reversed by one node, from the states that are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import BudgetWarning, ExecutionError
from ...recompute.graph_holds import Hold, joined, keep, take_over
from ...recompute.stateful_buffers import unsteady_weight
from ...solvers.binomial.online import OnlinePlacement
from ...torch_state.locks import InTurn, Lent, Turn
from ...torch_state.replay_context import Autocast, OneWay, caching
from ...torch_state.saved_hooks import no_hooks
from ...torch_state.torch_modes import outside_of_compiled_code, refuse_batched_gradients
from ..function.attributes import Found
from ..function.captures import Closure
from ..function.replay_environment import Environment
from ..function.rng_and_buffers import Carried, Moment
from .backward import Checkpoint, Sweep, connected
from .forward import Integration, reached_states, time_shift
from .problem import Problem, RightHandSide
from .statistics import Statistics
from .step_memory import Room


@final
class Turns:
    """Turns of who evaluates f while others might have stand-ins in its modules, or draw."""

    def __init__(self, *turns: Turn) -> None:
        """Note within whose turn the solve begins.

        Args:
            turns: Of random numbers if f draws some, first, as everywhere; then of f itself.
        """
        self._turns = turns
        self._within = tuple([stay for turn in turns for stay in turn.mine()])

    def mine(self) -> InTurn:
        """A `with` block that waits for the turn, and has it."""
        return InTurn(self._turns, self._within)


@final
class BoundedSolve:
    """One solve: its forward pass, what it keeps, and the way back."""

    def __init__(
        self,
        problem: Problem,
        closure: Closure,
        wanted: Sequence[Tensor],
        room: Room,
        turns: Turns,
        statistics: Statistics,
    ) -> None:
        """Note what is solved and what it may keep.

        Args:
            problem: What to solve.
            closure: What f reads.
            wanted: Whose gradients are wanted.
            room: What may be kept.
            turns: Whose turn it is to evaluate f.
            statistics: Filled in as the solve goes on.
        """
        self._problem, self._closure, self._wanted = problem, closure, wanted
        self._room, self._turns, self._statistics = room, turns, statistics
        self._states: dict[int, Checkpoint] = {}
        self._fresh = True

    def run(self, y0: Tensor, t: Tensor) -> Tensor:
        """Solve, and keep what there is room for.

        Args:
            y0: The initial state.
            t: The requested times.

        Returns:
            The states at the requested times, stacked, in the graph of y0, t and the tensors that
            are wanted.
        """
        try:
            with self._turns.mine():
                self._check_cached(y0.device)
                with OneWay():
                    return self._run(y0, t)
        except BaseException:
            self._states.clear()
            raise

    def _check_cached(self, device: torch.device) -> None:
        """Refuse weights that f would compute more often than `parametrize.cached()` does."""
        modules = (m for root in self._closure.modules for m in root.modules())
        unsteady = unsteady_weight(modules, device) if caching() else ""
        if unsteady:
            raise ExecutionError(
                f"{unsteady} is another each time it is computed, which "
                "torch.nn.utils.parametrize.cached() does once and a solve within a budget at each "
                "evaluation; solve outside of cached(), or without a budget"
            )

    def _run(self, y0: Tensor, t: Tensor) -> Tensor:
        carried = Carried(self._closure, y0.device)
        begun = Found(self._problem.func)
        forward = _Forward(self._problem, carried, self._room, y0, t)
        forward.with_tapes()
        forward.without_tapes()
        integration, outputs, tapes = forward.integration, forward.outputs, forward.tapes
        self._count(integration, forward)
        if tapes == len(integration.record):
            return torch.stack(outputs)
        carried.check()
        self._carried, self._record = carried, integration.record
        self._tapes, self._before = tapes, forward.outputs_with_tapes
        self._states, head = forward.states, forward.heads[-1]
        self._first = self._states[tapes]
        found = Found(self._problem.func, begun)
        self._environment = Environment(self._closure, self._wanted, y0, found)
        own, others = outputs[: self._before], outputs[self._before :]
        del forward, integration, outputs
        with no_hooks():  # what a further backward begins with is saved as it is
            states: Tensor = _Node.apply(Hold(self), others, head, t, *self._wanted)
        if not own:
            return states
        return joined(take_over(states), *(z.unsqueeze(0) for z in own), states)

    def _count(self, integration: Integration, forward: _Forward) -> None:
        statistics = self._statistics
        statistics.count(integration)
        statistics.checkpoints, statistics.tapes = self._room.slots, forward.tapes
        statistics.positions = forward.positions

    def backward(
        self, gradients: Tensor, *, with_time: bool
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Go back through the accepted steps without tapes.

        Args:
            gradients: With respect to the states at the requested times that they reach, stacked.
            with_time: Whether the gradient of the times is wanted.

        Returns:
            The gradients of the state before them, of the tensors that f reads, and of the times.
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
        f = RightHandSide(self._problem.func, gradients, shift)
        sweep = Sweep(self._problem, self._record, self._environment, f, self._carried, self._tapes)
        every = [*[gradients[0]] * self._before, *gradients.unbind()]
        try:
            slots = self._room.states(self._tapes)
            with self._turns.mine():
                found = sweep.run(self._states, slots, every, shift, last_input=fresh)
        finally:
            self._states.clear()
        self._statistics.backward_evaluations = f.evaluations
        self._statistics.advances = sweep.advances
        return found

    def differentiable(self, head: Tensor, t: Tensor, gradients: Tensor) -> list[Tensor | None]:
        """Go back so that one can go back through that, too: by plain autograd.

        Args:
            head: The state before the steps without tapes, with its graph.
            t: The requested times, with their graph.
            gradients: As for `backward`.

        Returns:
            The gradients of head, t and the tensors that are wanted, with their graphs.
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
            self._turns.mine(),
            environment.again(self._carried, stand_ins),
            torch.enable_grad(),
        ):
            if self._first.moment is not None:
                self._first.moment.restore()
            f = RightHandSide(self._problem.func, head, time_shift(starts[1], head))
            outputs = connected(
                f, self._record, self._problem, self._tapes, starts[0], starts[1],
                every=self._carried.matters,
            )  # fmt: skip
            self._statistics.backward_evaluations = f.evaluations
            wanted, states = [x for x in starts if x.requires_grad], torch.stack(outputs)
            if not states.requires_grad:  # f reads nothing of what is wanted
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
        self, problem: Problem, carried: Carried, room: Room, y0: Tensor, t: Tensor
    ) -> None:
        self._room, self._problem, self._carried = room, problem, carried
        self._t = t if t.requires_grad else None
        self._taping = room.another(0)
        self.outputs = [y0]
        self.heads = [y0]
        """The initial state, and that after each step whose tape is kept."""
        self._before: list[tuple[int, Moment | None]] = []
        """Before each of these steps: the version of the state, and what f carried."""
        self.states: dict[int, Checkpoint] = {}
        """The latest of these, and states at the start of steps without tapes, by how many steps
        come before."""
        self._placement, self._placed = OnlinePlacement(room.slots), set[int]()
        if self._taping:
            shift = None if self._t is None else time_shift(self._t, y0)
            self.integration = Integration(problem, y0, carried, shift)
        else:
            with self._no_tapes():
                z = y0.detach()
                self.integration = Integration(problem, z, carried)
                if z.requires_grad:  # f has let it, and so would have the caller's
                    y0.requires_grad_()

    @property
    def tapes(self) -> int:
        """Of how many steps the tapes are kept."""
        return len(self.heads) - 1

    @property
    def positions(self) -> tuple[int, ...]:
        """After how many steps states are kept on purpose, and not because the end showed."""
        return tuple(sorted(n for n in self.states if n in self._placed or n == self.tapes))

    @property
    def outputs_with_tapes(self) -> int:
        """How many of the outputs are in the graph of the steps with tapes."""
        return self.integration.record.outputs(self.tapes - 1).stop if self.tapes else 0

    def with_tapes(self) -> None:
        """Run steps with tapes while there is room for theirs."""
        integration = self.integration
        while self._taping and not integration.done and self._room.another(self.tapes):
            self._visit()
            version = integration.z._version
            accepted = integration.advance()
            self.outputs += reached_states(integration, accepted, self._t)
            self._before.append((version, accepted.moment))
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
                self.outputs += reached_states(integration, accepted)
                # The end shows now: the last step's input is at hand, and runs with its tape first.
                if store or integration.done or n == self.tapes:
                    self.states[n] = Checkpoint(z, version, accepted.moment)
                if integration.done:
                    break
                del accepted, z

    def _visit(self) -> bool:
        """Come to the next state; gives whether it is to be kept."""
        visit, n = self._placement.visit(), len(self.integration.record)
        if visit.store:
            self._placed.add(n)
        if visit.evicted is not None:
            self._placed.remove(visit.evicted)
            if visit.evicted > self.tapes:
                self.states.pop(visit.evicted)
        return visit.store

    def _make_room(self) -> bool:
        """Let go what must go for the next state; gives whether that is to be kept."""
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
        """Let the latest tape go; the state at the start of its step stays."""
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
        solve: BoundedSolve = hold.value
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
