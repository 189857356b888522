"""Plans with lean tapes: the gradients of plain autograd, and the bytes that were projected."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ckptsched as cs
from ckptsched.capture.inspection import Inspection
from ckptsched.capture.recording.stages import capture_as_before
from ckptsched.memory.meters import default_meter
from ckptsched.profiler.profile import default_loss, measure
from ckptsched.recompute.tape_contents import SHOWS_WHAT_IS_SAVED
from ckptsched.simulator.simulator import simulate
from ckptsched.tensors.pytree import State
from tests.support.lean_tapes import lean_runs, preferring_lean_tapes

pytestmark = pytest.mark.skipif(
    not SHOWS_WHAT_IS_SAVED, reason="this torch does not show what hooks have packed"
)


class ConvNet(nn.Module):
    """Convolutions with batch norms, activations in place, and a skip connection by `cat`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.again = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        y = F.max_pool2d(x, 2)
        y = F.silu(self.again(self.second(y)), inplace=True)
        y = F.interpolate(y, scale_factor=2.0)
        out: Tensor = self.last(F.gelu(torch.cat([x, y], 1)))
        return out


class Gated(nn.Module):
    """Layers as of a transformer: norms by hand, a gate, dropout, an activation of six steps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(a, b) for a, b in ((8, 32), (8, 32), (32, 8)))
        self.mix = nn.Linear(8, 8)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.2)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
            x = x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))
            h = self.mix(self.norm(x))
            x = x + 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h.pow(3))))
        return x


class Masked(nn.Module):
    """Attention by hand with a mask that is filled in place, and values that are decided."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, (8,))).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)) * 0.35
        scores = scores.masked_fill(self.mask, float("-inf"))
        weights = scores.softmax(-1)
        best = weights.argmax(-1, keepdim=True)
        y: Tensor = self.out(weights @ v)
        y[..., 0] = y[..., 0] * 2
        return F.gelu(y) * best.clamp(max=1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (ConvNet, (4, 3, 16, 16)),
    "gated": (Gated, (4, 6, 8)),
    "masked": (Masked, (4, 6, 8)),
}


