"""Estimates: what a profile measures, as far as shapes alone tell it, and no run on data."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ckptsched as cs
from tests.support.networks import NETWORKS, dropout_mlp, ode_net


@pytest.mark.parametrize("name", NETWORKS)
def test_states_tapes_and_gradients_are_as_measured(name: str) -> None:
    """Every stage of these networks, without exception.

    Known to differ are tapes of stages that run by other kernels with data. Below the measured
    one: nn.LSTM on the CPU, one operation of oneDNN. Above it: attention without dropout, which
    real devices compute without keeping its matrix, and dropout on CUDA, whose fused kernel keeps
    a mask of one byte a value.
    """
    torch.manual_seed(1)
    model, x = NETWORKS[name]()
    guessed, measured = cs.profile(model, x, fake=True), cs.profile(model, x)
    for i, (one, other) in enumerate(zip(guessed.stages, measured.stages, strict=True), 1):
        for figure in (
            "name",
            "state_bytes",
            "tape_bytes",
            "gradient_bytes",
            "parameter_gradient_bytes",
        ):
            found, expected = getattr(one, figure), getattr(other, figure)
            assert found == expected, f"{figure} of {measured.stage_name(i)}"
        assert one.ledger is not None
        assert other.ledger is not None
        for figure in ("state_bytes", "tape_bytes", "output_is_view", "input_saved"):
            found, expected = getattr(one.ledger, figure), getattr(other.ledger, figure)
            assert found == expected, f"{figure} in the ledger of {measured.stage_name(i)}"
        assert min(one.forward_seconds, one.backward_seconds) >= 0
    # Not stage by stage: dropout draws and multiplies forward, and only multiplies backward.
    forward = sum(stage.forward_seconds for stage in guessed.stages)
    assert sum(stage.backward_seconds for stage in guessed.stages) >= forward > 0
    assert guessed.blocks == measured.blocks
    assert guessed.held_bytes == measured.held_bytes
    assert guessed.input_gradient_bytes == measured.input_gradient_bytes
    assert guessed.random_state_bytes == measured.random_state_bytes
    assert guessed.input_bytes == 0
    assert guessed.signature is None
    assert guessed.store_all_seconds > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_least_budget_is_near_the_measured_one(name: str) -> None:
    torch.manual_seed(1)
    model, x = NETWORKS[name]()
    guessed = cs.plan(cs.profile(model, x, fake=True), budget="100%")
    measured = cs.plan(cs.profile(model, x), budget="100%")
    # Below for want of workspaces; above as the planning model bounds what a ledger counts.
    assert 0.75 <= guessed.least_budget_bytes / measured.least_budget_bytes <= 1.5
    middle = (guessed.least_budget_bytes + guessed.store_all_bytes) // 2
    plan = cs.plan(guessed.chain, budget=middle)
    assert plan.peak_bytes <= middle
    with pytest.raises(cs.PlanMismatchError, match="a chain without a model; profile the model"):
        cs.checkpointed(model, plan)


class OnData(TorchFunctionMode):
    """Counts calls of `nn.functional` and tensor methods that compute on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() and result.is_floating_point():
            on_data = any(isinstance(a, Tensor) and not a.is_meta and a.numel() for a in args)
            if on_data and not result.is_meta and getattr(func, "__name__", "") != "detach":
                self.calls.append(str(func))
        return result


def test_nothing_is_run_on_data() -> None:
    torch.manual_seed(2)
    seen: list[bool] = []
    for model, x in (ode_net(), dropout_mlp()):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        same = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
        seen.clear()
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, args, out: seen.append(args[0].is_meta))
        random = torch.get_rng_state()
        with OnData() as on_data:
            cs.profile(model, x, fake=True)
        assert on_data.calls == []
        assert seen
        assert all(seen)
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        assert same == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]


def test_a_model_larger_than_the_machine() -> None:
    with torch.device("meta"):
        wide = [m for _ in range(4) for m in (nn.Linear(10**6, 10**6, bias=False), nn.GELU())]
        chain = cs.profile(nn.Sequential(*wide), torch.empty(8, 10**6), fake=True)
    assert chain.stages[0].parameter_gradient_bytes == 4 * 10**12
    # 2 operations a weight and row forward, twice that backward but for the first layer.
    assert chain.stages[2].forward_seconds == pytest.approx(160 + 400, rel=0.01)
    assert chain.stages[2].backward_seconds == pytest.approx(320 + 800, rel=0.01)


