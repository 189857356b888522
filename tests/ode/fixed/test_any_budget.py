"""`odeint` on a grid within any budget: plain gradients, planned once, nothing left behind."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import (
    BudgetWarning,
)
from tests.ode.problems import (
    DOUBLE,
    EXPLICIT,
    Count,
    assert_within,
    equal,
    gradients,
    loss_of,
    problem,
)


@pytest.mark.parametrize("method", [*EXPLICIT, "implicit_euler", "trapezoid"])
def test_gradients_within_a_budget_are_those_of_plain_autograd(method: str) -> None:
    f, y0 = problem()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE)

    def call(budget: int | None) -> Tensor:
        options = {"step_size": 0.05}
        return odeint(f, y0, t, method=method, options=options, budget=budget, loss=loss_of)

    assert_within(call, [y0, *f.parameters()], 0.4)


@settings(deadline=None, max_examples=8)
@given(
    steps=st.integers(1, 24),
    wanted=st.integers(2, 6),
    share=st.floats(0.2, 1.2),
    trained=st.sampled_from(["y0", "f", "both", "t too"]),
    backwards=st.booleans(),
)
def test_any_grid_within_any_budget(
    steps: int, wanted: int, share: float, trained: str, backwards: bool
) -> None:
    f, y0 = problem()
    f.requires_grad_(trained != "y0")
    y0.requires_grad_(trained != "f")
    t = torch.linspace(0, 1, wanted, dtype=DOUBLE).square()
    t = (t.flip(0) if backwards else t).requires_grad_(trained == "t too")
    inputs = [x for x in (y0, t, *f.parameters()) if x.requires_grad]

    def call(budget: int | None) -> Tensor:
        options = {"step_size": 1 / steps}
        return odeint(f, y0, t, method="midpoint", options=options, budget=budget, loss=loss_of)

    assert_within(call, inputs, share)


def test_a_shape_is_planned_once_whatever_the_times() -> None:
    f, y0 = problem()
    counted = Count(f)
    options, budget = {"step_size": 0.05}, "60%"

    def solve(end: float) -> list[Tensor | None]:
        t = torch.tensor([0.0, end], dtype=DOUBLE)
        return gradients(
            odeint(counted, y0, t, method="euler", options=options, budget=budget), [y0]
        )

    solve(1.0)
    before = counted.calls
    other = solve(0.99)
    later = counted.calls - before
    assert 20 < later < 60  # a forward and what runs again; no profile
    t = torch.tensor([0.0, 0.99], dtype=DOUBLE)
    assert equal(other, gradients(odeint(f, y0, t, method="euler", options=options), [y0]))


def test_a_backward_uses_the_times_of_its_own_call() -> None:
    f, y0 = problem()
    ends = [torch.tensor([0.0, end], dtype=DOUBLE) for end in (1.0, 0.98)]

    def solve(t: Tensor, budget: str | None) -> Tensor:
        return odeint(f, y0, t, method="euler", options={"step_size": 0.1}, budget=budget)

    outputs = [solve(t, "70%") for t in ends]  # both pending
    for output, t in zip(outputs, ends, strict=True):
        assert equal(gradients(output, [y0]), gradients(solve(t, None), [y0]))


def test_what_changes_with_a_function_is_planned_anew() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)

    def check() -> None:
        inputs = [p for p in (y0, *f.parameters()) if p.requires_grad]
        found, expected = (
            gradients(odeint(f, y0, t, method="midpoint", budget=budget), inputs)
            for budget in ("90%", None)
        )
        assert equal(found, expected)

    check()
    f.up.requires_grad_(False)
    check()
    f.eval()
    check()
    f.down = nn.Linear(24, 6, bias=False).double()
    check()
    other = copy.deepcopy(f)
    assert "_ckptsched_solves" not in other.state_dict()
    assert not vars(other)["_ckptsched_solves"].found


def test_a_second_backward_and_one_that_is_differentiated_again() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)
    inputs = [y0, *f.parameters()]
    loss = loss_of(odeint(f, y0, t, method="heun", budget="60%"))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert equal(first, torch.autograd.grad(loss, inputs, retain_graph=True))
    plain = loss_of(odeint(f, y0, t, method="heun"))
    second = []
    for one in (loss, plain):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            gradient = torch.autograd.grad(one, inputs, create_graph=True)
        total = torch.stack([g.square().sum() for g in gradient]).sum()
        second.append(torch.autograd.grad(total, inputs))
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("until", [0.0, 0.4, 2.0])
def test_a_step_that_cuts_the_graph(until: float) -> None:
    """Truncated backpropagation: what the loss reads before a cut has its gradient all the same."""
    f, y0 = problem()
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)

    def step(func: Any, at: Tensor, h: Tensor, y: Tensor) -> Tensor:
        known = y.detach() if at < until else y
        return known + h * func(at, known)

    def call(budget: int | None) -> Tensor:
        return odeint(f, y0, t, method=step, budget=budget)[:6]

    for inputs in ([y0, *f.parameters()], [*f.parameters()]):
        y0.requires_grad_(len(inputs) > 4)
        assert equal(gradients(call(None), inputs), gradients(call(10**6), inputs))


def test_a_function_that_differentiates_itself() -> None:
    """The divergence of a flow, as continuous normalizing flows take it."""
    f, y0 = problem(width=3)

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = state[0]
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            slope = f(t, y)
            columns = [
                torch.autograd.grad(slope[:, i].sum(), y, create_graph=True)[0][:, i]
                for i in range(3)
            ]
        return slope, -torch.stack(columns).sum(0)

    start = (y0, torch.zeros(5, dtype=DOUBLE))
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)

    def call(budget: int | None) -> Any:
        options = {"step_size": 0.1}
        return odeint(flow, start, t, method="rk4", options=options, budget=budget, loss=loss_of)

    assert_within(call, [y0, *f.parameters()], 0.5)


def test_nothing_is_planned_where_nothing_is_trained() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 5, dtype=DOUBLE)
    with torch.no_grad():
        found = odeint(f, y0, t, method="euler", budget=1)  # no backward, no bytes to bound
    assert torch.equal(found, odeint(f, y0, t, method="euler"))
    frozen = odeint(f.requires_grad_(False), y0.detach(), t, method="euler", budget=1)
    assert torch.equal(frozen, found)


def test_complex_states() -> None:
    rate = torch.tensor([1j, -0.1 + 2j], dtype=torch.complex128, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)

    def turn(t: Tensor, y: Tensor) -> Tensor:
        return rate * y

    def call(budget: int | None) -> Tensor:
        options = {"step_size": 0.02}
        return odeint(turn, y0, t, method="rk4", options=options, budget=budget, loss=loss_of)

    torch.testing.assert_close(call(None)[-1], torch.exp(rate), rtol=1e-6, atol=1e-8)
    assert_within(call, [y0, rate], 0.6)


def test_what_plans_cannot_follow_runs_by_plain_autograd() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)

    def end(y: Tensor) -> Tensor:
        return odeint(f, y, t, method="euler", budget="50%")[-1].sum()

    with pytest.warns(BudgetWarning, match=r"torch\.func"):
        found = torch.func.grad(end)(y0.detach())
    (expected,) = torch.autograd.grad(odeint(f, y0, t, method="euler")[-1].sum(), y0)
    torch.testing.assert_close(found, expected)
