"""torch.compile: compiled stages inside a plan, and compiled networks around one."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from tests.support.networks import dropout_ode, ode_net

BACKENDS = ("eager", "aot_eager")

# The compiler hides this warning of its own from users, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def nothing_compiled_yet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Each test compiles anew, and logs no warning."""
    torch.compiler.reset()
    yield
    warned = [r for r in caplog.get_records("call") if r.levelno >= logging.WARNING]
    # That one is of the machine: a torch for CUDA where there is no CUDA.
    assert not [r for r in warned if r.name != "torch.utils.cpp_extension"]
    torch.compiler.reset()


class Around(nn.Module):
    """A network with a part that may follow a plan."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.before, self.part, self.after = nn.Linear(16, 16), part, nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.part(torch.tanh(self.before(x)))))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(16, 16), nn.Tanh())])


class RightHandSide(nn.Sequential):
    """With a forward of its own: in place, torch 2.9 compiles none of its own modules'."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def used_twice(compile_f: Callable[[nn.Module], nn.Module] = lambda f: f) -> nn.Sequential:
    """One right-hand side in two ODE blocks."""
    torch.manual_seed(0)
    f = compile_f(RightHandSide(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)))
    return nn.Sequential(cs.ODEBlock(f, "heun", 4), cs.ODEBlock(f, "euler", 3), nn.Linear(16, 2))


def batch(*, requires_grad: bool = False) -> Tensor:
    return torch.randn(
        64, 16, generator=torch.Generator().manual_seed(1), requires_grad=requires_grad
    )


def step(owner: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one step."""
    owner.zero_grad()
    torch.manual_seed(2)
    y = call(x)
    y.square().mean().backward()
    gradients = [p.grad.clone() for p in owner.parameters() if p.grad is not None]
    return [y.detach(), *gradients, *(b.clone() for b in owner.buffers())]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others) > 1
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def in_place(backend: str) -> Callable[[nn.Module], nn.Module]:
    def compiled(module: nn.Module) -> nn.Module:
        module.compile(backend=backend)
        return module

    return compiled


def wrapped(backend: str) -> Callable[[nn.Module], nn.Module]:
    return lambda module: torch.compile(module, backend=backend)


class Graphs:
    """A backend that counts what it is given to compile."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


# -- compiled stages inside


@pytest.mark.parametrize("how", [in_place, wrapped])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_stages_run_by_a_plan_as_by_plain_autograd(
    backend: str, how: Callable[[str], Callable[[nn.Module], nn.Module]]
) -> None:
    twin, x = used_twice(), batch()
    model = used_twice(how(backend))
    net = cs.fit(model, x, budget="60%")
    assert cs.plan_of(net).overhead > 0  # something runs again
    assert_same(step(net, net, x), step(twin, twin, x))
    assert_same(step(net, net, x), step(twin, twin, x))


def test_compiled_stages_with_batch_norm_move_its_statistics_once() -> None:
    torch.manual_seed(0)
    model, x = ode_net()
    twin = copy.deepcopy(model)
    for stage in model:
        if isinstance(stage, nn.Sequential):
            stage.compile(backend="eager")
    net = cs.fit(model, x, budget="50%")
    assert_same(step(net, net, x), step(twin, twin, x))


def test_compiled_stages_are_compiled_when_they_run_again() -> None:
    graphs = Graphs()
    net = cs.fit(used_twice(in_place(graphs)), batch(), budget="60%")  # type: ignore[arg-type]
    before = graphs.count
    assert before >= 2  # with gradients and without: profiling runs a stage both ways
    step(net, net, batch())
    step(net, net, batch())
    assert graphs.count == before  # the aliases of parameters are no reason to compile again


def test_verify_holds_for_compiled_stages() -> None:
    model, x = used_twice(in_place("aot_eager")), batch()
    plan = cs.plan(cs.profile(model, x), budget="60%")
    assert cs.verify(model, plan, x).ok


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler of generated code
def test_generated_code_runs_by_a_plan() -> None:
    x = batch()
    model = used_twice(in_place("inductor"))
    expected = step(model, model, x)
    net = cs.fit(model, x, budget="60%")
    assert cs.plan_of(net).overhead > 0
    for found, plain in zip(step(net, net, x), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    assert cs.verify(model, cs.plan_of(net), x).ok


# -- compiled networks around


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_leaves_its_graph_once_for_a_plan(backend: str) -> None:
    torch.manual_seed(0)
    twin, x = Around(mlp()), batch()
    net = copy.deepcopy(twin)
    net.part = cs.fit(net.part, batch(requires_grad=True), budget="60%")
    explained = torch._dynamo.explain(net)(x)
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    compiled = torch.compile(net, backend=backend)
    expected = step(twin, twin, x)
    for _ in range(2):
        for found, plain in zip(step(net, compiled, x), expected, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mlp, used_twice, lambda: dropout_ode()[0]])
def test_a_compiled_model_that_follows_a_plan_follows_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    x = batch()[:, : next(model.parameters()).shape[1]]
    net = cs.fit(model, x.contiguous(), budget="70%")
    compiled = torch.compile(net, backend="eager")
    assert_same(step(net, compiled, x.contiguous()), step(twin, twin, x.contiguous()))
    assert compiled.state_dict().keys() == {f"_orig_mod.{key}" for key in twin.state_dict()}


def test_a_whole_step_can_be_compiled() -> None:
    twin, x = mlp(), batch()
    net, graphs = cs.fit(mlp(), x, budget="60%"), Graphs()

    def whole(x: Tensor) -> Tensor:
        y = net(x)
        y.square().mean().backward()
        return y

    compiled = torch.compile(whole, backend=graphs)
    net.zero_grad()
    y = compiled(x)
    found = [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
    assert_same(found, step(twin, twin, x))
    assert graphs.count == 1  # the loss; nothing of the forward or backward was read


def test_without_gradients_a_compiled_model_is_one_graph() -> None:
    model, x = mlp(), batch()
    twin = copy.deepcopy(model)
    net = cs.fit(model, x, budget="60%")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), twin(x))
        assert torch.equal(compiled(x[:7]), twin(x[:7]))


def test_one_graph_of_a_planned_step_is_refused() -> None:
    net = cs.fit(mlp(), batch(), budget="60%")
    with pytest.raises(Exception, match="_follow_plan"):
        torch.compile(net, backend="eager", fullgraph=True)(batch())


def test_a_compiled_function_of_time_is_told_from_one_of_the_state() -> None:
    class Timed(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return z * t

    f, g = torch.compile(Timed(), backend="eager"), torch.compile(nn.Tanh(), backend="eager")
    assert cs.ODEBlock(f, "euler", 2).time_dependent
    assert not cs.ODEBlock(g, "euler", 2).time_dependent
