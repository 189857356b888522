"""What the search on graphs gains over whole segments, and what the integer program proves.

Prints a table: nodes, budget as a share of storing everything, seconds beyond storing
everything by `graph_cuts`, by `graph_search` (on a path both are `chain_dp`) and by `graph_ilp`,
which starts from what the search finds, the gap to the program's bound, and the time of each.

    python -m benchmarks.graphs [--limit 60] [--most-nodes 60]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptsched.base.errors import CkptschedError
from ckptsched.solvers import GraphCuts, GraphIlp, GraphSearch
from ckptsched.solvers.base import Solution
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage

INSTANCES = Path(__file__).resolve().parents[1] / "instances"
SHARES = (0.7, 0.5, 0.35)


def network(edges: list[tuple[int, int]], seed: int) -> Graph:
    """A network of nodes 1 to n by its edges, 0 the input, with measured-looking figures."""
    source = random.Random(seed)
    n = max(v for _, v in edges)
    stages = []
    for i in range(1, n + 1):
        state = source.randint(2**20, 2**24)
        stages.append(
            Stage(
                name=f"v{i}",
                forward_seconds=source.uniform(1e-3, 1e-2),
                backward_seconds=source.uniform(2e-3, 2e-2),
                state_bytes=state,
                tape_bytes=int(state * source.uniform(1, 4)),
                gradient_bytes=state,
                forward_overhead_bytes=source.randint(0, 2**20),
                backward_overhead_bytes=source.randint(0, 2**20),
            )
        )
    reads = tuple(tuple(sorted(u for u, v in edges if v == i)) for i in range(1, n + 1))
    return Graph(stages=tuple(stages), reads=reads, input_gradient_bytes=2**20)


def residual(blocks: int) -> Graph:
    """Blocks of two nodes and a sum with what went in."""
    edges = []
    for entry in range(0, 3 * blocks, 3):
        edges += [(entry, entry + 1), (entry + 1, entry + 2), (entry + 2, entry + 3)]
        edges.append((entry, entry + 3))
    return network(edges, blocks)


def u_net(depth: int) -> Graph:
    """Two nodes a level down and two up, which reads the level of the way down as well."""
    n = 4 * depth + 2
    edges = [(i, i + 1) for i in range(n)]
    edges += [(2 * d, n + 1 - 2 * d) for d in range(1, depth + 1)]
    return network(edges, depth)


def two_branches(length: int) -> Graph:
    """Two branches side by side, joined, and a head."""
    join = 2 * length + 1
    edges = [(0, 1), (0, length + 1), (length, join), (2 * length, join), (join, join + 1)]
    edges += [(i, i + 1) for i in range(1, 2 * length) if i != length]
    return network(edges, length)


def workloads() -> Iterator[tuple[str, Graph]]:
    """Paths, then graphs that are none."""
    for name in ("resnet50_b32", "random_n20_s0", "random_n50_s0", "random_n100_s0"):
        if (INSTANCES / f"{name}.json").exists():
            yield name, Graph.from_chain(Chain.load(INSTANCES / f"{name}.json"))
    for blocks in (4, 8, 16):
        yield f"residual, {blocks} blocks", residual(blocks)
    for depth in (3, 6, 10):
        yield f"U-Net, {depth} levels", u_net(depth)
    for length in (3, 6, 12):
        yield f"two branches of {length}", two_branches(length)


def timed(solve: Callable[[], Solution]) -> tuple[Solution | None, float]:
    """A solution, None where there is none, and the seconds that it took."""
    start = time.perf_counter()
    try:
        return solve(), time.perf_counter() - start
    except CkptschedError:
        return None, time.perf_counter() - start


def row(name: str, graph: Graph, share: float, budget: int, limit: float) -> str:
    """One line of the table."""
    cells = [f"{name:24}", f"{len(graph):4}", f"{share:5.0%}"]
    for solver in (GraphCuts(), GraphSearch(), GraphIlp(time_limit_seconds=limit)):
        solution, seconds = timed(lambda solver=solver: solver.solve(graph, budget))  # type: ignore[misc]
        extra = gap = "-"
        if solution is not None:
            extra = f"{solution.trace.seconds / graph.store_all_seconds - 1:.2%}"
            gap = f"{solution.trace.seconds / solution.lower_bound_seconds - 1:.2%}"
        cells += [f"{extra:>8}", *([f"{gap:>7}"] if solver.name == "graph_ilp" else [])]
        cells.append(f"{seconds:7.2f} s")
    return "  ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of the solver")
    parser.add_argument("--most-nodes", type=int, default=60, help="leave out larger graphs")
    options = parser.parse_args()
    heads = "by cuts", "time", "by search", "time", "by ILP", "gap", "time"
    print("graph                    nodes budget" + "".join(f"{head:>10}" for head in heads))
    for name, graph in workloads():
        if len(graph) <= options.most_nodes:
            peak = GraphCuts().solve(graph, 2**62).trace.peak_bytes
            for share in SHARES:
                print(row(name, graph, share, int(share * peak), options.limit), flush=True)


if __name__ == "__main__":
    main()
