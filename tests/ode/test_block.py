"""Runge-Kutta steps and the block of them: observed order, gradients, refusals."""

import copy
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ckptsched.base.errors import ExecutionError
from ckptsched.capture.stage_discovery import Outline, trace
from ckptsched.ode import (
    DOPRI5,
    EULER,
    HEUN,
    METHODS,
    MIDPOINT,
    RK4,
    ButcherTableau,
    ODEBlock,
    runge_kutta_step,
)

TABLEAUS = [EULER, MIDPOINT, HEUN, RK4]
ALL = list(METHODS.values())


class Counter(nn.Module):
    """A right-hand side that counts its evaluations."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.times: list[float] = []
        self.calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(z))


class Timed(Counter):
    """As `Counter`, but of time and state."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.times.append(float(t))
        return super().forward(z) * torch.cos(t)


# ---------------------------------------------------------------------------- order


def logistic(t: float, z: Tensor) -> Tensor:
    return z * (1 - z)


def driven(t: float, z: Tensor) -> Tensor:
    return -2 * t * z + math.cos(t)


def logistic_at(t: float) -> float:
    return 1 / (1 + 9 * math.exp(-t))


@pytest.mark.parametrize("method", [m for m in ALL if m.order < 5], ids=lambda t: t.name)
@pytest.mark.parametrize(("f", "start"), [(logistic, 0.1), (driven, 1.0)])
def test_observed_order(method: ButcherTableau, f: Callable, start: float) -> None:
    z0 = torch.tensor([start], dtype=torch.float64)

    def solve(rule: ButcherTableau, steps: int) -> float:
        z = z0
        for i in range(steps):
            z = runge_kutta_step(f, rule, 2.0 * i / steps, 2.0 / steps, z)
        return z.item()

    exact = solve(DOPRI5, 1000)
    if f is logistic:
        assert abs(exact - logistic_at(2.0)) < 1e-13
    counts = [16, 32, 64, 128]
    errors = [abs(solve(method, steps) - exact) for steps in counts]
    slope = fitted_slope([math.log(n) for n in counts], [math.log(e) for e in errors])
    assert abs(-slope - method.order) < 0.2


@pytest.mark.parametrize("method", [m for m in ALL if m.order >= 5], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["fast", "swinging"])
def test_observed_order_of_high_order_methods(method: ButcherTableau, kind: str) -> None:
    z0 = torch.tensor([0.1], dtype=torch.float64)
    exact = 1 / (1 + 9 * math.exp(-8)) if kind == "fast" else 0.1 * math.exp(math.sin(6))

    def f(t: float, z: Tensor) -> Tensor:
        return 4 * z * (1 - z) if kind == "fast" else 3 * math.cos(3 * t) * z

    def error(steps: int) -> float:
        z = z0
        for i in range(steps):
            z = runge_kutta_step(f, method, 2.0 * i / steps, 2.0 / steps, z)
        return abs(z.item() - exact)

    counts = [32, 48, 64] if method.order == 5 else [10, 12, 16]  # until the error is rounding
    slope = fitted_slope([math.log(n) for n in counts], [math.log(error(n)) for n in counts])
    assert abs(-slope - method.order) < (0.6 if method.order == 5 else 1.0)


def fitted_slope(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda t: t.name)
def test_backward_in_time_undoes_forward_up_to_the_error(method: ButcherTableau) -> None:
    z0 = torch.tensor([0.1, 0.5], dtype=torch.float64)
    there = ODEBlock(lambda z: z * (1 - z), method, 64)
    back = ODEBlock(lambda z: z * (1 - z), method, 64, t0=1.0, t1=0.0)
    assert back.h == -1 / 64
    assert (back(there(z0)) - z0).abs().max() < 2 * 64.0**-method.order


# ---------------------------------------------------------------------------- one step


def by_hand(f: Callable, rule: ButcherTableau, t: float, h: float, z: Tensor) -> Tensor:
    slopes: list[Tensor] = []
    for row, c in zip(rule.a, rule.c, strict=True):
        inner = sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(z))
        slopes.append(f(t + c * h, z + h * inner))
    return z + h * sum(b * k for b, k in zip(rule.b, slopes, strict=True))


