"""Stages of recordings as written functions: the values of the calls, bit by bit."""

from __future__ import annotations

import copy
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.recording.stages import Captured
from ckptsched.capture.stage_discovery import StageCall
from ckptsched.tensors.pytree import State


class ManyWays(nn.Module):
    """Calls with lists, names, several results, writes in place, and gradients off for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.rand(8))
        self.table = {"weights": [torch.rand(8), torch.rand(8)]}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Go through them.

        Args:
            x: Rows of six.
        """
        y = self.norm(self.first(x)) * self.scale + self.shift
        left, right = y.split([3, 5], dim=1)
        with torch.no_grad():
            weight = y.abs().amax(dim=1, keepdim=True) + 1
        y = torch.cat([left.relu(), right / weight], 1)
        y.mul_(2.0)
        y = y[:, [1, 0, *range(2, 8)]] + self.table["weights"][1]
        values, places = y.max(dim=1, keepdim=True)
        y = y.masked_fill(places == torch.arange(8), float("-inf")).clamp(min=-1.0)
        y[:, 0] = 0.5
        return F.layer_norm(y, (8,), weight=self.scale), values.squeeze(1)


def run_all(stages: list[StageCall], x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for stage in stages:
        x = stage(x)
    return x


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def recorded() -> tuple[ManyWays, Captured, Tensor]:
    torch.manual_seed(0)
    model, x = ManyWays(), torch.randn(5, 6)
    return model, cs.captured(model, x, cuts="every"), x


def test_stages_give_what_the_model_gives_with_its_gradients() -> None:
    model, captured, x = recorded()
    plain, again = copy.deepcopy(model), captured.stages()
    assert len(again) > 3
    for batch in (x, x + 1, x):
        wanted, found = plain(batch), run_all(again, captured.take(batch))
        assert same(State.of(captured.give(found)).leaves, wanted)
        wanted[0].square().sum().backward()
        captured.give(found)[0].square().sum().backward()
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)
        assert torch.equal(plain.norm.running_mean, model.norm.running_mean)


def test_a_copy_of_a_stage_that_has_run_calls_the_copy_of_the_model() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    captured = cs.captured(layer, torch.ones(2, 4), cuts="every")
    (x,) = captured.take(torch.ones(2, 4))
    stages = captured.stages()
    before = run_all(stages, (x,))
    copied, again = copy.deepcopy((captured, stages))
    with torch.no_grad():
        copied.model[0].weight.zero_()
        copied.model[0].bias.zero_()
    assert not any(part.any() for part in run_all(again, (x,)))
    assert same(run_all(stages, (x,)), before)


def test_a_value_is_let_go_once_nothing_needs_it() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    model, x = Watching(), torch.ones(2, 4)
    captured = cs.captured(model, x, cuts="every")
    whole = Captured(captured.model, captured.recording, (), ())
    (stage,) = whole.stages()

    def look(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(made))

    for part in model.parts:
        part.register_forward_hook(look)
    with torch.no_grad():
        stage((x,))
    # A call holds what it is given; what was made before that is gone.
    assert alive == [0, 1, 1, 1]
