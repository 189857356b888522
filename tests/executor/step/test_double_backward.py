"""Autograd's manners: going back more than once, higher derivatives, transforms, failures."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.torch_state import torch_modes as transforms
from tests.support.networks import NETWORKS, ode_net, planned

SOLVERS = ("store_all", "every_2", "input_only", "chain_dp")


def both(name: str, solver: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model that follows a plan, its twin, and a batch."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    twin = copy.deepcopy(model)
    return cs.checkpointed(model, planned(model, x, solver)), twin, x


def state(net: nn.Module, x: Tensor) -> list[Tensor]:
    """All that a step changes."""
    gradients = [t.grad for t in (*net.parameters(), x) if t.grad is not None]
    return [*gradients, *net.buffers(), torch.get_rng_state()]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others)
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# -- going back more than once


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["ode_net", "dropout_ode", "shared_weights", "in_place"])
def test_three_backwards_equal_those_of_plain_autograd(name: str, solver: str) -> None:
    trained, twin, x = both(name, solver)
    found = []
    for net in (trained, twin):
        x.grad = None
        torch.manual_seed(1)
        y = net(x)
        y.square().mean().backward(retain_graph=True)
        torch.rand(3)  # the caller draws, too
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        found.append([*state(net, x), y])
    assert_same(*found)


def test_a_backward_after_one_that_let_go_is_an_error() -> None:
    trained, _, x = both("ode_net", "every_2")
    y = trained(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(cs.ExecutionError, match=r"second backward .*retain_graph=True"):
        y.sum().backward()
    trained(x).sum().backward()


def test_gradients_of_some_parameters_and_then_of_all() -> None:
    trained, twin, x = both("dropout_mlp", "input_only")
    found = []
    for net in (trained, twin):
        torch.manual_seed(1)
        y = net(x).square().sum()
        last = list(net.parameters())[-1]
        (part,) = torch.autograd.grad(y, last, retain_graph=True)
        y.backward()
        found.append([part, *state(net, x)])
    assert_same(*found)


def test_a_second_backward_keeps_to_the_bytes_of_the_first() -> None:
    trained, _, x = both("ode_net", "input_only")
    y = trained(x).sum()
    meter = default_meter(x.device)

    def step(again: bool) -> None:
        y.backward(retain_graph=again)

    trained.zero_grad()
    _, first = meter.measure(lambda: step(True))
    _, second = meter.measure(lambda: step(False))
    assert second.peak_bytes <= first.peak_bytes + 1024
    assert second.final_bytes == 0


def test_an_input_that_changed_gives_no_second_backward() -> None:
    trained, _, x = both("ode_net", "every_2")
    y = trained(x).sum()
    y.backward(retain_graph=True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# -- higher derivatives


def recurrent() -> tuple[nn.Module, Tensor]:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(6, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    model = nn.Sequential(nn.Linear(6, 6), Recurrent(), nn.Tanh(), nn.Linear(6, 2))
    return model.double(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)


def smooth() -> tuple[nn.Module, Tensor]:
    f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2))
    model = nn.Sequential(nn.Linear(6, 6), cs.ODEBlock(f, "heun", 3), nn.BatchNorm1d(6), nn.GELU())
    return model.double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("make", [smooth, recurrent])
@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only"])
def test_a_gradient_penalty_equals_that_of_plain_autograd(
    make: Callable[[], tuple[nn.Module, Tensor]], solver: str
) -> None:
    torch.manual_seed(3)
    model, x = make()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, solver))

    def step(net: nn.Module) -> list[Tensor]:
        x.grad = None
        torch.manual_seed(4)
        y = net(x).square().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (y + g.square().sum()).backward()
        return [*state(net, x), g.detach()]

    expected = step(twin)
    with pytest.warns(cs.BudgetWarning, match="create_graph=True.* memory of plain autograd"):
        found = step(trained)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert_same(found[-2:], expected[-2:])  # the random state and the first gradient


@pytest.mark.filterwarnings("ignore:a backward with create_graph")
def test_second_derivatives_of_parameters() -> None:
    torch.manual_seed(5)
    model, x = smooth()
    model.eval()
    x = x.detach()
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    found = []
    for net in (trained, model):
        parameters = list(net.parameters())
        first = torch.autograd.grad(net(x).square().sum(), parameters, create_graph=True)
        norm = sum((g.square().sum() for g in first), torch.zeros((), dtype=x.dtype))
        found.append([*torch.autograd.grad(norm, parameters), norm])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:a backward with create_graph")
def test_hooks_of_parameters_fire_once_in_a_backward_with_a_graph() -> None:
    torch.manual_seed(6)
    model, x = smooth()
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    fired = []
    handle = model[0].weight.register_hook(lambda g: fired.append(1) or 2 * g)
    torch.manual_seed(7)
    (found,) = torch.autograd.grad(trained(x).sum(), model[0].weight, create_graph=True)
    handle.remove()
    torch.manual_seed(7)
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    assert fired == [1]
    assert torch.allclose(found, 2 * expected)


def test_gradients_with_a_graph_leave_nothing_behind() -> None:
    # Those of the last block alone: the backward never comes to the others.
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), torch.randn(4, 8)
    trained = cs.checkpointed(model, planned(model, x))

    def run() -> None:
        loss = trained(x).square().sum()
        with pytest.warns(cs.BudgetWarning):
            torch.autograd.grad(loss, [model[-1].weight], create_graph=True)

    run()
    gc.collect()
    gc.disable()
    try:
        with default_meter("cpu").window() as window:
            for _ in range(3):
                run()
            window.mark()
    finally:
        gc.enable()
    assert window.phases[0].final_bytes == window.phases[0].start_bytes


@pytest.mark.filterwarnings("ignore:a backward with create_graph")
def test_a_plain_backward_after_one_with_a_graph() -> None:
    trained, twin, x = both("input_gradient_mlp", "input_only")
    found = []
    for net in (trained, twin):
        x.grad = None
        y = net(x).square().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        y.backward()
        found.append([*state(net, x), g.detach()])
    assert_same(*found)


# -- transforms, forward mode, inference


@pytest.fixture(params=["torch's own name", "without it"])
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without it":
        monkeypatch.setattr("ckptsched.torch_state.torch_modes._forward_level", lambda: None)
    else:
        assert transforms._forward_level() == -1


@pytest.mark.filterwarnings("ignore:.*which a plan cannot follow")
def test_transforms_run_plainly() -> None:
    trained, twin, x = both("input_gradient_mlp", "every_2")
    x = x.detach()
    found = []
    for net in (trained, twin):
        given = {n: p.detach() for n, p in net.named_parameters()}

        def loss(parameters: dict[str, Tensor], row: Tensor, net: nn.Module = net) -> Tensor:
            return torch.func.functional_call(net, parameters, (row[None],)).square().sum()

        by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, x)
        jacobian = torch.func.jacrev(net)(x[:2])
        found.append([*by_row.values(), jacobian, torch.func.vmap(net)(x[:, None])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_transform_warns_that_the_plan_is_not_followed() -> None:
    trained, _, x = both("input_gradient_mlp", "every_2")
    with pytest.warns(cs.BudgetWarning, match=r"transform of torch\.func is at work"):
        torch.func.vmap(trained)(x.detach()[:, None])


def test_without_torchs_own_name_a_transform_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, _, x = both("input_gradient_mlp", "every_2")
    monkeypatch.setattr("ckptsched.torch_state.torch_modes._functorch_level", lambda: None)
    with pytest.raises(cs.PlanMismatchError, match=r"belongs to a transform of torch\.func"):
        torch.func.grad(lambda z: trained(z).sum())(x.detach())


@pytest.mark.usefixtures("names")
@pytest.mark.filterwarnings("ignore:.*which a plan cannot follow")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch's own, of its rules
def test_forward_mode_runs_plainly() -> None:
    trained, twin, x = both("input_gradient_mlp", "every_2")
    x, tangent = x.detach(), torch.ones_like(x)
    found = []
    for net in (trained, twin):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent))).tangent)
    assert torch.equal(*found)


@pytest.mark.usefixtures("names")
def test_outside_of_transforms_nothing_is_said() -> None:
    trained, _, x = both("input_gradient_mlp", "every_2")
    trained(x).sum().backward()


def test_inference_costs_nothing_and_its_tensors_are_refused() -> None:
    trained, twin, x = both("ode_net", "every_2")
    trained.eval(), twin.eval()
    with torch.inference_mode():
        y = trained(x)
        assert y.is_inference()
        assert torch.equal(y, twin(x))
        kept = x + 0
    with pytest.raises(cs.PlanMismatchError, match=r"under torch.inference_mode.*clone"):
        trained(kept)


# -- anomaly mode and failures


class Rooted(nn.Module):
    """A square root, whose gradient at 0 is not a number once it is multiplied by 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x * 0) * 0


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in SqrtBackward0")
@pytest.mark.parametrize("solver", ["store_all", "input_only"])
def test_anomaly_mode_finds_what_is_not_a_number(solver: str) -> None:
    trained, twin, x = both("ode_net", solver)
    found = []
    for net in (trained, twin):
        with torch.autograd.detect_anomaly():
            net(x).sum().backward()
        found.append(state(net, x))
    assert_same(*found)
    model = nn.Sequential(nn.Linear(4, 4), Rooted(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    trained = cs.checkpointed(model, planned(model, x, solver))
    with torch.autograd.detect_anomaly():
        y = trained(x).sum()
        with pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan"):
            y.backward()


class Breaking(nn.Module):
    """Fails when it is told to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.when = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "forward" or (self.when == "again" and cs.is_recomputing()):
            raise ValueError("out of luck")
        y = torch.tanh(self.inner(x))
        if y.requires_grad and self.when == "backward":
            y.register_hook(self._fail)
        return y

    def _fail(self, gradient: Tensor) -> None:
        raise ValueError("out of luck")


@pytest.mark.parametrize("when", ["forward", "again", "backward"])
@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only"])
def test_a_failure_leaves_gradients_as_plain_autograd_does(when: str, solver: str) -> None:
    torch.manual_seed(8)
    parts = [nn.Linear(8, 8), Breaking(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]
    model = nn.Sequential(*parts)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 8)
    plan = planned(model, x, solver)
    trained = cs.checkpointed(model, plan)
    if when == "again" and plan.forwards == len(parts):
        pytest.skip("nothing runs again")
    model[1].when = when
    # Plain autograd does not run again: there the same stage fails on its way back.
    twin[1].when = "backward" if when == "again" else when
    for net in (trained, twin):
        before = [p.clone() for p in net.parameters()]
        with pytest.raises(ValueError, match="out of luck"):
            net(x).square().sum().backward()
        assert_same(before, list(net.parameters()))
    if when != "again":
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)
    for p in parts[1].parameters():
        assert p.grad is None
    model[1].when = ""
    assert cs.verify(model, plan, x).ok


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", ["no backward", "partial backward", "retained", "create_graph"])
@pytest.mark.filterwarnings("ignore:a backward with create_graph")
def test_a_step_that_is_let_go_leaves_nothing(how: str) -> None:
    trained, _, x = both("input_gradient_mlp", "every_2")
    parameters = list(trained.parameters())

    def step() -> weakref.ref[Any]:
        y = trained(x).sum()
        run = weakref.ref(y.grad_fn.next_functions[0][0].keeps.value)
        if how == "partial backward":
            torch.autograd.grad(y, parameters[-1])
        elif how == "retained":
            torch.autograd.grad(y, parameters, retain_graph=True)
        elif how == "create_graph":
            torch.autograd.grad(y, parameters, create_graph=True)
        return run

    run, measured = default_meter(x.device).measure(step)
    assert run() is None
    assert measured.final_bytes == 0


def test_a_failing_second_backward_lets_everything_go() -> None:
    model, x = ode_net()
    model[2] = Breaking(16)
    model[2].inner = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
    trained = cs.checkpointed(model, planned(model, x, "store_all"))
    y = trained(x).sum()
    y.backward(retain_graph=True)
    trained.zero_grad()
    model[2].when = "again"

    def second() -> None:
        with pytest.raises(ValueError, match="out of luck"):
            y.backward()

    _, measured = default_meter(x.device).measure(second)
    assert measured.final_bytes == 0