@pytest.mark.parametrize("cuts", ["dear", "lean", "smallest"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_bytes(name: str, cuts: str) -> None:
    torch.manual_seed(1)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape, requires_grad=True)
    captured = cs.captured(model, x, cuts=cuts)  # type: ignore[arg-type]
    chain = preferring_lean_tapes(cs.profile(captured, captured.take(x)))
    whole = cs.plan(chain, budget="100%")
    least, most = whole.least_budget_bytes, whole.peak_bytes
    found = 0
    for budget in sorted({least, (least + most) // 2, most}):
        plan = cs.plan(chain, budget=budget)
        found += lean_runs(plan)
        result = cs.verify(captured, plan, captured.take(x))
        assert result.ok, str(result)
        assert result.max_gradient_difference == 0.0
        assert plan.peak_bytes - 1024 <= result.measured_peak_bytes <= plan.peak_bytes
    # What attention by hand keeps is either dear or no larger than what it would be made of.
    if cuts == "dear":
        assert bool(found) == (name != "masked")


@pytest.mark.parametrize("name", ["convolutions", "gated"])
def test_steps_of_a_fitted_model(name: str) -> None:
    torch.manual_seed(2)
    build, shape = MODELS[name]
    model = build()
    twin, x = copy.deepcopy(model), torch.randn(shape)
    captured = cs.captured(model, x, cuts="dear")
    plan = cs.plan(preferring_lean_tapes(cs.profile(captured, captured.take(x))), budget="100%")
    assert lean_runs(plan)
    trained = cs.checkpointed(captured, plan)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            torch.manual_seed(step)
            captured.give(trained(captured.take(x))).square().mean().backward()
            model.eval().train()  # modes may change between, and are as they were in the backward
            torch.manual_seed(step)
            twin(x).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b)
        for net in (model, twin):
            torch.optim.SGD(net.parameters(), 0.1).step()
            net.zero_grad()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_later_steps_keep_the_budget_too(name: str, share: float) -> None:
    """Stages that have been seen may share a tape with their neighbours: lean ones do not."""
    torch.manual_seed(5)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    captured = cs.captured(model, x, cuts="dear")
    chain = preferring_lean_tapes(cs.profile(captured, captured.take(x)))
    whole = cs.plan(chain, budget="100%")
    least, most = whole.least_budget_bytes, whole.peak_bytes
    plan = cs.plan(chain, budget=least + int(share * (most - least)))
    trained, inputs = cs.checkpointed(captured, plan), captured.take(x)
    for _ in range(4):
        model.zero_grad()
        with default_meter(torch.device("cpu")).window() as window:
            default_loss(trained(inputs)).backward()
        assert window.measurement.peak_bytes <= plan.peak_bytes


def test_under_autocast() -> None:
    torch.manual_seed(3)
    model, x = Gated(), torch.randn(4, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        captured = cs.captured(model, x, cuts="dear")
        chain = preferring_lean_tapes(cs.profile(captured, captured.take(x)))
        plan = cs.plan(chain, budget="100%")
        assert lean_runs(plan)
        result = cs.verify(captured, plan, captured.take(x))
    assert result.ok, str(result)
    assert result.max_gradient_difference == 0.0


def test_modes_that_change_before_the_backward() -> None:
    torch.manual_seed(4)
    model, x = ConvNet(), torch.randn(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    captured = cs.captured(model, x, cuts="dear")
    plan = cs.plan(preferring_lean_tapes(cs.profile(captured, captured.take(x))), budget="100%")
    trained = cs.checkpointed(captured, plan)
    y, z = captured.give(trained(captured.take(x))), twin(x)
    for net, out in ((model, y), (twin, z)):
        net.eval()
        out.sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_plan_tells_which_stages_keep_lean_tapes() -> None:
    model, x = ConvNet(), torch.randn(4, 3, 16, 16)
    captured = cs.captured(model, x, cuts="dear")
    plan = cs.plan(preferring_lean_tapes(cs.profile(captured, captured.take(x))), budget="100%")
    assert f"{lean_runs(plan)} keep a lean tape" in str(plan)


def test_what_is_drawn_or_decided_is_never_made_again() -> None:
    model, x = Masked(), torch.randn(4, 6, 8)
    captured = cs.captured(model, x)
    costs = captured.__dict__["_costs"]
    names = [call.name for call in captured.recording.calls]
    cheap = dict(zip(names, costs.cheap, strict=True))
    assert cheap["softmax" if "softmax" in cheap else "Tensor.softmax"]
    assert not cheap["Tensor.argmax"]
    assert not cheap["qkv"]
    drawing = cs.captured(Gated(), x)
    names = [call.name for call in drawing.recording.calls]
    assert not dict(zip(names, drawing.__dict__["_costs"].cheap, strict=True))["drop"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_smaller_batch_is_weighed_with_the_tapes_of_the_larger(frozen: bool) -> None:
    torch.manual_seed(6)
    model, x = ConvNet(), torch.randn(4, 3, 16, 16)
    captured = cs.captured(model, x, cuts="dear")
    chain = preferring_lean_tapes(cs.profile(captured, captured.take(x)))
    plan = cs.plan(chain, budget="100%")
    if frozen:
        model.second.requires_grad_(False)
    inputs = State.of(((x[:2],), {}), opaque=True)
    smaller = capture_as_before(Inspection.of(model), inputs, captured.cuts)
    again = measure(Inspection.of(smaller), (smaller.take(x[:2]),), like=chain)
    for stage, like in zip(again.stages, chain.stages, strict=True):
        assert len(stage.other_tapes) == len(like.other_tapes)
        assert [t.seconds for t in stage.other_tapes] == [t.seconds for t in like.other_tapes]
    assert simulate(again, plan.schedule).peak_bytes <= plan.peak_bytes
    assert lean_runs(plan)
