"""Chains: what is refused and why, columns, JSON, names."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from ckptsched.base.errors import WorkloadError
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block, Signature, Stage, backward_variant
from tests.support.shared_chains import EXAMPLES, exact_stage, uniform
from tests.support.strategies import (
    chains,
    chains_with_options,
    ledger_chains,
    parted_chains_with_tapes,
)

DATA: dict[str, Any] = {"u_f": [1, 2], "u_b": [3, 4], "w_a": [5, 6, 7], "w_t": [8, 9]}
SIGNATURE = Signature(
    structure="abc",
    input_shape=(4, 3, 32, 32),
    input_stride=(3072, 1024, 32, 1),
    input_dtype="torch.float32",
    input_requires_grad=False,
    device="cpu",
    threads=2,
    training="train",
    autocast="off",
    torch_version="2.9.0",
)


@settings(deadline=None)
@given(chains(most_stages=6) | chains_with_options() | ledger_chains(most_stages=6, noise=True))
def test_chains_survive_json(chain: Chain) -> None:
    chain = replace(chain, name="a chain", signature=SIGNATURE)
    again = Chain.from_json(json.loads(json.dumps(chain.to_json())))
    assert again == chain
    assert again.fingerprint == chain.fingerprint
    assert again.has_ledger == chain.has_ledger


def test_names_survive_json_and_equal_steps_are_one_object(tmp_path: Path) -> None:
    step, head = replace(exact_stage(), name="step"), replace(exact_stage(), name="head")
    blocks = (Block(name="ode", first=1, last=3, buffer_bytes=8), Block(name="h", first=4, last=4))
    chain = Chain(stages=(step, step, step, head), blocks=blocks, held_bytes=10)
    path = tmp_path / "chain.json"
    chain.save(path)
    again = Chain.load(path)
    assert again == chain
    assert again.stages[0] is again.stages[2]
    assert [again.stage_name(i) for i in range(1, 5)] == [
        *("ode.step[0]", "ode.step[1]", "ode.step[2]", "h.head")
    ]


def test_the_planning_keys_alone_are_enough() -> None:
    chain = Chain.from_json(DATA)
    assert len(chain) == 2
    columns = chain.arrays
    assert columns.forward_seconds.tolist() == [0, 1, 2]
    assert columns.state_bytes.tolist() == columns.gradient_bytes.tolist() == [5, 6, 7]
    assert columns.tape_bytes.tolist() == [0, 8, 9]
    assert columns.forward_overhead_bytes.tolist() == [0, 0, 0]
    assert chain.store_all_seconds == 10
    assert not chain.has_ledger
    assert chain.stage_name(2) == "stage 2"
    with pytest.raises(ValueError, match="read-only"):
        columns.tape_bytes[1] = 3


def test_units_of_files() -> None:
    data = DATA | {"size_unit": "KiB", "time_unit": "ms", "u_loss": 2, "o_loss": 3, "w_held": 1}
    chain = Chain.from_json(data)
    assert chain.input_bytes == 5 * 1024
    assert chain.stages[1].tape_bytes == 9 * 1024
    assert chain.stages[0].forward_seconds == pytest.approx(1e-3)
    assert chain.loss_seconds == pytest.approx(2e-3)
    assert (chain.loss_overhead_bytes, chain.held_bytes) == (3 * 1024, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u_b": [3]}, "column 'u_b' needs 2 values, found 1 values"),
        ({"w_a": [5, 6]}, "column 'w_a' needs 3 values, found 2 values"),
        ({"w_g": [1, 2]}, "column 'w_g' needs 3 values, found 2 values"),
        ({"o_f": [1, 2, 3]}, "column 'o_f' needs 2 values, found 3 values"),
        ({"w_t": None}, "column 'w_t' needs 2 values, found nothing"),
        ({"u_f": [1, math.nan]}, "the forward of stage 2 must take 0 seconds or more; found nan"),
        ({"u_b": [math.inf, 1]}, "the backward of stage 1 must take 0 seconds or more; found inf"),
        ({"u_f": [-1, 2]}, "found -1"),
        ({"u_loss": math.nan}, "the loss must take"),
        ({"w_t": [5, 9]}, "the tape of stage 1 has 5 bytes, fewer than the 6 of the state"),
        ({"w_a": [5, 6, 7.5]}, "state_bytes of stage 2 must be a whole number"),
        ({"w_a": [-5, 6, 7]}, "the chain's input_bytes must be a whole number of bytes"),
        ({"o_b": [0, -1]}, "backward_overhead_bytes of stage 2"),
        ({"w_p": [0.5, 0]}, "parameter_gradient_bytes of stage 1"),
        ({"w_held": -1}, "held_bytes"),
        ({"u_f": []}, "column 'u_b' needs 0 values"),
        (
            {"size_unit": "furlong"},
            "size_unit 'furlong' is unknown; give one of bytes, B, KiB, MiB",
        ),
        ({"time_unit": ["s"]}, "time_unit ['s'] is unknown; give one of s, ms, us, ns"),
        ({"n": 3}, "n is 3, but column 'u_f' has 2 values"),
        ({"kind": [0]}, "column 'kind' needs 2 values, found 1 values"),
        ({"kind": 0}, "column 'kind' needs 2 values, found 0"),
        ({"kind": [0, 1]}, "counts from 0 to below 1, the number of kinds; found 1"),
        ({"kind": [0, -1]}, "found -1"),
        ({"kind": [0, True]}, "found True"),
        ({"w_a": [True, 6, 7]}, "each value of column 'w_a' must be a number, found True"),
        ({"u_f": [True, 1]}, "each value of column 'u_f' must be a number, found True"),
        ({"u_f": ["1", 1]}, "each value of column 'u_f' must be a number, found '1'"),
        ({"w_held": True}, "w_held must be a number, found True"),
        ({"u_loss": "1"}, "u_loss must be a number, found '1'"),
        ({"random_state_bytes": -1}, "random_state_bytes must be a whole number"),
        (
            {"blocks": [{"name": "a", "first": 1, "last": 2, "buffer_bytes": 0.5}]},
            "buffer_bytes of block 'a' must be a whole number",
        ),
        (
            {"w_a": [2**63, 1, 1]},
            "must be at most 1125899906842624 bytes; found 9223372036854775808",
        ),
        ({"u_b": [1e308, 1e308]}, "must take at most 1e+18 seconds"),
        ({"u_f": 3}, "this is not a chain"),
        ({"blocks": [{"name": "a", "first": 1, "last": 1}]}, "blocks end at stage 1 of 2"),
        ({"blocks": [{"name": "a", "first": 2, "last": 2}]}, "'a' covers 2..2, expected a start"),
        ({"blocks": [{"first": 1}]}, "this is not a chain"),
    ],
)
def test_damaged_data_are_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in (DATA | changes).items() if value is not None}
    with pytest.raises(WorkloadError) as caught:
        Chain.from_json(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_bytes": -1}, "state_bytes of the ledger of stage 1 must be a whole number"),
        ({"tape_bytes": 0.5}, "tape_bytes of the ledger of stage 1"),
        ({"taped_peak_bytes": True}, "taped_peak_bytes of the ledger of stage 1"),
        ({"backward_peak_bytes": [1] * 7}, "needs 8 values, found 7 values"),
        ({"backward_peak_bytes": [1] * 7 + [-1]}, "found -1"),
        ({"backward_peak_bytes": 3}, "this is not a chain"),
        ({"input_saved": 1}, "input_saved of the ledger of stage 1 must be true or false, found 1"),
    ],
)
def test_damaged_ledgers_are_refused(changes: dict[str, Any], message: str) -> None:
    data = Chain(stages=(exact_stage(),) * 3, held_bytes=10).to_json()
    data["kinds"][0]["ledger"] |= changes
    with pytest.raises(WorkloadError) as caught:
        Chain.from_json(data)
    assert message in str(caught.value)


def test_a_chain_with_few_exact_stages_survives_json() -> None:
    exact = exact_stage()
    chain = Chain(stages=(exact, replace(exact, ledger=None)))
    again = Chain.from_json(json.loads(json.dumps(chain.to_json())))
    assert again == chain
    assert again.fingerprint == chain.fingerprint


def test_missing_columns_are_named() -> None:
    with pytest.raises(WorkloadError, match="it needs the columns u_f, u_b, w_a, w_t"):
        Chain.from_json({})


def test_an_empty_chain_is_refused() -> None:
    with pytest.raises(WorkloadError, match="at least one stage"):
        Chain(stages=())
    with pytest.raises(WorkloadError, match="at least one stage"):
        Chain.from_json({"u_f": [], "u_b": [], "w_a": [1], "w_t": []})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"u_f": [1]}', "\xff"])
def test_files_that_hold_no_chain(tmp_path: Path, text: str) -> None:
    path = tmp_path / "chain.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(WorkloadError):
        Chain.load(path)
    with pytest.raises(WorkloadError, match=r"cannot be read: No such file.*writes a chain"):
        Chain.load(tmp_path / "missing.json")


def test_blocks_must_cover_the_chain_in_order() -> None:
    for spans in ([(1, 2), (2, 3)], [(1, 1), (3, 3)], [(2, 3)], [(1, 2)], [(1, 3), (4, 3)]):
        blocks = tuple(Block(name="b", first=a, last=b) for a, b in spans)
        with pytest.raises(WorkloadError, match="blocks"):
            replace(uniform(3), blocks=blocks)


def test_uniform_chains() -> None:
    assert uniform(5).is_uniform
    assert Chain(stages=(exact_stage(),) * 3).is_uniform
    stages = uniform(3).stages
    for change in (
        {"forward_seconds": 9.0},
        {"tape_bytes": 9},
        {"gradient_bytes": 9},
        {"backward_overhead_bytes": 9},
        {"ledger": exact_stage().ledger},
        {"other_tapes": stages[0].tapes},
    ):
        other = replace(stages[0], **change)
        assert not Chain(stages=(*stages, other)).is_uniform
    first_use = replace(stages[0], parameter_gradient_bytes=9)
    assert Chain(stages=(*stages, first_use)).is_uniform  # of shared parameters
    assert Chain(stages=(first_use,)).is_uniform
    assert not Chain(stages=(first_use, *stages)).is_uniform
    assert not Chain(stages=(first_use,) * 3).is_uniform


def test_a_stage_may_offer_several_tapes() -> None:
    tapes = [{"u_f": 3, "u_b": 0, "w_t": 7}, {"name": "slopes", "u_f": 1, "u_b": 3, "w_t": 20}]
    kinds = [{"name": "step", "ledger": None, "tapes": tapes}]
    data = DATA | {"kinds": kinds, "kind": [0, 0], "size_unit": "KiB", "time_unit": "ms"}
    chain = Chain.from_json(data)
    first, second = chain.stages[0].other_tapes
    assert chain.stages[0].tapes == (chain.stages[0].tapes[0], first, second)
    assert (first.tape_bytes, first.forward_seconds) == (7 * 1024, 0.003)
    assert (second.name, second.backward_seconds) == ("slopes", 0.003)
    assert chain.offers_tapes
    assert not chain.has_ledger
    # The fastest tape of each stage takes 3 ms.
    assert chain.store_all_seconds == pytest.approx(0.003 + 0.003)
    plain = replace(chain, stages=tuple(replace(x, other_tapes=()) for x in chain.stages))
    assert plain.fingerprint != chain.fingerprint
    assert "tapes" not in plain.to_json()["kinds"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_t": 5}, "tape 1 of stage 1 has 5 bytes, fewer than the 6 of the state"),
        ({"u_f": -1}, "the forward of tape 1 of stage 1 must take 0 seconds or more"),
        ({"u_b": "1"}, "u_b of a tape must be a number"),
        ({"o_b": 0.5}, "backward_overhead_bytes of tape 1 of stage 1 must be a whole number"),
        ({"w_t": None}, "w_t of a tape must be a number"),
    ],
)
def test_impossible_tapes_are_refused(change: dict[str, Any], message: str) -> None:
    tape = {"u_f": 3, "u_b": 0, "w_t": 9} | change
    kinds = [{"name": "", "ledger": None, "tapes": [tape]}]
    with pytest.raises(WorkloadError, match=message):
        Chain.from_json(DATA | {"kinds": kinds, "kind": [0, 0]})


@settings(max_examples=30, deadline=None)
@given(parted_chains_with_tapes(most_options=2))
def test_exact_bytes_of_other_tapes_survive_json(chain: Chain) -> None:
    assert chain.has_ledger
    again = Chain.from_json(json.loads(json.dumps(chain.to_json())))
    assert again == chain
    assert again.fingerprint == chain.fingerprint
    # Without those of one tape there are none of the chain.
    for i, stage in enumerate(chain.stages):
        for tape in stage.other_tapes:
            bare = tuple(replace(x, ledger=None) if x is tape else x for x in stage.other_tapes)
            stages = (*chain.stages[:i], replace(stage, other_tapes=bare), *chain.stages[i + 1 :])
            assert not replace(chain, stages=stages).has_ledger


def test_a_tape_does_not_change_the_states() -> None:
    stage = exact_stage()
    assert stage.ledger is not None
    other = replace(stage.ledger, state_bytes=stage.ledger.state_bytes + 1)
    tape = replace(stage.tapes[0], ledger=other)
    with pytest.raises(WorkloadError, match="tape 1 of stage 1 has other states than the ledger"):
        Chain(stages=(replace(stage, other_tapes=(tape,)),))


def test_at_most_255_other_tapes() -> None:
    stage = uniform(1).stages[0]
    Chain(stages=(replace(stage, other_tapes=stage.tapes * 255),))
    with pytest.raises(WorkloadError, match="offers 256 other tapes; 255 at most"):
        Chain(stages=(replace(stage, other_tapes=stage.tapes * 256),))


def test_the_fingerprint_is_of_what_matters() -> None:
    chain = Chain.from_json(EXAMPLES["E1"][0])
    assert replace(chain, name="other").fingerprint == chain.fingerprint
    others = [
        replace(chain, held_bytes=1),
        replace(chain, loss_seconds=1.0),
        replace(chain, signature=SIGNATURE),
        replace(chain, blocks=(Block(name="b", first=1, last=2),)),
        replace(chain, stages=chain.stages[:1]),
    ]
    prints = {chain.fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == 1 + len(others)


def test_backward_variants_are_the_numbers_to_seven() -> None:
    bits = (False, True)
    found = [
        backward_variant(input_held=a, output_held=b, first=c)
        for a in bits
        for b in bits
        for c in bits
    ]
    assert found == list(range(8))


def test_a_stage_is_hashable_and_by_keyword() -> None:
    assert len({exact_stage(), exact_stage()}) == 1
    with pytest.raises(TypeError):
        Stage("name", 1.0)  # type: ignore[call-arg]
