"""The judge of schedules: bytes by hand, every rule, every mutation, the ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from ckptsched.base.budget import Link, Tier
from ckptsched.base.errors import InvalidScheduleError, WorkloadError
from ckptsched.schedule.language import Schedule
from ckptsched.schedule.trace import Live
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import Baseline, ChainDp, Revolve
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block, TapeOption
from tests.oracles.brute_force import persistent_schedules
from tests.support.shared_chains import (
    EXAMPLES,
    exact_stage,
    example,
    levels,
    run,
    tiny_cases,
    uniform,
)
from tests.support.strategies import ledger_chains

STORE_ALL = "T1 T2 turn B2 B1 -x0"


def test_bytes_of_the_first_worked_example() -> None:
    chain = example("E1")
    tight = "F1 T2 turn B2 -x1 T1 B1 -x0"
    assert levels(chain, tight) == [2, 5, 6, 7, 3, 5, 6, 2]
    assert levels(chain, STORE_ALL) == [4, 7, 8, 9, 6, 2]
    assert run(chain, tight).seconds == 7
    assert run(chain, STORE_ALL).seconds == 6


def test_the_trace() -> None:
    trace = run(example("E1"), STORE_ALL)
    assert (trace.peak_bytes, trace.planning_peak_bytes, trace.ledger_peak_bytes) == (9, 9, None)
    assert (trace.peak_position, trace.peak_operation, trace.forwards) == (3, "B2", 2)
    assert trace.live_at_peak == (
        Live("tape[1]", 3),
        Live("tape[2]", 3),
        Live("state[0]", 1),
        Live("grad[2]", 1),
        Live("the operation itself", 1),
    )
    assert (trace.host_peak_bytes, trace.disk_peak_bytes) == (0, 0)


def test_what_is_not_a_state_counts_too() -> None:
    data = EXAMPLES["E1"][0] | {
        "w_g": [2, 3, 5],
        "o_f": [1, 2],
        "o_b": [4, 6],
        "w_p": [10, 20],
        "u_loss": 7,
        "o_loss": 9,
        "w_held": 100,
    }
    chain = Chain.from_json(data)
    trace = run(chain, STORE_ALL)
    # input 1, held 100; T1 3 + 1; T2 3 + 2; loss 5 + 9; B2 3 + 6 + 20; B1 2 + 4 + 10.
    assert trace.timeline.tolist() == [105, 109, 121, 141, 143, 133]
    assert trace.seconds == 13
    assert Live("parameter gradients", 20) in trace.live_at_peak
    assert Live("output held by the caller", 100) in trace.live_at_peak


def test_live_values_add_up_to_the_peak() -> None:
    for name in EXAMPLES:
        chain = example(name)
        for schedule in persistent_schedules(len(chain))[:30]:
            trace = simulate(chain, schedule)
            assert sum(item.bytes for item in trace.live_at_peak) == trace.peak_bytes
            assert trace.timeline.max() == trace.timeline[trace.peak_position] == trace.peak_bytes


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("F2 T1 T2 turn B2 B1 -x0", 0, "state[1] is not available: neither it nor tape[1]"),
        ("F3", 0, "the chain has stages 1 to 2"),
        ("F0", 0, "the chain has stages 1 to 2"),
        ("F1 F1", 1, "state[1] is already stored"),
        ("T1 T1", 1, "tape[1] is already stored"),
        ("T1 turn", 1, "state[2] is not available for the loss"),
        ("T1 T2 turn turn", 3, "the forward pass was ended before"),
        ("T1 T2 B2", 2, "the forward pass has not ended: Turn comes first"),
        ("T1 T2 turn B1", 3, "grad[1] is not complete: stage 2 comes first"),
        ("T1 T2 turn B2 B2", 4, "stage 2 has had its backward"),
        ("T1 F2 turn B2", 3, "tape[2] is not stored"),
        ("T1 T2 turn B3", 3, "the chain has stages 1 to 2"),
        ("F1 T2 turn B2 B1", 4, "tape[1] is not stored"),
        ("F1 T2 -x1", 2, "tape[2] holds state[1], which this would forget"),
        ("T1 T2 -t1", 2, "tape[2] holds state[1], which this would forget"),
        (
            "F1 T2 turn T1 -x1 B2 B1 -x0",
            4,
            "tape[2] holds state[1], which this would forget: it was made from state[1] and keeps "
            "that copy, which can go after B2 or -t2 only",
        ),
        (
            "T1 T2 turn F1 -t1 B2 -x1",
            4,
            "tape[2] holds state[1], which this would forget: it was made from tape[1] and keeps "
            "that copy, which can go after B2 or -t2 only",
        ),
        (
            "T1 F1 T2 turn -x1",  # a run reads the bare state where both are there
            4,
            "tape[2] holds state[1], which this would forget: it was made from state[1]",
        ),
        (
            "F1 T2 turn t2:device>host -t2 -x1 t2:host>device",
            6,
            "tape[2] holds state[1], which is not available",
        ),
        ("F1 -x2", 1, "state[2] is not stored"),
        ("F1 -x1 -x1", 2, "state[1] is not stored"),
        ("-x3", 0, "the chain has stages 1 to 2"),
        ("F1 -x0", 1, "the input is needed until B1"),
        (
            "T1 T2 turn g2:device>host B2 -g1 T2 g2:host>device B2 -g2@host B1 -x0",
            8,
            "stage 2 has had its backward",
        ),
        ("F1 -x1@host", 1, "state[1] is not stored on the host"),
        ("F1 x1:device>device", 1, "source and target are the same tier"),
        ("x1:device>host", 0, "state[1] is not stored on the device"),
        ("F1 x1:host>device", 1, "state[1] is not stored on the host"),
        ("F1 x1:device>host x1:host>device", 2, "state[1] is already stored on the device"),
    ],
)
def test_every_rule_has_its_message(text: str, position: int, reason: str) -> None:
    with pytest.raises(InvalidScheduleError) as caught:
        run(example("E1"), text)
    error = caught.value
    assert error.position == position
    assert error.operation == text.split()[position]
    assert error.reason.startswith(reason)
    assert f"invalid schedule at operation {position} {error.operation}: {reason}" in str(error)


def test_of_two_copies_the_one_that_no_tape_holds_may_go() -> None:
    chain = example("E1")
    for text in (
        "F1 T2 turn T1 -t1 B2 -x1 T1 B1 -x0",
        "T1 T2 turn F1 -x1 B2 B1 -x0",
        "F1 T2 turn T1 -t2 -x1 T2 B2 B1 -x0",
        "F1 T2 x1:device>host turn t2:device>host -t2 -x1 "
        "x1:host>device -x1@host t2:host>device -t2@host B2 -x1 T1 B1 -x0",
    ):
        run(chain, text)


def test_a_tape_is_charged_by_its_option() -> None:
    thin = TapeOption(
        tape_bytes=2,
        forward_seconds=4.0,
        backward_seconds=8.0,
        forward_overhead_bytes=7,
        backward_overhead_bytes=30,
    )
    whole = example("E1")
    first, second = whole.stages
    chain = replace(whole, stages=(first, replace(second, other_tapes=(thin,))))
    own, other = (run(chain, f"T1 {taped} turn B2 B1 -x0") for taped in ("T2", "T2.1"))
    assert [int(x) for x in own.timeline] == levels(whole, "T1 T2 turn B2 B1 -x0")
    # The input, tape 1 of 3 bytes and tape 2 of 2; the loss, then both backward passes.
    assert [int(x) for x in other.timeline] == [4, 1 + 3 + 2 + 7, 7, 7 + 1 + 30, 6, 2]
    assert own.seconds == 6
    assert other.seconds == 6 - 3 + 12
    assert other.peak_operation == "B2"
    again = run(chain, "F1 T2.1 turn -t2 T2 B2 -x1 T1 B1 -x0")
    assert again.seconds == 1 + 4 + 1 + 2 + 1 + 2
    with pytest.raises(InvalidScheduleError, match="stage 2 offers no tape 2, the last is 1"):
        run(chain, "T1 T2.2 turn B2 B1 -x0")
    with pytest.raises(InvalidScheduleError, match="stage 1 offers no tape 1, the last is 0"):
        run(whole, "T1.1 T2 turn B2 B1 -x0")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the forward pass was never ended: Turn is missing"),
        ("T1 T2", "Turn is missing"),
        ("T1 T2 turn", "stage 2 never had its backward"),
        ("T1 T2 turn B2", "stage 1 never had its backward"),
        ("T1 T2 turn B2 B1", "state[0] is still stored: it leaks"),
        ("T1 T2 turn B2 B1 -x0 -g0", "grad[0] is not stored: it is the result"),
        ("F1 T2 turn B2 T1 B1 -x0", "state[1] is still stored: it leaks"),
        ("F1 x1:device>disk -x1 T1 T2 turn B2 B1 -x0", "state[1] is still stored on the disk"),
    ],
)
def test_schedules_that_end_early_or_leak(text: str, reason: str) -> None:
    with pytest.raises(InvalidScheduleError) as caught:
        run(example("E1"), text)
    assert reason in str(caught.value)
    assert "at end of schedule" in str(caught.value)
    assert caught.value.position == len(text.split())


def schedules_to_mutate() -> list[tuple[Chain, Schedule]]:
    """Schedules of all solvers, with blocks and without, with exact bytes and without."""
    blocks = (
        Block(name="a", first=1, last=3),
        Block(name="b", first=4, last=4),
        Block(name="c", first=5, last=8),
    )
    exact = Chain(stages=(exact_stage(),) * 8, held_bytes=10, blocks=blocks)
    found = []
    for chain in (uniform(8), uniform(8, blocks=blocks), exact):
        for name in ("store_all", "anode", "every_3", "every_stage", "input_only"):
            found.append((chain, Baseline(name).solve(chain, 10**9).schedule))
        budget = simulate(chain, found[-1][1]).peak_bytes
        found.append((chain, ChainDp().solve(chain, budget + 2).schedule))
        found.append((chain, ChainDp().solve(chain, budget + 12).schedule))
        found.append((chain, Revolve().solve(chain, budget + 12).schedule))
    case = tiny_cases()[1]
    chain = Chain.from_json(case["chain"])
    found += [(chain, ChainDp().solve(chain, budget).schedule) for budget in (21, 30, 44)]
    return found


@pytest.mark.parametrize("case", range(27))
def test_no_operation_can_be_left_out_or_doubled(case: int) -> None:
    cases = schedules_to_mutate()
    assert len(cases) == 27
    chain, schedule = cases[case]
    operations = list(schedule)
    simulate(chain, schedule)
    for k in range(len(operations)):
        for mutant in (
            operations[:k] + operations[k + 1 :],
            operations[: k + 1] + operations[k:],
        ):
            with pytest.raises(InvalidScheduleError):
                simulate(chain, Schedule.of(mutant))


def test_values_can_wait_on_other_tiers() -> None:
    chain = uniform(2, state=100, tape=300)
    text = (
        "F1 x1:device>host T2 turn -t2 -x1 -g2 x1:host>device -x1@host T1 -x1"
        # Nothing of the second stage is left, so this is not a whole schedule.
    )
    with pytest.raises(InvalidScheduleError, match="stage 2 never had its backward"):
        run(chain, text)
    text = "F1 x1:device>host F2 turn -x2 -x1 x1:host>device -x1@host T2 B2 -x1 T1 B1 -x0"
    links = {
        (Tier.DEVICE, Tier.HOST): Link(bytes_per_second=50.0, latency_seconds=0.25),
        (Tier.HOST, Tier.DEVICE): Link(bytes_per_second=100.0),
    }
    trace = run(chain, text, links=links)
    assert trace.seconds == 4 * 1 + 2 * 2 + 2.25 + 1
    assert trace.host_peak_bytes == 100
    assert trace.disk_peak_bytes == 0
    assert run(chain, text).seconds == 4 * 1 + 2 * 2


# ---- the ledger -------------------------------------------------------------------------


def test_bytes_of_one_stage_by_hand() -> None:
    chain = Chain(stages=(exact_stage(),), held_bytes=10, input_gradient_bytes=10)
    # T1 peaks at 14; its tape takes 3, and the output it hands to the loss 10. The loss adds
    # the gradient, 10. In B1 the caller holds input and output: 13 + 10 + 23.
    assert levels(chain, "T1 turn B1 -x0") == [14, 23, 46, 20]


def test_a_state_counts_once_whoever_holds_it() -> None:
    chain = Chain(stages=(exact_stage(),) * 2, held_bytes=10)
    # x1 is kept by the store and by the second tape: 10 once.
    # B2: the store holds the input, the caller the output. Before it goes, x1 lies beside x2
    # and g1. B1: the caller holds the input, nobody the output.
    assert levels(chain, "F1 T2 turn B2 -x1 T1 B1 -x0") == [
        *(12, 10 + 14, 10 + 13 + 10, 33 + 23, 30, 20 + 14, 20 + 3 + 22, 10)
    ]


def test_a_tape_hands_its_output_on_until_it_is_read_last() -> None:
    kept = Chain(stages=(exact_stage(),) * 2, held_bytes=10)
    free = Chain(stages=(exact_stage(), exact_stage(input_saved=False)), held_bytes=10)
    # After T1 3 and the output 10. The second tape saves it, or it is gone.
    assert levels(kept, STORE_ALL)[:3] == [14, 13 + 14, 13 + 3 + 10 + 10]
    assert levels(free, STORE_ALL)[:3] == [14, 13 + 14, 3 + 3 + 10 + 10]


def test_a_saved_output_stays_with_the_tape() -> None:
    chain = Chain(
        stages=(exact_stage(output_saved=True), exact_stage(input_saved=False)), held_bytes=10
    )
    # Unlike above, x1 lies in the first tape to its backward.
    assert levels(chain, STORE_ALL)[2] == 13 + 3 + 10 + 10


def test_a_view_takes_nothing_of_its_own() -> None:
    view = exact_stage(output_is_view=True, tape_bytes=0, forward_peak_bytes=0, taped_peak_bytes=0)
    chain = Chain(stages=(exact_stage(), view, exact_stage()), held_bytes=10)
    found = levels(chain, "F1 F2 -x1 T3 turn B3 -x2 F1 T2 B2 -x1 T1 B1 -x0")
    # x2 keeps the storage of x1: 10 throughout.
    assert found[:4] == [12, 10, 10, 10 + 14]


def test_parameter_gradients_come_with_the_backward_and_stay() -> None:
    chain = Chain(stages=(exact_stage(parameter_gradient_bytes=100),) * 2, held_bytes=10)
    found = levels(chain, STORE_ALL)
    # B2: x1, two tapes, x2, g2; a first backward, the output held by the caller. B1: a tape,
    # x2, g1; a first backward, the input held by the caller.
    assert found[3] == 10 + 3 + 3 + 10 + 10 + 25
    assert found[4] == 3 + 10 + 10 + 100 + 26


def test_buffers_are_cloned_while_a_block_runs_again() -> None:
    blocks = (
        Block(name="a", first=1, last=1, buffer_bytes=1000),
        Block(name="b", first=2, last=2, buffer_bytes=4000),
    )
    chain = Chain(stages=(exact_stage(),) * 2, held_bytes=10)
    cloned = replace(chain, blocks=blocks)
    text = "F1 T2 turn B2 -x1 T1 B1 -x0"
    extra = [b - a for a, b in zip(levels(chain, text), levels(cloned, text), strict=True)]
    assert extra == [0, 0, 0, 0, 1000, 1000, 1000, 1000]
    assert levels(chain, STORE_ALL) == levels(cloned, STORE_ALL)


def test_random_states_are_kept_with_what_is_run_again() -> None:
    chain = Chain(stages=(exact_stage(),) * 2, held_bytes=10)
    noisy = replace(chain, random_state_bytes=1000)
    assert levels(chain, STORE_ALL) == levels(noisy, STORE_ALL)
    text = "F1 T2 turn B2 -x1 T1 B1 -x0"
    assert max(levels(noisy, text)) >= max(levels(chain, text)) + 1000


@settings(max_examples=100, deadline=None)
@given(ledger_chains(most_stages=3))
def test_planning_sizes_that_bound_each_stage_bound_the_ledger(chain: Chain) -> None:
    for schedule in persistent_schedules(len(chain)):
        trace = simulate(chain, schedule)
        assert trace.ledger_peak_bytes is not None
        assert trace.peak_bytes == trace.ledger_peak_bytes <= trace.planning_peak_bytes
        assert sum(item.bytes for item in trace.live_at_peak) == trace.peak_bytes
        plain = simulate(chain, schedule, model="planning")
        assert plain.peak_bytes == trace.planning_peak_bytes
        assert plain.ledger_peak_bytes is None


@settings(max_examples=50, deadline=None)
@given(ledger_chains(most_stages=3, noise=True))
def test_live_values_of_the_ledger_add_up(chain: Chain) -> None:
    for schedule in persistent_schedules(len(chain)):
        trace = simulate(chain, schedule)
        assert sum(item.bytes for item in trace.live_at_peak) == trace.peak_bytes


def test_the_ledger_is_only_for_chains_that_have_one() -> None:
    with pytest.raises(WorkloadError, match="this chain has no exact bytes"):
        run(example("E1"), STORE_ALL, model="ledger")
    chain = Chain(stages=(exact_stage(),) * 2, held_bytes=10)
    with pytest.raises(InvalidScheduleError, match="the ledger knows the device only"):
        run(chain, "F1 x1:device>host -x1@host T2 turn B2 -x1 T1 B1 -x0")
