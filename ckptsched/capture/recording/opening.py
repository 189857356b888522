"""Decides whether a model is a chain of stages as it is, or is recorded to become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ...base.errors import ProfileError
from ...tensors.pytree import State
from ..inspection import Inspection
from ..stage_discovery import trace
from .stages import Captured, capture


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """A model that was asked to be recorded."""

    captured: Captured | None
    """The recording; None where the model is run by its own stages."""
    whole: str = ""
    """Why the model is one stage though it was to be recorded; empty where it is not."""


def open_model(
    inspection: Inspection, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: bool | None
) -> Opened:
    """Record a model, unless it is a chain of stages already.

    Args:
        inspection: The model.
        args: What it is called with.
        kwargs: The same by name.
        wanted: True to record it in any case, False not to; None to record what is one stage
            otherwise, and to leave it one stage where it cannot be recorded.

    Raises:
        ProfileError: It is wanted, and cannot be recorded.
    """
    if wanted is False or (wanted is None and not is_one_stage(inspection)):
        return Opened(None)
    inputs = State.of((args, dict(kwargs)), opaque=True)
    if not inputs.leaves:
        return Opened(None)  # what measures it says what is missing
    try:
        captured = capture(inspection, inputs)
    except ProfileError as error:
        if wanted:
            raise
        return Opened(None, str(error))
    if len(captured.recording.calls) < 2 and not wanted:
        return Opened(None, "it makes a single call")
    return Opened(captured)


def is_one_stage(inspection: Inspection) -> bool:
    """Whether a model that is not recorded is a single stage."""
    blocks = trace(inspection.model)
    return len(blocks) == 1 and len(blocks[0].stages) == 1
