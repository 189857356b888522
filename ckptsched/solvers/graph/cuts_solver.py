"""Plans a graph as a chain of segments between the nodes through which everything passes.

A node c is a cut where no edge leads past it: what comes after c reads nothing from before c
but c itself. Between two cuts lies a segment. Run as a whole it is one stage of a chain, which
`chain_dp` plans; networks whose blocks are residual or branched inside become such chains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias, final

from ...base.errors import InfeasibleBudgetError, WorkloadError
from ...schedule.language import Backward, Code, Forward, Operation, Schedule, Turn
from ...schedule.trace import Trace
from ...simulator.simulator import simulate
from ...workload.chain import Chain
from ...workload.graph import Graph
from ...workload.stage import Stage
from ..base import AbstractGraphSolver, Solution, infeasible
from ..baselines import baselines_for
from ..chain.solver import ChainDp
from .to_schedule import on_demand_runs, store_all_runs, with_drops

ALL_SCHEDULES = "all schedules"
"""The class of everything that the simulator lets pass."""

# Beyond this, rules whose operations grow with the square of the nodes are not tried.
_ON_DEMAND_NODES = 300


def cuts(graph: Graph) -> list[int]:
    """The numbers of all cuts, 0 for the input and the last node included, ascending."""
    found, furthest = [], 0
    for i, readers in enumerate(graph.readers):
        if furthest <= i:
            found.append(i)
        furthest = max(furthest, *readers, 0)
    return found


@final
@dataclass(frozen=True)
class MergedChain:
    """The graph's segments as stages; stage k is nodes ends[k-1] + 1 to ends[k]."""

    graph: Graph
    """What was merged."""
    ends: tuple[int, ...]
    """The cuts."""
    chain: Chain
    """The chain; its sizes bound what a segment takes from above."""

    def runs(self, schedule: Schedule) -> Iterator[Operation]:
        """The runs of nodes that a schedule of the chain stands for."""
        for operation in schedule:
            match operation:
                case Forward(k, tape):
                    for i in range(self.ends[k - 1] + 1, self.ends[k] + 1):
                        yield Forward(i, tape=tape)
                case Backward(k):
                    for i in range(self.ends[k], self.ends[k - 1], -1):
                        yield Backward(i)
                case Turn():
                    yield operation

    def lower(self, schedule: Schedule) -> Schedule:
        """The graph's schedule for one of the chain; its peak is no higher."""
        return with_drops(self.graph, list(self.runs(schedule)))


def merge(graph: Graph) -> MergedChain:
    """Merge the nodes between cuts."""
    ends = cuts(graph)
    stages = tuple(_merged(graph, a, b) for a, b in itertools.pairwise(ends))
    return MergedChain(graph, tuple(ends), replace(graph.in_a_row, stages=stages))


def _merged(graph: Graph, a: int, b: int) -> Stage:
    """Nodes a + 1 to b as one stage, which takes what simulating the segment alone shows."""
    if b == a + 1:
        return graph.stages[a]
    segment = Graph(
        stages=graph.stages[a:b],
        reads=tuple(tuple(u - a for u in sources) for sources in graph.reads[a:b]),
        input_name="the input of " + graph.names[a + 1],
        input_gradient_bytes=int(graph.arrays.gradient_bytes[a]),
    )
    m, last = b - a, graph.stages[b - 1]
    kept = store_all_runs(segment)
    tape = sum(stage.tape_bytes for stage in segment.stages)
    new = sum(stage.parameter_gradient_bytes for stage in segment.stages)
    levels = simulate(segment, with_drops(segment, kept)).timeline.tolist()
    twice = with_drops(
        segment, [*(Forward(i) for i in range(1, m + 1)), Turn(), *kept[:m], *kept[m + 1 :]]
    )
    plain = simulate(segment, twice).timeline.tolist()
    forward = max(
        max(levels[:m]) - tape,
        max(plain[: twice.codes.tolist().index(Code.TURN)]) - last.state_bytes,
    )
    backward = max(levels[m + 1 :]) - tape - last.gradient_bytes
    return Stage(
        name=last.name,
        forward_seconds=math.fsum(stage.forward_seconds for stage in segment.stages),
        backward_seconds=math.fsum(stage.backward_seconds for stage in segment.stages),
        state_bytes=last.state_bytes,
        tape_bytes=tape,
        gradient_bytes=last.gradient_bytes,
        forward_overhead_bytes=forward,
        backward_overhead_bytes=max(0, backward - segment.input_gradient_bytes - new),
        parameter_gradient_bytes=new,
    )


Judged: TypeAlias = tuple[Schedule, Trace]
"""A schedule and its simulation."""


def plain_schedules(graph: Graph) -> list[Judged]:
    """What people write by hand: everything kept, or states of all nodes, of cuts, of none."""
    runs = [store_all_runs(graph)]
    if len(graph) <= _ON_DEMAND_NODES:
        everything = range(1, len(graph) + 1)
        runs += [on_demand_runs(graph, set(kept)) for kept in (everything, cuts(graph), ())]
    schedules = [with_drops(graph, each) for each in runs]
    return [(schedule, simulate(graph, schedule)) for schedule in schedules]


@final
@dataclass(frozen=True)
class GraphCuts(AbstractGraphSolver):
    """The graph's segments, planned as a chain by `chain_dp`; plain rules where those are better.

    A path is planned as the chain that it is, with that bound. Else nothing is claimed but that
    no schedule takes less than storing everything.
    """

    name = "graph_cuts"

    def solve_each(
        self, chain: Chain | Graph, budgets: Sequence[int]
    ) -> list[Solution | InfeasibleBudgetError]:
        """Solve for several budgets, with one table where that is possible."""
        if isinstance(chain, Chain):
            return ChainDp().solve_each(chain, budgets)
        merged = merge(chain)
        planned: Sequence[Solution | InfeasibleBudgetError | None] = [None] * len(budgets)
        with suppress(WorkloadError):  # too many segments for it: then rules are all there is
            planned = ChainDp().solve_each(merged.chain, budgets)
        schedules = [rule.schedule(merged.chain) for rule in baselines_for(merged.chain)]
        schedules += [x.schedule for x in planned if isinstance(x, Solution)]
        known = plain_schedules(chain)
        for schedule in map(merged.lower, schedules):
            known.append((schedule, simulate(chain, schedule)))
        return [
            _answer(chain, budget, known, solution)
            for budget, solution in zip(budgets, planned, strict=True)
        ]


def _answer(
    graph: Graph,
    budget: int,
    known: Sequence[Judged],
    planned: Solution | InfeasibleBudgetError | None,
) -> Solution | InfeasibleBudgetError:
    """The best of what is known for one budget."""
    least = min((trace for _, trace in known), key=lambda trace: trace.peak_bytes)
    fitting = [item for item in known if item[1].peak_bytes <= budget]
    if not fitting:
        return infeasible(graph, budget, least, "segmented")
    schedule, trace = min(fitting, key=lambda item: item[1].seconds)
    name, bound = ALL_SCHEDULES, graph.store_all_seconds
    if graph.is_path and isinstance(planned, Solution):
        name, bound = planned.schedule_class, min(planned.lower_bound_seconds, trace.seconds)
    return Solution(
        schedule=schedule,
        trace=trace,
        schedule_class=name,
        lower_bound_seconds=bound,
        least_budget_bytes=least.peak_bytes,
    )
