"""A model from profile to page: layouts of states, and what was measured beside the projection."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptsched as cs
from ckptsched.base.budget import format_bytes
from ckptsched.workload.graph import Graph
from tests.planner.explorer.browser import Opened, chromium


def data_of(path: Path) -> dict[str, Any]:
    """The data of a page."""
    text = path.read_text(encoding="utf-8")
    found = text.partition('id="data">')[2].partition("</script>")[0]
    data: dict[str, Any] = json.loads(found)
    return data


def test_a_model_from_profile_to_page(tmp_path: Path) -> None:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)]
    model, x = nn.Sequential(*layers), torch.randn(32, 16)
    chain = cs.profile(model, x)
    assert len(chain.layouts) == len(chain) + 1
    assert set(chain.layouts) == {"float32[32, 16]"}
    assert cs.Chain.from_json(chain.to_json()) == chain
    bare = cs.Chain.from_json({k: v for k, v in chain.to_json().items() if k != "layouts"})
    assert bare.fingerprint == chain.fingerprint
    plan = cs.plan(chain, budget="80%", cache=False)
    verified = cs.verify(model, plan, x)
    assert verified.ok
    plan.to_html(tmp_path / "plan.html", verified=verified)
    data = data_of(tmp_path / "plan.html")
    assert data["exact"]
    assert data["inputLayout"] == "float32[32, 16]"
    (shown,) = data["plans"]
    assert shown["measured"]["peakBytes"] == verified.measured_peak_bytes
    assert shown["measured"]["ok"]
    network = json.loads(gzip.decompress(base64.b64decode(data["network"])))
    assert network["names"] == [chain.stage_name(i) for i in range(1, len(chain) + 1)]
    assert network["layouts"]["kinds"] == ["float32[32, 16]"]
    table = verified._repr_html_()
    assert table.count("<tr>") == len(str(verified).splitlines())
    assert f"{verified.measured_peak_bytes} bytes" in table


def test_the_layers_of_a_recorded_model_are_its_blocks(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x).relu().cos().exp().tanh()
            return x

    x = torch.randn(64, 8)
    captured = cs.captured(Net(), x, cuts="every")
    chain = cs.profile(captured, captured.take(x))
    cs.plan(chain, budget="100%", cache=False).to_html(tmp_path / "plan.html")
    data = data_of(tmp_path / "plan.html")
    network = json.loads(gzip.decompress(base64.b64decode(data["network"])))
    blocks = network["blocks"]
    assert "layers.0" in [name for name, _, _ in blocks]
    assert blocks[0][1] == 1
    assert blocks[-1][2] == len(chain)
    for one, two in itertools.pairwise(blocks):
        assert two[1] == one[2] + 1


class Ladder(nn.Module):
    """What goes up is read again on the way down, so that plans are by value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for k, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if k < 4 else torch.relu(layer(x) + kept[7 - k])
            if k < 4:
                kept.append(x)
        return x


def test_a_plan_by_value_with_its_measured_timeline(tmp_path: Path) -> None:
    model, x, file = Ladder(), torch.randn(128, 32), tmp_path / "plan.html"
    plan = cs.plan(model, x, budget="90%", cache=False)
    assert isinstance(plan.chain, Graph)
    found = cs.verify(model, plan, x, timeline=True)
    plan.to_html(file, verified=found)
    data = data_of(file)
    assert data["exact"]
    assert data["inputLayout"] == "float32[128, 32]"
    assert "counted to the byte" in data["plans"][0]["certificate"][0]
    network = json.loads(gzip.decompress(base64.b64decode(data["network"])))
    kinds, which = network["layouts"]["kinds"], network["layouts"]["which"]
    layouts = [kinds[k] for k in which]
    assert layouts[0] == layouts[-1] == "float32[128, 32]"  # of what it makes: all of the state
    assert "" in layouts  # where the chain hands on more than that
    with chromium() as browser:
        opened = Opened(browser, file)
        assert "measured" in opened.page.locator("#legend li").all_inner_texts()
        opened.press("Home")
        for p, size in enumerate(found.timeline_bytes):
            projected = int(plan.trace.timeline[p])
            said = opened.pairs("#details")["measured"]
            assert said.startswith(f"{format_bytes(size)}, ")
            off = f"{format_bytes(abs(size - projected))} {'more' if size > projected else 'less'}"
            assert said.endswith("as projected" if size == projected else off)
            assert opened.value_text().endswith(f"measured {said}")
            opened.press("ArrowRight")
        assert opened.faults == []
        assert opened.requests == [file.as_uri()]


def test_a_timeline_of_another_plan_is_refused(tmp_path: Path) -> None:
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))), torch.randn(64, 16)
    plans = [cs.plan(model, x, budget="100%", cache=False)]
    plans.append(cs.plan(model, x, budget=plans[0].least_budget_bytes, cache=False))
    found = cs.verify(model, plans[1], x, timeline=True)
    assert len(plans[0].schedule) != len(found.timeline_bytes)
    with pytest.raises(cs.PlanMismatchError, match=r"has \d+ operations, and the plan \d+"):
        plans[0].to_html(tmp_path / "plan.html", verified=found)
    assert not (tmp_path / "plan.html").exists()
