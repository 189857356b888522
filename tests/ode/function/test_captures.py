"""What can be given to `odeint` as func: whatever it closes over gets its gradient."""

from __future__ import annotations

import functools
import random
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import ExecutionError, WorkloadError
from ckptsched.ode.function.captures import find_closure

DOUBLE = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 24), nn.Linear(24, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(y))) * torch.cos(t)

    def scaled(self, k: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y) * k

    @staticmethod
    def static(t: Tensor, y: Tensor, net: nn.Module, k: Tensor) -> Tensor:
        return net(t, y) * k


class Called:
    def __init__(self, net: nn.Module, k: Tensor) -> None:
        self.net, self.k = net, k

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y) * self.k


class Slotted:
    __slots__ = ("__k", "net")

    def __init__(self, net: nn.Module, k: Tensor) -> None:
        self.net, self.__k = net, k

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y) * self.__k


class Pair(NamedTuple):
    net: nn.Module
    k: Tensor


class OfTheClass:
    net: nn.Module
    k: Tensor

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.helper(t, y)

    def helper(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y) * self.k


class Wrapper(nn.Module):
    """Reads what is global, by a method."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.helper(t, y)

    def helper(self, t: Tensor, y: Tensor) -> Tensor:
        return GLOBAL["net"](t, y) * GLOBAL["k"]


GLOBAL: dict[str, Any] = {}


def scaled(net: nn.Module, k: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return net(t, y) * k


def keywords(t: Tensor, y: Tensor, *, net: nn.Module, k: Tensor) -> Tensor:
    return net(t, y) * k


def of_pair(pair: Any, t: Tensor, y: Tensor) -> Tensor:
    return pair[0](t, y) * pair[1]


def of_space(space: Any, t: Tensor, y: Tensor) -> Tensor:
    return space.net(t, y) * space.k


def of_reference(reference: Any, k: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return reference()(t, y) * k


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def attribute(net: nn.Module, k: Tensor) -> Callable[..., Any]:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return f.net(t, y) * f.k  # type: ignore[attr-defined]

    f.net, f.k = net, k  # type: ignore[attr-defined]
    return f


def nested(net: nn.Module, k: Tensor) -> Callable[..., Any]:
    inner = lambda t, y, *, kk=k: (lambda z: net(t, z) * kk)(y)  # noqa: E731
    return lambda t, y, f=inner: f(t, y)


def of_the_class(net: nn.Module, k: Tensor) -> Callable[..., Any]:
    return type("Own", (OfTheClass,), {"net": net, "k": k})()


def of_globals(net: nn.Module, k: Tensor) -> Callable[..., Any]:
    GLOBAL.update(net=net, k=k)
    return Wrapper()


KINDS: dict[str, Callable[[Net, Tensor], Any]] = {
    "partial": lambda net, k: functools.partial(scaled, net, k),
    "partial of keywords": lambda net, k: functools.partial(keywords, net=net, k=k),
    "partial of a method": lambda net, k: functools.partial(net.scaled, k),
    "partial of a partial": lambda net, k: functools.partial(functools.partial(scaled, net), k),
    "partial of an object": lambda net, k: functools.partial(Called(net, k)),
    "partial of a tuple": lambda net, k: functools.partial(of_pair, (net, k)),
    "partial of tuples": lambda net, k: functools.partial(lambda p, t, y: p[0][0](t, y) * p[1][0],
                                                          ((net,), (k,))),
    "static method": lambda net, k: functools.partial(Net.static, net=net, k=k),
    "method": lambda net, k: Called(net, k).__call__,
    "object": Called,
    "object with slots": Slotted,
    "named tuple": lambda net, k: functools.partial(of_pair, Pair(net, k)),
    "attributes of a class": of_the_class,
    "globals of a module's method": of_globals,
    "defaults": lambda net, k: (lambda t, y, net=net, k=k: net(t, y) * k),
    "keyword defaults": lambda net, k: (lambda t, y, *, net=net, k=k: net(t, y) * k),
    "nested": nested,
    "wrapped": lambda net, k: decorated(lambda t, y: net(t, y) * k),
    "attributes of a function": attribute,
    "containers": lambda net, k: (
        lambda t, y, d={"a": [net, deque([(k,)])]}: d["a"][0](t, y) * d["a"][1][0][0]
    ),
    "namespace": lambda net, k: functools.partial(of_space, types.SimpleNamespace(net=net, k=k)),
    "weak reference": lambda net, k: functools.partial(of_reference, weakref.ref(net), k),
    "weak proxy": lambda net, k: functools.partial(scaled, weakref.proxy(net), k),
}  # fmt: skip


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_that_func_closes_over(kind: str, method: str) -> None:
    torch.manual_seed(0)
    net, k = Net().double(), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    check_gradients(KINDS[kind](net, k), net, k, method)


# torch's compiler looks at `.grad` of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["module", "function"])
def test_gradients_of_what_is_compiled(kind: str) -> None:
    torch.manual_seed(0)
    net, k = Net().double(), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    compiled: Any = torch.compile(net, backend="eager")
    func = functools.partial(scaled, compiled, k)
    if kind == "function":
        func = torch.compile(lambda t, y: net(t, y) * k, backend="eager")
    check_gradients(func, net, k, "rk4")


def check_gradients(func: Callable[..., Any], net: Net, k: Tensor, method: str) -> None:
    y0 = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(0.1, 1, 8, dtype=DOUBLE)
    inputs = [y0, k, *net.parameters()]
    assert {id(x) for x in inputs[1:]} <= {id(p) for p in find_closure(func).parameters}

    def solve(budget: Any) -> list[Tensor]:
        y = odeint(func, y0, t, method=method, rtol=1e-5, atol=1e-6, budget=budget)
        return [y, *torch.autograd.grad(y.square().mean(), inputs)]

    expected = solve(None)
    assert all(bool(g.abs().max() > 0) for g in expected)
    if method == "rk4":
        assert all(map(torch.equal, solve("80%"), expected))
    else:
        assert all(map(torch.equal, solve("10MiB"), expected))
        torch.testing.assert_close(solve(32_000), expected, rtol=1e-12, atol=1e-13)
    # What was replaced meanwhile is where it was, the very objects.
    assert {id(x) for x in inputs[1:]} <= {id(p) for p in find_closure(func).parameters}


def test_tuples_are_the_same_objects_afterwards() -> None:
    k = torch.tensor(0.5, requires_grad=True)
    pair = (k, [k])
    func = functools.partial(lambda p, t, y: y * p[0] + p[1][0], pair)
    odeint(
        func, torch.ones(3), torch.linspace(0, 1, 5), method="rk4", budget="1MiB"
    ).sum().backward()
    assert func.args[0] is pair
    assert pair[1][0] is k


@pytest.fixture
def scripted() -> Iterator[Any]:
    class Script(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(self.net(y)) * t

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        yield torch.jit.script(Script())


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("kind", ["module", "part", "closure", "method"])
def test_torchscript_runs_without_a_budget_and_is_refused_with_one(
    scripted: Any, kind: str, method: str
) -> None:
    func = {
        "module": scripted,
        "part": Called(scripted, torch.ones(())),
        "closure": lambda t, y: scripted(t, y),
        "method": scripted.forward,
    }[kind]
    y0, t = torch.ones(2, 4, requires_grad=True), torch.linspace(0, 1, 5)
    odeint(func, y0, t, method=method).sum().backward()
    assert y0.grad is not None
    assert all(p.grad is not None for p in scripted.parameters())
    message = "TorchScript" if kind != "method" else "gradient would be lost"
    expected = (WorkloadError, ExecutionError, RuntimeError) if kind == "method" else WorkloadError
    with pytest.raises(expected, match=message):
        odeint(func, y0, t, method=method, budget="1MiB")
    with torch.no_grad():  # nothing is trained
        odeint(func, y0, t, method=method, budget="1MiB")


def test_a_function_of_torchscript_is_solved_within_a_budget() -> None:
    def plain(y: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(y) * k

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = torch.jit.script(plain)
    k = torch.tensor(0.5, requires_grad=True)
    y0, t = torch.ones(2, 4, requires_grad=True), torch.linspace(0, 1, 9)
    found, expected = (
        torch.autograd.grad(
            odeint(lambda t, y: function(y, k), y0, t, method="rk4", budget=budget).sum(), [y0, k]
        )
        for budget in ("1MiB", None)
    )
    assert all(map(torch.equal, found, expected))


def test_a_gradient_that_adaptive_steps_would_lose_is_an_error_before_they_run() -> None:
    hidden = iter([torch.ones(4, requires_grad=True)] * 10_000)  # kept in C
    y0, t = torch.ones(2, 4, requires_grad=True), torch.linspace(0, 1, 5)
    with pytest.raises(ExecutionError, match=r"shape \(4,\) .* gradient would be lost"):
        odeint(lambda t, y: -y * next(hidden), y0, t, budget="1MiB")


class Noisy(nn.Module):
    """Adds noise that it keeps in one of several ways, drawn before or in its first evaluation."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way, self.list = nn.Linear(3, 3), way, list[Tensor]()
        if way == "attribute":
            self.noise = torch.randn(4, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.way == "list":
            if not self.list:
                self.list.append(torch.randn_like(y))
            return torch.tanh(self.linear(y) + self.list[0])
        if not hasattr(self, "noise"):
            if self.way == "late buffer":
                self.register_buffer("noise", torch.randn_like(y), persistent=False)
            else:
                self.noise = torch.randn_like(y)
        return torch.tanh(self.linear(y) + self.noise)


@pytest.mark.parametrize("way", ["attribute", "late attribute", "late buffer", "list"])
@pytest.mark.parametrize(("method", "budget"), [("rk4", 8300), ("dopri5", 7300)])
def test_noise_that_is_redrawn_in_place_before_the_backward_is_refused_by_name(
    way: str, method: str, budget: int
) -> None:
    """Steps that run again would read another noise than the forward pass, and say nothing."""
    torch.manual_seed(0)
    f, times = Noisy(way), torch.linspace(0, 1, 17)
    y0 = torch.randn(4, 3, requires_grad=True)
    y = odeint(f, y0, times, method=method, budget=budget)
    noise = f.list[0] if way == "list" else f.noise
    assert isinstance(noise, Tensor)
    noise.normal_()
    name = "0" if way == "list" else "noise"
    with pytest.raises(ExecutionError, match=rf"'{name}', a tensor .* give f a new tensor"):
        y.sum().backward()

    y = odeint(f, y0, times, method=method, budget=budget)
    if way == "list":
        f.list[0] = torch.randn(4, 3)
    else:
        f.noise = torch.randn(4, 3)
    y.sum().backward(retain_graph=True)
    y.sum().backward()


@pytest.mark.parametrize(("method", "budget"), [("rk4", 8300), ("dopri5", 7300)])
def test_tensors_of_inference_mode_may_be_kept(method: str, budget: int) -> None:
    with torch.inference_mode():
        noise = torch.randn(4, 3)
    f, y0 = Noisy("late attribute"), torch.randn(4, 3)
    f.note = noise
    odeint(f, y0, torch.linspace(0, 1, 17), method=method, budget=budget).sum().backward()


@pytest.mark.parametrize(
    ("method", "budget", "buffer"),
    [("rk4", 8300, True), ("dopri5", 7300, True), ("dopri5", 7300, False)],
)
def test_a_counter_that_f_moves_in_place_is_no_constant_of_it(
    method: str, budget: int, buffer: bool
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            if buffer:
                self.register_buffer("calls", torch.zeros(()))
            else:
                self.calls = torch.zeros(())

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(self.linear(y))

    torch.manual_seed(0)
    f, y0, times = Counting(), torch.randn(4, 3), torch.linspace(0, 1, 17)
    solves = [odeint(f, y0, times, method=method, budget=budget) for _ in range(2)]
    for y in solves:
        y.sum().backward(retain_graph=True)
        y.sum().backward()


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("kind", ["numpy", "python"])
@pytest.mark.parametrize("where", ["closure", "object"])
def test_a_generator_that_f_keeps_is_put_back_after_measuring(
    method: str, kind: str, where: str
) -> None:
    """It draws once: the noise is that of a solve without a budget."""

    def make() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], object]]:
        generator: Any = np.random.default_rng(3) if kind == "numpy" else random.Random(3)
        held, noise = types.SimpleNamespace(generator=generator), dict[str, float]()

        def f(t: Tensor, y: Tensor) -> Tensor:
            source = generator if where == "closure" else held.generator
            if "noise" not in noise:
                noise["noise"] = source.random()
            return torch.sin(y) + noise["noise"]

        def state() -> object:
            return generator.bit_generator.state if kind == "numpy" else generator.getstate()

        return f, state

    y0, times = torch.randn(4, 3, requires_grad=True), torch.linspace(0, 1, 5)
    f, state = make()
    expected = odeint(f, y0, times, method=method)
    g, found_state = make()
    found = odeint(g, y0, times, method=method, budget=10**7)
    assert torch.equal(found, expected)
    assert found_state() == state()
    found.sum().backward()
    assert found_state() == state()
