"""The planning model's pass: the same verdicts and traces, compiled or not, and as a graph."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base import jit
from ckptsched.base.budget import Tier
from ckptsched.base.errors import InvalidScheduleError
from ckptsched.schedule.language import (
    Backward,
    Copy,
    Drop,
    Forward,
    Kind,
    Operation,
    Schedule,
    Turn,
    Value,
)
from ckptsched.schedule.trace import Trace
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from tests.oracles.brute_force import persistent_schedules
from tests.oracles.graph_rules import simulate_graph
from tests.support.random_schedules import schedules
from tests.support.strategies import chains


@st.composite
def operations(draw: st.DrawFn, n: int) -> Operation:
    """Any operation, such as a schedule of n stages may or may not have."""
    stage = draw(st.integers(0, n + 1))
    value = Value(draw(st.sampled_from(Kind)), stage)
    kind = draw(st.integers(0, 6))
    if kind < 2:
        return Forward(stage, tape=bool(kind))
    if kind == 2:
        return Turn()
    if kind == 3:
        return Backward(stage)
    if kind == 4:
        return Copy(value, draw(st.sampled_from(Tier)), draw(st.sampled_from(Tier)))
    return Drop(value, draw(st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST])))


@st.composite
def lenient(draw: st.DrawFn, n: int) -> Schedule:
    """Stage i is made beside what the tape of stage i + 1 was made from, and some copy goes."""
    i = draw(st.integers(1, n))
    taped, first = draw(st.booleans()), draw(st.integers(1, i))
    once = [f"{'T' if taped and j >= first else 'F'}{j}" for j in range(1, i + 1)]
    rest = [f"T{j}" for j in range(i + 1, n + 1)]
    other, gone = f"{'F' if taped else 'T'}{i}", draw(st.sampled_from([f"-x{i}", f"-t{i}"]))
    return Schedule.from_text(" ".join([*once, *rest, "turn", other, gone]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chain, Schedule]:
    """A chain, and a schedule that is valid or nearly so."""
    chain = draw(chains(4))
    n = len(chain)
    known = draw(st.sampled_from(persistent_schedules(n)) | schedules(n) | lenient(n))
    found = list(known)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(found) - 1))
        if draw(st.booleans()):
            found.insert(at, draw(operations(n)))
        elif len(found) > 1:
            del found[at]
    return chain, Schedule.of(found)


def verdict(chain: Chain, schedule: Schedule) -> Trace | str:
    try:
        return simulate(chain, schedule)
    except InvalidScheduleError as error:
        return f"{error.position} {error}"


def passes(chain: Chain, schedule: Schedule) -> list[Trace | str]:
    """The verdicts of the interpreted and of the compiled pass."""
    found = []
    for steps in (math.inf, 0):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("INTERPRETED_STEPS", "LOADED_STEPS"):
                patch.setattr(jit, name, steps)
            found.append(verdict(chain, schedule))
    return found


@settings(max_examples=300, deadline=None)
@given(cases())
def test_both_passes_say_the_same(case: tuple[Chain, Schedule]) -> None:
    chain, schedule = case
    interpreted, compiled = passes(chain, schedule)
    assert compiled == interpreted
    if isinstance(compiled, Trace) and isinstance(interpreted, Trace):
        assert compiled.timeline.tolist() == interpreted.timeline.tolist()
        assert compiled.live_at_peak == interpreted.live_at_peak
        assert sum(x.bytes for x in compiled.live_at_peak) == compiled.peak_bytes


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_chain_is_judged_as_the_graph_that_it_is(case: tuple[Chain, Schedule]) -> None:
    """The rules of graphs are written apart as well: what one lets pass, the other does."""
    chain, schedule = case
    found = verdict(chain, schedule)
    try:
        other = simulate_graph(Graph.from_chain(chain), schedule)
    except InvalidScheduleError:
        assert isinstance(found, str)
    else:
        assert isinstance(found, Trace)
        assert found.timeline.tolist() == other.timeline.tolist()
        assert found.seconds == other.seconds
