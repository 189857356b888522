"""Counts of an adaptive solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .forward import Integration
from .step_memory import Footprint


@final
@dataclass(slots=True, kw_only=True)
class Statistics:
    """Counts of a solve; those of its backward are filled in by the backward."""

    accepted: int = 0
    """Steps that were accepted."""
    rejected: int = 0
    """Attempts that were rejected."""
    evaluations: int = 0
    """Evaluations of f in the forward pass."""
    measuring_evaluations: int = 0
    """Evaluations of f to measure a step and check that it can be run again; 0 where that is known
    from a call before."""
    backward_evaluations: int = 0
    """Evaluations of f in the latest backward; 0 where all tapes are kept."""
    advances: int = 0
    """Steps run again without tape in the latest backward."""
    tapes: int = 0
    """Accepted steps, the first ones, whose tapes are kept: they do not run again."""
    checkpoints: int | None = None
    """States that may be kept at once where no tape is, the initial one included; None without a
    budget."""
    positions: tuple[int, ...] = ()
    """The states kept for the steps without tapes, each by the number of steps before it."""
    footprint: Footprint | None = None
    """Bytes of a step; None without a budget."""
    record_bytes: int = 0
    """Bytes of the times and sizes of the accepted steps, in the host's memory."""

    def count(self, integration: Integration) -> None:
        """Fill in the counts of a forward pass that is over."""
        self.accepted = len(integration.record)
        self.rejected = integration.rejected
        self.evaluations = integration.f.evaluations
        self.record_bytes = integration.record.nbytes
