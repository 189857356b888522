"""Plans a chain for a budget: chooses a solver, solves, simulates, certifies."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypedDict, Unpack, cast, final

from ..base.budget import (
    COUNTED,
    Budget,
    exact_bytes,
    is_of_device,
    meant_as_percentage,
    parse_budget,
    percent,
)
from ..base.errors import (
    BudgetSyntaxError,
    CkptschedError,
    InfeasibleBudgetError,
    PlanMismatchError,
    SolverTimeoutError,
    WorkloadError,
)
from ..base.progress_bar import bar_of_solvers
from ..simulator.simulator import simulate
from ..solvers import Baseline, get_solver
from ..workload.chain import Chain
from . import TIME_LIMIT
from .by_value import better_by_value, may_gain
from .disk_cache import PlanCache, is_worth_keeping, open_cache, source_digest
from .front import known_steps
from .plan import Plan
from .plan_words import Workload, excess
from .run_once import (
    because_of_rule,
    has_stages_run_once,
    never_alone,
    run_again,
    with_own_tapes,
    without_rule,
)
from .solver_choice import ALL_SCHEDULES, AUTO, NO_LIMIT, Answer, Portfolio, rules_for

_FAR_FROM_BOUND = 0.025  # of the bound: as a rule plans are nearer
_SMALLER = (0.999, 0.997, 0.993, 0.987, 0.975, 0.95)  # of a budget


class PlanOptions(TypedDict, total=False):
    """What `plan` takes by keyword besides the budget, for functions that plan."""

    solver: str
    time_limit: float
    cache: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineFigures:
    """A rule of thumb on one chain; it needs the same bytes whatever the budget."""

    name: str
    """Its solver's name."""
    peak_bytes: int
    """Projected peak in bytes: it fits where the budget is no less."""
    seconds: float
    """Projected seconds of the step."""
    forwards: int
    """Runs of stages."""


