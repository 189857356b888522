"""Runs a mixed-integer program: by HiGHS, or by the CBC that comes with PuLP where that is all.

Silent, with a time limit, from a known solution on where there is one, and interruptible: the
solver works in a thread of its own, is told to stop on Ctrl-C, and leaves no file behind.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import pulp
from pulp.apis.coin_api import pulp_cbc_path

from ...base.progress import report
from ..quiet_highs import quiet_highs

try:
    import highspy
except ImportError:  # there is no wheel for every platform
    highspy = None  # type: ignore[assignment]

_POLL_SECONDS = 0.1
# What is left to the solver at the least; it stops before it has begun.
_LEAST_SECONDS = 1e-9


@final
@dataclass(frozen=True)
class Outcome:
    """What is known once the solver has stopped; a solution is in the program's variables."""

    status: Literal["optimal", "stopped", "infeasible", "unknown"]
    """Proven optimal; stopped with a solution; proven infeasible; stopped without one."""
    bound: float
    """No solution is less, in the objective's units; minus infinity where nothing is known."""


def minimise(
    problem: pulp.LpProblem,
    *,
    time_limit_seconds: float,
    start: Mapping[pulp.LpVariable, float] | None = None,
    what: str = "integer program",
) -> Outcome:
    """Solve a program.

    Args:
        problem: What to minimise.
        time_limit_seconds: Seconds after which the solver stops with what it has; handing the
            program over to it is part of them.
        start: Values of the whole variables of a known solution.
        what: What is being solved, for those who listen to progress.
    """
    if highspy is None:
        return _by_cbc(problem, time_limit_seconds, start)
    return _by_highs(problem, time_limit_seconds, start, what)


def _by_highs(
    problem: pulp.LpProblem,
    limit: float,
    start: Mapping[pulp.LpVariable, float] | None,
    what: str,
) -> Outcome:
    # One thread, so that the same program has the same solution again. Without presolve, which in
    # HiGHS 1.15 cuts off optima: it calls costlier solutions optimal, others with another seed.
    options = {"presolve": "off", "mip_rel_gap": 0.0, "threads": 1, "parallel": "off"}
    begun = time.perf_counter()
    solver = pulp.HiGHS(msg=False)
    highs = problem.solverModel = quiet_highs()
    for name, value in options.items():
        highs.setOptionValue(name, value)
    solver.buildSolverModel(problem)
    limit = max(limit - (time.perf_counter() - begun), _LEAST_SECONDS)
    highs.setOptionValue("time_limit", limit)
    if start:
        columns = np.array([x.index for x in start], dtype=np.int32)
        highs.setSolution(len(start), columns, np.array(list(start.values()), dtype=np.float64))
    _run(highs, limit, what)
    info, status = highs.getInfo(), highs.getModelStatus()
    found = info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
    if found:
        solver.findSolutionValues(problem)
    problem.solverModel = None
    if status in (
        highspy.HighsModelStatus.kInfeasible,
        highspy.HighsModelStatus.kUnboundedOrInfeasible,  # nothing here is unbounded
    ):
        return Outcome("infeasible", math.inf)
    if status == highspy.HighsModelStatus.kOptimal:
        return Outcome("optimal", float(info.mip_dual_bound))
    bound = float(info.mip_dual_bound) if info.valid else -math.inf  # invalid: it never began
    return Outcome("stopped" if found else "unknown", bound)


def _run(highs: Any, limit: float, what: str) -> None:
    """Run HiGHS in a thread, so that Ctrl-C is heard meanwhile."""
    stop, done = threading.Event(), threading.Event()
    ran = [0.0]

    def watch(kind: Any, message: str, out: Any, inward: Any, data: Any) -> None:
        ran[0] = out.running_time
        if stop.is_set():
            inward.user_interrupt = True

    highs.setCallback(watch, None)
    kinds = highspy.cb.HighsCallbackType
    for kind in (kinds.kCallbackMipInterrupt, kinds.kCallbackSimplexInterrupt):
        highs.startCallback(kind)

    def work() -> None:
        try:
            highs.run()
        finally:
            done.set()

    # An event rather than join: a join that Ctrl-C interrupts forgets that the thread runs on.
    threading.Thread(target=work, daemon=True).start()
    try:
        while not done.wait(_POLL_SECONDS):
            report(what, min(1.0, ran[0] / limit))
    finally:
        stop.set()
        done.wait()


def _by_cbc(
    problem: pulp.LpProblem, limit: float, start: Mapping[pulp.LpVariable, float] | None
) -> Outcome:
    """CBC is a program of its own, fed by files; it tells no bound unless it is done."""
    for variable, value in (start or {}).items():
        variable.setInitialValue(value)
    with tempfile.TemporaryDirectory() as folder:
        solver = pulp.COIN_CMD(
            path=pulp_cbc_path,
            msg=False,
            timeLimit=limit,
            gapRel=0.0,
            threads=1,
            warmStart=bool(start),
        )
        solver.tmpDir = folder
        problem.solve(solver)
    if problem.sol_status == pulp.LpSolutionOptimal:
        return Outcome("optimal", float(pulp.value(problem.objective)))
    if problem.sol_status == pulp.LpSolutionInfeasible:
        return Outcome("infeasible", math.inf)
    found = problem.sol_status == pulp.LpSolutionIntegerFeasible
    return Outcome("stopped" if found else "unknown", -math.inf)
