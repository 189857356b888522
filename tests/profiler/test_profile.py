"""Profiles: bytes that simulate to what is measured, and refusals that name the stage."""

from __future__ import annotations

import pickle
import random
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.base import progress_bar as bar
from ckptsched.memory.meters import AllocatorMeter, ProfilerMeter, default_meter
from ckptsched.solvers import baselines_for
from tests.support.networks import NETWORKS, conv_block, ode_net


@pytest.mark.parametrize("name", NETWORKS)
def test_planning_sizes_bound_the_ledger(name: str) -> None:
    torch.manual_seed(1)
    chain = cs.profile(*NETWORKS[name]())
    for baseline in baselines_for(chain):
        trace = baseline.solve(chain, 2**50).trace
        assert trace.ledger_peak_bytes is not None
        assert trace.ledger_peak_bytes <= trace.planning_peak_bytes, baseline.name


class Counting(nn.Module):
    """Counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_equal_steps_are_measured_once() -> None:
    def calls(steps: int) -> int:
        f = Counting()
        chain = cs.profile(cs.ODEBlock(f, "euler", steps), torch.randn(3, 4, requires_grad=True))
        assert len(chain) == steps
        assert len({id(stage) for stage in chain.stages}) <= 4
        return f.calls

    # The number of rounds of timing varies, but not with the number of steps.
    assert calls(2000) < 300
    assert calls(20) < 300


def test_profiling_leaves_no_trace() -> None:
    torch.manual_seed(2)
    model, x = ode_net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    same = [id(p) for p in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    cs.profile(model, x)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert same == [id(p) for p in (*model.parameters(), *model.buffers())]
    assert model.training


def test_both_meters_give_one_ledger() -> None:
    if not AllocatorMeter.available():
        pytest.skip("no C++ compiler for the counting allocator")
    torch.manual_seed(3)
    model, x = ode_net()
    by_allocator = cs.profile(model, x, meter=AllocatorMeter())
    by_profiler = cs.profile(model, x, meter=ProfilerMeter())
    for i, (one, other) in enumerate(zip(by_allocator.stages, by_profiler.stages, strict=True), 1):
        assert one.ledger == other.ledger, by_allocator.stage_name(i)


def test_ledger_of_a_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    chain = cs.profile(model, torch.randn(8, 10), loss=lambda y: y.sum())
    first, relu, last = chain.stages
    assert first.ledger is not None
    assert relu.ledger is not None
    assert last.ledger is not None
    assert first.ledger.state_bytes == 8 * 20 * 4
    assert first.ledger.tape_bytes == 0
    assert first.ledger.input_saved
    assert not first.ledger.output_saved
    assert first.parameter_gradient_bytes == (10 * 20 + 20) * 4
    assert relu.ledger.output_saved
    assert not relu.ledger.input_saved
    assert relu.parameter_gradient_bytes == 0
    assert last.parameter_gradient_bytes == (20 * 5 + 5) * 4
    # The gradient of a sum is one number, expanded; the caller holds the output, the value of the
    # loss and the number 1 that going back begins with.
    assert last.gradient_bytes == 4
    assert chain.held_bytes == 8 * 5 * 4 + 4 + 4
    assert chain.input_bytes == 0
    assert chain.input_gradient_bytes == 0
    assert not chain.random_state_bytes


def test_a_chain_that_draws_is_marked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(2, 4)
    assert cs.profile(model, x).random_state_bytes == torch.get_rng_state().nbytes
    assert cs.profile(model.eval(), x).random_state_bytes == 0


def test_signature_says_what_was_measured() -> None:
    model, x = ode_net()
    signature = cs.profile(model, x).signature
    assert signature is not None
    assert signature.input_shape == (4, 3, 16, 16)
    assert signature.input_dtype == "torch.float32"
    assert signature.device == "cpu"
    assert signature.training == "train"
    assert signature.threads == torch.get_num_threads()


class Returns(nn.Module):
    """Returns what a test asks for."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        values = {
            "nothing": None,
            "object": (x, object()),
            "text": "state",
            "growing": x.new_zeros(2, 4 + self.calls),
            "counting": x + self.calls,
            "own generator": x * torch.rand((), generator=GENERATOR),
        }
        if self.what == "in place":
            return x.add_(1)
        if self.what == "failure":
            raise RuntimeError("out of luck")
        return values[self.what]


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", r"stage '1' returned nothing \(None\) where a state was expected"),
        ("object", "stage '1' returned a object where a state was expected"),
        ("text", "stage '1' returned a str without tensors where a state was expected"),
        (
            "growing",
            r"stage '1' returned shape \(2, 5\).*run again on the same input, shape \(2, 6\)",
        ),
        ("counting", "stage '1' gives another result when it is run again"),
        ("own generator", "draws from a generator that is no attribute of its modules"),
        ("in place", "stage '1' changes its input in place"),
        ("failure", r"stage '1' failed on an input of shape \(2, 4\).*out of luck"),
    ],
)
def test_a_stage_that_cannot_be_run_again_is_named(what: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Returns(what))
    weights = [id(p) for p in model.parameters()]
    with pytest.raises(cs.ProfileError, match=message):
        cs.profile(model, torch.randn(2, 4))
    assert weights == [id(p) for p in model.parameters()]
    model[1] = nn.Tanh()
    assert len(cs.profile(model, torch.randn(2, 4))) == 2


