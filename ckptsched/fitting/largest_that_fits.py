"""Finds what fits: the least budget, the largest batch, the most steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, Unpack, final

import numpy as np

from ..base.budget import Budget, is_of_device, parse_budget
from ..base.errors import BudgetSyntaxError, CkptschedError, InfeasibleBudgetError, WorkloadError
from ..base.progress_bar import bar_of_solvers
from ..planner.plan import Plan
from ..planner.plan_words import Workload, excess, words_of_class
from ..planner.planner import PlanOptions, plan_each
from ..profiler.profile import profile
from ..profiler.stage_kind import Loss
from ..workload.chain import Chain
from ..workload.scaling import Line, batch_of, with_batch, with_steps
from .planning import chain_of

_BUDGETS_A_ROUND = 8
# Where sizes are rounded a plan's cost says nothing about a budget a byte smaller: the search
# ends once budgets that were tried are so close, as a share.
_CLOSE = 1e-3
_MOST = 2**20
_MOST_STEPS = 1000  # as long as there is no limit on time, steps without end fit many a budget
_FIRST_BATCHES = (2, 4)  # a batch of one is special to normalisation layers
_LINES = 2


def least_budget(
    workload: Any,
    *sample: Any,
    overhead: float | str = 0.10,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    capture: bool | None = None,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Find the least budget at which recomputation costs at most so much time.

    The budget is narrowed down by several budgets a round, planned from one solve where the
    solver can; what a plan's peak and lower bound say about other budgets is used. Where the
    solver is exact so is the answer, to the byte. Otherwise there may be a plan for somewhat
    less; `budget_text` says below which budget there is none.

    Args:
        workload: A `Chain` or `Graph`, or an `nn.Module`, which is profiled first.
        sample: One batch for the model; nothing where the workload is a chain or graph.
        overhead: Seconds more than storing everything takes, as a share such as 0.1, or as
            text such as "10%".
        kwargs: Arguments of the model's call by name.
        loss: From the model's output to a scalar, see `profile`.
        capture: Whether to record the model, see `profile`.
        progress: As in `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        A plan whose overhead is at most that, for a budget of its own peak.

    Raises:
        WorkloadError: The share is no number of 0 or more, or the solver recomputes more
            whatever the budget.
        InfeasibleBudgetError: The solver finds nothing even for store-all's budget.
    """
    share = parse_overhead(overhead)
    chain = chain_of(workload, sample, kwargs, loss, capture)
    with bar_of_solvers(progress):
        search = _LeastBudget(chain, share, options)
        search.run()
    return replace(search.best, budget_bytes=search.best.peak_bytes, budget_text=search.describe())


def parse_overhead(overhead: float | str) -> float:
    """Read a share of time, such as 0.1 or "10%".

    Raises:
        WorkloadError: No number, NaN, infinite or negative.
    """
    text = overhead.strip() if isinstance(overhead, str) else ""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(overhead)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(overhead, bool) or not math.isfinite(value) or value < 0:
        raise WorkloadError(
            f"an overhead of {overhead!r} cannot be planned for; give a share of 0 or more, such "
            'as 0.1 or "10%"'
        )
    return value


@final
class _LeastBudget:
    """Narrows down the least budget for an overhead."""

    def __init__(self, chain: Workload, share: float, options: PlanOptions) -> None:
        self.chain, self.share, self.options = chain, share, options
        [everything] = plan_each(chain, ["100%"], **options)
        if isinstance(everything, InfeasibleBudgetError):
            raise everything
        if not self._is_enough(everything.overhead):
            raise WorkloadError(
                f"{everything.solver} takes {everything.overhead:+.2%} of time even where "
                f"everything could be stored, more than the {share:.2%} asked for; allow more, or "
                'take solver="auto"'
            )
        self.best = everything
        """The plan of least peak that is good enough."""
        self.failed = min(everything.least_budget_bytes, everything.peak_bytes) - 1
        """The largest budget for which none was found."""
        self.excluded = 0
        """The largest budget for which a lower bound says that there is none."""

    def run(self) -> None:
        """Try budgets between, until none is left, or they are close and nothing is proved."""
        while self.best.peak_bytes - self.failed > 1:
            low, high = self.failed, self.best.peak_bytes
            if 0 < self.excluded < low and high - low <= _CLOSE * high:
                return
            inner = np.geomspace(max(low + 1, 1), high - 1, _BUDGETS_A_ROUND)
            self._try(sorted({max(low + 1, 1), *inner.astype(np.int64).tolist(), high - 1}))

    def describe(self) -> str:
        """Tell how exact the answer is, with what was asked."""
        best = self.best
        if best.peak_bytes == best.least_budget_bytes:
            note = "the least budget that works at all"
        elif self.excluded == best.peak_bytes - 1:
            note = "exact to the byte"
        elif self.excluded:
            note = f"{words_of_class(best)} does in {self.excluded} bytes"
        else:
            note = "less may do"
        return f"at most {100 * self.share:.6g}% overhead ({note})"

    def _is_enough(self, overhead: float) -> bool:
        return overhead <= self.share + 1e-12  # sums differ in their last digits

    def _try(self, budgets: Sequence[int]) -> None:
        results = plan_each(self.chain, budgets, **self.options)
        for budget, result in zip(budgets, results, strict=True):
            if isinstance(result, InfeasibleBudgetError):
                self.failed = budget
            elif self._is_enough(result.overhead):
                self.best = result
                return  # larger budgets need no less
            else:
                self.failed = budget
                bound = excess(result.lower_bound_seconds, self.chain.store_all_seconds)
                if not self._is_enough(bound):
                    self.excluded = budget


