"""Stages whose path hangs on data, draws or attributes: plain autograd's bits, no silent byte.

A budget is kept, or a `BudgetWarning` names the stage with both figures; gradients are right in
any case.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.base.errors import BudgetWarning, ExecutionError, WorkloadError
from ckptsched.memory.meters import default_meter
from ckptsched.ode import ODEBlock

WIDTH = 32


class LayerDrop(nn.Module):
    """A residual layer that is left out now and then: its output is then its input."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.a, self.b = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand(()).item() < self.p:
            return x
        return x + self.b(torch.relu(self.a(x)))


class Experts(nn.Module):
    """Each row goes to the experts of its highest scores."""

    def __init__(self, count: int = 4, k: int = 1) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))
                for _ in range(count)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self.k)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, which = torch.nonzero(chosen == e, as_tuple=True)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, which, None])
        return x + out


class Capacity(Experts):
    """The same with room for some rows an expert; the others are passed by."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = x
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).nonzero().flatten()[:12]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return out


class EarlyExit(nn.Module):
    """Computes further only where it is not sure yet."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.more = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 6 * WIDTH)
        self.back = nn.Linear(6 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        sure = self.head(x).softmax(-1).amax(-1)
        if bool(sure.mean() > 0.45):
            return x * sure[:, None]
        return x + self.back(torch.tanh(self.more(x)))


class OnMean(nn.Module):
    """A branch on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return torch.tanh(self.a(x))
        return x + torch.sin(self.b(torch.exp(-self.a(x).square()))).cos()


class Masked(nn.Module):
    """Drops elements by a mask as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        keep = torch.rand_like(y) < torch.rand(())
        out = torch.zeros_like(y)
        out[keep] = torch.tanh(y[keep]).square()
        return out + x


class Depth(nn.Module):
    """Stochastic depth as torchvision has it: no path hangs on the draw."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        noise = torch.empty(len(y), 1, dtype=y.dtype).bernoulli_(0.5).div_(0.5)
        return x + y * noise


class Half(nn.Module):
    """f of an ODE that is another from half time on, and where the state is large."""

    def __init__(self, on_state: bool = False) -> None:
        super().__init__()
        self.on_state = on_state
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.c = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, t: Any, x: Tensor) -> Tensor:
        if (x.abs().max() > 3) if self.on_state else t > 0.5:
            return torch.tanh(self.c(torch.relu(self.b(x))))
        return -torch.tanh(self.a(x))


class Padded(nn.Module):
    """Takes out rows that are padding: how many is for the data to say."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x[x[:, 0] > 0]))


class Gate(nn.Module):
    """A branch that the data choose, with a weight that one path uses twice and one once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return torch.tanh(self.a(y)) if x.flatten()[0] > 0 else y


class T(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.l(x))


def row(make: Callable[[], nn.Module], count: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *[make() for _ in range(count)])


def shared(stage: nn.Module) -> nn.Module:
    return nn.Sequential(T(), stage, stage, T(), stage, stage, T())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer drop": lambda: row(LayerDrop, 6),
    "layer drop first": lambda: nn.Sequential(*[LayerDrop() for _ in range(4)], T()),
    "layer drop, shared": lambda: shared(LayerDrop()),
    "experts": lambda: row(Experts),
    "experts, two a row": lambda: row(lambda: Experts(k=2)),
    "experts, shared": lambda: shared(Experts()),
    "capacity": lambda: row(Capacity),
    "early exit": lambda: row(EarlyExit),
    "branch on the mean": lambda: row(OnMean),
    "mask as an index": lambda: row(Masked),
    "padding": lambda: nn.Sequential(T(), Padded(), T(), T(), T()),
    "weights used twice": lambda: shared(Gate()),
    "ode on time": lambda: nn.Sequential(T(), ODEBlock(Half(), steps=6), T()),
    "ode on the state": lambda: nn.Sequential(ODEBlock(Half(on_state=True), "rk4", steps=5), T()),
}


def batch(seed: int) -> Tensor:
    """Batches that differ in size and in sign."""
    x = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x * 2.0 ** (seed % 4 - 1) + (seed % 3 - 1) * 0.4


def squares(output: Tensor) -> Tensor:
    return output.square().mean()


def profiled(model: nn.Module, seed: int) -> cs.Chain:
    return cs.profile(model, batch(seed), loss=squares)


def step(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[list[Tensor | None], int]:
    """Loss, random state and gradients of a step, and its peak in bytes."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(seed)

    def run() -> Tensor:
        output = model(x)  # held to the end, as a training loop does
        value = squares(output)
        value.backward()
        del output
        return value.detach()

    value, measured = default_meter("cpu").measure(run)
    return [value, torch.get_rng_state(), *[p.grad for p in model.parameters()]], (
        measured.peak_bytes
    )


def warned(
    model: nn.Module, x: Tensor, seed: int = 0
) -> tuple[list[Tensor | None], int, list[str]]:
    """The same, and what the step warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, peak = step(model, x, seed)
    return found, peak, [str(w.message) for w in caught if w.category is BudgetWarning]


def assert_same(expected: list[Tensor | None], found: list[Tensor | None]) -> None:
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def plans(chain: cs.Chain, parts: tuple[float, ...] = (0.0, 0.5, 1.0)) -> Iterator[cs.Plan]:
    top = cs.plan(chain, budget=2**50)
    least = top.least_budget_bytes
    for part in parts:
        yield cs.plan(chain, budget=int(least + part * max(0, top.peak_bytes - least)))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_exact_and_no_budget_is_broken_silently(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    chain = profiled(model, 0)
    kept = 0
    for plan in plans(chain):
        planned, told = cs.checkpointed(copy.deepcopy(model), plan), False
        for seed in range(8):
            expected, _ = step(model, batch(seed), seed)
            found, peak, words = warned(planned, batch(seed), seed)
            assert_same(expected, found)
            told = told or bool(words)
            assert told or peak <= plan.budget_bytes
            kept += not told
    assert kept  # the profile has seen something of what batches may ask for


@pytest.mark.parametrize("name", ["layer drop", "experts", "branch on the mean", "padding"])
def test_the_most_that_other_draws_take_is_planned(name: str) -> None:
    """A profile of the batch that takes least still plans for the others."""
    model = MODELS[name]()
    taken = {step(model, batch(seed), seed)[1]: seed for seed in range(20)}
    torch.manual_seed(taken[min(taken)])
    chain = profiled(model, taken[min(taken)])
    plan = cs.plan(chain, budget=2**50, solver="store_all")
    assert max(taken) <= plan.peak_bytes
    most = taken[max(taken)]
    _, peak, words = warned(cs.checkpointed(model, plan), batch(most), most)
    assert peak <= plan.peak_bytes
    assert not words


@pytest.mark.parametrize(
    "make",
    [
        Depth,
        lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH)),
        lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5), nn.Linear(5, WIDTH)),
    ],
)
def test_draws_that_choose_no_path_stay_exact_to_the_byte(make: Callable[[], nn.Module]) -> None:
    model = row(make)
    chain = profiled(model, 0)
    assert not any(s.ledger and s.ledger.bounds and s.ledger.bounds.varies for s in chain.stages)
    for plan in plans(chain):
        planned = cs.checkpointed(copy.deepcopy(model), plan)
        for seed in range(2):
            _, peak, words = warned(planned, batch(seed), seed)
            # Stages share tapes in the second step, but where that takes more than is planned.
            assert peak == plan.peak_bytes if seed == 0 else peak <= plan.peak_bytes
            assert not words


class Attribute(nn.Module):
    """What it computes is set from outside; shapes and numbers of operations may stay."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.deep, self.a = 1, False, nn.Linear(WIDTH, 16 * WIDTH)
        self.b = nn.Linear(16 * WIDTH, WIDTH)
        self.hidden: dict[str, int] = {"k": 1}

    def forward(self, x: Tensor) -> Tensor:
        k = self.k * self.hidden["k"] * WIDTH
        y = torch.sigmoid(F.linear(x, self.a.weight[:k], self.a.bias[:k]))
        y = torch.tanh(torch.exp(-y)) if self.deep else y
        return x + F.linear(y, self.b.weight[:, :k])


@pytest.mark.parametrize("name", ["k", "deep"])
def test_a_change_of_attributes_is_said_once_with_stage_and_bytes(name: str) -> None:
    model = row(Attribute, 4)
    chain = profiled(model, 0)
    for plan in plans(chain):
        net = copy.deepcopy(model)
        planned = cs.checkpointed(net, plan)
        assert not warned(planned, batch(1))[2]
        setattr(net[3], name, 9)
        expected, _ = step(net, batch(2))
        found, _, words = warned(planned, batch(2))
        assert_same(expected, found)
        (text,) = words
        assert "stage '3' has a tape" in text
        before = chain.stages[3].ledger
        assert before is not None
        assert f"{before.tape_bytes + before.state_bytes} bytes" in text
        assert not warned(planned, batch(3))[2]


class Pairs(nn.Module):
    """Hands a residual on; what it computes is set from outside, and shapes stay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(WIDTH, WIDTH), 1

    def forward(self, pair: Any) -> Any:
        x, h = pair if isinstance(pair, tuple) else (pair, pair)
        for _ in range(self.times):
            h = torch.tanh(self.linear(h))
        return x, h


class Block(cs.StagedModule):
    """Stages of one block, which share a tape once they have been seen."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def stages(self) -> list[Any]:
        return [cs.ModuleStage(layer, f"layers.{k}") for k, layer in enumerate(self.layers)]


def test_stages_of_several_storages_that_share_a_tape_are_compared_with_what_was_planned() -> None:
    """A stage's residual and its hidden state lie in two storages; the first is handed on."""
    block = Block(*[Pairs() for _ in range(6)])
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), block)
    loss = lambda pair: (pair[0] * pair[1]).sum()  # noqa: E731
    chain = cs.profile(model, batch(0), loss=loss)
    trained = cs.checkpointed(model, cs.plan(chain, budget=2**40))

    def words() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(trained(batch(0))).backward()
        return [str(w.message) for w in caught]

    assert [words(), words(), words()] == [[], [], []]  # the second time stages share a tape
    block.layers[3].times = 4
    (text,) = words()
    assert re.match(r"stages '1\[1\]' to '1\[5\]' have", text)
    ledger = chain.stages[4].ledger
    assert ledger is not None
    assert ledger.parts is not None
    size = batch(0).nbytes
    found, projected = (int(n) for n in re.findall(r"(\d+) bytes \(", text))
    assert found - projected == 3 * size
    assert words() == []