def test_parameters_that_a_stage_does_not_own_are_refused() -> None:
    embedding = nn.Embedding(8, 4)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [embedding]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.hidden[0].weight.T

    with pytest.raises(cs.ProfileError, match="uses a parameter that its module does not own"):
        cs.profile(nn.Sequential(embedding, Tied()), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["python", "numpy", "own of python", "own of numpy", "in a list"])
def test_stages_that_draw_from_other_generators_draw_the_same_again(kind: str) -> None:
    own: Any = {"own of python": random.Random(1), "own of numpy": np.random.default_rng(1)}
    drawn = {"python": random, "numpy": np.random, "in a list": np.random.RandomState(1)} | own

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = [drawn[kind]] if kind == "in a list" else own.get(kind)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * drawn[kind].uniform(0, 1))

    def states() -> bytes:
        found = [random.getstate(), np.random.get_state()]
        return pickle.dumps((found, skipping.own))

    skipping = Skipping()
    model, x = nn.Sequential(*(nn.Linear(4, 4), nn.Tanh(), skipping) * 2), torch.randn(512, 4)
    before = states()
    chain = cs.profile(model, x)
    assert states() == before
    assert chain.draws
    plan = cs.plan(chain, budget=cs.plan(chain, budget="100%").least_budget_bytes)
    assert plan.forwards > len(chain)
    result = cs.verify(model, plan, x)
    assert result.ok, result
    assert states() == before


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Tanh())
    with pytest.raises(cs.ProfileError, match=r"gradients of layout torch\.sparse_coo"):
        cs.profile(model, torch.zeros(3, dtype=torch.int64))


class Writes(nn.Module):
    """Changes a buffer that others may read; returns the buffer itself, if asked."""

    def __init__(self, shared: torch.Tensor, *, returns: bool = False) -> None:
        super().__init__()
        self.inner, self.returns = nn.Linear(4, 4), returns
        self.register_buffer("shared", shared)

    def forward(self, x: Any) -> Any:
        y = self.inner(x[0] if isinstance(x, tuple) else x)
        self.shared.add_(1)
        return (y, self.shared) if self.returns else y


