"""The whole way in one call: profile, plan, and a model that follows the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .budget import Budget
from .executor import Checkpointed, checkpointed
from .planner import plan
from .profiler import profile
from .survey import Loss


def fit(
    model: nn.Module,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    budget: int | float | str | Budget,
    solver: str = "auto",
    loss: Loss | None = None,
) -> Checkpointed:
    """Fit the training of a model into a budget.

    Args:
        model: The model, in the mode to train in.
        sample: One batch, of the shape to train with, and what every stage is given besides.
        kwargs: The same by name.
        budget: Bytes, text such as "256MiB", or a share such as "40%".
        solver: Name of a solver, or "auto".
        loss: From the output to a scalar, so that its bytes are counted exactly.

    Returns:
        A module with the same parameters and `state_dict` keys; its plan is `.plan`.

    Raises:
        BudgetSyntaxError: The budget cannot be read.
        InfeasibleBudgetError: Nothing fits; the message names the least budget that works.
        ProfileError: The model cannot be measured.
    """
    return checkpointed(
        model, plan(profile(model, *sample, kwargs=kwargs, loss=loss), budget=budget, solver=solver)
    )
