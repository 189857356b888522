"""A model on more than one device is refused by name, as is one on a device of another type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import ProfilerMeter
from ckptsched.tensors.devices import drawn_elsewhere, matters, several_devices
from tests.support.networks import planned


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.linear(x) + more.sum().item() if more.is_cpu else self.linear(x)


class Away(nn.Module):
    """Hands its state to another device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to("meta")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def with_parameter_elsewhere() -> nn.Module:
    model = net()
    model[2].weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    return model


def with_buffer_elsewhere() -> nn.Module:
    model = net()
    model[1].running_mean = torch.empty(4, device="meta")
    return model


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (with_parameter_elsewhere(), torch.randn(3, 4), r"'0.weight' on cpu, .*'2.weight' on meta"),
        (with_buffer_elsewhere(), torch.randn(3, 4), r"'0.weight' on cpu, .*_mean' on meta"),
        (net(), torch.empty(3, 4, device="meta"), r"'0.weight' on cpu, the sample on meta"),
        (net(), torch.empty(3, 4, device="meta", dtype=torch.long), r"on cpu, the sample on meta"),
        (
            net().to("meta"),
            torch.zeros(3, 4, dtype=torch.long),
            r"the sample on cpu, parameter '0.weight' on meta",
        ),
    ],
)
def test_profile_names_what_is_where(model: nn.Module, x: Tensor, message: str, fake: bool) -> None:
    with pytest.raises(cs.ProfileError, match=rf"more than one device \(.*{message}\).*model.to"):
        cs.profile(model, x, fake=fake)


def test_what_every_stage_is_given_counts() -> None:
    meta = torch.empty(3, device="meta")
    with pytest.raises(cs.ProfileError, match="what every stage is given on meta"):
        cs.profile(Adding(), torch.randn(3, 4), meta, capture=False)
    with pytest.raises(cs.ProfileError, match="the sample on meta"):
        cs.profile(Adding(), torch.randn(3, 4), meta)
    model, x, more = Adding(), torch.randn(3, 4), torch.ones(3)
    chain = cs.profile(model, x, more)
    trained = cs.checkpointed(model, cs.plan(chain, budget=2**40, solver="store_all"))
    with pytest.raises(cs.PlanMismatchError, match="meta"):
        trained(x, more.to("meta"))


def test_a_stage_that_hands_its_state_to_another_device() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Away())
    with pytest.raises(cs.ProfileError, match=r"'1' returns a tensor on meta, .* sample is on cpu"):
        cs.profile(model, torch.randn(3, 4))


def test_a_model_that_is_taken_apart_after_it_was_measured() -> None:
    model, x = net(), torch.randn(3, 4)
    plan = planned(model, x)
    model[2].to("meta")
    with pytest.raises(cs.PlanMismatchError, match=r"'0.weight' on cpu, .*'2.weight' on meta"):
        cs.checkpointed(model, plan)


def test_numbers_and_indices_may_stay_on_the_cpu() -> None:
    there = ("there", torch.empty(3, device="meta"))
    for tensor in (torch.tensor(2.0), torch.arange(4), torch.ones(3, dtype=torch.bool)):
        assert not matters(tensor)
        assert not several_devices([there, ("here", tensor)])
    assert several_devices([there, ("here", torch.ones(1))]) == "there on meta, here on cpu"
    assert several_devices([("a", torch.ones(1)), ("b", torch.ones(1))]) == ""


def test_a_device_of_another_type_is_refused_whatever_counts() -> None:
    model, x = net().to("meta"), torch.empty(3, 4, device="meta")
    with pytest.raises(cs.ProfileError, match="the sample lies on the meta device"):
        cs.profile(model, x, meter=ProfilerMeter())


def test_adaptive_solves_with_checkpoints_are_on_one_device() -> None:
    f = nn.Linear(2, 2)
    f.bias = nn.Parameter(torch.empty(2, device="meta"))
    y0 = torch.randn(2, requires_grad=True)
    with pytest.raises(cs.ExecutionError, match=r"found .* on cpu, .* on meta"):
        cs.solve_adaptive(lambda t, y: f(y), y0, torch.tensor([0.0, 1.0]), checkpoints=3)


def test_draws_on_a_gpu_that_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda k: states[k])

    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            states[1].add_(1)
            return x * 2

    model: Any = nn.Sequential(nn.Linear(4, 4), Draws())
    with pytest.raises(cs.ProfileError, match=r"'1' draws random numbers on another device"):
        cs.profile(model, torch.randn(3, 4))
    seen = {name: drawn_elsewhere(torch.device(name)) for name in ("cuda:0", "cuda", "cuda:1")}
    one, two = (state.numpy().tobytes() for state in states)
    assert seen == {"cuda:0": (two,), "cuda": (two,), "cuda:1": (one,)}
