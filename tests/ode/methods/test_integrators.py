"""Single steps that are not explicit Runge-Kutta, and the linear solver below: order, gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptsched import odeint
from ckptsched.base.errors import ExecutionError, IntegrationError, WorkloadError
from ckptsched.ode import METHODS
from ckptsched.ode.methods.gmres import gmres
from tests.ode.test_block import fitted_slope

DOUBLE = torch.float64


def logistic(t: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y)


def driven(t: Tensor, y: Tensor) -> Tensor:
    return -2 * t * y + torch.cos(t)


def fixed(steps: int) -> dict[str, float]:
    return {"step_size": 2.0 / steps}


def solve(f: Callable, method: Any, steps: int, start: float) -> float:
    y0, t = torch.tensor([start], dtype=DOUBLE), torch.tensor([0.0, 2.0], dtype=DOUBLE)
    return float(odeint(f, y0, t, method=method, options=fixed(steps))[-1, 0])


# ---------------------------------------------------------------------------- order


def heun_by_hand(f: Callable, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    slope = f(t, y)
    return y + h / 2 * (slope + f(t + h, y + h * slope))


ORDERS = {
    **{name: METHODS[name].order for name in METHODS if METHODS[name].order < 5},
    "rk4": 4,
    "rk4_classic": 4,
    "implicit_euler": 1,
    "trapezoid": 2,
    "crank_nicolson": 2,
    heun_by_hand: 2,
}


@pytest.mark.parametrize("method", ORDERS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize(("f", "start"), [(logistic, 0.1), (driven, 1.0)])
def test_observed_order_on_a_fixed_grid(method: Any, f: Callable, start: float) -> None:
    exact = solve(f, "dopri8", 64, start)
    counts = [16, 32, 64]
    errors = [abs(solve(f, method, steps, start) - exact) for steps in counts]
    slope = fitted_slope([math.log(n) for n in counts], [math.log(e) for e in errors])
    assert abs(-slope - ORDERS[method]) < 0.3


def test_observed_order_of_leapfrog_and_its_energy_over_a_long_time() -> None:
    def pendulum(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], -torch.sin(y[0])

    def end(steps: int, method: str = "leapfrog") -> Tensor:
        y0 = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
        t = torch.tensor([0.0, 2.0], dtype=DOUBLE)
        return torch.stack(
            [y[-1] for y in odeint(pendulum, y0, t, method=method, options=fixed(steps))]
        )

    exact = end(200, "dopri8")
    counts = [16, 32, 64]
    errors = [float((end(n) - exact).abs().max()) for n in counts]
    slope = fitted_slope([math.log(n) for n in counts], [math.log(e) for e in errors])
    assert abs(-slope - 2) < 0.2

    t = torch.linspace(0, 200, 1001, dtype=DOUBLE)
    energies = {}
    for method in ("leapfrog", "heun"):
        y0 = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
        q, p = odeint(pendulum, y0, t, method=method)
        energy = p.square() / 2 - torch.cos(q)
        energies[method] = float((energy - energy[0]).abs().max())
    assert energies["leapfrog"] < 0.01  # bounded, where heun's of the same order drifts away
    assert energies["heun"] > 10 * energies["leapfrog"]


@pytest.mark.parametrize(
    ("y0", "found"),
    [
        (torch.ones(2), "one tensor"),
        ((torch.ones(2),), r"shapes \[\(2,\)\]"),
        ((torch.ones(2), torch.ones(3)), r"\(2,\), \(3,\)"),
    ],
)
def test_leapfrog_needs_a_pair(y0: Any, found: str) -> None:
    with pytest.raises(WorkloadError, match=f"pair .*{found}"):
        odeint(lambda t, y: y, y0, torch.tensor([0.0, 1.0]), method="leapfrog")


# ---------------------------------------------------------------------------- evaluations


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        return (y[1], -y[0]) if isinstance(y, tuple) else -y


@pytest.mark.parametrize(
    ("method", "each"),
    [
        *((name, METHODS[name].evaluations) for name in METHODS if name != "rk4"),
        *(("rk4", 4), ("rk4_classic", 4), ("leapfrog", 3)),
    ],
)
def test_evaluations_of_a_step(method: str, each: int) -> None:
    f = Counted()
    y0: Any = torch.ones(2, dtype=DOUBLE)
    odeint(
        f,
        (y0, y0) if method == "leapfrog" else y0,
        torch.tensor([0.0, 2.0], dtype=DOUBLE),
        method=method,
        options=fixed(5),
    )
    assert f.calls == 5 * each
    # The slope that is the next step's first is not evaluated: nothing on a fixed grid reads it.
    assert each == {"bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 13}.get(method, each)


# ---------------------------------------------------------------------------- implicit steps


def stiff(rate: Tensor) -> Callable:
    return lambda t, y: -rate * (y - torch.cos(t)) - y**3


@pytest.mark.parametrize("method", ["implicit_euler", "trapezoid"])
def test_an_implicit_step_solves_its_equation_to_rounding(method: str) -> None:
    rate = torch.tensor([1.0, 10.0, 100.0, 1e6], dtype=DOUBLE)
    y0, h = torch.tensor([1.0, 0.5, -1.0, 2.0], dtype=DOUBLE), 0.25
    f = stiff(rate)
    t = torch.tensor([0.0, h], dtype=DOUBLE)
    y = odeint(f, y0, t, method=method)[-1]
    theta = 1.0 if method == "implicit_euler" else 0.5
    right = y0 + h * ((1 - theta) * f(t[0], y0) + theta * f(t[1], y))
    assert (y - right).abs().max() < 1e-13 * h * rate.max()


@pytest.mark.parametrize("method", ["implicit_euler", "trapezoid"])
def test_gradients_of_implicit_steps_are_those_of_the_solution(method: str) -> None:
    y0 = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], dtype=DOUBLE, requires_grad=True)
    rate = torch.tensor([1.0, 20.0], dtype=DOUBLE, requires_grad=True)
    mix = torch.tensor([[0.1, 0.7], [-0.4, 0.2]], dtype=DOUBLE, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE, requires_grad=True)

    def whole(y0: Tensor, rate: Tensor, mix: Tensor, t: Tensor) -> Tensor:
        return odeint(lambda s, y: stiff(rate)(s, y) + y @ mix, y0, t, method=method)

    assert torch.autograd.gradcheck(whole, (y0, rate, mix, t))


def test_the_gradient_of_a_linear_implicit_euler_step_is_the_transposed_inverse() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 30, dtype=DOUBLE) * 3
    y0 = torch.randn(30, dtype=DOUBLE, requires_grad=True)
    t = torch.tensor([0.0, 0.5], dtype=DOUBLE)
    end = odeint(lambda t, y: matrix @ y, y0, t, method="implicit_euler")[-1]
    step = torch.eye(30, dtype=DOUBLE) - 0.5 * matrix
    torch.testing.assert_close(end, torch.linalg.solve(step, y0), rtol=1e-11, atol=1e-12)
    weights = torch.randn(30, dtype=DOUBLE)
    (found,) = torch.autograd.grad(end @ weights, y0)
    torch.testing.assert_close(found, torch.linalg.solve(step.T, weights), rtol=1e-11, atol=1e-12)


def test_a_stiff_problem_is_stable_where_explicit_steps_are_not() -> None:
    rate = torch.tensor([1e5], dtype=DOUBLE)
    t = torch.linspace(0, 1, 11, dtype=DOUBLE)
    y0 = torch.ones(1, dtype=DOUBLE)
    y = odeint(stiff(rate), y0, t, method="implicit_euler")
    assert (y[1:, 0] - torch.cos(t[1:])).abs().max() < 1e-4
    with pytest.raises(IntegrationError, match=r"not finite after step \d+ of 10, from time 0"):
        odeint(stiff(rate), y0, t, method="rk4")


def test_newton_that_does_not_converge_says_where() -> None:
    def jumping(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.5, -y, 1e3 * torch.sign(0.3 - y) + y * 0)

    y0, t = torch.ones(1, dtype=DOUBLE), torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=DOUBLE)
    with pytest.raises(IntegrationError, match=r"from time 0\.25 of size 0\.5 stopped") as caught:
        odeint(jumping, y0, t, method="implicit_euler")
    assert caught.value.time == 0.25


def test_implicit_steps_refuse_what_they_cannot_do() -> None:
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    with pytest.raises(ExecutionError, match=r"real states, found torch\.complex128"):
        odeint(lambda t, y: -y, torch.ones(1, dtype=torch.complex128), t, method="trapezoid")
    y0 = torch.ones(1, dtype=DOUBLE, requires_grad=True)
    end = odeint(lambda t, y: -y * y, y0, t, method="implicit_euler")[-1]
    with pytest.raises(ExecutionError, match="cannot be differentiated again"):
        torch.autograd.grad(end.sum(), y0, create_graph=True)


def test_a_right_hand_side_without_the_state_is_solved_too() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    y0 = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    y = odeint(lambda t, y: torch.cos(t).expand(2), y0, t, method="trapezoid")
    assert torch.equal(torch.autograd.grad(y[-1].sum(), y0)[0], torch.ones(2, dtype=DOUBLE))


# ---------------------------------------------------------------------------- GMRES


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), seed=st.integers(0, 10**6), shift=st.floats(0.0, 3.0))
def test_gmres_solves_what_a_dense_solver_solves(size: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=DOUBLE) / (4 * math.sqrt(size))
    matrix += (1 + shift) * torch.eye(size, dtype=DOUBLE)
    b = torch.randn(size, generator=generator, dtype=DOUBLE)
    x, residual = gmres(lambda v: matrix @ v, b, tolerance=1e-14)
    assert float((matrix @ x - b).norm()) <= 1e-12 * float(b.norm())
    assert residual <= 1e-12
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-10)


def test_gmres_says_what_it_did_not_reach() -> None:
    b = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    x, residual = gmres(lambda v: torch.stack([v[0], 0 * v[1]]), b, tolerance=1e-12)
    assert residual == pytest.approx(math.sqrt(0.5))
    assert float(x[0]) == pytest.approx(1.0)
    assert gmres(lambda v: v * math.inf, b, tolerance=1e-12)[1] == math.inf
    assert gmres(lambda v: v, torch.zeros(3), tolerance=1e-12) == (pytest.approx(0.0), 0.0)


# ---------------------------------------------------------------------------- a user's step


def test_a_users_step_sees_tuples_and_tensors() -> None:
    seen: list[tuple[Any, Any, Any]] = []

    def step(f: Callable, t: Tensor, h: Tensor, y: tuple) -> tuple:
        seen.append((t, h, y))
        slope = f(t, y)
        return tuple(part + h * s for part, s in zip(y, slope, strict=True))

    y0 = torch.ones(2, 3), torch.zeros(4)
    t = torch.tensor([1.0, 0.5, 0.0])
    f = lambda t, y: (-y[0] * t, y[1] + 1)  # noqa: E731
    found, expected = odeint(f, y0, t, method=step), odeint(f, y0, t, method="euler")
    assert all(map(torch.allclose, found, expected))
    (at, h, y), *_ = seen
    assert (float(at), float(h), y[0].shape, y[1].shape) == (1.0, -0.5, (2, 3), (4,))


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (lambda f, t, h, y: None, "returned NoneType at time 0 "),
        (lambda f, t, h, y: y[:1], r"returned shape \(1,\)"),
        (lambda f, t, h, y: y.double(), "torch.float64 at time 0"),
    ],
)
def test_a_step_that_returns_no_state_is_refused(step: Callable, found: str) -> None:
    with pytest.raises(WorkloadError, match=found):
        odeint(lambda t, y: y, torch.ones(2), torch.tensor([0.0, 1.0]), method=step)
