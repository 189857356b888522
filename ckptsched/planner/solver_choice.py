"""Which solvers a chain or graph is given to, and the best of what they find for each budget."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast, final

from ..base.errors import (
    InfeasibleBudgetError,
    SolverRefusalError,
    SolverTimeoutError,
    SolverWarning,
    WorkloadError,
)
from ..schedule.language import Schedule
from ..solvers import GraphIlp, baselines_for, get_solver
from ..solvers.base import AbstractSolver, Solution, infeasible
from ..solvers.baselines import Baseline, Guess, every_k_grid, fitting_every_k
from ..solvers.chain.persistence import ALL_PINNED, persistent_is_optimal
from ..solvers.graph.ilp_solver import PROVED_NODES
from ..solvers.runs.solver import takes
from ..workload.chain import Chain
from ..workload.graph import Graph
from .plan_words import Workload, excess

# From so many stages on, chains of long runs are given to run_dp alone: it is faster there than
# chain_dp, and finds schedules within a tenth of a percent of it, or better ones.
_RUNS_FROM = 300
# A table of more stages in several runs needs far more than a gigabyte, or half a minute; where
# all stages are equal, run_dp itself says what is too much.
_MOST_STAGES_IN_RUNS = 50_000
AUTO = "auto"
ALL_SCHEDULES = "all schedules"
PERSISTENT = "memory-persistent"
NO_LIMIT = 2**62
# Of a grid of every_<k>, so many that need least are tried for every budget.
_LEAST_OF_GRID = 3
_GRAPH_SOLVERS = ("graph_ilp", "graph_search", "graph_cuts")
_GRAPH_RULES = ("store_all",)


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that fits, and who found it."""

    solver: str
    solution: Solution

    @property
    def seconds(self) -> float:
        """Projected seconds."""
        return self.solution.trace.seconds


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best schedule for a budget, and what is known about better ones."""

    best: Candidate
    schedule_class: str
    lower_bound_seconds: float
    least_budget_bytes: int


Found: TypeAlias = Answer | InfeasibleBudgetError


def rules_for(workload: Workload) -> tuple[Baseline, ...]:
    """The baselines that are worth comparing on a chain or graph."""
    if isinstance(workload, Graph):
        return tuple(map(Baseline, _GRAPH_RULES))
    return baselines_for(workload)


@final
class Portfolio:
    """What each method found for each budget."""

    def __init__(
        self, workload: Workload, sizes: Sequence[int], solver: str, time_limit: float
    ) -> None:
        self.sizes = sizes
        # A path has closed forms and tables that a graph has not; its numbers are the same.
        if isinstance(workload, Graph) and workload.is_path:
            workload = workload.to_chain()
        self.workload = workload
        auto = solver == AUTO
        if auto:
            self.solved = _try_all(self.workload, sizes, time_limit)
        else:
            self.solved = [_solve_each(self.workload, sizes, solver, time_limit)]
        self.tried: dict[str, Candidate] = {}
        self.rules = self._rules() if auto else ()
        # Where the dynamic program does not take the chain, a good k of every_<k> is looked for.
        no_table = all(method.name != "chain_dp" for method, _ in self.solved)
        self.searches_k = auto and no_table and isinstance(self.workload, Chain)
        self.grid: tuple[Guess, ...] = ()
        if self.searches_k and (self.workload.has_ledger or not self.workload.is_uniform):
            self.grid = every_k_grid(cast(Chain, self.workload))
            least = sorted(self.grid, key=lambda guess: guess.least_bytes)[:_LEAST_OF_GRID]
            self.rules = tuple(dict.fromkeys((*self.rules, *least)))

    def _rules(self) -> tuple[Guess, ...]:
        """The rules of thumb, with what they take and need at least."""
        rules = rules_for(self.workload)
        if isinstance(self.workload, Graph):
            return tuple(Guess(rule, 0, self.workload.store_all_seconds) for rule in rules)
        return tuple(rule.guess(self.workload) for rule in rules)

    def _try(self, rule: Baseline) -> Candidate:
        """A rule of thumb, simulated once for all budgets."""
        if rule.name not in self.tried:
            solution = rule.solve(cast(Chain, self.workload), NO_LIMIT)
            self.tried[rule.name] = Candidate(rule.name, solution)
        return self.tried[rule.name]

    def _fitting_rules(self, size: int, best_seconds: float) -> list[Candidate]:
        """The rules that fit, of those that may and would be faster than what is known."""
        worth = [x for x in self.rules if x.least_bytes <= size and x.seconds < best_seconds]
        return [x for x in map(self._try, (guess.rule for guess in worth)) if _fits(x, size)]

    def _best_every_k(self, size: int) -> list[Candidate]:
        """The cheapest every_<k> that fits a long chain: by a closed form, or of a grid."""
        if not self.searches_k:
            return []
        rules: Iterable[Baseline] = (x.rule for x in self.grid if x.least_bytes <= size)
        if self.workload.is_uniform:
            rules = (*fitting_every_k(cast(Chain, self.workload), size), *rules)
        fitting = (x for x in map(self._try, rules) if _fits(x, size))
        return list(itertools.islice(fitting, 1))

    def answers(self) -> list[Found]:
        """The best for every budget; a larger one takes over what a smaller one found."""
        answers: dict[int, Found] = {}
        smaller: list[Candidate] = []
        for i in sorted(range(len(self.sizes)), key=lambda i: self.sizes[i]):
            answer = answers[i] = self._answer(i, smaller)
            if isinstance(answer, Answer):
                smaller = [answer.best]
        return [answers[i] for i in range(len(self.sizes))]

    def seen(self) -> list[tuple[str, Schedule]]:
        """Schedules that solvers and rules have come by, whichever budgets they fit, by name."""
        found = [
            (method.name, schedule)
            for method, each in self.solved
            for x in each
            if isinstance(x, Solution)
            for schedule in (x.schedule, *x.seen)
        ]
        found += [(x.solver, x.solution.schedule) for x in self.tried.values()]
        return list({schedule: (name, schedule) for name, schedule in reversed(found)}.values())

    def _answer(self, i: int, smaller: list[Candidate]) -> Found:
        results = [(method, each[i]) for method, each in self.solved]
        found = [(m, x) for m, x in results if isinstance(x, Solution)]
        errors = [x for _, x in results if isinstance(x, InfeasibleBudgetError)]
        candidates = [Candidate(method.name, solution) for method, solution in found]
        candidates += smaller
        known = min((x.seconds for x in candidates), default=math.inf)
        candidates += self._fitting_rules(self.sizes[i], known)
        candidates += self._best_every_k(self.sizes[i])
        if not candidates:
            return self._error(i, errors)
        # The first of equals, up to the order of sums: a solver before a rule of thumb.
        best = min(candidates, key=lambda x: float(f"{x.seconds:.12g}"))
        claims = [solution for method, solution in found if not isinstance(method, Baseline)]
        name, bound = _bound(self.workload, best, claims)
        least = [x.solution.least_budget_bytes for x in (*candidates, *self.tried.values())]
        least += [x.least_budget_bytes for x in errors if x.least_budget_bytes is not None]
        return Answer(
            best=best,
            schedule_class=name,
            lower_bound_seconds=bound,
            least_budget_bytes=min(least),
        )

    def _error(self, i: int, errors: list[InfeasibleBudgetError]) -> InfeasibleBudgetError:
        """Of all that failed, the error with the least budget that works."""
        for guess in self.rules:
            trace = self._try(guess.rule).solution.trace
            error = infeasible(cast(Chain, self.workload), self.sizes[i], trace, "known")
            errors.append(error)
        return min(
            errors,
            key=lambda x: NO_LIMIT if x.least_budget_bytes is None else x.least_budget_bytes,
        )


def _fits(candidate: Candidate, size: int) -> bool:
    return candidate.solution.trace.peak_bytes <= size


_Solved: TypeAlias = tuple[AbstractSolver, list[Solution | InfeasibleBudgetError]]


def _solve_each(
    workload: Workload, sizes: Sequence[int], solver: str, time_limit: float
) -> _Solved:
    method: AbstractSolver
    try:
        method = get_solver(solver)
    except WorkloadError as error:
        raise WorkloadError(f'{error}, or "{AUTO}", which picks') from None
    if isinstance(method, GraphIlp):
        method = GraphIlp(time_limit_seconds=time_limit)
    if isinstance(workload, Graph) and solver not in (*_GRAPH_SOLVERS, *_GRAPH_RULES):
        raise SolverRefusalError(
            f"{solver} takes chains, and this graph of {len(workload)} nodes is none; give one of "
            f'{", ".join((*_GRAPH_SOLVERS, *_GRAPH_RULES))}, or "{AUTO}"'
        )
    return method, method.solve_each(cast(Chain, workload), sizes)  # or a graph, as just checked


def _try_all(workload: Workload, sizes: Sequence[int], time_limit: float) -> list[_Solved]:
    """What "auto" tries, the widest class of schedules first."""
    solved: list[_Solved] = []
    for name in _names(workload):
        if name in ("graph_search", "graph_cuts", "periodic") and solved:
            continue  # what came before starts from it, or is better
        try:
            solved.append(_solve_each(workload, sizes, name, time_limit))
        except (SolverRefusalError, SolverTimeoutError):
            continue  # the next, or the rules of thumb, take what is too long for it
        except Exception as error:
            warnings.warn(
                f"the solver {name} failed by a fault of its own ({type(error).__name__}: "
                f"{error}), so the plan is the best of what others found and may be dearer than "
                "need be; please report it",
                SolverWarning,
                stacklevel=2,
            )
    return solved


def _names(workload: Workload) -> Iterable[str]:
    if isinstance(workload, Graph):
        proves = len(workload) <= PROVED_NODES and workload.lined is None
        yield from _GRAPH_SOLVERS if proves else _GRAPH_SOLVERS[1:]
        return
    if _in_runs(workload):
        yield "run_dp"
    elif not (workload.is_uniform and len(workload) > _MOST_STAGES_IN_RUNS):
        yield "chain_dp"  # which refuses thousands of stages, but has to count their sizes first
        yield "periodic"  # for what that refuses
    if workload.is_uniform:
        yield "revolve"


def _in_runs(chain: Chain) -> bool:
    """Whether run_dp is the solver for a chain."""
    if len(chain) <= _RUNS_FROM:
        return False
    if not chain.is_uniform and len(chain) > _MOST_STAGES_IN_RUNS:
        return False
    return takes(chain)


def _bound(workload: Workload, best: Candidate, claims: Sequence[Solution]) -> tuple[str, float]:
    """The class of the first claim that the best schedule does not disprove, and its bound.

    A claim on all pinned schedules that is as strong is taken instead. No schedule at all takes
    less than storing everything: that bound is always there.
    """
    found = ALL_SCHEDULES, workload.store_all_seconds
    if excess(best.seconds, workload.store_all_seconds) == 0:
        return found
    for claim in claims:
        name, bound = claim.schedule_class, claim.lower_bound_seconds
        if excess(bound, best.seconds) > 0 or excess(workload.store_all_seconds, bound) > 0:
            continue
        if name == PERSISTENT and isinstance(workload, Chain) and persistent_is_optimal(workload):
            name = ALL_PINNED
        is_first = found[0] == ALL_SCHEDULES
        if is_first or (name == ALL_PINNED and excess(found[1], bound) == 0):
            found = name, bound
    return found
