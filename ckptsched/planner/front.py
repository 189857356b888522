"""The front between budgets that were asked for: every schedule that a search has come by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..schedule.language import Schedule
from ..simulator.simulator import simulate
from .plan import Plan
from .plan_words import Workload, excess
from .run_once import run_again, with_own_tapes
from .solver_choice import ALL_SCHEDULES


def known_steps(
    chain: Workload, seen: Iterable[tuple[str, Schedule]], plans: Iterable[Plan]
) -> tuple[Plan, ...]:
    """Every step that is known up to the largest of several budgets, the least first.

    Args:
        chain: What was planned.
        seen: Schedules that the search has come by, each with the solver that found it.
        plans: The plans for the budgets that were asked for.
    """
    asked = sorted(plans, key=lambda plan: plan.budget_bytes)
    if len(asked) < 2:
        return ()
    trials = [(x.solver, x.schedule, x.trace) for x in asked]
    for solver, found in seen:
        schedule = with_own_tapes(chain, found)
        if not run_again(chain, schedule):
            trials.append((solver, schedule, simulate(chain, schedule)))
    steps: list[Plan] = []
    for solver, schedule, trace in sorted(trials, key=lambda x: (x[2].peak_bytes, x[2].seconds)):
        above = next((x for x in asked if x.budget_bytes >= trace.peak_bytes), None)
        if above is None or (steps and excess(steps[-1].seconds, trace.seconds) == 0):
            continue
        # What a larger budget cannot better, a smaller one cannot; a rule outside of the class can.
        is_bound = excess(above.lower_bound_seconds, trace.seconds) == 0
        step = replace(
            above,
            schedule=schedule,
            trace=trace,
            solver=solver,
            budget_bytes=trace.peak_bytes,
            budget_text=f"{trace.peak_bytes} bytes",
            schedule_class=above.schedule_class if is_bound else ALL_SCHEDULES,
            lower_bound_seconds=above.lower_bound_seconds if is_bound else chain.store_all_seconds,
        )
        steps.append(step)
    return tuple(steps)
