"""A plan: a schedule that was checked against its chain and budget, and how good it is.

Plans are saved as readable JSON. A file carries the chain it was made for, so that loading
can run the schedule on paper again instead of trusting the figures beside it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from ..base.budget import format_seconds
from ..base.errors import CkptschedError, InvalidScheduleError, PlanMismatchError, WorkloadError
from ..base.json_files import fault_of_seal, read_json, render_json, sealed, write_atomically
from ..schedule.language import (
    Schedule,
    schedule_from_json,
    schedule_to_json,
)
from ..schedule.trace import Trace
from ..simulator.simulator import simulate
from ..workload.chain import Chain
from ..workload.graph import Graph
from .explorer.content import Shown, Verified
from .explorer.notebook import plan_html
from .explorer.other_viewers import chrome_trace_of, snapshot_of
from .explorer.page import page_of
from .plan_words import Workload, excess, kind_of, table_of
from .run_once import run_again

if TYPE_CHECKING:
    from .explanation import Explanation

FORMAT = "ckptsched plan"
VERSION = 1
_AGAIN = "plan again and save the new plan"
# Of the certificate: key and attribute, and the type that it must have.
_CERTIFICATE: dict[str, type] = {
    "solver": str,
    "schedule_class": str,
    "budget_bytes": int,
    "budget_text": str,
    "store_all_bytes": int,
    "least_budget_bytes": int,
    "lower_bound_seconds": float,
    "rounding_unit_bytes": int,
}


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A schedule that keeps a budget by simulation, with its certificate."""

    chain: Workload
    """What was planned: a chain, or a graph."""
    schedule: Schedule
    """The operations."""
    trace: Trace
    """Their simulation: peak, seconds, what is live at the peak."""
    solver: str
    """Name of the solver that found the schedule."""
    schedule_class: str
    """Name of the class of schedules that the lower bound holds for."""
    budget_bytes: int
    """Bytes that the step may use."""
    budget_text: str
    """The budget as it was asked for, such as "40%"."""
    store_all_bytes: int
    """Peak of the step when everything is stored, in bytes."""
    least_budget_bytes: int
    """Least budget for which a schedule is known."""
    lower_bound_seconds: float
    """No schedule of the class that fits the budget takes less."""
    rounding_unit_bytes: int = 1
    """The solver counted memory in multiples of this many bytes."""

    @property
    def seconds(self) -> float:
        """Projected seconds of the step."""
        return self.trace.seconds

    @property
    def peak_bytes(self) -> int:
        """Projected peak in bytes."""
        return self.trace.peak_bytes

    @property
    def forwards(self) -> int:
        """Runs of stages forward, with and without tape; at least one a stage."""
        return self.trace.forwards

    @property
    def gap(self) -> float:
        """By how much the seconds may exceed the optimum of the class, as a share of it."""
        return excess(self.seconds, self.lower_bound_seconds)

    @property
    def overhead(self) -> float:
        """Seconds of recomputation, as a share of the seconds of storing everything."""
        return excess(self.seconds, self.chain.store_all_seconds)

    @property
    def loss_to_rounding(self) -> float:
        """What counting memory in units costs at most, as a share of the lower bound.

        Zero where the unit divides all sizes that are counted; else no more than the gap.
        """
        return 0.0 if self.rounding_unit_bytes == 1 or _divides(self) else self.gap

    @property
    def fingerprint(self) -> str:
        """Digest of the chain that the plan is for."""
        return self.chain.fingerprint

    def __repr__(self) -> str:
        """One line; `str` gives the table."""
        return (
            f"<Plan by {self.solver}: {len(self.chain)} stages, {self.peak_bytes} of "
            f"{self.budget_bytes} bytes, {format_seconds(self.seconds)}>"
        )

    def __str__(self) -> str:
        """A table for people."""
        return table_of(self)

    def explain(self) -> Explanation:
        """Why this plan: what binds it, what other budgets would buy, how baselines compare.

        Plans again for budgets nearby, which takes about as long as planning did.

        Returns:
            What `print` shows as text.
        """
        from .explanation import explain_plan  # it stands above the planner: it plans

        return explain_plan(self)

    def to_html(self, path: str | os.PathLike[str], *, verified: Verified | None = None) -> None:
        """Write the plan as a page to explore it in a browser: one file, which asks for no other.

        Args:
            path: The file; it appears there whole or not at all.
            verified: What `verify` found of the plan, to be shown beside what is projected.
        """
        shown = Shown(plan=self, measured=verified.measured if verified else None)
        write_atomically(path, page_of(self.chain, [shown]))

    def to_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write what the plan will allocate as a file of PyTorch's memory viewer, before any run.

        Args:
            path: The file, such as "plan.pickle", to be dropped on https://pytorch.org/memory_viz;
                it appears there whole or not at all.
        """
        write_atomically(path, snapshot_of(self))

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write operations and bytes over projected seconds as trace events, for Perfetto.

        Args:
            path: The file, such as "plan.json"; it appears there whole or not at all.
        """
        write_atomically(path, json.dumps(chrome_trace_of(self)))

    def _repr_html_(self) -> str:
        """For notebooks: the figures as a table, and the bytes over the step."""
        return plan_html(self)

    def to_json(self, *, with_chain: bool = True) -> dict[str, Any]:
        """The plan as JSON data, with fingerprint and checksum.

        Args:
            with_chain: Whether the chain or graph is in it; without, `from_json` must be given it.
        """
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "certificate": {
                **{key: getattr(self, key) for key in _CERTIFICATE},
                "peak_bytes": self.peak_bytes,
                "seconds": self.seconds,
                "forwards": self.forwards,
                "peak_operation": self.trace.peak_operation,
            },
            "schedule": schedule_to_json(self.schedule),
        }
        if not with_chain:
            content["by_value"] = isinstance(self.chain, Graph) and self.chain.lined is not None
        else:
            content[kind_of(self.chain)] = self.chain.to_json()
        return sealed(content)

    @classmethod
    def from_json(
        cls, data: Any, source: str = "the data", *, chain: Workload | None = None
    ) -> Plan:
        """Read a plan and check that it is whole and true.

        Args:
            data: What `to_json` gave.
            source: Where it is from, for messages.
            chain: The chain or graph that it is for, where the data leave it out; a plan of the
                graph of a recorded model may be given its chain.

        Raises:
            PlanMismatchError: No plan, another version, damaged, or a schedule that does
                not do what the plan says.
        """
        return _read(data, source, chain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file; it appears there whole or not at all."""
        write_atomically(path, render_json(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, certify: bool = True) -> Plan:
        """Read a plan from a JSON file, and work its certificate out again.

        Args:
            path: A file that `save` wrote.
            certify: Whether to plan again for the lower bound and the least budget, which takes
                about as long as planning did; of the file only the schedule is believed. Without,
                they are what is known at once: the seconds of storing everything, and the peak.

        Raises:
            PlanMismatchError: See `from_json`; also where there is no such file.
        """
        advice = f"restore the file, or {_AGAIN}; plan.save(path) writes one"
        data = read_json(path, PlanMismatchError, advice)
        return cls.from_saved(data, repr(str(path)), certify=certify)

    @classmethod
    def from_saved(cls, data: Any, source: str, *, certify: bool = True) -> Plan:
        """The same of the data of a file.

        Args:
            data: The data.
            source: Where they are from, for messages.
            certify: As in `load`.
        """
        from .planner import certified_again  # it stands above: it plans

        return certified_again(cls.from_json(data, source), search=certify)


def _check_seal(data: Any, source: str) -> None:
    """Refuse what is no plan, of another version, or changed after it was written."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        is_chain = isinstance(data, dict) and "u_f" in data
        found = "a chain: `ckptsched plan` makes a plan of it" if is_chain else "something else"
        raise PlanMismatchError(f"{source} does not hold a plan but {found}")
    if data.get("version") != VERSION:
        raise PlanMismatchError(
            f"{source} has version {data.get('version')!r}, this ckptsched reads {VERSION}: "
            + _AGAIN
        )
    if fault := fault_of_seal(data):
        raise PlanMismatchError(f"{source} is damaged: {fault}; restore the file, or {_AGAIN}")


def _workload_from(data: Any) -> Workload:
    """The chain of a plan's data, or its graph."""
    return Graph.from_json(data["graph"]) if "graph" in data else Chain.from_json(data["chain"])


def _read(data: Any, source: str, chain: Workload | None) -> Plan:
    _check_seal(data, source)
    try:
        chain = _workload_from(data) if chain is None else chain
        if isinstance(chain, Chain) and data.get("by_value"):
            chain = Graph.of_values(chain)
        schedule = schedule_from_json(data["schedule"])
        figures = data["certificate"]
        certificate = {key: _typed(figures, key, kind) for key, kind in _CERTIFICATE.items()}
        peak, seconds = _typed(figures, "peak_bytes", int), _typed(figures, "seconds", float)
    except (CkptschedError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise PlanMismatchError(
            f"{source} is no plan that can be read ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    if chain.fingerprint != data.get("fingerprint"):
        raise PlanMismatchError(
            f"{source} was made for the chain {str(data.get('fingerprint'))[:16]}..., but comes "
            f"with the chain {chain.fingerprint[:16]}...; {_AGAIN}"
        )
    try:
        trace = simulate(chain, schedule)
    except (InvalidScheduleError, WorkloadError) as error:
        raise PlanMismatchError(f"{source} holds a bad schedule: {error}; {_AGAIN}") from error
    # Sums of seconds may differ in the last digits between machines; bytes may not.
    if trace.peak_bytes != peak or not math.isclose(trace.seconds, seconds, rel_tol=1e-9):
        raise PlanMismatchError(
            f"{source} promises {peak} bytes and {seconds} s, its schedule takes "
            f"{trace.peak_bytes} bytes and {trace.seconds} s; {_AGAIN}"
        )
    plan = Plan(chain=chain, schedule=schedule, trace=trace, **certificate)
    if fault := _fault(plan):
        raise PlanMismatchError(f"{source} cannot be true: {fault}; {_AGAIN}")
    return plan


def _fault(plan: Plan) -> str:
    """What of a certificate its own schedule disproves; empty where nothing is."""
    if plan.peak_bytes > plan.budget_bytes:
        return f"the peak of {plan.peak_bytes} bytes exceeds the budget of {plan.budget_bytes}"
    if plan.rounding_unit_bytes < 1:
        return f"rounding_unit_bytes is {plan.rounding_unit_bytes}, it must be 1 or more"
    if again := run_again(plan.chain, plan.schedule):
        return f"the schedule runs stage {again[0]} again, which is to run once"
    bound = plan.lower_bound_seconds
    if not math.isfinite(bound) or bound > plan.seconds * (1 + 1e-9):
        return f"the lower bound is {bound} s, the schedule takes {plan.seconds} s"
    return ""


def _typed(certificate: Any, key: str, expected: type) -> Any:
    value = certificate[key]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or isinstance(value, bool):
        raise TypeError(f"{key} must be {expected.__name__}, found {value!r}")
    return value


def _divides(plan: Plan) -> bool:
    """Whether the unit divides the planning model's sizes; ledgers and options have more."""
    chain, unit = plan.chain, plan.rounding_unit_bytes
    if chain.has_ledger or any(stage.other_tapes for stage in chain.stages):
        return False
    columns = chain.arrays
    sizes = (
        columns.state_bytes,
        columns.tape_bytes,
        columns.gradient_bytes,
        columns.forward_overhead_bytes,
        columns.backward_overhead_bytes,
        columns.parameter_gradient_bytes,
    )
    heads = (chain.held_bytes, chain.loss_overhead_bytes)
    return all(not (column % unit).any() for column in sizes) and not any(x % unit for x in heads)
