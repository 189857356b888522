"""Fits a model in place: profiles and plans it, and lets its own calls follow the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from ..base.budget import Budget, parse_budget
from ..base.errors import PlanMismatchError, ProfileError
from ..capture.inspection import inspect_model
from ..capture.policies.policy import Named, Policy
from ..capture.wrappers import in_place, in_place_below, plain_forward, unwrapped
from ..executor.checkpointed import Checkpointed, check_options
from ..planner.plan import Plan
from ..profiler.stage_kind import Loss
from ..torch_state.replay_context import ContextFn
from .in_place import Fitted, OnNewInput, Options

M = TypeVar("M", bound=nn.Module)


def fit(
    model: M,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    budget: int | float | str | Budget,
    solver: str = "auto",
    loss: Loss | None = None,
    context_fn: ContextFn | None = None,
    capture: bool | None = None,
    on_new_input: OnNewInput = "plan",
    never_recompute: Named | Iterable[Named] = (),
    always_recompute: Named | Iterable[Named] = (),
) -> M:
    """Fit the training of a model into a budget: from now on its calls follow a plan.

    The model stays what it is: its class, methods, parameters, keys of its `state_dict`, hooks and
    the signature of its forward. Where gradients are off, and in eval mode unless it was fitted in
    that, its forward runs as before. A copy of it (`copy.deepcopy`) plans anew when it is first
    called; what is pickled of it is the model alone.

    A call of another shape follows the same schedule if none of its tensors is larger than in a
    call that was planned, so it is best to fit on the largest batch; any other call is planned
    when it is first seen, within the same budget, and a line in the log "ckptsched" says so.

    Without a batch, the model is planned when it is first called with gradients on, among whatever
    is around that call, such as autocast: for trainers and loops whose batches are not at hand.

    Args:
        model: The model, in the mode to train in.
        sample: One batch, of the shape to train with; none to plan for the first call.
        kwargs: The same by name.
        budget: Bytes, text such as "256MiB", or a share such as "40%" of what storing everything
            takes on the batch that is planned first.
        solver: Name of a solver, or "auto".
        loss: From the output to a scalar, so that its bytes are counted exactly; None for the loss
            that the output has as `.loss` or under that key, and else bytes as for a
            cross-entropy.
        context_fn: Gives what is around the first run of stages, in which the model is measured,
            and what is around those that run again; see `checkpointed`.
        capture: Whether to record the model, see `profile`.
        on_new_input: What happens to a call that no plan is for: "plan" plans for it, "refuse"
            ends in an error, "plain" runs it by plain autograd, with a `BudgetWarning`.
        never_recompute: Calls of the model that a step makes once, see `captured`. Each name must
            be that of a call with the first batch; with others some may not be called.
        always_recompute: Calls that lean tapes may make again whatever they cost, see `captured`.

    Returns:
        The model that was given. `plan_of` gives its plan, `unfit` takes the plans off.

    Raises:
        BudgetSyntaxError: The budget cannot be read.
        InfeasibleBudgetError: Nothing fits; the message names the least budget that works. The
            model is as it was. Without a batch, the first call raises this and what follows.
        ProfileError: The model cannot be measured, or a policy is not for its calls.
    """
    policy = Policy.of(never_recompute, always_recompute)
    check_options("glance", context_fn)
    parse_budget(budget)
    if context_fn is None and isinstance(model, Checkpointed):
        context_fn = model.context_fn
    inspection = inspect_model(model, "fit", ProfileError)
    fitted = Fitted(
        inspection.model,
        Options(
            budget=budget,
            solver=solver,
            loss=loss,
            context_fn=context_fn,
            capture=capture,
            on_new_input=on_new_input,
            policy=policy,
        ),
    )
    wrapped = None if in_place(inspection.model) else in_place_below(inspection.model)
    with plain_forward(inspection.model):
        if sample or kwargs:
            fitted.make(sample, kwargs or {}, inspection=inspection)
    if wrapped is not None:  # this one's plans are for what is around it, too
        wrapped.retire()
    vars(inspection.model)["forward"] = fitted
    return inspection.model  # type: ignore[return-value]  # of what checkpointed() gave it is the model


def unfit(model: M) -> M:
    """Take off what `fit` has put in place: the model's calls run by plain autograd again.

    Args:
        model: The model; one that is not fitted is left as it is.

    Returns:
        The model.
    """
    plain = unwrapped(model, "unfit", PlanMismatchError)
    found = in_place(plain)
    if found is not None:
        own = vars(plain)
        if found.attribute is None:
            del own["forward"]
        else:
            own["forward"] = found.attribute
    wrapped = in_place_below(plain)
    if wrapped is not None:
        wrapped.retire()
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model follows; of one that was fitted, the plan for its first batch.

    Args:
        model: A model that was fitted, or what `checkpointed` has given.

    Raises:
        PlanMismatchError: It follows none, or none yet.
    """
    if isinstance(model, Checkpointed):
        return model.plan
    found = in_place_below(unwrapped(model, "plan_of", PlanMismatchError))
    if not isinstance(found, Fitted):
        raise PlanMismatchError(
            f"the {type(model).__name__} follows no plan; fit it, or give what checkpointed() gave"
        )
    plan = found.plan
    if plan is None:
        raise PlanMismatchError(
            f"the {type(model).__name__} was fitted without a batch, and plans when it is first "
            "called with gradients on; call it, or fit it with a batch"
        )
    return plan