def test_what_no_attribute_and_no_count_shows_is_seen_within_64_tapes() -> None:
    model = row(Attribute, 2)
    planned = cs.checkpointed(model, cs.plan(profiled(model, 0), budget=2**40))
    step(planned, batch(0))
    for stage in (model[1], model[2]):
        stage.hidden["k"] = 7
    words = [text for _ in range(64) for text in warned(planned, batch(0))[2]]
    assert len(words) == 2


class Foreign(nn.Module):
    """Uses a tensor that nobody knows of, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.on = nn.Linear(WIDTH, WIDTH), False
        self.constants = [torch.randn(WIDTH, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return y * self.constants[0] if self.on else y


def test_a_later_path_that_uses_what_is_not_registered_is_refused() -> None:
    model = row(Foreign)
    for plan in plans(profiled(model, 0)):
        net = copy.deepcopy(model)
        planned = cs.checkpointed(net, plan)
        step(planned, batch(0))
        step(planned, batch(0))
        net[2].on = True
        with pytest.raises(ExecutionError, match="stage '2' uses a tensor"):
            step(planned, batch(0))


class Twice(nn.Module):
    """An attribute says how often the weight is used, and whether a view of it adds in."""

    def __init__(self) -> None:
        super().__init__()
        self.often = 1
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.often):
            x = torch.tanh(self.a(x))
        return x if self.often == 1 else x + self.b + self.b.view(24, WIDTH)


@pytest.mark.parametrize("make", [shared, lambda m: ODEBlock(m, steps=6)], ids=["row", "ode"])
@pytest.mark.parametrize("order", [(1, 3, 1, 2), (3, 1, 1, 3)])
def test_uses_of_one_path_decide_no_bit_of_another(
    make: Callable[[nn.Module], nn.Module], order: tuple[int, ...]
) -> None:
    stage = Twice()
    model = make(stage)
    for plan in plans(profiled(model, 0)):
        planned = cs.checkpointed(model, plan)
        for seed, stage.often in enumerate(order):
            assert_same(step(model, batch(seed))[0], warned(planned, batch(seed))[0])
        stage.often = 1


def test_profiling_a_dynamic_model_leaves_no_trace() -> None:
    model = row(LayerDrop)
    before, values = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    profiled(model, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(values.values(), model.state_dict().values(), strict=True)
    )


class Endless(nn.Module):
    """A loop that ends for small inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        while x.abs().max() > 12:
            y = y * 1.0
        return y


