"""Solves within a budget find again what was around them, on grids and with adaptive steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import ckptsched as cs
from ckptsched.base.errors import ExecutionError
from ckptsched.ode.adaptive.solve import solve_adaptive
from tests.support.surroundings import (
    FREE,
    PLANNED,
    Around,
    Stage,
    all_of,
    deterministic,
    equal,
    lossy,
)
from tests.torch_state.test_cached_weights import Slope


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stage = Stage()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        slope: Tensor = self.stage(z) * torch.cos(t)
        return slope


TIMES = torch.linspace(0, 1, 4)


def fixed(f: nn.Module, z: Tensor, t: Tensor, *, bounded: bool) -> Tensor:
    budget = 20_000 if bounded else None
    return cs.odeint(f, z, t, method="rk4", options={"step_size": 1 / 12}, budget=budget)


def adaptive(f: nn.Module, z: Tensor, t: Tensor, *, bounded: bool) -> Tensor:
    checkpoints = 2 if bounded else None
    states: Tensor = solve_adaptive(f, z, t, rtol=1e-4, atol=1e-5, checkpoints=checkpoints).states
    return states


SOLVES: dict[str, Any] = {"fixed": fixed, "adaptive": adaptive}


def step(solve: Any, f: nn.Module, around: Around, *, bounded: bool) -> list[Any]:
    f.zero_grad()
    torch.manual_seed(1)
    z, times = torch.randn(4, 6, requires_grad=True), TIMES.clone().requires_grad_()
    with around():
        states = solve(f, z, times, bounded=bounded)
    states.square().mean().backward()
    return [states.detach(), z.grad, times.grad, *(p.grad for p in f.parameters())]


def assert_near(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*FREE, *PLANNED])
@pytest.mark.parametrize("kind", SOLVES)
def test_what_was_around_a_solve_alone_is_found_again(kind: str, name: str) -> None:
    """A plan that was made among other settings is not taken: one is made among these."""
    f, around, solve = Field(), {**FREE, **PLANNED}[name], SOLVES[kind]
    step(solve, f, all_of(), bounded=True)  # among nothing, so that something is kept
    found = step(solve, f, around, bounded=True)
    assert_near(found, step(solve, f, around, bounded=False))
    if name in FREE:
        assert not equal(found, step(solve, f, all_of(), bounded=True)), "it has to matter"


@pytest.mark.parametrize("kind", SOLVES)
def test_tapes_are_packed_as_without_a_budget(kind: str) -> None:
    f, solve = Field(), SOLVES[kind]
    among = (lossy, True), (lossy, False), (all_of(), False)
    found, expected, other = (step(solve, f, around, bounded=b) for around, b in among)
    for values in (found, expected, other):
        del values[2]  # the gradient of the times, which comes from no tape
    assert_near(found, expected)
    with pytest.raises(AssertionError, match="not close"):
        assert_near(found, other)


@pytest.mark.parametrize("kind", SOLVES)
def test_cached_weights_of_a_right_hand_side(kind: str) -> None:
    torch.manual_seed(0)
    f, solve = Slope(), SOLVES[kind]
    expected = step(solve, f, parametrize.cached, bounded=False)
    assert_near(step(solve, f, parametrize.cached, bounded=True), expected)
    assert not parametrize._cache  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", SOLVES)
def test_a_cached_weight_that_moves_is_refused(kind: str) -> None:
    class Moving(Slope):
        def __init__(self) -> None:
            super().__init__()
            self.linear = spectral_norm(nn.Linear(6, 6))

    with pytest.raises((cs.PlanMismatchError, ExecutionError), match="'weight' of a Linear is"):
        step(SOLVES[kind], Moving(), parametrize.cached, bounded=True)


def test_settings_are_put_back_when_f_fails_in_a_backward() -> None:
    class Failing(Field):
        armed = False

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            if self.armed:
                raise ZeroDivisionError
            return super().forward(t, z)

    f, z = Failing(), torch.randn(4, 6)
    with deterministic(), torch.device("meta"):
        states = adaptive(f, z, TIMES, bounded=True)
    f.armed = True
    with pytest.raises(ZeroDivisionError):
        states.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.empty(0).device.type == "cpu"
