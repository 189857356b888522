"""What lean tapes add: plans with them and without, beside what people use today.

    python -m benchmarks.beyond_chain
    python -m benchmarks.beyond_chain --models densenet121 --rounds 5 --json beyond_chain.json

For each model of `benchmarks.recorded.any_model` and each way to cut it a row shows, at 30 to 80 %
of what storing everything takes, the overhead that is projected where every stage keeps its own
tape and where it may keep a lean one, and of the better plan the measured peak and overhead:
processor seconds of a step over those by plain autograd, in turn, in one process and on one thread.
Then the planner is given the measured peaks of selective checkpointing that saves products and of
torchvision's `memory_efficient`. Each plan that is run is verified first: gradients, buffers and
random state to the bit, and the peak within the projection.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import ckptsched as cs
from benchmarks.each_model import measure_each
from benchmarks.recorded.any_model import CASES, Case, peak_of, peers, seconds_of
from ckptsched.capture.recording.stages import Captured
from ckptsched.profiler.profile import loss_of_tensors
from ckptsched.schedule.language import Forward
from ckptsched.workload.chain import Chain

SHARES = (30, 40, 50, 60, 70, 80)
WAYS = ("lean", "dear")


@dataclass(frozen=True)
class Row:
    """A budget; times are over plain autograd, bytes over what storing everything takes."""

    model: str
    budget: str
    share: float
    own: float | None
    """Projected overhead where every stage keeps its own tape; None where nothing fits."""
    lean: float | None
    """The same where it may keep a lean one."""
    cuts: str
    lean_tapes: int
    verified: bool
    peak: float
    measured: float


@dataclass(frozen=True)
class Way:
    """A model cut in one way, measured."""

    cuts: str
    captured: Captured
    chain: Chain

    @classmethod
    def of(cls, case: Case, cuts: str) -> Way:
        """Record a model, cut it, and measure its stages with both tapes."""
        plain = case.without_saving or case.model
        captured = cs.captured(plain, kwargs=case.batch, cuts=cuts)  # type: ignore[arg-type]
        loss = loss_of_tensors(captured, case.loss)
        return cls(cuts, captured, cs.profile(captured, captured.take(**case.batch), loss=loss))

    def plan(self, budget: int, *, leanly: bool) -> cs.Plan | None:
        """A plan, or None where nothing fits."""
        chain = self.chain
        if not leanly:
            stages = tuple(replace(stage, other_tapes=()) for stage in chain.stages)
            chain = replace(chain, stages=stages)
        try:
            return cs.plan(chain, budget=budget)
        except cs.InfeasibleBudgetError:
            return None

    def verifies(self, plan: cs.Plan, case: Case) -> bool:
        """Whether gradients and bytes are as they should be."""
        loss = loss_of_tensors(self.captured, case.loss)
        inputs = self.captured.take(**case.batch)
        return cs.verify(self.captured, plan, inputs, loss=loss).ok


def _least(plans: list[tuple[Way, cs.Plan | None]]) -> tuple[Way, cs.Plan] | None:
    found = [(way, plan) for way, plan in plans if plan is not None]
    return min(found, key=lambda pair: pair[1].overhead) if found else None


def rows_of(name: str, case: Case, rounds: int) -> list[Row]:
    """All rows of a model."""
    ways = [Way.of(case, cuts) for cuts in WAYS]
    plain = case.without_saving or case.model
    whole = cs.plan(ways[0].chain, budget="100%").store_all_bytes
    others = {n: m for n, m in peers(case).items() if "check" not in n}
    budgets = {f"{share} %": share * whole // 100 for share in SHARES}
    budgets |= {f"peak of {n}": peak_of(m, case) for n, m in others.items()}
    chosen: dict[str, torch.nn.Module] = {}
    known = {}
    for said, budget in budgets.items():
        found = {
            leanly: _least([(way, way.plan(budget, leanly=leanly)) for way in ways])
            for leanly in (False, True)
        }
        better = found[True]
        if better is None:
            continue
        way, plan = better
        # As a user has it: `Captured.take` would look through the whole model in each step.
        chosen[said] = cs.checkpointed(plain, plan)
        own = found[False][1].overhead if found[False] else None
        tapes = sum(isinstance(x, Forward) and x.option > 0 for x in plan.schedule)
        known[said] = (own, plan, way.cuts, tapes, way.verifies(plan, case))
    models = {"plain": plain, **chosen, **others}
    peaks = {way: peak_of(model, case) for way, model in models.items()}
    seconds = seconds_of(models, case, rounds)
    rows = []
    for said in models:
        own, plan, cuts, tapes, ok = known.get(said, (None, None, "", 0, True))
        if said != "plain":
            rows.append(
                Row(
                    model=name,
                    budget=said,
                    share=budgets.get(said, 0) / whole,
                    own=own,
                    lean=plan.overhead if plan is not None else None,
                    cuts=cuts,
                    lean_tapes=tapes,
                    verified=ok,
                    peak=peaks[said] / whole,
                    measured=seconds[said] / seconds["plain"] - 1,
                )
            )
    return rows


def measured(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Measure a model and print it; rows as JSON data."""
    rows = rows_of(name, case, rounds)
    print(f"\n{name:38}{'own':>8}{'lean':>8}{'tapes':>7}{'cuts':>6}{'peak':>8}{'measured':>10}")
    for row in rows:
        own, lean = ("-" if x is None else f"{x:+.3f}" for x in (row.own, row.lean))
        fault = "" if row.verified else "  NOT VERIFIED"
        print(
            f"{row.budget:38}{own:>8}{lean:>8}{row.lean_tapes:>7}{row.cuts:>6}{row.peak:>8.3f}"
            f"{row.measured:>+10.3f}{fault}",
            flush=True,
        )
    return {"rows": [asdict(row) for row in rows]}


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    measure_each(CASES, measured, __doc__, rounds=5, ignored=Warning)


if __name__ == "__main__":
    main()
