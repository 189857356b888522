"""Profiles a model, plans it, and returns a model that follows the plan, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..base.budget import Budget
from ..base.errors import ProfileError
from ..capture.inspection import inspect_model
from ..executor.checkpointed import Checkpointed, follow
from ..planner.planner import plan_one
from ..profiler.profile import measure
from ..profiler.stage_kind import Loss
from ..torch_state.replay_context import ContextFn, contexts


def fit(
    model: nn.Module,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    budget: int | float | str | Budget,
    solver: str = "auto",
    loss: Loss | None = None,
    context_fn: ContextFn | None = None,
) -> Checkpointed:
    """Fit the training of a model into a budget.

    Args:
        model: The model, in the mode to train in.
        sample: One batch, of the shape to train with, and what every stage is given besides.
        kwargs: The same by name.
        budget: Bytes, text such as "256MiB", or a share such as "40%".
        solver: Name of a solver, or "auto".
        loss: From the output to a scalar, so that its bytes are counted exactly.
        context_fn: Gives what is around the first run of stages, in which the model is measured,
            and what is around those that run again; see `checkpointed`.

    Returns:
        A module with the same parameters and `state_dict` keys; its plan is `.plan`.

    Raises:
        BudgetSyntaxError: The budget cannot be read.
        InfeasibleBudgetError: Nothing fits; the message names the least budget that works.
        ProfileError: The model cannot be measured.
    """
    inspection = inspect_model(model, "fit", ProfileError)
    with nullcontext() if context_fn is None else contexts(context_fn)[0]:
        chain = measure(inspection, sample, kwargs, loss)
    made = plan_one(chain, budget, solver=solver)
    return follow(inspection, model, made, "glance", context_fn)
