"""What `odeint` is given and cannot use is refused with what would work."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import (
    BudgetSyntaxError,
    ExecutionError,
    InfeasibleBudgetError,
    IntegrationError,
    ProfileError,
    WorkloadError,
)
from ckptsched.memory.meters import default_meter
from ckptsched.ode.function import captures as closure
from ckptsched.ode.function import references
from tests.ode.problems import (
    DOUBLE,
    Count,
    equal,
    gradients,
    loss_of,
    problem,
)


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
