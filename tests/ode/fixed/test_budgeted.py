"""Plans that `odeint` keeps: for functions made anew, in several threads, and for errors."""

from __future__ import annotations

import functools
import gc
import math
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import ExecutionError, InfeasibleBudgetError, IntegrationError
from ckptsched.memory.meters import ProfilerMeter, default_meter
from ckptsched.ode.function.fingerprint import fingerprint
from tests.ode.problems import DOUBLE, Field, equal, gradients, problem

ENDS = torch.tensor([0.0, 1.0], dtype=DOUBLE)


def solve(func: Callable[..., Any], y0: Any, budget: Any = "60%", **options: Any) -> Any:
    given = {"method": "rk4", "options": {"step_size": 0.1}, **options}
    return odeint(func, y0, ENDS, budget=budget, **given)


# ---------------------------------------------------------------------------- made anew


class Counted:
    """Counts evaluations of functions that are made anew and read it as a global."""

    calls = 0


def note() -> None:
    Counted.calls += 1


def by_cell(rate: Tensor, net: nn.Module) -> Callable[..., Any]:
    def f(t: Tensor, y: Tensor) -> Tensor:
        note()
        return -rate * y

    return f


def by_module(rate: Tensor, net: nn.Module) -> Callable[..., Any]:
    return lambda t, y: (note(), net(t, y) * rate)[1]


def by_default(rate: Tensor, net: nn.Module) -> Callable[..., Any]:
    return lambda t, y, power=2, net=net: (note(), net(t, y) ** power)[1]


def by_helper(rate: Tensor, net: nn.Module) -> Callable[..., Any]:
    inner = {"scales": [rate], "n": 2}
    helper = lambda y: y * inner["scales"][0] * inner["n"]  # type: ignore[index]  # noqa: E731
    return lambda t, y: (note(), torch.sin(helper(y)))[1]


def by_partial(rate: Tensor, net: nn.Module) -> Callable[..., Any]:
    def f(net: nn.Module, t: Tensor, y: Tensor) -> Tensor:
        note()
        return net(t, y)  # type: ignore[no-any-return]

    return functools.partial(f, net)


MAKERS = [by_cell, by_module, by_default, by_helper, by_partial]


@pytest.mark.parametrize("make", MAKERS)
def test_a_function_made_anew_follows_the_plan_of_the_one_before(make: Callable[..., Any]) -> None:
    net, y0 = problem()
    rate = torch.rand(6, dtype=DOUBLE, requires_grad=True)
    inputs = [y0, rate, *net.parameters()]
    evaluations = []
    for turn in range(4):
        with torch.no_grad():
            rate += 0.1 * turn  # learns, as parameters do
        before = Counted.calls
        found = gradients(solve(make(rate, net), y0), inputs)
        evaluations.append(Counted.calls - before)
        assert equal(found, gradients(solve(make(rate, net), y0, None), inputs))
    # Forty in the forward, as many again at most in the backward; the first was measured as well.
    assert evaluations[0] > evaluations[1] == evaluations[2] == evaluations[3]
    assert evaluations[3] <= 80


PARTS: list[Callable[[], Any]] = [
    lambda: 1,
    lambda: 1.0,
    lambda: True,
    lambda: math.nan,
    lambda: "one",
    lambda: None,
    lambda: torch.ones(2),
    lambda: torch.ones(2, requires_grad=True),
    lambda: torch.ones(3),
    lambda: torch.ones(2, 2).T,
    lambda: [1, 2],
    lambda: (1, 2),
    lambda: {"a": 1},
    lambda: {"a": 2},
    lambda: lambda y: y,
    lambda: functools.partial(min, 1),
    lambda: torch.float64,
    lambda: torch.sin,
    lambda: (lambda x: [x, x])(torch.ones(2)),
    lambda: [torch.ones(2), torch.ones(2)],
]


def reading(*parts: Any) -> Callable[..., Any]:
    return lambda t, y: (parts, y)[1]


