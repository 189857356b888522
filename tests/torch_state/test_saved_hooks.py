"""Hooks on what autograd saves: tapes are packed as they would be without a plan."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.profiler.profile import default_loss
from ckptsched.recompute import tape_contents
from ckptsched.recompute.side_outputs import Look
from ckptsched.recompute.tape import record
from ckptsched.tensors.pytree import State, storages
from ckptsched.tensors.weak import referent
from ckptsched.torch_state.saved_hooks import describe_hooks, hooks_now, no_hooks
from tests.support.networks import planned
from tests.support.surroundings import (
    CPU,
    SOLVERS,
    Around,
    Stage,
    chain_of,
    equal,
    gradients,
    lossy,
    sample,
)


def test_tapes_are_packed_as_in_the_forward() -> None:
    model, x = chain_of(Stage), sample(Stage)
    expected = gradients(model, model, x, lossy)
    assert not equal(expected, gradients(model, model, x, nullcontext))
    for solver in SOLVERS:
        with lossy():
            plan = planned(model, x, solver)
        found = gradients(cs.checkpointed(model, plan), model, x, lossy)
        assert equal(found, expected), solver
    assert hooks_now() is None


def test_hooks_that_were_not_planned_are_named_once() -> None:
    model, x = chain_of(Stage), sample(Stage)
    plan = planned(model, x, "every_stage")
    trained = cs.checkpointed(model, plan)
    expected = gradients(model, model, x, save_on_cpu)
    with pytest.warns(cs.BudgetWarning, match=rf"save_on_cpu.*peak of {plan.peak_bytes} bytes"):
        found = gradients(trained, model, x, save_on_cpu)
    assert equal(found, expected)
    gradients(trained, model, x, save_on_cpu)  # a warning would be an error here
    with save_on_cpu():
        there = planned(model, x, "every_stage")
    with pytest.warns(cs.BudgetWarning) as told:
        cs.checkpointed(model, there)(x)
    messages = [str(warning.message) for warning in told]
    assert "and is not packed" in messages[0]
    # Where torch does not show what hooks pack, the profile has not seen it, and stages say so.
    assert len(messages) == 1 or not tape_contents.SHOWS_WHAT_IS_SAVED
    assert all("were projected" in message for message in messages[1:])


@pytest.mark.parametrize("solver", SOLVERS)
def test_bytes_among_hooks_that_were_planned(solver: str) -> None:
    model, x = chain_of(Stage), sample(Stage)
    with save_on_cpu():
        plan = planned(model, x, solver)
    trained, meter = cs.checkpointed(model, plan), default_meter(CPU)
    model.zero_grad()
    with save_on_cpu():
        trained(x).square().mean().backward()
        model.zero_grad()
        with meter.window() as window:
            default_loss(trained(x)).backward()
    assert window.phases[0].peak_bytes <= plan.peak_bytes


def test_the_input_is_kept_as_it_is_for_one_more_backward() -> None:
    model, x = chain_of(Stage), sample(Stage)
    with lossy():
        trained = cs.checkpointed(model, planned(model, x, "every_stage"))
        expected = model(x)
        y = trained(x)
    weights = list(model.parameters())
    right = torch.autograd.grad(expected.sum(), weights)
    torch.autograd.grad(y.sum(), weights, retain_graph=True)
    assert equal(list(torch.autograd.grad(y.sum(), weights)), list(right))


def test_hooks_are_described() -> None:
    assert describe_hooks(None) == ""
    with save_on_cpu():
        assert describe_hooks(hooks_now()) == "save_on_cpu.pack_to_cpu"


class Penalising(Stage):
    """Leaves a penalty on itself, as expert layers do."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.penalty = y.square().mean()
        return y


@pytest.mark.parametrize("solver", SOLVERS)
def test_stages_that_leave_something_besides_are_packed_alike(solver: str) -> None:
    model, x = chain_of(Penalising), sample(Stage)

    def step(run: nn.Module, around: Around) -> list[Tensor]:
        model.zero_grad()
        with around():
            y = run(x)
        (y.square().mean() + sum(stage.penalty for stage in model)).backward()  # type: ignore[misc]
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = step(model, lossy)
    assert not equal(expected, step(model, nullcontext))
    with lossy():
        plan = planned(model, x, solver)
    assert equal(step(cs.checkpointed(model, plan), lossy), expected)


def test_hooks_of_ckptsched_are_no_hooks() -> None:
    """A planned model inside a stage of another sees those that the user has set."""
    look = Look()
    with look.keeping_aliases():
        assert hooks_now() is None
    with save_on_cpu():
        with look.keeping_aliases():
            assert describe_hooks(hooks_now()) == "save_on_cpu.pack_to_cpu"
        with no_hooks():
            assert hooks_now() is None
        assert hooks_now() is not None


class Regions(nn.Module):
    """Layers as they are, one in a region of torch's checkpoint, one whose hook unpacks once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.norm = nn.BatchNorm1d(8)

    def in_a_region(self, x: Tensor) -> Tensor:
        self.calls.append("region")
        return torch.exp(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        pool: list[Tensor] = []

        def pack(tensor: Tensor) -> int:
            pool.append(tensor.detach())
            return len(pool) - 1

        def unpack(k: int) -> Tensor:
            self.calls.append("unpack")
            return pool.pop(k)

        y = checkpoint(self.in_a_region, torch.tanh(x), use_reentrant=False)
        with saved_tensors_hooks(pack, unpack):
            y = torch.sigmoid(y)
        return torch.sigmoid(y)


@pytest.mark.parametrize("shows", [False, True], ids=["unpacked", "shown"])
@pytest.mark.parametrize("look", [Look, lambda: None], ids=["aliases", "as it is"])
def test_a_look_at_a_tape_calls_no_hook(
    shows: bool, look: Callable[[], Look | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shows and not tape_contents.SHOWS_WHAT_IS_SAVED:
        pytest.skip("this torch shows what is saved only by unpacking it")
    monkeypatch.setattr(tape_contents, "SHOWS_WHAT_IS_SAVED", shows)
    stage, x = Regions(), torch.randn(4, 8)
    twin, leaf = Regions(), x.clone().requires_grad_()
    twin(leaf).sum().backward()
    tape, y = record(stage, State.of(x), wanted=[True], look=look())
    calls, before = list(stage.calls), sys.getprofile()
    tracked: list[str] = []
    sys.setprofile(lambda frame, event, argument: tracked.append(event))
    try:
        profiler = sys.getprofile()
        (contents,) = tape.contents()
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)
    assert stage.calls == calls == ["region"]
    assert tracked  # who profiles goes on
    sizes = [n for home, n in contents.saved.items() if home not in storages(y.leaves)]
    assert sizes == [x.nbytes]  # tanh's output: what hooks have packed nobody sees
    (found,) = tape.backward([torch.ones_like(y.value())])
    assert found is not None
    assert torch.equal(found, leaf.grad)
    assert stage.calls == twin.calls
    assert equal([*stage.buffers()], [*twin.buffers()])


def test_what_a_weak_reference_leads_to_outlives_the_graph_that_kept_it() -> None:
    y = torch.ones(3, requires_grad=True).exp()
    squared, reference = y * y, weakref.ref(y)
    del y
    found = referent(reference)
    assert found is not None  # the graph keeps the very object
    del squared
    assert torch.equal(found, torch.ones(3).exp())
    del found
    assert referent(reference) is None
