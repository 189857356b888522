"""Plans a chain for a budget: chooses a solver, solves, simulates, certifies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from .budget import Budget, parse_budget
from .errors import CkptschedError, InfeasibleBudgetError, WorkloadError
from .plans import Plan, excess
from .profiler import profile
from .simulator import simulate
from .solvers import baselines_for, get_solver
from .solvers.base import AbstractSolver, Solution, infeasible
from .solvers.baselines import Baseline, Guess, every_k_grid, fitting_every_k
from .workload import Chain

# On uniform chains revolve answers at once; beyond this many stages the dynamic program, which
# may also keep tapes, takes minutes to improve on it.
_UNIFORM_DP_STAGES = 500
AUTO = "auto"
_ALL_SCHEDULES = "all schedules"
_NO_LIMIT = 2**62
# Of a grid of every_<k>, so many that need least are tried for every budget.
_LEAST_OF_GRID = 3


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


def plan(
    workload: Any, *sample: Any, budget: int | float | str | Budget, solver: str = "auto"
) -> Plan:
    """Find the schedule that takes least time within a budget.

    Args:
        workload: A `Chain`, or an `nn.Module`, which is profiled first.
        sample: One batch for the model; nothing where the workload is a chain.
        budget: Bytes, text such as "64MiB", a share of what storing everything needs such as
            "40%", or a `Budget`.
        solver: Name of a solver. "auto" picks: `revolve` and `chain_dp` as far as they take
            the chain, and never something dearer than a fitting baseline of those that
            `compare_baselines` lists. Where the chain is too long for `chain_dp` it also looks
            for a good k of `every_<k>`: the best for equal stages without a ledger, else one
            of a grid.

    Returns:
        A plan that keeps the budget by simulation, with its certificate.

    Raises:
        BudgetSyntaxError: The budget cannot be read.
        InfeasibleBudgetError: Nothing fits; the message names the least budget that works.
        WorkloadError: The solver is unknown or does not take the chain.
        ProfileError: The model cannot be measured.
    """
    parse_budget(budget)  # before the model is measured, which takes a while
    [result] = plan_each(_chain_of(workload, sample), [budget], solver=solver)
    if isinstance(result, InfeasibleBudgetError):
        raise result
    return result


def plan_each(
    chain: Chain, budgets: Sequence[int | float | str | Budget], *, solver: str = "auto"
) -> list[Plan | InfeasibleBudgetError]:
    """Plan for several budgets, from one solve where the solver can.

    Args:
        chain: The chain.
        budgets: As `plan` takes them, in any order.
        solver: As in `plan`.

    Returns:
        A plan, or why there is none, for each budget. A larger budget never takes longer.
    """
    wanted = [parse_budget(budget) for budget in budgets]
    store_all = get_solver("store_all").solve(chain, _NO_LIMIT)
    sizes = [budget.resolve(store_all.trace.peak_bytes) for budget in wanted]
    answers = _Search(chain, sizes, solver).answers()
    results: list[Plan | InfeasibleBudgetError] = []
    for answer, size, text in zip(answers, sizes, map(_as_asked, budgets), strict=True):
        if isinstance(answer, _Answer):
            results.append(_certify(chain, answer, size, text, store_all))
        else:
            results.append(_about(answer, text))
    return results


def compare_baselines(chain: Chain) -> tuple[BaselineFigures, ...]:
    """Every baseline that is worth comparing on a chain, with what it needs and takes."""
    figures = []
    for baseline in baselines_for(chain):
        trace = baseline.solve(chain, _NO_LIMIT).trace
        figures.append(
            BaselineFigures(
                name=baseline.name,
                peak_bytes=trace.peak_bytes,
                seconds=trace.seconds,
                forwards=trace.forwards,
            )
        )
    return tuple(figures)


def _chain_of(workload: Any, sample: tuple[Any, ...]) -> Chain:
    if not isinstance(workload, Chain):
        return profile(workload, *sample)
    if sample:
        raise WorkloadError(
            "a chain was profiled with its own sample: plan(chain, budget=...) takes no other"
        )
    return workload


def _as_asked(budget: int | float | str | Budget) -> str:
    if isinstance(budget, str):
        return budget.strip()
    if isinstance(budget, Budget) and budget.share is not None:
        return f"{float(budget.share * 100):g}%"
    if isinstance(budget, Budget):
        reserved = f" less {budget.reserved_bytes} reserved" if budget.reserved_bytes else ""
        return f"{budget.bytes} bytes{reserved}"
    return f"{budget} bytes"


def _about(error: InfeasibleBudgetError, text: str) -> InfeasibleBudgetError:
    """The error with the budget as it was asked for, where that is no number of bytes."""
    if not text.endswith("%"):
        return error
    return InfeasibleBudgetError(
        f"{text} of storing everything is too little: {error}",
        budget_bytes=error.budget_bytes,
        least_budget_bytes=error.least_budget_bytes,
        stage=error.stage,
    )


@final
@dataclass(frozen=True, slots=True)
class _Candidate:
    """A schedule that fits, and who found it."""

    solver: str
    solution: Solution

    @property
    def seconds(self) -> float:
        """Projected seconds."""
        return self.solution.trace.seconds


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """The best schedule for a budget, and what is known about better ones."""

    best: _Candidate
    schedule_class: str
    lower_bound_seconds: float
    least_budget_bytes: int


@final
class _Search:
    """What each method found for each budget."""

    def __init__(self, chain: Chain, sizes: Sequence[int], solver: str) -> None:
        self.chain, self.sizes = chain, sizes
        auto = solver == AUTO
        self.solved = _try_all(chain, sizes) if auto else [_solve_each(chain, sizes, solver)]
        self.tried: dict[str, _Candidate] = {}
        rules = baselines_for(chain) if auto else ()
        # Where the dynamic program does not take the chain, a good k of every_<k> is looked for.
        self.searches_k = auto and all(method.name != "chain_dp" for method, _ in self.solved)
        self.grid: tuple[Guess, ...] = ()
        if self.searches_k and (chain.has_ledger or not chain.is_uniform):
            self.grid = every_k_grid(chain)
            least = sorted(self.grid, key=lambda guess: guess.least_bytes)[:_LEAST_OF_GRID]
            rules = (*rules, *(guess.rule for guess in least))
        self.fixed = [self._try(rule) for rule in dict.fromkeys(rules)]

    def _try(self, rule: Baseline) -> _Candidate:
        """A rule of thumb, simulated once for all budgets."""
        if rule.name not in self.tried:
            self.tried[rule.name] = _Candidate(rule.name, rule.solve(self.chain, _NO_LIMIT))
        return self.tried[rule.name]

    def _best_every_k(self, size: int) -> list[_Candidate]:
        """The cheapest every_<k> that fits a long chain: by a closed form, or of a grid."""
        if not self.searches_k:
            return []
        rules: Iterable[Baseline] = (x.rule for x in self.grid if x.least_bytes <= size)
        if self.chain.is_uniform:
            rules = (*fitting_every_k(self.chain, size), *rules)
        candidates = map(self._try, rules)
        fitting = (x for x in candidates if x.solution.trace.peak_bytes <= size)
        return list(itertools.islice(fitting, 1))

    def answers(self) -> list[_Answer | InfeasibleBudgetError]:
        """The best for every budget; a larger one takes over what a smaller one found."""
        answers: dict[int, _Answer | InfeasibleBudgetError] = {}
        smaller: list[_Candidate] = []
        for i in sorted(range(len(self.sizes)), key=lambda i: self.sizes[i]):
            answer = answers[i] = self._answer(i, smaller)
            if isinstance(answer, _Answer):
                smaller = [answer.best]
        return [answers[i] for i in range(len(self.sizes))]

    def _answer(self, i: int, smaller: list[_Candidate]) -> _Answer | InfeasibleBudgetError:
        results = [(method, each[i]) for method, each in self.solved]
        found = [(m, x) for m, x in results if isinstance(x, Solution)]
        errors = [x for _, x in results if isinstance(x, InfeasibleBudgetError)]
        candidates = [_Candidate(method.name, solution) for method, solution in found]
        candidates += [x for x in self.fixed if x.solution.trace.peak_bytes <= self.sizes[i]]
        candidates += self._best_every_k(self.sizes[i])
        candidates += smaller
        if not candidates:
            return self._error(i, errors)
        # The first of equals, up to the order of sums: a solver before a rule of thumb.
        best = min(candidates, key=lambda x: float(f"{x.seconds:.12g}"))
        claims = [solution for method, solution in found if not isinstance(method, Baseline)]
        name, bound = _bound(self.chain, best, claims)
        least = [x.solution.least_budget_bytes for x in (*candidates, *self.fixed)]
        least += [x.least_budget_bytes for x in errors if x.least_budget_bytes is not None]
        return _Answer(
            best=best,
            schedule_class=name,
            lower_bound_seconds=bound,
            least_budget_bytes=min(least),
        )

    def _error(self, i: int, errors: list[InfeasibleBudgetError]) -> InfeasibleBudgetError:
        """Of all that failed, the error with the least budget that works."""
        for rule in self.fixed:
            trace = rule.solution.trace
            errors.append(infeasible(self.chain, self.sizes[i], trace, "known"))
        return min(
            errors,
            key=lambda x: _NO_LIMIT if x.least_budget_bytes is None else x.least_budget_bytes,
        )


_Solved: TypeAlias = tuple[AbstractSolver, list[Solution | InfeasibleBudgetError]]


def _solve_each(chain: Chain, sizes: Sequence[int], solver: str) -> _Solved:
    try:
        method = get_solver(solver)
    except WorkloadError as error:
        raise WorkloadError(f'{error}, or "{AUTO}", which picks') from None
    return method, method.solve_each(chain, sizes)


def _try_all(chain: Chain, sizes: Sequence[int]) -> list[_Solved]:
    """What "auto" tries, the widest class of schedules first."""
    names = []
    if not chain.is_uniform or len(chain) <= _UNIFORM_DP_STAGES:
        names.append("chain_dp")
    if chain.is_uniform:
        names.append("revolve")
    solved = []
    for name in names:
        # A solver refuses a chain that is too long for it; the rules of thumb take any.
        with suppress(WorkloadError):
            solved.append(_solve_each(chain, sizes, name))
    return solved


def _bound(chain: Chain, best: _Candidate, claims: Sequence[Solution]) -> tuple[str, float]:
    """The class of the first claim that the best schedule does not disprove, and its bound.

    No schedule at all takes less than storing everything: that bound is always there.
    """
    least = chain.store_all_seconds
    if excess(best.seconds, least) > 0:
        for claim in claims:
            if excess(claim.lower_bound_seconds, best.seconds) == 0:
                return claim.schedule_class, max(claim.lower_bound_seconds, least)
    return _ALL_SCHEDULES, least


def _certify(chain: Chain, answer: _Answer, size: int, text: str, store_all: Solution) -> Plan:
    """Simulate once more, and put the certificate together."""
    solution = answer.best.solution
    trace = simulate(chain, solution.schedule)
    if trace.peak_bytes > size:
        raise CkptschedError(
            f"the solver {answer.best.solver} gave a schedule of {trace.peak_bytes} bytes for a "
            f"budget of {size} bytes; this is a fault of ckptsched, please report it"
        )
    return Plan(
        chain=chain,
        schedule=solution.schedule,
        trace=trace,
        solver=answer.best.solver,
        schedule_class=answer.schedule_class,
        budget_bytes=size,
        budget_text=text,
        store_all_bytes=store_all.trace.peak_bytes,
        least_budget_bytes=answer.least_budget_bytes,
        lower_bound_seconds=answer.lower_bound_seconds,
        rounding_unit_bytes=solution.rounding_unit_bytes,
    )