@given(st.lists(st.integers(0, len(PARTS) - 1), max_size=4), st.data())
def test_fingerprints_are_equal_where_all_parts_are(chosen: list[int], data: st.DataObject) -> None:
    one, other = (fingerprint(reading(*[PARTS[k]() for k in chosen])) for _ in range(2))
    assert one is not None
    assert one == other
    assert hash(one) == hash(other)
    if chosen:
        at = data.draw(st.integers(0, len(chosen) - 1))
        changed = [*chosen]
        changed[at] = data.draw(st.sampled_from([k for k in range(len(PARTS)) if k != chosen[at]]))
        assert fingerprint(reading(*[PARTS[k]() for k in changed])) != one


def test_modules_and_objects_are_told_by_identity_and_not_kept_alive() -> None:
    net = nn.Linear(2, 2)
    told = fingerprint(reading(net))
    assert told == fingerprint(reading(net))
    assert told != fingerprint(reading(nn.Linear(2, 2)))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert told != fingerprint(reading(nn.Linear(2, 2)))
    assert fingerprint(reading([0] * 2000)) is None
    assert fingerprint(reading(iter([]))) is None

    def recursive(t: Tensor, y: Tensor) -> Tensor:
        return y if float(t) < 1 else recursive(t - 1, y)

    assert fingerprint(recursive) == fingerprint(recursive)


class Kinds:
    """Functions whose evaluation takes as many tapes as they are told to, each told otherwise."""

    @staticmethod
    def repeated(y: Tensor, count: int) -> Tensor:
        z = y
        for _ in range(count):
            z = torch.tanh(1.1 * z)
        return z - y

    @staticmethod
    def by_global(count: int) -> Callable[..., Any]:
        globals()["_count"] = count
        return lambda t, y: Kinds.repeated(y, _count)

    @staticmethod
    def by_global_list(count: int) -> Callable[..., Any]:
        globals()["_counts"] = [count]
        return lambda t, y: Kinds.repeated(y, _counts[0])

    @staticmethod
    def by_global_function(count: int) -> Callable[..., Any]:
        globals()["_inner"] = lambda y: Kinds.repeated(y, count)
        return lambda t, y: _inner(y)

    @staticmethod
    def by_closure(count: int) -> Callable[..., Any]:
        return lambda t, y: Kinds.repeated(y, count)

    @staticmethod
    def by_default(count: int) -> Callable[..., Any]:
        return lambda t, y, n=count: Kinds.repeated(y, n)

    @staticmethod
    def by_binding(count: int) -> Callable[..., Any]:
        once, often = (lambda self, t, y: self.repeated(y, 1)), (lambda self, t, y: self.many(y))
        return types.MethodType(once if count == 1 else often, KINDS)

    def many(self, y: Tensor) -> Tensor:
        return self.repeated(y, 9)


KINDS = Kinds()
_count, _counts, _inner = 1, [1], torch.tanh


@pytest.mark.parametrize("kind", [name for name in vars(Kinds) if name.startswith("by_")])
def test_the_plan_of_a_function_is_not_that_of_one_that_takes_more(kind: str) -> None:
    make = getattr(Kinds, kind)
    y0 = torch.rand(20, 40, dtype=DOUBLE, requires_grad=True)
    options = {"method": "midpoint", "options": {"step_size": 0.05}}
    with pytest.raises(InfeasibleBudgetError) as refused:
        solve(make(9), y0, 1, **options)
    assert refused.value.least_budget_bytes
    budget = refused.value.least_budget_bytes
    solve(make(1), y0, budget, **options)
    func = make(9)
    solve(func, y0, budget, **options)
    meter = default_meter(torch.device("cpu"))
    found, measured = meter.measure(lambda: gradients(solve(func, y0, budget, **options), [y0]))
    assert measured.peak_bytes <= budget
    assert equal(found, gradients(solve(func, y0, None, **options), [y0]))


