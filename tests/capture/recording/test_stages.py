"""Recorded models as chains: cuts that may lie there, and training steps by plans."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.recording.cuts import (
    CallCosts,
    candidate_cuts,
    every_cut,
    lean_cuts,
    smallest_cuts,
)
from tests.support.odd_modules import (
    ROWS,
    STRAIGHT,
    WIDTH,
    BufferInPlace,
    InPlace,
    TensorHook,
)


class Attention(nn.Module):
    """Half a block of a transformer, written by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.out(y.transpose(1, 2).reshape(rows, length, width)))


class Language(nn.Module):
    """A small language model that gives its own loss, with tied weights."""

    def __init__(self, layers: int = 3, width: int = 16, words: int = 50) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(32, width)
        self.mixers = nn.ModuleList([Attention(width, 2) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers)])
        self.wide = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(layers)])
        self.narrow = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(layers)])
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, *, labels: Tensor) -> dict[str, Tensor]:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for mix, norm, wide, narrow in zip(
            self.mixers, self.norms, self.wide, self.narrow, strict=True
        ):
            x = mix(x)
            x = x + narrow(F.gelu(wide(norm(x))))
        logits = self.head(x)
        return {
            "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
            "logits": logits,
        }


class UNet(nn.Module):
    """Skip connections from the way down to the way up, with batch normalization."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
            )

        self.down = nn.ModuleList([block(3, width), block(width, 2 * width)])
        self.middle = block(2 * width, 4 * width)
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], 1))
        return self.last(x)  # type: ignore[no-any-return]


def language() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    return Language(), (ids,), {"labels": ids}


def unet() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return UNet(), (torch.randn(4, 3, 16, 16),), {}


def encoder() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return (
        nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
        (torch.randn(4, 12, 16),),
        {},
    )


@pytest.mark.parametrize("cuts", ["lean", "smallest", "every"])
@pytest.mark.parametrize("made", [language, unet, encoder])
def test_steps_by_plans_are_those_of_plain_autograd(made: Any, cuts: Any) -> None:
    torch.manual_seed(0)
    model, args, kwargs = made()
    net = cs.captured(model, *args, kwargs=kwargs, cuts=cuts)
    x = net.take(*args, **kwargs)
    chain = cs.profile(net, x)
    whole = cs.plan(chain, budget="100%")
    assert whole.least_budget_bytes < whole.store_all_bytes
    for share in (0.0, 0.3, 0.7, 1.0):
        room = whole.store_all_bytes - whole.least_budget_bytes
        plan = cs.plan(chain, budget=whole.least_budget_bytes + int(share * room))
        result = cs.verify(net, plan, x)
        assert result.ok, str(result)
        assert result.max_gradient_difference == 0
        assert result.projected_peak_bytes - 1024 <= result.measured_peak_bytes
        assert result.measured_peak_bytes <= result.projected_peak_bytes


@pytest.mark.parametrize("kind", STRAIGHT, ids=lambda kind: kind.__name__)
def test_odd_modules_follow_plans_cut_everywhere(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(ROWS, WIDTH)
    net = cs.captured(model, x, cuts="every")
    plan = cs.plan(cs.profile(net, net.take(x)), budget="100%")
    for budget in {plan.least_budget_bytes, plan.store_all_bytes}:
        found = cs.verify(net, cs.plan(plan.chain, budget=budget), net.take(x))
        assert found.ok, str(found)


def test_a_model_is_trained_with_the_loss_that_it_gives() -> None:
    torch.manual_seed(0)
    model, args, kwargs = language()
    model.eval()  # no dropout
    net = cs.captured(model, *args, kwargs=kwargs)
    planned = cs.fit(
        net, net.take(*args, **kwargs), budget="70%", loss=lambda y: net.give(y)["loss"]
    )
    for seed in range(3):
        ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        plain = model(ids, labels=ids)
        plain["loss"].backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        found = net.give(planned(net.take(ids, labels=ids)))
        assert torch.equal(found["logits"], plain["logits"])
        found["loss"].backward()
        assert all(map(torch.equal, [p.grad for p in model.parameters()], expected))  # type: ignore[arg-type]


def test_no_cut_lies_where_a_tensor_is_still_changed() -> None:
    x = torch.randn(ROWS, WIDTH)
    names = [stage.name for stage in cs.captured(InPlace(), x, cuts="every").stages()]
    assert names == ["0:a to Tensor.relu_", "7:b"]
    assert len(cs.captured(TensorHook(), x, cuts="every").stages()) == 2  # a with its hook, and b
    assert len(cs.captured(BufferInPlace(), x, cuts="every").stages()) > 2


def test_printed_it_shows_calls_and_cuts() -> None:
    model, args, kwargs = language()
    text = repr(cs.captured(model, *args, kwargs=kwargs, cuts="smallest"))
    assert "= mixers.0.norm(" in text
    assert "scaled_dot_product_attention(" in text
    assert "---- cut: " in text


def cuts_of(live: list[int]) -> CallCosts:
    count = len(live) - 1
    calls = (False,) * count
    return CallCosts((1,) * count, tuple(live), (False, *[True] * (count - 1)), calls, calls)


def test_the_smallest_cuts_are_local_minima() -> None:
    assert smallest_cuts(cuts_of([9, 5, 7, 3, 3, 8, 8, 2])) == (1, 3)
    assert smallest_cuts(cuts_of([9, 5, 4, 3, 2])) == (3,)
    assert smallest_cuts(cuts_of([1, 2, 3, 4, 5])) == (1,)


@pytest.mark.parametrize("period", [1, 5, 7])
def test_deep_networks_are_cut_where_they_are_leanest(period: int) -> None:
    live = [100 - 60 * (k % period == 0) + k % 3 for k in range(4001)]
    measured = cuts_of(live)
    assert len(every_cut(measured)) == 3999
    for cuts in candidate_cuts(measured):
        assert 100 <= len(cuts) <= 300
        assert {*cuts} <= {*every_cut(measured)}
        mean = sum(live) / len(live)
        assert sum(live[k] for k in cuts) / len(cuts) < mean
    few = cuts_of(live[:200])
    assert candidate_cuts(few)[0] == lean_cuts(few)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.integers(1, 50))
def test_lean_cuts_are_apart_and_leave_no_leaner_one_out(live: list[int], scale: int) -> None:
    work = tuple([(k * scale) % 7 for k in range(len(live) - 1)])
    plain = (False,) * len(work)
    measured = CallCosts(work, tuple(live), (False, *[True] * (len(work) - 1)), plain, plain)
    chosen, at = lean_cuts(measured), [0, *itertools.accumulate(work)]
    near = at[-1] / 400
    assert all(at[b] - at[a] > near for a, b in itertools.pairwise(chosen))
    for cut in every_cut(measured):
        beside = [k for k in chosen if abs(at[k] - at[cut]) <= near]
        assert beside
        assert min(live[k] for k in beside) <= live[cut]


def test_layers_that_are_all_alike_are_cut_at_a_distance() -> None:
    assert 300 <= len(lean_cuts(cuts_of([5] * 2001))) <= 400


def test_lean_cuts_leave_out_what_has_a_leaner_one_near() -> None:
    live = [9, 5, 7, 3, 3, 8, 8, 2]
    assert lean_cuts(cuts_of(live)) == every_cut(cuts_of(live))  # none is near
    near = CallCosts((0,) * 6 + (1,), tuple(live), (False, *[True] * 6))
    assert lean_cuts(near) == (3,)


def test_what_cannot_be_captured_says_so() -> None:
    with pytest.raises(cs.ProfileError, match="found no tensor"):
        cs.captured(Language())
    with pytest.raises(cs.ProfileError, match="'lean', 'dear', 'smallest', 'every'"):
        cs.captured(nn.Linear(8, 8), torch.randn(2, 8), cuts="fine")  # type: ignore[arg-type]


class Flow(nn.Module):
    """An ODE block between two layers, with a skip connection around it."""

    def __init__(self, slopes: bool) -> None:
        super().__init__()
        field = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        granularity: Any = "slope" if slopes else "step"
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.flow = cs.ODEBlock(field, method="rk4", steps=6, granularity=granularity)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y + self.flow(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("slopes", [False, True])
def test_steps_of_an_ode_block_inside_stay_stages(slopes: bool) -> None:
    torch.manual_seed(0)
    model, x = Flow(slopes), torch.randn(64, WIDTH)
    chain = cs.profile(model, x)
    names = [chain.stage_name(i) for i in range(1, len(chain) + 1)]
    assert sum("flow." in name for name in names) >= (24 if slopes else 6)
    whole = cs.plan(chain, budget="100%")
    assert whole.least_budget_bytes < 0.7 * whole.store_all_bytes
    for share in (0.0, 0.5):
        room = whole.store_all_bytes - whole.least_budget_bytes
        plan = cs.plan(chain, budget=whole.least_budget_bytes + int(share * room))
        found = cs.verify(model, plan, x)
        assert found.ok, str(found)


def test_a_part_that_is_fitted_goes_on_following_its_own_plan() -> None:
    torch.manual_seed(0)
    inner, x = UNet(), torch.randn(2, 3, 16, 16)
    outer = nn.ModuleDict({"stem": nn.Conv2d(3, 3, 3, padding=1), "net": inner})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = outer

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.parts["stem"](x))
            return torch.tanh(self.parts["net"](y)) * 2.0  # type: ignore[no-any-return]

    cs.fit(inner, torch.randn(2, 3, 16, 16, requires_grad=True), budget="90%")
    model = Outer()
    plan = cs.plan(model, x, budget="100%")
    found = cs.verify(model, plan, x)
    assert found.gradients_equal, str(found)
    assert found.buffers_equal


class LeftOutByChance(nn.Module):
    """A layer that is run one time in two."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x)) if torch.rand(()) < 0.5 else x


@pytest.mark.parametrize("cuts", ["lean", "smallest"])
def test_layers_that_are_left_out_by_chance_are_stages_of_their_own(cuts: Any) -> None:
    """What several such layers take together is seen in few runs, so each is measured alone."""
    layers = 6
    model = nn.Sequential(*[LeftOutByChance() for _ in range(layers)], nn.Linear(8, 3))
    expected = None
    for seed in range(4):
        torch.manual_seed(seed)
        net = cs.captured(Whole(model), torch.randn(5, 8), cuts=cuts)
        assert len(net.stages()) == layers + 1
        chain = cs.profile(net, net.take(torch.randn(5, 8)), loss=lambda y: y[0].square().mean())
        expected = expected or cs.plan(chain, budget="100%").store_all_bytes
        assert cs.plan(chain, budget="100%").store_all_bytes == expected


class Whole(nn.Module):
    """A model around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]
