"""The memory of an adaptive step, measured once for each kind of call, and cached with f."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...base.errors import ExecutionError, ProfileError
from ...memory.meters import Measurement, ProfilerMeter, default_meter
from ...profiler.side_output_search import is_in_a_graph, still, whereabouts
from ...tensors.comparison import tolerance_of
from ...torch_state.locks import Lent, Locked
from ...torch_state.replay_context import Generators
from ...torch_state.surroundings import Ambient
from ..adaptive.norms import identity_of_norm
from ..function.attributes import Attributes
from ..function.cache import FunctionCache
from ..function.captures import Closure
from ..function.fingerprint import Identity, layout
from ..function.replay_environment import Environment
from ..function.rng_and_buffers import RngAndBuffers, StepSnapshot
from ..methods.embedded import Step, end_slope
from .backward import AcceptedSteps, Sums, TapedStep, checked
from .forward import (
    Accepted,
    Integration,
    rates_inside,
    state_inside,
    time_shift,
)
from .problem import Problem, Record, RightHandSide
from .step_memory import Footprint

T = TypeVar("T")

_INSIDE = 0.3
"""Share of a step before its output: not halfway, where slopes may have no weight."""


@final
@dataclass(frozen=True, slots=True)
class Findings:
    """The findings of a trial, which are cached."""

    draws: bool
    """Whether f draws random numbers."""
    footprint: Footprint | None = None
    """Bytes of a step; None where nothing was measured."""


@final
class Trial:
    """Whether steps of f can be run again, and the memory that they take."""

    def __init__(
        self,
        problem: Problem,
        closure: Closure,
        wanted: Sequence[Tensor],
        y0: Tensor,
        *,
        with_time: bool,
    ) -> None:
        self._problem, self._closure, self._wanted = problem, closure, wanted
        self._y0, self._z0, self._with_time = y0, y0.detach(), with_time
        self._carried = RngAndBuffers(closure, y0.device)
        self.evaluations = 0
        """Evaluations of f so far."""

    def _key(self) -> Hashable:
        """A key of all that the findings depend on: shapes, dtypes, modes, wanted gradients."""
        problem, y0 = self._problem, self._y0
        modules = self._closure.parts
        held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        return (
            *(problem.tableau, problem.meet, identity_of_norm(problem.tolerances.norm)),
            *(layout(y0), self._with_time, *Ambient.take(y0.device).key()),
            tuple(map(Identity, self._closure.modules)),
            tuple((type(m), m.training) for m in modules),
            tuple(None if t is None else layout(t) for t in held),
            tuple(map(layout, (*self._closure.tensors, *self._wanted))),
            torch.get_num_threads(),
        )

    def findings(
        self,
        cache: FunctionCache,
        function: Hashable,
        budget_bytes: int | None,
        beside_bytes: int,
        loss: Callable[[], tuple[int, int]],
    ) -> Findings:
        """The findings for this solve; measured once for each key, of which `function` is a part.

        Without a budget no bytes are measured. `loss` measures the caller's under the cache's lock:
        bytes of its peak, and of the gradients that it leaves; `beside_bytes` live throughout
        besides.

        Raises:
            ExecutionError: f gives another slope when it is evaluated again.
            ProfileError: There is no meter; the message says what to do.
        """
        key = ("adaptive", function, self._key())
        # Other threads that draw random numbers, or replace parameters of f, wait meanwhile.
        with Locked((Generators.lock, cache.lock)):
            found: Findings | None = cache.find(key)
            if found is None:
                found = Findings(self._apart(self._check))
            if budget_bytes is not None and found.footprint is None:
                found = Findings(found.draws, self._apart(self._measure))
            loss_bytes, left_bytes = (0, 0) if found.footprint is None else loss()
            beside = beside_bytes + left_bytes, loss_bytes
            here = self._here(found, *beside)
            step = here.footprint
            # Two steps with tapes have to fit already while they are measured.
            if (
                step is not None
                and step.tape_bytes is None
                and step.probe_bytes <= (budget_bytes or 0)
            ):
                found = Findings(found.draws, self._apart(self._measure_tapes, found.footprint))
                here = self._here(found, *beside)
            cache.add(key, found)
        return here

    def _here(self, found: Findings, beside_bytes: int, loss_bytes: int) -> Findings:
        """Findings with this solve's number of times, its loss, and other tensors' bytes."""
        if found.footprint is None:
            return found
        outputs, timed = len(self._problem.times), self._with_time
        # The gradient of times, as it is summed, in float64, and as the caller gets it.
        beside = beside_bytes + timed * 2 * 8 * outputs
        # With a tape each output keeps its derivatives in time.
        rates = timed * outputs * rates_inside(self._problem.tableau)
        start = found.footprint.start_bytes + rates * found.footprint.output_bytes
        step = replace(
            found.footprint, outputs=outputs, loss_bytes=loss_bytes, beside_bytes=beside,
            start_bytes=start,
        )  # fmt: skip
        return Findings(found.draws, step)

    def _apart(self, work: Callable[..., T], *given: object) -> T:
        """Run a measurement, and put back everything that it changes."""
        environment = Environment(self._closure, self._wanted, self._z0)
        random = Generators(self._z0.device, self._carried.own)
        # Attributes that f makes when it is first evaluated are made each time, and so measured.
        attributes = Attributes(self._problem.func)
        try:
            with environment.again(self._carried), torch.no_grad():
                return work(environment, *given)
        finally:
            random.restore()
            attributes.put_back()

    def _check(self, environment: Environment) -> bool:
        """Refuse f where it gives another slope when it is evaluated again; whether it draws."""
        f, z0, carried = RightHandSide(self._problem), self._z0, self._carried
        t0 = self._problem.times[0]
        first = carried.look(lambda: f(t0, z0))
        snapshot = carried.take()
        if snapshot is not None:
            first = f(t0, z0)
            snapshot.restore()
        again = f(t0, z0)
        self.evaluations += f.evaluations
        # CUDA kernels may add up in another order; on the CPU equal means equal.
        near = 0.0 if z0.device.type == "cpu" else tolerance_of(z0.dtype)
        if not torch.allclose(first, again, rtol=near, atol=near, equal_nan=True):
            raise ExecutionError(
                f"f gives another slope when it is evaluated again at time {t0:g} on the same "
                "state with the same random state and buffers, so steps cannot be run again: it "
                "keeps a state of its own that is no buffer, or draws from a generator that is "
                "not found; keep the state in a buffer (register_buffer), the generator as an "
                "attribute of a module, or solve without a budget"
            )
        self._check_left(environment)
        return carried.draws

    def _check_left(self, environment: Environment) -> None:
        """Refuse f where it leaves a tensor with a graph besides its slope."""
        leaf = self._z0.detach().requires_grad_()
        # Tensors without a stand-in may be in another graph of the caller's already.
        watched = [leaf, *(t for t in environment.known if not is_in_a_graph(t))]
        f = RightHandSide(self._problem)
        with torch.enable_grad():
            slope = f(self._problem.times[0], leaf)
        del slope
        self.evaluations += f.evaluations
        held = [t for t in watched if is_in_a_graph(t)]
        if any(still(partial(is_in_a_graph, t)) for t in held):
            places = [p for root in self._closure.modules for p in whereabouts(root)]
            raise ExecutionError(
                "f leaves a tensor with a graph besides its slope "
                f"({', '.join(places) or 'in a list, a closure or a hook'}), and an adaptive solve "
                "that runs steps again cannot find it again, so its gradient would be lost: make "
                "it part of the state, let f leave it without its graph (tensor.detach()), or "
                "solve on a fixed grid or without a budget"
            )

    def _measure(self, environment: Environment) -> Footprint:
        step, forward = self._forward()
        moving, snapshot = self._moving(), self._carried.nbytes
        z = self._z0.nbytes
        return Footprint(
            state_bytes=z + snapshot,
            snapshot_bytes=snapshot,
            forward_bytes=max(forward, moving),
            backward_bytes=environment.buffer_bytes
            + max(self._replayed(environment, step), moving),
            gradient_bytes=sum(p.nbytes for p in self._wanted),
            output_bytes=z,
            outputs=2,
        )

    def _measure_tapes(self, environment: Environment, known: Footprint) -> Footprint:
        step, forward = self._forward()
        found = self._taped(environment, step)
        found["attempt_bytes"] = max(found["attempt_bytes"], forward)
        return replace(known, **found)

    def _moving(self) -> int:
        """The peak of taking a random and buffer snapshot, restoring it, and checking buffers."""

        def run(mark: Callable[[], None]) -> None:
            snapshot = self._carried.take()
            if snapshot is not None:
                snapshot.restore()
            self._carried.check()

        return measured(self._z0.device, run)[1][0].peak_bytes

    def _forward(self) -> tuple[Step, int]:
        """The first step, and the peak of it and of the evaluations that choose its size."""

        def run(mark: Callable[[], None]) -> Step:
            integration = Integration(self._problem, self._z0, self._carried)
            accepted = integration.advance()
            self._inside(accepted)
            self.evaluations += integration.f.evaluations
            return accepted.step

        step, phases = measured(self._z0.device, run)
        return step, phases[0].peak_bytes

    def _inside(self, accepted: Accepted) -> Tensor | None:
        """A state inside the step, where the slopes for it are there."""
        tableau = self._problem.tableau
        if end_slope(tableau) not in accepted.slopes.k:
            return None
        return state_inside(tableau, accepted.step, _INSIDE, accepted.z0, accepted.slopes)

    def _taped(self, environment: Environment, step: Step) -> dict[str, int]:
        """Fields of `Footprint` of steps with tapes: two halves of a step, and their backward."""
        # Each half reaches a time inside, for which as many slopes are evaluated as ever are.
        h, middle = 0.5 * step.h, step.t0 + 0.5 * step.h
        halves = Step(step.t0, middle, h), Step(middle, step.t1, h)
        inside = (step.t0, step.t0 + _INSIDE * h, middle + _INSIDE * h)
        probe = replace(self._problem, times=inside, meet=False)
        leaf = self._z0.detach().requires_grad_(self._y0.requires_grad)
        times = torch.tensor(probe.times, dtype=torch.float64, device="cpu")
        times.requires_grad_(self._with_time)
        wanted = [x for x in (leaf, times, *environment.tensors) if x.requires_grad]
        gradient, shifted = torch.zeros_like(leaf), times if self._with_time else None

        def run(mark: Callable[[], None]) -> int:
            edges, evaluations = self._edges_of(halves, probe, leaf, shifted, mark)
            if edges:
                with Lent():
                    torch.autograd.grad(edges, wanted, [gradient] * len(edges), allow_unused=True)
            return evaluations

        with torch.enable_grad():
            evaluations, phases = measured(leaf.device, run)
        self.evaluations += evaluations
        begun, *steps, back = phases
        snapshot = self._carried.nbytes
        z = self._z0.nbytes + snapshot
        # Each half reaches one output, whose derivatives in time are counted by the output.
        rates = self._with_time * rates_inside(self._problem.tableau) * self._z0.nbytes
        return {
            "start_bytes": begun.final_bytes,
            # A tape is let go for a state, never the other way round.
            "tape_bytes": max(z, *(x.final_bytes - x.start_bytes - rates for x in steps)),
            # A snapshot is taken before an attempt, here after it.
            "attempt_bytes": max(x.peak_bytes - x.start_bytes for x in steps) + snapshot,
            "return_bytes": back.peak_bytes - back.start_bytes,
        }

    def _edges_of(
        self,
        halves: Sequence[Step],
        probe: Problem,
        leaf: Tensor,
        times: Tensor | None,
        mark: Callable[[], None],
    ) -> tuple[list[GradientEdge], int]:
        """Run steps with tapes: what a backward begins with, and how often f was evaluated.

        Args:
            halves: The steps.
            probe: The problem, with times inside them.
            leaf: Where they begin.
            times: The same times, where they have a gradient.
            mark: Called before each step, and after the last while all is still there.
        """
        shift = None if times is None else time_shift(times, leaf)
        integration = Integration(probe, leaf, self._carried, shift)
        held: list[tuple[Tensor, StepSnapshot | None]] = []
        edges = []
        for half in halves:
            mark()
            accepted = integration.forced(half)
            held.append((accepted.z0, accepted.snapshot))
            reached = integration.reached(accepted, times)
            edges += [get_gradient_edge(z) for z in reached if z.requires_grad]
            del accepted, reached
        if integration.z.requires_grad:
            edges.append(get_gradient_edge(integration.z))
        evaluations = integration.f.evaluations
        mark()
        # Tensors that the tapes do not hold go here, before a backward.
        return edges, evaluations

    def _replayed(self, environment: Environment, step: Step) -> int:
        """The peak of a step that is run again without tape, then with it, and goes back."""
        problem, z0, with_time = self._problem, self._z0, self._with_time
        probe = replace(problem, times=(step.t0, step.t0 + _INSIDE * step.h))
        record = Record(probe)
        record.append(step)
        gradient = torch.zeros_like(z0)
        outputs = [torch.zeros_like(z0) for _ in range(2)]
        # All sums are there already but that of the shifts of time.
        sums = Sums([*(torch.zeros_like(p) for p in environment.tensors), *[None] * with_time])

        def run(mark: Callable[[], None]) -> None:
            wanted, shift = [*environment.tensors], None
            if with_time:
                shift = z0.new_zeros((), dtype=z0.dtype.to_real()).requires_grad_()
                wanted.append(shift)
            f = RightHandSide(probe, shift)
            steps = AcceptedSteps(record, f, self._carried)
            steps.run(0, z0)
            if with_time:
                rates = torch.zeros(2, dtype=torch.float64, device="cpu")
                steps.add_rates(rates, 0, z0, outputs)
            make = partial(TapedStep, steps, 0, z0)
            tape = checked(make, [*environment.known, *wanted])
            with environment.going_back():
                back, found = tape.backward(gradient, outputs, wanted)
            del tape
            sums.add(found)
            torch.add(outputs[0], outputs[0] if back is None else back)
            self.evaluations += f.evaluations

        return measured(z0.device, run)[1][0].peak_bytes


def measured(
    device: torch.device, fn: Callable[[Callable[[], None]], T]
) -> tuple[T, tuple[Measurement, ...]]:
    """Run a function under the best free meter; tensors of other threads do not count.

    It calls its argument at the end of each phase. Returns its result, and each phase's bytes; a
    ProfileError where there is no meter.
    """
    meter = default_meter(device, own_thread=True)
    try:
        with meter.window() as window:
            result = fn(window.mark)
        return result, window.phases
    except ProfileError as error:
        if isinstance(meter, ProfilerMeter) or "while another is open" not in str(error):
            raise ProfileError(
                f"an adaptive step cannot be measured here ({error}); give the number of "
                "checkpoints in place of a budget"
            ) from error
    with ProfilerMeter(device).window() as window:
        result = fn(window.mark)
    return result, window.phases
