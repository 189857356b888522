"""How large pages of the explorer are, and how long they take to make.

    python -m benchmarks.explorer 20 1000 10000

Chains of so many stages of ten kinds, each with twenty schedules of `revolve` for budgets from the
least to that of storing everything, evenly spaced in the logarithm.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace

from ckptsched.planner.explorer.content import Shown
from ckptsched.planner.explorer.page import page_of
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each, plan_one
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block, Stage

BUDGETS, KINDS = 20, 10


def chain_of(count: int) -> Chain:
    """Layers of ten different stages."""
    draw = random.Random(1)
    kinds = []
    for k in range(KINDS):
        state = draw.randint(1, 8) * 2**18
        stage = Stage(
            name=f"part{k}",
            forward_seconds=draw.uniform(1e-4, 1e-3),
            backward_seconds=draw.uniform(1e-4, 2e-3),
            state_bytes=state,
            tape_bytes=state + draw.randint(1, 30) * 2**17 + draw.randint(0, 999),
            gradient_bytes=state,
            forward_overhead_bytes=draw.randint(0, 2**19),
            backward_overhead_bytes=draw.randint(0, 2**20),
            parameter_gradient_bytes=draw.randint(0, 2**20),
        )
        kinds.append(stage)
    blocks = tuple(
        Block(name=f"layers.{b}", first=first, last=min(first + KINDS - 1, count))
        for b, first in enumerate(range(1, count + 1, KINDS))
    )
    stages = tuple(kinds[i % KINDS] for i in range(count))
    return Chain(stages=stages, input_gradient_bytes=2**20, blocks=blocks, name=f"{count} stages")


def plans_of(chain: Chain) -> list[Plan]:
    """The schedules that equal stages would have, on the chain."""
    equal = Chain(stages=chain.stages[:1] * len(chain), input_gradient_bytes=2**20)
    equal = replace(
        equal, stages=(replace(chain.stages[0], parameter_gradient_bytes=0),) * len(chain)
    )
    whole = plan_one(equal, "100%", solver="revolve", cache=False)
    low, high = whole.least_budget_bytes, whole.store_all_bytes
    budgets = [int(low * (high / low) ** (k / (BUDGETS - 1))) for k in range(BUDGETS)]
    store_all = plan_one(chain, "100%", solver="store_all", cache=False)
    found = []
    for plan in plan_each(equal, budgets, solver="revolve", cache=False):
        if not isinstance(plan, Plan):
            raise plan
        trace = simulate(chain, plan.schedule)
        figures = {"budget_bytes": trace.peak_bytes, "least_budget_bytes": trace.peak_bytes}
        found.append(replace(store_all, schedule=plan.schedule, trace=trace, **figures))
    return found


def main(counts: list[int]) -> None:
    """Print a row a number of stages: all plans in a page, and one of them."""
    print("stages  plans  operations  bytes of the page  seconds to make it")
    for count in counts:
        chain = chain_of(count)
        plans = plans_of(chain)
        for some in (plans, plans[BUDGETS // 2 : BUDGETS // 2 + 1]):
            begun = time.perf_counter()
            size = len(page_of(chain, [Shown(plan=plan) for plan in some]).encode())
            seconds = time.perf_counter() - begun
            operations = sum(len(plan.schedule) for plan in some)
            print(f"{count:6} {len(some):6} {operations:11} {size:18} {seconds:19.2f}", flush=True)


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]] or [20, 1000])
