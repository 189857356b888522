"""Stages that are alike are measured once, and have the bytes that each alone would have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.inspection import Inspection
from ckptsched.capture.recording.stages import candidates
from ckptsched.profiler import profile as profiling
from ckptsched.profiler.alike.twins import Alike
from ckptsched.tensors.pytree import State
from tests.capture.recording.test_stages import Language, encoder, language, unet
from tests.support.networks import NETWORKS

WIDTH, ROWS = 8, 4


def bytes_of(chain: cs.Chain) -> cs.Chain:
    """A chain without its seconds."""
    none = {"forward_seconds": 0.0, "backward_seconds": 0.0}
    stages = [
        replace(s, other_tapes=tuple(replace(tape, **none) for tape in s.other_tapes), **none)
        for s in chain.stages
    ]
    return replace(chain, stages=tuple(stages), loss_seconds=0.0, seconds_spread=0.0)


def weighed(monkeypatch: pytest.MonkeyPatch, run: Callable[[], cs.Chain]) -> tuple[cs.Chain, int]:
    """A chain, and how many stages were weighed for it."""
    count, weigh = [0], profiling.weigh

    def counted(*args: Any) -> Any:
        count[0] += 1
        return weigh(*args)

    with monkeypatch.context() as patch:
        patch.setattr(profiling, "weigh", counted)
        return run(), count[0]


def alone(monkeypatch: pytest.MonkeyPatch, run: Callable[[], cs.Chain]) -> cs.Chain:
    """A chain of which each stage was looked at by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(Alike, "expect", lambda *_: None)
        return run()


def check(net: nn.Module, *sample: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """See that sharing changes no byte; returns how many stages were not weighed."""
    shared, count = weighed(monkeypatch, lambda: cs.profile(net, *sample))
    apart = alone(monkeypatch, lambda: cs.profile(net, *sample))
    assert bytes_of(shared) == bytes_of(apart)
    return len(shared) - count


@pytest.mark.parametrize("cuts", ["lean", "dear", "every"])
@pytest.mark.parametrize("made", [language, unet, encoder])
def test_recorded_models_have_the_bytes_of_each_stage_alone(
    made: Any, cuts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, args, kwargs = made()
    net = cs.captured(model, *args, kwargs=kwargs, cuts=cuts)
    saved = check(net, net.take(*args, **kwargs), monkeypatch=monkeypatch)
    assert saved > 0 or made is unet


@pytest.mark.parametrize("name", NETWORKS)
def test_chains_have_the_bytes_of_each_stage_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    check(*NETWORKS[name](), monkeypatch=monkeypatch)


def test_what_is_weighed_does_not_grow_with_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(layers: int) -> int:
        ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
        net = cs.captured(Language(layers), ids, kwargs={"labels": ids}, cuts="every")
        return weighed(monkeypatch, lambda: cs.profile(net, net.take(ids, labels=ids)))[1]

    assert count(3) == count(6)
    layers = [m for _ in range(9) for m in (nn.Linear(8, 8), nn.Tanh())]
    chain, found = weighed(
        monkeypatch, lambda: cs.profile(nn.Sequential(*layers), torch.randn(4, 8))
    )
    assert found < len(chain) / 2


# ------------------------------------------------------------------ one layer that is another


class Layer(nn.Module):
    """A layer that may do one thing in another way than its neighbours."""

    def __init__(self, p: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH, eps=eps), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(p)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.without = self.reads = self.moves = self.other = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.without:
            with torch.no_grad():
                y = self.inner(y)
        else:
            y = self.inner(y)
        if self.reads or self.moves:
            y = y * self.scale.clone()
        if self.moves:
            self.scale.mul_(0.5)
        y = self.drop(torch.tanh(y))
        return y + torch.sigmoid(x).exp() if self.other else x + y


class Layers(nn.Module):
    """Five layers, one of which is another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(5)])
        self.shares = False

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for k, layer in enumerate(self.layers):
            first = x if self.shares and k == 2 else first
            x = layer(x)
        return x + first.view(-1, WIDTH)


def with_hook(net: Layers) -> None:
    net.layers[2].inner.register_forward_hook(lambda module, args, output: output.exp())


def with_weights_of_another(net: Layers) -> None:
    net.layers[2].inner.weight = net.layers[1].inner.weight


def with_one_weight_for_two(net: Layers) -> None:
    net.layers[2].inner.bias = net.layers[2].norm.bias


def with_half_a_weight(net: Layers) -> None:
    net.layers[2].inner.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH)[::2])


def with_gelu(net: Layers) -> None:
    def forward(x: Tensor) -> Tensor:
        return F.gelu(net.layers[2].norm(x)) * x

    net.layers[2].forward = forward


ODD: dict[str, Callable[[Layers], object]] = {
    "none": lambda net: None,
    "frozen": lambda net: net.layers[2].requires_grad_(False),
    "frozen bias": lambda net: net.layers[2].inner.bias.requires_grad_(False),
    "hook": with_hook,
    "eps": lambda net: setattr(net.layers[2].norm, "eps", 1e-3),
    "eval": lambda net: net.layers[2].eval(),
    "no dropout": lambda net: setattr(net.layers[2].drop, "p", 0.0),
    "dropout": lambda net: setattr(net.layers[2].drop, "p", 0.5),
    "no_grad": lambda net: setattr(net.layers[2], "without", True),
    "reads a buffer": lambda net: setattr(net.layers[2], "reads", True),
    "moves a buffer": lambda net: setattr(net.layers[2], "moves", True),
    "another way": lambda net: setattr(net.layers[2], "other", True),
    "skip": lambda net: setattr(net, "shares", True),
    "tied": with_weights_of_another,
    "tied inside": with_one_weight_for_two,
    "strides": with_half_a_weight,
    "forward": with_gelu,
    "double": lambda net: net.layers[2].inner.register_parameter(
        "more", nn.Parameter(torch.ones(3))
    ),
}


def odd(name: str) -> tuple[Layers, Tensor]:
    torch.manual_seed(0)
    net = Layers()
    ODD[name](net)
    return net, torch.randn(ROWS, WIDTH)


@pytest.mark.parametrize("cuts", ["lean", "every"])
@pytest.mark.parametrize("name", ODD)
def test_a_layer_that_is_another_has_its_own_bytes(
    name: str, cuts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = odd(name)
    net = cs.captured(model, x, cuts=cuts)
    assert check(net, net.take(x), monkeypatch=monkeypatch) > 0


@pytest.mark.parametrize("name", [name for name in ODD if name != "skip"])
def test_a_module_that_is_another_has_its_own_bytes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = odd(name)
    assert check(nn.Sequential(*model.layers), x, monkeypatch=monkeypatch) > 0


@pytest.mark.parametrize("name", ODD)
def test_steps_keep_within_what_was_measured_once(name: str) -> None:
    model, x = odd(name)
    net = cs.captured(model, x, cuts="every")
    whole = cs.plan(cs.profile(net, net.take(x)), budget="100%")
    for budget in {whole.least_budget_bytes, whole.store_all_bytes}:
        found = cs.verify(net, cs.plan(whole.chain, budget=budget), net.take(x))
        assert found.ok, str(found)
        assert found.measured_peak_bytes <= found.projected_peak_bytes


class Hidden(nn.Module):
    """What it does, nothing tells that it keeps where it can be seen."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        SECRETS[self] = function

    def forward(self, x: Tensor) -> Tensor:
        return SECRETS[self](self.inner(x))


SECRETS: dict[nn.Module, Callable[[Tensor], Tensor]] = {}


def test_a_run_tells_apart_what_looks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(x: Tensor) -> Tensor:
        return torch.cat([x, x.exp(), x.sin()], 1).tanh().sum(1, keepdim=True) + x

    layers = [Hidden(function) for function in (torch.tanh, torch.tanh, wide, torch.tanh, wide)]
    saved = check(
        nn.Sequential(nn.Linear(8, 8), *layers), torch.randn(4, 8), monkeypatch=monkeypatch
    )
    assert saved == 2  # the second and the fourth; the last one's output is the caller's
    SECRETS.clear()


# ------------------------------------------------------------------ any


PARTS: tuple[Callable[[int], nn.Module], ...] = (
    lambda k: nn.Linear(WIDTH, WIDTH, bias=k % 2 == 0),
    lambda k: nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)),
    lambda k: nn.BatchNorm1d(WIDTH, affine=k % 2 == 0),
    lambda k: nn.LayerNorm(WIDTH),
    lambda k: nn.ReLU(inplace=k % 2 == 0),
    lambda k: nn.Dropout(0.1 + 0.1 * (k % 2)),
    lambda k: Layer(),
    lambda k: nn.PReLU(),
)


