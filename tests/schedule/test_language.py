"""The schedule language: packing, text and JSON round trips, the builder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsched.base.budget import Tier
from ckptsched.base.errors import InvalidScheduleError
from ckptsched.schedule.language import (
    Backward,
    Code,
    Copy,
    Drop,
    Forward,
    Kind,
    Operation,
    Schedule,
    ScheduleBuilder,
    Turn,
    Value,
    format_operation,
    parse_operation,
    schedule_from_json,
    schedule_to_json,
)
from ckptsched.solvers.binomial.revolve import revolve_schedule

NUMBERS = st.integers(0, 2**31 - 1)
VALUES = st.builds(Value, st.sampled_from(Kind), NUMBERS)
TIERS = st.sampled_from(Tier)
OPERATIONS = st.one_of(
    st.builds(Forward, NUMBERS, tape=st.booleans()),
    st.builds(Turn),
    st.builds(Backward, NUMBERS),
    st.builds(Copy, VALUES, TIERS, TIERS),
    st.builds(Drop, VALUES, TIERS),
)


@given(st.lists(OPERATIONS))
def test_operations_survive_packing_text_and_json(operations: list[Operation]) -> None:
    schedule = Schedule.of(operations)
    assert list(schedule) == operations
    assert len(schedule) == len(operations)
    assert schedule.nbytes == 8 * len(operations)
    assert Schedule.from_text(schedule.to_text()) == schedule
    data = json.loads(json.dumps(schedule_to_json(schedule)))
    assert schedule_from_json(data) == schedule
    assert hash(schedule_from_json(data)) == hash(schedule)


@given(OPERATIONS)
def test_one_word_an_operation(operation: Operation) -> None:
    word = format_operation(operation)
    assert word.split() == [word]
    assert parse_operation(word) == operation


def test_words() -> None:
    text = "F3 T3 T3.1 turn B3 -x3 -t2 -g1 -x3@host -x4@disk x3:device>host t1:disk>device"
    assert list(Schedule.from_text(text)) == [
        Forward(3),
        Forward(3, tape=True),
        Forward(3, tape=True, option=1),
        Turn(),
        Backward(3),
        Drop(Value(Kind.STATE, 3)),
        Drop(Value(Kind.TAPE, 2)),
        Drop(Value(Kind.GRAD, 1)),
        Drop(Value(Kind.STATE, 3), Tier.HOST),
        Drop(Value(Kind.STATE, 4), Tier.DISK),
        Copy(Value(Kind.STATE, 3), Tier.DEVICE, Tier.HOST),
        Copy(Value(Kind.TAPE, 1), Tier.DISK, Tier.DEVICE),
    ]
    assert Schedule.from_text(text).to_text() == text


@pytest.mark.parametrize(
    "word",
    [
        "F",
        "X3",
        "turn3",
        "-y3",
        "-x3@tape",
        "x3:device>cloud",
        "F-1",
        "f3",
        "B3.0",
        "F3.1",
        "T3.",
        "-x",
    ],
)
def test_other_words_are_refused_with_their_position(word: str) -> None:
    with pytest.raises(InvalidScheduleError) as caught:
        Schedule.from_text(f"F1 F2 {word}")
    assert caught.value.position == 2
    assert str(caught.value) == (f"invalid schedule at operation 2 {word!r}: this is no operation")


@pytest.mark.parametrize(
    "word", ["F4294967297", "T2147483648", "B9223372036854775808", "-x4294967296", f"F{'9' * 5000}"]
)
def test_stages_that_no_operation_can_hold_are_refused(word: str) -> None:
    with pytest.raises(InvalidScheduleError, match="stages are counted to 2147483647 at most"):
        Schedule.from_text(word)


@pytest.mark.parametrize("word", ["T3.256", f"T3.{'9' * 5000}"])
def test_options_that_no_operation_can_hold_are_refused(word: str) -> None:
    with pytest.raises(InvalidScheduleError, match="options are counted to 255 at most"):
        Schedule.from_text(word)


def test_an_option_survives_packing() -> None:
    run = Forward(2**31 - 1, tape=True, option=255)
    assert list(Schedule.of([run])) == [run]
    assert Schedule.of([run]).kinds.tolist() == [255]


def test_the_last_stage_that_an_operation_can_hold() -> None:
    assert list(Schedule.from_text("F2147483647")) == [Forward(2147483647)]


@pytest.mark.parametrize("data", [None, [], {}, {"operations": 3}, {"operations": ["F1"]}])
def test_json_without_operations_is_refused(data: object) -> None:
    with pytest.raises(InvalidScheduleError, match="no text of operations"):
        schedule_from_json(data)


def test_columns() -> None:
    schedule = Schedule.from_text("F1 T2 turn B2 x1:device>disk -t3@host")
    assert schedule.codes.tolist() == [
        Code.FORWARD,
        Code.TAPED_FORWARD,
        Code.TURN,
        Code.BACKWARD,
        Code.COPY,
        Code.DROP,
    ]
    assert schedule.stages.tolist() == [1, 2, 0, 2, 1, 3]
    assert schedule.kinds.tolist()[4:] == [Kind.STATE, Kind.TAPE]
    assert schedule.sources.tolist()[4:] == [Tier.DEVICE, Tier.HOST]


def test_parts_equality_and_repr() -> None:
    schedule = Schedule.from_text("F1 F2 -x1 T3 turn B3 -x2 T2 B2 T1 B1 -x0")
    assert schedule[1] == Forward(2)
    assert schedule[-1] == Drop(Value(Kind.STATE, 0))
    assert schedule[2:4] == Schedule.from_text("-x1 T3")
    assert schedule != schedule[:-1]
    assert schedule != "F1"
    assert repr(schedule) == "<Schedule of 12 operations: F1 F2 -x1 T3 turn B3 -x2 T2 …>"
    assert repr(schedule[:1]) == "<Schedule of 1 operations: F1>"
    assert str(Value(Kind.GRAD, 3)) == "grad[3]"


def test_a_schedule_cannot_be_changed_from_outside() -> None:
    packed = np.array([Code.TURN], dtype=np.int64)
    schedule = Schedule(packed)
    packed[0] = Code.BACKWARD
    assert schedule[0] == Turn()


def test_the_builder() -> None:
    build = ScheduleBuilder()
    build.sweep(1, 3)
    build.tape(4)
    build.turn()
    build.backward(4)
    build.drop_state(3)
    build.sweep(1, 2, keep_last=False)
    build.sweep(2, 1)
    assert build.build().to_text() == "F1 F2 -x1 F3 -x2 T4 turn B4 -x3 F1 F2 -x1 -x2"


def test_a_hundred_thousand_steps_take_a_few_megabytes() -> None:
    schedule = revolve_schedule(100_000, 1000)
    assert len(schedule) < 6 * 100_000
    assert schedule.nbytes < 5 * 10**6
