"""Laws of what is named as alive: it adds up to what a meter counts, and changes nothing."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched.memory.live_storages import Kind, LiveStorages
from ckptsched.memory.meters import AllocatorMeter

pytestmark = pytest.mark.skipif(not AllocatorMeter.available(), reason="no C++ compiler")


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down, self.drop = nn.Linear(2 * width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


def net(width: int, depth: int, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, dropout) for _ in range(depth)), nn.Linear(width, 3))


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [torch.optim.SGD, torch.optim.Adam]


@settings(max_examples=12)
@given(
    width=st.sampled_from((4, 16)),
    depth=st.integers(1, 4),
    dropout=st.sampled_from((0.0, 0.2)),
    make=st.sampled_from(OPTIMIZERS),
    steps=st.integers(1, 2),
)
def test_what_is_named_is_what_a_meter_counts(
    width: int,
    depth: int,
    dropout: float,
    make: Callable[..., torch.optim.Optimizer],
    steps: int,
) -> None:
    model, x = net(width, depth, dropout), torch.randn(5, width)
    optimizer = make(model.parameters(), lr=0.1)
    watch = LiveStorages(model)
    before = watch.live_bytes + x.nbytes
    named = []
    with AllocatorMeter().window() as window, watch:
        window.mark()
        for _ in range(steps):
            loss = model(x).square().mean()
            named.append(watch.live_bytes - before)
            window.mark()
            loss.backward()
            named.append(watch.live_bytes - before)
            window.mark()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            named.append(watch.live_bytes - before)
            window.mark()
    assert named == [phase.final_bytes for phase in window.phases[1:-1]]
    assert watch.peak_bytes - before <= window.measurement.peak_bytes
    assert sum(part.bytes for part in watch.at_peak()) == watch.peak_bytes
    assert sum(part.bytes for part in watch.now()) == watch.live_bytes


def test_kinds_and_modules() -> None:
    model, x = net(8, 2, 0.1), torch.randn(5, 8)
    optimizer = torch.optim.Adam(model.parameters())
    with LiveStorages(model) as watch:
        loss = model(x).sum()
        kept = {(part.kind, part.module): part.bytes for part in watch.now()}
        loss.backward()
        optimizer.step()
    tanh, total = 5 * 16 * 4, 5 * 8 * 4  # what a block makes itself, and keeps
    assert kept[Kind.ACTIVATIONS, "0"] == kept[Kind.ACTIVATIONS, "1"] == tanh + total
    assert kept[Kind.PARAMETERS, "0.up"] == (8 * 16 + 16) * 4
    assert kept[Kind.GIVEN, ""] == x.nbytes
    now = {(part.kind, part.module): part.bytes for part in watch.now()}
    assert now[Kind.PARAMETER_GRADIENTS, "1.down"] == now[Kind.PARAMETERS, "1.down"]
    steps = 4  # two counters, for weight and bias
    state = 2 * now[Kind.PARAMETERS, "1.down"] + 2 * steps
    assert now[Kind.OPTIMIZER_STATE, "1.down"] == state
    assert not any(kind is Kind.ACTIVATIONS and module == "0" for kind, module in now)


def test_gradients_of_activations_are_named_by_the_module_whose_backward_makes_them() -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4)), torch.randn(50, 4)
    seen = []
    with LiveStorages(model) as watch:
        middle = model[1](model[0](x))
        middle.register_hook(lambda _: seen.append(watch.now()))
        model[2](middle).sum().backward()
    [parts] = seen
    made = [p.module for p in parts if p.kind is Kind.GRADIENTS and p.bytes == 50 * 64 * 4]
    assert made == ["2"]


def test_it_changes_nothing_and_keeps_nothing_alive() -> None:
    model, x = net(8, 3, 0.3), torch.randn(5, 8)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    plain(x).sum().backward()
    hooks = [copy.copy(vars(m)) for m in model.modules()]
    torch.manual_seed(1)
    with LiveStorages(model) as watch:
        model(x).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    for before, module in zip(hooks, model.modules(), strict=True):
        assert before.keys() == vars(module).keys()
        assert not any(vars(module)[name] for name in before if name.endswith("_hooks"))
    model.zero_grad()
    del x
    gc.collect()
    assert {part.kind for part in watch.now()} == {Kind.PARAMETERS}
