"""How often the classes of `graph_ilp` miss the best of all schedules, on random workloads.

Counts budgets at which it does, against brute force: two sweeps on chains of five and six stages;
and on graphs of four nodes one and all orders of the nodes, one sweep and two.

    python -m benchmarks.graphs.classes [--seconds 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

from ckptsched.base.errors import InfeasibleBudgetError
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import GraphIlp
from ckptsched.solvers.graph.orders import orders
from ckptsched.solvers.graph.to_schedule import store_all_runs, with_drops
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage
from tests.oracles.brute_force_graph import cheapest_on_graph
from tests.oracles.pinned import cheapest_pinned

_MOST_ORDERS = 24


def stage(source: random.Random, name: str) -> Stage:
    """Figures of a few units each."""
    state = source.randint(0, 8)
    return Stage(
        name=name,
        forward_seconds=float(source.randint(1, 10)),
        backward_seconds=float(source.randint(1, 20)),
        state_bytes=state,
        tape_bytes=state + source.randint(0, 16),
        gradient_bytes=source.choice((state, source.randint(0, 9))),
        forward_overhead_bytes=source.randint(0, 8),
        backward_overhead_bytes=source.randint(0, 8),
    )


def random_chain(source: random.Random) -> Chain:
    """Six to eight stages."""
    n = source.randint(5, 6)
    return Chain(stages=tuple(stage(source, f"v{i}") for i in range(1, n + 1)))


def random_graph(source: random.Random) -> Graph:
    """Four nodes, each of which reads one to three before it."""
    reads = [source.sample(range(i), source.randint(1, min(i, 3))) for i in range(1, 4)]
    unread = {1, 2, 3} - {u for sources in reads for u in sources}
    reads.append([*(unread or {source.randint(0, 3)})])
    stages = tuple(stage(source, f"v{i}") for i in range(1, 5))
    return Graph(stages=stages, reads=tuple(tuple(sorted(x)) for x in reads))


def budgets(graph: Graph, source: random.Random) -> list[int]:
    """Some below what storing everything takes."""
    top = simulate(graph, with_drops(graph, store_all_runs(graph))).peak_bytes
    return sorted({source.randint(top // 3, max(top // 3, top - 1)) for _ in range(4)})


def on_chains(source: random.Random, until: float) -> Iterator[dict[str, bool]]:
    """Whether two sweeps miss the optimum, by budget."""
    while time.perf_counter() < until:
        chain = random_chain(source)
        for budget in budgets(Graph.from_chain(chain), source):
            best = cheapest_pinned(chain, budget)
            if best == float("inf"):
                continue
            (found,) = GraphIlp(sweeps=2).solve_each(chain, [budget])
            failed = isinstance(found, InfeasibleBudgetError)
            yield {"two sweeps": failed or found.trace.seconds > best}  # type: ignore[union-attr]


def on_graphs(source: random.Random, until: float) -> Iterator[dict[str, bool]]:
    """Whether classes miss the optimum, by budget."""
    while time.perf_counter() < until:
        graph = random_graph(source)
        listed, _ = orders(graph, _MOST_ORDERS)
        for budget in budgets(graph, source):
            best = cheapest_on_graph(graph, budget)
            if best == float("inf"):
                continue
            missed: dict[str, bool] = {}
            for sweeps, word in ((1, "one sweep"), (2, "two sweeps")):
                each = [cheapest_on_graph(x.graph, budget, sweeps=sweeps) for x in listed]
                missed |= {f"{word}, one order": each[0] > best, word: min(each) > best}
            yield missed


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for chains, and for graphs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, count in (("chains", on_chains), ("graphs", on_graphs)):
        until = time.perf_counter() + options.seconds
        rows = list(count(random.Random(options.seed), until))
        for word in rows[0] if rows else ():
            missed = sum(row[word] for row in rows)
            print(f"{name}, {word}: {missed} of {len(rows)} budgets missed", flush=True)


if __name__ == "__main__":
    main()
