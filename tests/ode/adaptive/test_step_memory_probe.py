"""What is measured of an adaptive step is kept with its function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ckptsched import odeint
from ckptsched.memory.meters import default_meter
from ckptsched.ode.adaptive.solve import AdaptiveSolution, solve_adaptive
from tests.ode.adaptive.problems import (
    DOUBLE,
    Field,
    least_budget,
    start,
)


def test_a_step_is_measured_once_and_again_where_it_changes() -> None:
    torch.manual_seed(2)
    f, y0 = Field(), start()
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)

    def measuring(y: Tensor = y0, **options: Any) -> tuple[int, int]:
        solution = solve_adaptive(f, y, t, rtol=1e-3, budget="1MB", **options)
        done = solution.statistics
        assert done.footprint is not None
        return done.measuring_evaluations, done.footprint.tape_bytes or 0

    first, tape = measuring()
    assert first > 0
    assert measuring() == (0, tape)
    # How many times there are, their values, tolerances and the budget change nothing.
    t = torch.linspace(0, 2, 9, dtype=DOUBLE)
    assert measuring() == (0, tape)
    f.inner.requires_grad_(False)
    frozen, smaller = measuring()
    assert frozen > 0
    f.inner.requires_grad_(True)
    assert measuring() == (0, tape)
    f.float()
    halved, half = measuring(y0.detach().float().requires_grad_())
    assert halved > 0
    assert 0.4 * tape <= half <= 0.6 * tape
    f.double()
    assert measuring() == (0, tape)
    for changed in (
        lambda: measuring(start(32)),
        lambda: measuring(method="heun"),
        lambda: measuring(meet_times=True),
        lambda: (f.eval(), measuring())[1],
    ):
        assert changed()[0] > 0
    assert smaller <= tape


def test_odeint_keeps_what_a_step_takes_with_the_function_it_is_given() -> None:
    torch.manual_seed(3)
    f, y0 = Field(), start()
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)

    def func(time: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(time, y[0]), -y[1]

    counts = []
    for _ in range(3):
        before = f.calls
        odeint(func, (y0, torch.ones(3, dtype=DOUBLE)), t, rtol=1e-3, budget="1MB")
        counts.append(f.calls - before)
    assert counts[0] > counts[1] == counts[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_the_budget_is_kept_when_a_parameter_is_freed_after_a_first_call(share: float) -> None:
    torch.manual_seed(4)
    f, y0 = Field(16, 64), start(32, 16)
    t = torch.tensor([0.0, 2.0], dtype=DOUBLE)

    def step(**options: Any) -> AdaptiveSolution:
        solution = solve_adaptive(f, y0, t, rtol=1e-4, atol=1e-4, **options)
        solution.states.square().mean().backward()
        f.zero_grad()
        y0.grad = None
        return solution

    f.inner.requires_grad_(False)
    step(budget="1GB")
    f.inner.requires_grad_(True)
    meter = default_meter("cpu")
    _, stored = meter.measure(step)
    least = least_budget(step)
    budget = int(least + share * (stored.peak_bytes - least))
    _, measured = meter.measure(lambda: step(budget=budget))
    assert measured.peak_bytes <= budget