@pytest.mark.parametrize("rule", ALL, ids=lambda t: t.name)
def test_a_step_is_the_textbook_formula(rule: ButcherTableau) -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.float64)

    def f(t: float, z: Tensor) -> Tensor:
        return torch.sin(z + t) * z.roll(1, -1)

    found = runge_kutta_step(f, rule, 0.3, 0.1, z)
    torch.testing.assert_close(found, by_hand(f, rule, 0.3, 0.1, z), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("rule", ALL, ids=lambda t: t.name)
def test_a_step_saves_nothing_besides_what_f_saves(rule: ButcherTableau) -> None:
    saved: list[Tensor] = []
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        runge_kutta_step(lambda t, z: torch.sin(z), rule, 0.0, 0.1, z)
    assert len(saved) == rule.evaluations  # sin keeps its argument


class Alive:
    """Counts the slopes that are alive whenever f is called."""

    def __init__(self) -> None:
        self.alive = 0
        self.most = 0

    def __call__(self, t: float, z: Tensor) -> Tensor:
        self.most = max(self.most, self.alive)
        slope = torch.sin(z)
        self.alive += 1
        weakref.finalize(slope, self.forget)
        return slope

    def forget(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("rule", TABLEAUS, ids=lambda t: t.name)
def test_no_slope_outlives_its_last_use(rule: ButcherTableau) -> None:
    f = Alive()
    with torch.no_grad():
        runge_kutta_step(f, rule, 0.0, 0.1, torch.ones(3))
    # In all four methods an argument needs one slope, and none is needed while f runs.
    assert f.most == 0
    assert f.alive == 0


def test_a_slope_that_is_needed_later_is_kept() -> None:
    f = Alive()
    with torch.no_grad():
        runge_kutta_step(f, DOPRI5, 0.0, 0.1, torch.ones(3))
    assert f.most == 4  # k_0 is needed to the end, k_1 by two rows only
    assert f.alive == 0


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda t, z: z.sum(-1), r"shape \(2,\) and torch.float64"),
        (lambda t, z: z[..., :1], r"shape \(2, 1\)"),
        (lambda t, z: z.float(), r"shape \(2, 3\) and torch.float32"),
        (lambda t, z: (z,), "f returned a tuple"),
        (lambda t, z: None, "f returned a NoneType"),
    ],
)
def test_a_slope_unlike_its_state_is_refused(f: Callable, found: str) -> None:
    with pytest.raises(ExecutionError, match=found):
        runge_kutta_step(f, RK4, 0.0, 0.1, torch.ones(2, 3, dtype=torch.float64))


