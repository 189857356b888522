"""What a schedule does when it is run on paper: the peak, what is live there, the cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt


@final
@dataclass(frozen=True, slots=True)
class Live:
    """Something that takes bytes at one moment of a step."""

    name: str
    """What it is, such as "tape[3]"."""
    bytes: int
    """Its bytes on the device."""


@final
@dataclass(frozen=True)
class Trace:
    """What a schedule does, by simulation."""

    seconds: float
    """Seconds of the step."""
    peak_bytes: int
    """Peak on the device: the ledger's where there is one, else the planning model's."""
    planning_peak_bytes: int
    """Peak on the device in the planning model."""
    ledger_peak_bytes: int | None
    """Peak on the device in the ledger; None where the chain has no exact bytes."""
    host_peak_bytes: int
    """Peak of what is kept on the host."""
    disk_peak_bytes: int
    """Peak of what is kept on disk."""
    forwards: int
    """Runs of stages, with and without tape."""
    peak_position: int
    """Index of the operation that runs at the peak."""
    peak_operation: str
    """That operation as text."""
    timeline: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False
    )
    """Bytes while each operation runs, shape (m,)."""
    find_live: Callable[[], tuple[Live, ...]] = field(default=tuple, compare=False, repr=False)
    """Finds what is live at the peak, by another run up to there; see `live_at_peak`."""

    @functools.cached_property
    def live_at_peak(self) -> tuple[Live, ...]:
        """What is live at the peak, largest first; adds up to the peak.

        Found when it is asked for: solvers judge many schedules, and people read about one.
        """
        return self.find_live()
