"""Makes a model train by a plan: a module that stands for it, and follows the plan."""

from __future__ import annotations

from typing import Any, TypeAlias, cast, final, get_args

import torch
from torch import nn

from ..base.errors import ExecutionError, PlanMismatchError
from ..capture.inspection import Inspection, inspect_model
from ..capture.recording.stages import Captured
from ..capture.wrappers import StandsFor, plain_forward
from ..planner.plan import Plan
from ..recompute.fsdp import is_sharded
from ..torch_state.locks import LendingLock
from ..torch_state.replay_context import ContextFn
from ..workload.chain import Chain
from .prepared_plan import Check, PreparedPlan
from .recorded import RecordedCalls
from .step.outer_graph import PlannedCalls

Calls: TypeAlias = PlannedCalls | RecordedCalls
"""Runs calls of a model by a plan: of one that is a chain, or of one that is recorded."""


def checkpointed(
    model: nn.Module,
    plan: Plan,
    *,
    check: Check = "glance",
    context_fn: ContextFn | None = None,
) -> Checkpointed:
    """Make a model train by a plan.

    Args:
        model: The model that the plan was made for.
        plan: The plan.
        check: What a stage that runs again must give as it gave it first, or the backward ends
            with an error that names the stage. With "glance" a few bytes of its output, if that
            is on the CPU, where they are the same each time, and of equal steps for the first and
            the last: it costs microseconds, and shows what changes a stage from outside. With
            "outputs" all of it, bit by bit, which takes about a second for 1 GB of outputs, and
            keeps 16 bytes a stage; an output with gaps in its memory is copied for the moment.
            With "none" nothing is compared.
        context_fn: For what a library keeps where torch does not see it, such as a recipe for
            FP8: a function without arguments that returns two context managers, as that of
            `torch.utils.checkpoint`. The first is around a forward pass of the model, also one by
            plain autograd or without gradients; the second around stages that run again, in the
            backward, as often as they do. The function is called anew each time, so what it
            returns is entered once, and may not rely on a pair belonging together. None leaves
            the contexts of `model` if that follows a plan already.

    Returns:
        A module with the same parameters, buffers and `state_dict` keys. It shares them with
        `model`, and has its attributes and methods. Its forward takes a batch of the planned
        shape; where no gradient is wanted it runs the model as it is, on any batch. A model whose
        plan is for a recording of it is recorded in its first step.

    Raises:
        PlanMismatchError: The plan was made for another model, or by hand, or is none.
        ExecutionError: There is no such check, or context_fn is no function.
    """
    check_options(check, context_fn)
    inspection = inspect_model(model, "checkpointed", PlanMismatchError)
    return follow(inspection, model, plan, check, context_fn)


def check_options(check: Check, context_fn: ContextFn | None) -> None:
    """Refuse a check that there is not, and contexts that are none; see `checkpointed`.

    Raises:
        ExecutionError: It is one.
    """
    if check not in get_args(Check):
        raise ExecutionError(f"check is {check!r}; give 'none', 'glance' or 'outputs'")
    if context_fn is not None and not callable(context_fn):
        raise ExecutionError(
            f"context_fn is {context_fn!r}; give a function that returns two context managers"
        )


def follow(
    inspection: Inspection, given: object, plan: Plan, check: Check, context_fn: ContextFn | None
) -> Checkpointed:
    """Make an inspected model train by a plan; further arguments and errors as `checkpointed`.

    Args:
        inspection: The model.
        given: The model as the user gave it; of one that follows a plan the contexts are kept.
        plan: The plan.
        check: What is compared of stages that run again.
        context_fn: Gives the contexts of first runs and recomputations, or None.
    """
    if isinstance(given, Checkpointed):
        context_fn = context_fn or given.context_fn
    if not isinstance(plan, Plan):
        advice = "; make one of it: plan(chain, budget=...)" if isinstance(plan, Chain) else ""
        raise PlanMismatchError(f"a model follows a Plan, found a {type(plan).__name__}{advice}")
    return Checkpointed(inspection.model, calls_of(inspection, plan, check, context_fn))


def calls_of(
    inspection: Inspection, plan: Plan, check: Check, context_fn: ContextFn | None
) -> Calls:
    """What runs calls of a model by a plan.

    Args:
        inspection: The model.
        plan: The plan.
        check: What is compared of stages that run again.
        context_fn: Gives the contexts of first runs and recomputations, or None.
    """
    signature = plan.chain.signature
    recorded = signature is not None and signature.recorded
    if recorded and not isinstance(inspection.model, Captured):
        return RecordedCalls(inspection, plan, check, context_fn)
    return PlannedCalls(PreparedPlan(inspection, plan, check, context_fn))


@final
class Checkpointed(StandsFor):
    """A model that trains by a plan; see `checkpointed`."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        """Share everything that the model owns.

        Args:
            model: The model.
            calls: What runs it by the plan.
        """
        super().__init__(model)
        self.__dict__["_calls"] = calls

    @property
    def calls(self) -> Calls:
        """What runs calls of the model by the plan."""
        return cast(Calls, self.__dict__["_calls"])

    @property
    def plan(self) -> Plan:
        """The plan that is followed."""
        return self.calls.plan

    @property
    def context_fn(self) -> ContextFn | None:
        """The function that gives the contexts of first runs and recomputations, or None."""
        return self.calls.context_fn

    def share_lock(self, lock: LendingLock) -> None:
        """Run in turn with other models that hold the lock, as they have modules in common.

        Args:
            lock: Theirs; in place of one that only the threads in this model ask for.
        """
        self.calls.share_lock(lock)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; a backward from the output follows the plan.

        Args:
            args: A batch: a tensor, or tuples, lists, dicts and dataclasses of them; as planned
                where gradients are wanted. Then what every stage is given besides, such as a
                condition.
            kwargs: The same by name; the batch by that of the first argument of the model.

        Raises:
            PlanMismatchError: The batch, the mode or what is trained is not as planned.
            ExecutionError: A stage cannot be run again with the same result.
        """
        if not torch.is_grad_enabled():
            return self.plainly(*args, **kwargs)
        if is_sharded(self) and is_sharded(self.model):
            raise PlanMismatchError(
                "both the model and what makes it follow the plan are sharded by fully_shard, "
                "and the two own the same parameters: shard one of them"
            )
        return self.calls.run(args, kwargs)

    def plainly(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it is, in the context of a first run.

        Args:
            args: A batch, and what every stage is given besides.
            kwargs: The same by name.
        """
        with self.calls.first_context(), plain_forward(self.model):
            return self.model(*args, **kwargs)