def test_gradients_of_shared_parameters_count_once() -> None:
    block = cs.ODEBlock(nn.Linear(4, 4), "rk4", 500)
    chain = cs.profile(block, torch.randn(2, 4, requires_grad=True), fake=True)
    assert [stage.parameter_gradient_bytes for stage in chain.stages] == [0] * 499 + [80]
    assert len({id(stage) for stage in chain.stages}) <= 3


class Runs(nn.Module):
    """Runs a function, with a constant at hand."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.constant = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, c: x if x.sum() > 0 else -x, r"item\(\)"),
        (lambda x, c: torch.unique(x), "unique"),
        (lambda x, c: x[x > 0], "nonzero"),
        (lambda x, c: x + torch.ones(4, device="cpu"), "device"),
    ],
)
def test_a_stage_that_needs_data_is_named(
    function: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Runs(function))
    with pytest.raises(cs.ProfileError, match=rf"stage '1' failed.*(?s:{message}.*without fake)"):
        cs.profile(model, torch.randn(2, 4), fake=True)


@pytest.mark.parametrize(
    ("function", "tape_bytes", "draws"),
    [
        (lambda x, c: x * c, 0, False),
        (lambda x, c: x * torch.ones(4), 16, False),
        (lambda x, c: x * torch.rand(4), 16, True),
        (lambda x, c: nn.functional.dropout(x, 0.5), 32, True),
        (lambda x, c: nn.functional.dropout(x, 0.5, training=False), 0, False),
    ],
)
def test_constants_and_random_numbers(
    function: Callable[[Tensor, Tensor], Tensor], tape_bytes: int, draws: bool
) -> None:
    model = nn.Sequential(Runs(function), nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    guessed, measured = cs.profile(model, x, fake=True), cs.profile(model, x)
    first = guessed.stages[0]
    assert first.tape_bytes - first.state_bytes == tape_bytes
    assert first.tape_bytes == measured.stages[0].tape_bytes
    assert bool(guessed.random_state_bytes) == draws == bool(measured.random_state_bytes)


def test_what_cannot_be_estimated_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    target = torch.tensor([0, 1])

    def loss(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(cs.ProfileError, match=r"the loss failed.*let targets lie there, too"):
        cs.profile(model, x, loss=loss, fake=True)
    target = target.to("meta")
    assert cs.profile(model, x, loss=loss, fake=True).loss_seconds > 0
    with pytest.raises(cs.ProfileError, match="must return one number"):
        cs.profile(model, x, loss=lambda y: y, fake=True)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(cs.ProfileError, match=r"autocast is on.*without fake"),
    ):
        cs.profile(model, x, fake=True)
    uncopied = nn.Tanh()
    uncopied.lock = threading.Lock()
    with pytest.raises(cs.ProfileError, match=r"cannot be copied.*without fake"):
        cs.profile(nn.Sequential(uncopied), x, fake=True)
    with pytest.raises(cs.ProfileError, match="stage '1' changes its input in place"):
        cs.profile(nn.Sequential(model, Runs(lambda x, c: x.add_(1))), x, fake=True)


class OwnNorm(nn.BatchNorm2d):
    """Of a class of its own, so that its statistics may be read for all that is known."""


class Counting(nn.Module):
    """Reads and changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(7))
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator, union-attr]
        return self.layer(x) * self.calls.mean()  # type: ignore[operator, union-attr]


def _normed(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), make(), nn.ReLU())


def _spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))


@pytest.mark.parametrize("capture", [None, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: _normed(lambda: OwnNorm(4)),
        lambda: _normed(lambda: OwnNorm(4).eval()),
        lambda: _normed(lambda: OwnNorm(4, track_running_stats=False)),
        lambda: _normed(lambda: nn.BatchNorm2d(4)),
        lambda: _normed(lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
        lambda: _normed(_spectral),
        lambda: _normed(Counting),
    ],
)
def test_buffers_that_are_kept_with_states_are_those_of_measured_chains(
    make: Callable[[], nn.Module], capture: bool | None
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(make() for _ in range(3))), torch.randn(2, 4, 8, 8)
    measured = cs.profile(model, x, capture=capture)
    guessed = cs.profile(model, x, capture=capture, fake=True)
    assert guessed.blocks == measured.blocks
    assert [s.state_bytes for s in guessed.stages] == [s.state_bytes for s in measured.stages]
