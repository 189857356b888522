"""The callback of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor, nn

from ...base.budget import Budget
from ...planner.plan import Plan
from ...profiler.stage_kind import Loss
from .followed import FitOptions, Followed

try:
    from transformers import TrainerCallback
    from transformers.trainer_pt_utils import LabelSmoother
except ImportError as error:
    raise ImportError(
        "ckptsched.TransformersCallback is for the Trainer of transformers, which cannot be "
        f"imported here ({error}): pip install transformers accelerate"
    ) from error


@final
class TransformersCallback(TrainerCallback):
    """Fits the model of a `transformers.Trainer` into a budget while it trains.

    The model is planned on its first training batch, as the Trainer has prepared it and among the
    autocast that it brings, and is as it was when training ends. Other batches are planned when
    they are first seen; those that are nowhere larger follow the same schedule. Evaluation runs
    without gradients and is left alone.

    Leave the Trainer's `gradient_checkpointing` off: it runs whole layers again inside of the plan.

    Args:
        budget: Bytes, text such as "8GiB", or a share such as "40%" of what storing everything
            takes on the first batch. It covers a forward and its backward: parameters, the state
            of the optimizer and gradients of earlier batches that are summed up come besides.
        options: Further arguments of `ckptsched.fit`. Give `loss`, from the model's output to a
            number, where the Trainer is given a `compute_loss_func`: its bytes are else provided
            for as those of a cross-entropy. What the model gives as its loss, and the Trainer's own
            label smoothing, are counted exactly.

    Raises:
        BudgetSyntaxError: The budget cannot be read.

    Example:
        >>> callback = ckptsched.TransformersCallback(budget="40%")
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        >>> print(callback.plan)
    """

    def __init__(self, budget: int | float | str | Budget, **options: Unpack[FitOptions]) -> None:
        self._followed = Followed(budget, options)

    @property
    def plan(self) -> Plan | None:
        """The plan for the first batch of the last training; None before there is one."""
        return self._followed.plan

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Fit the model, which the Trainer has prepared by now."""
        smoothing = args.label_smoothing_factor
        defaults = {"loss": _smoothed(smoothing)} if smoothing else {}
        self._followed.begin(model, f"the model, a {type(model).__name__},", **defaults)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that the batch has followed a plan; its gradients are not applied yet."""
        self._followed.check()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same, of the last batch before a step of the optimizer."""
        self._followed.check()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._followed.end()


def _smoothed(epsilon: float) -> Loss:
    """The Trainer's loss with label smoothing, of labels that nobody knows yet."""
    smoother = LabelSmoother(epsilon=epsilon)

    def loss(output: Any) -> Tensor:
        logits = output["logits"] if isinstance(output, Mapping) else output[0]
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        found: Tensor = smoother({"logits": logits}, labels)
        return found

    return loss
