"""The compiled pass of the simulator: the same verdicts and the same traces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from ckptsched.simulator import simulator, simulator_kernel
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain
from tests.oracles.brute_force import persistent_schedules
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


@settings(max_examples=300, deadline=None)
@given(cases())
def test_both_passes_say_the_same(case: tuple[Chain, Schedule]) -> None:
    chain, schedule = case
    interpreted = verdict(chain, schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "_COMPILED_OPERATIONS", 1)
        assert verdict(chain, schedule) == interpreted


@settings(max_examples=100, deadline=None)
@given(st.data(), chains(4))
def test_the_compiled_pass_does_all_of_a_valid_schedule(data: st.DataObject, chain: Chain) -> None:
    schedule = data.draw(schedules(len(chain)))
    done: list[int] = []
    run = simulator_kernel.run

    def counted(*args: Any) -> int:
        done.append(run(*args))
        return done[-1]

    simulate(chain, schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "_COMPILED_OPERATIONS", 1)
        patch.setattr(simulator_kernel, "run", counted)
        simulate(chain, schedule)
    assert done[0] == len(schedule)
