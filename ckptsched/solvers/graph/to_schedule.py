"""From the order of runs to a schedule on a graph: what is dropped when follows from it.

Methods for graphs decide which node runs when, with tape or without. When a state is needed for
the last time is then a fact, and keeping it longer helps nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import final

from ...schedule.language import Backward, Drop, Forward, Kind, Operation, Schedule, Turn, Value
from ...workload.graph import Graph


def with_drops(graph: Graph, runs: Sequence[Operation]) -> Schedule:
    """Make a schedule of runs: every state goes right after it is needed for the last time.

    Args:
        graph: The graph.
        runs: Forwards, one Turn and a Backward a node, in an order that the rules allow if
            states stay long enough.

    Returns:
        The schedule of least memory with these runs. Runs whose result nothing needs, or is
        there anyway, are left out, and a tape that no Backward consumes is not kept.
    """
    pins = _pins(graph, runs)
    while True:
        needs = _Needs(graph, pins)
        for operation in reversed(runs):
            needs.before(operation)
        if not needs.found:
            return Schedule.of(reversed(needs.operations))
        for i, u in needs.found:  # which may have a state stay longer, and be found in turn
            pins[i].add(u)


def _pins(graph: Graph, runs: Sequence[Operation]) -> dict[int, set[int]]:
    """States that a node's tape was made from, though they are taped before its Backward.

    The tape keeps the bare state then, which a tape made beside it does not replace.
    """
    made, pins = [0] * (len(graph) + 1), {}
    for p, operation in enumerate(runs, 1):
        match operation:
            case Forward(i, tape=True):
                made[i] = p
            case Backward(i):
                pins[i] = {u for u in graph.reads[i - 1] if made[u] > made[i]}
    return pins


@final
class _Needs:
    """What is needed after a point of the schedule, as the point moves to its start."""

    def __init__(self, graph: Graph, pins: Mapping[int, Collection[int]]) -> None:
        self.graph, self.pins = graph, pins
        self.states = bytearray(len(graph) + 1)
        self.tapes = bytearray(len(graph) + 1)
        self.operations: list[Operation] = []  # the last one first
        self.found: list[tuple[int, int]] = []  # further pins: where a run met both copies

    def before(self, operation: Operation) -> None:
        """Move the point to before an operation."""
        match operation:
            case Turn():
                self.read((len(self.graph),))
            case Backward(i):
                self.tapes[i] = 1
                self.read(self.graph.reads[i - 1])
                self.keep(u for u in self.pins[i] if not self.states[u])
            case Forward(i) as run:
                if run.tape and self.tapes[i]:
                    self.tapes[i] = 0
                    self.find_pins(i)
                elif self.states[i] and not self.is_held(i):
                    self.states[i] = 0
                    operation = Forward(i)
                else:
                    return
                self.read(self.graph.reads[i - 1])
            case _:
                raise AssertionError(f"{operation} is no run")
        self.operations.append(operation)

    def find_pins(self, i: int) -> None:
        """Where both copies of what tape i is made from are there, it is the bare state."""
        for u in self.graph.reads[i - 1]:
            if self.states[u] and self.tapes[u] and u not in self.pins[i]:
                self.found.append((i, u))

    def is_held(self, i: int) -> bool:
        """Whether a tape that is kept holds state i, so that it has been there all along."""
        return any(self.tapes[v] for v in self.graph.readers[i])

    def read(self, sources: Iterable[int]) -> None:
        """Need states; one that is not in a tape, and not needed later, goes here."""
        self.keep(u for u in sources if not self.states[u] and not self.tapes[u])

    def keep(self, states: Iterable[int]) -> None:
        """Have states that go here."""
        for u in states:
            self.states[u] = 1
            self.operations.append(Drop(Value(Kind.STATE, u)))


def store_all_runs(graph: Graph) -> list[Operation]:
    """Every tape is kept, as plain autograd does."""
    n = len(graph)
    forwards: list[Operation] = [Forward(i, tape=True) for i in range(1, n + 1)]
    return [*forwards, Turn(), *(Backward(i) for i in range(n, 0, -1))]


def on_demand_runs(graph: Graph, kept: Collection[int]) -> list[Operation]:
    """Runs that keep some states, and before each backward make what it needs from those.

    Args:
        graph: The graph.
        kept: Numbers of nodes whose states stay from the forward pass to their backward. None:
            every backward starts from the input.
    """
    n = len(graph)
    runs: list[Operation] = [Forward(i, tape=i == n) for i in range(1, n + 1)]
    runs.append(Turn())
    for b in range(n, 0, -1):
        if b < n:
            needed = set(graph.reads[b - 1])
            for i in range(b - 1, 0, -1):
                if i in needed and i not in kept:
                    needed.update(graph.reads[i - 1])
            runs += [Forward(i) for i in sorted(needed - {0}) if i not in kept]
            runs.append(Forward(b, tape=True))
        runs.append(Backward(b))
    return runs
