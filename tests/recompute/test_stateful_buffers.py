"""Stages that keep something for themselves: it is put back when they run again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

import ckptsched as cs
from ckptsched.recompute.stateful_buffers import HiddenBuffers, own_generators
from tests.support.networks import tight

SOLVERS = ("store_all", "every_stage", "every_2", "input_only")
Made = tuple[nn.Module, Tensor]


class Running(nn.Module):
    """Normalises by statistics that it moves before it reads them."""

    def __init__(self, width: int = 16, *, replaces: bool = False) -> None:
        super().__init__()
        self.inner, self.replaces = nn.Linear(width, width), replaces
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        moved = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.replaces:
            self.mean, self.count = moved, self.count + 1
        else:
            self.mean.copy_(moved)
            self.count += 1
        return torch.tanh(self.inner(x - self.mean)) * (1 + self.count / 10)


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.source = nn.Linear(width, width), [torch.Generator().manual_seed(3)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * torch.rand(x.shape, generator=self.source[0])


class Reading(nn.Module):
    """Reads the statistics of a BatchNorm."""

    def __init__(self, norm: nn.BatchNorm1d, *, runs: bool) -> None:
        super().__init__()
        self.norm, self.runs = norm, runs

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) if self.runs else x) + self.norm.running_mean


def layers(make: Callable[[], nn.Module], n: int = 4) -> nn.Sequential:
    return nn.Sequential(*[part for _ in range(n) for part in (make(), nn.Tanh())])


def ode(f: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), cs.ODEBlock(f, "heun", 5), nn.Linear(16, 3))


def shared() -> nn.Module:
    running = Running()
    return nn.Sequential(nn.Linear(16, 16), running, nn.Tanh(), running, nn.Linear(16, 16))


def statistics(*, runs: bool) -> nn.Module:
    norm = nn.BatchNorm1d(16)
    first = Reading(norm, runs=True) if runs else norm
    return nn.Sequential(nn.Linear(16, 16), first, nn.Tanh(), Reading(norm, runs=runs), nn.Tanh())


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: layers(lambda: spectral_norm(nn.Linear(16, 16))),
    "spectral norm of old": lambda: layers(lambda: old_spectral_norm(nn.Linear(16, 16))),
    "in a nested container": lambda: nn.Sequential(layers(Running, 2), nn.Linear(16, 4)),
    "steps": lambda: ode(nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.Dropout(0.2))),
    "steps with BatchNorm": lambda: ode(
        nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.BatchNorm1d(16))
    ),
    "running": lambda: layers(Running),
    "replaced": lambda: layers(lambda: Running(replaces=True)),
    "shared": shared,
    "statistics that the stage reads": lambda: statistics(runs=True),
    "statistics that another stage reads": lambda: statistics(runs=False),
    "generator": lambda: layers(Drawing),
    "steps that draw": lambda: ode(Drawing()),
}


def fresh(name: str) -> Made:
    torch.manual_seed(0)
    return HIDDEN[name](), torch.randn(8, 16)


def state_after(net: nn.Module, x: Tensor, *, backwards: int = 1) -> list[Tensor]:
    """All that a step leaves, twice."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = net(x).square().mean()
        for k in reversed(range(backwards)):
            y.backward(retain_graph=k > 0)
        found += [y.detach(), torch.get_rng_state(), *(p.grad.clone() for p in net.parameters())]
        found += [b.clone() for b in net.buffers()]
        found += [g.get_state() for g in own_generators(net.modules())]
    return found


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", HIDDEN)
def test_steps_equal_plain_autograd_to_the_bit_and_the_byte(name: str) -> None:
    model, x = fresh(name)
    twins = [fresh(name)[0] for _ in SOLVERS]
    for twin in twins:
        twin.load_state_dict(model.state_dict())
    chain = cs.profile(model, x)
    assert cs.Chain.from_json(chain.to_json()) == chain
    expected = state_after(fresh(name)[0], x)
    for solver, twin in zip(SOLVERS, twins, strict=True):
        plan = tight(chain, solver)
        assert equal(state_after(cs.checkpointed(twin, plan), x), expected), solver
        result = cs.verify(model, plan, x)
        assert result.ok, (solver, str(result))
        # Clones are charged as if each tape of a repeated run held them, and what a module keeps
        # of its last run to every tape of it.
        slack = sum(block.buffer_bytes for block in chain.blocks) + chain.kept_bytes
        assert result.measured_peak_bytes >= plan.peak_bytes - slack, solver


@pytest.mark.parametrize("name", HIDDEN)
def test_one_more_backward_begins_where_the_first_began(name: str) -> None:
    model, x = fresh(name)
    plan = tight(cs.profile(model, x), "every_2")
    expected = state_after(fresh(name)[0], x, backwards=1)
    twice = state_after(cs.checkpointed(fresh(name)[0], plan), x, backwards=2)
    gradients = [p.numel() for p in model.parameters()]
    # The first step's gradients, twice; what else a step leaves, once.
    start, stop = 2, 2 + len(gradients)
    for a, b in zip(twice[start:stop], expected[start:stop], strict=True):
        assert torch.allclose(a, 2 * b, rtol=1e-6, atol=0)
    assert equal(
        twice[:start] + twice[stop : len(twice) // 2],
        expected[:start] + expected[stop : len(twice) // 2],
    )


def test_batch_norm_takes_no_snapshots() -> None:
    model = layers(lambda: nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))
    chain = cs.profile(model, torch.randn(8, 16))
    assert chain.signature is not None
    assert chain.signature.hidden == ()
    assert not chain.kept_bytes
    assert not any(block.hidden_bytes for block in chain.blocks)


def test_a_generator_among_the_arguments_is_put_back() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, source: torch.Generator) -> Tensor:
            return self.inner(x) * torch.rand(x.shape, generator=source)

    class Staged(cs.StagedModule):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Given() for _ in range(4)])

        def stages(self) -> list[cs.StageCall]:
            return [cs.ModuleStage(part) for part in self.parts]

    model, x, source = Staged(), torch.randn(4, 8), torch.Generator().manual_seed(1)
    before = source.get_state()
    chain = cs.profile(model, x, source)
    assert torch.equal(source.get_state(), before)
    for solver in SOLVERS:
        result = cs.verify(model, tight(chain, solver), x, source)
        assert result.ok, str(result)
    assert torch.equal(source.get_state(), before)