def plan_one(
    chain: Workload,
    budget: int | float | str | Budget,
    *,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Plan a chain or graph for one budget; arguments and errors are those of `plan`."""
    [result] = plan_each(chain, [budget], progress=progress, **options)
    if isinstance(result, InfeasibleBudgetError):
        raise result
    return result


def plan_each(
    chain: Workload,
    budgets: Sequence[int | float | str | Budget],
    *,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> list[Plan | InfeasibleBudgetError]:
    """Plan for several budgets, from one solve where the solver can.

    Args:
        chain: The chain or graph.
        budgets: As `plan` takes them, in any order.
        progress: As in `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        A plan, or why there is none, for each budget. Of those of one call a larger budget never
        takes longer. Of a chain that is planned in several calls, a plan takes longer than one of
        a smaller budget by no more than its own gap: what that one takes is no less than the
        bound of the larger budget. So where the gap is 0 it never takes longer.
    """
    return plan_front(chain, budgets, progress=progress, **options)[0]


def plan_front(
    chain: Workload,
    budgets: Sequence[int | float | str | Budget],
    *,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> tuple[list[Plan | InfeasibleBudgetError], tuple[Plan, ...]]:
    """As `plan_each`, with all that was found between the budgets.

    Returns:
        The same as `plan_each`; and of several budgets every step that the search came by: plans
        of rising peak and falling seconds, each with its peak as budget. What bounds one of them
        is the bound of the next larger budget that was asked for.
    """
    wanted = [parse_budget(budget) for budget in budgets]
    store_all = _store_all_bytes(chain)
    task = _Task(
        chain=chain,
        sizes=tuple(budget.resolve(store_all) for budget in wanted),
        solver=options.get("solver", AUTO),
        time_limit=options.get("time_limit", TIME_LIMIT),
        store_all_bytes=store_all,
    )
    shelf = open_cache() if options.get("cache", True) else None
    found = _find(task, shelf)
    if found is None:
        with bar_of_solvers(progress):
            found = _solve(task, shelf)
    results, front = found
    asked = [_asked(task, x, budget) for x, budget in zip(results, budgets, strict=True)]
    return asked, front


def certified_again(plan: Plan, *, search: bool) -> Plan:
    """A plan with a certificate that is worked out here, whatever it says of itself.

    Args:
        plan: The plan; its schedule is checked already.
        search: Whether to plan again for the lower bound and the least budget; without, they are
            the seconds of storing everything, and the peak.

    Raises:
        PlanMismatchError: It names a solver that there is not.
    """
    chain = plan.chain
    try:
        get_solver(plan.solver)
    except WorkloadError as error:
        raise PlanMismatchError(f"the plan cannot be true: {error}") from None
    store_all = _store_all_bytes(chain)
    plan = replace(
        plan,
        budget_text=f"{plan.budget_bytes} bytes"
        if _contradicts(plan.budget_text, plan.budget_bytes, store_all)
        else plan.budget_text,
        store_all_bytes=store_all,
        least_budget_bytes=plan.peak_bytes,
        schedule_class=ALL_SCHEDULES,
        lower_bound_seconds=chain.store_all_seconds,
        rounding_unit_bytes=1,
    )
    if not search:
        return plan
    for solver in (AUTO, plan.solver):
        try:
            [found] = plan_each(chain, [plan.budget_bytes], solver=solver)
        except (WorkloadError, SolverTimeoutError):
            continue  # too much for it: nothing is claimed
        if isinstance(found, Plan):
            plan = _with_proof(plan, found)
    return plan


def _with_proof(plan: Plan, found: Plan) -> Plan:
    """A plan with the stronger bound and the lesser least budget of it and another one."""
    plan = replace(
        plan,
        least_budget_bytes=min(plan.least_budget_bytes, found.least_budget_bytes),
        rounding_unit_bytes=found.rounding_unit_bytes,
    )
    bound = found.lower_bound_seconds
    if excess(bound, plan.lower_bound_seconds) == 0 or excess(bound, plan.seconds) > 0:
        return plan
    return replace(plan, schedule_class=found.schedule_class, lower_bound_seconds=bound)


def _contradicts(text: str, budget_bytes: int, store_all_bytes: int) -> bool:
    """Whether a text names another budget; words that name none say why it was chosen."""
    if is_of_device(text):
        return False  # that was of another moment
    try:
        return parse_budget(text).resolve(store_all_bytes) != budget_bytes
    except BudgetSyntaxError:
        return False


def _store_all_bytes(chain: Workload) -> int:
    # The rule takes graphs as well.
    return Baseline("store_all").solve(cast(Chain, chain), NO_LIMIT).trace.peak_bytes


def compare_baselines(chain: Workload) -> tuple[BaselineFigures, ...]:
    """Every baseline that is worth comparing on a chain, with what it needs and takes."""
    figures = []
    for baseline in rules_for(chain):
        solution = baseline.solve(cast(Chain, chain), NO_LIMIT)  # or a graph
        trace = solution.trace
        if run_again(chain, solution.schedule):
            continue
        figures.append(
            BaselineFigures(
                name=baseline.name,
                peak_bytes=trace.peak_bytes,
                seconds=trace.seconds,
                forwards=trace.forwards,
            )
        )
    return tuple(figures)


def _as_asked(budget: int | float | str | Budget) -> str:
    if isinstance(budget, str):
        return budget.strip()
    if isinstance(budget, Budget) and budget.share is not None:
        return f"{float(budget.share * 100):g}%"
    if isinstance(budget, Budget):
        reserved = f" less {budget.reserved_bytes} reserved" if budget.reserved_bytes else ""
        return f"{budget.bytes} bytes{reserved}"
    return f"{budget} bytes"


_Result: TypeAlias = Plan | InfeasibleBudgetError


def _asked(task: _Task, result: _Result, budget: int | float | str | Budget) -> _Result:
    """The result with the budget as it was asked for, and what helps where nothing fits."""
    text = _as_asked(budget)
    if isinstance(result, Plan):
        return replace(result, budget_text=text)
    message = f"{result}; {_parts(task, result)}"
    if text.endswith("%"):
        message = f"{text} of storing everything is too little: {message}"
    elif question := meant_as_percentage(budget, result.budget_bytes):
        message = f"{message}; {question}"
    return InfeasibleBudgetError(
        message,
        budget_bytes=result.budget_bytes,
        least_budget_bytes=result.least_budget_bytes,
        stage=result.stage,
    )


def _parts(task: _Task, error: InfeasibleBudgetError) -> str:
    """What any schedule of a chain or graph has to hold, and what counts."""
    chain, whole = task.chain, task.store_all_bytes
    gradients = sum(stage.parameter_gradient_bytes for stage in chain.stages)
    # What a stage holds while it is differentiated: its tape, both gradients, and its own extra.
    needs = [
        x.tape_bytes + x.gradient_bytes + x.backward_overhead_bytes + x.parameter_gradient_bytes
        for x in chain.stages
    ]
    largest = max(range(len(needs)), key=needs.__getitem__)
    loss = chain.held_bytes + chain.loss_overhead_bytes
    least = error.least_budget_bytes
    share = percent(math.ceil(1000 * least / max(whole, 1)) / 1000) if least else ""
    return (
        f"of the {exact_bytes(whole)} of storing everything, gradients of parameters take "
        f"{exact_bytes(gradients)}, the largest stage ({chain.stage_name(largest + 1)!r}) "
        f"{exact_bytes(needs[largest])} while it is differentiated, and the loss with the output "
        f"{exact_bytes(loss)}{share and f'; the least budget is {share}'}. "
        f"A budget counts {COUNTED}"
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is planned: everything that decides the plans."""

    chain: Workload
    sizes: tuple[int, ...]
    """Budgets in bytes. What one solve finds for a budget may depend on the others."""
    solver: str
    time_limit: float
    store_all_bytes: int

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        if not 0 < self.time_limit < math.inf:
            raise WorkloadError(
                f"a time limit of {self.time_limit!r} s leaves no time; give seconds, such as 60"
            )

    def request(self, size: int) -> dict[str, Any]:
        """What a plan is kept by on disk."""
        return {
            "fingerprint": self.chain.fingerprint,
            "budget_bytes": size,
            "budgets": list(self.sizes),
            "solver": self.solver,
            "time_limit": self.time_limit,
            "source": source_digest(),
        }

    def request_step(self, number: int) -> dict[str, Any]:
        """What a step of the front is kept by."""
        request = {**self.request(0), "step": number}
        del request["budget_bytes"]
        return request


_Found: TypeAlias = tuple[list[_Result], tuple[Plan, ...]]


def _find(task: _Task, shelf: PlanCache | None) -> _Found | None:
    """The plans that were kept, if all of them were, and the steps between them."""
    plans: list[_Result] = []
    for size in task.sizes:
        plan = shelf and shelf.find(task.request(size), task.chain)
        if not plan:
            return None
        plans.append(plan)
    steps: list[Plan] = []
    while shelf and (step := shelf.find(task.request_step(len(steps)), task.chain)):
        steps.append(step)
    return plans, tuple(steps)


def _solve(task: _Task, shelf: PlanCache | None) -> _Found:
    """Plan, and keep what took long."""
    begun = time.perf_counter()
    # More than any chain can need is more than the 64 bits of compiled solvers hold.
    usable = [min(size, NO_LIMIT) for size in task.sizes]
    portfolio = _portfolio(task, usable)
    results = _results(task, portfolio, usable)
    if isinstance(task.chain, Chain):
        results = _falling(task, [_with_smaller(task, result) for result in results])
        results = _with_rule(task, results)
        if task.solver == AUTO and may_gain(task.chain):
            one = partial(_one, task)
            results = better_by_value(task.chain, results, task.store_all_bytes, one)
    taken = time.perf_counter() - begun
    plans = [result for result in results if isinstance(result, Plan)]
    front = known_steps(task.chain, portfolio.seen(), plans)
    operations = sum(len(plan.schedule) for plan in (*plans, *front))
    if shelf is not None and is_worth_keeping(taken, operations):
        for plan in plans:
            shelf.keep(task.request(plan.budget_bytes), plan)
        for number, step in enumerate(front):
            shelf.keep(task.request_step(number), step)
    return results, front


def _portfolio(task: _Task, sizes: Sequence[int]) -> Portfolio:
    return Portfolio(never_alone(task.chain), sizes, task.solver, task.time_limit)


def _results(task: _Task, portfolio: Portfolio, sizes: Sequence[int]) -> list[_Result]:
    return [
        _plan(task, answer, size) if isinstance(answer, Answer) else answer
        for answer, size in zip(portfolio.answers(), sizes, strict=True)
    ]


def _one(task: _Task, size: int) -> _Result:
    """What the chain's own solvers find for one budget."""
    (found,) = _results(task, _portfolio(task, [size]), [size])
    return found


def _with_rule(task: _Task, results: list[_Result]) -> list[_Result]:
    """The same, with what stages that run once cost said where nothing fits."""
    errors = [x for x in results if isinstance(x, InfeasibleBudgetError)]
    if not errors or not has_stages_run_once(task.chain):
        return results
    sizes, free = [x.budget_bytes for x in errors], without_rule(task.chain)
    answers = Portfolio(free, sizes, task.solver, task.time_limit).answers()
    pairs = zip(errors, answers, strict=True)
    said = {id(x): because_of_rule(task.chain, x, y.least_budget_bytes) for x, y in pairs}
    return [said.get(id(x), x) for x in results]


def _with_smaller(task: _Task, result: _Result) -> _Result:
    """A plan, or that of a somewhat smaller budget where it is far from the bound and that is not.

    What a solver counts is not to the byte what a step takes, so now and then the schedule that it
    takes for the best one does not fit, and what it falls back to is dearer than what a smaller
    budget gets.
    """
    if not isinstance(result, Plan) or result.gap <= _FAR_FROM_BOUND:
        return result
    if task.solver not in (AUTO, "chain_dp") or result.solver != "chain_dp":
        return result  # others count as the ledger does, or are the same at each budget
    sizes = sorted({int(result.budget_bytes * share) for share in _SMALLER}, reverse=True)
    found = _results(task, _portfolio(task, sizes), sizes)
    smaller = [x for x in found if isinstance(x, Plan)]
    best = min((result, *smaller), key=lambda plan: plan.seconds)
    return result if best is result else _following(result, best)


def _falling(task: _Task, results: Sequence[_Result]) -> list[_Result]:
    """The same plans, each no slower than those of smaller budgets beside it."""
    found = list(results)
    best: Plan | None = None
    for k in sorted(range(len(found)), key=task.sizes.__getitem__):
        plan = found[k]
        if not isinstance(plan, Plan):
            continue
        if best is not None and best.seconds < plan.seconds:
            found[k] = plan = _following(plan, best)
        best = plan
    return found


def _following(plan: Plan, better: Plan) -> Plan:
    """A plan with the schedule of another, of a smaller budget for the same chain."""
    return replace(
        plan,
        schedule=better.schedule,
        trace=better.trace,
        solver=better.solver,
        rounding_unit_bytes=better.rounding_unit_bytes,
    )


def _plan(task: _Task, answer: Answer, size: int) -> Plan:
    """Simulate once more, and put the certificate together."""
    solution = answer.best.solution
    schedule = with_own_tapes(task.chain, solution.schedule)
    trace = simulate(task.chain, schedule)
    if again := run_again(task.chain, schedule):
        raise CkptschedError(
            f"the solver {answer.best.solver} gave a schedule that runs stage {again[0]} again, "
            "which is to run once; this is a fault of ckptsched, please report it"
        )
    if trace.peak_bytes > size:
        raise CkptschedError(
            f"the solver {answer.best.solver} gave a schedule of {trace.peak_bytes} bytes for a "
            f"budget of {size} bytes; this is a fault of ckptsched, please report it"
        )
    return Plan(
        chain=task.chain,
        schedule=schedule,
        trace=trace,
        solver=answer.best.solver,
        schedule_class=answer.schedule_class,
        budget_bytes=size,
        budget_text=f"{size} bytes",
        store_all_bytes=task.store_all_bytes,
        least_budget_bytes=answer.least_budget_bytes,
        lower_bound_seconds=answer.lower_bound_seconds,
        rounding_unit_bytes=solution.rounding_unit_bytes,
    )
