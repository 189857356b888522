"""What must not go wrong silently: side effects, hooks, and stages that are not what they were."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.recompute.output_check import checksum
from tests.support.networks import NETWORKS, ode_net, planned


class Noting(nn.Module):
    """A layer that notes each of its runs, and whether it was one of a recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.runs: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(cs.is_recomputing())
        return torch.tanh(self.inner(x))


@pytest.mark.parametrize("solver", ["store_all", "every_stage", "every_2", "input_only"])
def test_a_stage_knows_whether_it_runs_again(solver: str) -> None:
    layers = [Noting() for _ in range(6)]
    model = nn.Sequential(*layers)
    x = torch.randn(4, 8)
    chain = cs.profile(model, x)
    assert all(all(layer.runs) for layer in layers)  # measuring is no training step
    for layer in layers:
        layer.runs.clear()
    plan = cs.plan(chain, budget=2**50, solver=solver)
    trained = cs.checkpointed(model, plan)
    for step in (1, 2):
        trained(x).sum().backward()
        assert [layer.runs.count(False) for layer in layers] == [step] * 6
    assert sum(len(layer.runs) for layer in layers) == 2 * plan.forwards
    assert not cs.is_recomputing()
    model(x).sum().backward()
    assert [layer.runs.count(False) for layer in layers] == [3] * 6


def test_recomputing_is_known_to_the_thread_that_recomputes() -> None:
    seen: list[bool] = []

    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if cs.is_recomputing() and asked.is_set():
                other = threading.Thread(target=lambda: seen.append(cs.is_recomputing()))
                other.start()
                other.join()
            return super().forward(x)

    asked = threading.Event()
    model = nn.Sequential(*[Asking(4, 4) for _ in range(3)])
    x = torch.randn(2, 4)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    asked.set()
    trained(x).sum().backward()
    assert len(seen) >= 2
    assert not any(seen)


