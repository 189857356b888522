"""Graphs for tests: small random ones, and networks that are no chains."""

from __future__ import annotations

import itertools
import random

import networkx as nx
from hypothesis import strategies as st

from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage
from tests.support.strategies import SECONDS, SMALL, stages


@st.composite
def graphs(draw: st.DrawFn, most_nodes: int = 4) -> Graph:
    """A graph with small numbers, whose loss sees the one node that no other reads."""
    n = draw(st.integers(1, most_nodes))
    reads = [sorted(draw(st.sets(st.integers(0, i - 1), min_size=1))) for i in range(1, n)]
    unread = set(range(1, n)) - {u for sources in reads for u in sources}
    reads.append(sorted(unread | draw(st.sets(st.integers(0, n - 1), min_size=not unread))))
    return Graph(
        stages=tuple(named(draw(stages()), f"v{i}") for i in range(1, n + 1)),
        reads=tuple(map(tuple, reads)),
        input_bytes=draw(SMALL),
        input_gradient_bytes=draw(SMALL),
        loss_seconds=draw(SECONDS),
        loss_overhead_bytes=draw(SMALL),
        held_bytes=draw(SMALL),
    )


def named(stage: Stage, name: str) -> Stage:
    """A stage by another name."""
    fields = {field: getattr(stage, field) for field in Stage.__dataclass_fields__}
    return Stage(**(fields | {"name": name}))


def network(edges: list[tuple[str, str]], seed: int, scales: dict[str, int] | None = None) -> Graph:
    """A network by its edges from "input" on, with figures drawn from the seed.

    Args:
        edges: What is read, and who reads it.
        seed: Of the figures.
        scales: Factors of the bytes of some nodes, 1 for others.
    """
    source = random.Random(seed)
    graph: nx.DiGraph = nx.DiGraph(
        input_bytes=8, input_gradient_bytes=8, loss_seconds=1.0, loss_overhead_bytes=2
    )
    graph.add_node("input")
    graph.add_edges_from(edges)
    for node in list(graph)[1:]:
        state = source.randint(4, 12) * (scales or {}).get(node, 1)
        graph.nodes[node]["stage"] = Stage(
            forward_seconds=float(source.randint(1, 9)),
            backward_seconds=float(source.randint(2, 18)),
            state_bytes=state,
            tape_bytes=state * source.randint(1, 3) + source.randint(0, 5),
            gradient_bytes=state,
            forward_overhead_bytes=source.randint(0, 6),
            backward_overhead_bytes=source.randint(0, 6),
        )
    return Graph.from_networkx(graph)


def residual(blocks: int = 3, seed: int = 1) -> Graph:
    """Blocks of two convolutions and a sum with what went in; every sum is a cut."""
    edges, entry = [], "input"
    for b in range(blocks):
        first, second, total = (f"b{b}.{name}" for name in ("conv1", "conv2", "add"))
        edges += [(entry, first), (first, second), (second, total), (entry, total)]
        entry = total
    return network([*edges, (entry, "head")], seed)


def u_net(depth: int = 3, seed: int = 2) -> Graph:
    """Down, bottom, up; each level of the way up also reads that of the way down."""
    edges, entry = [], "input"
    scales = {}
    for d in range(depth):
        edges.append((entry, f"down{d}"))
        scales |= {f"down{d}": 2 ** (depth - d), f"up{d}": 2 ** (depth - d)}
        entry = f"down{d}"
    edges.append((entry, "bottom"))
    entry = "bottom"
    for d in reversed(range(depth)):
        edges += [(entry, f"up{d}"), (f"down{d}", f"up{d}")]
        entry = f"up{d}"
    return network([*edges, (entry, "head")], seed, scales)


def two_branches(length: int = 3, seed: int = 3) -> Graph:
    """Two branches that start from the input and are joined at the end."""
    edges = []
    for branch in "ab":
        names = ["input", *(f"{branch}{i}" for i in range(length)), "join"]
        edges += itertools.pairwise(names)
    return network([*edges, ("join", "head")], seed)
