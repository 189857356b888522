"""The parts of the executor's benchmark: peers, finer stages, what is left of them in tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsched as cs
from benchmarks.document import Section
from benchmarks.executor.networks import Network, make
from benchmarks.executor.peers import Forward, eager_peers, segment_numbers, sequential
from benchmarks.executor.rows import Options, Ours, Report, Row, Step, measure
from benchmarks.executor.tables import goals, grid, notes

CPU = torch.device("cpu")
NAMES = ["ode-resnet", "mlp-rk4", "transformer"]


def gradients(network: Network, forward: Forward) -> list[torch.Tensor | None]:
    network.model.zero_grad()
    network.step(forward)
    return [parameter.grad for parameter in network.model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_every_peer_gives_the_gradients_of_plain_autograd(name: str) -> None:
    network = make(name, CPU, quick=True)
    expected = gradients(network, network.model)
    for peer in (*eager_peers(network), sequential(network, 3)):
        found = gradients(network, peer.forward)
        for left, right in zip(found, expected, strict=True):
            assert left is not None
            assert right is not None
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet50", "transformer"])
def test_finer_stages_are_the_same_network(name: str) -> None:
    pytest.importorskip("torchvision")
    network = make(name, CPU, quick=True)
    assert network.finer is not None
    assert {id(p) for p in network.finer.parameters()} == {
        id(p) for p in network.model.parameters()
    }
    found = gradients(network, network.finer)
    for left, right in zip(found, gradients(network, network.model), strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)


def test_anode_runs_only_where_there_are_ode_blocks() -> None:
    names = {n: [x.name for x in eager_peers(make(n, CPU, True))] for n in NAMES}
    assert [n for n in NAMES if "ANODE" in names[n]] == ["ode-resnet", "mlp-rk4"]


@pytest.mark.parametrize("steps", [2, 7, 74, 1002])
def test_segment_numbers_are_distinct_cuts_from_two_on(steps: int) -> None:
    numbers = segment_numbers(steps)
    lengths = [steps // k for k in numbers]
    assert numbers[0] == 2
    assert all(2 <= k <= steps for k in numbers)
    assert len(set(lengths)) == len(lengths)
    assert any(abs(k - steps**0.5) <= 0.5 * steps**0.5 for k in numbers)


def test_a_network_is_measured_and_shown() -> None:
    before = torch.get_num_threads()
    try:
        report = measure("mlp-rk4", Options(rounds=1, quick=True, compiled=False))
    finally:
        torch.set_num_threads(before)
    data = json.loads(json.dumps(report.to_json()))
    assert grid(Report.from_json(data)) == grid(report)
    assert notes(Report.from_json(data)) == notes(report)
    plain = report.rows[0]
    assert plain.over_plain == 1
    assert len({row.step.peak_bytes for row in report.rows}) > 3
    for row in report.rows:
        assert row.best is not None
        assert row.best.step.peak_bytes <= row.step.peak_bytes
        assert row.best.step.gradient_difference == 0
    assert len(grid(report).rows) == len(report.rows)
    assert report.what in notes(report)[0]


def row(peer: str, ratio: float | None, ours: int = 90) -> Row:
    planned = Ours(
        step=Step(peak_bytes=ours, gradient_difference=0.0),
        finer=False,
        ratio=ratio or 0.0,
        median_ratio=ratio or 0.0,
        overhead=0.0,
        solver="chain_dp",
    )
    return Row(
        network="n",
        peer=peer,
        fused=False,
        step=Step(peak_bytes=100, gradient_difference=0.0),
        over_plain=1.0,
        ours=() if ratio is None else (planned,),
    )


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([row("recursive", 1.02)], [True, None, None, True]),
        ([row("recursive", 1.04)], [False, None, None, True]),
        ([row("recursive", None)], [False, None, None, None]),
        ([row("plain autograd", 1.0, ours=101)], [None, True, None, False]),
        ([row("partitioner, budget 1", 1.5)], [None, None, False, True]),
    ],
)
def test_goals_tell_slower_steps_missing_plans_and_broken_budgets(
    rows: list[Row], met: list[bool | None]
) -> None:
    report = Report(
        network="n", what="", plain_seconds=1.0, stages=(1,), plan_seconds=(1.0,), rows=tuple(rows)
    )
    checkpoints, plain, selective, _, budgets, _ = goals([report])
    assert [x.met for x in (checkpoints, plain, selective, budgets)] == met


def test_a_section_of_the_document_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "measured.md"
    section = Section("benchmarks.some", path)
    path.write_text(f"before\n{section.start}\nold\n{section.end}\nafter\n", encoding="utf-8")
    section.write("new")
    section.write("newer")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "newer" in text
    assert "old" not in text
    path.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the marks"):
        section.write("new")
    assert path.read_text(encoding="utf-8") == "no marks"


def test_the_document_has_the_sections() -> None:
    for name in (
        "benchmarks.planner",
        "benchmarks.executor",
        "benchmarks.odeint",
        "benchmarks.start",
    ):
        section = Section(name)
        text = section.document.read_text(encoding="utf-8")
        assert section.start in text
        assert section.end in text


def test_a_planned_step_of_finer_stages_has_the_same_gradients() -> None:
    network = make("transformer", CPU, quick=True)
    expected = gradients(network, network.model)
    assert isinstance(network.finer, nn.Module)
    chain = cs.profile(network.finer, network.x, loss=network.loss)
    planned = cs.checkpointed(network.finer, cs.plan(chain, budget="90%"))
    for left, right in zip(gradients(network, planned), expected, strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)