def test_a_failing_recomputation_ends_the_mark() -> None:
    class Failing(nn.Linear):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.armed and cs.is_recomputing():
                raise ValueError("out of luck")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Failing(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    model[1].armed = True
    with pytest.raises(ValueError, match="out of luck"):
        trained(x).sum().backward()
    assert not cs.is_recomputing()


def test_hooks_of_modules_run_with_their_module() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    x = torch.randn(4, 8, requires_grad=True)
    fired: list[str] = []
    for layer in model:
        layer.register_forward_hook(
            lambda *_: fired.append("again" if cs.is_recomputing() else "first")
        )
        layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    plan = planned(model, x, "every_2")
    fired.clear()
    cs.checkpointed(model, plan)(x).sum().backward()
    assert fired.count("first") == fired.count("backward") == 6
    assert fired.count("again") == plan.forwards - 6 > 0


@pytest.mark.parametrize("where", ["", "0"])
def test_a_hook_that_comes_after_planning_is_not_skipped(where: str) -> None:
    part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model, x = nn.Sequential(part, nn.Linear(8, 8)), torch.randn(4, 8)
    trained = cs.checkpointed(model, planned(model, x))
    handle = model.get_submodule(where).register_forward_hook(lambda *_: None)
    with pytest.raises(cs.PlanMismatchError, match="a hook was added to a container"):
        trained(x)
    handle.remove()
    trained(x).sum().backward()


# -- the check of results


class Drifting(nn.Module):
    """Computes another thing when a test has it drift."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.shift and cs.is_recomputing():
            return self.inner(x) + self.shift
        return self.inner(x)


def drifting() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Linear(16, 16), Drifting(), nn.Tanh(), nn.Linear(16, 16))
    return model, torch.randn(4, 16)


def test_the_check_names_a_stage_that_gives_another_result() -> None:
    model, x = drifting()
    for solver in ("every_stage", "input_only"):
        trained = cs.checkpointed(model, planned(model, x, solver), check="outputs")
        trained(x).sum().backward()
        y = trained(x).sum()
        model[1].shift = 1e-3
        with pytest.raises(
            cs.ExecutionError,
            match=r"stage '1' gave another result when it ran again.*let it depend on its input",
        ):
            y.backward()
        model[1].shift = 0.0
        trained(x).sum().backward()


def test_without_the_check_or_without_recomputation_it_passes() -> None:
    model, x = drifting()
    model[1].shift = 1e-3
    cs.checkpointed(model, planned(model, x, "every_stage"), check="none")(x).sum().backward()
    plan = planned(model, x, "store_all")
    cs.checkpointed(model, plan, check="outputs")(x).sum().backward()


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "views"])
def test_the_check_passes_what_is_right_and_keeps_the_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, "input_only"), check="outputs")
    for net in (trained, twin):
        torch.manual_seed(1)
        net(x).square().mean().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_an_unknown_check_is_refused() -> None:
    model, x = drifting()
    with pytest.raises(cs.ExecutionError, match="'all'; give 'none', 'glance' or 'outputs'"):
        cs.checkpointed(model, planned(model, x), check="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
def test_checksums_tell_values_shapes_and_dtypes_apart(dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    other = base.clone()
    other[1, 2, 3] += 1
    seen = [
        checksum([base]),
        checksum([other]),
        checksum([base.reshape(3, 2, 4)]),
        checksum([base, base]),
        checksum([base[:1]]),
        checksum([base[:, :0]]),
        checksum([]),
    ]
    assert len(set(seen)) == len(seen)
    assert checksum([base.clone()]) == seen[0]
    strided = torch.empty(2, 4, 3, dtype=dtype).transpose(1, 2).copy_(base)
    assert checksum([strided]) == checksum([strided.clone()])
    zero = torch.zeros(3, dtype=torch.float32)
    assert checksum([zero]) != checksum([-zero])


# -- changes in place, and of the model


def test_a_state_that_another_stage_changes_in_place_is_caught() -> None:
    class Keeping(nn.Module):
        """Keeps a view of its output, and writes into it when it is told to."""

        def forward(self, x: Tensor) -> Tensor:
            self.seen = 2 * x
            return self.seen

    class Writing(nn.Module):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.armed:
                keeping.seen[0].zero_()
            return x + 1

    keeping, writing = Keeping(), Writing()
    model = nn.Sequential(nn.Linear(4, 4), keeping, nn.Tanh(), writing, nn.Linear(4, 4))
    x = torch.randn(2, 4)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    writing.armed = True
    with pytest.raises(
        cs.ExecutionError,
        match=r"the input of stage '2' was changed in place since it was made.*change a copy",
    ):
        trained(x).sum().backward()
    writing.armed = False
    trained(x).sum().backward()


def test_a_batch_that_the_caller_changes_before_the_backward_is_caught() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    y = trained(x).sum()
    x.mul_(2)
    with pytest.raises(cs.ExecutionError, match=r"stage '0\.0' was changed in place since"):
        y.backward()


def test_a_parameter_or_buffer_that_is_taken_out_is_caught() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    y = trained(x).sum()
    bias = model[0][0].bias
    del model[0][0].bias
    with pytest.raises(cs.ExecutionError, match="parameter 'bias' of a Conv2d was taken out"):
        y.backward()
    model[0][0].register_parameter("bias", bias)
    y = trained(x).sum()
    mean = model[0][1].running_mean
    del model[0][1].running_mean
    with pytest.raises(cs.ExecutionError, match="buffer 'running_mean' of a BatchNorm2d was"):
        y.backward()
    model[0][1].register_buffer("running_mean", mean)


def test_a_parameter_that_is_replaced_before_the_backward_gets_no_wrong_gradient() -> None:
    torch.manual_seed(2)
    model, x = NETWORKS["input_gradient_mlp"]()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    found = []
    for net, parts in ((trained, model), (twin, twin)):
        y = net(x).square().sum()
        old = parts[4].weight
        parts[4].weight = nn.Parameter(torch.zeros_like(old))
        y.backward()
        assert parts[4].weight.grad is None
        found.append([old.grad, *(p.grad for p in parts.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- when hooks of parameters fire


class Logged(torch.autograd.Function):
    """Notes when the backward of a block begins (at its end) and ends (at its start)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], what: str) -> Tensor:
        ctx.log, ctx.what = log, what
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.log.append(ctx.what)
        return grads[0], None, None


class Logging(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.name = name
        self.__dict__["log"] = log

    def forward(self, x: Tensor) -> Tensor:
        x = Logged.apply(x, self.log, f"{self.name} ends")
        x = self.two(torch.tanh(self.one(x)))
        return Logged.apply(x, self.log, f"{self.name} begins")


@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only", "chain_dp"])
def test_parameters_get_their_gradients_as_early_as_in_plain_autograd(solver: str) -> None:
    log: list[str] = []
    model = nn.Sequential(*[Logging(f"block {k}", log) for k in range(5)], nn.Tanh())
    x = torch.randn(4, 8, requires_grad=True)
    plan = planned(model, x, solver)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: log.append(f"block {name[0]} has a gradient")
        )

    def events(net: nn.Module) -> list[str]:
        log.clear()
        net(x).sum().backward()
        return list(log)

    expected, found = events(model), events(cs.checkpointed(model, plan))
    assert sorted(found) == sorted(expected)
    # What a block's backward reached is handed over before the next block's backward begins.
    for k in reversed(range(4)):
        begins = f"block {k} begins"
        assert sorted(found[: found.index(begins)]) == sorted(expected[: expected.index(begins)])
