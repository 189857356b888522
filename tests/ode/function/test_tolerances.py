"""Tolerances of parts and entries, as in torchdiffeq, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptsched import odeint, solve_adaptive
from ckptsched.base.errors import (
    InfeasibleBudgetError,
    WorkloadError,
)
from ckptsched.memory.meters import default_meter
from tests.ode.problems import (
    ADAPTIVE,
    DOUBLE,
    ENDS,
    TIMES,
    Field,
    decay,
    gradients,
    loss_of,
    problem,
)


@settings(deadline=None)
@given(
    method=st.sampled_from(ADAPTIVE),
    rtol=st.floats(1e-8, 1e-2),
    atol=st.floats(1e-8, 1e-2),
    parts=st.booleans(),
)
def test_a_number_for_all_entries_is_a_tensor_full_of_it(
    method: str, rtol: float, atol: float, parts: bool
) -> None:
    f = Field().double()
    torch.manual_seed(0)
    y0 = torch.randn(2, 6, dtype=DOUBLE)
    state: Any = (y0, y0[:1]) if parts else y0

    def func(t: Tensor, y: Any) -> Any:
        return (f(t, y[0]), f(t, y[1])) if parts else f(t, y)

    def full(value: float) -> list[Any]:
        if not parts:
            return [torch.tensor(value), torch.full((6,), value, dtype=DOUBLE), [[value] * 6] * 2]
        row = torch.full((1, 6), value, dtype=DOUBLE)
        return [(value, value), [value, row], torch.full((2,), value, dtype=DOUBLE)]

    with torch.no_grad():
        expected = odeint(func, state, TIMES, method=method, rtol=rtol, atol=atol)
        rs = [torch.tensor(rtol, dtype=DOUBLE) if not parts else (rtol, rtol), *full(rtol)[1:]]
        for r, a in zip(rs, [atol, *full(atol)[1:]], strict=True):
            found = odeint(func, state, TIMES, method=method, rtol=r, atol=a)
            pairs = zip(found, expected, strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


def test_tolerances_of_parts_are_torchdiffeqs() -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint
    f, y0 = problem()
    y0 = y0.detach()
    other = torch.linspace(0, 1, 3, dtype=DOUBLE)

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(t, y[0]), torch.sin(9 * t) * y[1]

    how: Any = {
        "rtol": (1e-4, torch.tensor([1e-7, 1e-6, 1e-5], dtype=DOUBLE)),
        "atol": (1e-5, 1e-8),
    }
    ours, expected = (solve(func, (y0, other), TIMES, **how) for solve in (odeint, theirs))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    one: Any = {"rtol": 1e-6, "atol": torch.logspace(-3, -8, 6, dtype=DOUBLE)}
    ours, expected = (solve(f, y0, TIMES, **one) for solve in (odeint, theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_a_part_that_nothing_is_asked_of_does_not_rule_the_steps() -> None:
    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -y[0], torch.cos(60 * t) * 60 + 0 * y[1]

    y0 = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    taken = {
        second: solve_adaptive(func, y0, ENDS, rtol=0.0, atol=(1e-6, second)).statistics.accepted
        for second in (1e-6, 1e6)
    }
    assert taken[1e6] < taken[1e-6] / 4


def test_tolerances_of_entries_within_a_budget() -> None:
    f, y0 = problem()
    atol = torch.logspace(-3, -6, y0.numel(), dtype=DOUBLE).reshape(y0.shape)

    inputs = [y0, *f.parameters()]

    def step(budget: int | str | None) -> list[Tensor | None]:
        y = odeint(f, y0, TIMES, rtol=1e-5, atol=atol, budget=budget, loss=loss_of)
        return gradients(y, inputs)

    plain, meter = step(None), default_meter(torch.device("cpu"))
    with pytest.raises(InfeasibleBudgetError) as caught:
        step(1)
    least = caught.value.least_budget_bytes
    assert least is not None
    for budget in (least, 2 * least):
        found, measured = meter.measure(lambda budget=budget: step(budget))
        assert measured.peak_bytes <= budget
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("tolerances", "message"),
    [
        ({"rtol": -1e-3}, r"rtol=-0\.001; give what is finite and not negative"),
        ({"atol": math.nan}, "atol=nan; give what is finite"),
        ({"rtol": math.inf}, "rtol=inf; give what is finite"),
        ({"rtol": "small"}, "rtol is 'small'; give a number, a tensor"),
        ({"atol": None}, "atol is None; give a number"),
        ({"atol": torch.tensor([1e-3, 1j])}, r"atol is a tensor of shape \(2,\); give a number"),
        ({"rtol": 0, "atol": 0.0}, r"rtol=0 and atol=0\.0 are both zero; give two"),
        ({"rtol": 0, "atol": torch.tensor([0.0, 1.0])}, "both zero somewhere"),
        ({"rtol": torch.ones(3)}, r"rtol has shape \(3,\), which does not broadcast to \(2,\)"),
        ({"atol": torch.tensor([1.0, -1.0])}, r"atol=a tensor of shape \(2,\); give .*negative"),
        ({"atol": torch.ones(2, requires_grad=True)}, "atol requires a gradient"),
        ({"y0": (torch.ones(2),) * 2, "rtol": (1e-3,) * 3}, "rtol has 3 parts, and the state 2"),
        ({"y0": (torch.ones(2),) * 2, "atol": (1e-3, -1)}, r"atol\[1\]=-1; give"),
        ({"y0": (torch.ones(2),) * 2, "atol": (1e-3, "x")}, r"atol\[1\] is 'x'"),
        ({"y0": (torch.ones(2),) * 2, "atol": (1, torch.ones(3))}, r"atol\[1\] has shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("solve", [odeint, solve_adaptive])
def test_tolerances_that_make_no_sense_are_refused(
    solve: Callable, tolerances: dict, message: str
) -> None:
    given = {"y0": torch.ones(2), **tolerances}
    with pytest.raises(WorkloadError, match=message):
        solve(decay, given.pop("y0"), ENDS, **given)
