"""The backward of an adaptive solve: accepted steps run again with their recorded sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from ..function.rng_and_buffers import RngAndBuffers, StepSnapshot
from ..methods.embedded import (
    Slopes,
    difference,
    end_slope,
    inside_slopes,
    inside_weights,
    run_step,
)
from .forward import forward_slopes, reached_states
from .problem import Record, RightHandSide


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state before a step, and the random and buffer snapshot to recompute from it."""

    z: Tensor
    version: int
    """Version counter of the state when it was made: a later one tells a change in place."""
    snapshot: StepSnapshot | None


@final
class AcceptedSteps:
    """The accepted steps of a solve, run again without choosing their sizes.

    Where f draws or changes buffers, all slopes of the forward pass are evaluated again, those that
    nothing needs included.
    """

    def __init__(self, record: Record, f: RightHandSide, carried: RngAndBuffers) -> None:
        self.record, self.problem, self.f, self.carried = record, record.problem, f, carried

    def run(self, n: int, z0: Tensor, keep: frozenset[int] = frozenset()) -> Slopes:
        """Run the step after n others from flat state z0; returns the slopes `keep`, by index."""
        tableau = self.problem.tableau
        if self.carried.matters:
            keep |= forward_slopes(tableau, every=True)
            if self.record.outputs(n):
                keep |= {end_slope(tableau)}
        return run_step(self.f, tableau, self.record[n], z0, keep=keep)

    def connected(self, first: int, z: Tensor, t: Tensor) -> list[Tensor]:
        """Run all steps but the first ones again from the flat state z after these, as one graph.

        Returns the states at the requested times that they reach, and the initial state if none is
        left out.
        """
        record, tableau, outputs = self.record, self.problem.tableau, [] if first else [z]
        for n in range(first, len(record)):
            slopes = self.run(n, z, inside_slopes(tableau) if record.outputs(n) else frozenset())
            outputs += reached_states(record, n, z, slopes, t if t.requires_grad else None)
            z = slopes.z1
        return outputs

    def add_rates(self, rates: Tensor, n: int, z0: Tensor, gradients: Sequence[Tensor]) -> None:
        """Write the gradients of the requested times that the step after n others reaches.

        Each is the product of the output's gradient with the output's derivative in time. `rates`
        has an entry for each requested time, float64 on the CPU.
        """
        record, tableau = self.record, self.problem.tableau
        if not record.outputs(n):
            return
        with torch.no_grad():
            slopes = self.run(n, z0, inside_slopes(tableau))
            for j in record.outputs(n):
                weights = inside_weights(tableau, record.share(n, j), 1)
                rate = difference(1.0, weights, slopes.k)
                rates[j] = float((rate.conj() * gradients[j]).real.sum())