class Random(nn.Module):
    """Parts in a row, some of them twice, with skip connections."""

    def __init__(self, parts: list[tuple[int, int, bool]]) -> None:
        super().__init__()
        made: dict[tuple[int, int], nn.Module] = {}
        chosen = []
        for part, k, again in parts:
            module = PARTS[part](k)
            chosen.append(made.setdefault((part, k), module) if again else module)
        self.parts, self.skips = nn.ModuleList(chosen), [k % 3 == 0 for _, k, _ in parts]

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for part, skip in zip(self.parts, self.skips, strict=True):
            x = part(x * 1.0)
            if skip:
                x, kept = x + kept, x
        return x + kept


@settings(max_examples=15)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, len(PARTS) - 1), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    times=st.integers(2, 3),
)
def test_any_model_has_the_bytes_of_each_stage_alone(
    parts: list[tuple[int, int, bool]], times: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Random(parts * times))
    x = torch.randn(ROWS, WIDTH)
    net = cs.captured(model, x, cuts="every")
    with pytest.MonkeyPatch.context() as patch:
        check(net, net.take(x), monkeypatch=patch)


def test_ways_to_cut_are_recorded_and_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, args, kwargs = language()
    inputs = State.of((args, kwargs), opaque=True)
    nets = candidates(Inspection.of(model), inputs)
    assert len({net.recording for net in nets}) == 1
    assert len({len(net.stages()) for net in nets}) == len(nets) == 2
    x = nets[0].take(*args, **kwargs)
    counts = []
    weigh = profiling.weigh
    monkeypatch.setattr(profiling, "weigh", lambda *a: counts.append(1) or weigh(*a))
    alike = Alike(outlives=True)
    chains = [profiling.measure(Inspection.of(net), (x,), alike=alike) for net in nets]
    together = len(counts)
    for net, chain in zip(nets, chains, strict=True):
        assert bytes_of(cs.profile(net, x)) == bytes_of(chain)
        found = cs.verify(net, cs.plan(chain, budget="70%"), x)
        assert found.ok, str(found)
    assert together <= len(counts) - together
