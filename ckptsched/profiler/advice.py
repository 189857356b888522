"""Advice for the mistakes that people make most with samples: one sentence each, for messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..tensors.pytree import State


def about_value(value: Any) -> str:
    """What to pass in place of a value that holds no tensors; empty where nothing is known."""
    if isinstance(value, np.ndarray):
        return "pass torch.from_numpy(sample), in the dtype of the model's parameters"
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
        return f"if this is a shape, pass torch.randn({', '.join(map(str, value))})"
    if isinstance(value, (list, tuple, dict)) and value:
        inside = list(value.values() if isinstance(value, dict) else value)
        if any(isinstance(x, np.ndarray) for x in inside):
            return "pass tensors (torch.from_numpy) in place of numpy arrays"
    return ""


def about_state(x: State, error: Exception) -> str:
    """What may be the matter where a stage fails on a state; empty where nothing is known.

    Args:
        x: What the stage was given.
        error: What it raised.
    """
    value, first = x.value(), x.leaves[0]
    if "inference tensor" in str(error).lower():
        return "make the sample outside of torch.inference_mode, or give a clone made outside"
    if "leaf Variable that requires grad is being used in an in-place" in str(error):
        return (
            "it changes a parameter, or what a stage has left before, such as a sum of auxiliary "
            "losses: let each stage append its own to a list, and sum up the list when the model "
            "has returned"
        )
    if isinstance(value, dict) and isinstance(error, TypeError):
        return (
            "the stage was given the whole dict: if this is a batch as a data loader gives it, "
            f"pass what the model is called with alone, such as batch[{next(iter(value))!r}]"
        )
    if isinstance(value, (list, tuple)) and isinstance(error, TypeError):
        return (
            f"the stage was given the whole {type(value).__name__}: if this is a batch with its "
            "targets, as a data loader gives it, pass what the model is called with alone, such as "
            "batch[0]; profile(model, a, b) calls model(a, b)"
        )
    if (
        first.dtype == torch.float16
        and first.device.type == "cpu"
        and "not implemented" in str(error)
    ):
        return "float16 has few operations on the CPU: use bfloat16 or float32 there"
    return ""
