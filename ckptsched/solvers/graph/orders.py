"""Other orders in which the nodes of a graph can be counted.

The program of `milp_model` runs nodes in their order, and backwards in the reverse of it.
Where branches lie side by side another order may need fewer bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from ...schedule.language import Backward, Forward, Operation
from ...workload.graph import Graph


@final
@dataclass(frozen=True)
class Reordered:
    """A graph whose nodes are counted anew."""

    graph: Graph
    """The same nodes, with new numbers."""
    order: tuple[int, ...]
    """The old number of each new one; index 0 is the input."""

    def to_old(self, operations: Iterable[Operation]) -> Iterator[Operation]:
        """Runs with the numbers that the nodes had."""
        return _renumbered(operations, self.order)

    def to_new(self, operations: Iterable[Operation]) -> Iterator[Operation]:
        """Runs with the new numbers."""
        number = {old: new for new, old in enumerate(self.order)}
        return _renumbered(operations, number)


def _renumbered(
    operations: Iterable[Operation], number: Sequence[int] | Mapping[int, int]
) -> Iterator[Operation]:
    for operation in operations:
        match operation:
            case Forward(i, tape):
                yield Forward(number[i], tape=tape)
            case Backward(i):
                yield Backward(number[i])
            case _:
                yield operation


def reordered(graph: Graph, order: tuple[int, ...]) -> Reordered:
    """Count the nodes in a topological order, the input first."""
    number = {old: new for new, old in enumerate(order)}
    reads = (tuple(sorted(number[u] for u in graph.reads[i - 1])) for i in order[1:])
    stages = tuple(graph.stages[i - 1] for i in order[1:])
    return Reordered(replace(graph, stages=stages, reads=tuple(reads)), order)


def orders(graph: Graph, most: int) -> tuple[list[Reordered], bool]:
    """The topological orders of a graph, its own first.

    Args:
        graph: The graph.
        most: How many to list; if there are more, its own alone.

    Returns:
        The orders, and whether they are all there are.
    """
    import networkx as nx  # when it is needed: it takes a while

    edges: nx.DiGraph[int] = nx.DiGraph()
    edges.add_nodes_from(range(len(graph) + 1))
    for i, sources in enumerate(graph.reads, 1):
        edges.add_edges_from((u, i) for u in sources)
    found = list(itertools.islice(map(tuple, nx.all_topological_sorts(edges)), most + 1))
    own = tuple(range(len(graph) + 1))
    if len(found) > most:
        return [reordered(graph, own)], False
    others = sorted(order for order in found if order != own)
    return [reordered(graph, order) for order in (own, *others)], True
