"""Operations of a step that is watched: timelines as measured, names in profiles and snapshots."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.executor.checkpointed import Checkpointed
from ckptsched.executor.step import watch
from ckptsched.memory.meters import AllocatorMeter, ProfilerMeter
from ckptsched.schedule.language import Backward, Forward
from ckptsched.workload.graph import Graph
from tests.support.networks import NETWORKS, ode_net, planned, tight


class Skips(nn.Module):
    """A ladder of linear layers, whose plans are by value in small budgets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if k < 4 else torch.relu(layer(x) + kept[7 - k])
            if k < 4:
                kept.append(x)
        return x


def ladder() -> tuple[nn.Module, Tensor, cs.Plan]:
    model, x = Skips(), torch.randn(128, 32)
    plan = cs.plan(model, x, budget="90%", cache=False)
    assert isinstance(plan.chain, Graph)
    return model, x, plan


# -- timelines


def check_timeline(model: nn.Module, plan: cs.Plan, x: Tensor) -> None:
    found = cs.verify(model, plan, x, timeline=True)
    assert found.ok
    measured, projected = found.timeline_bytes, plan.trace.timeline.tolist()
    assert len(measured) == len(projected)
    assert max(measured) == found.measured_peak_bytes
    # Before its first run a step looks at the random state, to see at its end whether it moved.
    assert measured[0] <= max(projected[0], torch.get_rng_state().nbytes)
    assert all(a <= b for a, b in zip(measured[1:], projected[1:], strict=True))
    assert measured[plan.trace.peak_position] == found.measured_peak_bytes
    # Nearly all to the byte; a stage may take less on a path that the profile bounds.
    same = sum(a == b for a, b in zip(measured, projected, strict=True))
    assert same >= 0.85 * len(projected)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_operation_takes_what_is_projected(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    chain = cs.profile(model, x)
    for solver in ("store_all", "every_2", "input_only", "chain_dp"):
        check_timeline(model, tight(chain, solver), x)


def test_each_operation_of_a_plan_by_value_does() -> None:
    model, x, plan = ladder()
    check_timeline(model, plan, x)


@pytest.mark.skipif(not AllocatorMeter.available(), reason="there is no counting allocator here")
def test_both_meters_give_one_timeline() -> None:
    model, x = ode_net()
    plan = planned(model, x, "every_2")
    one, other = (
        cs.verify(model, plan, x, timeline=True, meter=meter)
        for meter in (AllocatorMeter(), ProfilerMeter())
    )
    assert one.timeline_bytes == other.timeline_bytes


def test_the_peak_is_the_same_without_a_timeline() -> None:
    model, x = ode_net()
    plan = planned(model, x, "every_2")
    without = cs.verify(model, plan, x)
    assert without.timeline_bytes == ()
    assert cs.verify(model, plan, x, timeline=True).measured_peak_bytes == (
        without.measured_peak_bytes
    )


# -- names


def expected_names(plan: cs.Plan) -> list[str]:
    """A name for each run and backward, in order."""
    names, seen = [], set[int]()
    for operation in plan.schedule:
        if isinstance(operation, Forward):
            again = " again" if operation.stage in seen else ""
            tape = " with tape" if operation.tape else ""
            seen.add(operation.stage)
            verb = f"forward{again}{tape}"
        elif isinstance(operation, Backward):
            verb = "backward"
        else:
            continue
        names.append(f"ckptsched: {verb} {plan.chain.stage_name(operation.stage)}")
    return names


def profiled(run: Callable[[], object]) -> list[str]:
    """Names of our ranges in a profile of a run, in order of their beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = sorted(profile.events() or (), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name.startswith("ckptsched: ")]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only"])
@pytest.mark.parametrize("steps_before", [0, 2])  # after which stages share graphs
def test_stages_have_names_in_profiles(solver: str, steps_before: int) -> None:
    model, x = ode_net()
    plan = planned(model, x, solver)
    planned_model = cs.checkpointed(copy.deepcopy(model), plan)
    for _ in range(steps_before):
        gradients(model, x)
        gradients(planned_model, x)
    found: list[list[Tensor]] = []
    names = profiled(lambda: found.append(gradients(planned_model, x)))
    assert names == expected_names(plan)
    assert all(map(torch.equal, found[0], gradients(model, x)))
    assert all(map(torch.equal, gradients(planned_model, x), gradients(model, x)))


def test_stages_of_plans_by_value_have_names_in_profiles() -> None:
    model, x, plan = ladder()
    planned_model = cs.checkpointed(model, plan)
    gradients(planned_model, x)
    assert profiled(lambda: gradients(planned_model, x)) == expected_names(plan)


def test_a_backward_that_stages_share_has_the_names_of_both_ends() -> None:
    model, x = ode_net()
    plan = planned(model, x, "store_all")
    planned_model = cs.checkpointed(model, plan)
    for _ in range(2):
        gradients(planned_model, x)
    loss = planned_model(x).sum()  # unseen by the profiler: some stages share a graph
    names = profiled(loss.backward)
    assert any(" to " in name for name in names)
    assert len(names) < len(plan.chain)
    assert all(name.startswith("ckptsched: backward ") for name in names)


def test_without_a_profiler_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ode_net()
    planned_model = cs.checkpointed(model, planned(model, x, "every_2"))
    monkeypatch.setattr(watch, "range_name", lambda *given: pytest.fail("a range was named"))
    gradients(planned_model, x)
    with ProfilerMeter().window():  # a profiler of our own, which counts bytes alone
        gradients(planned_model, x)


def test_what_is_pickled_is_watched_by_nobody() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    planned_model = cs.checkpointed(model, planned(model, x, "store_all"))
    prepared = planned_model.calls.prepared
    prepared.watch = lambda p, end: pytest.fail("watched")
    other = pickle.loads(pickle.dumps(planned_model))
    assert isinstance(other, Checkpointed)
    assert other.calls.prepared.watch is None
    assert all(map(torch.equal, gradients(other, x), gradients(model, x)))


# -- snapshots of CUDA's memory, with torch's part of it played here


def test_blocks_in_snapshots_have_the_name_of_their_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["the user's"]
    monkeypatch.setattr(torch._C, "_cuda_setMemoryMetadata", said.append, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryMetadata", lambda: said[-1], raising=False)
    with watch._range("ckptsched: forward 0", in_snapshots=True):
        assert said[-1] == "ckptsched: forward 0"
    assert said[-1] == "the user's"
    with pytest.raises(RuntimeError), watch._range("ckptsched: forward 1", in_snapshots=True):
        raise RuntimeError
    assert said[-2:] == ["ckptsched: forward 1", "the user's"]


@pytest.mark.parametrize("recorded", [True, False])
def test_steps_on_cuda_are_named_while_memory_is_recorded(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    prepared = cs.checkpointed(model, planned(model, x, "store_all")).calls.prepared
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: recorded, raising=False)
    assert (watch.watch_of(prepared, torch.device("cuda")) is not None) == recorded
    assert watch.watch_of(prepared, torch.device("cpu")) is None
    monkeypatch.delattr(torch._C, "_cuda_isHistoryEnabled")
    assert watch.watch_of(prepared, torch.device("cuda")) is None
