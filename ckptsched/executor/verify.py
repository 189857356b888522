"""Runs a planned step and one by plain autograd, and compares gradients, bytes and seconds.

One call compares the loss, all gradients, all buffers and the random state at the end, bit
by bit, and the measured peak with the projected one and the budget.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..base.budget import format_bytes, format_seconds
from ..base.errors import PlanMismatchError
from ..base.text_table import Grid
from ..capture.inspection import Inspection, inspect_model
from ..capture.model_state import left_as_it_was
from ..capture.recording.preparation import caching, switched_off
from ..capture.signature import first_by_position, without_first
from ..memory.meters import Meter, default_meter
from ..planner.plan import Plan
from ..planner.tradeoff import Measured
from ..profiler.profile import default_loss
from ..profiler.stage_kind import Loss
from ..recompute.stateful_buffers import every_generator
from ..tensors.comparison import same_values
from ..tensors.pytree import State
from ..torch_state.replay_context import AnyGenerator, Autocast, RandomState, now
from .checkpointed import Checkpointed, follow
from .measured_timeline import TimelineMarks
from .recorded import RecordedCalls


@final
@dataclass(frozen=True, kw_only=True)
class Verification:
    """Comparison of one planned step with plain autograd and with the plan's projection."""

    budget_bytes: int
    """Bytes that the step may use."""
    projected_peak_bytes: int
    """Peak by simulation."""
    measured_peak_bytes: int
    """Peak as the meter counted it."""
    plain_peak_bytes: int
    """Peak of the same step by plain autograd."""
    seconds: float
    """Median seconds of the planned step; 0 where it was not timed."""
    plain_seconds: float
    """Median seconds of plain autograd, timed in turn with it."""
    max_gradient_difference: float
    """Largest absolute difference of any gradient from plain autograd's; NaN counts."""
    max_gradient: float
    """Largest absolute gradient of plain autograd."""
    loss: float
    """Absolute value of the loss by plain autograd."""
    loss_difference: float
    """Absolute difference of the losses."""
    buffers_equal: bool
    """Whether all buffers are equal, bit by bit."""
    random_state_equal: bool
    """Whether the random state at the end is that of plain autograd."""
    worst_gradient: str = ""
    """Name of the parameter with the largest difference; empty where all are equal."""
    tolerance: float = 0.0
    """Relative difference of gradients that is let pass."""
    uncached_gradient_difference: float | None = None
    """The largest difference from plain autograd without autocast's cache of cast weights, which
    a plan does not use; None where the caller's setting has no such cache."""
    timeline_bytes: tuple[int, ...] = field(default=(), repr=False)
    """Bytes at most while each operation of the plan's schedule ran, as the meter counted them;
    empty where no timeline was asked for. The largest is the measured peak."""

    @property
    def measured(self) -> Measured:
        """The figures of the planned step, as a trade-off has them."""
        return Measured(
            peak_bytes=self.measured_peak_bytes,
            seconds=self.seconds,
            plain_seconds=self.plain_seconds,
            max_gradient_difference=self.max_gradient_difference,
            ok=self.ok,
            timeline_bytes=self.timeline_bytes,
        )

    @property
    def ok(self) -> bool:
        """Whether the budget was kept, and gradients, buffers and random state are equal."""
        return (
            self.measured_peak_bytes <= self.budget_bytes
            and self.gradients_equal
            and self.buffers_equal
            and self.random_state_equal
        )

    @property
    def gradients_equal(self) -> bool:
        """Whether gradients and loss differ by no more than the tolerance; NaN equals NaN only."""
        return self._small(self.max_gradient_difference, self.max_gradient) and self._small(
            self.loss_difference, self.loss
        )

    def _small(self, difference: float, largest: float) -> bool:
        return difference == 0 or difference <= self.tolerance * largest

    def __str__(self) -> str:
        """A table for people."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        grid = Grid(title="verification", headings=("", ""), rows=tuple(self._rows()), texts=True)
        return grid.to_html()

    def _rows(self) -> list[tuple[str, str]]:
        share = self.measured_peak_bytes / max(1, self.projected_peak_bytes)
        rows = [
            (
                "budget",
                f"{self.budget_bytes} bytes = {format_bytes(self.budget_bytes, budget=True)}",
            ),
            ("projected peak", f"{self.projected_peak_bytes} bytes"),
            ("measured peak", f"{self.measured_peak_bytes} bytes, {share:.2%} of projected"),
            ("projection kept", "yes" if share <= 1 else "NO"),
            ("plain autograd's peak", f"{self.plain_peak_bytes} bytes"),
        ]
        if self.seconds:
            ratio = self.seconds / self.plain_seconds
            rows.append(("step", f"{format_seconds(self.seconds)}, {ratio:.3f} x plain autograd"))
        worst = f" ({self.worst_gradient})" if self.worst_gradient else ""
        rows += [
            ("largest gradient difference", f"{self.max_gradient_difference:.3g}{worst}"),
            *self._without_cache(),
            ("loss difference", f"{self.loss_difference:.3g}"),
            ("buffers equal", "yes" if self.buffers_equal else "NO"),
            ("random state equal", "yes" if self.random_state_equal else "NO"),
            ("verified", "yes" if self.ok else "NO"),
        ]
        return rows

    def _without_cache(self) -> list[tuple[str, str]]:
        """Lines on autocast's cache, where the caller uses it."""
        if self.uncached_gradient_difference is None:
            return []
        rows = [("without autocast's cache", f"{self.uncached_gradient_difference:.3g}")]
        if self.uncached_gradient_difference < self.max_gradient_difference:
            rows += [
                ("", "autocast's cache makes plain autograd add up the gradients of a weight that"),
                ("", "is used several times in low precision; a plan adds them up in the weight's"),
                ("", "own. cache_enabled=False gives plain autograd the same, tolerance= lets it"),
                ("", "pass"),
            ]
        return rows


