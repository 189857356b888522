"""Plans a model, a chain or a graph for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Unpack

from ..base.budget import Budget, parse_budget
from ..base.errors import InfeasibleBudgetError, ProfileError, WorkloadError
from ..capture.inspection import inspect_model
from ..capture.policies.policy import Named, Policy
from ..capture.recording.opening import Opened
from ..capture.recording.stages import Captured
from ..planner import TIME_LIMIT
from ..planner.plan import Plan
from ..planner.plan_words import Workload
from ..planner.planner import PlanOptions, plan_one
from ..profiler.alike.twins import Alike
from ..profiler.profile import measure_opened, open_for_measuring, profile
from ..profiler.stage_kind import Loss
from ..workload.chain import Chain
from ..workload.graph import Graph


def plan(
    workload: Any,
    *sample: Any,
    budget: int | float | str | Budget,
    solver: str = "auto",
    time_limit: float = TIME_LIMIT,
    cache: bool = True,
    progress: bool | None = None,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    capture: bool | None = None,
    never_recompute: Named | Iterable[Named] = (),
    always_recompute: Named | Iterable[Named] = (),
) -> Plan:
    """Find the schedule that takes least time within a budget.

    Args:
        workload: A `Chain` or `Graph`, or an `nn.Module`, which is profiled first.
        sample: One batch for the model; nothing where the workload is a chain or graph.
        budget: Bytes, text such as "64MiB", a share of what storing everything needs such as
            "40%", or a `Budget`.
        solver: Name of a solver. "auto" picks: `chain_dp`, or `run_dp` where long runs of equal
            stages follow each other; `revolve` as well where all are equal; and never something
            dearer than a fitting baseline of those that `compare_baselines` lists. Where
            `chain_dp` is not tried or refuses, it also looks for a good k of `every_<k>`: the best
            for equal stages without a ledger, else one of a grid. A graph is given to
            `graph_search`, up to 40 nodes to `graph_ilp`, which starts from what that finds.
        time_limit: Seconds that `graph_ilp` may take for each budget, roughly and all in all.
            It stops with the best it has, and the bound that it has proven.
        cache: Whether a plan that takes long is kept on disk, and taken from there the next
            time (see `plan_cache`).
        progress: Whether to show a progress bar on stderr where planning takes more than a
            second; None shows it if stderr is a terminal.
        kwargs: Arguments of the model's call by name.
        loss: From the model's output to a scalar, see `profile`.
        capture: Whether to record the model, see `profile`.
        never_recompute: Calls of the model that a step makes once, see `captured`.
        always_recompute: Calls that lean tapes may make again whatever they cost, see `captured`.

    Returns:
        A plan that keeps the budget by simulation, with its certificate.

    Raises:
        BudgetSyntaxError: The budget cannot be read.
        InfeasibleBudgetError: Nothing fits; the message names the least budget that works, with
            never_recompute and without.
        WorkloadError: The solver is unknown or does not take the chain.
        SolverTimeoutError: The time limit ended before anything was found.
        ProfileError: The model cannot be measured, or a policy is not for its calls.
    """
    parse_budget(budget)  # before the model is measured, which takes a while
    policy = Policy.of(never_recompute, always_recompute)
    options: PlanOptions = {"solver": solver, "time_limit": time_limit, "cache": cache}
    if isinstance(workload, Chain | Graph) and policy:
        raise WorkloadError(
            f"{policy} is for a model that is to be measured, and was given with a "
            f"{type(workload).__name__}; give it to profile"
        )
    if isinstance(workload, Chain | Graph) or (capture is False and not policy):
        chain = chain_of(workload, sample, kwargs, loss, capture)
        return plan_measured(chain, budget, progress=progress, **options)
    inspection, alike = inspect_model(workload, "plan", ProfileError), Alike(outlives=True)
    opened = open_for_measuring(inspection, sample, kwargs, loss, capture, policy)

    def measured(way: Opened) -> Chain:
        return measure_opened(way, inspection, sample, kwargs, loss, progress=progress, alike=alike)

    return plan_opened(opened, measured, budget, progress=progress, **options)[0]


def plan_opened(
    opened: Opened,
    measured: Callable[[Opened], Chain],
    budget: int | float | str | Budget,
    *,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> tuple[Plan, Captured | None]:
    """Plan a model in each way to cut it, and take the plan that costs the least time.

    Args:
        opened: The model.
        measured: Measures it in one of the ways.
        budget: As `plan` takes it; a share is one of the first way that fits.
        progress: As in `plan`.
        options: Of `plan`: solver, time_limit, cache.

    Returns:
        The plan, and the recording that it is for, if it is for one.

    Raises:
        InfeasibleBudgetError: In no way anything fits.
    """
    found: list[tuple[Plan, Captured | None]] = []
    failure: InfeasibleBudgetError | None = None
    for way in (opened, *[Opened(other) for other in opened.others]):
        asked = found[0][0].budget_bytes if found else budget
        try:
            plan = plan_measured(measured(way), asked, progress=progress, **options)
        except InfeasibleBudgetError as error:
            failure = _least(failure, error)
        else:
            found.append((plan, way.captured))
    if not found:
        assert failure is not None
        raise failure
    # Seconds of chains that were timed one after the other differ more than their shares.
    plan, captured = min(found, key=lambda pair: pair[0].overhead)
    return replace(plan, budget_text=found[0][0].budget_text), captured


def _least(
    one: InfeasibleBudgetError | None, other: InfeasibleBudgetError
) -> InfeasibleBudgetError:
    """The one that names the lower least budget."""
    if one is None or one.least_budget_bytes is None:
        return other
    least = other.least_budget_bytes
    return other if least is not None and least < one.least_budget_bytes else one


def plan_measured(
    chain: Workload,
    budget: int | float | str | Budget,
    *,
    progress: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Plan a chain or graph, and say where nothing fits because a model could not be recorded.

    Arguments and errors are those of `plan`.
    """
    try:
        return plan_one(chain, budget, progress=progress, **options)
    except InfeasibleBudgetError as error:
        signature = chain.signature
        if signature is None or not signature.whole:
            raise
        why = (
            f"parts of the model are called whole, each in one stage: {signature.whole}"
            if signature.recorded
            else "the model is one stage, so that nothing can be run again in parts, as it could "
            f"not be recorded: {signature.whole}"
        )
        raise InfeasibleBudgetError(
            f"{error}; {why}",
            budget_bytes=error.budget_bytes,
            least_budget_bytes=error.least_budget_bytes,
            stage=error.stage,
        ) from None


def chain_of(
    workload: Any,
    sample: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    capture: bool | None = None,
) -> Workload:
    """The chain or graph itself, or the chain of a model on a sample.

    Args:
        workload: A chain, a graph, or a model.
        sample: What the model is called with.
        kwargs: The same by name.
        loss: From the model's output to a scalar.
        capture: Whether to record the model, see `profile`.

    Raises:
        WorkloadError: A chain, and a sample or a loss.
        ProfileError: The model cannot be measured.
    """
    if not isinstance(workload, Chain | Graph):
        return profile(workload, *sample, kwargs=kwargs, loss=loss, capture=capture)
    if sample or kwargs or loss is not None:
        raise WorkloadError(
            "a chain was profiled with its own sample and loss: plan(chain, budget=...) takes no "
            "others"
        )
    return workload
