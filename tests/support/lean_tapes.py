"""Plans that keep lean tapes wherever stages offer them."""

from __future__ import annotations

from dataclasses import replace

import ckptsched as cs
from ckptsched.schedule.language import Forward


def preferring_lean_tapes(chain: cs.Chain) -> cs.Chain:
    """The chain as if lean tapes took no seconds, so that plans use them wherever they can."""
    stages = [
        replace(
            stage, other_tapes=tuple(replace(x, backward_seconds=0.0) for x in stage.other_tapes)
        )
        for stage in chain.stages
    ]
    return replace(chain, stages=tuple(stages))


def lean_runs(plan: cs.Plan) -> int:
    return sum(isinstance(x, Forward) and x.option == 1 for x in plan.schedule)