@final
class TapedStep:
    """One accepted step with its tape, and the way back through it."""

    def __init__(self, steps: AcceptedSteps, n: int, z0: Tensor) -> None:
        """Run the step after n others with gradients on; keep edges of its graph, not its data."""
        record, self._tableau = steps.record, steps.problem.tableau
        self.step = record[n]
        outputs = [(j, record.share(n, j)) for j in record.outputs(n)]
        self._inside = [(j, share) for j, share in outputs if share != 1.0]
        self._at_end = [j for j, share in outputs if share == 1.0]
        keep = inside_slopes(self._tableau) if self._inside else frozenset[int]()
        with torch.enable_grad():
            self._z0 = z0.detach().requires_grad_()
            slopes = steps.run(n, self._z0, keep)
        self._z1 = _edge(slopes.z1)
        self._k = {i: _edge(k) for i, k in slopes.k.items() if i in keep}

    def unknown_leaves(self, known: Iterable[Tensor]) -> list[Tensor]:
        """Leaves that the step depends on and that are not among `known`."""
        edges = [edge for edge in (self._z1, *self._k.values()) if edge is not None]
        return unknown_leaves([edge.node for edge in edges], [*known, self._z0])

    def backward(
        self, gradient: Tensor | None, outputs: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Go back through the step.

        `gradient` is that of the state at its end as far as later steps need it, `outputs` are
        those of the states at all requested times. Returns those of the state at its start, and of
        `wanted`.
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


@final
class Reversal:
    """The backward pass: the interpreter of the operations of `reversal`.

    The first `first` steps have tapes in the outer graph instead. `states` are the checkpoints by
    how many steps come before them, and are emptied; `gradients` are those of the states at all
    requested times; `shift` is the zero that shifts the time of f, None where no gradient of time
    is wanted.
    """

    def __init__(
        self,
        steps: AcceptedSteps,
        environment: Environment,
        first: int,
        states: dict[int, Checkpoint],
        gradients: Sequence[Tensor],
        shift: Tensor | None,
    ) -> None:
        self._steps, self._environment, self._first = steps, environment, first
        self._states, self._gradients = states, gradients
        self._wanted = [*environment.tensors, *([] if shift is None else [shift])]
        self._sums = Sums([None] * len(self._wanted))
        self._rates: Tensor | None = None
        if shift is not None:
            times = len(steps.record.problem.times)
            self._rates = torch.zeros(times, dtype=torch.float64, device="cpu")
        self.advances = 0
        """Steps run again without tape."""

    def run(
        self, slots: int, *, last_input: bool
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Reverse all steps but the first ones, with so many checkpoints at most at once.

        With `last_input` there is the input of the last step besides. Returns the gradients of the
        state before the steps, of the environment's tensors and of the times; the last float64 on
        the CPU.
        """
        n, rates, sums = len(self._steps.record) - self._first, self._rates, self._sums.sums
        positions = [position - self._first for position in sorted(self._states)]
        if last_input and n > 1 and positions[-1] == n - 1:
            positions.pop()
        with self._environment.again(self._steps.carried):
            back = self._interpret(reversal(positions, n, slots, last_input=last_input))
        if not self._first:
            back = _added(back, self._gradients, [0])
        assert back is not None
        if rates is not None:
            shifted = sums.pop()
            rates[0] = -rates[1:].sum()
            if shifted is not None:
                rates[0] += float(shifted)
        return back, sums, rates

    def _interpret(self, operations: Iterable[Operation]) -> Tensor | None:
        """Follow the operations; returns the gradient of the state before the first step."""
        back: Tensor | None = None
        tape: TapedStep | None = None
        steps = self._steps
        for code, stage in operations:
            i = stage + self._first
            if code == Code.FORWARD:
                self._advance(i)
            elif code == Code.TAPED_FORWARD:
                if self._rates is not None:
                    steps.add_rates(self._rates, i - 1, self._input(i), self._gradients)

                def make(i: int = i) -> TapedStep:
                    return TapedStep(steps, i - 1, self._input(i))

                known = [*self._environment.known, *self._wanted]
                tape = checked(make, known) if i == len(steps.record) else make()
            elif code == Code.BACKWARD:
                assert tape is not None
                with self._environment.going_back():
                    back, found = tape.backward(back, self._gradients, self._wanted)
                tape = None
                self._sums.add(found)
                del found
            else:
                del self._states[i]
        return back

    def _input(self, i: int) -> Tensor:
        """The state before step i, counted from 1; random state and buffers are put back to it."""
        found, record = self._states[i - 1], self._steps.record
        if found.z._version != found.version:
            raise ExecutionError(
                f"the state before step {i} of {len(record)}, at time {record[i - 1].t0:.6g}, was "
                "changed in place since it was made; change a copy instead"
            )
        if found.snapshot is not None:
            found.snapshot.restore()
        return found.z

    def _advance(self, i: int) -> None:
        """Run step i without tape, and keep the state after it."""
        z0 = self._input(i)
        self.advances += 1
        with torch.no_grad():
            z1 = self._steps.run(i - 1, z0).z1
        self._states[i] = Checkpoint(z1, z1._version, self._steps.carried.take())


def checked(make: Callable[[], TapedStep], known: Sequence[Tensor]) -> TapedStep:
    """Make a step; an ExecutionError where it depends on a leaf whose gradient would be lost.

    Leaves that f makes itself are gone with the step, which is then made once more.
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


def _edge(tensor: Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _added(
    total: Tensor | None, outputs: Sequence[Tensor], indices: Sequence[int]
) -> Tensor | None:
    """A new tensor, the sum of a total and some outputs' gradients; None without any."""
    for j in indices:
        total = outputs[j].clone() if total is None else total + outputs[j]
    return total


@final
class Sums:
    """Sums of gradients, the latest step's first."""

    def __init__(self, sums: list[Tensor | None]) -> None:
        """Start from some sums, whose tensors are not changed."""
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