def test_a_loop_that_another_input_never_ends_is_given_up() -> None:
    x = torch.full((4, WIDTH), 11.0)
    chain = cs.profile(nn.Sequential(Endless(), T()), x)
    assert chain.stages[0].ledger is not None
    assert chain.stages[0].ledger.bounds is not None
    assert chain.stages[0].ledger.bounds.varies


def test_a_walk_finds_what_was_measured() -> None:
    model = nn.Sequential(T(), nn.LayerNorm(WIDTH), nn.Sequential(nn.GELU(), nn.Dropout(0.5)), T())
    for stage in profiled(model, 0).stages:
        assert stage.ledger is not None
        assert stage.ledger.bounds is not None
        assert stage.ledger.bounds.saved_bytes == stage.ledger.tape_bytes


def test_chains_carry_what_tapes_are_compared_with(tmp_path: Path) -> None:
    chain = profiled(row(LayerDrop), 0)
    chain.save(tmp_path / "chain.json")
    assert cs.Chain.load(tmp_path / "chain.json") == chain
    data = chain.to_json()
    for kind in data["kinds"]:
        del kind["ledger"]["bounds"]  # as files were written before
    old = cs.Chain.from_json(data)
    assert [s.ledger and s.ledger.bounds for s in old.stages] == [None] * len(chain)
    for key, value in (
        ("saved_bytes", -1),
        ("largest_bytes", 0.5),
        ("used_bytes", "1"),
        ("varies", 2),
    ):
        data = chain.to_json()
        data["kinds"][0]["ledger"]["bounds"][key] = value
        with pytest.raises(WorkloadError, match=key):
            cs.Chain.from_json(data)
