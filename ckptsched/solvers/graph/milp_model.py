"""Rematerialisation on a graph as a mixed-integer program.

After Jain et al., Checkmate (arXiv 1910.02653), section 4: time is cut into phases, and a phase
runs nodes in topological order. Here a phase ends with Turn or with one Backward, a node may be
kept as a state or as a tape, and a tape pins what it was made from. What is kept over a phase's
slots follows from the runs, so that only runs and tapes are whole numbers; the rest of
variables is continuous. Variables and constraints stand in `docs/concepts/graphs.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias, final

import pulp

from ...schedule.language import Backward, Forward, Operation, Turn
from ...schedule.trace import Trace
from ...workload.graph import Graph

# Bytes are counted in their common divisor where the budget has at most so many, else in a unit
# that makes it so many, and rounded to whole units. What fits and what does not then differ by a
# unit, far above a solver's tolerance: HiGHS has lost optima that took a millionth of a unit more.
_MOST_UNITS = 100_000
# Seconds that are whole numbers stay so, as solvers make use of it; else storing everything
# takes so many units.
_SECONDS = 1_000.0
# By how much a reduced cost may be wrong.
_TOLERANCE = 1e-7

Term: TypeAlias = pulp.LpVariable | int
"""A variable, or the 0 or 1 that it can only be."""


@final
@dataclass(eq=False)
class Sweep:
    """One run through the nodes; each is run at most once, in their order."""

    top: int
    """The highest node that has not had its backward."""
    ends: int | None
    """The node whose Backward ends it, 0 for Turn, None for neither."""
    fixed_bytes: int
    """What is there throughout: input, gradients, what the caller holds."""
    run: dict[int, Term] = field(default_factory=dict)
    """Whether a node is run without tape."""
    old: dict[int, Term] = field(default_factory=dict)
    """Whether its state is there from the sweep's start to the node's turn."""
    until: dict[tuple[int, int], Term] = field(default_factory=dict)
    """Whether its state is there from the node's turn to that of a reader."""
    end: dict[int, Term] = field(default_factory=dict)
    """Whether its state is there to the sweep's end."""
    taped: dict[int, Term] = field(default_factory=dict)
    """Whether its tape is there when the sweep starts."""
    bare: dict[tuple[int, int], Term] = field(default_factory=dict)
    """Whether the tape of a reader keeps its state, and not its tape: to the reader's Backward."""