def test_what_a_function_counts_itself_does_not_make_it_another() -> None:
    count = 0

    def counting(t: Tensor, y: Tensor) -> Tensor:
        nonlocal count
        global _count
        count, _count = count + 1, _count + 1
        return -y

    before = fingerprint(counting)
    counting(torch.zeros(()), torch.zeros(()))
    assert count == 1
    assert fingerprint(counting) == before is not None


def test_plans_of_functions_without_modules_keep_nothing_alive() -> None:
    def step() -> list[weakref.ref[Any]]:
        rate = torch.rand(6, dtype=DOUBLE, requires_grad=True)
        y0 = torch.ones(5, 6, dtype=DOUBLE)
        func = by_cell(rate, nn.Identity())
        solve(func, y0).sum().backward()
        return [weakref.ref(x) for x in (rate, y0, func)]

    left = step()
    gc.collect()
    assert [reference() for reference in left] == [None] * 3


NET = Field().double()


def test_a_global_module_that_is_replaced_gets_its_own_gradient() -> None:
    global NET

    def f(t: Tensor, y: Tensor) -> Tensor:
        return NET(t, y)  # type: ignore[no-any-return]

    _, y0 = problem()
    for _ in range(2):
        NET = Field().double()
        inputs = [y0, *NET.parameters()]
        assert equal(gradients(solve(f, y0), inputs), gradients(solve(f, y0, None), inputs))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_number_that_changes_what_is_done_is_planned_for(value: float) -> None:
    """With dropout a stage draws numbers, which must come again in the backward."""
    net, y0 = problem()

    def make(share: float) -> Callable[..., Any]:
        return lambda t, y: nn.functional.dropout(net(t, y), share) if share else net(t, y)

    solve(make(0.25 - 0.5 * value), y0)  # the other kind is planned first
    found = []
    for budget in ("60%", None):
        torch.manual_seed(3)
        found.append(gradients(solve(make(value), y0, budget), [y0, *net.parameters()]))
    assert equal(*found)


# ---------------------------------------------------------------------------- threads


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    """What functions give that run in threads at once."""
    found: list[Any] = [None] * len(work)
    barrier = threading.Barrier(len(work))

    def run(k: int) -> None:
        barrier.wait()
        try:
            found[k] = work[k]()
        except Exception as error:  # for the thread that asserts
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_first_solves_in_several_threads(method: str) -> None:
    """Each is measured as if it were alone, and gives the gradient of plain autograd."""
    pairs = [problem(batch=batch) for batch in (4, 16, 32, 64)]
    options: dict[str, Any] = {"method": method}
    options |= {"rtol": 1e-4, "options": {}} if method == "dopri5" else {}

    def least(f: Field, y0: Tensor) -> int | None:
        try:
            solve(f, y0, 1, **options)
        except InfeasibleBudgetError as error:
            return error.least_budget_bytes
        return None

    def step(f: Field, y0: Tensor, budget: Any) -> list[Tensor | None]:
        for _ in range(2):
            found = gradients(solve(f, y0, budget, **options), [y0, *f.parameters()])
        return found

    alone = [least(*problem(batch=len(y0))) for _, y0 in pairs]
    assert in_threads([lambda p=pair: least(*p) for pair in pairs]) == alone
    found = in_threads([lambda p=pair: step(*p, "1MiB") for pair in pairs])
    for (f, y0), gradient in zip(pairs, found, strict=True):
        assert equal(gradient, step(f, y0, "1MiB"))


@pytest.mark.parametrize("reads", ["module", "closure"])
def test_one_function_in_several_threads_with_several_shapes(reads: str) -> None:
    net, _ = problem()
    rate = torch.rand(6, dtype=DOUBLE, requires_grad=True)
    f = net if reads == "module" else by_cell(rate, net)
    inputs = [*net.parameters()] if reads == "module" else [rate]
    starts = [torch.rand(batch, 6, dtype=DOUBLE) for batch in (3, 5, 7)]

    def step(y0: Tensor) -> list[list[Tensor | None]]:
        return [gradients(solve(f, y0), inputs) for _ in range(4)]

    found = in_threads([lambda y0=y0: step(y0) for y0 in starts])
    for y0, several in zip(starts, found, strict=True):
        expected = gradients(solve(f, y0, None), inputs)
        assert all(equal(one, expected) for one in several)


