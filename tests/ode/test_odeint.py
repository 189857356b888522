"""`odeint` on fixed grids: torchdiffeq's numbers, exact gradients within a budget, refusals."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import (
    BudgetSyntaxError,
    BudgetWarning,
    ExecutionError,
    InfeasibleBudgetError,
    IntegrationError,
    ProfileError,
    WorkloadError,
)
from ckptsched.memory.meters import default_meter
from ckptsched.ode.function import captures as closure
from ckptsched.ode.function import references
from ckptsched.ode.function.captures import find_closure

DOUBLE = torch.float64
AS_TORCHDIFFEQ = ["euler", "midpoint", "heun2", "heun3", "rk4"]
EXPLICIT = [*AS_TORCHDIFFEQ, "ralston", "rk4_classic", "tsit5"]


class Field(nn.Module):
    """A small right-hand side that depends on time."""

    def __init__(self, width: int = 6, hidden: int = 24) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(y))) * torch.cos(t)


def problem(width: int = 6, batch: int = 5) -> tuple[Field, Tensor]:
    torch.manual_seed(0)
    f = Field(width).double()
    return f, torch.randn(batch, width, dtype=DOUBLE, requires_grad=True)


def loss_of(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.stack([part.abs().square().mean() for part in parts]).sum()


def gradients(output: Any, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss_of(output), inputs, allow_unused=True))


def equal(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def assert_within(call: Callable[..., Any], inputs: Sequence[Tensor], share: float) -> None:
    """With a budget the numbers are the same, bit for bit, and the budget is kept."""
    meter = default_meter(torch.device("cpu"))

    def step(budget: int | None) -> tuple[Any, list[Tensor | None]]:
        output = call(budget)
        return output, gradients(output, inputs)

    (expected, plain), all_stored = meter.measure(lambda: step(None))
    budget = int(share * all_stored.peak_bytes)
    try:
        call(budget)  # profiled and planned here
    except InfeasibleBudgetError as error:
        budget = error.least_budget_bytes or 0
        call(budget)
    (found, planned), measured = meter.measure(lambda: step(budget))
    assert equal(plain, planned)
    parts = zip(*[x if isinstance(x, tuple) else (x,) for x in (expected, found)], strict=True)
    assert all(torch.equal(a, b) for a, b in parts)
    assert measured.peak_bytes <= budget


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


# ---------------------------------------------------------------------------- within a budget


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


class Count(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f, self.calls = f, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.f(t, y)


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


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0.0]), "t holds 1 times; give at least two"),
        (torch.tensor([]), "t holds 0 times"),
        (torch.tensor([0.0, 1.0, 0.5]), r"t\[1\] = 1\.0 and t\[2\] = 0\.5"),
        (torch.tensor([0.0, 0.5, 0.5]), r"t\[1\] = 0\.5 and t\[2\] = 0\.5"),
        (torch.tensor([1.0, 0.0, 0.5]), r"rise throughout or fall throughout; found t\[1\]"),
        (torch.tensor([0.0, math.nan]), r"t\[1\] is nan"),
        (torch.tensor([0, 1]), r"torch\.int64 of shape \(2,\)"),
        (torch.zeros(2, 2), r"shape \(2, 2\)"),
        ([0.0, 1.0], "t is .* one-dimensional floating-point tensor"),
    ],
)
def test_times_that_make_no_sense_are_refused(t: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        odeint(lambda t, y: y, torch.ones(2), t, method="euler")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"func": 3}, "func is 3"),
        ({"func": nn.Tanh}, "give a module or a function"),
        ({"y0": torch.tensor([1])}, r"y0 is torch\.int64"),
        ({"y0": (torch.ones(1), 2.0)}, r"y0\[1\] is a float"),
        ({"y0": ()}, "tuple without tensors"),
        ({"y0": (torch.ones(1), torch.ones(1).double())}, r"one dtype .*float32.*float64"),
        ({"method": "rk5"}, "unknown method 'rk5'; give one of .*'trapezoid'"),
        ({"gradient": "other"}, "gradient is 'other'"),
        ({"options": {"step": 1}}, r"unknown options \['step'\]"),
        ({"options": {"interp": "cubic"}}, "a line is drawn"),
        ({"options": {"step_size": 0.0}}, "step_size is 0.0; give a positive number"),
        ({"options": {"step_size": -0.1}}, "positive number"),
        ({"options": {"step_size": 1e-12}}, r"would take .* steps; give one that takes 1e\+08 at"),
        ({"options": {"step_size": 0.1, "grid_constructor": min}}, "exclude each other"),
        ({"options": {"grid_constructor": lambda f, y, t: None}}, "returned NoneType"),
        ({"options": {"grid_constructor": lambda f, y, t: t + 1}}, "must lead from"),
        (
            {"options": {"grid_constructor": lambda f, y, t: t[[0, 1, 0, 1]]}},
            r"the grid must rise .*the grid\[1\]",
        ),
        ({"method": "dopri5", "options": {"step": 1}}, "unknown options .*max_num_steps"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    given = {"func": lambda t, y: -y, "y0": torch.ones(2), "method": "euler", **arguments}
    with pytest.raises(WorkloadError, match=message):
        odeint(given.pop("func"), given.pop("y0"), torch.tensor([0.0, 1.0]), **given)


@pytest.mark.parametrize("budget", [None, "1MB"])
@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda t, y: y[:1], r"at time 0 .*slope of shape \(1, 6\)"),
        (lambda t, y: y.float(), r"at time 0 .*torch\.float32"),
        (lambda t, y: None, "at time 0 f returned a NoneType"),
    ],
)
def test_a_slope_unlike_the_state_is_refused_with_its_time(
    f: Callable, found: str, budget: str | None
) -> None:
    _, y0 = problem()
    t = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    with pytest.raises((ExecutionError, ProfileError), match=found):
        odeint(f, y0, t, method="euler", budget=budget)


@pytest.mark.parametrize("granularity", ["step", "slope"])
@pytest.mark.parametrize("budget", [None, "1MB"])
def test_later_slopes_of_a_step_are_looked_at_too(budget: str | None, granularity: str) -> None:
    _, y0 = problem()
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    options = {"method": "rk4_classic", "granularity": granularity, "budget": budget}
    for f in (lambda t, y: y if t < 0.4 else y.float(), lambda t, y: y if t < 0.4 else None):
        with pytest.raises((ExecutionError, ProfileError), match=r"at time 0\.5 f "):
            odeint(f, y0, t, **options)


def test_slopes_of_tuples_are_looked_at_part_by_part() -> None:
    y0 = (torch.ones(2), torch.ones(3))
    with pytest.raises(ExecutionError, match=r"returned \(\(3,\), \(2,\)\) for a state of shapes"):
        odeint(lambda t, y: (y[1], y[0]), y0, torch.tensor([0.0, 1.0]), method="euler")


@pytest.mark.parametrize("budget", [None, "1MB"])
def test_a_state_that_is_not_finite_is_found(budget: str | None) -> None:
    y0 = torch.full((3,), 2.0, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(1, 5, 9, dtype=DOUBLE)

    def explode(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 2.6, y, torch.inf)

    with pytest.raises(IntegrationError, match=r"after step 4 of 8, from time 3\.0") as caught:
        odeint(explode, y0, t, method="euler", budget=budget)
    assert (caught.value.time, caught.value.step) == (3.5, 4)
    with pytest.raises(IntegrationError, match="y0 itself is not finite"):
        odeint(explode, y0 / 0, t, method="euler", budget=budget)
    # The largest finite numbers are finite, though their sum is not.
    large = torch.full((3,), 1.7e308, dtype=DOUBLE)
    assert torch.equal(odeint(lambda t, y: 0 * y, large, t, method="euler")[-1], large)


def test_a_budget_below_one_step_names_the_least_that_works() -> None:
    f, y0 = problem()
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)
    for budget in (1, 5000):
        with pytest.raises(InfeasibleBudgetError, match="of which the outputs") as caught:
            odeint(f, y0, t, method="rk4", budget=budget)
        assert caught.value.budget_bytes == budget
    least = caught.value.least_budget_bytes
    assert least is not None
    with pytest.raises(InfeasibleBudgetError):
        odeint(f, y0, t, method="rk4", budget=least - 1)
    found = gradients(odeint(f, y0, t, method="rk4", budget=least), [y0, *f.parameters()])
    assert equal(found, gradients(odeint(f, y0, t, method="rk4"), [y0, *f.parameters()]))
    with pytest.raises(BudgetSyntaxError):
        odeint(f, y0, t, method="rk4", budget="many")


def test_nothing_is_left_after_a_failure() -> None:
    f, y0 = problem(width=64, batch=64)
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    options: dict[str, Any] = {
        "method": "midpoint",
        "options": {"step_size": 0.05},
        "budget": "50%",
    }
    counted = Count(f)
    odeint(counted, y0, t, **options)
    fail_at = math.inf

    def failing(module: nn.Module, inputs: Any) -> None:
        if counted.calls > fail_at:
            raise RuntimeError("stop here")

    f.register_forward_pre_hook(failing)
    odeint(counted, y0, t, **options)  # planned anew, as f was changed
    meter = default_meter(torch.device("cpu"))
    for phase in ("forward", "backward"):
        with meter.window() as window:
            fail_at = math.inf
            if phase == "forward":
                fail_at = counted.calls + 9
                with pytest.raises(RuntimeError, match="stop here") as caught:
                    odeint(counted, y0, t, **options)
            else:
                loss = loss_of(odeint(counted, y0, t, **options))
                fail_at = counted.calls + 3
                with pytest.raises(RuntimeError, match="stop here") as caught:
                    loss.backward()
                del loss
            del caught
            gc.collect()
        assert window.measurement.final_bytes < y0.nbytes
        assert y0.grad is None


def test_plans_kept_with_an_object_are_nothing_that_it_reads() -> None:
    class Decay:
        def __init__(self) -> None:
            self.net = nn.Linear(3, 3)

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return -torch.tanh(self.net(y))

    f, t = Decay(), torch.linspace(0, 1, 5)
    for _ in range(2):
        odeint(f, torch.ones(2, 3), t, method="rk4", budget="1MiB").sum().backward()
        assert closure.find_closure(f).modules == (f.net,)
    assert len(vars(f)[references.KEPT].found) == 1  # the second call followed the first plan
