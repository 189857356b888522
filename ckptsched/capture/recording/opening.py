"""Decides whether a model is a chain of stages as it is, or is recorded to become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ...base.errors import CkptschedError, ProfileError
from ...tensors.pytree import State
from ..inspection import Inspection
from ..policies.policy import NO_POLICY, Policy
from ..stage_discovery import StagedModule, trace
from .stages import Captured, candidates


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """A model that was asked to be recorded."""

    captured: Captured | None
    """The recording, with lean cuts; None where the model is run by its own stages."""
    others: tuple[Captured, ...] = ()
    """The same recording with other cuts, of which one may have the better plan."""
    whole: str = ""
    """Why the model is one stage though it was to be recorded; empty where it is not."""


def is_to_be_recorded(
    inspection: Inspection, wanted: bool | None, policy: Policy = NO_POLICY
) -> bool:
    """Whether a model is to be recorded.

    Args:
        inspection: The model.
        wanted: Whether the user wants it; None to record what is one stage otherwise.
        policy: What is never or always made again: a recording alone knows calls.

    Raises:
        ProfileError: There is a policy, and the model is not to be recorded.
    """
    if policy:
        if wanted is False or isinstance(inspection.model, Captured):
            found = "capture=False" if wanted is False else "a model that is recorded already"
            raise ProfileError(
                f"{policy} is about calls, which a recording knows; found {found}. Leave capture "
                "out, or give captured() the policy"
            )
        return True
    if wanted is None:  # whoever lists stages has said what they are
        return is_one_stage(inspection) and not isinstance(inspection.model, StagedModule)
    return wanted


def open_model(
    inspection: Inspection, inputs: State, *, must: bool, policy: Policy = NO_POLICY
) -> Opened:
    """Record a model, unless that gives a single stage.

    Args:
        inspection: The model.
        inputs: What it is called with, as `(args, kwargs)`, taken apart, with some tensor.
        must: Whether it is recorded in any case.
        policy: What is never or always made again.

    Raises:
        ProfileError: It must be, and cannot, or the policy is not for its calls.
    """
    try:
        captured, *others = candidates(inspection, inputs, policy)
    except Exception as error:
        if must or policy:
            raise
        if isinstance(error, CkptschedError):
            return Opened(None, whole=str(error))
        # Where it fails without us, too, what measures it says so.
        return Opened(
            None, whole=f"it failed while it was recorded ({type(error).__name__}: {error})"
        )
    if len(captured.recording.calls) < 2 and not (must or policy):
        return Opened(None, whole="it makes a single call")
    return Opened(captured, tuple(others))


def is_one_stage(inspection: Inspection) -> bool:
    """Whether a model that is not recorded is a single stage."""
    blocks = trace(inspection.outline)
    return len(blocks) == 1 and len(blocks[0].stages) == 1
