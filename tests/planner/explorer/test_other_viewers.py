"""Files of other viewers: PyTorch's own tools read the snapshot; sums are those of the plan."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from ckptsched.planner.explorer.other_viewers import seconds_of
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_one
from ckptsched.planner.tradeoff import tradeoff
from ckptsched.workload.chain import Chain
from tests.support.graphs import residual
from tests.support.shared_chains import exact_stage
from tests.support.small_chains import mixed_chain


def exact_plan() -> Plan:
    """A plan that was counted by a ledger."""
    chain = Chain(
        stages=(exact_stage(),) * 6, input_bytes=10, input_gradient_bytes=10, held_bytes=12
    )
    return plan_one(chain, "70%", cache=False)


PLANS = {
    "planning model": lambda: plan_one(mixed_chain(), "45%", cache=False),
    "ledger": exact_plan,
    "graph": lambda: plan_one(residual(2), "70%", cache=False),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]()


def test_a_snapshot_allocates_what_the_plan_does(plan: Plan, tmp_path: Path) -> None:
    plan.to_snapshot(tmp_path / "plan.pickle")
    data: dict[str, Any] = pickle.loads((tmp_path / "plan.pickle").read_bytes())
    held: dict[int, int] = {}
    peak, time = 0, 0
    for event in data["device_traces"][0]:
        assert event["time_us"] >= time
        time = event["time_us"]
        assert event["frames"][0]["name"]
        if event["action"] == "alloc":
            assert event["addr"] not in held
            held[event["addr"]] = event["size"]
            peak = max(peak, sum(held.values()))
        elif event["action"] == "free_completed":
            assert held.pop(event["addr"]) == event["size"]
    assert peak == plan.peak_bytes
    assert time <= round(1e6 * plan.seconds)
    segment = data["segments"][0]
    blocks = {x["address"]: x for x in segment["blocks"] if x["state"] == "active_allocated"}
    assert {address: x["requested_size"] for address, x in blocks.items()} == held
    place = segment["address"]
    for block in segment["blocks"]:
        assert block["address"] == place
        place += block["size"]
    assert place == segment["address"] + segment["total_size"]


def test_torchs_own_tools_read_it(plan: Plan, tmp_path: Path) -> None:
    memory_viz = pytest.importorskip("torch.cuda._memory_viz")
    plan.to_snapshot(tmp_path / "plan.pickle")
    data = pickle.loads((tmp_path / "plan.pickle").read_bytes())
    assert f"{len(data['device_traces'][0])} entries" in memory_viz.trace(data)
    assert "segments: 1\n" in memory_viz.segsum(data)


def test_trace_events_take_the_plans_seconds_and_bytes(plan: Plan, tmp_path: Path) -> None:
    plan.to_chrome_trace(tmp_path / "plan.json")
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    spans = [x for x in events if x["ph"] == "X"]
    assert sum(x["dur"] for x in spans) == pytest.approx(1e6 * plan.seconds)
    assert sum(seconds_of(plan.chain, plan.schedule)) == pytest.approx(plan.seconds)
    sums = [sum(x["args"].values()) for x in events if x["ph"] == "C"]
    assert sums == plan.trace.timeline.tolist()
    again = [x for x in spans if x["tid"] == 2]
    assert len(again) == plan.forwards - len(plan.chain)
    for one, two in itertools.pairwise(spans):
        assert two["ts"] == pytest.approx(one["ts"] + one["dur"])


def test_notebooks_show_tables(plan: Plan) -> None:
    shown = plan._repr_html_()
    assert shown.count("<tr>") == len(str(plan).splitlines()) - 1
    assert "<script" not in shown
    assert 'role="img"' in shown
    assert plan.chain._repr_html_().startswith("<table>")


def test_a_trade_off_in_a_notebook_has_a_row_a_budget() -> None:
    found = tradeoff(mixed_chain("a <b> network"), 4, cache=False)
    shown = found._repr_html_()
    assert shown.count("<tbody>") == 2
    assert shown.split("<tbody>")[1].split("</tbody>")[0].count("<tr>") == len(found.rows)
    assert "<b>" not in shown
    assert "a &lt;b&gt; network" in shown
