"""Law: the ledger that bounds several paths charges no schedule less than any mix of the paths."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.simulator.simulator import simulate
from ckptsched.workload.chain import Chain
from ckptsched.workload.ledger_bound import Variant, bound
from ckptsched.workload.stage import Stage, StageLedger
from tests.support.random_schedules import schedules

SMALL = st.integers(0, 6)


@st.composite
def paths(draw: st.DrawFn, state: int, before: int) -> Variant:
    """A stage of one storage on a path: its output new, or its input itself."""
    view = draw(st.booleans())
    size = before if view else draw(st.integers(0, state))
    tape, free, first = draw(SMALL), draw(SMALL), draw(SMALL)
    saves_input, saves_output = draw(st.booleans()), draw(st.booleans()) and not view
    # What may be freed on the way lowers a peak by its bytes at the most.
    if_input = draw(st.integers(0, before)) * saves_input
    if_output = draw(st.integers(0, size)) * saves_output
    peaks = [
        free + if_input * held + if_output * out + first * new
        for held in (0, 1)
        for out in (0, 1)
        for new in (0, 1)
    ]
    own = 0 if view else size
    ledger = StageLedger(
        state_bytes=size,
        output_is_view=view,
        tape_bytes=tape,
        input_saved=saves_input,
        output_saved=saves_output,
        forward_peak_bytes=own + draw(SMALL),
        taped_peak_bytes=own + tape + draw(SMALL),
        backward_peak_bytes=tuple(peaks),
    )
    return Variant(ledger=ledger, homes=(0,), sizes=(size,), sources=(0 if view else -1,))


def chain_of(ledgers: list[StageLedger]) -> Chain:
    """A chain whose planning sizes are large enough for any of the ledgers."""
    stages = tuple(
        Stage(
            forward_seconds=1.0,
            backward_seconds=1.0,
            state_bytes=50,
            tape_bytes=100,
            gradient_bytes=3,
            ledger=ledger,
        )
        for ledger in ledgers
    )
    return Chain(stages=stages, held_bytes=50)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_no_path_takes_more_than_the_bound(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    state = data.draw(st.integers(0, 9))
    before = 0  # the input is the caller's
    found: list[list[Variant]] = []
    for _ in range(n):
        found.append(data.draw(st.lists(paths(state, before), min_size=1, max_size=3)))
        before = max(max(v.sizes) for v in found[-1])
    bounds = [bound(variants, 1) for variants in found]
    schedule = data.draw(schedules(n))
    most = simulate(chain_of(bounds), schedule).peak_bytes
    mixed = [data.draw(st.sampled_from(variants)).ledger for variants in found]
    sizes = [ledger.state_bytes for ledger in mixed]
    for i, ledger in enumerate(mixed):  # a view has its input's bytes, whatever that is now
        if ledger.output_is_view:
            sizes[i] = sizes[i - 1] if i else 0
            mixed[i] = dataclasses.replace(ledger, state_bytes=sizes[i])
    assert simulate(chain_of(mixed), schedule).peak_bytes <= most


def test_one_path_keeps_its_exact_ledger_and_several_have_a_reserve() -> None:
    ledger = StageLedger(
        state_bytes=8,
        output_is_view=False,
        tape_bytes=5,
        input_saved=True,
        output_saved=False,
        forward_peak_bytes=16,
        taped_peak_bytes=32,
        backward_peak_bytes=(1, 2, 3, 4, 5, 6, 7, 8),
    )
    one = Variant(ledger=ledger, homes=(0,), sizes=(8,), sources=(-1,))
    same = bound([one, one], 1, reserve=True)
    assert same is ledger
    dropped = dataclasses.replace(
        ledger, output_is_view=True, tape_bytes=0, input_saved=False, taped_peak_bytes=0
    )
    other = Variant(ledger=dropped, homes=(0,), sizes=(8,), sources=(0,))
    joined = bound([one, other], 1, reserve=True)
    assert (joined.forward_peak_bytes, joined.taped_peak_bytes) == (17, 34)
    assert not joined.output_is_view
    assert joined.input_saved
    assert (joined.state_bytes, joined.tape_bytes) == (8, 5)


def test_outputs_of_several_storages_are_bound_as_the_first_path_has_them() -> None:
    plain = StageLedger(
        state_bytes=12,
        output_is_view=False,
        tape_bytes=1,
        input_saved=False,
        output_saved=False,
        forward_peak_bytes=12,
        taped_peak_bytes=13,
        backward_peak_bytes=(4,) * 8,
    )
    # Two tensors in one new storage; and one of them the input, the other new.
    together = Variant(ledger=plain, homes=(0, 0), sizes=(12,), sources=(-1,))
    apart = Variant(
        ledger=dataclasses.replace(plain, state_bytes=8, backward_peak_bytes=(9,) * 8),
        homes=(0, 1),
        sizes=(7, 8),
        sources=(0, -1),
    )
    joined = bound([together, apart], 1)
    assert joined.parts is None
    assert joined.state_bytes == 15
    other = bound([apart, together], 1)
    assert other.parts is not None
    assert other.parts.output_bytes == (12, 12)
    assert other.parts.output_sources == (-1, -1)
    assert set(other.parts.backward_peak_bytes) == {9}
