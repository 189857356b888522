"""What `explain_memory` tells of a step, also where memory runs out, and what `fit` would give."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.live_storages import Kind


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x, scale=scale)
        return {"loss": x.square().mean()}


def step(model: nn.Module, x: Tensor) -> None:
    model(x, scale=0.5)["loss"].backward()


def test_a_step_and_its_cures() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 16)
    with cs.explain_memory(model) as seen:
        step(model, x)
    assert not seen.ran_out
    assert seen.live_bytes == sum(seen.bytes_of(kind) for kind in Kind)
    owned = sum(p.nbytes for p in model.parameters())
    assert seen.bytes_of(Kind.PARAMETERS) == owned
    least, *_ = sorted(cure.budget_bytes for cure in seen.cures)
    chain = cs.profile(model, x, kwargs={"scale": 0.5})
    whole = cs.plan(chain, budget="100%")
    assert seen.store_all_bytes == whole.store_all_bytes
    assert least == whole.least_budget_bytes
    for cure in seen.cures:
        cs.fit(copy.deepcopy(model), x, kwargs={"scale": 0.5}, budget=cure.budget_bytes)
    assert json.loads(json.dumps(seen.to_dict()))["live_bytes"] == seen.live_bytes
    text = str(seen)
    for said in ("activations", "parameter gradients", "blocks.0", f"budget={least}", "more time"):
        assert said in text
    assert "blocks.0" in seen._repr_html_()


def test_it_leaves_no_trace_and_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 16)
    plain = copy.deepcopy(model)
    step(plain, x)
    state, before = torch.get_rng_state(), [dict(vars(m)) for m in model.modules()]
    with cs.explain_memory(model):
        step(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert [vars(m).keys() for m in model.modules()] == [v.keys() for v in before]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_nothing_is_kept_alive() -> None:
    model, x = Net(), torch.randn(8, 16)
    batch = weakref.ref(x)
    with cs.explain_memory(model, cures=False) as seen:
        step(model, x)
    gone = weakref.ref(model)
    del model, x
    gc.collect()
    assert batch() is None
    assert gone() is None
    assert seen.live_bytes > 0
    assert "not asked for" in str(seen)


class Failing(torch.autograd.Function):
    """Runs out of memory, there or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: bool) -> Tensor:
        ctx.back = back
        if not back:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class RunsOut(Net):
    def __init__(self, *, back: bool) -> None:
        super().__init__()
        self.back, self.full = back, True

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        for block in self.blocks[:4]:
            x = block(x, scale=scale)
        if self.full:
            x = Failing.apply(x, self.back)  # type: ignore[no-untyped-call]
        return {"loss": self.blocks[5](x).square().mean()}


@pytest.mark.parametrize("back", [False, True])
def test_an_error_for_want_of_memory_stays_what_it_is_and_gets_a_note(back: bool) -> None:
    torch.manual_seed(0)
    model, x = RunsOut(back=back), torch.randn(32, 16)
    with (
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as failed,
        cs.explain_memory(model, cures=False) as seen,
    ):
        step(model, x)
    assert seen.ran_out
    [note] = failed.value.__notes__
    assert note == str(seen)
    assert "memory ran out" in note
    # The tanh of each block that was run is still kept: nothing has been given back.
    kept = [part for part in seen.live if part.kind is Kind.ACTIVATIONS]
    assert {f"blocks.{k}" for k in range(4)} <= {part.module for part in kept}


def test_the_cpus_allocator_is_known_by_what_it_says() -> None:
    class Greedy(Net):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
            self.blocks[0](x)
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4398046511104 bytes."
            )

    with (
        pytest.raises(RuntimeError, match="DefaultCPUAllocator") as failed,
        cs.explain_memory(Greedy(), cures=False) as seen,
    ):
        step(Greedy(), torch.randn(2, 16))
    assert seen.ran_out
    assert failed.value.__notes__ == [str(seen)]


def test_other_errors_pass_unchanged() -> None:
    model = Net()
    with pytest.raises(ValueError, match="mine") as failed, cs.explain_memory(model) as seen:
        raise ValueError("mine")
    assert not hasattr(failed.value, "__notes__")
    assert not seen.ran_out
    assert "ended in an error" in str(seen)


def test_a_fitted_model() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 16)
    plain = copy.deepcopy(model)
    step(plain, x)
    cs.fit(model, x, kwargs={"scale": 0.5}, budget="85%")
    with cs.explain_memory(model) as seen:
        step(model, x)
    assert [cure.budget_bytes for cure in seen.cures][-1] == cs.plan_of(model).least_budget_bytes
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_what_checkpointed_gives_and_a_fitted_part() -> None:
    torch.manual_seed(0)
    parts, x = nn.Sequential(*(Block() for _ in range(5))), torch.randn(32, 16)
    plan = cs.plan(cs.profile(parts, x), budget="90%")
    trained = cs.checkpointed(parts, plan)
    around = nn.Sequential(nn.Linear(16, 16), cs.fit(copy.deepcopy(parts), x, budget="90%"))
    for model in (trained, around):
        plain = copy.deepcopy(model.model if isinstance(model, cs.Checkpointed) else model)
        cs.unfit(plain if model is trained else plain[1])
        plain(x).sum().backward()
        with cs.explain_memory(model) as seen:
            model(x).sum().backward()
        assert seen.live_bytes > 0
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_model_that_is_planned_inside() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 16)
    plain = copy.deepcopy(model)
    step(plain, x)
    cs.fit(model, budget="85%")
    with cs.explain_memory(model) as seen:
        step(model, x)
    assert cs.plan_of(model).overhead > 0
    assert seen.bytes_of(Kind.ACTIVATIONS) > 0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_budget_that_nothing_fits_gets_a_note() -> None:
    model, x = Net(), torch.randn(32, 16)
    cs.fit(model, budget=1)
    with (
        pytest.raises(cs.InfeasibleBudgetError, match="least budget") as failed,
        cs.explain_memory(model, cures=False),
    ):
        step(model, x)
    assert "parameters" in failed.value.__notes__[0]


def test_bad_input_by_name() -> None:
    with pytest.raises(cs.ProfileError, match="was given a str"):
        cs.explain_memory("model")  # type: ignore[arg-type]
    block = cs.explain_memory(nn.Linear(2, 2))
    with block as seen:
        with pytest.raises(cs.ProfileError, match="still open"):
            _ = seen.live
        with pytest.raises(cs.ProfileError, match="in use"):
            block.__enter__()
    assert "not called" in str(seen)
