"""The ledger: the bytes of the readable version at every operation, compiled or interpreted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base import jit
from ckptsched.base.budget import Tier
from ckptsched.base.errors import InvalidScheduleError
from ckptsched.schedule.language import Copy, Drop, Kind, Schedule, Value
from ckptsched.simulator.exact_bytes import charge, live_at
from ckptsched.simulator.liveness import analyse
from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block
from tests.oracles.exact_bytes import Ledger
from tests.oracles.exact_bytes import analyse as read_liveness
from tests.support.random_schedules import schedules
from tests.support.shared_chains import exact_stage
from tests.support.strategies import (
    SMALL,
    ledger_chains,
    parted_chains,
    parted_chains_with_tapes,
)


@st.composite
def with_blocks(draw: st.DrawFn, chain: Chain) -> Chain:
    """The chain in blocks whose buffers are cloned and hidden, and which draw random numbers."""
    n = len(chain)
    ends = sorted(draw(st.sets(st.integers(1, n), max_size=2)) | {n})
    blocks = tuple(
        Block(name=f"b{b}", first=a + 1, last=b, buffer_bytes=draw(SMALL), hidden_bytes=draw(SMALL))
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    )
    kept = draw(SMALL)
    return replace(
        chain,
        blocks=blocks,
        random_state_bytes=draw(SMALL),
        kept_bytes=kept,
        held_bytes=chain.held_bytes + kept,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chain, Schedule]:
    """A chain with exact bytes and a valid schedule."""
    chain = draw(
        ledger_chains(noise=True)
        | parted_chains(most_stages=6, to_output=True)
        | parted_chains_with_tapes(most_stages=6, most_options=2, to_output=True)
    )
    if draw(st.booleans()):
        chain = draw(with_blocks(chain))
    return chain, draw(schedules(len(chain), [len(stage.tapes) for stage in chain.stages]))


def found(chain: Chain, schedule: Schedule, steps: float) -> Any:
    """Bytes while each operation runs, interpreted or compiled."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("INTERPRETED_STEPS", "LOADED_STEPS"):
            patch.setattr(jit, name, steps)
        return charge(chain, schedule)


def check_charges(chain: Chain, schedule: Schedule) -> list[int]:
    """All passes charge the same; returns it."""
    read = Ledger(chain, schedule).run()
    for steps in (0, math.inf):
        np.testing.assert_array_equal(found(chain, schedule, steps), read)
    return read


@settings(max_examples=200, deadline=None)
@given(cases())
def test_all_passes_charge_the_same(case: tuple[Chain, Schedule]) -> None:
    read = check_charges(*case)
    for at in {0, int(np.argmax(read)), len(read) // 2, len(read) - 1}:
        live = live_at(*case, at, read[at])
        assert all(x.bytes > 0 for x in live)
        assert sum(x.bytes for x in live) == read[at]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), schedules(n))))
def test_all_passes_find_the_same_live(case: tuple[int, Schedule]) -> None:
    n, schedule = case
    one, two = read_liveness(schedule, n), analyse(schedule, n)
    assert one.snapshots_input == two.snapshots_input
    for name in ("keeps_output", "frees_input", "restores", "snapshots", "repeats"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_gradients_that_were_dropped_take_nothing() -> None:
    chain = Chain(
        stages=(exact_stage(),) * 2, input_bytes=10, input_gradient_bytes=10, held_bytes=12
    )
    schedule = Schedule.from_text("T1 T2 turn B2 -t1 T1 B1 -x0")
    dropped = Schedule.of([*schedule, *[Drop(Value(Kind.GRAD, 0))] * 2])
    read = check_charges(chain, dropped)
    assert read[-2] - read[-1] == chain.input_gradient_bytes


def test_other_tiers_are_refused() -> None:
    chain = Chain(stages=(exact_stage(),), input_bytes=10, input_gradient_bytes=10, held_bytes=12)
    x0 = Value(Kind.STATE, 0)
    away = [Copy(x0, Tier.DEVICE, Tier.HOST), Drop(x0, Tier.HOST)]
    schedule = Schedule.of([*away, *Schedule.from_text("T1 turn B1 -x0")])
    with pytest.raises(InvalidScheduleError, match="the ledger knows the device only"):
        simulate(chain, schedule)
