"""Runs calls of any model by a plan that was made for a recording of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch

from ..base.errors import PlanMismatchError, ProfileError
from ..capture.inspection import Inspection
from ..capture.policies.policy import ruled_by
from ..capture.recording.recording import Bound, layouts_of
from ..capture.recording.stages import Captured, capture_as_before
from ..capture.signature_check import Expected
from ..planner.plan import Plan
from ..recompute.fsdp import call_as_forward, is_sharded
from ..tensors.pytree import NO_EXTRAS, State
from ..torch_state.locks import LendingLock
from ..torch_state.replay_context import ContextFn, contexts
from .attribute_watch import AttributeWatch
from .prepared_plan import Check, PreparedPlan
from .step.outer_graph import PlannedCalls


@final
class RecordedCalls:
    """Runs calls of a model by a plan for a recording, which the first call makes again.

    Where the recording that the plan was made for is at hand, it is used.
    """

    def __init__(
        self,
        inspection: Inspection,
        plan: Plan,
        check: Check,
        context_fn: ContextFn | None,
        captured: Captured | None = None,
        *,
        is_forward: bool = False,
    ) -> None:
        """Take a plan.

        Args:
            inspection: The model.
            plan: The plan, whose chain was profiled from a recording.
            check: What is compared of stages that run again.
            context_fn: Gives the contexts of first runs and recomputations, or None.
            captured: The recording, if there is one.
            is_forward: Whether this takes the place of the model's forward, which its `__call__`
                runs with its hooks around it.

        Raises:
            PlanMismatchError: The plan is for another model, or no model can follow it.
        """
        self.plan, self.context_fn = plan, context_fn
        self.inspection, self._check, self._is_forward = inspection, check, is_forward
        self._lock: LendingLock | None = None
        self._bound: _BoundRecording | None = None
        if captured is not None:
            self._bind(captured)

    @property
    def captured(self) -> Captured | None:
        """The recording; None before the first call."""
        return None if self._bound is None else self._bound.captured

    @property
    def prepared(self) -> PreparedPlan:
        """The plan bound to the recording, which there has to be: see `prepare`."""
        assert self._bound is not None
        return self._bound.calls.prepared

    def share_lock(self, lock: LendingLock) -> None:
        """Run in turn with other models that hold the lock; see `Checkpointed.share_lock`."""
        self._lock = lock
        if self._bound is not None:
            self._bound.calls.share_lock(lock)

    def first_context(self) -> AbstractContextManager[Any]:
        """The context for first runs of stages."""
        return nullcontext() if self.context_fn is None else contexts(self.context_fn)[0]

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model; a backward from the output follows the plan.

        Args:
            args: What it is called with.
            kwargs: The same by name.

        Raises:
            PlanMismatchError: The call, the mode or what is trained is not as planned.
            ExecutionError: A stage cannot be run again with the same result.
        """
        model = self.inspection.model
        bound = self._prepared(args, kwargs)
        if not self._is_forward and is_sharded(model):
            return call_as_forward(model, bound.run, *args, **kwargs)
        return bound.run(*args, **kwargs)

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the model on a call, unless that has been done.

        Args:
            args: What it is called with.
            kwargs: The same by name.

        Raises:
            PlanMismatchError: The plan is for another call, or another model.
        """
        self._prepared(args, kwargs)

    def _prepared(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _BoundRecording:
        if self._bound is None:
            inputs = State.of((args, dict(kwargs)), opaque=True)
            if not inputs.leaves:
                raise PlanMismatchError("the model was called without any tensor")
            self._bind(self._recorded(inputs))
        assert self._bound is not None
        return self._bound

    def _recorded(self, inputs: State) -> Captured:
        """The model recorded on a call, with the plan's cuts."""
        signature = self.plan.chain.signature
        assert signature is not None
        expected = Expected(signature, self.plan.peak_bytes)
        unlike: PlanMismatchError | None = None
        try:
            expected.check_call(State.of(inputs.leaves), NO_EXTRAS.apart())
        except PlanMismatchError as error:
            unlike = error  # unless the model itself has the rest of what the plan is for
        try:
            captured = capture_as_before(
                self.inspection, inputs, signature.cuts, ruled_by(signature)
            )
            if unlike is not None and not captured.recording.carried:
                raise unlike
            tensors = captured.recording.tensors(self.inspection.model, inputs)
            expected.check_call(State.of(tensors), NO_EXTRAS.apart())
        except ProfileError as error:
            if unlike is not None:
                raise unlike from error
            raise PlanMismatchError(
                f"the plan is for a recording of the model, and on this call it cannot be made: "
                f"{error}"
            ) from error
        count = len(captured.recording.calls)
        if count != signature.recorded:
            raise PlanMismatchError(
                f"the plan is for a recording of {signature.recorded} calls, and the model makes "
                f"{count} on this batch; profile and plan for it"
            )
        return captured

    def _bind(self, captured: Captured) -> None:
        prepared = PreparedPlan(Inspection.of(captured), self.plan, self._check, self.context_fn)
        calls = PlannedCalls(prepared)
        if self._lock is not None:
            calls.share_lock(self._lock)
        self._bound = _BoundRecording(captured, calls)


@final
class _BoundRecording:
    """A recording, what runs it by a plan, and what its last step has found of the model."""

    def __init__(self, captured: Captured, calls: PlannedCalls) -> None:
        self.captured, self.calls = captured, calls
        self._seen: tuple[AttributeWatch, Bound] | None = None

    def __getstate__(self) -> dict[str, object]:
        """All but what was seen, in the very objects of the model."""
        return {**self.__dict__, "_seen": None}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see `RecordedCalls.run`."""
        inputs = State.of((args, kwargs), opaque=True)
        bound, recording = self._checked(inputs), self.captured.recording
        tensors = self.calls.run((recording.tensors(self.captured.model, inputs),), {})
        numbers = recording.live(len(recording.calls))
        return bound.result(dict(zip(numbers, tensors, strict=True)))

    def _checked(self, inputs: State) -> Bound:
        """The recording bound to the model, once the call was found to go the way of it.

        Raises:
            PlanMismatchError: It does not.
        """
        captured, seen = self.captured, self._seen
        if (
            seen is not None
            and seen[0].sees_nothing_new()
            and _goes_the_way(captured, seen[1], inputs)
        ):
            return seen[1]
        # Looked at before it is checked: what changes in between shows in the next step.
        watch = AttributeWatch(captured.model, captured.recording.kept)
        captured.check(inputs)
        self._seen = watch, Bound(captured.recording, captured.model)
        return self._seen[1]


def _goes_the_way(captured: Captured, bound: Bound, inputs: State) -> bool:
    """Whether a call has the structure and layouts that were recorded, and all guards hold."""
    recording = captured.recording
    if State((), inputs.tree).tree != recording.inputs.tree:
        return False
    if layouts_of(inputs) != recording.layouts:
        return False
    try:
        tensors = recording.tensors(captured.model, inputs)
    except PlanMismatchError:  # whoever looks closer says so
        return False
    values = dict(zip(recording.given, tensors, strict=True))
    with torch.no_grad():
        return all(bound.ask(guard, values) == guard.found for guard in recording.guards)