# ---------------------------------------------------------------------------- bad input


class Failing(nn.Module):
    """A right-hand side that goes wrong at a certain evaluation, and is counted."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Linear(6, 6).double(), kind
        self.calls, self.fails_at = 0, math.inf

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        slope = torch.tanh(self.net(y))
        if self.calls < self.fails_at:
            return slope
        if self.kind == "raises":
            raise KeyError("my own")
        if self.kind == "no convergence":
            return 1e3 * torch.sin(1e6 * y) + 0 * slope
        if self.kind == "not finite":
            return slope / 0
        return slope[:1] if self.kind == "shape" else slope.float()


FAILURES = {
    "shape": (ExecutionError, r"at time .* maps a state of shape \(50, 6\)"),
    "dtype": (ExecutionError, r"at time .* slope of shape \(50, 6\) and torch.float32"),
    "raises": (KeyError, "my own"),
    "no convergence": (IntegrationError, "(Newton's method|linear system) .* implicit step"),
    "not finite": (IntegrationError, r"(not finite|Newton's method) .*from time"),
}


@pytest.mark.parametrize("phase", ["first forward", "later forward", "backward"])
@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("budget", [None, "80%"])
def test_failures_are_the_same_with_and_without_a_budget(
    kind: str, phase: str, budget: Any
) -> None:
    """They are typed and say when, leave nothing allocated, and the next call works."""
    implicit = kind in ("no convergence", "not finite")
    options: dict[str, Any] = {"method": "implicit_euler"} if implicit else {}
    if phase == "backward" and (budget is None or kind == "not finite"):
        pytest.skip("nothing is run again" if budget is None else "what is found in the end only")
    torch.manual_seed(0)
    f = Failing(kind)
    y0 = torch.randn(50, 6, dtype=DOUBLE, requires_grad=True)
    inputs = [y0, *f.parameters()]
    if phase != "first forward":
        gradients(solve(f, y0, budget, **options), inputs)
    before = f.calls
    kind_of_error, message = FAILURES[kind]
    meter = ProfilerMeter() if phase == "first forward" else default_meter("cpu")
    with meter.window() as window:
        loss = None
        if phase == "backward":
            loss = solve(f, y0, budget, **options).square().mean()
            f.fails_at = f.calls + 2
        else:
            f.fails_at = before + (1 if phase == "first forward" else 14)
        with pytest.raises(kind_of_error, match=message) as caught:
            solve(f, y0, budget, **options) if loss is None else loss.backward()
        if isinstance(caught.value, IntegrationError):
            assert 0 <= caught.value.time <= 1
            assert phase == "backward" or caught.value.step == round(10 * caught.value.time)
        del caught, loss
        gc.collect()
    assert window.measurement.final_bytes < y0.nbytes
    assert y0.grad is None
    f.fails_at = math.inf
    found, expected = (gradients(solve(f, y0, b, **options), inputs) for b in (budget, None))
    assert equal(found, expected)


@pytest.mark.parametrize("budget", [None, "80%"])
@pytest.mark.parametrize("method", ["implicit_euler", "trapezoid"])
@pytest.mark.filterwarnings("ignore::ckptsched.base.errors.BudgetWarning")
def test_implicit_steps_are_not_differentiated_twice_and_say_so(budget: Any, method: str) -> None:
    net, y0 = problem()
    output = solve(net, y0, budget, method=method)
    with pytest.raises(ExecutionError, match="implicit step cannot be differentiated again"):
        torch.autograd.grad(output.square().mean(), y0, create_graph=True)
    inputs = [y0, *net.parameters()]
    found, expected = (gradients(solve(net, y0, b, method=method), inputs) for b in (budget, None))
    assert equal(found, expected)
