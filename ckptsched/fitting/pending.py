"""Calls of a fitted model whose backward has not come: several take more than one plan provides.

A plan is for a forward and its backward. What a call has stored for its backward is there as long
as its output and its graph are, and adds to the peak of the next call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any, final

from ..base.budget import format_bytes
from ..base.errors import BudgetWarning
from ..planner.plan import Plan
from ..recompute.graph_holds import Hold
from ..tensors.pytree import State


@final
class Pending:
    """The calls whose backward may still come."""

    def __init__(self) -> None:
        """Begin without any."""
        self._calls: list[tuple[weakref.ref[Hold], Plan]] = []
        self._told_bytes = 0
        self._lock = threading.Lock()

    def note(self, output: Any, plan: Plan) -> None:
        """Note a call, and say where it and earlier ones may take more than planned.

        It is said again only of more bytes than before.

        Args:
            output: What the call gave.
            plan: The plan that it followed.
        """
        hold = _hold_of(output)
        if hold is None:
            return
        with self._lock:
            self._calls = [(other, p) for other, p in self._calls if _is_held(other)]
            earlier = [p for _, p in self._calls]
            self._calls.append((hold, plan))
            total = plan.peak_bytes + sum(p.peak_bytes for p in earlier)
            if not earlier or total <= self._told_bytes:
                return
            self._told_bytes = total
        warnings.warn(
            f"a fitted model is called while the backward of {len(earlier)} earlier calls is still "
            f"to come: the plan of this call has a peak of {plan.peak_bytes} bytes "
            f"({format_bytes(plan.peak_bytes)}), and all of them together may take up to {total} "
            f"({format_bytes(total)}); call backward after each call, or let go of outputs that "
            "need none, or fit a module that makes all calls in one forward",
            BudgetWarning,
            stacklevel=5,
        )


def _hold_of(output: Any) -> weakref.ref[Hold] | None:
    """A weak reference to what the graph of an output holds for its backward."""
    for leaf in State.of(output, opaque=True).leaves:
        found = getattr(leaf.grad_fn, "hold", None)
        if isinstance(found, weakref.ref):
            return found
    return None


def _is_held(hold: weakref.ref[Hold]) -> bool:
    held = hold()
    return held is not None and held.value is not None