@dataclass(frozen=True)
class _Outcome:
    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random: RandomState
    peak_bytes: int
    timeline_bytes: tuple[int, ...] = ()


def verify(
    model: nn.Module,
    plan: Plan,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    meter: Meter | None = None,
    rounds: int = 0,
    tolerance: float = 0.0,
    timeline: bool = False,
) -> Verification:
    """Run one step by the plan and one by plain autograd, from the same state.

    The model is left as it was, as by `profile`. Under autocast plain autograd runs with the
    caller's setting of its cache of cast weights, with which it adds up the gradients of a weight
    that is used several times in the lower precision, and once more without that cache.

    Args:
        model: The model, or one that `checkpointed` returned.
        plan: The plan.
        sample: A batch as planned, and what every stage is given besides.
        kwargs: The same by name.
        loss: From the output to a scalar; the profiler's default where none is given.
        meter: What counts bytes; the best that works on the device where none is given.
        rounds: How often to time both steps, in turn; 0 for not at all.
        tolerance: Largest difference of a gradient, relative to the largest gradient, that
            counts as equal. On the CPU 0 is what to expect.
        timeline: Whether to measure the bytes of each operation of the step by the plan, too, as
            `timeline_bytes`: `plan.to_html(path, verified=...)` lays them over the projected ones.

    Returns:
        The comparison; `.ok` says whether gradients, bytes and side effects are as promised.

    Raises:
        PlanMismatchError: The plan does not belong to the model or the sample.
    """
    inspection = inspect_model(model, "verify", PlanMismatchError)
    planned = follow(inspection, model, plan, "none", None)  # what differs is measured
    kwargs = kwargs or {}
    if isinstance(planned.calls, RecordedCalls):
        planned.calls.prepare(sample, kwargs)  # which takes memory that is no part of a step
    else:  # a recording is for arguments as they were given
        sample, kwargs = first_by_position(inspection.model, sample, kwargs)
    call = _Call(inspection, sample, kwargs)
    if not torch.is_grad_enabled():
        raise PlanMismatchError("verify needs gradients; call it outside torch.no_grad")
    if loss is not None and not callable(loss):
        raise PlanMismatchError(
            f"loss is {loss!r}; give a function from the model's output to a number"
        )
    loss = loss or default_loss
    meter = meter or default_meter(call.device)
    marks = TimelineMarks(planned.calls.prepared) if timeline else None
    runs = _run_both(inspection, planned, call, loss, meter, rounds, marks)
    expected, found, uncached = runs.expected, runs.found, runs.uncached
    difference, worst, largest = _compare(expected.gradients, found.gradients)
    without = None if uncached is None else _compare(uncached.gradients, found.gradients)[0]
    return Verification(
        budget_bytes=plan.budget_bytes,
        projected_peak_bytes=plan.peak_bytes,
        measured_peak_bytes=found.peak_bytes,
        plain_peak_bytes=expected.peak_bytes,
        seconds=runs.seconds[0],
        plain_seconds=runs.seconds[1],
        max_gradient_difference=difference,
        max_gradient=largest,
        loss=float(expected.loss.double().abs()),
        loss_difference=_difference(expected.loss, found.loss),
        buffers_equal=all(
            same_values(found.buffers[name], buffer) for name, buffer in expected.buffers.items()
        ),
        random_state_equal=expected.random == found.random,
        worst_gradient=worst,
        tolerance=tolerance,
        uncached_gradient_difference=without,
        timeline_bytes=found.timeline_bytes,
    )


@final
@dataclass(frozen=True)
class _Runs:
    """The steps that are compared."""

    expected: _Outcome
    """By plain autograd."""
    uncached: _Outcome | None
    """The same without autocast's cache of cast weights, where the caller has one."""
    found: _Outcome
    """By the plan."""
    seconds: tuple[float, float]
    """Of a step by the plan and one by plain autograd."""


