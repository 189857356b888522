"""What an adaptive solve did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .forward import Integration
from .step_memory import Footprint


@final
@dataclass(slots=True, kw_only=True)
class Statistics:
    """What a solve did; the figures of its backward come with the backward."""

    accepted: int = 0
    """Steps that were accepted."""
    rejected: int = 0
    """Attempts that were not."""
    evaluations: int = 0
    """Of f in the forward pass."""
    measuring_evaluations: int = 0
    """Of f to find out what a step takes, and whether it can be run again; 0 where that is known
    from a call before."""
    backward_evaluations: int = 0
    """Of f in the latest backward; 0 where all tapes are kept."""
    advances: int = 0
    """Steps run again without tape in the latest backward."""
    tapes: int = 0
    """Accepted steps, the first ones, whose tapes are kept: they do not run again."""
    checkpoints: int | None = None
    """States that may be kept at once where no tape is, the initial one included; None without a
    budget."""
    positions: tuple[int, ...] = ()
    """After how many steps the states come that were kept for the steps without tapes."""
    footprint: Footprint | None = None
    """What a step takes; None without a budget."""
    record_bytes: int = 0
    """What the times and sizes of the accepted steps take, in the host's memory."""

    def count(self, integration: Integration) -> None:
        """Take over the figures of a forward pass.

        Args:
            integration: It, at its end.
        """
        self.accepted = len(integration.record)
        self.rejected = integration.rejected
        self.evaluations = integration.f.evaluations
        self.record_bytes = integration.record.nbytes
