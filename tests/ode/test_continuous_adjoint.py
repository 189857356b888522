"""Slopes as stages, the discrete adjoint by its formulas, and the continuous one beside it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched import odeint
from ckptsched.base.errors import ExecutionError, InfeasibleBudgetError, WorkloadError
from ckptsched.ode import METHODS, ODEBlock
from tests.ode.problems import DOUBLE, assert_within, equal, gradients, loss_of, problem
from tests.ode.test_block import fitted_slope

ENDS = torch.tensor([0.0, 1.0], dtype=DOUBLE)


# ---------------------------------------------------------------------------- slopes as stages


@pytest.mark.parametrize("method", METHODS)
def test_slopes_in_order_are_steps_bit_for_bit(method: str) -> None:
    f, x = problem()
    whole, apart = (ODEBlock(f, method, 3, granularity=g) for g in ("step", "slope"))
    assert len(apart.stages()) == 3 * METHODS[method].evaluations
    inputs = [x, *f.parameters()]
    assert torch.equal(whole(x), apart(x))
    assert equal(gradients(whole(x), inputs), gradients(apart(x), inputs))


def least_budget(solve: Any) -> int:
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(1)
    assert caught.value.least_budget_bytes is not None
    return caught.value.least_budget_bytes


@pytest.mark.parametrize("method", ["rk4", "rk4_classic", "dopri5"])
def test_the_least_budget_falls_with_slopes(method: str) -> None:
    f, y0 = problem(batch=40)

    def solve(budget: int | None, granularity: Any) -> Tensor:
        return odeint(
            f,
            y0,
            ENDS,
            method=method,
            options={"step_size": 0.1},
            budget=budget,
            granularity=granularity,
        )

    least = {g: least_budget(lambda b, g=g: solve(b, g)) for g in ("step", "slope")}
    assert least["slope"] < 0.85 * least["step"]
    assert_within(
        lambda b: solve(least["slope"] if b else None, "slope"), [y0, *f.parameters()], 1.0
    )


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_blocks_of_slopes_keep_their_budget(method: str) -> None:
    f, x = problem(batch=40)
    least = {}
    for granularity in ("step", "slope"):
        block = ODEBlock(f, method, 6, granularity=granularity)  # type: ignore[arg-type]
        chain = cs.profile(block, x)
        least[granularity] = cs.plan(chain, budget="100%").least_budget_bytes
        plan = cs.plan(chain, budget=least[granularity])
        assert cs.verify(block, plan, x).ok
    assert least["slope"] < 0.85 * least["step"]


def test_outputs_between_steps_and_gradients_of_times_with_slopes() -> None:
    """To rounding: the state at the start of a step has another reader, in another stage."""
    f, y0 = problem()
    t = torch.tensor([0.0, 0.13, 0.5, 1.0], dtype=DOUBLE, requires_grad=True)
    options: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.1}}
    apart = odeint(f, y0, t, budget="70%", granularity="slope", **options)
    whole = odeint(f, y0, t, **options)
    assert torch.equal(apart, whole)
    inputs = [y0, t, *f.parameters()]
    for one, other in zip(gradients(apart, inputs), gradients(whole, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_granularities_that_make_no_sense_are_refused() -> None:
    f, y0 = problem()
    with pytest.raises(WorkloadError, match="granularity is 'stage'"):
        odeint(f, y0, ENDS, method="rk4", granularity="stage")  # type: ignore[arg-type]
    with pytest.raises(WorkloadError, match="Runge-Kutta methods apart, found Implicit"):
        odeint(f, y0, ENDS, method="implicit_euler", granularity="slope")
    with pytest.raises(WorkloadError, match="granularity is 'stage'"):
        ODEBlock(f, granularity="stage")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- discrete adjoint


@settings(deadline=None, max_examples=10)
@given(steps=st.integers(1, 12), seed=st.integers(0, 1000))
def test_exact_gradients_are_the_discrete_adjoint_of_euler(steps: int, seed: int) -> None:
    """a_k = (I + h df/dz)^T a_{k+1}, dL/dp = h sum_k (df/dp)^T a_{k+1} (discretise, optimise)."""
    torch.manual_seed(seed)
    f, y0 = problem()
    h = 1 / steps
    params = list(f.parameters())
    found = gradients(
        odeint(f, y0, ENDS, method="euler", options={"step_size": h})[-1], [y0, *params]
    )

    states, times = [y0.detach()], [torch.tensor(k * h, dtype=DOUBLE) for k in range(steps)]
    for time in times:
        states.append(states[-1] + h * f(time, states[-1]).detach())
    end = states[-1].requires_grad_()
    (adjoint,) = torch.autograd.grad(loss_of(end), end)
    sums = [torch.zeros_like(p) for p in params]
    for time, state in zip(reversed(times), reversed(states[:-1]), strict=True):
        at = state.detach().requires_grad_()
        to_state, *to_params = torch.autograd.grad(f(time, at), [at, *params], adjoint)
        sums = [s + h * g for s, g in zip(sums, to_params, strict=True)]
        adjoint = adjoint + h * to_state
    for one, other in zip(found, [adjoint, *sums], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------- backsolve


def backsolve_error(method: str, steps: int) -> float:
    f, y0 = problem()
    inputs = [y0, *f.parameters()]
    exact, other = (
        gradients(
            odeint(f, y0, ENDS, method=method, options={"step_size": 1 / steps}, gradient=g), inputs
        )
        for g in ("exact", "backsolve")
    )
    difference = torch.cat([(a - b).reshape(-1) for a, b in zip(exact, other, strict=True)])
    return float(difference.norm() / torch.cat([a.reshape(-1) for a in exact]).norm())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_backsolve_is_off_by_the_order_of_the_method(method: str, order: int) -> None:
    counts = [16, 32, 64] if order < 4 else [8, 12, 16]
    errors = [backsolve_error(method, n) for n in counts]
    slope = fitted_slope([math.log(n) for n in counts], [math.log(e) for e in errors])
    assert abs(-slope - order) < 0.4
    assert errors[0] > 1e-9  # inexact, and not by rounding


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_backsolve_is_what_torchdiffeqs_adjoint_gives(method: str) -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
    f, y0 = problem()
    t = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE, requires_grad=True)
    inputs = [y0, *f.parameters()]
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11, "method": method}
    ours = odeint(f, y0, t, gradient="backsolve", **options)
    expected = theirs(f, y0, t, **options)
    torch.testing.assert_close(ours, expected)
    found, wanted = (gradients(y, [t, *inputs]) for y in (ours, expected))
    # Theirs integrates the gradient of the first time along, which on a coarse grid is off.
    first = 1e-2 if method == "rk4" else 1e-5
    torch.testing.assert_close(found[0][0], wanted[0][0], rtol=first, atol=1e-7)
    torch.testing.assert_close(found[0][1:], wanted[0][1:], rtol=1e-5, atol=1e-7)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_backsolve_refuses_what_it_cannot_do() -> None:
    f, y0 = problem()
    with pytest.raises(WorkloadError, match="'backsolve' without a budget"):
        odeint(f, y0, ENDS, method="euler", gradient="backsolve", budget="1MB")
    loss = loss_of(odeint(f, y0, ENDS, method="euler", gradient="backsolve"))
    with pytest.raises(ExecutionError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, y0, create_graph=True)


def test_backsolve_takes_tuples_and_closures() -> None:
    rate = torch.tensor([0.5], dtype=DOUBLE, requires_grad=True)
    y0 = (torch.ones(2, dtype=DOUBLE, requires_grad=True), torch.ones(1, dtype=DOUBLE))

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -rate * y[0], y[0].sum().reshape(1)

    def solve(gradient: Any) -> Any:
        return odeint(f, y0, ENDS, method="rk4", options={"step_size": 0.05}, gradient=gradient)

    for one, other in zip(
        gradients(solve("exact"), [y0[0], rate]),
        gradients(solve("backsolve"), [y0[0], rate]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


class Scaled(nn.Module):
    """Reads a network and a tensor that is no parameter, wherever that is kept."""

    def __init__(self, scale: Tensor, kept_in: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
        self.kept_in = kept_in
        self.kept: Any = {
            "attribute": scale,
            "list": [scale],
            "nested": {"inner": [scale]},
            "function": lambda y: y * scale,
            "tuple": (scale,),
            "iterator": itertools.repeat(scale),  # in C
        }[kept_in]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.net(y)
        if self.kept_in == "function":
            return self.kept(y)  # type: ignore[no-any-return]
        if self.kept_in == "iterator":
            return y * next(self.kept)
        kept = self.kept["inner"] if self.kept_in == "nested" else self.kept
        return y * (kept if self.kept_in == "attribute" else kept[0])


def scale_of(kind: str) -> tuple[Tensor, Tensor]:
    """What is trained, and the tensor that f reads: the same, or made from it."""
    torch.manual_seed(0)
    trained = torch.rand(3, dtype=DOUBLE).requires_grad_()
    return trained, (trained if kind == "leaf" else trained * 2)


def scaled_gradients(f: nn.Module, trained: Tensor, **options: Any) -> list[Tensor | None]:
    y0 = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(2, 3)
    y = odeint(f, y0, ENDS, method="rk4", options={"step_size": 0.02}, **options)
    return list(
        torch.autograd.grad(
            loss_of(y), [trained, *f.parameters()], allow_unused=True, retain_graph=True
        )
    )


@pytest.mark.parametrize("kept_in", ["attribute", "list", "nested", "function", "tuple"])
def test_tensors_that_a_module_keeps_besides_its_parameters_get_gradients(kept_in: str) -> None:
    trained, scale = scale_of("leaf")
    f = Scaled(scale, kept_in)
    exact = scaled_gradients(f, trained)
    assert equal(exact, scaled_gradients(f, trained, budget="60%"))
    for one, other in zip(exact, scaled_gradients(f, trained, gradient="backsolve"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("kept_in", "kind"), [("iterator", "leaf"), ("attribute", "made"), ("list", "made")]
)
def test_backsolve_never_leaves_out_a_gradient_silently(kept_in: str, kind: str) -> None:
    trained, scale = scale_of(kind)
    f = Scaled(scale, kept_in)
    with pytest.raises(ExecutionError, match=r"at time 1 func reads a tensor of shape \(3,\)"):
        scaled_gradients(f, trained, gradient="backsolve")
    # As torchdiffeq's adjoint_params: those that are given, and none besides.
    named = scaled_gradients(f, trained, gradient="backsolve", params=[scale, *f.parameters()])
    for one, other in zip(scaled_gradients(f, trained), named, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    some = scaled_gradients(f, trained, gradient="backsolve", params=[scale])
    assert some[0] is not None
    assert some[1:] == [None, None]


def test_backsolve_with_params_is_torchdiffeqs_with_adjoint_params() -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
    trained, scale = scale_of("made")
    f = Scaled(scale, "attribute")
    frozen = next(f.parameters()).requires_grad_(False)
    given = [scale, *f.parameters()]
    options: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.1}}
    y0 = torch.ones(3, dtype=DOUBLE)
    found = [
        torch.autograd.grad(
            loss_of(y), [trained, *(p for p in given[1:] if p is not frozen)], retain_graph=True
        )
        for y in (
            odeint(f, y0, ENDS, gradient="backsolve", params=given, **options),
            theirs(f, y0, ENDS, adjoint_params=given, **options),
        )
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
