"""Adaptive solves: the gradient of the accepted steps, within a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched.base.errors import (
    BudgetSyntaxError,
    ExecutionError,
    InfeasibleBudgetError,
    IntegrationError,
    WorkloadError,
)
from ckptsched.memory.meters import AllocatorMeter, ProfilerMeter
from ckptsched.ode.adaptive.norms import batch_max_norm, rms_norm
from ckptsched.ode.adaptive.solve import AdaptiveSolution, solve_adaptive
from ckptsched.ode.adaptive.step_size import StepControl
from ckptsched.ode.methods.embedded import inside_weights
from ckptsched.ode.methods.table import METHODS, find_tableau
from ckptsched.ode.methods.tableau import ButcherTableau
from ckptsched.ode.odeint import odeint

ADAPTIVE = sorted(name for name, tableau in METHODS.items() if tableau.b_error is not None)


class Field(nn.Module):
    """A right-hand side that depends on time and counts its evaluations."""

    def __init__(self, width: int = 3, hidden: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(width + 1, hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.double()
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        x = torch.cat([z, t.expand(*z.shape[:-1], 1)], -1)
        slope: Tensor = 2 * self.outer(self.dropout(torch.tanh(self.inner(x)))) - torch.sin(3 * z)
        return slope


def start(batch: int = 4, width: int = 3) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64, requires_grad=True)


def times(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def gradients(
    solution: AdaptiveSolution, tensors: Sequence[Tensor], seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    states = solution.states
    weights = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((states * weights.to(states.dtype)).real.sum(), tensors)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], share: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(one - other) <= share * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("meet", [False, True])
@pytest.mark.parametrize("backward_in_time", [False, True])
def test_gradient_is_that_of_plain_autograd_through_the_same_steps(
    method: str, meet: bool, backward_in_time: bool
) -> None:
    torch.manual_seed(0)
    f, z0 = Field(), start()
    t = times(0.0, 0.1, 0.13, 0.5, 1.0, grad=not meet)
    if backward_in_time:
        t = (0.2 - t).detach().requires_grad_(not meet)
    tensors = [z0, *f.parameters(), *([] if meet else [t])]
    tolerance = 1e-2 if method in ("heun", "bosh3") else 1e-4
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance / 10, "meet_times": meet}
    plain = solve_adaptive(f, z0, t, method, **options)
    expected = gradients(plain, tensors)
    assert plain.statistics.accepted > 2
    for checkpoints in (2, 5, 100):
        solution = solve_adaptive(f, z0, t, method, checkpoints=checkpoints, **options)
        assert torch.equal(solution.states, plain.states)
        assert_near(gradients(solution, tensors), expected)
        assert solution.statistics.accepted == plain.statistics.accepted
        assert len(solution.statistics.positions) <= checkpoints


@pytest.mark.parametrize("between", [0, 1, 2, 3])
def test_slopes_that_only_the_slopes_of_the_error_are_made_of_are_evaluated(between: int) -> None:
    # The midpoint rule, and in a row after it slopes at the end that read the one before each:
    # Euler's method by the last of them is embedded.
    row = range(1, between + 3)
    tableau = ButcherTableau(
        name="far",
        order=2,
        a=((), (0.5,), *((*[0.0] * i, 1.0) for i in row[:-1])),
        b=(0.0, 1.0, *[0.0] * (between + 1)),
        c=(0.0, 0.5, *[1.0] * (between + 1)),
        b_error=(0.0, 1.0, *[0.0] * between, -1.0),
        embedded_order=1,
    )
    torch.manual_seed(0)
    f, z0, t = Field(), start(), times(0.0, 0.4, 1.0)
    plain = solve_adaptive(f, z0, t, tableau, rtol=1e-2, atol=1e-3)
    finer = solve_adaptive(f, z0, t, "dopri5", rtol=1e-8, atol=1e-8).states
    assert float((plain.states - finer).abs().max().detach()) <= 0.1
    expected = gradients(plain, [z0, *f.parameters()])
    solution = solve_adaptive(f, z0, t, tableau, rtol=1e-2, atol=1e-3, checkpoints=2)
    assert torch.equal(solution.states, plain.states)
    assert_near(gradients(solution, [z0, *f.parameters()]), expected)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from(ADAPTIVE), st.booleans())
def test_evaluations_are_counted_as_f_counts_them(
    seed: int, checkpoints: int, method: str, meet: bool
) -> None:
    torch.manual_seed(seed)
    f, z0 = Field(), start()
    solution = solve_adaptive(
        f, z0, times(0.0, 0.3, 0.9), method, rtol=1e-3, atol=1e-4,
        checkpoints=checkpoints, meet_times=meet,
    )  # fmt: skip
    statistics = solution.statistics
    forward = statistics.evaluations + statistics.measuring_evaluations
    assert f.calls == forward
    attempts = statistics.accepted + statistics.rejected
    tableau = find_tableau(method)
    # Two for the first step; the first slope of a step is known: the one at the step's end.
    others = statistics.accepted if not tableau.is_fsal else 0
    assert statistics.evaluations == 2 + attempts * (tableau.slopes - 1) + others
    gradients(solution, [z0, *f.parameters()])
    assert f.calls == forward + statistics.backward_evaluations
    runs = statistics.advances + statistics.accepted
    least = runs * tableau.evaluations
    # Slopes that only a state inside is made of are evaluated where there is one: twice.
    assert least <= statistics.backward_evaluations <= least + (0 if meet else 2 * tableau.slopes)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_known_solution(method: str) -> None:
    y0 = torch.ones(1, dtype=torch.float64)
    t = torch.linspace(0, 3, 31, dtype=torch.float64)
    for tolerance in (1e-4, 1e-6):
        states = solve_adaptive(
            lambda t, y: -y, y0, t, method, rtol=tolerance, atol=tolerance,
            control=StepControl(max_step=0.2),
        ).states  # fmt: skip
        assert float((states[:, 0] - torch.exp(-t)).abs().max()) <= 100 * tolerance


@pytest.mark.parametrize("method", ADAPTIVE)
@given(st.floats(0, 1))
def test_weights_inside_meet_the_ends_and_their_rates_are_derivatives(
    method: str, x: float
) -> None:
    tableau = find_tableau(method)
    padded = (*tableau.b, *([0.0] * (not tableau.is_fsal)))
    assert inside_weights(tableau, 0.0) == (0.0,) * len(padded)
    assert inside_weights(tableau, 1.0) == pytest.approx(padded, abs=1e-12)
    assert sum(inside_weights(tableau, x)) == pytest.approx(x, abs=1e-12)
    around = zip(inside_weights(tableau, x + 1e-5), inside_weights(tableau, x - 1e-5), strict=True)
    slopes = [(a - b) / 2e-5 for a, b in around]
    assert inside_weights(tableau, x, 1) == pytest.approx(slopes, abs=1e-7)


def test_gradient_of_times_is_that_of_differences() -> None:
    torch.manual_seed(1)
    f, z0 = Field(), start()

    def total(t: Tensor) -> Tensor:
        return solve_adaptive(f, z0, t, checkpoints=3, rtol=1e-5).states.sin().sum()

    t = times(0.0, 0.21, 0.47, 0.9, grad=True)
    (found,) = torch.autograd.grad(total(t), [t])
    for j in (1, 2, 3):  # the steps stay the same: only where in a step the state is read moves
        moved = torch.zeros_like(t)
        moved[j] = 1e-6
        with torch.no_grad():
            difference = float(total(t + moved) - total(t - moved)) / 2e-6
        assert float(found[j]) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "heun"])
def test_random_right_hand_sides_draw_the_same_again(method: str) -> None:
    f = Field(dropout=0.1)
    z0 = start()
    options: dict[str, Any] = {"rtol": 3e-1, "atol": 3e-1}
    tensors = [z0, *f.parameters()]
    torch.manual_seed(3)
    plain = solve_adaptive(f, z0, times(0.0, 0.3, 2.0), method, **options)
    expected = gradients(plain, tensors)
    assert plain.statistics.accepted > 3
    for checkpoints in (1, 2, 4):
        torch.manual_seed(3)
        solution = solve_adaptive(
            f, z0, times(0.0, 0.3, 2.0), method, checkpoints=checkpoints, **options
        )
        assert torch.equal(solution.states, plain.states)
        before = torch.get_rng_state()
        assert_near(gradients(solution, tensors), expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_what_runs_again_leaves_no_trace_and_hooks_fire_once() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3).double()
            self.norm = nn.BatchNorm1d(3, momentum=0.5).double()

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            slope: Tensor = torch.tanh(self.norm(self.linear(z)))
            return slope

    f, z0, fired = Normed(), start(), list[int]()
    f.linear.weight.register_hook(lambda g: fired.append(1))
    solution = solve_adaptive(f, z0, times(0.0, 2.0), rtol=1e-3, checkpoints=2)
    mean = f.norm.running_mean
    assert mean is not None
    before = mean.clone()
    f.eval()  # the backward runs as the forward did
    solution.states.sum().backward()
    assert torch.equal(mean, before)
    assert fired == [1]
    assert not f.training


@pytest.mark.parametrize("listed", [False, True])
def test_tensors_of_a_closure_and_given_ones_get_gradients(listed: bool) -> None:
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    z0 = start()

    def found(**options: Any) -> tuple[Tensor, ...]:
        matrix = weight * 0.5  # with a graph of its own

        def func(t: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(z @ matrix)

        params = [matrix] if listed else None
        solution = solve_adaptive(func, z0, times(0.0, 1.5), params=params, **options)
        return gradients(solution, [weight, z0])

    assert_near(found(checkpoints=2), found())


def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    hidden = [{"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}]
    reader = iter(lambda: hidden[0]["w"], None).__next__  # nothing can look into an iterator
    solution = solve_adaptive(lambda t, z: -z * reader(), start(), times(0.0, 1.0), checkpoints=2)
    with pytest.raises(ExecutionError, match="its gradient would be lost"):
        solution.states.sum().backward()


def test_f_may_differentiate_itself() -> None:
    class Divergence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = Field(2)

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            with torch.enable_grad():
                x = z[:, :2] if z.requires_grad else z[:, :2].detach().requires_grad_()
                dx = self.field(t, x)
                (trace,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
            return torch.cat([dx, trace.sum(1, keepdim=True)], 1)

    torch.manual_seed(2)
    f, z0 = Divergence(), start()
    tensors = [z0, *f.parameters()]
    expected = gradients(solve_adaptive(f, z0, times(0.0, 1.0), rtol=1e-4), tensors)
    found = solve_adaptive(f, z0, times(0.0, 1.0), rtol=1e-4, checkpoints=2)
    assert_near(gradients(found, tensors), expected)


def test_complex_states() -> None:
    z0 = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    matrix = torch.randn(3, 3, dtype=torch.complex128, requires_grad=True)

    def func(t: Tensor, z: Tensor) -> Tensor:
        return matrix @ z * torch.cos(t)

    t = times(0.0, 0.4, 1.0, grad=True)
    plain = solve_adaptive(func, z0, t, rtol=1e-5)
    expected = gradients(plain, [z0, matrix, t])
    found = gradients(solve_adaptive(func, z0, t, rtol=1e-5, checkpoints=2), [z0, matrix, t])
    assert_near(found, expected)


def test_second_backward() -> None:
    f, z0 = Field(), start()
    solution = solve_adaptive(f, z0, times(0.0, 0.5, 2.0), rtol=1e-4, checkpoints=3)
    total = solution.states.square().sum()
    first = torch.autograd.grad(total, [z0, *f.parameters()], retain_graph=True)
    second = torch.autograd.grad(total, [z0, *f.parameters()])
    assert_near(second, first)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(total, [z0])


# -- bytes


def wide(batch: int = 64, width: int = 32, hidden: int = 96) -> tuple[Field, Tensor]:
    torch.manual_seed(4)
    return Field(width, hidden), start(batch, width)


def solve_and_return(f: Field, z0: Tensor, t: Tensor, **options: Any) -> AdaptiveSolution:
    solution = solve_adaptive(f, z0, t, rtol=0.1, atol=0.1, **options)
    solution.states.sum().backward()
    return solution


@pytest.mark.parametrize("method", ["dopri5", "heun"])
@pytest.mark.parametrize("outputs", [(0.0, 1.0), tuple(k / 8 for k in range(9))])
def test_measured_peak_is_within_the_budget(method: str, outputs: tuple[float, ...]) -> None:
    f, z0 = wide()
    t = times(*outputs)
    options: dict[str, Any] = {"method": method, "control": StepControl(max_step=0.05)}
    if not AllocatorMeter.available():
        pytest.skip("a meter inside another needs the counting allocator")
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve_and_return(f, z0, t, budget=1000, **options)
    least = caught.value.least_budget_bytes
    assert least is not None
    meter = ProfilerMeter()
    _, plain = meter.measure(lambda: solve_and_return(f, z0, t, **options))
    for budget in (least, least + 100_000, least + 300_000):
        for tensor in (z0, *f.parameters()):
            tensor.grad = None
        solution, measured = meter.measure(
            lambda budget=budget: solve_and_return(f, z0, t, budget=budget, **options)
        )
        assert measured.peak_bytes <= budget < plain.peak_bytes
        # What is promised is not far above what is taken: a few states.
        assert measured.peak_bytes >= budget - 12 * z0.nbytes
        assert solution.statistics.checkpoints == 1 + (budget - least) // z0.nbytes


@pytest.mark.skipif(not AllocatorMeter.available(), reason="needs the counting allocator")
@pytest.mark.parametrize("parts", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("timed", [False, True], ids=["fixed times", "gradient of times"])
def test_the_least_budget_counts_the_gradient_of_times_and_the_joined_state(
    parts: bool, timed: bool
) -> None:
    def f(time: Tensor, z: Any) -> Any:  # a tape so small that slopes and times count
        return (-z[0] * time, -z[1]) if parts else -z * time

    z0 = torch.ones(40, 20, dtype=torch.float64, requires_grad=True)
    other = torch.ones(500, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 9, dtype=torch.float64).requires_grad_(timed)
    y0 = (z0, other) if parts else z0

    def train(budget: int) -> None:
        out = odeint(f, y0, t, budget=budget)
        joined = out[0].sum() + out[1].sum() if parts else out.sum()
        del out
        joined.backward()

    with pytest.raises(InfeasibleBudgetError) as caught:
        train(1)
    least = caught.value.least_budget_bytes
    assert least is not None
    with ProfilerMeter().window() as window:
        train(least)
    assert window.measurement.peak_bytes <= least + 64  # the loss and its gradient


def test_nothing_is_left_after_an_error_or_a_solution_that_is_dropped() -> None:
    f, z0 = wide()

    def explode(t: Tensor, z: Tensor) -> Tensor:
        return f(t, z) + 1 / torch.sqrt(0.5 - t)  # NaN from 0.5 on

    def failing() -> None:
        with pytest.raises(IntegrationError, match="not finite"):
            solve_adaptive(explode, z0, times(0.0, 1.0), checkpoints=5)

    def dropped() -> None:
        solve_adaptive(f, z0, times(0.0, 1.0), checkpoints=5)

    class Broken(Exception):
        pass

    def failing_back() -> None:
        solution = solve_adaptive(f, z0, times(0.0, 1.0), checkpoints=5)

        def fail(*_: Any) -> None:
            raise Broken

        handle = f.register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            solution.states.sum().backward()
        handle.remove()

    for function in (failing, dropped, failing_back):
        _, measured = ProfilerMeter().measure(function)
        assert measured.peak_bytes > 5 * z0.nbytes
        assert measured.final_bytes == 0
    expected = gradients(solve_adaptive(f, z0, times(0.0, 1.0)), [z0])
    assert_near(gradients(solve_adaptive(f, z0, times(0.0, 1.0), checkpoints=5), [z0]), expected)


# -- control


@given(st.floats(1e-6, 1e6), st.floats(1e-4, 1.0), st.integers(1, 8), st.floats(0, 0.99))
def test_the_next_step_is_within_limits(
    error: float, before: float, order: int, share: float
) -> None:
    beta = min(0.2, share * 4 / (3 * order))
    control = StepControl(beta=beta)
    control.check_order(order)
    factor = control.factor(error, before, order, after_rejection=False)
    assert 0.2 <= factor <= 10
    assert control.factor(2 * error, before, order, after_rejection=False) <= factor
    if error > 1:
        assert factor < 1
    if beta:
        assert control.factor(error, before, order, after_rejection=True) <= 1
    assert control.factor(math.inf, before, order, after_rejection=False) == 0.2
    assert control.factor(0.0, before, order, after_rejection=False) == 10


def test_pi_control_rejects_less_where_stability_limits_the_step() -> None:
    def stiff(t: Tensor, y: Tensor) -> Tensor:
        return -500 * (y - torch.cos(t))

    rejected = []
    for beta in (0.0, 0.08):
        y0 = torch.zeros(1, dtype=torch.float64)
        control = StepControl(beta=beta)
        solution = solve_adaptive(stiff, y0, times(0.0, 3.0), rtol=1e-4, atol=1e-4, control=control)
        rejected.append(solution.statistics.rejected)
    assert rejected[1] < rejected[0] / 2


def test_norms() -> None:
    errors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert float(rms_norm(errors)) == pytest.approx(2.5)
    assert float(batch_max_norm(errors)) == pytest.approx(math.sqrt(12.5))
    assert float(batch_max_norm(torch.tensor([1.0, -2.0]))) == 2.0


def test_the_batch_norm_keeps_the_tolerance_of_each_sample() -> None:
    rates = torch.zeros(100, 1, dtype=torch.float64)
    rates[0] = 20.0
    z0 = torch.ones(100, 1, dtype=torch.float64)
    t = times(0.0, 1.0)
    steps = [
        solve_adaptive(lambda t, z: -rates * z, z0, t, rtol=1e-5, norm=norm).statistics.accepted
        for norm in (rms_norm, batch_max_norm)
    ]
    assert steps[1] > steps[0]


def test_least_and_largest_step() -> None:
    y0 = torch.ones(1, dtype=torch.float64)

    def accepted(**limits: float) -> int:
        control = StepControl(**limits)  # type: ignore[arg-type]
        solution = solve_adaptive(
            lambda t, y: -y, y0, times(0.0, 1.0), control=control, meet_times=True
        )
        return solution.statistics.accepted

    assert accepted(max_step=0.01) == pytest.approx(100, abs=1)
    assert accepted(min_step=0.25) == 4
    assert accepted(first_step=1.0, min_step=1.0) == 1


# -- errors


def singular(t: Tensor, y: Tensor) -> Tensor:
    return y * y


@pytest.mark.parametrize(
    ("func", "options", "error", "text", "time"),
    [
        (singular, {}, IntegrationError, "step size has sunk", 1.0),
        (singular, {"control": StepControl(max_num_steps=5)}, IntegrationError, "5 attempts", None),
        (lambda t, y: y / 0, {}, IntegrationError, "slope that is not finite", 0.0),
        (lambda t, y: y[:1].sum(), {}, IntegrationError, "shape", 0.0),
        (lambda t, y: y.float(), {}, IntegrationError, "float32", 0.0),
        (singular, {"method": "rk4"}, WorkloadError, "no error estimate", None),
        (singular, {"rtol": -1.0}, WorkloadError, "rtol=-1.0", None),
        (singular, {"budget": "40%"}, BudgetSyntaxError, "share", None),
        (singular, {"budget": 10**6, "checkpoints": 3}, WorkloadError, "one of them", None),
        (singular, {"checkpoints": 0}, WorkloadError, "at least 1", None),
    ],
)
@pytest.mark.parametrize("checkpoints", [None, 3])
def test_errors_say_where(
    func: Callable[[Tensor, Tensor], Tensor],
    options: dict[str, Any],
    error: type[Exception],
    text: str,
    time: float | None,
    checkpoints: int | None,
) -> None:
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    if "budget" not in options:
        options = {"checkpoints": checkpoints, **options}
    with pytest.raises(error, match=text) as caught:
        solve_adaptive(func, y0, times(0.0, 2.0), **options)
    if time is not None:
        assert isinstance(caught.value, IntegrationError)
        assert caught.value.time == pytest.approx(time, abs=1e-3)


@pytest.mark.parametrize("values", [(0.0, 1.0, 0.5), (0.0, 0.0), (1.0, 0.0, 0.0), (0.0, math.nan)])
def test_times_must_be_monotone(values: tuple[float, ...]) -> None:
    with pytest.raises(IntegrationError, match="rise or fall strictly"):
        solve_adaptive(singular, torch.ones(1), times(*values))


def test_other_bad_input() -> None:
    y0 = torch.ones(2, requires_grad=True)
    with pytest.raises(IntegrationError, match="initial state is not finite"):
        solve_adaptive(singular, y0 * math.inf, times(0.0, 1.0))
    with pytest.raises(WorkloadError, match="floating-point"):
        solve_adaptive(singular, torch.ones(2, dtype=torch.int64), times(0.0, 1.0))
    with pytest.raises(WorkloadError, match="one dimension"):
        solve_adaptive(singular, y0, torch.zeros(2, 2))
    with pytest.raises(WorkloadError, match="meet_times"):
        solve_adaptive(singular, y0, times(0.0, 0.1, grad=True), meet_times=True)
    with pytest.raises(WorkloadError, match="safety"):
        StepControl(safety=0.0)
    control = StepControl(beta=0.18)  # of dopri8 a larger error would make larger steps
    with pytest.raises(WorkloadError, match=r"of order 8: .* below 0\.1667"):
        solve_adaptive(singular, y0, times(0.0, 0.1), method="dopri8", control=control)


def test_a_parameter_changed_before_the_backward_is_an_error() -> None:
    f, z0 = Field(), start()
    solution = solve_adaptive(f, z0, times(0.0, 1.0), checkpoints=2)
    with torch.no_grad():
        f.outer.bias.add_(1)
    with pytest.raises(ExecutionError, match="changed in place"):
        solution.states.sum().backward()


def test_one_time_and_no_gradient() -> None:
    f, z0 = Field(), start()
    only = solve_adaptive(f, z0, times(0.5), checkpoints=2)
    assert torch.equal(only.states, z0.unsqueeze(0))
    (back,) = torch.autograd.grad(only.states.sum(), [z0])
    assert torch.equal(back, torch.ones_like(z0))
    with torch.no_grad():
        solution = solve_adaptive(f, z0, times(0.0, 1.0), budget="1kB")
    assert not solution.states.requires_grad
    assert solution.statistics.checkpoints is None
