"""Stages of a recorded model, compiled one by one."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptsched as cs
from ckptsched.capture.compiled_stages import CompiledStage, Compiler

# The compiler hides this warning of its own from users, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

WIDTH = 16


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wide(self.norm(x)).view(-1, 8, 3 * WIDTH).split(WIDTH, dim=2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(-1, WIDTH)
        x = x + functional.dropout(self.narrow(y), 0.1, self.training) * self.scale
        x = 2 - x[:, list(range(WIDTH))].relu_()
        return self.last(x.T.contiguous().T)


class Net(nn.Module):
    """Layers of one class, whose ends differ."""

    def __init__(self, depth: int = 3, part: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.part, self.head = part(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.part(x)), labels)


class Odd(nn.Module):
    """With calls that are left as they are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean()
        return Tripled.apply(x - mean)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Recurrent(nn.Module):
    """With a call that torch does not compile."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.cell(x)[0]
        return found


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(128, WIDTH, generator=generator),
        torch.randint(4, (128,), generator=generator),
    )


def planned(model: nn.Module, backend: bool | str, budget: str) -> tuple[Any, Any]:
    net = cs.captured(model, *batch(), compile=backend, cuts="every")
    x = net.take(*batch())
    plan = cs.plan(cs.profile(net, x, loss=net.give), budget=budget)
    run = cs.checkpointed(net, plan)
    return net, lambda: net.give(run(x))


def step(owner: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    """Loss, gradients, buffers and random state of one step."""
    owner.zero_grad()
    torch.manual_seed(2)
    loss = call()
    loss.backward()
    gradients = [p.grad.clone() for p in owner.parameters() if p.grad is not None]
    buffers = [buffer.clone() for buffer in owner.buffers()]
    return [loss.detach(), *gradients, *buffers, torch.get_rng_state()]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others) > 2
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def compiler_of(net: Any) -> Compiler:
    found: Compiler = net.compiler
    return found


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_stages_give_what_plain_autograd_gives(backend: str) -> None:
    model = Net(2)
    twin = copy.deepcopy(model)
    net, call = planned(model, backend, "80%")
    assert all(isinstance(stage, CompiledStage) for stage in net.stages())
    assert compiler_of(net).refused == ()
    before = compiler_of(net).count
    for _ in range(2):
        found, expected = step(model, call), step(twin, lambda: twin(*batch()))
        if backend == "eager":
            assert_same(found, expected)
        for one, other in zip(found, expected, strict=True):  # others round in their own way
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert compiler_of(net).count == before  # a step compiles nothing more


class Residual(nn.Module):
    def __init__(self, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(depth)])
        self.scales = nn.ParameterList([torch.ones(WIDTH) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            y = functional.dropout(torch.tanh(layer(x)), self.dropout)
            x = x + y * scale
        return x


def test_equal_layers_share_what_is_compiled() -> None:
    counts, stages = [], []
    for depth in (3, 6):
        net = cs.captured(Residual(depth), batch()[0], compile="eager", cuts="every")
        with torch.no_grad():
            net(net.take(batch()[0]))
        counts.append(compiler_of(net).count)
        stages.append(len(net.stages()))
    assert counts[0] == counts[1] < stages[0] < stages[1]


def test_the_measured_peak_is_within_the_projected_one() -> None:
    net = cs.captured(Net(2), *batch(), compile="aot_eager", cuts="every")
    x = net.take(*batch())
    plan = cs.plan(cs.profile(net, x, loss=net.give), budget="80%")
    assert plan.overhead > 0
    assert cs.verify(net, plan, x, loss=net.give).ok


@pytest.mark.parametrize("part", [Odd, Recurrent])
def test_what_cannot_be_compiled_runs_as_it_is(part: Callable[[], nn.Module]) -> None:
    model = Net(1, part)
    twin = copy.deepcopy(model)
    net, call = planned(model, "eager", "100%")
    compiled = [isinstance(stage, CompiledStage) for stage in net.stages()]
    assert any(compiled)
    if part is Odd:
        assert not all(compiled)
    else:
        assert any("LSTM" in why for why in compiler_of(net).refused)
    assert_same(step(model, call), step(twin, lambda: twin(*batch())))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler of generated code
def test_generated_code_gives_it_but_for_rounding() -> None:
    model, x = Residual(4, dropout=0.2), batch()[0]
    twin = copy.deepcopy(model)
    net = cs.captured(model, x, compile=True, cuts="smallest")

    def loss(output: Any) -> Tensor:
        found: Tensor = net.give(output).square().mean()
        return found

    plan = cs.plan(cs.profile(net, net.take(x), loss=loss), budget="80%")
    assert plan.overhead > 0
    run = cs.checkpointed(net, plan)
    found = step(model, lambda: loss(run(net.take(x))))
    plain = step(twin, lambda: twin(x).square().mean())
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(found[-1], plain[-1])  # what was drawn
    assert cs.verify(net, plan, net.take(x), loss=loss).ok  # beside the same code, to the bit


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(cs.ProfileError, match=r"compile=True needs a compiler of C\+\+"):
        cs.captured(Net(1), *batch(), compile=True)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(cs.ProfileError, match=r"compile is 'no-such'.*inductor"):
        cs.captured(Net(1), *batch(), compile="no-such")


def test_a_compiler_can_be_copied_and_pickled() -> None:
    compiler = Compiler("eager")
    assert copy.deepcopy(compiler) is compiler
    assert pickle.loads(pickle.dumps(compiler)).backend == "eager"