def test_autocast_may_narrow_the_slope_but_not_the_state() -> None:
    block = ODEBlock(nn.Linear(3, 3), steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block.f(torch.ones(2, 3)).dtype == torch.bfloat16
        assert block(torch.ones(2, 3)).dtype == torch.float32
        with pytest.raises(ExecutionError, match=r"bfloat16 to a slope of .*float32"):
            ODEBlock(lambda z: z.float())(torch.ones(2, 3, dtype=torch.bfloat16))


def test_complex_states_work() -> None:
    block = ODEBlock(lambda t, z: 1j * z + 0 * t, "rk4", 50)
    z = block(torch.ones(1, dtype=torch.complex128))
    assert abs(z.item() - complex(math.cos(1), math.sin(1))) < 1e-8


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("rule", TABLEAUS, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", [Counter, Timed])
def test_gradients_agree_with_finite_differences(rule: ButcherTableau, kind: type) -> None:
    torch.manual_seed(0)
    block = ODEBlock(kind(), rule, steps=3).double()
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    named = dict(block.named_parameters())

    def solve(z: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(named, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(solve, (z, *named.values()))
    assert torch.autograd.gradgradcheck(solve, (z, *named.values()))


def test_gradient_of_euler_is_the_discrete_adjoint() -> None:
    """For z_1 = z_0 + h A z_0 the gradient goes through (I + h A)^T, exactly."""
    matrix = torch.tensor([[0.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)
    z = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    ODEBlock(lambda z: z @ matrix.T, steps=4)(z).sum().backward()
    step = torch.eye(2, dtype=torch.float64) + matrix / 4
    expected = torch.linalg.matrix_power(step.T, 4) @ torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(z.grad[0], expected, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------- the block


@pytest.mark.parametrize("rule", TABLEAUS, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", [Counter, Timed])
def test_a_block_is_its_steps_in_order(rule: ButcherTableau, kind: type) -> None:
    torch.manual_seed(0)
    f = kind()
    block = ODEBlock(f, rule, steps=5, t0=1.0, t1=3.0)
    z = x = torch.randn(2, 3)
    for i in range(5):
        if kind is Timed:
            z = runge_kutta_step(
                lambda t, z: f(torch.tensor(t), z), rule, 1 + 2 * (i / 5), 2 / 5, z
            )
        else:
            z = runge_kutta_step(lambda _, z: f(z), rule, 1 + 2 * (i / 5), 2 / 5, z)
    assert torch.equal(block(x), z)
    (traced,) = trace(Outline.of(block))
    y = x
    for stage in traced.stages:
        y = stage(y)
    assert torch.equal(y, z)


@pytest.mark.parametrize("rule", ALL, ids=lambda t: t.name)
def test_f_is_evaluated_once_a_slope_that_is_needed(rule: ButcherTableau) -> None:
    f = Counter()
    block = ODEBlock(f, rule, steps=7)
    block(torch.ones(1, 3))
    assert f.calls == block.evaluations == 7 * rule.evaluations


def test_times_reach_f_in_order_and_in_the_dtype_of_the_state() -> None:
    f = Timed().double()
    ODEBlock(f, RK4, steps=2, t0=1.0, t1=2.0)(torch.ones(1, 3, dtype=torch.float64))
    assert f.times == [1.0, 1.25, 1.25, 1.5, 1.5, 1.75, 1.75, 2.0]
    seen = []
    ODEBlock(lambda t, z: seen.append(t) or z)(torch.ones(2, dtype=torch.float16))
    assert (seen[0].shape, seen[0].dtype) == ((), torch.float16)


def test_time_does_not_drift_over_many_steps() -> None:
    seen: list[float] = []
    steps = 10_000
    ODEBlock(lambda t, z: seen.append(t.item()) or z, steps=steps, t1=0.1)(
        torch.ones(1, dtype=torch.float64)
    )
    assert seen[-1] == pytest.approx(0.1 * (steps - 1) / steps, rel=1e-15)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (nn.Linear(3, 3), False),
        (nn.Sequential(nn.Tanh()), False),
        (Counter(), False),
        (Timed(), True),
        (lambda z: z, False),
        (lambda z, gain=2.0: gain * z, False),
        (lambda t, z: z, True),
        (lambda t, z, *, gain=2.0: gain * z, True),
    ],
)
def test_the_signature_says_whether_f_takes_the_time(f: Callable, expected: bool) -> None:
    assert ODEBlock(f).time_dependent is expected


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (torch.tanh, r"signature of f \(tanh\) cannot be read; .*time_dependent=False or True"),
        (lambda *z: z, r"takes \(\*z\).*f\(z\) or f\(t, z\)"),
        (lambda a, b, c: a, r"takes \(a, b, c\)"),
        (lambda: 0, r"takes \(\)"),
    ],
)
def test_an_unclear_signature_needs_to_be_told(f: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ODEBlock(f)
    assert ODEBlock(f, time_dependent=False).time_dependent is False


def test_a_function_of_torch_works_once_it_is_told() -> None:
    z = torch.tensor([0.5])
    assert torch.equal(ODEBlock(torch.tanh, time_dependent=False)(z), z + torch.tanh(z))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0; give an int of at least 1"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": True}, "steps is True"),
        ({"steps": "4"}, "steps is '4'"),
        ({"method": "rk5"}, "unknown method 'rk5'; give one of 'euler'"),
        ({"t0": 1.0}, "t0 and t1 are both 1.0"),
        ({"t1": math.inf}, "t1 is inf; give a number, finite"),
        ({"t0": "start"}, "t0 is 'start'; give a number"),
        ({"t0": None}, "t0 is None"),
        ({"time_dependent": 1}, "time_dependent is 1; give True, False or None"),
        ({"f": 3}, "f is 3; give a module or a function"),
        ({"f": nn.Tanh}, "give a module or a function"),
        ({"f": nn.Linear(3, 3).forward}, "method of a Linear.*give the module itself"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ODEBlock(**{"f": nn.Linear(3, 3), **arguments})


def test_steps_share_the_parameters_of_f_and_add_none() -> None:
    f = nn.Linear(3, 3)
    block = ODEBlock(f, "rk4", steps=100)
    assert [name for name, _ in block.named_parameters()] == ["f.weight", "f.bias"]
    (traced,) = trace(Outline.of(block))
    assert len({stage.key for stage in traced.stages}) == 1
    assert all(stage.module is block for stage in traced.stages)


def test_a_block_says_what_it_solves() -> None:
    assert "method='rk4', steps=8, t0=0.0, t1=1.0" in repr(ODEBlock(nn.Tanh(), "rk4", 8))


def test_a_copied_block_is_independent() -> None:
    block = ODEBlock(nn.Linear(3, 3), steps=2)
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.f.weight.zero_()
        other.f.bias.zero_()
    x = torch.ones(1, 3)
    assert torch.equal(other(x), x)
    assert not torch.equal(block(x), x)


def test_one_euler_step_is_a_residual_block() -> None:
    f = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    assert torch.equal(ODEBlock(f)(x), x + f(x))
