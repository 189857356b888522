"""What the examples of trainers show of a plan: the plan, and one step beside plain autograd's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import ckptsched as cs
from ckptsched.profiler.stage_kind import Loss


def show(
    model: nn.Module,
    plan: cs.Plan | None,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
) -> cs.Verification:
    """Print a plan, run a step by it and one by plain autograd, and print how they compare.

    Args:
        model: The model that was trained.
        plan: The plan that its training has followed.
        sample: A batch of the shape that was planned first.
        kwargs: The same by name.
        loss: From the model's output to a number, where the model does not give its own.

    Returns:
        The comparison: budget, measured peaks, differences of gradients.
    """
    assert plan is not None
    found = cs.verify(model.train(), plan, *sample, kwargs=kwargs, loss=loss)
    print(plan)
    print(found)
    return found
