"""What a solve returns, and what its function holds, is freed once nobody holds it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptsched import checkpointed, odeint, plan, profile
from ckptsched.base.errors import ExecutionError
from ckptsched.ode.function.cache import FunctionCache

TIMES = torch.linspace(0, 1, 5)


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(50))

    def forward(self, t: Tensor, y: Any) -> Any:
        return tuple(-self.rate * part for part in y) if isinstance(y, tuple) else -self.rate * y

    def slope(self, t: Tensor, y: Any) -> Any:
        return self(t, y)


class Callable_:
    """No module itself."""

    def __init__(self) -> None:
        self.net = Decay()

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self.net(t, y)


def own_step(f: Any, t: Tensor, h: Tensor, y: Any) -> Any:
    return y + h * f(t, y)


HOW: dict[str, dict[str, Any]] = {
    "fixed": {"method": "rk4"},
    "fixed, budget": {"method": "rk4", "budget": 10**6},
    "fixed, tight": {"method": "rk4", "budget": "60%"},
    "slopes, budget": {"method": "rk4", "budget": 10**6, "granularity": "slope"},
    "own step, budget": {"method": own_step, "budget": 10**6},
    "adaptive": {"method": "dopri5"},
    "adaptive, all tapes": {"method": "dopri5", "budget": 10**6},
    "adaptive, some tapes": {"method": "dopri5", "budget": 45_000},
    "adaptive, no tape": {"method": "dopri5", "budget": 14_000},
    "implicit": {"method": "implicit_euler"},
    "implicit, budget": {"method": "implicit_euler", "budget": 10**6},
    "backsolve": {"method": "rk4", "gradient": "backsolve"},
}
KINDS: dict[str, Callable[[Decay], Any]] = {
    "module": lambda net: net,
    "method": lambda net: net.slope,
    "lambda": lambda net: lambda t, y: net(t, y),
}


@pytest.mark.parametrize("parts", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_a_module_that_keeps_its_trajectory_is_freed(
    how: str, kind: str, backward: bool, parts: bool
) -> None:
    if parts and how in ("own step, budget", "adaptive, no tape"):
        pytest.skip("takes one tensor, or more than that budget")
    net = Decay()
    y0: Any = (torch.ones(50), torch.ones(())) if parts else torch.ones(50)
    if parts:
        y0 = y0[0], torch.ones(50)
    found = odeint(KINDS[kind](net), y0, TIMES, **HOW[how])
    net.trajectory = found  # type: ignore[assignment]
    if backward:
        # What is made from it, too: after a backward nothing is left to run again.
        net.loss = (found[0] if parts else found).square().sum()  # type: ignore[assignment]
        net.loss.backward()  # type: ignore[operator]
        net.end = (found[0] if parts else found)[-1]  # type: ignore[assignment]
    reference = weakref.ref(net)
    del net, found
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("how", ["fixed, budget", "adaptive, no tape", "implicit"])
def test_an_object_that_keeps_its_trajectory_is_freed(how: str) -> None:
    field = Callable_()
    field.trajectory = odeint(field, torch.ones(50), TIMES, **HOW[how])  # type: ignore[attr-defined]
    references = weakref.ref(field), weakref.ref(field.net)
    del field
    gc.collect()
    assert [r() for r in references] == [None, None]


@pytest.mark.parametrize("how", ["fixed, budget", "own step, budget", "adaptive, no tape"])
def test_functions_made_anew_leave_nothing(how: str) -> None:
    """With modules of their own beside one that stays, steps and losses of their own."""
    stays, given = nn.Linear(50, 50), HOW[how]
    references: list[weakref.ref[Any]] = []

    def step_once() -> None:
        fresh, scale = Decay(), torch.ones(50)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return fresh(t, y) * scale + 0.01 * torch.tanh(stays(y))

        def loss(y: Tensor) -> Tensor:
            return (y[-1] * scale).sum()

        def step(f: Any, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
            return y + h * f(t, y) * scale

        mine = {"method": step} if given["method"] is own_step else {}
        budget = {"budget": 10**6 if "no tape" not in how else 90_000}
        loss(
            odeint(func, torch.ones(50), TIMES, **{**given, **mine, **budget}, loss=loss)
        ).backward()
        references.extend(map(weakref.ref, (fresh, scale, func, loss, step)))

    for _ in range(5):
        step_once()
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


def test_memory_does_not_grow_with_functions_made_anew() -> None:
    """200 calls, each of another function: what is kept of them is a bounded number of figures."""
    references: list[weakref.ref[Any]] = []
    before = len(FunctionCache.anywhere.found)
    for k in range(200):
        weight = torch.full((3,), 1.0, requires_grad=True)
        function = eval(f"lambda t, y: -weight * y * {1 + k // 5}", {"weight": weight})
        odeint(function, torch.ones(3), TIMES[:3], method="euler", budget=10**6).sum().backward()
        references += [weakref.ref(weight), weakref.ref(function)]
    del weight, function
    gc.collect()
    assert [r() for r in references] == [None] * len(references)
    assert before <= len(FunctionCache.anywhere.found) <= 32


def test_step_functions_made_anew_have_one_plan_and_their_own_numbers() -> None:
    net, y0 = Decay(), torch.ones(50)
    sizes = []
    for scale in (1.0, 0.5, 0.25):
        factor = torch.tensor(scale)

        def step(f: Any, t: Tensor, h: Tensor, y: Tensor, factor: Tensor = factor) -> Tensor:
            return y + factor * h * f(t, y)

        found = odeint(net, y0, TIMES, method=step, budget=10**6)
        assert torch.equal(found, odeint(net, y0, TIMES, method=step))
        sizes.append(len(vars(net)["_ckptsched_solves"].found))
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("how", ["fixed, budget", "adaptive, some tapes", "adaptive, no tape"])
def test_what_was_given_up_says_so(how: str) -> None:
    net = Decay()
    found = odeint(net, torch.ones(50), TIMES, **HOW[how])
    first = torch.autograd.grad(found.sum(), net.rate, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(found.sum(), net.rate, retain_graph=True)[0])
    assert torch.equal(first, torch.autograd.grad(found.sum(), net.rate)[0])
    with pytest.raises((ExecutionError, RuntimeError), match=r"second backward|second time"):
        found.sum().backward()


def test_a_function_that_nobody_else_holds_goes_back() -> None:
    """The graph keeps what it needs, as plain autograd does."""
    expected, found = [], []
    for budget, into in ((None, expected), (10**6, found)):
        for method in ("rk4", "dopri5", "implicit_euler"):
            net = Decay()
            rate = net.rate
            y = odeint(net, torch.ones(50), TIMES, method=method, budget=budget)[-1].sum()
            del net
            gc.collect()
            into.append(torch.autograd.grad(y, rate)[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("backward", [False, True])
def test_a_planned_model_that_keeps_its_output_is_freed(backward: bool) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    x = torch.ones(2, 8)
    chain = profile(model, x)
    trained = checkpointed(model, plan(chain, budget=10**6))
    y = trained(x)
    model[0].kept = y  # type: ignore[assignment]
    if backward:
        model[1].loss = y.sum()  # type: ignore[assignment]
        model[1].loss.backward()  # type: ignore[operator]
    reference = weakref.ref(model[0])
    del model, trained, y
    gc.collect()
    assert reference() is None