@final
class GraphModel:
    """The program for one graph, in PuLP."""

    def __init__(
        self,
        graph: Graph,
        budget_bytes: int | None,
        *,
        sweeps: int = 1,
        rounds_up: bool = False,
        before_sweep: Callable[[], object] = lambda: None,
    ) -> None:
        """Write the program down.

        Args:
            graph: The graph.
            budget_bytes: Bytes that the peak may reach; seconds are minimised. None: the peak
                is minimised, whatever it costs.
            sweeps: How often a phase may go through the nodes.
            rounds_up: Whether sizes are rounded up, so that every solution fits; else down, so
                that nothing that fits is lost and bounds hold.
            before_sweep: Called again and again while the program is written; may raise.
        """
        self.graph, columns, self.budget_bytes = graph, graph.arrays, budget_bytes
        self.byte_unit, self._rounds_up = _byte_unit(graph, budget_bytes), rounds_up
        self.second_unit = _second_unit(graph)
        self.sweeps = _sweeps(graph, sweeps)
        self._first_phase = sweeps  # the first sweep after Turn
        self._state, self._tape, self._forward, self._backward, self._grad, self._new = (
            [self._units(x) for x in column.tolist()]
            for column in (
                columns.state_bytes,
                columns.tape_bytes,
                columns.forward_overhead_bytes,
                columns.backward_overhead_bytes,
                columns.gradient_bytes,
                columns.parameter_gradient_bytes,
            )
        )
        self.problem = pulp.LpProblem("rematerialisation", pulp.LpMinimize)
        self._variables = 0
        self._declare()
        self.limit = self._aim()
        for p, sweep in enumerate(self.sweeps):
            before_sweep()
            self._link(p, sweep)
            self._pin(p, sweep)
            self._bound_bytes(p, sweep)
        self._reach_the_loss()

    def _aim(self) -> pulp.LpVariable | float:
        """Set what is minimised, and give the units that the peak may reach."""
        if self.budget_bytes is None:
            peak = self.problem.add_variable("peak", 0)
            self.problem.setObjective(pulp.lpSum([peak]))
            return peak
        seconds = self.graph.arrays.forward_seconds / self.second_unit
        runs = (item for sweep in self.sweeps for item in sweep.run.items())
        self.problem.setObjective(pulp.lpSum(float(seconds[v]) * run for v, run in runs))
        return self.budget_bytes // self.byte_unit

    def _units(self, size: int) -> int:
        """Whole units of a size."""
        return -(-size // self.byte_unit) if self._rounds_up else size // self.byte_unit

    # ---- variables ----------------------------------------------------------------------

    def _declare(self) -> None:
        for p, sweep in enumerate(self.sweeps):
            # After Turn it is the tape of the highest node that a phase is for.
            goal = sweep.top if p >= self._first_phase else None
            for v in range(1, sweep.top + 1):
                sweep.taped[v] = self._whole(f"taped_{p}_{v}") if p else 0
                sweep.run[v] = 0 if v == goal else self._whole(f"run_{p}_{v}")
                sweep.old[v] = 0 if v == goal or not p else self._share(f"old_{p}_{v}")
                sweep.end[v] = 0 if v == goal else self._share(f"end_{p}_{v}")
                for w in self.graph.readers[v]:
                    if w <= sweep.top:
                        sweep.until[v, w] = self._share(f"until_{p}_{v}_{w}")
                        sweep.bare[v, w] = self._share(f"bare_{p}_{v}_{w}") if p else 0

    def _whole(self, name: str) -> pulp.LpVariable:
        self._variables += 1
        return self.problem.add_variable(name, cat=pulp.LpBinary)

    def _share(self, name: str) -> pulp.LpVariable:
        self._variables += 1
        return self.problem.add_variable(name, 0, 1)

    def _kept(self, p: int, v: int) -> Term:
        """Whether the tape of v is there when sweep p starts; 1 after its backward."""
        return self.sweeps[p].taped.get(v, 1) if p < len(self.sweeps) else 1

    def _present(self, sweep: Sweep, v: int, slot: int) -> Term:
        """Whether state v is there when the node of a slot has its turn."""
        if slot <= v:
            return sweep.old[v]
        for w in self.graph.readers[v]:
            if slot <= w <= sweep.top:
                return sweep.until[v, w]
        return sweep.end[v]

    # ---- constraints --------------------------------------------------------------------

    def _add(self, *constraints: pulp.LpConstraint | bool) -> None:
        for constraint in constraints:
            if isinstance(constraint, bool):  # of numbers alone
                assert constraint
            else:
                self.problem.addConstraint(constraint)

    def _link(self, p: int, sweep: Sweep) -> None:
        """A state is there only after a run, and from then on; no run makes what is there."""
        for v in range(1, sweep.top + 1):
            before = sweep.old[v] + sweep.run[v]
            then = self._kept(p + 1, v)
            for w in self.graph.readers[v]:
                if w <= sweep.top:
                    self._add(sweep.until[v, w] <= before)
                    before = sweep.until[v, w]
            self._add(sweep.end[v] <= before, sweep.taped[v] <= then)
            if p:
                earlier = self.sweeps[p - 1].end.get(v, 0)
                self._add(sweep.old[v] <= earlier)
            # What follows cuts off no schedule that is worth having.
            kept = pulp.lpSum(sweep.bare.get((v, w), 0) for w in self.graph.readers[v])
            self._add(sweep.run[v] + then <= 1, sweep.end[v] + then <= 1 + kept)
            self._add(sweep.old[v] + sweep.run[v] <= 1, sweep.old[v] + sweep.taped[v] <= 1 + kept)

    def _pin(self, p: int, sweep: Sweep) -> None:
        """Who runs, and who has a tape, has all that it reads."""
        for w in range(1, sweep.top + 1):
            start, then = sweep.taped[w], self._kept(p + 1, w)
            for u in self.graph.reads[w - 1]:
                if u:
                    kept = self._kept(p + 1, u)
                    self._add(sweep.old[u] + sweep.taped[u] >= start)
                    self._add(sweep.end[u] + kept >= then)
                    self._add(sweep.until[u, w] + kept >= sweep.run[w] + then - start)
                    self._pin_state(p, sweep, u, w)

    def _pin_state(self, p: int, sweep: Sweep, u: int, w: int) -> None:
        """A tape that was made from a bare state keeps it, even where u is taped beside it.

        A run reads the bare state where both copies are there.
        """
        bare = sweep.bare[u, w]
        if p:
            self._add(bare >= sweep.taped[w] - sweep.taped[u], sweep.end[u] >= bare)
            self._add(bare >= self.sweeps[p - 1].bare[u, w])
        after = self.sweeps[p + 1].bare.get((u, w)) if p + 1 < len(self.sweeps) else None
        if after is not None and len(self.graph.readers[u]) > 1:  # else nothing keeps both copies
            taped = self._kept(p + 1, w) - sweep.taped[w]
            self._add(after >= taped + sweep.until[u, w] - 1)

    def _bound_bytes(self, p: int, sweep: Sweep) -> None:
        """What is there while each node has its turn, and while Turn or a Backward runs."""
        for v in range(1, sweep.top + 1):
            terms = self._level(p, sweep, v)
            taped = self._kept(p + 1, v) - sweep.taped[v]
            terms += [(self._state[v] + self._forward[v]) * sweep.run[v]]
            terms += [(self._tape[v] + self._forward[v]) * taped]
            self._fit(sweep, terms)
        terms = self._level(p, sweep, sweep.top + 1)
        if sweep.ends == 0:
            overhead = self._units(self.graph.loss_overhead_bytes)
            self._fit(sweep, [*terms, self._grad[-1] + overhead])
        elif sweep.ends is not None:
            b = sweep.ends
            fresh = sum(self._grad[u] for u in self.graph.reads[b - 1])
            self._fit(sweep, [*terms, fresh + self._backward[b] + self._new[b]])

    def _level(self, p: int, sweep: Sweep, slot: int) -> list[pulp.LpAffineExpression | float]:
        """Bytes of states and tapes before the node of a slot has its turn."""
        nodes = range(1, sweep.top + 1)
        terms: list[pulp.LpAffineExpression | float] = []
        terms += [self._state[v] * self._present(sweep, v, slot) for v in nodes]
        for v in nodes:
            terms.append(self._tape[v] * (self._kept(p + 1, v) if v < slot else sweep.taped[v]))
        return terms

    def _fit(self, sweep: Sweep, terms: Iterable[pulp.LpAffineExpression | float]) -> None:
        fixed = self._units(sweep.fixed_bytes)
        self._add(pulp.lpSum(terms) + fixed <= self.limit)

    def _reach_the_loss(self) -> None:
        """The loss needs the last node, and that needs every other."""
        n, first = len(self.graph), self._first_phase
        self._add(self.sweeps[first - 1].end[n] + self._kept(first, n) >= 1)
        for v in range(1, n + 1):
            runs = pulp.lpSum(sweep.run[v] for sweep in self.sweeps[:first])
            total = runs + self._kept(first, v)
            self._add(total == 1 if first == 1 else total >= 1)

    # ---- solutions ----------------------------------------------------------------------

    def runs(self) -> list[Operation]:
        """The runs of the solution that the variables hold."""
        operations: list[Operation] = []
        for p, sweep in enumerate(self.sweeps):
            for v, run in sweep.run.items():
                if _value(self._kept(p + 1, v)) > _value(sweep.taped[v]):
                    operations.append(Forward(v, tape=True))
                elif _value(run):
                    operations.append(Forward(v))
            if sweep.ends is not None:
                operations.append(Backward(sweep.ends) if sweep.ends else Turn())
        return operations

    def start(self, operations: Iterable[Operation]) -> dict[pulp.LpVariable, int] | None:
        """Values of the whole variables for a schedule; None where it is not of the class."""
        runs = self._by_sweep(operations)
        if runs is None:
            return None
        values: dict[Term, int] = {}
        taped: set[int] = set()
        for sweep, found in zip(self.sweeps, runs, strict=True):
            for v in range(1, sweep.top + 1):
                values[sweep.taped[v]] = int(v in taped)
                values[sweep.run[v]] = int(found.get(v) is False)
            taped |= {v for v, tape in found.items() if tape}
        return {x: value for x, value in values.items() if not isinstance(x, int)}

    def _by_sweep(self, operations: Iterable[Operation]) -> list[dict[int, bool]] | None:
        """The nodes that each sweep runs, and whether with tape."""
        runs: list[dict[int, bool]] = [{} for _ in self.sweeps]
        p, reached = 0, 0
        for operation in operations:
            match operation:
                case Forward(v, tape):
                    if v <= reached:
                        p, reached = p + 1, 0
                        if self.sweeps[p - 1].ends is not None:
                            return None
                    runs[p][v], reached = tape, v
                case Turn() | Backward():
                    ends = operation.stage if isinstance(operation, Backward) else 0
                    while self.sweeps[p].ends is None:
                        p += 1
                    if self.sweeps[p].ends != ends:
                        return None
                    p, reached = p + 1, 0
        return runs

    def at_most(self, trace: Trace) -> None:
        """Ask for a solution that is no worse than a known schedule."""
        if self.budget_bytes is None:
            known: float = trace.peak_bytes // self.byte_unit
        else:
            known = (trace.seconds - self.graph.store_all_seconds) / self.second_unit
        self._add(self.problem.objective <= known + self._margin)

    @property
    def _margin(self) -> float:
        """By how much a solver's bound may be wrong: its tolerance on every variable."""
        return _TOLERANCE * self._variables

    def bound(self, bound: float) -> float:
        """The least seconds of the step, or the least peak in bytes, from a solver's bound.

        Args:
            bound: Of the program's objective; infinite where it has no solution.
        """
        if math.isinf(bound):
            return max(0.0, bound)
        units = max(0.0, bound - self._margin)
        if self.budget_bytes is None:
            return math.ceil(units) * self.byte_unit
        units = math.ceil(units) if self.second_unit == 1.0 else units
        return self.graph.store_all_seconds + units * self.second_unit


def _value(term: Term) -> int:
    return term if isinstance(term, int) else round(term.varValue)


def _sweeps(graph: Graph, sweeps: int) -> list[Sweep]:
    """The sweeps of all phases: to Turn, then to each Backward."""
    n, columns = len(graph), graph.arrays
    found = []
    for ends in (0, *range(n, 0, -1)):
        top = ends or n
        fixed = graph.input_bytes + graph.held_bytes
        fixed += int(columns.parameter_gradient_bytes[top + 1 :].sum())
        for u in range(top + 1):
            begun = ends if u == n else any(v > top for v in graph.readers[u])
            fixed += int(columns.gradient_bytes[u]) if begun else 0
        found += [Sweep(top, None, fixed) for _ in range(sweeps - 1)]
        found.append(Sweep(top, ends, fixed))
    return found


def _byte_unit(graph: Graph, budget_bytes: int | None) -> int:
    columns = graph.arrays
    sizes = [
        graph.input_bytes,
        graph.held_bytes,
        graph.loss_overhead_bytes,
        *columns.state_bytes.tolist(),
        *columns.tape_bytes.tolist(),
        *columns.gradient_bytes.tolist(),
        *columns.forward_overhead_bytes.tolist(),
        *columns.backward_overhead_bytes.tolist(),
        *columns.parameter_gradient_bytes.tolist(),
    ]
    divisor = math.gcd(*sizes) or 1
    most = sum(sizes) if budget_bytes is None else budget_bytes
    return divisor if most <= divisor * _MOST_UNITS else -(-most // _MOST_UNITS)


def _second_unit(graph: Graph) -> float:
    seconds, total = graph.arrays.forward_seconds.tolist(), graph.store_all_seconds
    if total <= _MOST_UNITS and all(x.is_integer() for x in seconds):
        return 1.0
    return total / _SECONDS
