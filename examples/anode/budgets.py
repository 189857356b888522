"""What a schedule cannot do without, as the library tells it when a budget is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ckptsched as cs


def least_bytes(attempt: Callable[[int], Any]) -> int:
    """The least budget in bytes that works.

    Args:
        attempt: Plans or solves within so many bytes, and raises `InfeasibleBudgetError` where
            they are too few.
    """
    try:
        attempt(1)
    except cs.InfeasibleBudgetError as error:
        if error.least_budget_bytes is not None:
            return error.least_budget_bytes
    raise AssertionError("a budget of one byte was not refused with the least one that works")
