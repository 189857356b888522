"""What a plan keeps of each stage: counted from the schedule, and said wherever plans are shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptsched as cs
from ckptsched.base.budget import format_bytes
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.planner.run_once import never_alone, run_again
from ckptsched.planner.tapes import counts_of, lines_of, tape_grid, tapes_of
from ckptsched.schedule.language import Forward, Turn
from ckptsched.workload.stage import Stage, TapeOption

NAMES = ("0:layers.0.norm", "2:layers.0.act in mlp", "4:layers.1.norm", "6:head")


@st.composite
def chains(draw: st.DrawFn) -> cs.Chain:
    """Short chains, of whose stages some offer a lean tape, and some may run once only."""
    stages = []
    for k in range(draw(st.integers(1, 5))):
        state, own = draw(st.integers(1, 4)), draw(st.integers(0, 9))
        again = (f"layers.{k}.act",)
        lean = TapeOption(
            name="lean",
            tape_bytes=state + own // 2,
            forward_seconds=1.0,
            backward_seconds=2.5,
            again=again,
        )
        stages.append(
            Stage(
                name=NAMES[k % len(NAMES)],
                forward_seconds=1.0,
                backward_seconds=2.0,
                state_bytes=state,
                tape_bytes=state + own,
                gradient_bytes=state,
                other_tapes=(lean,) if draw(st.booleans()) else (),
                once=draw(st.booleans()),
            )
        )
    return cs.Chain(stages=tuple(stages), input_bytes=2)


def plans_of(chain: cs.Chain) -> list[Plan]:
    [whole] = plan_each(chain, ["100%"], cache=False)
    assert isinstance(whole, Plan)
    sizes = [*range(whole.least_budget_bytes, whole.store_all_bytes + 1, 3)]
    return [x for x in plan_each(chain, sizes, cache=False) if isinstance(x, Plan)]


@given(chains())
def test_tapes_are_those_of_the_schedule(chain: cs.Chain) -> None:
    for plan in plans_of(chain):
        tapes = tapes_of(chain, plan.schedule)
        assert [tape.stage for tape in tapes] == [*range(1, len(chain) + 1)]
        operations = [*plan.schedule]
        turn = operations.index(Turn())
        runs = Counter(op.stage for op in operations if isinstance(op, Forward))
        for tape in tapes:
            taped = [
                (k, op)
                for k, op in enumerate(operations)
                if isinstance(op, Forward) and op.tape and op.stage == tape.stage
            ]
            at, last = taped[-1]
            assert (tape.option, tape.is_kept) == (last.option, at < turn)
            assert tape.runs == runs[tape.stage]
            assert tape.is_kept or tape.runs > 1
            assert tape.kept_bytes <= tape.own_bytes
        counts = counts_of(tapes)
        assert sum(counts.values()) == len(chain)
        text = str(plan)
        for line in lines_of(tapes):
            assert line in text
        grid = tape_grid(chain, tapes)
        assert sum(int(row[1]) for row in grid.rows) == len(chain)
        lean = [tape for tape in tapes if tape.is_lean]
        assert any("layers.*.act" in row[6] or ".act" in row[6] for row in grid.rows) == bool(lean)


@given(chains())
def test_stages_that_run_once_do_and_the_least_budget_is_exact(chain: cs.Chain) -> None:
    plans = plans_of(chain)
    for plan in plans:
        assert run_again(chain, plan.schedule) == []
        assert plan.lower_bound_seconds <= plan.seconds * (1 + 1e-12)
    least = plans[0].least_budget_bytes
    assert plans[0].peak_bytes <= least
    below = plan_each(chain, [least - 1], cache=False)[0]
    assert isinstance(below, cs.InfeasibleBudgetError)
    assert below.least_budget_bytes == least
    once = sum(stage.once for stage in chain.stages)
    assert (f"{once} of {len(chain)} stages run once only" in str(below)) == bool(once)
    if not once:
        assert never_alone(chain) is chain


@given(chains())
def test_what_stages_say_survives_a_file(chain: cs.Chain) -> None:
    again = cs.Chain.from_json(chain.to_json())
    assert again == chain
    assert again.fingerprint == chain.fingerprint


def two_tapes() -> cs.Chain:
    lean = TapeOption(
        name="lean", tape_bytes=1500, forward_seconds=1.0, backward_seconds=2.5, again=("a.act",)
    )
    stage = Stage(
        name="a",
        forward_seconds=1.0,
        backward_seconds=2.0,
        state_bytes=1000,
        tape_bytes=4000,
        gradient_bytes=1000,
        other_tapes=(lean,),
    )
    return cs.Chain(stages=(stage,) * 4)


def test_lean_tapes_are_said_in_each_place() -> None:
    chain = two_tapes()
    plan = cs.plan(chain, budget=10000, cache=False)
    counts = counts_of(tapes_of(chain, plan.schedule))
    assert counts["lean"]
    line = f"{counts['lean']} keep a lean tape: {format_bytes(counts['lean'] * 1500)} of "
    assert line in str(plan)
    explained = str(plan.explain())
    assert line in explained
    assert "a.act" in explained
    found = cs.tradeoff(chain, [10000, "100%"], cache=False)
    assert "lean" in str(found)
    whole = cs.tradeoff(cs.Chain(stages=(replace(chain.stages[0], other_tapes=()),)), cache=False)
    assert "lean" not in str(whole)
    assert found.to_json()["rows"][0]["tapes"] == counts


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_stage_runs_once_or_not(value: object) -> None:
    data = two_tapes().to_json()
    data["kinds"][0]["once"] = value
    with pytest.raises(cs.WorkloadError, match="once of stage 1 must be true or false"):
        cs.Chain.from_json(data)


def test_what_tapes_keep_is_within_the_peak() -> None:
    import torch
    from torch import nn

    layers = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(3)]
    plan = cs.plan(nn.Sequential(*layers), torch.randn(16, 32), budget="100%", cache=False)
    tapes = tapes_of(plan.chain, plan.schedule)
    assert all(tape.is_kept for tape in tapes)
    assert 0 < sum(tape.kept_bytes for tape in tapes) <= plan.peak_bytes
