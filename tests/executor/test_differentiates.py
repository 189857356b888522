"""Stages that differentiate inside: forces, Hamiltonian nets, flows, hooks that ask for gradients.

Whatever a stage does with autograd itself, a planned step gives plain autograd's bits within the
projected bytes, at any budget.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.simulator.simulator import simulate
from tests.support.random_schedules import schedules

# torch.func imports torch.jit, which is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


class Layer(nn.Module):
    """A plain stage between those that differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Energy(nn.Module):
    """Derived from by stages that differentiate a scalar of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1))

    def energy(self, z: Tensor) -> Tensor:
        return self.h(z).sum()  # type: ignore[no-any-return]


class Hamiltonian(Energy):
    def forward(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.energy(z), z, create_graph=True)
        q, p = g.chunk(2, -1)
        return z + 0.1 * torch.cat((p, -q), -1)


class Asking(Energy):
    """Lets its own input require a gradient, if that is a leaf."""

    def forward(self, z: Tensor) -> Tensor:
        z = z.requires_grad_(True) if z.is_leaf else z
        (g,) = torch.autograd.grad(self.energy(z), z, create_graph=True)
        return z - 0.1 * g


class AskingAlways(Energy):
    def forward(self, z: Tensor) -> Tensor:
        z.requires_grad_(True)
        (g,) = torch.autograd.grad(self.energy(z), z, create_graph=True)
        return z - 0.1 * g


class OwnLeaf(Energy):
    """Makes a leaf, and cuts what comes before it off."""

    def forward(self, z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.energy(leaf), leaf, create_graph=True)
        return z - 0.1 * g


class Forces(Energy):
    """As networks for molecules do: create_graph follows the mode."""

    def forward(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(self.energy(z), z, create_graph=self.training)
        return z - 0.1 * g


class ByItsFeatures(Energy):
    """Looks at what autograd shows of its input; each way gives other numbers or gradients."""

    def forward(self, z: Tensor) -> Tensor:
        if z.is_leaf:
            z = z.detach() * 2
        if z.requires_grad:
            z = z + 1
        if torch.is_grad_enabled():
            z = z * 0.5
        return z + self.h(z)


class Hooked(Energy):
    def forward(self, z: Tensor) -> Tensor:
        inner = torch.tanh(self.h[0](z))
        inner.register_hook(lambda g: 2 * g)
        if z.requires_grad:
            z.register_hook(lambda g: 0.5 * g)
        return z + self.h[2](inner)


class Functional(Energy):
    """By the transforms of torch.func."""

    def __init__(self, transform: str) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor) -> Tensor:
        weights = dict(self.h.named_parameters())

        def one(row: Tensor) -> Tensor:
            return torch.func.functional_call(self.h, weights, row).sum()

        if self.transform == "grad":
            return z - 0.1 * torch.func.vmap(torch.func.grad(one))(z)
        if self.transform == "vjp":
            _, pull = torch.func.vjp(torch.tanh, z)
            return z - pull(self.h(z).expand_as(z))[0]
        if self.transform == "jacrev":
            return z - 0.1 * torch.func.vmap(torch.func.jacrev(one))(z)
        return z - 0.01 * torch.func.vmap(torch.func.hessian(one))(z).sum(-1)


class Classic(Energy):
    """By torch.autograd.functional, and twice by torch.autograd.grad."""

    def forward(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.energy(z), z, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), z, create_graph=True)
            jacobian = torch.autograd.functional.jacobian(self.energy, z, create_graph=True)
        return z - 0.1 * g - 0.01 * h + 0.01 * jacobian


class Divergence(Energy):
    """Hutchinson's estimate, with noise from torch's generator."""

    def forward(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            v = torch.tanh(z @ self.h[0].weight.T @ self.h[0].weight)
            noise = torch.randn_like(z)
            (e,) = torch.autograd.grad(v, z, noise, create_graph=True)
        return z + 0.1 * v - 0.1 * (e * noise).sum(-1, keepdim=True)


STAGES: dict[str, Callable[[], nn.Module]] = {
    "hamiltonian": Hamiltonian,
    "asking": Asking,
    "asking always": AskingAlways,
    "own leaf": OwnLeaf,
    "forces": Forces,
    "features": ByItsFeatures,
    "hooked": Hooked,
    "func grad": lambda: Functional("grad"),
    "func vjp": lambda: Functional("vjp"),
    "func jacrev": lambda: Functional("jacrev"),
    "func hessian": lambda: Functional("hessian"),
    "classic": Classic,
    "divergence": Divergence,
}


def outcome(model: nn.Module, x: Any, steps: int = 2) -> tuple[list[Tensor | bool | None], int]:
    """All that some steps change, and their peak in bytes; the input is the same tensor."""
    torch.manual_seed(5)
    if isinstance(x, Tensor):
        x = x.detach().clone().requires_grad_(x.requires_grad)

    peak = 0

    def run() -> None:
        output = model(x)
        output.square().mean().backward()
        del output

    for _ in range(steps):
        _, measured = default_meter("cpu").measure(run)
        peak = max(peak, measured.peak_bytes)
    found: list[Tensor | bool | None] = [p.grad for p in model.parameters()]
    if isinstance(x, Tensor):
        found += [x.grad, x.requires_grad]
    return [*found, *model.buffers(), torch.get_rng_state()], peak


def same(one: Tensor | bool | None, other: Tensor | bool | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other


def check(make: Callable[[], nn.Module], x: Any, shares: int = 3, steps: int = 2) -> list[cs.Plan]:
    """Compare with plain autograd from the least budget to that of keeping everything."""
    torch.manual_seed(0)
    model = make()
    expected, _ = outcome(copy.deepcopy(model), x, steps)
    wanted = x.requires_grad if isinstance(x, Tensor) else None
    chain = cs.profile(model, x)
    assert not isinstance(x, Tensor) or (x.requires_grad, x.grad) == (wanted, None)
    everything = cs.plan(chain, budget=2**40)
    least = everything.least_budget_bytes
    assert least is not None
    plans = []
    for share in range(shares):
        budget = least + (everything.peak_bytes - least) * share // (shares - 1)
        plan = cs.plan(chain, budget=budget)
        found, peak = outcome(cs.checkpointed(copy.deepcopy(model), plan), x, steps)
        assert len(found) == len(expected)
        assert all(map(same, found, expected)), (share, budget)
        assert peak <= plan.peak_bytes <= budget
        plans.append(plan)
    return plans


@pytest.mark.parametrize("wanted", [False, True], ids=["data", "leaf"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_differentiates_trains_as_by_plain_autograd(name: str, wanted: bool) -> None:
    """First in a chain, where the input is a leaf, and later, where it has a history."""
    make = STAGES[name]
    x = X.repeat(32, 1) if name == "divergence" else X.clone()  # snapshots take 5 kB each
    x.requires_grad_(wanted)
    first = [] if name != "hamiltonian" or wanted else [Layer()]  # where plain autograd fails
    # A hook on the caller's own leaf stays there, and doubles what the next step does.
    steps = 1 if name == "hooked" else 2
    plans = check(
        lambda: nn.Sequential(*first, make(), Layer(), make(), Layer(), make()), x, steps=steps
    )
    assert len({plan.peak_bytes for plan in plans}) == 3


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("hamiltonian", "step"),
        ("hamiltonian", "slope"),
        ("own leaf", "step"),
        ("forces", "slope"),
        ("func grad", "step"),
    ],
)
def test_a_block_of_steps_that_differentiate(name: str, granularity: Any) -> None:
    def make() -> nn.Module:
        block = cs.ODEBlock(
            STAGES[name](), method="rk4", steps=6, time_dependent=False, granularity=granularity
        )
        return nn.Sequential(Layer(), block, Layer())

    plans = check(make, X)
    assert len({plan.peak_bytes for plan in plans}) == 3


def test_a_block_that_comes_first() -> None:
    check(lambda: nn.Sequential(cs.ODEBlock(Asking(), method="heun", steps=5), Layer()), X)
    check(
        lambda: nn.Sequential(cs.ODEBlock(Hamiltonian(), method="euler", steps=5)),
        X.clone().requires_grad_(),
    )


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.sampled_from(["hamiltonian", "asking", "own leaf", "hooked"]), st.data())
def test_any_schedule_runs_stages_that_differentiate(name: str, data: st.DataObject) -> None:
    make = STAGES[name]
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), make(), make(), cs.ODEBlock(make(), steps=3), Layer())
    expected, _ = outcome(copy.deepcopy(model), X)
    chain = cs.profile(model, X)
    schedule = data.draw(schedules(len(chain)))
    trace = simulate(chain, schedule)
    plan = dataclasses.replace(
        cs.plan(chain, budget=2**50, solver="store_all"),
        schedule=schedule,
        trace=trace,
        budget_bytes=trace.peak_bytes,
        solver="drawn",
    )
    found, _ = outcome(cs.checkpointed(copy.deepcopy(model), plan, check="outputs"), X)
    assert all(map(same, found, expected))
    found, peak = outcome(cs.checkpointed(copy.deepcopy(model), plan), X)
    assert all(map(same, found, expected))
    assert peak <= plan.peak_bytes


def test_modes_are_planned_apart() -> None:
    """In eval mode forces have no graph, and go back all the same."""
    check(lambda: nn.Sequential(Layer(), Forces(), Layer(), Forces()).eval(), X)


# -- outputs that come to require a gradient


class Table(nn.Module):
    """Frozen embeddings; its output requires a gradient all the same, as a hook asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4).requires_grad_(False)
        self.table.register_forward_hook(_require)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)  # type: ignore[no-any-return]