@final
@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest size that fits, and why one more does not."""

    size: int
    """Such as the batch, or the steps of each block."""
    plan: Plan
    """The plan at that size, of a chain that was made for it."""
    why_no_more: str
    """What the next size would need."""

    def __str__(self) -> str:
        """For people."""
        return f"largest size: {self.size}; {self.why_no_more}\n{self.plan}"


def largest(
    chain_at: Callable[[int], Chain],
    *,
    budget: int | float | str | Budget,
    overhead: float | str | None = None,
    guess: int = 1,
    most: int = _MOST,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Largest:
    """Find the largest size at which a chain fits a budget.

    Sizes are tried from the guess on, in growing strides, then by halving. The answer's chain
    and that of the next size are made and planned; how sizes grow is not assumed, but that they
    grow: where a size fits, smaller ones are taken to fit as well.

    Args:
        chain_at: Makes the chain of a size, from 1 on.
        budget: Bytes, or text such as "8GiB"; a share would be of another size each time.
        overhead: As `least_budget` takes it: what recomputation may cost; None for any.
        guess: A size near the answer, which saves chains.
        most: No larger size is tried.
        progress: As in `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Raises:
        BudgetSyntaxError: The budget cannot be read, or is a share.
        InfeasibleBudgetError: Not even size 1 fits.
        WorkloadError: The overhead cannot be read, or is exceeded at size 1.
    """
    fits = _fits_for(budget, overhead, options)
    with bar_of_solvers(progress):
        return search_sizes(lambda size: fits(chain_at(size)), min(max(guess, 1), most), most)


def largest_batch(
    workload: Any,
    make: Callable[[int], Any] | None = None,
    *,
    budget: int | float | str | Budget,
    overhead: float | str | None = None,
    loss: Loss | None = None,
    fake: bool = False,
    most: int = _MOST,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Largest:
    """Find the largest batch that can be trained in a budget.

    A model is profiled with small batches, which gives a guess by the line through them, then
    with the batch of the answer and the next: its plan is ready for `checkpointed`. A chain is
    scaled instead (`growth.with_batch`): that is an estimate, somewhat on the safe side.

    Args:
        workload: An `nn.Module`, or a `Chain`.
        make: From a batch to a sample for the model: a tensor, a tuple of arguments, or a dict of
            arguments by name; nothing where the workload is a chain.
        budget: Bytes, or text such as "8GiB".
        overhead: What recomputation may cost, such as 0.2 or "20%"; None for any.
        loss: From the model's output to a scalar, see `profile`.
        fake: Whether to estimate the model instead of measuring it, see `profile`.
        most: No larger batch is tried.
        progress: As in `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        The batch, its plan, and what one more would need.

    Raises:
        BudgetSyntaxError: The budget cannot be read, or is a share.
        InfeasibleBudgetError: Not even a batch of 1 fits.
        WorkloadError: A model without `make`, or a chain with it; or as in `largest`.
        ProfileError: The model cannot be measured.
    """
    fits = _fits_for(budget, overhead, options)  # before anything is measured
    if isinstance(workload, Chain) != (make is None) or (make is None and loss is not None):
        raise WorkloadError(
            "largest_batch takes a model and a callable that makes a sample of a batch, such as "
            "lambda batch: torch.randn(batch, 3, 32, 32); or a chain alone, without a loss"
        )
    with bar_of_solvers(progress):
        if make is None:
            start = min(batch_of(workload), most)
            return search_sizes(lambda batch: fits(with_batch(workload, batch)), start, most)
        sample_of, known = make, dict[int, Chain]()

        def chain_at(batch: int) -> Chain:
            if batch not in known:
                sample = sample_of(batch)
                named = sample if isinstance(sample, Mapping) else {}
                sample = sample if isinstance(sample, tuple) else () if named else (sample,)
                known[batch] = profile(
                    workload, *sample, kwargs=named, loss=loss, fake=fake, progress=progress
                )
            return known[batch]

        guess = _guess_by_lines(chain_at, fits, most)
        return search_sizes(lambda batch: fits(chain_at(batch)), guess, most)


def largest_steps(
    workload: Any,
    *sample: Any,
    budget: int | float | str | Budget,
    overhead: float | str | None = None,
    most: int = _MOST_STEPS,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    capture: bool | None = None,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Largest:
    """Find the most steps that every block of equal steps can have in a budget.

    Steps take the same bytes however many there are, so that chains of more steps are put
    together from measured stages (`growth.with_steps`). A budget that some steps fit is often one
    that any number fits, at ever more time: give an overhead, or expect `most`, which is tried
    first then. Each number tried is planned, which takes seconds from some hundred steps on.

    Args:
        workload: A `Chain`, or an `nn.Module`, which is profiled first.
        sample: One batch for the model; nothing where the workload is a chain.
        budget: Bytes, or text such as "8GiB".
        overhead: What recomputation may cost, such as 0.2 or "20%"; None for any.
        most: No more steps are tried; `why_no_more` says so where that ended the search.
        kwargs: Arguments of the model's call by name.
        loss: From the model's output to a scalar, see `profile`.
        capture: Whether to record the model, see `profile`.
        progress: As in `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        The number of steps of each such block, the plan, and what one more would need. Profile
        the model with that many steps to run a plan.

    Raises:
        BudgetSyntaxError: The budget cannot be read, or is a share.
        InfeasibleBudgetError: Not even one step fits.
        WorkloadError: There is no block of equal steps; or as in `largest`.
    """
    _fits_for(budget, overhead, options)  # before anything is measured
    chain = chain_of(workload, sample, kwargs, loss, capture)
    if not isinstance(chain, Chain):
        raise WorkloadError("a graph has no steps in a row: give a chain, or a model")
    return largest(
        lambda steps: with_steps(chain, steps),
        budget=budget,
        overhead=overhead,
        guess=_first_steps(chain, most, overhead),
        most=most,
        progress=progress,
        **options,
    )


def _first_steps(chain: Chain, most: int, overhead: float | str | None) -> int:
    """The first number of steps to try: the most, which fits nearly any budget."""
    if overhead is None:
        return most
    return max((block.last - block.first + 1 for block in chain.blocks), default=1)


def _guess_by_lines(
    chain_at: Callable[[int], Chain], fits: Callable[[Chain], Fit], most: int
) -> int:
    """Where the largest size should be, by the line through small sizes, then through a guess.

    The second line is flatter where small sizes are special, such as tensors of a few bytes.
    """
    a, b = _FIRST_BATCHES
    for _ in range(_LINES):
        if not a < b <= most:
            return min(a, b, most)
        line = Line(a, chain_at(a), b, chain_at(b))
        try:
            guess = search_sizes(_composed(fits, line), b, most).size
        except CkptschedError:  # not even one fits, by this guess; or the chains are not alike
            return a
        if guess in (a, b):
            return guess
        a, b = sorted((b, guess))
    return guess


def _composed(fits: Callable[[Chain], Fit], line: Line) -> Callable[[int], Fit]:
    return lambda size: fits(line(size))


Fit: TypeAlias = Plan | InfeasibleBudgetError | WorkloadError


def _fits_for(
    budget: int | float | str | Budget, overhead: float | str | None, options: PlanOptions
) -> Callable[[Chain], Fit]:
    """Plans a chain for the budget; gives why not where it takes too much."""
    parsed = parse_budget(budget)
    if parsed.bytes is None:
        raise BudgetSyntaxError(
            f"the budget {budget!r} is a share of a size that is not known yet; give bytes, such "
            'as "8GiB"'
        )
    share = math.inf if overhead is None else parse_overhead(overhead)
    # What a device has free is read once.
    asked = parsed if is_of_device(budget) else budget

    def fits(chain: Chain) -> Fit:
        [result] = plan_each(chain, [asked], **options)
        if isinstance(result, Plan) and result.overhead > share + 1e-12:
            return WorkloadError(
                f"the best plan found takes {result.overhead:+.2%} of time, more than the "
                f"{share:.2%} allowed"
            )
        return result

    return fits


def search_sizes(fit: Callable[[int], Fit], guess: int, most: int) -> Largest:
    """The largest size that fits where the next does not, from a guess on.

    Args:
        fit: Plans a size; gives why not where it does not fit.
        guess: A size near the answer.
        most: No larger size is tried.

    Raises:
        CkptschedError: Not even size 1 fits.
    """
    fitting: dict[int, Plan] = {}
    why = {most + 1: f"no more than {most} was tried (most={most})"}

    def test(size: int) -> bool:
        found = fit(size)
        if isinstance(found, Plan):
            fitting[size] = found
            return True
        why[size] = f"at {size}: {found}"
        if size == 1:
            raise found
        return False

    stride, size = 1, guess
    if test(guess):
        while size < most and test(size := min(size + stride, most)):
            stride *= 2
    else:
        while not test(size := max(size - stride, 1)):
            stride *= 2
    low, high = max(fitting), min(why)
    while high - low > 1:
        middle = (low + high) // 2
        test(middle)
        low, high = max(fitting), min(why)
    return Largest(size=low, plan=fitting[low], why_no_more=why[high])