def _run_both(
    inspection: Inspection,
    planned: Checkpointed,
    call: _Call,
    loss: Loss,
    meter: Meter,
    rounds: int,
    marks: TimelineMarks | None,
) -> _Runs:
    """Run all steps from the same state, and leave the model as it was."""
    plain = inspection.model
    autocast = Autocast.take(call.device)
    cached = autocast.is_on and torch.is_autocast_cache_enabled()
    # torch asks for backwards outside of autocast, and autograd follows where they are called.
    random = RandomState.take(call.device, call.generators())
    with (
        left_as_it_was(inspection, random, call.leaves) as (_, put_back),
        Autocast.off(call.device).again(),
    ):

        def reset() -> None:
            put_back()
            for leaf in (*inspection.slots.parameters(), *call.leaves):
                leaf.grad = None

        reset()
        step = _Step(call, loss, autocast, cached, planned)
        expected = _measure(plain, step, meter)
        reset()
        uncached = _measure(plain, replace(step, cached=False), meter) if cached else None
        reset()
        found = _measure(planned, step, meter, marks)
        reset()
        return _Runs(expected, uncached, found, _time(planned, plain, step, rounds, reset))


@final
class _Call:
    """A call of the model; its tensors are leaves, as what they came from is no part of a step."""

    def __init__(
        self, inspection: Inspection, sample: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        state = State.of((sample, dict(kwargs)), opaque=True)
        if not sample and not state.leaves:
            wrong = without_first(inspection.model, kwargs, "or as {!r} in kwargs")
            raise PlanMismatchError(f"verify needs a sample to call the model with, {wrong}")
        if not state.leaves:
            raise PlanMismatchError("verify needs a sample with tensors, found none in it")
        self.leaves = [t if t.is_leaf else t.detach().requires_grad_() for t in state.leaves]
        self._sample, self._kwargs = state.replaced(self.leaves).value()
        self._constants, self._inspection = tuple(state.constants()), inspection
        self.device = self.leaves[0].device

    def __call__(self, model: Callable[..., Any]) -> Any:
        return model(*self._sample, **self._kwargs)

    def generators(self) -> tuple[AnyGenerator, ...]:
        """Random generators that the model may draw from besides torch's default ones."""
        return every_generator(self._inspection.modules, self._constants)

    def gradients(self) -> dict[str, Tensor | None]:
        """By name: "input", or with a number where there are several tensors."""
        several = len(self.leaves) > 1
        return {
            f"input {k}" if several else "input": leaf.grad for k, leaf in enumerate(self.leaves, 1)
        }


@final
@dataclass(frozen=True)
class _Step:
    """Forward and loss under autocast, as the caller has it, and the backward outside."""

    call: _Call
    loss: Loss
    autocast: Autocast
    cached: bool
    """Whether with autocast's cache of cast weights."""
    planned: Checkpointed

    def __call__(self, model: nn.Module) -> tuple[Any, Tensor]:
        torch.clear_autocast_cache()  # of runs before, whose graphs are gone
        with self.autocast.again(cached=self.cached):
            output = self._called(model)
            value = self.loss(output)
        value.backward()  # type: ignore[no-untyped-call]
        return output, value

    def _called(self, model: nn.Module) -> Any:
        if model is self.planned:
            return self.call(model)
        # A recording is made without caches of keys and values, which lie otherwise in memory.
        recorded = isinstance(self.planned.calls, RecordedCalls)
        with switched_off(caching(self.planned.model) if recorded else ()):
            return self.call(self.planned.plainly)


def _measure(
    model: nn.Module, step: _Step, meter: Meter, marks: TimelineMarks | None = None
) -> _Outcome:
    call = step.call
    with meter.window() as window:
        with nullcontext() if marks is None else marks.on(window):
            output, value = step(model)
        window.mark()
        value = value.detach()
        del output
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return _Outcome(
        loss=value,
        gradients={**named, **call.gradients()},
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
        random=RandomState.take(call.device, call.generators()),
        peak_bytes=max(phase.peak_bytes for phase in window.phases[:-1]),
        timeline_bytes=() if marks is None else marks.timeline(window.phases[:-1]),
    )


def _compare(
    expected: dict[str, Tensor | None], found: dict[str, Tensor | None]
) -> tuple[float, str, float]:
    """Largest difference, its place, and the largest gradient; one missing counts as infinite."""
    difference, worst, largest = 0.0, "", 0.0
    for name, right in expected.items():
        left = found[name]
        if right is None or left is None:
            here = 0.0 if left is right else float("inf")
        else:
            largest = max(largest, float(right.abs().max()) if right.numel() else 0.0)
            here = _difference(left, right)
        # A difference that is not a number is the worst, and stays so.
        if here != 0.0 and not math.isnan(difference) and not here <= difference:
            difference, worst = here, name
    return difference, worst, largest


def _difference(left: Tensor, right: Tensor) -> float:
    """The largest one; 0 where both are the same, NaN and infinity included."""
    return 0.0 if same_values(left, right) else float((left.detach() - right.detach()).abs().max())


def _time(
    planned: Checkpointed,
    plain: nn.Module,
    step: _Step,
    rounds: int,
    reset: Callable[[], None],
) -> tuple[float, float]:
    """Median seconds of both steps, timed in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for model, seconds in zip((planned, plain), times, strict=True):
            start = now(step.call.device)
            step(model)
            seconds.append(now(step.call.device) - start)
            reset()
    if not rounds:
        return 0.0, 0.0
    return statistics.median(times[0]), statistics.median(times[1])
