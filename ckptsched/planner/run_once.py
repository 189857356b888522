"""Stages that a plan runs once: their tape is kept until their backward.

Solvers know nothing of them. They are given a chain in which a run without tape of such a stage
takes more bytes than any budget has, and all else is as it was: so what they find fits, what they
prove and the least budget that they name hold among the plans that are allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..base.budget import exact_bytes
from ..base.errors import InfeasibleBudgetError
from ..schedule.language import Code, Forward, Schedule
from ..workload.chain import Chain
from ..workload.graph import Graph
from ..workload.stage import Stage, StageLedger

_NEVER_FITS = 2**49


def has_stages_run_once(workload: Chain | Graph) -> bool:
    """Whether some stage of a chain may run once only."""
    return any(stage.once for stage in workload.stages)


def without_rule(chain: Chain | Graph) -> Chain | Graph:
    """The same chain as if any stage may run again.

    Args:
        chain: The chain.
    """
    return _each(chain, lambda stage: replace(stage, once=False))


def never_alone(chain: Chain | Graph) -> Chain | Graph:
    """The same chain in which no run without tape of a stage that runs once fits any budget.

    Args:
        chain: The chain.
    """
    if not has_stages_run_once(chain):
        return chain
    exact = isinstance(chain, Chain) and chain.has_ledger
    return _each(chain, _with_dear_run if exact else _with_dear_overhead)


def _each(chain: Chain | Graph, changed: Callable[[Stage], Stage]) -> Chain | Graph:
    """A chain whose stages that run once are others; equal ones stay one object."""
    made: dict[int, Stage] = {}
    for stage in chain.stages:
        if id(stage) not in made:
            made[id(stage)] = changed(stage) if stage.once else stage
    return replace(chain, stages=tuple([made[id(stage)] for stage in chain.stages]))


def _with_dear_run(stage: Stage) -> Stage:
    def dear(ledger: StageLedger | None) -> StageLedger | None:
        return ledger and replace(ledger, forward_peak_bytes=_NEVER_FITS)

    tapes = [replace(tape, ledger=dear(tape.ledger)) for tape in stage.other_tapes]
    return replace(stage, ledger=dear(stage.ledger), other_tapes=tuple(tapes))


def _with_dear_overhead(stage: Stage) -> Stage:
    """In the planning model a run with the stage's own tape has the overhead of one without.

    So the own tape is offered as one more, before the others, and that of option 0 never fits.
    """
    own, *others = stage.tapes
    return replace(
        stage,
        forward_overhead_bytes=_NEVER_FITS,
        other_tapes=(replace(own, ledger=None), *[replace(x, ledger=None) for x in others]),
        ledger=None,
    )


def with_own_tapes(chain: Chain | Graph, schedule: Schedule) -> Schedule:
    """A schedule for `never_alone(chain)` as one for the chain.

    Args:
        chain: The chain.
        schedule: The schedule.
    """
    if not has_stages_run_once(chain) or (isinstance(chain, Chain) and chain.has_ledger):
        return schedule
    return Schedule.of(
        replace(x, option=x.option - 1)
        if isinstance(x, Forward) and x.option and chain.stages[x.stage - 1].once
        else x
        for x in schedule
    )


def run_again(chain: Chain | Graph, schedule: Schedule) -> list[int]:
    """The stages that may run once only, and that a schedule runs more often.

    Args:
        chain: The chain.
        schedule: The schedule.
    """
    once = np.array([False, *[stage.once for stage in chain.stages]])
    if not once.any():
        return []
    is_run = (schedule.codes == Code.FORWARD) | (schedule.codes == Code.TAPED_FORWARD)
    runs = np.bincount(schedule.stages[is_run], minlength=len(once))
    return [int(i) for i in np.flatnonzero(once & (runs > 1))]


def because_of_rule(
    chain: Chain | Graph, error: InfeasibleBudgetError, least_without: int | None
) -> InfeasibleBudgetError:
    """The error with the policy that has made a budget too small, and what it costs.

    Args:
        chain: The chain.
        error: What the solver says.
        least_without: The least budget if any stage might run again; None where it is unknown.
    """
    signature = chain.signature
    policy = signature.policy if signature is not None else ""
    count = sum(stage.once for stage in chain.stages)
    least = error.least_budget_bytes
    figures = [
        f"{word} it the least budget is {exact_bytes(size)}"
        for word, size in (("with", least), ("without", least_without))
        if size is not None
    ]
    return InfeasibleBudgetError(
        f"{error}; by {policy or 'what its stages say'}, {count} of {len(chain)} stages run once "
        f"only and keep their tapes: {', '.join(figures)}",
        budget_bytes=error.budget_bytes,
        least_budget_bytes=least,
        stage=error.stage,
    )
