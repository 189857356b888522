"""Accepted steps, run again with their recorded sizes: from checkpoints to gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...base.errors import ExecutionError
from ...schedule.language import Code
from ...solvers.binomial.online import Operation, reversal
from ...torch_state.locks import Lent
from ..function.captures import outlive, unknown_leaves
from ..function.replay_environment import Environment
from ..function.rng_and_buffers import Carried, Moment
from ..methods.embedded import (
    Slopes,
    combined,
    end_slope,
    inside_rates,
    inside_slopes,
    inside_weights,
)
from ..methods.embedded import run_step as run_embedded_step
from .forward import forward_slopes, moving, state_inside
from .problem import Problem, Record, RightHandSide


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that is kept, and what f carried there."""

    z: Tensor
    version: int
    moment: Moment | None

    @classmethod
    def of(cls, z: Tensor, moment: Moment | None) -> Checkpoint:
        """Keep a state."""
        return cls(z, z._version, moment)


@final
class TapedStep:
    """One accepted step with its tape, and the way back through it."""

    def __init__(
        self, f: RightHandSide, record: Record, problem: Problem, n: int, z0: Tensor, every: bool
    ) -> None:
        """Run the step after n others with gradients on; keep edges of its graph, not its data."""
        self._record, self._problem = record, problem
        self.step, self._tableau = record[n], problem.tableau
        outputs = [(j, record.share(n, j)) for j in record.outputs(n)]
        self._inside = [(j, share) for j, share in outputs if share != 1.0]
        self._at_end = [j for j, share in outputs if share == 1.0]
        keep = inside_slopes(self._tableau) if self._inside else frozenset[int]()
        with torch.enable_grad():
            self._z0 = z0.detach().requires_grad_()
            slopes = replayed(f, record, problem, n, self._z0, every=every, keep=keep)
        self._z1 = _edge(slopes.z1)
        self._k = {i: _edge(k) for i, k in slopes.k.items() if i in keep}

    def unknown_leaves(self, known: Iterable[Tensor]) -> list[Tensor]:
        """Leaves that the step depends on and that are not among those given."""
        edges = [edge for edge in (self._z1, *self._k.values()) if edge is not None]
        return unknown_leaves([edge.node for edge in edges], [*known, self._z0])

    def backward(
        self, gradient: Tensor | None, outputs: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Go back through the step.

        Args:
            gradient: With respect to the state at its end, as far as later steps need it.
            outputs: With respect to the states at all requested times.
            wanted: Tensors whose gradients are wanted.

        Returns:
            The gradient with respect to the state at its start, and those of the wanted tensors.
        """
        gradient = _added(gradient, outputs, self._at_end)
        weights = {j: inside_weights(self._tableau, share) for j, share in self._inside}
        roots: list[GradientEdge] = []
        given: list[Tensor] = []
        if self._z1 is not None and gradient is not None:
            roots.append(self._z1)
            given.append(gradient)
        for i, edge in self._k.items():
            parts = [j for j in weights if weights[j][i] != 0.0]
            if edge is not None and parts:
                total = outputs[parts[0]] * (self.step.h * weights[parts[0]][i])
                for j in parts[1:]:
                    total.add_(outputs[j], alpha=self.step.h * weights[j][i])
                roots.append(edge)
                given.append(total)
        del gradient
        direct = _added(None, outputs, [j for j, _ in self._inside])
        if not roots:
            return direct, [None] * len(wanted)
        with Lent():
            found = torch.autograd.grad(roots, [self._z0, *wanted], given, allow_unused=True)
        first = found[0]
        if first is not None and direct is not None:
            first = first + direct
        return (direct if first is None else first), list(found[1:])


def replayed(
    f: RightHandSide,
    record: Record,
    problem: Problem,
    n: int,
    z0: Tensor,
    *,
    every: bool,
    keep: frozenset[int] = frozenset(),
) -> Slopes:
    """Take an accepted step again.

    Args:
        f: Right-hand side.
        record: Of the accepted steps.
        problem: What is solved.
        n: How many steps come before it.
        z0: State at its start.
        every: Whether every slope is evaluated that was, as f draws or changes something.
        keep: Slopes that are wanted.
    """
    if every:
        keep |= forward_slopes(problem.tableau, every=True)
        if record.outputs(n):
            keep |= {end_slope(problem.tableau)}
    return run_embedded_step(f, problem.tableau, record[n], z0, keep=keep)


def connected(
    f: RightHandSide,
    record: Record,
    problem: Problem,
    first: int,
    z: Tensor,
    t: Tensor,
    *,
    every: bool,
) -> list[Tensor]:
    """Take all accepted steps but the first ones again, as one graph.

    Args:
        f: Right-hand side.
        record: Of the accepted steps.
        problem: What is solved.
        first: How many steps are left out.
        z: The state after them.
        t: The requested times.
        every: As in `replayed`.

    Returns:
        The states at the requested times that these steps reach; the initial one if none is left
        out.
    """
    tableau, outputs = problem.tableau, [] if first else [z]
    for n in range(first, len(record)):
        reached = record.outputs(n)
        keep = inside_slopes(tableau) if reached else frozenset[int]()
        slopes = replayed(f, record, problem, n, z, every=every, keep=keep)
        for j in reached:
            share = record.share(n, j)
            state = state_inside(tableau, record[n], share, z, slopes)
            if t.requires_grad:
                state = moving(state, tableau, record[n], share, slopes, t, j)
            outputs.append(state)
        z = slopes.z1
    return outputs


@final
class Sweep:
    """The backward pass: the interpreter of the operations of `reversal`."""

    def __init__(
        self,
        problem: Problem,
        record: Record,
        environment: Environment,
        f: RightHandSide,
        carried: Carried,
        first: int = 0,
    ) -> None:
        """Take what the forward pass has recorded.

        Args:
            problem: What is solved.
            record: The accepted steps.
            environment: What f found.
            f: The right-hand side, to count its evaluations.
            carried: What f carries.
            first: How many steps are others' to reverse.
        """
        self._problem, self._record, self._environment = problem, record, environment
        self._f, self._carried, self._first = f, carried, first
        self.advances = 0

    def run(
        self,
        states: dict[int, Checkpoint],
        slots: int,
        gradients: Sequence[Tensor],
        shift: Tensor | None,
        *,
        last_input: bool,
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Reverse all steps but the first ones.

        Args:
            states: What is kept, by position; it is emptied.
            slots: How many may be kept at once.
            gradients: With respect to the states at all requested times; what comes before the
                steps is not read.
            shift: The zero that shifts the time of f; None where no gradient of time is wanted.
            last_input: Whether `states` holds the input of the last step besides.

        Returns:
            The gradients of the state before the steps, of the environment's tensors and of the
            times.
        """
        wanted = [*self._environment.tensors, *([] if shift is None else [shift])]
        sums = Sums([None] * len(wanted))
        rates = None
        if shift is not None:
            rates = torch.zeros(len(self._problem.times), dtype=torch.float64, device="cpu")
        n = len(self._record) - self._first
        positions = [position - self._first for position in sorted(states)]
        if last_input and n > 1 and positions[-1] == n - 1:
            positions.pop()
        operations = reversal(positions, n, slots, last_input=last_input)
        with self._environment.again(self._carried):
            back = self._interpret(operations, states, gradients, wanted, sums, rates)
        if not self._first:
            back = _added(back, gradients, [0])
        assert back is not None
        if rates is not None:
            shifted = sums.sums.pop()
            rates[0] = -rates[1:].sum()
            if shifted is not None:
                rates[0] += float(shifted)
        return back, sums.sums, rates

    def _interpret(
        self,
        operations: Iterable[Operation],
        states: dict[int, Checkpoint],
        gradients: Sequence[Tensor],
        wanted: Sequence[Tensor],
        sums: Sums,
        rates: Tensor | None,
    ) -> Tensor | None:
        """Follow the operations; gives the gradient of the state before the first step."""
        back: Tensor | None = None
        tape: TapedStep | None = None
        every = self._carried.matters
        for code, stage in operations:
            i = stage + self._first
            if code == Code.FORWARD:
                self._advance(states, i)
            elif code == Code.TAPED_FORWARD:
                if rates is not None:
                    z0 = self._input(states, i)
                    add_rates(
                        rates, self._f, self._record, self._problem, i - 1, z0, gradients,
                        every=every,
                    )  # fmt: skip
                make = partial(self._taped, states, i)
                known = [*self._environment.known, *wanted]
                tape = checked(make, known) if i == len(self._record) else make()
            elif code == Code.BACKWARD:
                assert tape is not None
                with self._environment.going_back():
                    back, found = tape.backward(back, gradients, wanted)
                tape = None
                sums.add(found)
                del found
            else:
                del states[i]
        return back

    def _taped(self, states: dict[int, Checkpoint], i: int) -> TapedStep:
        z0 = self._input(states, i)
        every = self._carried.matters
        return TapedStep(self._f, self._record, self._problem, i - 1, z0, every)

    def _input(self, states: dict[int, Checkpoint], i: int) -> Tensor:
        found = states[i - 1]
        if found.z._version != found.version:
            raise ExecutionError(
                f"the state before step {i} of {len(self._record)}, at time "
                f"{self._record[i - 1].t0:.6g}, was changed in place since it was made; change a "
                "copy instead"
            )
        if found.moment is not None:
            found.moment.restore()
        return found.z

    def _advance(self, states: dict[int, Checkpoint], i: int) -> None:
        z0 = self._input(states, i)
        self.advances += 1
        with torch.no_grad():
            every = self._carried.matters
            z1 = replayed(self._f, self._record, self._problem, i - 1, z0, every=every).z1
        states[i] = Checkpoint.of(z1, self._carried.take())


def checked(make: Callable[[], TapedStep], known: Sequence[Tensor]) -> TapedStep:
    """A step that depends on no tensor whose gradient would be lost.

    Leaves that f makes itself are gone with the step, which is then made once more.

    Args:
        make: Makes the step.
        known: Tensors whose gradients are taken care of.

    Raises:
        ExecutionError: There is such a tensor.
    """
    tape = make()
    unknown = tape.unknown_leaves(known)
    if not unknown:
        return tape
    del tape
    found = outlive(unknown)
    if found:
        raise ExecutionError(
            f"f uses a tensor of shape {tuple(found[0].shape)} that requires a gradient and is "
            "not among its parameters, so its gradient would be lost; register it in the "
            "module, give it among the parameters, or detach it; one that f makes anew in every "
            "evaluation it must not keep"
        )
    return make()


def add_rates(
    rates: Tensor,
    f: RightHandSide,
    record: Record,
    problem: Problem,
    n: int,
    z0: Tensor,
    gradients: Sequence[Tensor],
    *,
    every: bool,
) -> None:
    """Products of the gradients with the derivatives in time of what lies in a step.

    Args:
        rates: One for each requested time; those that the step reaches are written.
        f: Right-hand side.
        record: Of the accepted steps.
        problem: What is solved.
        n: How many steps come before it.
        z0: State at its start.
        gradients: With respect to the states at all requested times.
        every: As in `replayed`.
    """
    if not record.outputs(n):
        return
    keep = inside_slopes(problem.tableau)
    with torch.no_grad():
        slopes = replayed(f, record, problem, n, z0, every=every, keep=keep)
        for j in record.outputs(n):
            weights = inside_rates(problem.tableau, record.share(n, j))
            rate = combined(None, 1.0, weights, slopes.k)
            rates[j] = float((rate.conj() * gradients[j]).real.sum())


def _edge(tensor: Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _added(
    total: Tensor | None, outputs: Sequence[Tensor], indices: Sequence[int]
) -> Tensor | None:
    """The sum with some of the outputs' gradients; a new tensor, as others may hold the parts."""
    for j in indices:
        total = outputs[j].clone() if total is None else total + outputs[j]
    return total


@final
class Sums:
    """Sums of gradients, the latest step's first."""

    def __init__(self, sums: list[Tensor | None]) -> None:
        """Start from what is there, which is left as it is."""
        self.sums = sums
        self._own = [False] * len(sums)

    def add(self, found: Sequence[Tensor | None]) -> None:
        """Add a step's gradients; in place once a sum is a tensor of its own.

        What autograd returns may be one tensor for several inputs, or have overlapping memory.
        """
        for k, gradient in enumerate(found):
            before = self.sums[k]
            if gradient is None:
                continue
            if before is None:
                self.sums[k] = gradient
            elif self._own[k]:
                before.add_(gradient)
            else:
                self.sums[k] = before + gradient
                self._own[k] = True
