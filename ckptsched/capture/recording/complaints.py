"""Reads of values that only decide whether to complain.

`torch.distributions` looks at the values of its parameters and samples, and raises where they are
outside of its support. The other outcome leads nowhere, so that a recording can look again each
time, where for another read of values it would have to stop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from ...base.errors import ExecutionError

_CHECKS = {("torch.distributions.distribution", name) for name in ("__init__", "_validate_sample")}
_PASSED_BY = ("ckptsched.", "torch.overrides", "torch.utils.")


@final
@dataclass(frozen=True)
class Complaint:
    """Reads values again, and complains where they lead elsewhere."""

    read: Callable[..., Any]
    """What reads them, such as `Tensor.__bool__`."""
    found: Any
    """What it gave when nothing was wrong."""

    @property
    def __name__(self) -> str:
        """That of what reads."""
        return self.read.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Read again.

        Args:
            args: What is read.
            kwargs: The same by name.

        Raises:
            ExecutionError: It gives something else.
        """
        found = self.read(*args, **kwargs)
        if found != self.found:
            raise ExecutionError(
                "torch.distributions finds a parameter or a sample that is not a number, or "
                "outside of what the distribution is defined on; where the model runs without a "
                "plan (ckptsched.unfit) its ValueError names it"
            )


def is_complaint() -> bool:
    """Whether what reads a value just now is a check of torch.distributions."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if (name, frame.f_code.co_name) in _CHECKS:
            return True
        if not name.startswith(("torch.distributions.", *_PASSED_BY)):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_checkpoint() -> bool:
    """Whether what asks just now is torch's checkpoint, for whether there is a graph at all."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "torch.utils.checkpoint":
            return True
        if not name.startswith(("ckptsched.", "torch.overrides")):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
