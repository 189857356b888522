"""Verification shows promised beside measured, and catches planted faults."""

from __future__ import annotations

import importlib
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.cli.commands import main
from ckptsched.executor.step.states import Checkpoint
from ckptsched.executor.verify import _compare
from ckptsched.tensors.pytree import State
from ckptsched.torch_state.replay_context import RandomState
from tests.support.networks import dropout_mlp, ode_net, planned


def test_the_table_shows_promised_beside_measured() -> None:
    model, x = ode_net()
    plan = planned(model, x)
    result = cs.verify(model, plan, x, rounds=1)
    text = str(result)
    assert result.ok
    assert f"{plan.peak_bytes} bytes" in text
    assert f"{result.measured_peak_bytes} bytes" in text
    assert "x plain autograd" in text
    assert text.splitlines()[-1].split() == ["verified", "yes"]


def test_the_model_is_left_as_it_was() -> None:
    model, x = ode_net()
    plan = planned(model, x)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    cs.verify(model, plan, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


class Faulty(nn.Module):
    """Behaves while it is profiled, and then does what a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.register_buffer("count", torch.zeros(()))
        self.fault, self.calls = "", 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.fault == "hidden state":
            x = x * self.calls
        if self.fault == "own random numbers":
            x = x * torch.rand(1, generator=GENERATOR)
        if self.fault == "larger tape":
            return torch.tanh(torch.tanh(self.inner(x)).repeat(1, 50)).reshape(-1, 50, 32).sum(1)
        return self.inner(x)


GENERATOR = torch.Generator()


@pytest.mark.parametrize("fault", ["hidden state", "own random numbers"])
def test_wrong_gradients_are_caught(fault: str) -> None:
    faulty = Faulty()
    model = nn.Sequential(nn.Linear(32, 32), faulty, nn.Tanh(), nn.Linear(32, 32))
    x = torch.randn(8, 32)
    plan = planned(model, x, "every_stage")
    assert cs.verify(model, plan, x).ok
    faulty.fault = fault
    with pytest.warns(cs.BudgetWarning, match="stage '1' has a tape"):  # of what it does besides
        result = cs.verify(model, plan, x)
    assert not result.ok
    assert not result.gradients_equal
    assert result.worst_gradient
    assert "verified" in str(result)
    assert str(result).endswith("NO")


def test_a_larger_tape_is_caught() -> None:
    faulty = Faulty()
    model = nn.Sequential(nn.Linear(32, 32), faulty, nn.Tanh(), nn.Linear(32, 32))
    x = torch.randn(8, 32)
    plan = planned(model, x, "store_all")
    faulty.fault = "larger tape"
    with pytest.warns(cs.BudgetWarning, match="stage '1' has a tape"):
        result = cs.verify(model, plan, x)
    assert result.gradients_equal
    assert result.measured_peak_bytes > plan.budget_bytes
    assert not result.ok


def test_a_wrong_replay_of_random_numbers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = dropout_mlp()

    class Forgetful:
        def restore(self) -> None: ...

    def forget(self: Checkpoint, state: State, random: RandomState | None) -> None:
        self.state, self.versions = state, state.versions()
        self.random = None if random is None else Forgetful()  # type: ignore[assignment]

    plans = [planned(model, x, solver) for solver in ("store_all", "every_2")]
    monkeypatch.setattr(Checkpoint, "__init__", forget)
    assert cs.verify(model, plans[0], x).ok  # which runs nothing again
    result = cs.verify(model, plans[1], x)
    assert not result.gradients_equal
    assert not result.ok


def test_statistics_that_move_twice_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ode_net()
    plan = planned(model, x)

    class Nothing:
        def __init__(self, *arguments: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *exception: object) -> None: ...

    monkeypatch.setattr("ckptsched.recompute.parameter_swap.Slots.buffers_replaced", Nothing)
    result = cs.verify(model, plan, x)
    assert not result.buffers_equal
    assert not result.ok


def test_nan_gradients_are_equal_to_nan_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.full((2, 4), float("nan"))
    plan = planned(model, torch.randn(2, 4))
    result = cs.verify(model, plan, x)
    assert result.max_gradient_difference == result.loss_difference == 0.0
    assert result.ok
    nan, one = torch.full((1,), float("nan")), torch.ones(1)
    assert _compare({"a": nan}, {"a": nan})[0] == 0.0
    assert math.isnan(_compare({"a": one}, {"a": nan})[0])
    assert math.isnan(_compare({"a": nan}, {"a": one})[0])
    assert _compare({"a": one}, {"a": None})[0] == float("inf")


def test_a_difference_that_is_no_number_is_the_worst() -> None:
    expected = {"a": torch.ones(1), "b": torch.ones(1)}
    found = {"a": torch.full((1,), float("nan")), "b": torch.ones(1) + 1e-6}
    difference, worst, largest = _compare(expected, found)
    assert difference != difference
    assert (worst, largest) == ("a", 1.0)


def test_verify_refuses_no_grad() -> None:
    model, x = ode_net()
    plan = planned(model, x)
    with torch.no_grad(), pytest.raises(cs.PlanMismatchError, match=r"outside torch\.no_grad"):
        cs.verify(model, plan, x)


FAULTY = """
import ckptsched as cs
from torch import nn

class Faulty(nn.Linear):
    def forward(self, x):
        return super().forward(x if FAULT and cs.is_recomputing() and self.armed else x + 1)

def build(fault=0):
    net = nn.Sequential(*[Faulty(8, 8) for _ in range(4)])
    for part in net:
        part.armed = bool(fault)
    return net

FAULT = True
"""


def test_the_command_ends_with_code_1_for_a_planted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty_nets.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    build = importlib.import_module("faulty_nets").build
    plan = tmp_path / "plan.json"
    planned(build(), torch.randn(4, 8), "every_stage").save(plan)
    command = ["verify", "faulty_nets:build", str(plan), "--input", "4x8", "--rounds", "0"]
    for fault, code in ((0, 0), (1, 1)):
        said = pytest.warns(cs.BudgetWarning, match="has a tape") if fault else nullcontext()
        with said:
            result = CliRunner().invoke(main, [*command, "--arg", f"fault={fault}"])
        assert result.exit_code == code, result.output
        assert result.output.splitlines()[-1].split() == ["verified", "NO" if code else "yes"]


def test_a_generator_that_is_not_put_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.source = torch.Generator().manual_seed(1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.rand(x.shape, generator=self.source)

    model, x = nn.Sequential(*[Drawing() for _ in range(4)]), torch.randn(4, 8)
    plan = planned(model, x, "every_2")
    assert cs.verify(model, plan, x).ok
    monkeypatch.setattr("ckptsched.capture.inspection.own_generators", lambda *_: ())
    result = cs.verify(model, plan, x)
    assert not result.gradients_equal
    assert not result.random_state_equal
    assert not result.ok


def under_autocast(uses: int, cache: bool) -> cs.Verification:
    """A linear layer that is used so often, in an ODE block."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    steps = [cs.ODEBlock(f, method="euler", steps=uses)] if uses else []
    model = nn.Sequential(nn.Linear(8, 16), *steps, nn.Linear(16, 4))
    x = torch.randn(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
        plan = cs.plan(cs.profile(model, x), budget="100%", cache=False)
        return cs.verify(model, plan, x)


@pytest.mark.parametrize("uses", [0, 1, 4, 9])
def test_the_callers_autocast_is_what_is_compared_with(uses: int) -> None:
    found = under_autocast(uses, cache=True)
    assert found.uncached_gradient_difference == 0
    assert (found.max_gradient_difference > 0) == (uses > 1)
    assert found.ok == (uses <= 1)
    assert ("add up the gradients" in str(found)) == (uses > 1)
    assert "without autocast's cache" in str(found)


@pytest.mark.parametrize("uses", [1, 9])
def test_without_the_cache_there_is_no_difference(uses: int) -> None:
    found = under_autocast(uses, cache=False)
    assert found.ok
    assert found.max_gradient_difference == 0
    assert found.uncached_gradient_difference is None
    assert "autocast's cache" not in str(found)


def test_verify_leaves_the_callers_cache_usable() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = layer(x)
        assert cs.verify(model, cs.plan(cs.profile(model, x), budget="100%", cache=False), x).ok
        (first.float().sum() + layer(x).float().sum()).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, 2 * x.sum(0).expand(8, 8), rtol=1e-2, atol=1e-1)


class Named(nn.Module):
    """A model that is given its batch by name, and gives its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.second(torch.relu(self.first(x))) + x
        return {"loss": (y - labels).square().mean(), "y": y}


@pytest.mark.parametrize("names", [("x", "labels"), ("labels", "x")])
def test_arguments_by_name_in_any_order(names: tuple[str, str]) -> None:
    model, kwargs = Named(), {name: torch.randn(4, 8) for name in names}
    plan = cs.plan(model, kwargs=kwargs, budget="100%")
    assert cs.verify(model, plan, kwargs=kwargs).ok


def test_plain_autograd_keeps_no_caches_where_the_recording_keeps_none() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**settings, num_layers=1, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    ids = torch.randint(0, 32, (4, 12))
    batch = {"input_ids": ids, "labels": ids.clone()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*next token.*")
        plan = cs.plan(model, budget="90%", kwargs=batch)
        found = cs.verify(model, plan, kwargs=batch, loss=lambda output: output.loss)
    assert found.ok, str(found)
    assert found.max_gradient_difference == 0
    assert model.config.use_cache