class Reads(nn.Module):
    def __init__(self, shared: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("shared", shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.shared


def test_buffers_that_stages_read_and_change_are_named() -> None:
    shared = torch.ones(4)
    model = nn.Sequential(Writes(shared), nn.BatchNorm1d(4), Reads(shared), nn.Linear(4, 4))
    signature = cs.profile(model, torch.randn(2, 4)).signature
    assert signature.hidden == ("0.shared", "2.shared")
    assert torch.equal(shared, torch.ones(4))


def test_a_buffer_that_is_returned_and_changed_is_refused() -> None:
    model = nn.Sequential(*[Writes(torch.ones(4), returns=True) for _ in range(3)])
    with pytest.raises(cs.ProfileError, match=r"stage '0' returns a buffer that it reads and chan"):
        cs.profile(model, torch.randn(2, 4), loss=lambda output: output[0].sum())


def test_bad_arguments() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(cs.ProfileError, match="a sample to call the model with, found nothing"):
        cs.profile(model)
    with pytest.raises(cs.ProfileError, match="found a list without tensors"):
        cs.profile(model, [1.0])
    with pytest.raises(cs.ProfileError, match="the sample is a object where a state was expected"):
        cs.profile(model, object())
    with pytest.raises(cs.ProfileError, match=r"needs an nn\.Module, found a function"):
        cs.profile(lambda x: x, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(cs.ProfileError, match="must return one number"):
        cs.profile(model, torch.ones(2, 4), loss=lambda y: y)
    with pytest.raises(cs.ProfileError, match="does not depend on the output"):
        cs.profile(model, torch.ones(2, 4), loss=lambda y: torch.ones(()))
    with pytest.raises(cs.ProfileError, match=r"given the output alone.*targets"):
        cs.profile(model, torch.ones(2, 4), loss=nn.CrossEntropyLoss())
    with pytest.raises(cs.ProfileError, match="loss is 'mse'; give a function"):
        cs.profile(model, torch.ones(2, 4), loss="mse")  # type: ignore[arg-type]
    with pytest.raises(cs.ProfileError, match=r"dtype torch.int64; a loss needs"):
        cs.profile(nn.Sequential(nn.Identity()), torch.ones(2, dtype=torch.int64))
    with pytest.raises(cs.ProfileError, match="Sequential"):
        cs.profile(nn.Sequential(), torch.ones(2))


def test_inference_mode_around_profile_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), torch.randn(3, 4)
    with torch.inference_mode():
        chain = cs.profile(model, x)
        made_inside = nn.Sequential(nn.Linear(4, 4))
    assert [s.ledger for s in chain.stages] == [s.ledger for s in cs.profile(model, x).stages]
    cs.checkpointed(model, cs.plan(chain, budget="100%"))(x).sum().backward()
    with pytest.raises(cs.ProfileError, match=r"'0.weight' of the model was made under torch.inf"):
        cs.profile(made_inside, x)


class Slow(nn.Module):
    """Takes long enough for a progress bar."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x + 1


def test_progress_goes_to_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(progress: bool | None, patience: float = 0.1) -> str:
        monkeypatch.setattr(bar, "PATIENCE_SECONDS", patience)
        cs.profile(nn.Sequential(Slow()), torch.ones(1, 2, requires_grad=True), progress=progress)
        out, err = capsys.readouterr()
        assert not out
        return err

    assert "profiling" in shown(True)
    assert not shown(True, patience=60)
    assert not shown(False)
    assert not shown(None)  # what pytest puts in the place of stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "profiling" in shown(None)
    assert not shown(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_profile_on_cuda() -> None:
    model = nn.Sequential(conv_block(8), nn.Flatten(), nn.Linear(8 * 64, 4)).cuda()
    chain = cs.profile(model, torch.randn(4, 8, 8, 8, device="cuda"))
    assert chain.signature is not None
    assert chain.signature.device == "cuda"
    assert all(stage.state_bytes > 0 for stage in chain.stages[:-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["every_stage", "store_all"])
def test_the_loss_that_is_assumed_takes_what_one_in_float32_takes(
    dtype: torch.dtype, solver: str
) -> None:
    """Losses of half outputs are computed in float32; where none is named, that is provided for."""
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh())])
    x = torch.randn(256, 32)
    with torch.autocast("cpu", dtype=dtype):
        made = cs.plan(cs.profile(model, x), budget=2**40, solver=solver)
    net = cs.checkpointed(model, made)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype):
            y = net(x)
        y.float().square().mean().backward()

    step()
    model.zero_grad()
    _, measured = default_meter("cpu").measure(step)
    assert measured.peak_bytes <= made.peak_bytes


class CellTwice(nn.Module):
    """A layer that is used again in other stages, so that its gradient is there at a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.other, self.last = (nn.Linear(96, 96) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.sigmoid(self.other(torch.tanh(self.cell(x))))
        y: Tensor = self.cell(x) * torch.tanh(self.last(x))
        return y


@pytest.mark.parametrize("cuts", ["dear", "lean"])
def test_gradients_that_later_stages_have_made_are_not_charged_twice(cuts: Any) -> None:
    torch.manual_seed(0)
    model, x = CellTwice(), torch.randn(4, 96, requires_grad=True)
    captured = cs.captured(model, x, cuts=cuts)
    chain = cs.profile(captured, captured.take(x))
    whole = cs.plan(chain, budget="100%")
    for budget in (whole.least_budget_bytes, whole.peak_bytes):
        plan = cs.plan(chain, budget=budget)
        result = cs.verify(captured, plan, captured.take(x))
        assert result.ok, str(result)
        assert plan.peak_bytes - 128 <= result.measured_peak_bytes <= plan.peak_bytes
