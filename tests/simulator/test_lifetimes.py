"""What lives how long: at every operation it is what the simulator's own passes find live."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.planner.planner import plan_one
from ckptsched.schedule.language import Schedule
from ckptsched.simulator.lifetimes import Lifetimes, Role, lifetimes
from ckptsched.simulator.simulator import live_during, simulate
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from tests.simulator.test_exact_bytes_kernel import cases
from tests.support.graphs import residual, u_net
from tests.support.random_schedules import schedules
from tests.support.strategies import chains, chains_with_options

OF_ROLE = {
    Role.STATE: "state",
    Role.TAPE: "tape",
    Role.GRADIENT: "gradient",
    Role.PARAMETERS: "parameter gradients",
    Role.OUTPUT: "state",  # while a tape has it, it is named as a state
    Role.RANDOM: "random",
    Role.BUFFERS: "buffers",
    Role.KEPT: "kept",
}
IN_WORDS = {
    "output": "state",
    "output held by the caller": "state",
    "value of the loss": "state",
    "copies of buffers": "buffers",
    "hidden state, and what modules keep": "kept",
    "gradient of a state": "gradient",
    "grad": "gradient",
    "random state to put back": "random",
    "random states": "random",
    "random and hidden states": "random",
}


def named_bytes(chain: Chain | Graph, schedule: Schedule, position: int) -> Counter[str]:
    """Bytes by word, as the simulator names what is live while an operation runs."""
    found: Counter[str] = Counter()
    for item in live_during(chain, schedule, position):
        word = item.name.partition("[")[0]
        found[IN_WORDS.get(word, word)] += item.bytes
    return found


def of_lifetimes(lives: Lifetimes, position: int) -> Counter[str]:
    found = Counter({"the operation itself": int(lives.transient[position])})
    there = (lives.since <= position) & (position < lives.until)
    for role, size in zip(lives.role[there].tolist(), lives.size[there].tolist(), strict=True):
        found[OF_ROLE[Role(role)]] += size
    return +found


def check(chain: Chain | Graph, schedule: Schedule) -> Lifetimes:
    timeline = simulate(chain, schedule).timeline
    lives = lifetimes(chain, schedule, timeline)
    np.testing.assert_array_equal(lives.bytes_by_role().sum(axis=0) + lives.transient, timeline)
    assert (lives.size > 0).all()
    assert (lives.since < lives.until).all()
    assert (np.diff(lives.since) >= 0).all()
    if not isinstance(chain, Graph):
        for position in range(len(schedule)):
            assert of_lifetimes(lives, position) == named_bytes(chain, schedule, position)
    return lives


@settings(max_examples=100, deadline=None)
@given(cases())
def test_exact_bytes_are_those_of_the_ledger(case: tuple[Chain, Schedule]) -> None:
    check(*case)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_planned_bytes_are_those_of_the_planning_model(data: st.DataObject) -> None:
    chain = data.draw(chains() | chains_with_options())
    tapes = [len(stage.tapes) for stage in chain.stages]
    lives = check(chain, data.draw(schedules(len(chain), tapes)))
    assert (lives.transient >= 0).all()


def test_graphs_have_lifetimes() -> None:
    for graph in (residual(), u_net()):
        for budget in ("100%", "70%"):
            lives = check(graph, plan_one(graph, budget, cache=False).schedule)
            assert (lives.transient >= 0).all()
