"""Plans of the graph of a recorded model: plain autograd's gradients, and the bytes projected."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ckptsched as cs
from ckptsched.base.errors import PlanMismatchError, WorkloadError
from ckptsched.capture.recording.stages import Captured
from ckptsched.executor.step.interpreter import Interpreter
from ckptsched.memory.meters import default_meter
from ckptsched.schedule.language import BACKWARD, TAPED, TURN, Forward
from ckptsched.simulator.simulator import simulate
from ckptsched.simulator.value_bytes import with_drops_by_value
from ckptsched.solvers.graph.value_search import searched
from ckptsched.workload.graph import Graph


class UNet(nn.Module):
    """Skips over many stages; batch norms, dropout, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.norm = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(2))
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for conv, norm in zip(self.down, self.norm, strict=True):
            x = F.dropout(self.act(norm(conv(x))), 0.2, self.training)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = skips.pop()
        for conv in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = self.act(conv(torch.cat([x, skips.pop()], 1)))
        out: Tensor = self.last(x)
        return out


class Branches(nn.Module):
    """One layer twice, views that several read, a value read three times, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.side, self.end = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        a = torch.tanh(self.mix(x))
        left, right = a.chunk(2, -1)
        b = torch.sigmoid(self.side(a)) * a
        c = self.end(left) + self.end(right) + b
        d = torch.tanh(self.mix(c)) * scale + a
        return {"y": d * b + a, "hidden": c}


class Gated(nn.Module):
    """Layers as of a transformer, whose stages offer lean tapes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(a, b) for a, b in ((8, 32), (8, 32), (32, 8)))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for _ in range(3):
            h = self.norm(x)
            x = x + F.dropout(self.down(F.gelu(self.gate(h)) * self.up(h)), 0.1, self.training)
        return x * first.tanh()


