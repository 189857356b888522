"""`odeint` on fixed grids: torchdiffeq's numbers, exact gradients within a budget, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ckptsched import odeint
from ckptsched.base.errors import (
    BudgetSyntaxError,
    ProfileError,
    WorkloadError,
)
from ckptsched.ode.function.captures import find_closure
from tests.ode.problems import (
    AS_TORCHDIFFEQ,
    DOUBLE,
    Field,
    equal,
    gradients,
    loss_of,
    problem,
)

# ---------------------------------------------------------------------------- torchdiffeq

GRIDS: dict[str, Any] = {
    "each time": {},
    "smaller steps": {"step_size": 0.07},
    "larger steps": {"step_size": 0.4},
    "own": {
        "grid_constructor": lambda f, y, t: torch.cat(
            [t[:1], t[0] + (t[-1] - t[0]) * torch.linspace(0.01, 0.9, 11, dtype=t.dtype), t[-1:]]
        )
    },
}


@pytest.mark.parametrize("method", AS_TORCHDIFFEQ)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backwards", [False, True])
def test_numbers_and_gradients_are_torchdiffeqs(method: str, grid: str, backwards: bool) -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint
    f, y0 = problem()
    t = torch.tensor([0.0, 0.1, 0.35, 0.5, 1.0], dtype=DOUBLE)
    t = (t.flip(0) if backwards else t).requires_grad_()
    inputs = [y0, t, *f.parameters()]
    ours = odeint(f, y0, t, method=method, options=GRIDS[grid])
    expected = theirs(f, y0, t, method=method, options=GRIDS[grid])
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)
    for one, other in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("start", "end", "size"), [(0.8, 0.6, 0.05), (0.6, 0.8, 0.05), (0.4, 1.0, 0.3), (0.1, 0.4, 0.1)]
)
@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_steps_that_come_to_the_end_but_for_rounding(
    method: str, start: float, end: float, size: float
) -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint
    f, y0 = problem()
    t = torch.tensor([start, 0.5 * (start + end), end], dtype=DOUBLE, requires_grad=True)
    inputs = [y0, *f.parameters()]  # theirs loses the gradient of the last time
    how: Any = {"method": method, "options": {"step_size": size}}
    expected = theirs(f, y0, t, **how)
    wanted = gradients(expected, inputs)
    for budget in (None, "1MiB"):
        ours = odeint(f, y0, t, budget=budget, **how)
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)
        for one, other in zip(gradients(ours, inputs), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@given(
    st.floats(-3, 3),
    st.integers(1, 40),
    st.sampled_from([0.01, 0.05, 0.1, 0.3, 1 / 3]),
    st.sampled_from([1, -1]),
)
def test_any_interval_of_whole_steps_is_solved(
    start: float, count: int, size: float, sign: int
) -> None:
    t = torch.tensor([start, start + sign * count * size], dtype=DOUBLE)
    how: Any = {"method": "implicit_euler" if count < 5 else "rk4", "options": {"step_size": size}}
    y = odeint(lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=DOUBLE), t, **how)
    torch.testing.assert_close(y[-1], (t[1] - t[0])[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_tuples_and_single_precision_are_torchdiffeqs(method: str) -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint
    torch.manual_seed(0)
    f = Field()

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(t, y[0]), y[0].sum(-1) - t * y[1]

    y0 = (torch.randn(5, 6, requires_grad=True), torch.randn(5, requires_grad=True))
    t = torch.linspace(0, 1, 6)
    inputs = [*y0, *f.parameters()]
    ours, expected = (solve(pair, y0, t, method=method) for solve in (odeint, theirs))
    assert [part.shape for part in ours] == [(6, 5, 6), (6, 5)]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", None])
def test_adaptive_methods_are_torchdiffeqs(method: str | None) -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint
    f, y0 = problem()
    t = torch.tensor([0.0, 0.1, 0.35, 1.0], dtype=DOUBLE)
    options = {"rtol": 1e-6, "atol": 1e-8, "method": method}
    torch.testing.assert_close(
        odeint(f, y0, t, **options), theirs(f, y0, t, **options), rtol=1e-11, atol=1e-12
    )


def test_a_share_of_an_adaptive_solve_is_refused_with_what_would_work() -> None:
    f, y0 = problem()
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    with pytest.raises(BudgetSyntaxError, match="give bytes, such as"):
        odeint(f, y0, t, budget="40%")
    with pytest.raises(BudgetSyntaxError, match="not a finite number"):
        odeint(f, y0, t, budget=math.nan)


def test_which_rk4_is_which() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)
    by_name = {name: odeint(f, y0, t, method=name) for name in ("rk4", "rk4_38", "rk4_classic")}
    assert torch.equal(by_name["rk4"], by_name["rk4_38"])
    assert not torch.equal(by_name["rk4"], by_name["rk4_classic"])


# ---------------------------------------------------------------------------- what func reads


class Holder:
    def __init__(self) -> None:
        self.weight = torch.full((6,), 0.5, dtype=DOUBLE, requires_grad=True)
        self.parts = [torch.full((6,), 0.2, dtype=DOUBLE, requires_grad=True)]

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y * self.weight) + self.parts[0] * t


@pytest.mark.parametrize("kind", ["cell", "made", "module", "method", "object", "nested"])
def test_gradients_reach_what_a_function_reads(kind: str) -> None:
    f, y0 = problem()
    weight = torch.full((6,), 0.5, dtype=DOUBLE, requires_grad=True)
    made = weight * 2  # not a leaf
    holder = Holder()
    helper = lambda y: y * weight  # noqa: E731
    func, inputs = {
        "cell": (lambda t, y: torch.sin(y * weight), [weight]),
        "made": (lambda t, y: torch.sin(y * made), [weight]),
        "module": (lambda t, y: f(t, y) * weight, [weight, *f.parameters()]),
        "method": (f.forward, list(f.parameters())),
        "object": (holder, [holder.weight, *holder.parts]),
        "nested": (lambda t, y: torch.sin(helper(y)), [weight]),
    }[kind]
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    found, expected = (
        torch.autograd.grad(
            loss_of(odeint(func, y0, t, method="rk4", options={"step_size": 0.04}, budget=budget)),
            [y0, *inputs],
            retain_graph=True,
        )
        for budget in ("70%", None)
    )
    assert equal(found, expected)
    assert all(bool(g.abs().max() > 0) for g in found)
    assert {id(x) for x in inputs} <= {
        id(p) for p in find_closure(func).parameters
    } or kind == "made"


def test_a_parameter_that_was_not_found_is_named() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)
    odeint(f, y0, t, method="euler", params=f.parameters(), budget="90%")
    stranger = torch.ones(1, requires_grad=True)
    with pytest.raises(WorkloadError, match=r"params\[1\] was not found"):
        odeint(f, y0, t, method="euler", params=[f.up.weight, stranger], budget="90%")
    hidden = itertools.repeat(torch.ones(6, dtype=DOUBLE, requires_grad=True))  # in C
    with pytest.raises(ProfileError, match="a tensor that its module does not own"):
        odeint(lambda t, y: y * next(hidden), y0, t, method="euler", budget="90%")