def test_a_generator_that_is_not_found_is_refused_or_caught() -> None:
    source = torch.Generator()

    class Drifting(nn.Linear):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * torch.rand((), generator=source) if self.armed else y

    model, x = nn.Sequential(*[Drifting(4, 4) for _ in range(4)]), torch.randn(2, 4)
    plan = tight(cs.profile(model, x), "every_stage")
    model[1].armed = True
    with pytest.raises(cs.ProfileError, match="no attribute of its modules and no argument"):
        cs.profile(model, x)
    trained = cs.checkpointed(model, plan, check="outputs")
    with pytest.raises(cs.ExecutionError, match=r"stage '1' gave another result when it ran again"):
        trained(x).sum().backward()


def test_a_buffer_that_the_profile_saw_steady_must_stay_so() -> None:
    class Late(nn.Linear):
        armed = False

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.armed:
                self.seen += 1
            return super().forward(x) + self.seen

    model, x = nn.Sequential(*[Late() for _ in range(4)]), torch.randn(2, 4)
    trained = cs.checkpointed(model, tight(cs.profile(model, x), "every_stage"))
    trained(x).sum().backward()
    model[1].armed = True
    with pytest.raises(cs.ExecutionError, match="changed a buffer, and did not when the model was"):
        trained(x)


@pytest.mark.parametrize("name", ["spectral norm", "running", "steps"])
def test_copies_keep_hidden_state_of_their_own(name: str) -> None:
    model, x = fresh(name)
    expected = state_after(fresh(name)[0], x)
    trained = cs.checkpointed(model, tight(cs.profile(model, x), "every_2"))
    twin = copy.deepcopy(trained)
    assert equal(state_after(twin, x), expected)
    assert equal(state_after(trained, x), expected)


def test_hidden_state_that_is_not_put_back_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fresh("running")
    plan = tight(cs.profile(model, x), "every_2")

    def forget(self: HiddenBuffers, values: Any) -> None: ...

    assert cs.verify(model, plan, x).ok
    monkeypatch.setattr(HiddenBuffers, "put", forget)
    result = cs.verify(model, plan, x)
    assert not result.gradients_equal
    assert not result.ok


# -- frozen stages at the front


def frozen_front() -> Made:
    torch.manual_seed(1)
    front = [m for _ in range(4) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    model = nn.Sequential(*front, *[m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())])
    for parameter in model[: len(front)].parameters():
        parameter.requires_grad_(False)
    return model, torch.randn(32, 64)


def test_frozen_stages_at_the_front_are_one_that_costs_nothing_in_the_backward() -> None:
    model, x = frozen_front()
    chain = cs.profile(model, x)
    assert chain.signature is not None
    assert chain.signature.frozen == 12
    assert len(chain) == 9
    first = chain.stages[0]
    assert first.ledger is not None
    assert first.ledger.tape_bytes == first.backward_seconds == 0
    assert not first.ledger.input_saved
    assert chain.arrays.gradient_bytes[:2].tolist() == [0, 0]
    for solver in ("store_all", "every_2", "chain_dp"):
        plan = tight(chain, solver)
        result = cs.verify(model, plan, x)
        assert result.ok, str(result)
        assert result.measured_peak_bytes >= plan.peak_bytes - 32  # counters, cloned
    # With a gradient to send on, they are stages again.
    wanted = cs.profile(model, x.clone().requires_grad_())
    assert len(wanted) == len(model)


def test_nothing_is_kept_between_frozen_stages() -> None:
    model, x = frozen_front()
    plan = tight(cs.profile(model, x), "store_all")
    state = model[:12](x).detach()
    trained = tight(cs.profile(model[12:], state), "store_all")
    assert plan.peak_bytes == trained.peak_bytes + state.nbytes
    result = cs.verify(model, plan, x)
    assert result.measured_peak_bytes <= result.plain_peak_bytes


# -- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_runs_under_the_autocast_of_its_caller(dtype: torch.dtype) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x, x, x, need_weights=False)[0]

    torch.manual_seed(2)
    model, x = nn.Sequential(Attention(), nn.LayerNorm(16), Attention()), torch.randn(4, 6, 16)
    with torch.autocast("cpu", dtype=dtype):
        plan = tight(cs.profile(model, x), "every_stage")
    twin = copy.deepcopy(model)
    for inside in (False, True):
        for net in (cs.checkpointed(model, plan), twin):
            net.zero_grad()
            with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
                y = net(x).float().square().mean()
                if inside:
                    y.backward()
            if not inside:
                y.backward()
        assert equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