class Checked(nn.Module):
    """Calls that make nothing that lasts, as a look at a mask, which is over with it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first = torch.tanh(self.up(x))
        every = mask.all()
        second = torch.sigmoid(self.down(first))
        if not every:
            raise ValueError("a mask that leaves something out")
        third = self.down(first * torch.tanh(self.up(second)))
        _ = third + 1
        return torch.tanh(third) + second * x


def loss_of(output: Any) -> Tensor:
    parts = list(output.values()) if isinstance(output, dict) else [output]
    return torch.stack([part.square().mean() for part in parts]).sum()


Case = tuple[Captured, tuple[Tensor, ...], Graph]


@functools.cache
def case(name: str) -> Case:
    torch.manual_seed(0)
    model, sample = {
        "u_net": lambda: (UNet(), (torch.randn(2, 3, 16, 16),)),
        "branches": lambda: (
            Branches(),
            (torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)),
        ),
        "gated": lambda: (Gated(), (torch.randn(4, 6, 8),)),
        "checked": lambda: (Checked(), (torch.randn(4, 8), torch.ones(4, dtype=torch.bool))),
    }[name]()
    net = cs.captured(model, *sample, cuts="every")
    x = net.take(*sample)
    return net, x, Graph.of_values(cs.profile(net, x, loss=lambda y: loss_of(net.give(y))))


@st.composite
def runs_of(draw: st.DrawFn, graph: Graph) -> list[int]:
    """Packed runs: each node at most once in a phase, and with some tape in one of them."""
    assert graph.lined is not None
    n, random = len(graph), draw(st.randoms(use_true_random=False))
    density = draw(st.sampled_from((0.0, 0.1, 0.5)))
    late = draw(st.sampled_from((0.0, 0.3, 1.0)))
    runs: list[int] = []
    lasts = [n + 1 - v for v in range(1, n + 1)]
    taped = [0 if random.random() >= late else random.randint(0, last) for last in lasts]
    for k in range(n + 1):
        for v in range(1, (n + 1 - k if k else n) + 1):
            if taped[v - 1] == k:
                option = random.randrange(len(graph.stages[v - 1].tapes))
                runs.append(TAPED | option << 8 | v << 32)
            elif k == 0 or (random.random() < density and graph.lined.values[v - 1].made):
                runs.append(v << 32)
        runs.append(BACKWARD | (n + 1 - k) << 32 if k else TURN)
    return runs


def test_a_search_begins_with_schedules_of_any_length() -> None:
    """Of few bytes each stage runs as often as stages come after it, and there are many."""
    blocks, x = [Gated() for _ in range(4)], torch.randn(2, 3, 8)
    net = cs.captured(nn.Sequential(*blocks).eval(), x, cuts="every")  # which draws no numbers
    graph = Graph.of_values(cs.profile(net, net.take(x), loss=lambda y: loss_of(net.give(y))))
    assert graph.lined is not None
    n, runs, makes = len(graph), list[int](), graph.lined.values
    for k in range(n + 1):
        runs += [v << 32 for v in range(1, n + 1 - k) if k == 0 or makes[v - 1].made]
        runs += [TAPED | (n + 1 - k) << 32, BACKWARD | (n + 1 - k) << 32] if k else [TURN]
    assert len(runs) > 45 * n
    slow = with_drops_by_value(graph, np.array(runs, np.int64))
    least = simulate(graph, slow)
    for starts, known in (((), slow), ((slow,), None)):
        found = searched(graph, [least.peak_bytes], starts, known, moves=300)
        best = found.best(least.peak_bytes)
        assert best is not None
        assert found.least_bytes <= least.peak_bytes
        assert best[1].seconds <= least.seconds
        assert simulate(graph, best[0]) == best[1]


def plan_of(graph: Graph, packed: list[int]) -> cs.Plan:
    schedule = with_drops_by_value(graph, np.array(packed, np.int64))
    trace = simulate(graph, schedule)
    plan = cs.plan(graph, budget="100%", solver="store_all")
    return replace(plan, schedule=schedule, trace=trace, budget_bytes=trace.peak_bytes)


@pytest.mark.parametrize("name", ["u_net", "branches", "gated", "checked"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_runs_give_the_gradients_and_take_the_bytes(name: str, data: st.DataObject) -> None:
    net, x, graph = case(name)
    plan = plan_of(graph, data.draw(runs_of(graph)))
    found = cs.verify(net, plan, x, loss=lambda y: loss_of(net.give(y)))
    assert found.ok, str(found)
    assert found.max_gradient_difference == found.loss_difference == 0
    assert found.max_gradient > 0
    assert found.measured_peak_bytes == found.projected_peak_bytes


@pytest.mark.parametrize("name", ["u_net", "branches", "gated", "checked"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_stages_that_share_a_tape_give_the_gradients_and_take_the_bytes(
    name: str, data: st.DataObject
) -> None:
    net, x, graph = case(name)
    plan = plan_of(graph, data.draw(runs_of(graph)))
    trained, meter = cs.checkpointed(net, plan), default_meter(torch.device("cpu"))
    before = copy.deepcopy(net.state_dict())
    steps, peaks = [], []
    for model in (net, trained, trained, trained):
        net.load_state_dict(before)
        torch.manual_seed(0)
        found, measured = meter.measure(lambda model=model: step_of(net, model, x))
        steps.append([*found, *(buffer.clone() for buffer in net.buffers())])
        if model is trained:
            peaks.append(measured.peak_bytes)
    # In the first step by the plan each stage has a tape of its own, as it is looked at.
    assert peaks == [peaks[0]] * 3
    assert peaks[0] <= plan.peak_bytes
    for other in steps[1:]:
        assert len(other) == len(steps[0])
        assert all(map(torch.equal, other, steps[0]))


def step_of(net: Captured, model: nn.Module, x: tuple[Tensor, ...]) -> list[Tensor]:
    loss = loss_of(net.give(model(x)))
    wanted = [t for t in (*net.parameters(), *x) if t.requires_grad]
    for tensor in wanted:
        tensor.grad = None
    loss.backward()
    return [loss.detach(), *(t.grad for t in wanted if t.grad is not None)]


def test_stages_by_value_share_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = []
    together = Interpreter._taped_together

    def seen(self: Interpreter, p: int, first: int, last: int) -> None:
        shared.append((first, last))
        together(self, p, first, last)

    monkeypatch.setattr(Interpreter, "_taped_together", seen)
    net, x, graph = case("u_net")
    n = len(graph)
    runs = [*(TAPED | v << 32 for v in range(1, n + 1)), TURN]
    runs += [BACKWARD | v << 32 for v in range(n, 0, -1)]
    trained = cs.checkpointed(net, plan_of(graph, runs))
    step_of(net, trained, x)
    assert not shared
    step_of(net, trained, x)
    # The backward at the peak, and the first stage, run by themselves.
    assert sum(last - first + 1 for first, last in shared) >= n - 3
    assert len(shared) <= 3


def test_what_is_live_at_the_peak_adds_up_to_it() -> None:
    _, _, graph = case("u_net")
    for budget in ("100%", "85%", "75%"):
        trace = cs.plan(graph, budget=budget).trace
        assert sum(x.bytes for x in trace.live_at_peak) == trace.peak_bytes
        assert all(x.bytes > 0 for x in trace.live_at_peak)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_fitted_model_trains_by_value(share: float) -> None:
    torch.manual_seed(1)
    model, batch = UNet(), torch.randn(2, 3, 16, 16)
    plain = copy.deepcopy(model)
    least = cs.least_budget(model, batch)
    budget = least.peak_bytes + int(share * (least.store_all_bytes - least.peak_bytes))
    cs.fit(model, batch, budget=budget)
    assert cs.plan_of(model).peak_bytes <= budget
    for rows in (2, 2, 1):
        for net in (model, plain):
            torch.manual_seed(rows)
            loss_of(net(batch[:rows])).backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
        for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["u_net", "branches", "gated", "checked"])
def test_plans_by_value_are_never_worse_than_those_of_the_chain(name: str) -> None:
    graph = case(name)[2]
    chain = graph.lined
    assert chain is not None
    whole = cs.plan(chain, budget="100%").store_all_bytes
    with pytest.raises(cs.InfeasibleBudgetError) as of_chain:
        cs.plan(chain, budget=1, solver="chain_dp")
    with pytest.raises(cs.InfeasibleBudgetError) as found:
        cs.plan(chain, budget=1)
    least, named = of_chain.value.least_budget_bytes, found.value.least_budget_bytes
    assert least is not None
    assert named is not None
    assert named <= least
    assert cs.plan(chain, budget=named).peak_bytes <= named
    last = float("inf")
    for budget in (*range(int(0.6 * whole), whole, whole // 10), whole):
        if budget < least:
            continue
        lined = cs.plan(chain, budget=budget, solver="chain_dp")
        plan = cs.plan(chain, budget=budget)
        assert plan.seconds <= lined.seconds * (1 + 1e-9)
        last = min(last, plan.seconds)
    assert last <= chain.store_all_seconds * (1 + 1e-9)


def test_a_second_backward_and_one_with_create_graph() -> None:
    net, x, graph = case("branches")
    plan = plan_of(graph, _once_taped_late(graph))
    trained = cs.checkpointed(net, plan)
    expected = torch.autograd.grad(loss_of(net.give(net(x))), x, create_graph=True)
    second = torch.autograd.grad(loss_of({"y": expected[0]}), x)
    loss = loss_of(net.give(trained(x)))
    for keep in (True, False):
        for mine, theirs in zip(
            torch.autograd.grad(loss, x, retain_graph=keep), expected, strict=True
        ):
            assert torch.equal(mine, theirs)
    with pytest.warns(cs.BudgetWarning, match="create_graph"):
        found = torch.autograd.grad(loss_of(net.give(trained(x))), x, create_graph=True)
    again = torch.autograd.grad(loss_of({"y": found[0]}), x)
    for mine, theirs in zip(again, second, strict=True):
        torch.testing.assert_close(mine, theirs)


def _once_taped_late(graph: Graph) -> list[int]:
    """Each node runs bare, and again with all before it for its backward."""
    n = len(graph)
    runs = [v << 32 for v in range(1, n + 1)]
    runs.append(TURN)
    for v in range(n, 0, -1):
        runs += [u << 32 for u in range(1, v)]
        runs += [TAPED | v << 32, BACKWARD | v << 32]
    return runs


def test_a_plan_of_a_graph_comes_back_from_a_file(tmp_path: Any) -> None:
    net, x, graph = case("u_net")
    plan = cs.plan(graph, budget="75%")
    plan.save(tmp_path / "plan.json")
    again = cs.Plan.load(tmp_path / "plan.json")
    assert again.schedule == plan.schedule
    assert again.chain == graph
    assert cs.verify(net, again, x, loss=lambda y: loss_of(net.give(y))).ok


def test_a_plan_of_a_graph_for_another_program_is_refused() -> None:
    net = case("gated")[0]
    plan = cs.plan(case("u_net")[2], budget="80%")
    with pytest.raises(PlanMismatchError, match="another model"):
        cs.checkpointed(net, plan)
    stages = tuple(replace(x, ledger=None, other_tapes=()) for x in case("gated")[2].stages)
    by_hand = replace(case("gated")[2], lined=None, stages=stages)
    with pytest.raises(PlanMismatchError, match="without a model"):
        cs.checkpointed(net, cs.plan(by_hand, budget="100%"))


class Averaged(nn.Module):
    """An average that every layer reads and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = torch.tanh(layer(x))
            with torch.no_grad():
                self.average.mul_(0.9).add_(0.1 * x.mean(0))
            x = x * self.average.clone() + first
        return x