def _require(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(Table(), Layer(), Layer(), Layer()),
        lambda: nn.Sequential(Table(), frozen(Layer()), frozen(Layer()), Layer(), Layer()),
        lambda: nn.Sequential(frozen(nn.Embedding(10, 4)), Asking(), Layer(), Asking()),
        lambda: nn.Sequential(frozen(nn.Embedding(10, 4)), frozen(Asking()), Layer(), Asking()),
        lambda: nn.Sequential(Table(), ByItsFeatures(), frozen(ByItsFeatures()), Hamiltonian()),
    ],
    ids=["hook", "hook, frozen after", "asking", "frozen and asking", "features"],
)
def test_outputs_of_frozen_stages_that_come_to_require_gradients(
    make: Callable[[], nn.Module],
) -> None:
    check(make, torch.arange(64) % 10)


def test_an_embedding_with_the_hook_itself() -> None:
    def make() -> nn.Module:
        table = frozen(nn.Embedding(10, 4))
        table.register_forward_hook(_require)
        return nn.Sequential(table, *(Layer() for _ in range(5)))

    plans = check(make, torch.arange(64) % 10)
    assert len({plan.peak_bytes for plan in plans}) == 3


def test_what_the_first_stage_asks_for_is_asked_of_the_caller_as_by_plain_autograd() -> None:
    """Of that tensor alone which it asks for; the profile leaves all as they are."""

    class OfDict(Energy):
        def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            position = state["position"].requires_grad_()
            (g,) = torch.autograd.grad(self.energy(position), position, create_graph=True)
            return {"position": position - g, "charge": state["charge"]}

    class Sum(nn.Module):
        def forward(self, state: dict[str, Tensor]) -> Tensor:
            return state["position"] * state["charge"]

    torch.manual_seed(0)
    model = nn.Sequential(OfDict(), OfDict(), Sum())

    def batch() -> dict[str, Tensor]:
        return {"position": X.clone(), "charge": X.abs()}

    sample = batch()
    plan = cs.plan(model, sample, budget="90%")
    assert not sample["position"].requires_grad
    seen = []
    for net in (copy.deepcopy(model), cs.checkpointed(copy.deepcopy(model), plan)):
        given = batch()
        for _ in range(2):  # the second time it requires one from the start
            net(given).square().mean().backward()
        seen.append([given["position"].grad, *(p.grad for p in net.parameters())])
        assert given["position"].requires_grad
        assert not given["charge"].requires_grad
    assert all(map(same, *seen))
    assert cs.verify(model, plan, batch()).ok