def test_a_model_with_buffers_that_it_reads_and_changes_is_planned_as_a_chain() -> None:
    torch.manual_seed(0)
    model, x = Averaged(), torch.randn(16, 8)
    chain = cs.profile(model, x)
    assert not chain.values
    plan = cs.plan(chain, budget="90%")
    assert plan.chain == chain
    assert cs.verify(model, plan, x).ok


def test_what_no_graph_can_be_made_of_is_refused() -> None:
    stage = cs.Stage(
        forward_seconds=1.0, backward_seconds=1.0, state_bytes=1, tape_bytes=1, gradient_bytes=1
    )
    with pytest.raises(WorkloadError, match="not known what each stage reads"):
        Graph.of_values(cs.Chain(stages=(stage,)))
    model, x = Gated(), torch.randn(4, 6, 8)
    chain = cs.profile(model, x, never_recompute=nn.LayerNorm)
    with pytest.raises(WorkloadError, match="run once"):
        Graph.of_values(chain)
    plan = cs.plan(chain, budget="90%")
    assert sum(isinstance(op, Forward) for op in plan.schedule) >= len(chain)


@pytest.mark.parametrize("name", ["u_net", "branches", "gated"])
def test_the_least_budget_is_told_whatever_the_budget(name: str) -> None:
    graph = case(name)[2]
    told = [cs.plan(graph, budget=budget).least_budget_bytes for budget in ("100%", "90%")]
    assert told[0] == told[1] < cs.plan(graph, budget="100%").store_all_bytes
    assert cs.plan(graph, budget=told[0]).peak_bytes <= told[0]