# -- odeint


class Timed(nn.Module):
    """A right-hand side f(t, y) of a stage that differentiates."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():  # the first size of a step is found without gradients
            return self.inner(z) * torch.cos(t) - z


class ByTime(Energy):
    """Differentiates in time, too, which is a tensor of its own in every evaluation."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            t.requires_grad_()
            (rate,) = torch.autograd.grad(self.energy(z) * t**2, t, create_graph=True)
        return self.h(z) * rate - z


def solved(f: nn.Module, x: Tensor, options: dict[str, Any]) -> tuple[list[Any], int]:
    """All that a step through a solve changes, and its peak in bytes."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    f.zero_grad()
    torch.manual_seed(5)
    times = torch.linspace(0.0, 1.0, 7)

    def run() -> None:
        cs.odeint(f, x, times, **options).square().mean().backward()

    if "budget" in options:  # what is measured of it is measured in the first call
        cs.odeint(f, x.detach().clone().requires_grad_(x.requires_grad), times, **options)
        torch.manual_seed(5)
    _, measured = default_meter("cpu").measure(run)
    return [*(p.grad for p in f.parameters()), x.grad, x.requires_grad], measured.peak_bytes


RIGHT_HAND_SIDES: dict[str, Callable[[], nn.Module]] = {
    "asking": lambda: Timed(Asking()),
    "own leaf": lambda: Timed(OwnLeaf()),
    "func grad": lambda: Timed(Functional("grad")),
    "divergence": lambda: Timed(Divergence()),
    "time": ByTime,
}


@pytest.mark.parametrize("wanted", [False, True], ids=["data", "leaf"])
@pytest.mark.parametrize("name", RIGHT_HAND_SIDES)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "rk4"},
        {"method": "implicit_euler"},
        {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3},
    ],
    ids=["rk4", "implicit", "adaptive"],
)
def test_right_hand_sides_that_differentiate(
    name: str, options: dict[str, Any], wanted: bool
) -> None:
    torch.manual_seed(0)
    f, x = RIGHT_HAND_SIDES[name](), X.clone().requires_grad_(wanted)
    if (name, options["method"]) == ("divergence", "implicit_euler"):
        return  # noise leaves nothing to iterate to
    expected, peak = solved(copy.deepcopy(f), x, options)
    for budget in (2**24, peak, peak // 2):
        try:
            found, measured = solved(copy.deepcopy(f), x, {**options, "budget": budget})
        except cs.InfeasibleBudgetError as error:
            budget = error.least_budget_bytes or 0
            found, measured = solved(copy.deepcopy(f), x, {**options, "budget": budget})
        assert measured <= budget
        if budget == 2**24 or options["method"] != "bosh3":
            assert all(map(same, found, expected))
        assert found[-1] is expected[-1]
        for one, other in zip(found[:-1], expected[:-1], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_adaptive_steps_by_checkpoints_tell_own_leaves_from_others() -> None:
    torch.manual_seed(0)
    times = torch.linspace(0.0, 1.0, 3)
    for f, works in ((Timed(OwnLeaf()), True), (Timed(Cached()), False)):
        loss = cs.ode.solve_adaptive(f, X, times, "bosh3", checkpoints=2).states.square().mean()
        if works:
            loss.backward()
            continue
        with pytest.raises(cs.ExecutionError, match=r"shape \(4,\).*makes anew in every"):
            loss.backward()


def test_backsolve_lets_a_function_make_leaves() -> None:
    torch.manual_seed(0)
    f, times = Timed(OwnLeaf()), torch.linspace(0.0, 1.0, 3)
    states = cs.odeint(f, X, times, method="rk4", gradient="backsolve")
    states.square().mean().backward()
    assert f.inner.h[0].weight.grad is not None


# -- second backwards


def test_second_and_differentiable_backwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Hamiltonian(), OwnLeaf(), Layer())
    plan = cs.plan(model, X, budget="80%")
    twin, net = copy.deepcopy(model), cs.checkpointed(copy.deepcopy(model), plan)
    seen: list[list[Tensor | None]] = []
    for run in (twin, net):
        loss = run(X).square().mean()
        weights = list(run.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cs.BudgetWarning)
            first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        norm = torch.stack([g.square().sum() for g in first if g is not None]).sum()
        second = torch.autograd.grad(norm, weights, allow_unused=True)
        loss = run(X).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        seen.append([*second, *(w.grad for w in weights)])
    assert any(g is not None for g in seen[0])
    for a, b in zip(*seen, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, atol=1e-7)


# -- what is refused, and for what


class Cached(Energy):
    """Keeps a leaf from its first run, so that its gradient has somewhere to go."""

    leaf: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.leaf is None:
            object.__setattr__(self, "leaf", torch.ones(4, requires_grad=True))
        assert self.leaf is not None
        return z * self.leaf + self.h(z)


class GoingBack(Energy):
    def forward(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            self.energy(leaf).backward()
        assert leaf.grad is not None
        return z + self.h(z) - leaf.grad


class GoingBackToItsInput(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        z.sum().backward(retain_graph=True)
        return 2 * z


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            Cached,
            r"stage '1' uses a tensor that its module does not own.*: shape \(4,\), torch.float32",
        ),
        (GoingBack, r"stage '1' calls backward\(\) in its forward.*use torch.autograd.grad"),
        (GoingBackToItsInput, r"stage '1' calls backward\(\) in its forward"),
    ],
)
def test_what_would_lose_or_add_gradients_is_refused_for_that(
    stage: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(cs.ProfileError, match=message):
        cs.profile(nn.Sequential(Layer(), stage(), Layer()), X)


def test_what_plain_autograd_cannot_differentiate_is_told_in_its_words() -> None:
    with pytest.raises(cs.ProfileError, match=r"stage '0' failed.*does not require grad"):
        cs.profile(nn.Sequential(Hamiltonian(), Layer()), X)


class Turned(Energy):
    """Begins to differentiate, or to use another's parameter, once it is told to."""

    how = ""
    other = nn.Parameter(torch.ones(4))

    def forward(self, z: Tensor) -> Tensor:
        if self.how == "differentiates":
            (g,) = torch.autograd.grad(self.energy(z), z, create_graph=True)
            z = z - g
        elif self.how == "makes a leaf":
            z = z + torch.ones(4, requires_grad=True)
        return z + self.h(z)


def test_a_stage_that_begins_to_differentiate_after_planning_is_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Turned(), Layer(), Layer())
    plan = cs.plan(model, X, budget="100%")
    net = cs.checkpointed(model, plan)
    model[1].how = "makes a leaf"
    with pytest.raises(cs.ExecutionError, match="if the stage makes it anew in every run, profile"):
        net(X).sum().backward()
